"""What kernels are told of chunks to be coded or decoded (FORMAT.md §9.1), as rows of int64.

A kernel looks nothing up but bytes: bases are unrolled along their pattern, ranks are tables.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from kvwire.errors import ErrorCode, UnsupportedError
from kvwire.structure import fail
from kvwire.tiered import OPAQUE, PART, STRIP_ELEMENTS, CodeTable, Part, StripForm

__all__ = ["CHUNK", "PART_ROW", "SLOT_ALIGNMENT", "STRIP", "CodePlan", "Payload", "ReadPlan",
           "padded", "table_of_bytes"]

SLOT_ALIGNMENT = 16
PERIOD_MAX = 1 << 24  # bytes of unrolled bases
READ_BLOB_BYTES_MAX = 2 * PERIOD_MAX  # what the peer's tables may take, unrolled, at once
KEPT_BYTES_MAX = 64 << 20  # of unrolled bases, for the plans to come
UNROLL_STEP = 1 << 16  # elements: each needs some 64 bytes on the way
TABLE_BYTES_MAX = 48 + 65_536

# Columns of the rows; kernels/cuda/encode.cuh and decode.cuh have the same.
CHUNK = ("RAW_OFFSET", "RAW_BYTES", "OUT_OFFSET", "FIRST_PART", "PART_COUNT")
PART_ROW = ("RAW_BYTES", "TABLE_INDEX", "POSITION", "FIRST_STRIP", "STRIP_COUNT", "INSIDE_AT",
            "INSIDE_BYTES", "CODE_AT", "DTYPE", "TIER_BITS", "BASES_AT", "PERIOD")
STRIP = ("RAW_OFFSET", "COUNT", "BASES_AT", "CODE_AT", "CHUNK", "ITEM_BYTES", "FORM", "BODY_AT",
         "TAIL_AT", "TAIL_BYTES")

Format = tuple[int, tuple[int, ...]]
"""dtype and tier bits: kernels are compiled for each. (0, ()): opaque."""
OPAQUE_FORMAT: Format = (0, ())


def padded(count: int) -> int:
    """Return the bytes of a slot for `count`."""
    return count + -count % SLOT_ALIGNMENT


@dataclass
class _Blob:
    """Bytes that kernels look things up in; `bytes_max`: for tables that we did not make."""

    bytes_max: int | None = None
    data: bytearray = field(default_factory=bytearray)
    tables: dict[CodeTable, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, data: bytes) -> int:
        self.data += bytes(-len(self.data) % SLOT_ALIGNMENT)
        self.data += data
        return len(self.data) - len(data)

    def whole(self) -> np.ndarray:
        """Return it all, uint8, up to a multiple of SLOT_ALIGNMENT: kernels read whole words."""
        return np.frombuffer(bytes(self.data).ljust(padded(len(self.data)) or 1, b"\0"), np.uint8)

    def of(self, table: CodeTable) -> tuple[int, int, int]:
        """Return where the code of `table` and its unrolled bases lie, and their period."""
        if table not in self.tables:
            period = _base_period(table)
            end = len(self.data) + period + STRIP_ELEMENTS
            if self.bytes_max is not None and end > self.bytes_max:
                _refuse("payload: the bases of its code tables are too many for a kernel",
                        expected=self.bytes_max, actual=end)
            code, bases = _kept.look_up(table, period)
            self.tables[table] = self.add(code), self.add(bases), period
        return self.tables[table]


class _Kept:
    """What `_looked_up` made of the tables that were used last. Any thread may use it."""

    def __init__(self):
        self._lock, self.bytes = threading.Lock(), 0
        self._made: OrderedDict[CodeTable, tuple[bytes, bytes]] = OrderedDict()

    def look_up(self, table: CodeTable, period: int) -> tuple[bytes, bytes]:
        with self._lock:
            if table in self._made:
                self._made.move_to_end(table)
                return self._made[table]
        made = _looked_up(table, period)
        with self._lock:
            if table not in self._made:
                self._made[table] = made
                self.bytes += sum(map(len, made))
            while self.bytes > KEPT_BYTES_MAX:
                self.bytes -= sum(map(len, self._made.popitem(last=False)[1]))
        return made


_kept = _Kept()


def _looked_up(table: CodeTable, period: int) -> tuple[bytes, bytes]:
    """Return the code of `table`, and its bases unrolled."""
    digits, offsets = code_of(table)
    count = period + STRIP_ELEMENTS
    return digits + offsets, b"".join(
        table.bases(at, min(UNROLL_STEP, count - at)).astype(np.uint8).tobytes()
        for at in range(0, count, UNROLL_STEP))


def code_of(table: CodeTable) -> tuple[bytes, bytes]:
    """Return the digits of each distance, the first tier's in the low bits, and 16 offsets."""
    digits, rank = np.full(256, 0xFF, np.uint8), 0
    before = shift = 0
    for width in table.tier_bits:
        for digit in range((1 << width) - 1):
            digits[table.offsets[rank]] = before | digit << shift
            rank += 1
        before |= ((1 << width) - 1) << shift
        shift += width
    return digits.tobytes(), bytes(table.offsets) + bytes(16 - len(table.offsets))


