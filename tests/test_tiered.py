"""FORMAT.md §9.1: the reference by itself, and every variant of the kernels against it."""

import dataclasses
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvwire import _native
from kvwire.errors import ErrorCode, KvwireError
from kvwire.layout import DType
from kvwire.tiered import (
    OPAQUE, PART, TABLE, CodeTable, Part, decode_tiered, element_format, encode_tiered,
)

DTYPES = [dtype for dtype in DType if element_format(dtype)]
VARIANTS = _native.tiered_variants()
SHAPES = [bits for count in range(1, 5) for bits in itertools.product(range(1, 5), repeat=count)
          if sum(bits) <= 8 and sum((1 << b) - 1 for b in bits) <= 16]


def kinds_of_bytes(kind: str, raw_bytes: int, item_bytes: int, seed: int) -> bytes:
    """Return `raw_bytes` bytes such as caches have them, and such as they have not."""
    random = np.random.default_rng(seed)
    count = raw_bytes // item_bytes
    if kind == "noise":
        return random.bytes(raw_bytes)
    if kind == "constant":
        return random.bytes(item_bytes) * count
    if kind == "nearly constant":
        data = bytearray(random.bytes(item_bytes) * count)
        data[random.integers(raw_bytes)] ^= 1 << int(random.integers(8))
        return bytes(data)
    scale = {"gauss": 1, "denormals": 1e-40, "wide": 10.0 ** random.integers(-30, 30, count)}
    with np.errstate(over="ignore"):
        values = (random.standard_normal(count) * scale.get(kind, 1)).astype(np.float32)
    if kind == "specials":
        values[random.random(count) < 0.4] = random.choice([np.nan, np.inf, -np.inf, 0.0, -0.0])
    bits = values.view(np.uint32)
    if item_bytes == 2:  # as bf16; as fp16 they are odd, which is welcome
        return (bits >> 16).astype("<u2").tobytes()
    return bits.astype("<u4").tobytes() if item_bytes == 4 else \
        (bits >> 21).astype(np.uint8).tobytes()


KINDS = ["gauss", "noise", "constant", "nearly constant", "denormals", "wide", "specials"]


def fitted(raw: bytes, dtype: DType, tier_bits: tuple[int, ...]) -> CodeTable:
    """A table whose first ranks are the most frequent exponents of `raw`."""
    form = element_format(dtype)
    symbols = 1 << form.exponent_bits
    exponents = np.frombuffer(raw, f"<u{form.item_bytes}") >> form.verbatim_bits - 1 & symbols - 1
    base = (int(np.median(exponents)) - 8) % symbols
    counts = np.bincount((exponents.astype(int) - base) % symbols, minlength=symbols)
    ranks = sum((1 << bits) - 1 for bits in tier_bits)
    offsets = np.argsort(-counts, kind="stable")[:ranks].tolist()
    return CodeTable(dtype, tier_bits, tuple(offsets), row_bases=bytes([base]))


