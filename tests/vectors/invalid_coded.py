"""Invalid vectors of coded chunks (FORMAT.md §9), lossy ones too, and of a link's tables (§9.2)."""

from __future__ import annotations

from vectors.generate import LINK, TICKET, TRANSFER, number_like

from kvwire.checksum import crc32c
from kvwire.codec import Codec, encode_chunk
from kvwire.control import Item, Segment
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec, DType, auxiliary
from kvwire.link_tables import TableName, encode_names, encode_table
from kvwire.manifest import Manifest
from kvwire.quantised import PART as ROUNDED
from kvwire.quantised import QuantisedPart, Rung, encode_quantised
from kvwire.tiered import PART, TABLE, CodeTable, Part, encode_tiered
from kvwire.wire import HEADER, FrameType, Greeting, Role, encode_frame

_CODECS = 1 | 1 << 2
_RAW = number_like(2048, DType.BF16).tobytes()  # one strip
_TABLE = CodeTable.of_elements(_RAW, DType.BF16)
_INDEX = PART.bytes + len(_TABLE.encode())


def lz4_chunks(broken) -> None:
    """Chunks of 4,096 zero bytes, coded: 1,024 rows of one element of 4 bytes."""
    code = ErrorCode
    spec = CacheSpec("z", (auxiliary([0], "scale", heads=1, dtype="fp32"),))
    expected = Manifest(TICKET, spec, 0, 1024, codecs=3)
    raw = bytes(4096)
    _, payload = encode_chunk(Codec.LZ4, raw, DType.FP32)
    segment = Segment(4096, 4096, (Item(0, 0, 0, 0, 1024),))
    start = broken["GREETING"] + encode_frame(
        FrameType.MANIFEST, TRANSFER, expected.encode()) + encode_frame(
        FrameType.SEGMENT, TRANSFER, segment.encode())

    def chunk(payload: bytes, raw: bytes) -> bytes:
        return encode_frame(FrameType.CHUNK, TRANSFER, payload, raw_bytes=4096,
                            raw_crc=crc32c(raw), codec=1)

    short = encode_chunk(Codec.LZ4, raw[:4092], DType.FP32)[1]
    for name, error, contains, frame in (
            ("coded_flipped", code.PAYLOAD_CORRUPT, "a bit of a coded payload flipped",
             _flipped(chunk(payload, raw), HEADER.bytes)),
            ("coded_garbage", code.CODED_INVALID, "no LZ4 block", chunk(b"\xff" * 40, raw)),
            ("coded_short", code.CODED_INVALID, "4,092 bytes decoded", chunk(short, raw)),
            ("coded_other", code.RAW_CORRUPT, "other raw bytes than raw_crc says",
             chunk(payload, raw[1:] + b"\1"))):
        broken.raw(name, error, contains, start + frame, [expected])


def _flipped(data: bytes, offset: int) -> bytes:
    return _with(data, offset, bytes((data[offset] ^ 1,)))


def _with(payload: bytes, at: int, value: bytes) -> bytes:
    return payload[:at] + value + payload[at + len(value):]


