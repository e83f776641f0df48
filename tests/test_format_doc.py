"""FORMAT.md is the law: every table and the worked example agree with both implementations."""

import re
from pathlib import Path

import pytest
from vectors import lossy, tiered
from vectors.generate import example
from vectors.read import HERE, stored_vectors

import kvwire
from kvwire import _native, limits
from kvwire.checksum import crc32c_plain
from kvwire.codec import Codec
from kvwire.control import (
    ABORT, COMMIT, DONE, END, GRANT, INDEX, ITEM, PULL, RECEIPT, REPAIR, SEGMENT, SEGMENT_END,
)
from kvwire.errors import ErrorCode
from kvwire.layout import Axis, DType, GroupKind
from kvwire.link_tables import TABLE_ANSWER, TABLE_FRAME, TABLE_NAME, TableState
from kvwire.manifest import MANIFEST, MetadataType
from kvwire.quantised import CODE_BITS, DTYPES, FLOATS, SCALED, Rung, decode_quantised
from kvwire.quantised import PART as QUANTISED_PART
from kvwire.speeds import SPEED, SPEEDS
from kvwire.tiered import PART, TABLE, StripForm, decode_tiered, element_format
from kvwire.wire import (
    FORMAT_VERSION, FRAME_MAGIC, GREETING, GREETING_MAGIC, HEADER, WRITERS, FrameType, Role,
    payload_rule,
)

LIMITS = {name: value for name, value in vars(limits).items() 
          if name.isupper() and not name.startswith("_")}
TEXT = (Path(kvwire.__file__).parent / "FORMAT.md").read_text()


def tables():
    """Return {heading of the section: [(column names, rows)]}; cells without backticks."""
    found, heading, rows = {}, "", []
    for line in [*TEXT.splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
        elif rows:
            found.setdefault(heading, []).append((rows[0], rows[2:]))
            rows = []
    return found


TABLES = tables()


def table(section, first, number=0):
    """Return the rows of a section's table whose first column is `first`."""
    (heading,) = [heading for heading in TABLES if heading.startswith(f"{section} ")]
    return [rows for names, rows in TABLES[heading] if names[0] == first][number]


def rows_after(sentence, first):
    """Return the rows of the first table after a sentence whose first column is `first`."""
    lines = TEXT[TEXT.index(sentence):].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[start + 2:]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])


STRUCTURES = {
    "greeting": (GREETING, table("5.", "offset")), "header": (HEADER, table("6.", "offset")),
    "manifest": (MANIFEST, table("7.1", "offset")), "grant": (GRANT, table("7.4", "offset")),
    "segment": (SEGMENT, table("7.5", "offset", 0)), "item": (ITEM, table("7.5", "offset", 1)),
    "segment_end": (SEGMENT_END, table("7.6", "offset")), "end": (END, table("7.7", "offset")),
    "receipt": (RECEIPT, table("7.8", "offset", 0)), "repair": (REPAIR, table("7.8", "offset", 1)),
    "done": (DONE, table("7.8", "offset", 2)), "abort": (ABORT, table("7.9", "offset")),
    "speeds": (SPEEDS, table("7.12", "offset", 0)), "speed": (SPEED, table("7.12", "offset", 1)),
    "pull": (PULL, table("7.10", "offset")), "commit": (COMMIT, table("7.11", "offset")),
    "part": (PART, table("9.1", "offset", 0)),
    "table_name": (TABLE_NAME, table("9.2", "offset", 0)),
    "table_answer": (TABLE_ANSWER, table("9.2", "offset", 1)),
    "table_frame": (TABLE_FRAME, [row for row in table("9.2", "offset", 2) if row[2] != "table"]),
    "code_table": (TABLE, [row for row in table("9.1", "offset", 1) if row[2] != "bases"]),
    "quantised part": (QUANTISED_PART, table("9.3", "offset")),
}