@st.composite
def code_tables(draw, dtypes=tuple(DTYPES), window: int | None = None) -> CodeTable:
    """Tables of any shape. `window`: the first offset lies near where Gaussian data want it."""
    dtype = draw(st.sampled_from(dtypes))
    symbols = 1 << element_format(dtype).exponent_bits
    tier_bits = draw(st.sampled_from([bits for bits in SHAPES
                                      if sum((1 << b) - 1 for b in bits) <= symbols]))
    ranks = sum((1 << bits) - 1 for bits in tier_bits)
    stop = max(ranks, min(symbols, window or symbols))
    offsets = draw(st.permutations(range(stop)))[:ranks]
    extents = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    masks = st.integers(0, (1 << len(extents)) - 1)
    row_axes, column_axes = draw(masks), draw(masks)

    def bases(axes, none):
        chosen = [extent for axis, extent in enumerate(extents) if axes >> axis & 1]
        count = int(np.prod(chosen)) if axes else none
        near = (127 - stop // 2) % symbols
        return bytes((near + step) % symbols for step in draw(
            st.lists(st.integers(0, 3), min_size=count, max_size=count)))

    rows = bases(row_axes, 1)
    columns = bytes(len(bases(column_axes, 0)))
    return CodeTable(dtype, tier_bits, tuple(offsets), extents, row_axes, column_axes, rows,
                     columns)


@st.composite
def coded(draw, elements_max: int = 300):
    """(raw, parts): one to three parts of any kind, tables inside or not."""
    raw, parts = b"", []
    for _ in range(draw(st.integers(1, 3))):
        table = draw(st.none() | code_tables(window=24) | code_tables())
        item_bytes = table.format.item_bytes if table else 1
        count = draw(st.integers(1, elements_max) | st.sampled_from([64, 128, 4096, 4097, 8300]))
        kind = draw(st.sampled_from(KINDS))
        raw += kinds_of_bytes(kind, count * item_bytes, item_bytes, draw(st.integers(0, 99)))
        position = draw(st.integers(0, table.period - 1)) if table else 0
        index = len(parts) + 1 if table and draw(st.booleans()) else 0
        parts.append(Part(count * item_bytes, table, position, index))
    return raw, parts


def tables_of(parts):
    return {part.table_index: part.table for part in parts if part.table_index}


def native_encode(raw, parts, variant, out_max=None):
    tuples = [(part.raw_bytes, part.table and part.table.encode(), part.position,
               part.table_index) for part in parts]
    return _native.tiered_encode(raw, tuples, variant, out_max)


def outcome(decode, *arguments):
    """Return the bytes, or the error's code."""
    try:
        return decode(*arguments)
    except KvwireError as error:
        return error.code


def decodings(payload, raw_bytes, tables=None):
    """Return what the reference, then every variant makes of `payload`."""
    tables = tables or {}
    stored = {index: table.encode() for index, table in tables.items()}
    return [outcome(decode_tiered, payload, raw_bytes, tables.get)] + [
        outcome(_native.tiered_decode, payload, raw_bytes, stored, variant)
        for variant in VARIANTS]


# ---- the reference

@given(coded())
def test_what_is_coded_comes_back(case):
    raw, parts = case
    assert decode_tiered(encode_tiered(raw, parts), len(raw), tables_of(parts).get) == raw


@given(code_tables())
def test_a_table_comes_back(table):
    data = table.encode()
    read, taken = CodeTable.decode(data + b"more")
    assert taken == len(data) and len(data) % 16 == 0
    assert read.encode() == data and read.name == table.name
    assert (read.bases(0, 40) == table.bases(0, 40)).all()


@given(coded())
def test_it_hardly_grows(case):
    raw, parts = case
    fixed = sum(16 + 15 + 15 + 2 * -(-part.raw_bytes // 4096)
                + (len(part.table.encode()) if part.table and not part.table_index else 0)
                for part in parts)
    assert len(encode_tiered(raw, parts)) <= len(raw) + fixed


def test_a_full_chunk_of_noise_grows_by_less_than_a_thousandth():
    raw = np.random.default_rng(1).bytes(1 << 18)
    for dtype in DTYPES:
        table = CodeTable(dtype, (2, 2, 2, 2), tuple(range(12)))
        assert len(encode_tiered(raw, [Part(len(raw), table)])) < 1.001 * len(raw) + 128


# ---- every rule, broken once by name

TABLE_OF_16 = CodeTable(DType.BF16, (2, 2), (3, 4, 5, 2, 6, 1), (4, 4), 1, 2, bytes([120] * 4),
                        bytes([0, 1, 2, 1]))
RAW = kinds_of_bytes("gauss", 2 * 70, 2, seed=3)
PAYLOAD = encode_tiered(RAW, [Part(len(RAW), TABLE_OF_16, 5)])
LINKED = encode_tiered(RAW, [Part(len(RAW), TABLE_OF_16, 5, table_index=7)])
PLANES_AT = PART.bytes + 16 + 70  # of tier 1, in LINKED


def changed(data, at, value, count=1):
    assert data[at:at + count] != value.to_bytes(count, "little")
    return data[:at] + value.to_bytes(count, "little") + data[at + count:]


def in_part(field, value, data=LINKED):
    offset, count = PART.fields[field]
    return changed(data, offset, value, count)


def in_table(field, value, at=0):
    """Change one byte of a field, or the whole of a count."""
    offset, count = TABLE.fields[field]
    return changed(PAYLOAD, PART.bytes + offset + at, value, count if "count" in field else 1)


def opaque(index: bytes, *pieces: bytes, raw_bytes=3) -> bytes:
    data = b"".join((index, bytes(-len(index) % 16), *pieces))
    data += bytes(-len(data) % 16)
    return PART.pack({"raw_bytes": raw_bytes, "coded_bytes": PART.bytes + len(data),
                      "table_index": OPAQUE}) + data


BROKEN = {
    "no part": b"",
    "raw_bytes 0": in_part("raw_bytes", 0),
    "raw_bytes too many": in_part("raw_bytes", 142),
    "raw_bytes too few": in_part("raw_bytes", 138),
    "raw_bytes cuts an element": in_part("raw_bytes", 139),
    "coded_bytes no multiple": in_part("coded_bytes", len(LINKED) - 1) + bytes(15),
    "coded_bytes beyond the end": in_part("coded_bytes", len(LINKED) + 16),
    "coded_bytes below the header": in_part("coded_bytes", 0),
    "coded_bytes too few": in_part("coded_bytes", len(LINKED) - 16),
    "position at the period": in_part("position", 16),
    "position in an opaque part": in_part("position", 1, opaque(b"\0\x40", b"abc")),
    "header cut": LINKED + b"\1",
    "a part too many": LINKED + opaque(b"\0\x40", b"abc"),
    "index padding": changed(LINKED, PART.bytes + 15, 1),
    "form 3": changed(LINKED, PART.bytes + 1, 0xC0),
    "tiered in an opaque part": opaque(b"\0\0", b"abc"),
    "exact with a tail": opaque(b"\1\x40", b"abcd"),
    "constant without its element": opaque(b"\0\x80", b""),
    "constant with too much": opaque(b"\2\x80", b"ab"),
    "part padding": LINKED[:-1] + b"\1",
    "padding too long": in_part("coded_bytes", len(LINKED) + 16) + bytes(16),
    "unused bits of tier 1": changed(LINKED, PLANES_AT + 8, 0x80 | LINKED[PLANES_AT + 8]),
    "dtype INT8": in_table("dtype", int(DType.INT8)),
    "dtype 0": in_table("dtype", 0),
    "tier_count 0": in_table("tier_count", 0),
    "tier_count 5": in_table("tier_count", 5),
    "tier_bits 0": in_table("tier_bits", 0),
    "tier_bits 5": in_table("tier_bits", 5),
    "tier_bits 9 together": changed(in_table("tier_count", 3), PART.bytes + 4, 5),
    "tier_bits beyond the last": in_table("tier_bits", 1, at=2),
    "more than 16 ranks": in_table("tier_bits", 4),
    "row_axes 16": in_table("row_axes", 16),
    "column_axes 16": in_table("column_axes", 16),
    "offsets equal": in_table("offsets", 4),
    "offsets beyond the last": in_table("offsets", 9, at=6),
    "extents 0": in_table("extents", 0),
    "period too long": changed(PAYLOAD, PART.bytes + 24, 1 << 31, 4),
    "row_count wrong": in_table("row_count", 5),
    "column_count wrong": in_table("column_count", 3),
    "table padding": changed(PAYLOAD, PART.bytes + 48 + 15, 1),
    "table cut": PART.pack({"raw_bytes": 140, "coded_bytes": 32}) + PAYLOAD[16:32],
}


def fp8_payload(offset=0, base=0):
    table = CodeTable(DType.E4M3, (1,), (offset,), row_bases=bytes([base]))
    return encode_tiered(b"\1\2", [Part(2, table)])


BROKEN |= {"an offset too large": fp8_payload(offset=16), "a base too large": fp8_payload(base=16)}


def test_the_payloads_that_are_broken_below_are_right():
    for payload in (PAYLOAD, LINKED):
        assert set(decodings(payload, len(RAW), {7: TABLE_OF_16})) == {RAW}
    assert set(decodings(opaque(b"\0\x40", b"abc"), 3)) == {b"abc"}
    assert set(decodings(fp8_payload(), 2)) == {b"\1\2"}


@pytest.mark.parametrize("payload", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_refused(payload):
    whole = int.from_bytes(payload[:4], "little")
    raw_bytes = whole if whole in (2, 3) else len(RAW)
    assert set(decodings(payload, raw_bytes, {7: TABLE_OF_16})) == {ErrorCode.CODED_INVALID}


def test_a_table_that_is_not_there_is_named():
    assert set(decodings(LINKED, len(RAW))) == {ErrorCode.TABLE_UNKNOWN}
    for decode in (lambda: decode_tiered(LINKED, len(RAW)),
                   lambda: _native.tiered_decode(LINKED, len(RAW))):
        with pytest.raises(KvwireError) as caught:
            decode()
        assert caught.value.actual == 7


def one_strip(table: CodeTable, count: int, body: bytes, tail: bytes) -> bytes:
    """Return a payload of one strip of form TIERED, its table inside."""
    data = table.encode() + len(tail).to_bytes(2, "little") + bytes(14) + body + tail
    data += bytes(-len(data) % 16)
    return PART.pack({"raw_bytes": count * table.format.item_bytes,
                      "coded_bytes": PART.bytes + len(data)}) + data


def test_the_tail_has_its_length_and_small_literals():
    table = CodeTable(DType.E4M3, (1,), (3,))
    body = bytes(4 * 2) + bytes([0xFE, 0x03])  # verbatim, then: all but the first go on
    right = set(decodings(one_strip(table, 10, body, bytes(range(9))), 10))
    assert len(right) == 1 and len(right.pop()) == 10
    for tail in (bytes(8), bytes(10), bytes(8) + b"\x10", b""):
        assert set(decodings(one_strip(table, 10, body, tail), 10)) == {ErrorCode.CODED_INVALID}


def test_unused_bits_of_every_plane():
    table = CodeTable(DType.E5M2, (2, 1), (3, 1, 2, 0))
    right = one_strip(table, 10, bytes(3 * 2) + bytes([0xFF, 3, 0xFF, 3]), bytes(2))
    assert set(decodings(right, 10)) == {bytes([0] * 10)}
    planes = PART.bytes + len(table.encode()) + 16
    for plane in range(3 + 2 + 1):  # verbatim, tier 1, tier 2
        spoilt = changed(right, planes + 2 * plane + 1, 0x80 | right[planes + 2 * plane + 1])
        assert set(decodings(spoilt, 10)) == {ErrorCode.CODED_INVALID}


# ---- the variants

def check_variants(raw, parts):
    expected = encode_tiered(raw, parts)
    for variant in VARIANTS:
        assert native_encode(raw, parts, variant) == expected, variant
    assert set(decodings(expected, len(raw), tables_of(parts))) == {raw}


@settings(max_examples=300)
@given(coded())
def test_variants_equal_the_reference(case):
    check_variants(*case)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("tier_bits", SHAPES, ids=lambda bits: "".join(map(str, bits)))
def test_every_tier_shape_and_kind_of_data(dtype, tier_bits):
    form = element_format(dtype)
    ranks = sum((1 << bits) - 1 for bits in tier_bits)
    symbols = 1 << form.exponent_bits
    if ranks > symbols:
        pytest.skip("more ranks than exponents")
    random = np.random.default_rng([int(dtype), *tier_bits])
    for kind in KINDS:
        raw = kinds_of_bytes(kind, 4200 * form.item_bytes, form.item_bytes, 7)
        check_variants(raw, [Part(len(raw), fitted(raw, dtype, tier_bits), table_index=1)])
        for stop in {min(symbols, 32), min(symbols, 64), symbols}:
            offsets = tuple(int(d) for d in random.permutation(stop)[:ranks])
            table = CodeTable(dtype, tier_bits, offsets, (3, 5), 1, 2, bytes([120 % symbols] * 3),
                              bytes(5))
            check_variants(raw, [Part(len(raw), table, 4, table_index=1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_odd_sizes(dtype):
    item_bytes = element_format(dtype).item_bytes
    for count in [*range(1, 201), *range(4090, 4103), 8191, 8192, 8193]:
        raw = kinds_of_bytes("gauss", count * item_bytes, item_bytes, count)
        table = dataclasses.replace(fitted(raw, dtype, (2, 2)), extents=(7,))
        parts = [Part(len(raw), table, count % 7, table_index=1)]
        check_variants(raw, parts)
        assert count < 4000 or len(encode_tiered(raw, parts)) < 0.98 * len(raw)


@settings(max_examples=200)
@given(coded(), st.data())
@example(([*[b"\0" * 10], [Part(10)]]), None)
def test_variants_accept_and_refuse_what_the_reference_does(case, data):
    raw, parts = case
    payload = bytearray(encode_tiered(raw, parts))
    for _ in range(data.draw(st.integers(1, 3)) if data else 0):
        at = data.draw(st.integers(0, len(payload) - 1) | st.integers(0, min(99, len(payload) - 1)))
        payload[at] ^= 1 << data.draw(st.integers(0, 7))
    found = decodings(bytes(payload), len(raw), tables_of(parts))
    assert all(other == found[0] for other in found), [str(other)[:40] for other in found]


@given(coded(elements_max=40))
def test_there_is_no_payload_without_room(case):
    raw, parts = case
    needed = len(encode_tiered(raw, parts))
    for variant in VARIANTS:
        for out_max in {0, 15, needed // 2, needed - 1}:
            assert native_encode(raw, parts, variant, out_max) is None
        # Trying a form may take more room than the strip needs in the end.
        assert native_encode(raw, parts, variant, needed + len(raw)) is not None


def test_a_long_pattern_is_worked_out_strip_by_strip():
    patterns = [((40000,), 0, 1), ((7, 9001), 1, 2), ((3, 5000, 4), 5, 2), ((9000, 5), 2, 1),
                ((50000, 1), 1, 0), ((90, 3, 200), 4, 0), ((90, 3, 200), 6, 4)]
    for extents, row_axes, column_axes in patterns:
        sizes = [int(np.prod([e for a, e in enumerate(extents) if axes >> a & 1])) if axes else none
                 for axes, none in ((row_axes, 1), (column_axes, 0))]
        random = np.random.default_rng(1)
        rows, columns = ((random.integers(0, 9, size) + start).astype(np.uint8).tobytes()
                         for size, start in zip(sizes, (110, 0)))
        table = CodeTable(DType.BF16, (2, 2, 2, 2), tuple(range(12)), extents, row_axes,
                          column_axes, rows, columns)
        raw = kinds_of_bytes("gauss", 2 * 13000, 2, 1)
        for position in (0, table.period - 5000):
            check_variants(raw, [Part(len(raw), table, position)])


def test_there_are_variants():
    assert VARIANTS[-1] == "portable" and _native.tiered_active() in VARIANTS
    with pytest.raises(ValueError, match="no variant named 'fastest'"):
        _native.tiered_encode(b"", [], "fastest")


@pytest.mark.parametrize("name", [*VARIANTS, ""])
def test_environment_forces_a_variant(name):
    done = subprocess.run(
        [sys.executable, "-c", "from kvwire import _native as n; print(n.tiered_active())"],
        env={**os.environ, "KVWIRE_TIERED": name}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (name or VARIANTS[0])


def test_environment_with_an_unknown_variant_fails_the_import():
    done = subprocess.run([sys.executable, "-c", "import kvwire._native"],
                          env={**os.environ, "KVWIRE_TIERED": "x86"}, capture_output=True,
                          text=True)
    assert done.returncode != 0 and "no variant named 'x86'" in done.stderr


def test_the_bench_times_what_it_checks():
    raw = np.frombuffer(kinds_of_bytes("gauss", 1 << 16, 2, 1), np.uint8)
    table = dataclasses.replace(TABLE_OF_16, extents=(1, 1), row_axes=0, column_axes=0,
                                row_bases=b"\x78", column_bases=b"")
    for variant in VARIANTS:
        found = _native.tiered_bench(raw, table.encode(), 1 << 14, 2, 3, variant)
        assert found["exact"] and found["coded_bytes"] < 0.9 * raw.size
        for name in ("memcpy_s", "encode_s", "decode_s"):
            assert len(found[name]) == 3 and min(found[name]) > 0
