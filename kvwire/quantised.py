"""FORMAT.md §9.3: the lossy rungs, written to be read. C++ does the work; this decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from kvwire.errors import ErrorCode
from kvwire.structure import Structure, fail
from kvwire.tensor_spec import DType
from kvwire.tiered import CodeTable, Part, decode_tiered, encode_tiered

__all__ = ["QuantisedPart", "Rung", "decode_quantised", "encode_quantised"]

PART = Structure("part", raw_bytes="I", coded_bytes="I", rung="B", dtype="B", row_axes="B",
                 column_axes="B", reserved="I", extents="16s")
AXES = 4
ALIGNMENT = 16
GROUP = 64             # places of a row that share a scale and a minimum
BLOCK = 64             # codes that are packed together
SCALE_STOP = 0x5D80    # bits 0 to 14 of a scale or minimum: its magnitude is below 2^60
EXACT_FROM = 2.0 ** 58
E4M3_TOP = 448.0


class Rung(IntEnum):
    """How elements are rounded."""

    EXACT = 0
    BF16 = 1
    E4M3 = 2
    INT8_GRID = 3
    INT8 = 4
    INT6 = 5
    INT4 = 6


CODE_BITS = {Rung.INT8: 8, Rung.INT6: 6, Rung.INT4: 4}
SCALED = {Rung.E4M3: E4M3_TOP, Rung.INT8_GRID: 127.0}  # the largest code
FLOATS = (DType.FP32, DType.FP16, DType.BF16)
DTYPES = {Rung.EXACT: (DType.BYTES,), Rung.BF16: (DType.FP32,)}


@dataclass(frozen=True)
class QuantisedPart:
    """Consecutive elements of a chunk that are rounded alike.

    Args:
        rung: how.
        dtype: of the elements; BYTES where they go EXACT.
        extents: their axes, outer to inner; up to 4.
        row_axes, column_axes: bit j says that axis j counts in the row, or column.
        nested: parts of §9.1 for the elements as they travel; none: one opaque part.
    """

    rung: Rung
    dtype: DType
    extents: tuple[int, ...]
    row_axes: int = 0
    column_axes: int = 0
    nested: tuple[Part, ...] = ()

    @property
    def raw_bytes(self) -> int:
        return math.prod(self.extents) * self.dtype.item_bytes

    @property
    def axes(self) -> tuple[int, ...]:
        return (1,) * (AXES - len(self.extents)) + tuple(self.extents)

    def header(self, coded_bytes: int) -> bytes:
        shift = AXES - len(self.extents)
        return PART.pack({
            "raw_bytes": self.raw_bytes, "coded_bytes": coded_bytes, "rung": self.rung,
            "dtype": self.dtype, "row_axes": self.row_axes << shift,
            "column_axes": self.column_axes << shift,
            "extents": np.array(self.axes, "<u4").tobytes()})

    def numbers(self, axes: int) -> tuple[np.ndarray, int]:
        """Return each element's number by its coordinates in `axes`, and how many there are."""
        shift = AXES - len(self.extents)
        number, count = np.zeros(self.axes, np.int64), 1
        for axis, extent in enumerate(self.axes):
            if (axes << shift) >> axis & 1:
                shape = [extent if other == axis else 1 for other in range(AXES)]
                number = number * extent + np.arange(extent).reshape(shape)
                count *= extent
        return number.ravel(), count

    def groups(self) -> tuple[np.ndarray, int]:
        """Return each element's group, and how many groups there are."""
        row, rows = self.numbers(self.row_axes)
        place, places = self.numbers((1 << len(self.extents)) - 1 & ~self.row_axes)
        return place // GROUP * rows + row, -(-places // GROUP) * rows


def _require(holds: bool, message: str, **evidence) -> None:
    if not holds:
        fail(ErrorCode.CODED_INVALID, message, **evidence)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


# ---- numbers