def _payloads() -> list[tuple[str, ErrorCode, str, bytes]]:
    """Return (name, error, what it contains, payload) of chunks that must be refused."""
    invalid = ErrorCode.CODED_INVALID
    good = encode_tiered(_RAW, [Part(len(_RAW), _TABLE)])
    of_link = encode_tiered(_RAW, [Part(len(_RAW), _TABLE, 0, 3)])
    table = PART.bytes
    changes = [
        ("part_raw_bytes", "a part of no raw bytes", PART.fields["raw_bytes"][0], bytes(4)),
        ("part_coded_bytes", "coded_bytes is no multiple of 16", PART.fields["coded_bytes"][0],
         (len(good) - 1).to_bytes(4, "little")),
        ("part_beyond", "coded_bytes is over the payload", PART.fields["coded_bytes"][0],
         (len(good) + 16).to_bytes(4, "little")),
        ("part_position", "position is the period", PART.fields["position"][0], b"\1"),
        ("table_dtype", "a table for int8", table + TABLE.fields["dtype"][0], b"\6"),
        ("table_tiers", "tier_count is 5", table + TABLE.fields["tier_count"][0], b"\5"),
        ("table_width", "tiers of 5 bits", table + TABLE.fields["tier_bits"][0], b"\5"),
        ("table_offset", "an offset twice", table + TABLE.fields["offsets"][0],
         good[table + TABLE.fields["offsets"][0] + 1:][:1]),
        ("table_extents", "an extent of 0", table + TABLE.fields["extents"][0], bytes(4)),
        ("table_rows", "row_count is 2", table + TABLE.fields["row_count"][0], b"\2"),
        ("table_columns", "column bases without axes", table + TABLE.fields["column_count"][0],
         b"\1"),
        ("strip_form", "strip form 3", _INDEX + 1, bytes([good[_INDEX + 1] | 0xC0])),
        ("strip_tail", "a tail that is a byte short", _INDEX,
         (int.from_bytes(good[_INDEX:_INDEX + 2], "little") - 1).to_bytes(2, "little")),
        ("index_padding", "padding of the index is not 0", _INDEX + 15, b"\1"),
    ]
    found = [(f"tiered_{name}", invalid, contains, _with(good, at, value))
             for name, contains, at, value in changes]
    found += [
        ("tiered_short", invalid, "parts for half of the chunk",
         encode_tiered(_RAW[:2048], [Part(2048, _TABLE)])),
        ("tiered_no_part", invalid, "less than a part", bytes(15)),
        ("tiered_table_unknown", ErrorCode.TABLE_UNKNOWN, "a table that was never named", of_link),
    ]
    return found


def tiered_chunks(broken) -> None:
    """Chunks of 4,096 bytes, and frames about tables."""
    spec = CacheSpec("z", (auxiliary([0], "scale", heads=1, dtype="bf16"),))
    expected = Manifest(TICKET, spec, 0, 2048, codecs=_CODECS)
    segment = Segment(4096, 4096, (Item(0, 0, 0, 0, 2048),))
    greeting = Greeting(Role.SENDER, LINK, codecs=7).encode()
    start = greeting + encode_frame(
        FrameType.MANIFEST, TRANSFER, expected.encode()) + encode_frame(
        FrameType.SEGMENT, TRANSFER, segment.encode())
    for name, error, contains, payload in _payloads():
        broken.raw(name, error, contains, start + encode_frame(
            FrameType.CHUNK, TRANSFER, payload, raw_bytes=4096, raw_crc=crc32c(_RAW), codec=2),
            [expected])
    names = encode_names([TableName(1, _TABLE.name)])
    field, reserved = ErrorCode.FIELD_INVALID, ErrorCode.RESERVED_BIT_SET
    for name, error, contains, kind, payload in (
            ("tables_index", field, "table_index 0", FrameType.TABLE_NAMES, _with(names, 0, b"\0")),
            ("tables_reserved", reserved, "TABLE_NAMES: reserved is not 0", FrameType.TABLE_NAMES,
             _with(names, 4, b"\1")),
            ("tables_renamed", field, "a number with two names", FrameType.TABLE_NAMES,
             names + encode_names([TableName(1, bytes(16))])),
            ("table_not_named", field, "a TABLE that was not named", FrameType.TABLE,
             encode_table(1, _TABLE.encode()))):
        broken.raw(name, error, contains, greeting + encode_frame(kind, payload=payload))


