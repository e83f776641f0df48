"""What kernels are told of chunks to be coded or decoded (FORMAT.md §9.1), as rows of int64.

A kernel looks nothing up but bytes: bases are unrolled along their pattern, ranks are tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvwire.errors import ErrorCode, UnsupportedError
from kvwire.structure import fail
from kvwire.tiered import OPAQUE, PART, STRIP_ELEMENTS, CodeTable, Part, StripForm

__all__ = ["CHUNK", "PART_ROW", "SLOT_ALIGNMENT", "STRIP", "CodePlan", "Payload", "ReadPlan"]

SLOT_ALIGNMENT = 16
PERIOD_MAX = 1 << 24  # bytes of unrolled bases

# Columns of the rows; kernels/cuda/tiered.cuh has the same.
CHUNK = ("RAW_OFFSET", "RAW_BYTES", "OUT_OFFSET", "FIRST_PART", "PART_COUNT")
PART_ROW = ("RAW_BYTES", "TABLE_INDEX", "POSITION", "FIRST_STRIP", "STRIP_COUNT", "INSIDE_AT",
            "INSIDE_BYTES", "CODE_AT", "DTYPE", "TIER_BITS", "BASES_AT", "PERIOD")
STRIP = ("RAW_OFFSET", "COUNT", "BASES_AT", "CODE_AT", "CHUNK", "ITEM_BYTES", "FORM", "BODY_AT",
         "TAIL_AT", "TAIL_BYTES")

Format = tuple[int, tuple[int, ...]]
"""dtype and tier bits: kernels are compiled for each. (0, ()): opaque."""
OPAQUE_FORMAT: Format = (0, ())


@dataclass
class _Blob:
    """Bytes that kernels look things up in."""

    data: bytearray = field(default_factory=bytearray)
    tables: dict[CodeTable, tuple[int, int, int]] = field(default_factory=dict)

    def add(self, data: bytes) -> int:
        self.data += bytes(-len(self.data) % SLOT_ALIGNMENT)
        self.data += data
        return len(self.data) - len(data)

    def of(self, table: CodeTable) -> tuple[int, int, int]:
        """Return where the code of `table` and its unrolled bases lie, and their period."""
        if table not in self.tables:
            digits, offsets = code_of(table)
            period = _base_period(table)
            code_at = self.add(digits + offsets)
            bases = table.bases(0, period + STRIP_ELEMENTS).astype(np.uint8)
            self.tables[table] = code_at, self.add(bases.tobytes()), period
        return self.tables[table]


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
        sources: the parts of each chunk.
    """

    chunks: np.ndarray
    parts: np.ndarray
    strips: np.ndarray
    blob: np.ndarray
    strips_of: Mapping[Format, np.ndarray]
    out_bytes: int
    sources: tuple[Sequence[Part], ...]

    @classmethod
    def of_chunks(cls, chunks: Sequence[tuple[int, Sequence[Part]]]) -> CodePlan:
        """Return the plan of chunks (offset in the segment, parts that cover them).

        Raises:
            UnsupportedError: bases that repeat after more than PERIOD_MAX elements.
        """
        blob, inside, chunk_rows, part_rows, strip_rows, formats = _Blob(), {}, [], [], [], []
        out = 0
        for raw_offset, parts in chunks:
            raw_bytes = sum(part.raw_bytes for part in parts)
            chunk_rows.append([raw_offset, raw_bytes, out, len(part_rows), len(parts)])
            out += raw_bytes + -raw_bytes % SLOT_ALIGNMENT
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
                strips = _cut(part.raw_bytes, width)
                bits = sum(b << 4 * n for n, b in enumerate(table.tier_bits)) if table else 0
                part_rows.append([part.raw_bytes, part.table_index if table else OPAQUE,
                                  part.position, len(strip_rows), len(strips), inside_at,
                                  inside_bytes, code_at, table.dtype if table else 0, bits,
                                  bases_at, period])
                for first, count in strips:
                    strip_rows.append([at + first * width, count,
                                       bases_at + (part.position + first) % period, code_at,
                                       len(chunk_rows) - 1, width, 0, 0, 0, 0])
                    formats.append(format_of(table))
                at += part.raw_bytes
        return cls(_rows(chunk_rows, CHUNK), _rows(part_rows, PART_ROW), _rows(strip_rows, STRIP),
                   np.frombuffer(bytes(blob.data) or b"\0", np.uint8), _by_format(formats), out,
                   tuple(parts for _, parts in chunks))


