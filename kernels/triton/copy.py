"""Pack and unpack: all legs of a segment between pages and one contiguous buffer, in one launch."""

import numpy as np
import triton
import triton.language as tl

from kvwire.kernels import copy_plan
from kvwire.kernels.copy_plan import LEG_COLUMNS, LEVELS, CopyPlan
from kvwire.kernels.triton.upload import upload

__all__ = ["NO_BAD_ENTRY", "DeviceRows", "copy_segment", "launch_of"]

TILE_WORDS = 2048
NO_BAD_ENTRY = (1 << 63) - 1

_COLUMNS = tl.constexpr(LEG_COLUMNS)
_LEVELS = tl.constexpr(LEVELS)
_WIRE_STEP = tl.constexpr(copy_plan.WIRE_STEP)
_ADDRESS = tl.constexpr(copy_plan.ADDRESS)
_RUN_BYTES = tl.constexpr(copy_plan.RUN_BYTES)
_ITERATIONS = tl.constexpr(copy_plan.ITERATIONS)
_COUNTS = tl.constexpr(copy_plan.COUNTS)
_STRIDES = tl.constexpr(copy_plan.STRIDES)
_TABLE_STEPS = tl.constexpr(copy_plan.TABLE_STEPS)
_BLOCK_STRIDE = tl.constexpr(copy_plan.BLOCK_STRIDE)
_TABLE_START = tl.constexpr(copy_plan.TABLE_START)
_BLOCK_COUNT = tl.constexpr(copy_plan.BLOCK_COUNT)
_NO_BAD_ENTRY = tl.constexpr(NO_BAD_ENTRY)


@triton.jit
def last_at_most(starts, count, value):
    """Return the last i in [0, count) with starts[i] <= value."""
    low = value * 0
    high = low + count
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) <= value:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def copy_kernel(legs, tile_starts, leg_count, block_ids, segment, first_word, stop_word, bad_entry,
                ROWS: tl.constexpr, WORDS: tl.constexpr, WORD_BYTES: tl.constexpr,
                PACK: tl.constexpr):
    """A program moves ROWS iterations by WORDS words of one leg. `segment`: its words from
    `first_word` to `stop_word`; no others are moved."""
    tile = tl.program_id(0).to(tl.int64)
    number = last_at_most(tile_starts, leg_count, tile)
    leg = legs + number * _COLUMNS
    run_words = tl.load(leg + _RUN_BYTES) // WORD_BYTES
    tile -= tl.load(tile_starts + number)
    across = tl.cdiv(run_words, WORDS)
    iteration = tile // across * ROWS + tl.arange(0, ROWS)
    word = tile % across * WORDS + tl.arange(0, WORDS)
    held = iteration < tl.load(leg + _ITERATIONS)

    nothing = iteration * 0  # scalars are spread out: masks of mixed shape confuse the interpreter
    base = tl.load(leg + _ADDRESS) + nothing
    address = base
    entry = tl.load(leg + _TABLE_START) + nothing
    rest = iteration
    for back in tl.static_range(_LEVELS):
        level = _LEVELS - 1 - back
        count = tl.load(leg + _COUNTS + level)
        index = rest % count
        rest = rest // count
        address += index * tl.load(leg + _STRIDES + level)
        entry += index * tl.load(leg + _TABLE_STEPS + level)

    block_count = tl.load(leg + _BLOCK_COUNT) + nothing
    paged = held & (block_count > 0)
    block = tl.load(block_ids + entry, mask=paged, other=0)
    bad = paged & ((block < 0) | (block >= block_count))
    first_bad = tl.min(tl.where(bad, entry, _NO_BAD_ENTRY))
    if first_bad < _NO_BAD_ENTRY:
        tl.atomic_min(bad_entry, first_bad)
    address += tl.where(bad, 0, block) * tl.load(leg + _BLOCK_STRIDE)

    pages = address.to(tl.pointer_type(segment.dtype.element_ty))[:, None] + word[None, :]
    wire = (tl.load(leg) + iteration * tl.load(leg + _WIRE_STEP)) // WORD_BYTES
    wire = wire[:, None] + word[None, :]
    on_wire = held[:, None] & (word < run_words)[None, :]
    on_wire &= (wire >= first_word) & (wire < stop_word)
    wire = segment + (wire - first_word)
    in_place = on_wire & (held & (bad == 0) & (base != 0))[:, None]
    if PACK:
        tl.store(wire, tl.load(pages, mask=in_place, other=0), mask=on_wire)
    else:
        tl.store(pages, tl.load(wire, mask=in_place, other=0), mask=in_place)


def launch_of(plan: CopyPlan) -> tuple[int, int, int]:
    """Return (rows, words, word_bytes) of the tiles, in the shape that makes them fewest."""
    word_bytes = min(plan.word_bytes, 8)
    shapes = [(TILE_WORDS >> bits, 1 << bits, word_bytes) for bits in range(12)]
    return min(shapes, key=lambda shape: plan.tile_starts(*shape)[-1])


class DeviceRows:
    """A plan on the device. `bad_entry`: int64 tensor [1], NO_BAD_ENTRY; becomes the least index in
    `block_ids` whose id lies outside its array."""

    def __init__(self, plan: CopyPlan, device):
        self.plan, self.launch = plan, launch_of(plan)
        starts = plan.tile_starts(*self.launch)
        self.tiles = int(starts[-1])
        self.legs, self.block_ids, self.tile_starts, self.bad_entry = (
            upload(rows, device) for rows in (plan.legs, plan.block_ids, starts,
                                              np.array([NO_BAD_ENTRY])))


def copy_segment(rows: DeviceRows, segment, *, pack: bool, start: int = 0,
                 stop: int | None = None) -> None:
    """Enqueue the copy of a segment, or of a part of it, on the current stream. At a bad block id
    nothing is read or written.

    Args:
        segment: uint8 tensor of the bytes from `start` to `stop` (None: the segment's end), both
            and its address multiples of the plan's word_bytes.
        pack: from the pages into `segment`; else the other way.
    """
    import torch
    tile_rows, words, word_bytes = rows.launch
    stop = rows.plan.bytes if stop is None else stop
    if rows.tiles == 0:
        return
    word = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[word_bytes]
    copy_kernel[(rows.tiles,)](
        rows.legs, rows.tile_starts, len(rows.plan.legs), rows.block_ids,
        segment[:stop - start].view(word), start // word_bytes, stop // word_bytes, rows.bad_entry,
        ROWS=tile_rows, WORDS=words, WORD_BYTES=word_bytes, PACK=pack)