def _rounded(rung: Rung, elements: int, rows: int = 0, columns: int = 0,
             nested: tuple[Part, ...] = ()) -> bytes:
    raw = number_like(elements, DType.FP32).tobytes()
    return encode_quantised(raw, [QuantisedPart(rung, DType.FP32, (elements // 10, 10), rows,
                                                columns, nested)])


def _lossy_payloads() -> list[tuple[str, ErrorCode, str, bytes]]:
    """As `_payloads`: of 1,010 elements of FP32 in groups, in a grid, or narrowed."""
    invalid, scales = ErrorCode.CODED_INVALID, ROUNDED.bytes
    groups, grid = _rounded(Rung.INT6, 1010, 2), _rounded(Rung.INT8_GRID, 1010, 1, 2)
    e4m3, bf16 = _rounded(Rung.E4M3, 1010, 1), _rounded(Rung.BF16, 1010)
    of_link = _rounded(Rung.BF16, 1010, nested=(Part(2020, _TABLE, 0, 3),))
    group_count = 10 * 2  # of 101 places
    codes = scales + 4 * group_count
    high_scale, at = (0x5D80).to_bytes(2, "little"), {n: o for n, (o, _) in ROUNDED.fields.items()}
    changes = [
        ("raw_bytes", "raw_bytes is not what extents say", groups, at["raw_bytes"], b"\xc4"),
        ("coded_bytes", "coded_bytes is no multiple of 16", groups, at["coded_bytes"], b"\x01"),
        ("rung", "rung 7", groups, at["rung"], b"\x07"),
        ("dtype", "BF16 makes nothing of fp16", bf16, at["dtype"], b"\x02"),
        ("row_axes", "row_axes 16", groups, at["row_axes"], b"\x10"),
        ("column_axes", "groups with columns", groups, at["column_axes"], b"\x08"),
        ("reserved", "reserved is not 0", groups, at["reserved"], b"\1"),
        ("extents", "an extent of 0", groups, at["extents"], bytes(4)),
        ("scale_large", "a scale of 2^60", groups, scales, high_scale),
        ("scale_negative", "a negative scale", grid, scales + 1,
         bytes([grid[scales + 1] | 0x80])),
        ("minimum_nan", "a minimum that is NaN", groups, scales + 2 * group_count, b"\xc0\xff"),
        ("scale_padding", "padding of the scales is not 0", e4m3,
         scales + 2 * 101 + 1, b"\1"),
        ("code_behind", "a code behind the last is not 0", groups,
         codes + 15 * 48 + 31, b"\x10"),
        ("nan", "an e4m3 code that is NaN", e4m3, scales + 208 + 16 + 16, b"\x7f"),
        ("nested", "a nested part of too few bytes", bf16, scales, b"\x10"),
    ]
    found = [(f"quantised_{name}", invalid, contains, _with(payload, where, value))
             for name, contains, payload, where, value in changes]
    return [*found,
            ("quantised_short", invalid, "a part for a fraction of the chunk",
             _rounded(Rung.INT8, 500, 2)),
            ("quantised_no_part", invalid, "less than a part", bytes(31)),
            ("quantised_table_unknown", ErrorCode.TABLE_UNKNOWN, "a table that was never named",
             of_link),
            ("quantised_exact", ErrorCode.RAW_CORRUPT, "rounded, and raw_crc is of what it was",
             groups)]


def lossy_chunks(broken) -> None:
    """Chunks of 1,010 elements, of a sender that may round them."""
    spec = CacheSpec("z", (auxiliary([0], "scale", heads=1, dtype="fp32"),))
    lossy = 1 | 1 << Codec.QUANTISED
    raw = number_like(1010, DType.FP32).tobytes()
    segment = Segment(4040, 4096, (Item(0, 0, 0, 0, 1010),))

    def stream(codecs: int, payload: bytes) -> tuple[bytes, list[Manifest]]:
        expected = Manifest(TICKET, spec, 0, 1010, codecs=codecs)
        return Greeting(Role.SENDER, LINK, codecs=lossy).encode() + encode_frame(
            FrameType.MANIFEST, TRANSFER, expected.encode()) + encode_frame(
            FrameType.SEGMENT, TRANSFER, segment.encode()) + encode_frame(
            FrameType.CHUNK, TRANSFER, payload, raw_bytes=4040, raw_crc=crc32c(raw),
            codec=Codec.QUANTISED), [expected]

    for name, error, contains, payload in _lossy_payloads():
        broken.raw(name, error, contains, *stream(lossy, payload))
    broken.raw("quantised_not_agreed", ErrorCode.CODEC_UNSUPPORTED,
               "a lossy chunk, the manifest has raw only",
               *stream(1, _rounded(Rung.INT6, 1010, 2)))