def _bf16_value(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _bf16_bits(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    low, code = bits & 0xFFFF, bits >> 16
    code += (low > 0x8000) | ((low == 0x8000) & (code & 1 == 1))
    return np.where(code & 0x7FFF == 0x7F80, code - 1, code).astype(np.uint16)


def _bf16_up(values: np.ndarray) -> np.ndarray:
    """Return the next bf16 away from 0, as its bits."""
    return ((values.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def _bf16_down(values: np.ndarray) -> np.ndarray:
    """Return the next bf16 below, as its bits."""
    towards_zero = (values.view(np.uint32) >> 16).astype(np.uint16)
    return np.where(np.signbit(values), _bf16_up(values), towards_zero)


# The e4m3 numbers from 0 up; their codes count them.
_E4M3 = np.array([(8 * (code >= 8) + code % 8) * 2.0 ** (max(code // 8, 1) - 10)
                  for code in range(127)], np.float32)


def _e4m3_value(codes: np.ndarray) -> np.ndarray:
    _require(not (codes & 0x7F == 0x7F).any(), "part: an e4m3 code is NaN")
    return np.where(codes & 0x80, np.float32(-1), np.float32(1)) * _E4M3[codes & 0x7F]


def _e4m3_code(values: np.ndarray) -> np.ndarray:
    magnitude = np.minimum(np.abs(values), np.float32(E4M3_TOP))
    code = np.searchsorted(_E4M3, magnitude, "right") - 1
    middle = (_E4M3[code] + _E4M3[np.minimum(code + 1, 126)]) / 2
    code += (magnitude > middle) | ((magnitude == middle) & (code % 2 == 1) & (code < 126))
    return (code | np.signbit(values) << 7).astype(np.uint8)


def _widened(raw: bytes, dtype: DType) -> np.ndarray:
    if dtype == DType.BF16:
        return _bf16_value(np.frombuffer(raw, "<u2"))
    return np.frombuffer(raw, "<f4" if dtype == DType.FP32 else "<f2").astype(np.float32)


def _narrowed(values: np.ndarray, dtype: DType) -> bytes:
    if dtype == DType.BF16:
        return _bf16_bits(values).astype("<u2").tobytes()
    if dtype == DType.FP16:
        return np.clip(values, -65504, 65504).astype("<f2").tobytes()
    return values.astype("<f4").tobytes()


def _largest(values: np.ndarray, number: np.ndarray, count: int) -> np.ndarray:
    """Return the largest of the values of each number; those are not negative."""
    largest = np.zeros(count, np.float32)
    np.maximum.at(largest, number, values)
    return largest


# ---- codes

def _pack(codes: np.ndarray, bits: int) -> bytes:
    blocks = np.zeros((-(-len(codes) // BLOCK), BLOCK), np.uint8)
    blocks.ravel()[:len(codes)] = codes
    if bits == 8:
        return blocks.tobytes()
    packed = [blocks[:, :32] & 15 | blocks[:, 32:] << 4]
    if bits == 6:
        packed.append(np.bitwise_or.reduce(
            [(blocks[:, 16 * i:16 * i + 16] >> 4) << 2 * i for i in range(4)]))
    return np.concatenate(packed, 1).tobytes()


def _unpack(data: bytes, count: int, bits: int) -> np.ndarray:
    blocks = np.frombuffer(data, np.uint8).reshape(-1, 8 * bits)
    if bits < 8:
        codes = np.concatenate([blocks[:, :32] & 15, blocks[:, :32] >> 4], 1)
        if bits == 6:
            codes |= np.concatenate([(blocks[:, 32:] >> 2 * i & 3) << 4 for i in range(4)], 1)
        blocks = codes
    codes = blocks.ravel()
    _require(not codes[count:].any(), "part: codes behind the last element are not 0")
    return codes[:count]


# ---- rungs: each turns a part's raw bytes into its body, and back

def _encode_nested(data: bytes, part: QuantisedPart) -> bytes:
    return encode_tiered(data, part.nested or (Part(len(data)),))


def _encode_scaled(values: np.ndarray, part: QuantisedPart) -> bytes:
    top = np.float32(SCALED[part.rung])
    row, rows = part.numbers(part.row_axes)
    largest = _largest(np.abs(values), row, rows)
    if not part.column_axes:
        scales = _bf16_up(largest / top)
        scale = _bf16_value(scales)[row]
    else:
        column, columns = part.numbers(part.column_axes)
        row_scales = _bf16_up(largest)
        row_scale = _bf16_value(row_scales)[row]
        ratio = np.divide(np.abs(values), row_scale, out=np.zeros_like(values),
                          where=row_scale > 0)
        column_scales = _bf16_up(_largest(ratio, column, columns) / top)
        scale = row_scale * _bf16_value(column_scales)[column]
        scales = np.concatenate([row_scales, column_scales])
    code = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
    if part.rung == Rung.E4M3:
        narrow = _e4m3_code(code)
    else:
        narrow = np.clip(np.rint(code), -top, top).astype(np.int8)
    return _padded(scales.astype("<u2").tobytes()) + _encode_nested(narrow.tobytes(), part)


def _encode_groups(values: np.ndarray, part: QuantisedPart) -> bytes:
    bits = CODE_BITS[part.rung]
    top = np.float32((1 << bits) - 1)
    group, groups = part.groups()
    low, high = np.full(groups, np.inf, np.float32), np.full(groups, -np.inf, np.float32)
    np.minimum.at(low, group, values)
    np.maximum.at(high, group, values)
    minima = _bf16_down(low + np.float32(0))
    scales = _bf16_up((high - _bf16_value(minima) + np.float32(0)) / top)
    scale, minimum = _bf16_value(scales)[group], _bf16_value(minima)[group]
    code = np.divide(values - minimum, scale, out=np.zeros_like(values), where=scale > 0)
    codes = _pack(np.minimum(np.rint(code), top).astype(np.uint8), bits)
    return _padded(np.concatenate([scales, minima]).astype("<u2").tobytes()) + _padded(codes)


def _encode_part(raw: bytes, part: QuantisedPart) -> bytes:
    if part.rung != Rung.EXACT:
        values = _widened(raw, part.dtype)
        if not (np.abs(values) < EXACT_FROM).all():
            part = QuantisedPart(Rung.EXACT, DType.BYTES, (len(raw),))
    with np.errstate(all="ignore"):
        if part.rung == Rung.EXACT:
            body = _encode_nested(raw, part)
        elif part.rung == Rung.BF16:
            body = _encode_nested(_narrowed(values, DType.BF16), part)
        else:
            body = (_encode_scaled if part.rung in SCALED else _encode_groups)(values, part)
    return part.header(PART.bytes + len(body)) + body


def encode_quantised(raw: bytes, parts: Sequence[QuantisedPart]) -> bytes:
    """Return the payload of a chunk. `parts` cover `raw`; the raw bytes that travel are what
    `decode_quantised` returns.
    """
    coded, at = [], 0
    for part in parts:
        coded.append(_encode_part(raw[at:at + part.raw_bytes], part))
        at += part.raw_bytes
    return b"".join(coded)


TableOf = Callable[[int], CodeTable | None]


def _take(body: bytes, count: int) -> tuple[bytes, bytes]:
    """Split off `count` bytes and the zeros behind them."""
    taken = count + -count % ALIGNMENT
    _require(taken <= len(body), "part: too short", expected=taken, actual=len(body))
    _require(not any(body[count:taken]), "part: its padding is not 0")
    return body[:count], body[taken:]


def _take_scales(body: bytes, scales: int, minima: int) -> tuple[np.ndarray, bytes]:
    data, rest = _take(body, 2 * (scales + minima))
    bits = np.frombuffer(data, "<u2")
    _require(not (bits & 0x7FFF >= SCALE_STOP).any(), "part: a scale or minimum is too large")
    _require(not (bits[:scales] >> 15).any(), "part: a scale is negative")
    return _bf16_value(bits), rest


def _decode_scaled(body: bytes, part: QuantisedPart, table_of: TableOf) -> np.ndarray:
    row, rows = part.numbers(part.row_axes)
    column, columns = part.numbers(part.column_axes)
    scales, rest = _take_scales(body, rows + (columns if part.column_axes else 0), 0)
    narrow = decode_tiered(rest, len(row), table_of)
    if part.rung == Rung.E4M3:
        values = _e4m3_value(np.frombuffer(narrow, np.uint8))
    else:
        values = np.frombuffer(narrow, np.int8).astype(np.float32)
    values = values * scales[row]
    return values * scales[rows + column] if part.column_axes else values


def _decode_groups(body: bytes, part: QuantisedPart) -> np.ndarray:
    bits = CODE_BITS[part.rung]
    group, groups = part.groups()
    scales, rest = _take_scales(body, groups, groups)
    data, rest = _take(rest, -(-len(group) // BLOCK) * 8 * bits)
    _require(not rest, "part: bytes are left over")
    codes = _unpack(data, len(group), bits).astype(np.float32)
    return codes * scales[group] + scales[groups + group]


def _decode_part(body: bytes, part: QuantisedPart, table_of: TableOf) -> bytes:
    if part.rung == Rung.EXACT:
        return decode_tiered(body, part.raw_bytes, table_of)
    if part.rung == Rung.BF16:
        narrow = decode_tiered(body, part.raw_bytes // 2, table_of)
        return _narrowed(_widened(narrow, DType.BF16), part.dtype)
    if part.rung in SCALED:
        return _narrowed(_decode_scaled(body, part, table_of), part.dtype)
    return _narrowed(_decode_groups(body, part), part.dtype)


def _read_header(payload: bytes, at: int, left: int) -> tuple[QuantisedPart, int]:
    """Return the part at `at` and its `coded_bytes`; `left` raw bytes are not covered yet."""
    _require(len(payload) - at >= PART.bytes, "part: the bytes end inside its header")
    header = PART.unpack(payload, at)
    coded_bytes, rung, dtype = header["coded_bytes"], header["rung"], header["dtype"]
    _require(PART.bytes <= coded_bytes <= len(payload) - at and coded_bytes % ALIGNMENT == 0,
             f"part: coded_bytes is {coded_bytes}")
    _require(rung in Rung.__members__.values(), f"part: rung is {rung}")
    _require(dtype in DTYPES.get(rung, FLOATS), f"part: dtype is {dtype}")
    rows, columns = header["row_axes"], header["column_axes"]
    _require(rows < 1 << AXES and (rows == 0 or rung in SCALED or rung in CODE_BITS),
             f"part: row_axes is {rows}")
    _require(columns < 1 << AXES and (columns == 0 or rung in SCALED),
             f"part: column_axes is {columns}")
    _require(header["reserved"] == 0, f"part: reserved is {header['reserved']}")
    extents = tuple(map(int, np.frombuffer(header["extents"], "<u4")))
    part = QuantisedPart(Rung(rung), DType(dtype), extents, rows, columns)
    _require(1 <= header["raw_bytes"] <= left and part.raw_bytes == header["raw_bytes"],
             f"part: raw_bytes is {header['raw_bytes']}, extents are {extents}")
    return part, coded_bytes


def decode_quantised(payload: bytes, raw_bytes: int,
                     table_of: TableOf = lambda index: None) -> bytes:
    """Return the `raw_bytes` raw bytes.

    Args:
        table_of: the link's table of an index; None: TABLE_UNKNOWN.
    """
    raw, at, left = [], 0, raw_bytes
    _require(len(payload) > 0, "payload: there is no part")
    while at < len(payload):
        part, coded_bytes = _read_header(payload, at, left)
        with np.errstate(all="ignore"):
            raw.append(_decode_part(payload[at + PART.bytes:at + coded_bytes], part, table_of))
        at += coded_bytes
        left -= part.raw_bytes
    _require(left == 0, "payload: the parts do not cover the chunk", expected=raw_bytes,
             actual=raw_bytes - left)
    return b"".join(raw)
