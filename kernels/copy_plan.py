"""Where each byte of a segment lies in a device's memory, as rows that a kernel reads.

The planner's pieces (csrc/plan/placement.hpp) become one row per leg: any page size, strides, head
slices, NHD or HND, differing block sizes, states and convolution tails, all in one launch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvwire.control import Item
from kvwire.layout import CacheSpec
from kvwire.memory import CacheMemory
from kvwire.plan import place

__all__ = ["LEG_COLUMNS", "LEVELS", "CopyPlan"]

LEVELS = 5  # of nested counts, outer to inner; csrc/plan/placement.hpp
WORD_BYTES_MAX = 16

# Columns of a row, int64; kernels/cuda/copy.cuh has the same.
WIRE_OFFSET, WIRE_STEP, ADDRESS, RUN_BYTES, ITERATIONS = range(5)
COUNTS, STRIDES, TABLE_STEPS = 5, 5 + LEVELS, 5 + 2 * LEVELS
BLOCK_STRIDE, TABLE_START, BLOCK_COUNT = range(5 + 3 * LEVELS, 8 + 3 * LEVELS)
LEG_COLUMNS = 8 + 3 * LEVELS


@dataclass(frozen=True)
class CopyPlan:
    """Rows of a segment's legs, in wire order of their first bytes.

    Iteration n of a leg moves `RUN_BYTES` bytes between segment offset WIRE_OFFSET + n * WIRE_STEP
    and ADDRESS + the sum of index * STRIDES + block id * BLOCK_STRIDE, where the indices are n in
    the mixed radix of COUNTS, and the block id is block_ids[TABLE_START + the sum of index *
    TABLE_STEPS]. BLOCK_COUNT 0: there is no table. ADDRESS 0: the bytes have no place here.

    Attributes:
        legs: int64 [legs, LEG_COLUMNS].
        block_ids: int64, all tables one after another.
        bytes: of the segment.
        word_bytes: 1, 2, 4, 8 or 16: what divides every offset, stride, address and run.
        placements: the planner's, of each item; they keep the memory alive.
    """

    legs: np.ndarray
    block_ids: np.ndarray
    bytes: int
    word_bytes: int
    placements: tuple = ()

    @classmethod
    def of_items(cls, spec: CacheSpec, items: Sequence[Item], memory: CacheMemory,
                 block_counts: Mapping[int, int] | None = None) -> CopyPlan:
        """Return the plan of a segment.

        Args:
            spec: the sender's: it sets the order of the bytes.
            memory: addresses in it may be a device's: nothing here reads them.
            block_counts: {group index of `spec`: how many blocks each of its arrays has}. The
                kernels report ids outside, as happens when those in device memory are changed
                later. By default the highest id in use sets it.

        Raises:
            As `kvwire.plan.place`.
        """
        placements = tuple(place(spec, [item], memory) for item in items)
        counts = [(block_counts or {}).get(item.group_index) for item in items]
        return cls.of_placements(placements, counts)

    @classmethod
    def of_placements(cls, placements: Sequence, block_counts: Sequence[int | None] = ()
                      ) -> CopyPlan:
        """Return the plan of placements one after another. `block_counts`: of each, as above."""
        rows, tables, kept, wire_bytes, entries = [], [], {}, 0, 0
        for number, placement in enumerate(placements):
            count = block_counts[number] if block_counts else None
            for piece in placement.pieces():
                table = piece[2]
                if table is not None and id(table) not in kept:
                    kept[id(table)] = entries
                    tables.append(table)
                    entries += len(table)
                wire_bytes = _piece_rows(piece, wire_bytes, kept.get(id(table), 0), count, rows)
        legs = np.array(rows, np.int64).reshape(-1, LEG_COLUMNS)
        return cls(legs, np.concatenate([*tables, np.zeros(1, np.int64)]), wire_bytes,
                   _word_bytes(legs), tuple(placements))

    @property
    def mean_run_bytes(self) -> int:
        """Of the runs that lie side by side."""
        return self.bytes // max(int(self.legs[:, ITERATIONS].sum()), 1)

    def tile_starts(self, rows: int, columns: int, word_bytes: int) -> np.ndarray:
        """Return the first tile of each leg and, last, how many there are; int64 [legs + 1].

        A tile is `rows` iterations by `columns` words of their runs.
        """
        words = self.legs[:, RUN_BYTES] // word_bytes
        tiles = -(-self.legs[:, ITERATIONS] // rows) * -(-words // columns)
        return np.concatenate([[0], np.cumsum(tiles)]).astype(np.int64)


def _piece_rows(piece: tuple, offset: int, table_at: int, block_count: int | None,
                rows: list) -> int:
    """Append the rows of a piece that begins at `offset`; return where the next one does.
    `table_at`: where its block ids begin among all."""
    counts, steps, table, legs = piece
    inner, iterations = sum(leg[-1] for leg in legs), math.prod(counts)
    at = offset
    for address, strides, block_stride, table_start, run_bytes in legs:
        paged = table is not None and block_stride != 0 and address != 0
        blocks = (block_count or int(table.max()) + 1) if paged else 0
        rows.append([at, inner, address, run_bytes, iterations, *_outer(counts, 1),
                     *_outer(strides, 0), *_outer(steps, 0), block_stride if paged else 0,
                     table_start + table_at, blocks])
        at += run_bytes
    return offset + inner * iterations


def _outer(values: list[int], fill: int) -> list[int]:
    return [fill] * (LEVELS - len(values)) + list(values)


def _word_bytes(legs: np.ndarray) -> int:
    columns = [WIRE_OFFSET, WIRE_STEP, ADDRESS, RUN_BYTES, BLOCK_STRIDE,
               *range(STRIDES, STRIDES + LEVELS)]
    common = int(np.gcd.reduce(np.append(legs[:, columns].ravel(), WORD_BYTES_MAX)))
    return common & -common
