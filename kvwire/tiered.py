"""FORMAT.md §9.1: the tiered exponent code, written to be read. C++ does the work; this decides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from kvwire.errors import ErrorCode
from kvwire.structure import Structure, fail
from kvwire.tensor_spec import DType

__all__ = ["OPAQUE", "CodeTable", "ElementFormat", "Part", "StripForm", "decode_tiered",
           "element_format", "encode_tiered"]

PART = Structure("part", raw_bytes="I", coded_bytes="I", table_index="I", position="I")
TABLE = Structure("code table", dtype="B", tier_count="B", tier_bits="4s", row_axes="B",
                  column_axes="B", offsets="16s", extents="16s", row_count="I", column_count="I")
OPAQUE = 0xFFFFFFFF
STRIP_ELEMENTS = 4096
ALIGNMENT = 16
TIERS_MAX = 4
TIER_BITS_MAX = 4
DIGIT_BITS_MAX = 8   # of all tiers together
RANKS_MAX = 16
BASES_MAX = 65_536
PERIOD_MAX = (1 << 31) - 1
FORM_SHIFT = 14


class StripForm(IntEnum):
    """How a strip is stored."""

    TIERED = 0
    EXACT = 1
    CONSTANT = 2


@dataclass(frozen=True)
class ElementFormat:
    """How an element is cut: E exponent bits above V verbatim ones, once rotated left by a bit."""

    item_bytes: int
    exponent_bits: int
    verbatim_bits: int


_FORMATS = {DType.FP32: ElementFormat(4, 8, 24), DType.FP16: ElementFormat(2, 5, 11),
            DType.BF16: ElementFormat(2, 8, 8), DType.E4M3: ElementFormat(1, 4, 4),
            DType.E5M2: ElementFormat(1, 5, 3)}


def element_format(dtype: int) -> ElementFormat | None:
    """Return how elements of `dtype` are cut; None where the code does not know it."""
    return _FORMATS.get(dtype)


def _invalid(message: str, **evidence) -> None:
    fail(ErrorCode.CODED_INVALID, message, **evidence)


def _require(holds: bool, message: str, **evidence) -> None:
    if not holds:
        _invalid(message, **evidence)


def _padding(count: int) -> int:
    return -count % ALIGNMENT


@dataclass(frozen=True)
class CodeTable:
    """What the exponents of a tensor are coded with.

    Args:
        dtype: of the elements.
        tier_bits: width of each tier.
        offsets: distance from the base of each rank, most frequent first.
        extents: the pattern's axes, outer to inner; up to 4.
        row_axes, column_axes: bit j says that axis j counts in the row, or column, base.
        row_bases, column_bases: uint8 arrays.
    """

    dtype: DType
    tier_bits: tuple[int, ...]
    offsets: tuple[int, ...]
    extents: tuple[int, ...] = ()
    row_axes: int = 0
    column_axes: int = 0
    row_bases: bytes = b"\0"
    column_bases: bytes = b""

    @classmethod
    def of_elements(cls, raw: bytes, dtype: DType) -> CodeTable | None:
        """Return a table with one base for all; None where the code does not know the dtype."""
        form = element_format(dtype)
        if form is None:
            return None
        counts = np.bincount(_elements(raw, form) >> form.verbatim_bits,
                             minlength=1 << form.exponent_bits)
        return cls(dtype, (2, 2, 2, 2), tuple(np.argsort(-counts, kind="stable")[:12].tolist()))

    @property
    def format(self) -> ElementFormat:
        return _FORMATS[self.dtype]

    @property
    def axes(self) -> tuple[int, ...]:
        return (1,) * (4 - len(self.extents)) + tuple(self.extents)

    @property
    def period(self) -> int:
        return int(np.prod(self.axes, dtype=object))

    @property
    def name(self) -> bytes:
        return hashlib.sha256(self.encode()).digest()[:16]

    def encode(self) -> bytes:
        shift = 4 - len(self.extents)
        fixed = TABLE.pack({
            "dtype": self.dtype, "tier_count": len(self.tier_bits),
            "tier_bits": bytes(self.tier_bits), "row_axes": self.row_axes << shift,
            "column_axes": self.column_axes << shift, "offsets": bytes(self.offsets),
            "extents": np.array(self.axes, "<u4").tobytes(), "row_count": len(self.row_bases),
            "column_count": len(self.column_bases)})
        data = fixed + self.row_bases + self.column_bases
        return data + bytes(_padding(len(data)))

    @classmethod
    def decode(cls, data: bytes) -> tuple[CodeTable, int]:
        """Return the table at the start of `data` and how many bytes it takes."""
        _require(len(data) >= TABLE.bytes, "code table: the bytes end inside it")
        values = TABLE.unpack(data)
        form = _FORMATS.get(values["dtype"])
        _require(form is not None, f"code table: dtype is {values['dtype']}")
        count, widths = values["tier_count"], values["tier_bits"]
        _require(1 <= count <= TIERS_MAX, f"code table: tier_count is {count}")
        bits = tuple(widths[:count])
        ranks = sum((1 << width) - 1 for width in bits)
        _require(all(1 <= width <= TIER_BITS_MAX for width in bits) and not any(widths[count:])
                 and sum(bits) <= DIGIT_BITS_MAX and ranks <= RANKS_MAX,
                 f"code table: tier_bits are {tuple(widths)}")
        offsets = values["offsets"]
        _require(max(offsets) < 1 << form.exponent_bits and not any(offsets[ranks:])
                 and len(set(offsets[:ranks])) == ranks, f"code table: offsets {tuple(offsets)}")
        axes = tuple(map(int, np.frombuffer(values["extents"], "<u4")))
        period = int(np.prod(axes, dtype=object))
        _require(1 <= period <= PERIOD_MAX, f"code table: extents are {axes}")
        counts = []
        for name, none in (("row", 1), ("column", 0)):
            mask, stated = values[f"{name}_axes"], values[f"{name}_count"]
            _require(mask < 16, f"code table: {name}_axes is {mask}")
            extents = [extent for axis, extent in enumerate(axes) if mask >> axis & 1]
            wanted = int(np.prod(extents, dtype=object)) if mask else none
            _require(stated == wanted, f"code table: {name}_count", expected=wanted, actual=stated)
            counts.append(stated)
        rows, bases = counts[0], sum(counts)
        _require(bases <= BASES_MAX, f"code table: {bases} bases")
        taken = TABLE.bytes + bases + _padding(TABLE.bytes + bases)
        _require(len(data) >= taken, "code table: the bytes end inside its bases")
        body = bytes(data[TABLE.bytes:TABLE.bytes + bases])
        _require(max(body) < 1 << form.exponent_bits, "code table: a base is too large")
        _require(not any(data[TABLE.bytes + bases:taken]), "code table: its padding is not 0")
        return cls(DType(values["dtype"]), bits, tuple(offsets[:ranks]), axes, values["row_axes"],
                   values["column_axes"], body[:rows], body[rows:]), taken

    @cached_property
    def _ranks(self) -> np.ndarray:
        """Rank of each distance; the number of ranks where it has none."""
        ranks = np.full(256, len(self.offsets), np.int64)
        ranks[list(self.offsets)] = np.arange(len(self.offsets))
        return ranks

    def bases(self, position: int, count: int) -> np.ndarray:
        """Return the bases of `count` elements from `position` of the pattern on."""
        place = (position + np.arange(count, dtype=np.int64)) % self.period
        coordinates = np.unravel_index(place, self.axes)
        shift = 4 - len(self.extents)
        total = np.zeros(count, np.int64)
        for axes, bases in ((self.row_axes, self.row_bases),
                            (self.column_axes, self.column_bases)):
            index = np.zeros(count, np.int64)
            for axis in range(4):
                if (axes << shift) >> axis & 1:
                    index = index * self.axes[axis] + coordinates[axis]
            if bases:
                total += np.frombuffer(bases, np.uint8)[index]
        return total & (1 << self.format.exponent_bits) - 1


@dataclass(frozen=True)
class Part:
    """Consecutive bytes of a chunk. Without `table`: opaque. `table_index` 0: it goes inside."""

    raw_bytes: int
    table: CodeTable | None = None
    position: int = 0
    table_index: int = 0


# ---- planes and tiers

def _to_planes(values: np.ndarray, width: int) -> bytes:
    return b"".join(np.packbits(values >> bit & 1, bitorder="little").tobytes()
                    for bit in range(width))


class _Bytes:
    """Takes bytes from the front; CODED_INVALID when there are too few."""

    def __init__(self, data: bytes, what: str):
        self._data, self._what, self._at = data, what, 0

    def take(self, count: int) -> bytes:
        _require(self._at + count <= len(self._data), f"{self._what}: too short",
                 expected=self._at + count, actual=len(self._data))
        self._at += count
        return self._data[self._at - count:self._at]

    def planes(self, count: int, width: int) -> np.ndarray:
        """Return `count` values of `width` bits."""
        values = np.zeros(count, np.int64)
        for bit in range(width):
            plane = np.frombuffer(self.take(-(-count // 8)), np.uint8)
            bits = np.unpackbits(plane, bitorder="little")
            _require(not bits[count:].any(), f"{self._what}: unused bits of a plane are not 0")
            values |= bits[:count].astype(np.int64) << bit
        return values

    def finish(self) -> None:
        _require(self._at == len(self._data), f"{self._what}: bytes are left over",
                 expected=self._at, actual=len(self._data))


def _elements(raw: bytes, form: ElementFormat) -> np.ndarray:
    """Return the elements, rotated left by a bit."""
    bits = 8 * form.item_bytes
    x = np.frombuffer(raw, f"<u{form.item_bytes}").astype(np.int64)
    return (x << 1 | x >> (bits - 1)) & (1 << bits) - 1


def _raw(rotated: np.ndarray, form: ElementFormat) -> bytes:
    bits = 8 * form.item_bytes
    x = rotated >> 1 | (rotated & 1) << (bits - 1)
    return x.astype(f"<u{form.item_bytes}").tobytes()


def _encode_strip(raw: bytes, table: CodeTable, position: int) -> tuple[bytes, bytes]:
    """Return body and tail of a strip of form TIERED."""
    form = table.format
    rotated = _elements(raw, form)
    whole, rest = divmod(form.verbatim_bits, 8)
    verbatim = rotated.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :whole].tobytes()
    body = [verbatim, _to_planes(rotated >> 8 * whole & (1 << rest) - 1, rest)]
    exponents = rotated >> form.verbatim_bits
    distance = (exponents - table.bases(position, len(rotated))) & (1 << form.exponent_bits) - 1
    tiers, rank = [], table._ranks[distance]
    for width in table.tier_bits:
        digits = np.minimum(rank, (1 << width) - 1)
        tiers.append(_to_planes(digits, width))
        goes_on = digits == (1 << width) - 1
        rank, distance = rank[goes_on] - digits[goes_on], distance[goes_on]
    return b"".join(body) + tiers[0], b"".join(tiers[1:]) + distance.astype(np.uint8).tobytes()


def _decode_strip(body: bytes, tail: bytes, count: int, table: CodeTable, position: int) -> bytes:
    form = table.format
    whole, rest = divmod(form.verbatim_bits, 8)
    front, back = _Bytes(body, "strip body"), _Bytes(tail, "strip tail")
    verbatim = np.zeros((count, 8), np.uint8)
    verbatim[:, :whole] = np.frombuffer(front.take(count * whole), np.uint8).reshape(count, whole)
    low = verbatim.view("<u8").ravel().astype(np.int64) | front.planes(count, rest) << 8 * whole
    distance = np.zeros(count, np.int64)
    waiting, first = np.arange(count), 0  # the elements in this tier, and its first rank
    for tier, width in enumerate(table.tier_bits):
        digits = (back if tier else front).planes(len(waiting), width)
        goes_on = digits == (1 << width) - 1
        distance[waiting[~goes_on]] = np.array(table.offsets)[first + digits[~goes_on]]
        waiting, first = waiting[goes_on], first + (1 << width) - 1
    literals = np.frombuffer(back.take(len(waiting)), np.uint8)
    _require(not (literals >> form.exponent_bits).any(), "strip tail: a literal is too large")
    distance[waiting] = literals
    front.finish()
    back.finish()
    exponents = (distance + table.bases(position, count)) & (1 << form.exponent_bits) - 1
    return _raw(exponents << form.verbatim_bits | low, form)


def _body_bytes(count: int, table: CodeTable) -> int:
    whole, rest = divmod(table.format.verbatim_bits, 8)
    return count * whole + (rest + table.tier_bits[0]) * -(-count // 8)


# ---- parts

def _code_strip(raw: bytes, part: Part, item_bytes: int, at: int) -> tuple[StripForm, bytes, bytes]:
    """Return form, body and tail of the strip at byte `at` of its part."""
    if raw == raw[:item_bytes] * (len(raw) // item_bytes):
        return StripForm.CONSTANT, b"", raw[:item_bytes]
    if part.table is not None:
        body, tail = _encode_strip(raw, part.table, part.position + at // item_bytes)
        if len(body) + len(tail) < len(raw):
            return StripForm.TIERED, body, tail
    return StripForm.EXACT, raw, b""


def _encode_part(raw: bytes, part: Part) -> bytes:
    item_bytes = part.table.format.item_bytes if part.table else 1
    step = STRIP_ELEMENTS * item_bytes
    strips = [_code_strip(raw[at:at + step], part, item_bytes, at)
              for at in range(0, len(raw), step)]
    index = np.array([form << FORM_SHIFT | len(tail) for form, _, tail in strips], "<u2").tobytes()
    inside = part.table.encode() if part.table and part.table_index == 0 else b""
    data = b"".join((inside, index, bytes(_padding(len(index))),
                     *(body for _, body, _ in strips), *(tail for *_, tail in strips)))
    data += bytes(_padding(len(data)))
    return PART.pack({"raw_bytes": len(raw), "coded_bytes": PART.bytes + len(data),
                      "table_index": part.table_index if part.table else OPAQUE,
                      "position": part.position}) + data


def encode_tiered(raw: bytes, parts: Sequence[Part]) -> bytes:
    """Return the payload of a chunk. `parts` cover `raw`; it may come out longer than `raw`."""
    coded, at = [], 0
    for part in parts:
        coded.append(_encode_part(raw[at:at + part.raw_bytes], part))
        at += part.raw_bytes
    return b"".join(coded)


@dataclass(frozen=True)
class _Strip:
    """A strip of a payload whose index holds, its planes not looked at yet."""

    form: StripForm
    body: bytes
    tail: bytes
    count: int
    position: int
    table: CodeTable | None

    def decode(self) -> bytes:
        if self.form == StripForm.TIERED:
            return _decode_strip(self.body, self.tail, self.count, self.table, self.position)
        return self.tail * self.count if self.form == StripForm.CONSTANT else self.body


def _strips(data: bytes, raw_bytes: int, position: int, table: CodeTable | None) -> list[_Strip]:
    """Cut index, bodies and tails, which `data` is, to the end of the part."""
    item_bytes = table.format.item_bytes if table else 1
    _require(raw_bytes % item_bytes == 0, "part: raw_bytes cuts an element")
    elements = raw_bytes // item_bytes
    counts = [min(STRIP_ELEMENTS, elements - at) for at in range(0, elements, STRIP_ELEMENTS)]
    rest = _Bytes(data, "part")
    index = np.frombuffer(rest.take(2 * len(counts)), "<u2")
    _require(not any(rest.take(_padding(2 * len(counts)))), "part: the index's padding is not 0")
    forms = (index >> FORM_SHIFT).tolist()
    tail_bytes = (index & (1 << FORM_SHIFT) - 1).tolist()
    bodies = []
    for form, tail, count in zip(forms, tail_bytes, counts):
        if form == StripForm.TIERED and table is not None:
            bodies.append(rest.take(_body_bytes(count, table)))
            continue
        constant = form == StripForm.CONSTANT
        _require(constant or form == StripForm.EXACT, f"strip: its form is {form}")
        _require(tail == (item_bytes if constant else 0), f"strip: a tail of {tail} bytes")
        bodies.append(b"" if constant else rest.take(count * item_bytes))
    tails = [rest.take(count) for count in tail_bytes]
    _require(not any(rest.take(_padding(sum(map(len, bodies + tails))))),
             "part: its padding is not 0")
    rest.finish()
    starts = range(position, position + elements, STRIP_ELEMENTS)
    return [_Strip(StripForm(form), body, tail, count, start, table)
            for form, body, tail, count, start in zip(forms, bodies, tails, counts, starts)]


def decode_tiered(payload: bytes, raw_bytes: int,
                  table_of: Callable[[int], CodeTable | None] = lambda index: None) -> bytes:
    """Return the `raw_bytes` raw bytes. All parts are checked before the planes of any strip.

    Args:
        table_of: the link's table of an index; None: TABLE_UNKNOWN.
    """
    strips, at, left = [], 0, raw_bytes
    _require(len(payload) > 0, "payload: there is no part")
    while at < len(payload):
        _require(len(payload) - at >= PART.bytes, "part: the bytes end inside its header")
        header = PART.unpack(payload, at)
        coded_bytes, table_index = header["coded_bytes"], header["table_index"]
        _require(PART.bytes <= coded_bytes <= len(payload) - at and coded_bytes % ALIGNMENT == 0,
                 f"part: coded_bytes is {coded_bytes}")
        _require(1 <= header["raw_bytes"] <= left, f"part: raw_bytes is {header['raw_bytes']}")
        data, table, period = payload[at + PART.bytes:at + coded_bytes], None, 1
        if table_index == 0:
            table, taken = CodeTable.decode(data)
            data = data[taken:]
        elif table_index != OPAQUE and (table := table_of(table_index)) is None:
            fail(ErrorCode.TABLE_UNKNOWN, f"part: code table {table_index} is not known here",
                 expected=0, actual=table_index)
        if table is not None:
            period = table.period
        _require(header["position"] < period, f"part: position is {header['position']}")
        strips += _strips(data, header["raw_bytes"], header["position"], table)
        at += coded_bytes
        left -= header["raw_bytes"]
    _require(left == 0, "payload: the parts do not cover the chunk", expected=raw_bytes,
             actual=raw_bytes - left)
    return b"".join(strip.decode() for strip in strips)
