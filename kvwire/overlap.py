"""Do two destinations share memory? Asked before anything is written to either."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from functools import lru_cache

import numpy as np

from kvwire.buffers import Buffer
from kvwire.errors import ErrorCode, UsageError

__all__ = ["check_distinct"]

_WORK_MAX = 10_000  # of numpy's exact solver, for one pair


def check_distinct(destinations: Iterable[tuple[str, Buffer, object]]) -> None:
    """Raise UsageError (code OVERLAP) when two destinations share a byte.

    Args:
        destinations: (words for it, its memory, its block table or None). Views that interleave
            without touching are fine. Memory that two *different* block tables share is not
            looked into: engines let layer groups alias one pool, each block owned by one group.
    """
    spans = sorted((*_span(buffer), index, what, buffer, table)
                   for index, (what, buffer, table) in enumerate(destinations)
                   if 0 not in buffer.shape)
    active: list[tuple] = []
    for span in spans:
        start, _, _, what, buffer, table = span
        active = [earlier for earlier in active if earlier[1] > start]
        for *_, other_what, other, other_table in active:
            if table is other_table and _share(
                    other.shape, other.strides, other.item_bytes, buffer.shape, buffer.strides,
                    buffer.item_bytes, buffer.address - other.address):
                raise UsageError(f"{what} and {other_what} share memory: two destinations must "
                                 "not overlap", code=ErrorCode.OVERLAP)
        active.append(span)


def _span(buffer: Buffer) -> tuple[int, int]:
    """Return the lowest address and one past the highest."""
    reach = [(extent - 1) * stride for extent, stride in zip(buffer.shape, buffer.strides)]
    low = buffer.address + sum(min(step, 0) for step in reach)
    high = buffer.address + sum(max(step, 0) for step in reach) + buffer.item_bytes
    return low, high


@lru_cache(maxsize=4096)
def _share(shape: tuple, strides: tuple, item_bytes: int, other_shape: tuple,
           other_strides: tuple, other_item_bytes: int, distance: int) -> bool:
    """Decide it on views of the same geometry over memory that is never touched."""
    base = 1 << 45
    views = [_view(base, shape, strides, item_bytes),
             _view(base + distance, other_shape, other_strides, other_item_bytes)]
    try:
        return bool(np.shares_memory(*views, max_work=_WORK_MAX))
    except np.exceptions.TooHardError:
        return False


def _view(address: int, shape: tuple, strides: tuple, item_bytes: int) -> np.ndarray:
    anchor = (ctypes.c_ubyte * item_bytes).from_address(address)
    first = np.frombuffer(anchor, np.dtype((np.void, item_bytes)), 1)
    return np.lib.stride_tricks.as_strided(first, shape, strides)