def _cut(raw_bytes: int, width: int) -> list[tuple[int, int]]:
    """Return first element and count of each strip."""
    elements = raw_bytes // width
    return [(first, min(STRIP_ELEMENTS, elements - first))
            for first in range(0, elements, STRIP_ELEMENTS)]


@dataclass(frozen=True)
class Payload:
    """A coded chunk: where its payload begins among the coded bytes, and where it goes."""

    coded: bytes
    coded_offset: int
    raw_offset: int
    raw_bytes: int


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
        """Raise what `kvwire.tiered.decode_tiered` raises before it looks at a strip."""
        blob, rows, formats = _Blob(), [], []
        for number, payload in enumerate(payloads):
            at, done = 0, 0
            if not payload.coded:
                _refuse("payload: there is no part")
            while at < len(payload.coded):
                at, done = _read_part(payload, at, done, number, table_of, blob, rows, formats)
            if done != payload.raw_bytes:
                _refuse("payload: the parts do not cover the chunk", expected=payload.raw_bytes,
                        actual=done)
        return cls(_rows(rows, STRIP), np.frombuffer(bytes(blob.data) or b"\0", np.uint8),
                   _by_format(formats))


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
        table, taken = CodeTable.decode(coded[index_at:stop])
        index_at += taken
    elif header["table_index"] != OPAQUE and (table := table_of(header["table_index"])) is None:
        fail(ErrorCode.TABLE_UNKNOWN, f"part: code table {header['table_index']} is not known "
             "here", expected=0, actual=header["table_index"])
    position, width = header["position"], table.format.item_bytes if table else 1
    if position >= (table.period if table else 1) or raw_bytes % width:
        _refuse(f"part: position is {position}, raw_bytes {raw_bytes}")
    strips = _cut(raw_bytes, width)
    body_at = index_at + 2 * len(strips) + -2 * len(strips) % SLOT_ALIGNMENT
    if body_at > stop or any(coded[index_at + 2 * len(strips):body_at]):
        _refuse("part: its index does not fit or is not padded with 0")
    code_at, bases_at, period = blob.of(table) if table else (0, 0, 1)
    first_row = len(rows)
    for entry, (first, count) in zip(np.frombuffer(coded, "<u2", len(strips), index_at), strips):
        form, tail_bytes = int(entry) >> 14, int(entry) & 0x3FFF
        body_bytes = _body_bytes(form, tail_bytes, table, count, width)
        rows.append([payload.raw_offset + done + first * width, count,
                     bases_at + (position + first) % period, code_at, chunk, width, form,
                     payload.coded_offset + body_at, 0, tail_bytes])
        formats.append(format_of(table))
        body_at += body_bytes
    for row in rows[first_row:]:
        row[8] = payload.coded_offset + body_at
        body_at += row[9]
    if body_at + -body_at % SLOT_ALIGNMENT != stop or any(coded[body_at:stop]):
        _refuse("part: its strips do not fill it, or it is not padded with 0", expected=stop,
                actual=body_at)
    return stop, done + raw_bytes


def _body_bytes(form: int, tail_bytes: int, table: CodeTable | None, count: int,
                width: int) -> int:
    if form == StripForm.TIERED and table is not None:
        whole, rest = divmod(table.format.verbatim_bits, 8)
        return count * whole + (rest + table.tier_bits[0]) * -(-count // 8)
    if form == StripForm.EXACT and tail_bytes == 0:
        return count * width
    if form != StripForm.CONSTANT or tail_bytes != width:
        _refuse(f"strip: form {form} with a tail of {tail_bytes} bytes")
    return 0