def _base_period(table: CodeTable) -> int:
    """Return the period of the bases: that of the pattern without outer axes that do not count."""
    counts = (table.row_axes | table.column_axes) << (4 - len(table.extents))
    first = next((axis for axis in range(4) if counts >> axis & 1), 4)
    period = int(np.prod(table.axes[first:], dtype=object))
    if period > PERIOD_MAX:
        raise UnsupportedError("the bases of the code table repeat after too many elements for a "
                               "kernel: code it on the CPU", expected=PERIOD_MAX, actual=period)
    return period


def format_of(table: CodeTable | None) -> Format:
    return OPAQUE_FORMAT if table is None else (int(table.dtype), table.tier_bits)


def _rows(rows: list, columns: tuple) -> np.ndarray:
    return np.array(rows, np.int64).reshape(-1, len(columns))


def _by_format(formats: list[Format]) -> dict[Format, np.ndarray]:
    return {wanted: np.array([n for n, form in enumerate(formats) if form == wanted], np.int64)
            for wanted in dict.fromkeys(formats)}


@dataclass(frozen=True)
class CodePlan:
    """Chunks to be coded, each into a slot of its own.

    Attributes:
        chunks, parts, strips: rows of CHUNK, PART_ROW and STRIP (to ITEM_BYTES; the rest is 0).
        blob: uint8.
        strips_of: numbers of the strips of each format.
        out_bytes: of all slots; that of a chunk has its raw bytes, rounded up.
        sources: the parts of each chunk; the bytes of one that has none.
    """

    chunks: np.ndarray
    parts: np.ndarray
    strips: np.ndarray
    blob: np.ndarray
    strips_of: Mapping[Format, np.ndarray]
    out_bytes: int
    sources: tuple[Sequence[Part] | int, ...]

    @classmethod
    def of_chunks(cls, chunks: Sequence[tuple[int, Sequence[Part] | int]],
                  with_strips: bool = True) -> CodePlan:
        """Return the plan of chunks (offset in the segment, parts that cover them). In place of
        parts, a number: so many bytes that stay as they are. The CUDA kernels need no strips.

        Raises:
            UnsupportedError: bases that repeat after more than PERIOD_MAX elements.
        """
        blob, inside, chunk_rows, part_rows, strip_rows, formats = _Blob(), {}, [], [], [], []
        out = strip_count = 0
        for raw_offset, covering in chunks:
            parts = () if isinstance(covering, int) else covering
            raw_bytes = covering if not parts else sum(part.raw_bytes for part in parts)
            chunk_rows.append([raw_offset, raw_bytes, out, len(part_rows), len(parts)])
            out += padded(raw_bytes)
            at = raw_offset
            for part in parts:
                table, inside_at, inside_bytes = part.table, 0, 0
                code_at, bases_at, period = blob.of(table) if table else (0, 0, 1)
                if table and part.table_index == 0:
                    encoded = table.encode()
                    if table not in inside:
                        inside[table] = blob.add(encoded)
                    inside_at, inside_bytes = inside[table], len(encoded)
                width = table.format.item_bytes if table else 1
                strips = -(-part.raw_bytes // (width * STRIP_ELEMENTS))
                bits = sum(b << 4 * n for n, b in enumerate(table.tier_bits)) if table else 0
                part_rows.append([part.raw_bytes, part.table_index if table else OPAQUE,
                                  part.position, strip_count, strips, inside_at,
                                  inside_bytes, code_at, table.dtype if table else 0, bits,
                                  bases_at, period])
                if with_strips:
                    firsts, counts = _cut(part.raw_bytes, width)
                    rows = np.zeros((strips, len(STRIP)), np.int64)
                    rows[:, 0], rows[:, 1] = at + firsts * width, counts
                    rows[:, 2] = bases_at + (part.position + firsts) % period
                    rows[:, 3:6] = code_at, len(chunk_rows) - 1, width
                    strip_rows.append(rows)
                    formats += [format_of(table)] * strips
                strip_count += strips
                at += part.raw_bytes
        return cls(_rows(chunk_rows, CHUNK), _rows(part_rows, PART_ROW), _stacked(strip_rows),
                   blob.whole(), _by_format(formats), out, tuple(parts for _, parts in chunks))


def _cut(raw_bytes: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return first element and count of each strip."""
    elements = raw_bytes // width
    firsts = np.arange(0, elements, STRIP_ELEMENTS, dtype=np.int64)
    return firsts, np.minimum(STRIP_ELEMENTS, elements - firsts)


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(rows) if rows else np.empty((0, len(STRIP)), np.int64)


@dataclass(frozen=True)
class Payload:
    """A chunk to decode: where its payload begins among the coded bytes, and where it goes.

    Attributes:
        coded: the payload; bytes or a memoryview.
        is_raw: it is not coded.
    """

    coded: bytes | memoryview
    coded_offset: int
    raw_offset: int
    raw_bytes: int
    is_raw: bool = False


@dataclass(frozen=True)
class ReadPlan:
    """Strips to be decoded, `strips` with all columns of STRIP. The rest as in `CodePlan`.

    What headers and indices say has been checked; the planes are the kernels' to check.
    """

    strips: np.ndarray
    blob: np.ndarray
    strips_of: Mapping[Format, np.ndarray]

    @classmethod
    def of_payloads(cls, payloads: Sequence[Payload],
                    table_of: Callable[[int], CodeTable | None] = lambda index: None) -> ReadPlan:
        """Return the plan of payloads.

        Raises:
            FormatError, RefusedError: as `kvwire.tiered.decode_tiered`, before it looks at a strip;
                or the bases of all tables together take more than READ_BLOB_BYTES_MAX.
            UnsupportedError: bases that repeat after more than PERIOD_MAX elements.
        """
        blob, rows, formats = _Blob(READ_BLOB_BYTES_MAX), [], []
        for number, payload in enumerate(payloads):
            at, done = 0, 0
            if payload.is_raw:
                _read_raw(payload, number, rows, formats)
                continue
            if not payload.coded:
                _refuse("payload: there is no part")
            while at < len(payload.coded):
                at, done = _read_part(payload, at, done, number, table_of, blob, rows, formats)
            if done != payload.raw_bytes:
                _refuse("payload: the parts do not cover the chunk", expected=payload.raw_bytes,
                        actual=done)
        return cls(_stacked(rows), blob.whole(), _by_format(formats))


def _read_raw(payload: Payload, chunk: int, rows: list, formats: list) -> None:
    """Append the strips of a chunk that was not coded: of form EXACT, which says no more."""
    width = 4 if payload.raw_bytes % 4 == 0 else 1
    firsts, counts = _cut(payload.raw_bytes, width)
    made = np.zeros((len(firsts), len(STRIP)), np.int64)
    made[:, 0], made[:, 1] = payload.raw_offset + firsts * width, counts
    made[:, 4:7] = chunk, width, StripForm.EXACT
    made[:, 7] = payload.coded_offset + firsts * width
    rows.append(made)
    formats += [OPAQUE_FORMAT] * len(firsts)


def _refuse(message: str, **evidence) -> None:
    fail(ErrorCode.CODED_INVALID, message, **evidence)


def _read_part(payload: Payload, at: int, done: int, chunk: int, table_of, blob: _Blob,
               rows: list, formats: list) -> tuple[int, int]:
    """Append the strips of the part at byte `at`; return the same for the next part."""
    coded, left = payload.coded, payload.raw_bytes - done
    if len(coded) - at < PART.bytes:
        _refuse("part: the bytes end inside its header")
    header = PART.unpack(coded, at)
    coded_bytes, raw_bytes = header["coded_bytes"], header["raw_bytes"]
    if not PART.bytes <= coded_bytes <= len(coded) - at or coded_bytes % SLOT_ALIGNMENT:
        _refuse(f"part: coded_bytes is {coded_bytes}")
    if not 1 <= raw_bytes <= left:
        _refuse(f"part: raw_bytes is {raw_bytes}")
    table, index_at, stop = None, at + PART.bytes, at + coded_bytes
    if header["table_index"] == 0:
        table, taken = _decoded(bytes(coded[index_at:min(stop, index_at + TABLE_BYTES_MAX)]))
        index_at += taken
    elif header["table_index"] != OPAQUE and (table := table_of(header["table_index"])) is None:
        fail(ErrorCode.TABLE_UNKNOWN, f"part: code table {header['table_index']} is not known "
             "here", expected=0, actual=header["table_index"])
    position, width = header["position"], table.format.item_bytes if table else 1
    if position >= (table.period if table else 1) or raw_bytes % width:
        _refuse(f"part: position is {position}, raw_bytes {raw_bytes}")
    firsts, counts = _cut(raw_bytes, width)
    body_at = index_at + 2 * len(firsts) + -2 * len(firsts) % SLOT_ALIGNMENT
    if body_at > stop or any(coded[index_at + 2 * len(firsts):body_at]):
        _refuse("part: its index does not fit or is not padded with 0")
    code_at, bases_at, period = blob.of(table) if table else (0, 0, 1)
    entries = np.frombuffer(coded, "<u2", len(firsts), index_at).astype(np.int64)
    forms, tails = entries >> 14, entries & 0x3FFF
    bodies = _body_bytes(forms, tails, table, counts, width)
    made = np.zeros((len(firsts), len(STRIP)), np.int64)
    made[:, 0], made[:, 1] = payload.raw_offset + done + firsts * width, counts
    made[:, 2] = bases_at + (position + firsts) % period
    made[:, 3:6] = code_at, chunk, width
    made[:, 6], made[:, 9] = forms, tails
    made[:, 7] = payload.coded_offset + body_at + np.cumsum(bodies) - bodies
    tail_at = body_at + int(bodies.sum())
    made[:, 8] = payload.coded_offset + tail_at + np.cumsum(tails) - tails
    end = tail_at + int(tails.sum())
    if end + -end % SLOT_ALIGNMENT != stop or any(coded[end:stop]):
        _refuse("part: its strips do not fill it, or it is not padded with 0", expected=stop,
                actual=end)
    rows.append(made)
    formats += [format_of(table)] * len(firsts)
    return stop, done + raw_bytes


def table_of_bytes(data: bytes) -> CodeTable:
    """Return the table that `data` is."""
    return _decoded(data)[0]


@lru_cache(maxsize=256)
def _decoded(data: bytes) -> tuple[CodeTable, int]:
    return CodeTable.decode(data)


def _body_bytes(forms: np.ndarray, tails: np.ndarray, table: CodeTable | None,
                counts: np.ndarray, width: int) -> np.ndarray:
    """Return the bytes of each strip's body."""
    tiered = (forms == StripForm.TIERED) & (table is not None)
    exact = (forms == StripForm.EXACT) & (tails == 0)
    wrong = ~(tiered | exact | (forms == StripForm.CONSTANT) & (tails == width))
    if wrong.any():
        at = int(np.argmax(wrong))
        _refuse(f"strip: form {forms[at]} with a tail of {tails[at]} bytes")
    bodies = np.where(exact, counts * width, 0)
    if table is not None:
        whole, rest = divmod(table.format.verbatim_bits, 8)
        planes = (rest + table.tier_bits[0]) * -(-counts // 8)
        bodies = np.where(tiered, counts * whole + planes, bodies)
    return bodies