@pytest.mark.parametrize("structure, rows", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_offsets_and_sizes(structure, rows):
    stated = {name: (int(offset), int(count)) for offset, count, name, *_ in rows}
    assert structure.fields == stated
    assert structure.bytes == sum(count for _, count in stated.values())


@pytest.mark.parametrize("rows", [rows for _, rows in STRUCTURES.values()], ids=STRUCTURES.keys())
def test_fields_follow_one_another_and_name_known_errors(rows):
    at = 0
    for offset, count, *_, violation in rows:
        assert int(offset) == at
        at += int(count)
        for name in re.findall(r"[A-Z]+_[A-Z_]+", violation):
            assert name in ErrorCode.__members__


def test_the_index_is_as_the_prose_says():
    assert INDEX.fields == {"segment_offset": (0, 8), "chunk_count": (8, 4), "digest": (12, 4)}
    assert "`segment_offset` (8, file offset" in TEXT
    assert "`chunk_count` (4), `digest` (4)" in TEXT


def test_magics_and_version():
    (magic,) = re.findall(r"`([0-9A-F ]+)` \(\"KVWIRE\", CR, LF\)", TEXT)
    assert bytes.fromhex(magic) == GREETING_MAGIC
    (magic,) = re.findall(r"`([0-9A-F ]+)` \(\"KW\"\)", TEXT)
    assert bytes.fromhex(magic) == FRAME_MAGIC
    assert f"Format {FORMAT_VERSION} · document" in TEXT
    roles = re.search(r"`role` \| (.*?) \|", TEXT).group(1)
    assert roles == ", ".join(f"{role:d} {role.name.lower()}" for role in Role)


def test_frame_types():
    rows = [row for row in table("6.", "type") if row[1] != "–"]
    assert {name: int(number, 16) for number, name, *_ in rows} == {
        kind.name: kind.value for kind in FrameType}
    writers = {"sender": {Role.SENDER}, "receiver": {Role.RECEIVER}, "file": {Role.FILE},
               "both": {Role.SENDER, Role.RECEIVER}}
    for _, name, written_by, *_ in rows:
        assert WRITERS[FrameType[name]] == set().union(
            *(writers[who] for who in written_by.split(", ")))


PAYLOAD_BYTES = {
    "64 to control_bytes_max": (64, 1000, 1), "16": (16, 16, 1), "8": (8, 8, 1),
    "16 + 24 × items": (40, 16 + 24 * limits.ITEM_COUNT_MAX, 24), "48": (48, 48, 1),
    "1 to payload_bytes_max": (1, 2000, 1),
    "24 + metadata": (24, 24 + limits.METADATA_BYTES_MAX, 1),
    "16 × entries": (16, 16 * limits.RECEIPT_COUNT_MAX, 16), "32": (32, 32, 1), "0": (0, 0, 1),
    "8, else skipped": (0, 1000, 1),
    "24 × names, else skipped": (0, 1000, 1), "8 × answers, else skipped": (0, 1000, 1),
    "8 + table, else skipped": (0, 1000, 1),
    "16 + 16 × speeds, else skipped": (0, 1000, 1),
    "24 × entries": (24, 24 * limits.REPAIR_COUNT_MAX, 24),
    "32 + message": (32, 32 + limits.MESSAGE_BYTES_MAX, 1),
    "16 × segments + 8 × chunks": (0, limits.INDEX_BYTES_MAX, 8),
}


def test_payload_bytes_of_each_type():
    for _, name, _, payload_bytes, _ in table("6.", "type"):
        if name != "–":
            assert payload_rule(FrameType[name], 2000, 1000) == PAYLOAD_BYTES[payload_bytes], name


def test_enumerations():
    for kind, number in ((GroupKind, "group kind"), (Axis, "axis"), (DType, "dtype"),
                         (MetadataType, "metadata type")):
        rows = next(rows for names, rows in TABLES["7.1 MANIFEST"] if number in names)
        assert {name: int(value) for value, name, *_ in rows} == {
            member.name: member.value for member in kind}
    for _, name, item_bytes in next(rows for names, rows in TABLES["7.1 MANIFEST"]
                                    if "dtype" in names):
        assert DType[name].item_bytes == int(item_bytes)
    assert {name: int(number) for number, name, _ in table("9.", "number")} == {
        codec.name: codec.value for codec in Codec}
    assert {name: int(number) for number, name, _ in table("9.2", "number")} == {
        state.name: state.value for state in TableState}


def test_rungs():
    rows = table("9.3", "number")
    assert {name: int(number) for number, name, *_ in rows} == {
        rung.name: rung.value for rung in Rung}
    for _, name, dtypes, axes, body in rows:
        rung = Rung[name]
        assert tuple(sorted(DType[dtype] for dtype in dtypes.split(", "))) == tuple(
            sorted(DTYPES.get(rung, FLOATS)))
        assert axes == ("row, column" if rung in SCALED else "row" if rung in CODE_BITS else "0")
        if rung in CODE_BITS:
            assert body == f"groups, codes of {CODE_BITS[rung]} bits"


def test_limits():
    stated = {name.upper(): int(value) for name, value, _ in rows_after("**Limits.**", "name")}
    assert stated == LIMITS


def test_errors():
    rows = table("11.", "number")
    assert {name: int(number) for number, name, *_ in rows} == {
        code.name: code.value for code in ErrorCode}
    assert {part for *_, fate in rows for part in fate.split(", ")} == {
        "lane", "transfer", "chunk", "local"}


def test_every_name_of_an_error_in_the_text_is_one():
    names = set(re.findall(r"`([A-Z]+_[A-Z_]+)`", TEXT))
    known = set(ErrorCode.__members__) | set(FrameType.__members__) | set(GroupKind.__members__)
    assert names <= known, names - known


def test_checksum():
    assert "crc32c(\"123456789\") = 0xE3069283" in TEXT
    assert crc32c_plain(b"123456789") == 0xE3069283


def hex_dumps():
    """Return {file: bytes} of the worked example."""
    found = {}
    for file, block in re.findall(r"\(`(valid/[a-z_.]+)`\):\n\n```\n(.*?)```", TEXT, re.S):
        data = b""
        for offset, digits in re.findall(r"^([0-9a-f]{4})  ([0-9a-f ]+)$", block, re.M):
            assert int(offset, 16) == len(data), f"{file}: the line of offset {offset}"
            data += bytes.fromhex(digits)
        found[file] = data
    return found


def test_the_worked_example_is_a_vector():
    dumps = hex_dumps()
    assert set(dumps) == {"valid/minimal.bin", "valid/minimal.answers.bin"}
    for file, data in dumps.items():
        assert data == (HERE / file).read_bytes()
    assert example() in TEXT


def test_elements_and_strips_of_the_tiered_code():
    cuts = {DType[name]: tuple(map(int, numbers)) for name, *numbers in table("9.1", "dtype")}
    assert cuts == {dtype: (form.item_bytes, form.exponent_bits, form.verbatim_bits)
                    for dtype in DType if (form := element_format(dtype))}
    assert {name: int(number) for number, name, *_ in table("9.1", "number")} == {
        form.name: form.value for form in StripForm}
    (row,) = [row for row in table("9.1", "offset", 1) if row[2] == "bases"]
    assert int(row[0]) == TABLE.bytes


def dump_after(words):
    """Return the bytes of the first dump after `words`."""
    block = TEXT[TEXT.index(words):]
    block = block[:block.index("```", block.index("```") + 3)]
    data = b""
    for offset, digits in re.findall(r"^([0-9a-f]{4})  ([0-9a-f ]+)$", block, re.M):
        assert int(offset, 16) == len(data)
        data += bytes.fromhex(digits)
    return data


def test_the_worked_example_of_the_tiered_code():
    assert tiered.example() in TEXT
    data, raw = dump_after("**Example.** A part"), tiered.ELEMENTS.tobytes()
    assert decode_tiered(data, len(raw)) == raw == _native.tiered_decode(data, len(raw))


def test_the_worked_example_of_the_lossy_rungs():
    assert lossy.example() in TEXT
    data, raw = dump_after("**Example.** `INT4`"), lossy.example_raw()
    assert data == lossy.example_payload()
    placed = decode_quantised(data, len(raw))
    assert placed == _native.quantised_decode(data, len(raw)) != raw


def test_each_error_that_bytes_can_raise_has_a_vector():
    elsewhere = {
        "SOURCE_CHANGED", "CANCELLED", "DEADLINE_EXCEEDED", "OFFER_UNKNOWN",  # need no wrong byte
        *(code.name for code in ErrorCode if 300 <= code < 500 or code == ErrorCode.INTERNAL)}
    covered = {vector.error for vector in stored_vectors(valid=False)}
    assert covered == {code.name for code in ErrorCode} - elsewhere


def test_native_constants():
    constants = _native.format_constants()
    assert constants["greeting"] == GREETING.fields
    assert constants["header"] == HEADER.fields
    assert constants["frame_types"] == {kind.name: kind.value for kind in FrameType}
    assert constants["errors"] == {code.name: code.value for code in ErrorCode}
    assert constants["limits"] == {name.lower(): value for name, value in LIMITS.items()}
    for name, kind in (("group_kinds", GroupKind), ("axes", Axis), ("dtypes", DType)):
        assert constants[name] == {member.name: member.value for member in kind}
    for name, number in constants["codecs"].items():
        assert Codec[name] == number
