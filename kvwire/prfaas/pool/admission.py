"""Which prefixes are worth a write to SSD: flash wears out, and its bandwidth is shared.

Weighing prefill against bytes is Marconi's (arXiv 2411.19379) measure for eviction, here at the
door. The usual rule of caches on flash, admission at the second use (Maggs and Sitaraman, CCR
2015), serves prefixes badly: a conversation's next turn brings a longer prefix, and what is written
at the second use of the old one will hardly be used again. `bench.prefix_pool` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

from kvwire.errors import UsageError
from kvwire.prfaas.pool.blocks import BlockGeometry

__all__ = ["AdmissionPolicy", "CostPerByte"]


class AdmissionPolicy(Protocol):
    """One object may serve any number of tiers."""

    def admits(self, start: int, stop: int, blocks: int, geometry: BlockGeometry) -> bool:
        """Say whether a write of so many blocks is worth it, that would save the prefill from
        block `start` to block `stop`."""


class CostPerByte:
    """Admits what takes long enough to prefill again, for its bytes.

    What is refused is looked at again with what comes after it: small appends to a conversation are
    written as one, with the last of their checkpoints.

    Args:
        recompute_s: (cached tokens, total tokens) -> seconds of prefill for the difference.
        s_per_gb_min: prefill seconds per GB. 0.25 (a disk of 4 GB/s reads in the same time) by
            measurement: the most that costs no model of bench.prefix_pool 0.1 % of the seconds
            saved, with 12 to 14 % fewer bytes written where there are states. 0: all.
    """

    def __init__(self, recompute_s: Callable[[int, int], float], *, s_per_gb_min: float = 0.25):
        if not 0 <= s_per_gb_min < math.inf:
            raise UsageError(f"s_per_gb_min is {s_per_gb_min}; it must be a number from 0 on")
        self._recompute_s, self._s_per_gb_min = recompute_s, s_per_gb_min

    def admits(self, start: int, stop: int, blocks: int, geometry: BlockGeometry) -> bool:
        tokens = geometry.block_tokens
        saved_s = self._recompute_s(start * tokens, stop * tokens)
        return saved_s >= self._s_per_gb_min * blocks * geometry.block_bytes / 1e9
