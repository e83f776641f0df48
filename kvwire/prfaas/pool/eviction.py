"""Which entry of a full pool, or of the SSD tier, goes first.

The pool keeps what can go in a queue of rising priority, and takes the lowest. Only the ends of the
tree can go: checkpoints, and blocks of KV that have neither a follower nor a checkpoint. A parent
that becomes an end takes over the newer stamp and the uses of the child that made way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Protocol

from kvwire.errors import UsageError
from kvwire.prfaas.pool.blocks import BlockGeometry, Entry

__all__ = ["CostAware", "EvictionPolicy", "EvictionQueue", "Lru"]

_SECONDS_MIN = 1e-9
_VALUE_MIN = 1e-6
_BONUS_MIN = math.log(_VALUE_MIN)
_IDLE_WEIGHT = 0.01
_LENGTHS_MAX = 1 << 16
_QUEUE_SLACK = 1024


class EvictionPolicy(Protocol):
    """One object serves one pool."""

    def used(self, entry: Entry) -> None:
        """Stamp an entry that was inserted or hit."""

    def priority(self, entry: Entry, geometry: BlockGeometry) -> float:
        """Return the priority to stay; the pool asks when an entry can go, and before it goes."""

    def evicted(self, entry: Entry, geometry: BlockGeometry) -> None:
        """Learn what goes."""


class Lru:
    """The least recently used entry goes first, whatever it is."""

    def __init__(self):
        self._now = 0

    def used(self, entry: Entry) -> None:
        self._now += 1
        entry.used = self._now

    def priority(self, entry: Entry, geometry: BlockGeometry) -> float:
        return entry.used

    def evicted(self, entry: Entry, geometry: BlockGeometry) -> None:
        pass


class CostAware:
    """Keeps what saves most prefill seconds per byte, for the longer the more it saves.

    Let an entry's value be ``uses * seconds / bytes``. If the chance that it is used again halves
    in some time, then what should go is the lowest ``value * exp(-idle / horizon)``; its logarithm
    gives each entry a fixed place, ``last use + horizon * log(value)``, as LRU's, with a bonus.
    The horizon follows the pool: a share of the idle time after which entries have gone lately.

    - A checkpoint is worth the prefill from the nearest checkpoint before it. Its bytes are its
      own and those of the KV that goes with it: the run of blocks that nothing else needs.
      (Marconi, arXiv 2411.19379, weighs prefill against bytes alike, and adds recency to it.)
    - KV without a checkpoint at or after it is worth nothing in a model with states and goes at
      once, as a checkpoint without its KV would be; the tree never holds one of those.
    - Without states, a block is worth its own prefill at its depth.

    Args:
        recompute_s: (cached tokens, total tokens) -> seconds of prefill for the difference; always
            the same for the same tokens.
        horizon: the share, 0.4 by measurement (bench.prefix_pool); 0: LRU, but for worthless KV.
    """

    def __init__(self, recompute_s: Callable[[int, int], float], *, horizon: float = 0.4):
        if not horizon >= 0:
            raise UsageError(f"horizon is {horizon}; it must not be negative")
        # The same lengths come again and again, and a profile takes its time to interpolate.
        self._recompute_s = lru_cache(_LENGTHS_MAX)(recompute_s)
        self._horizon = horizon
        self._now = 0
        self._idle = 0.0  # of what was evicted lately, in uses of anything

    def used(self, entry: Entry) -> None:
        self._now += 1
        entry.used = self._now
        entry.uses += 1

    def priority(self, entry: Entry, geometry: BlockGeometry) -> float:
        worth = entry.worth(geometry)
        if worth is None:
            return -math.inf
        start, stop, blocks = worth
        tokens = geometry.block_tokens
        # Against the prompt's first block, so that drifts of the horizon move all alike.
        seconds = self._recompute_s(start * tokens, stop * tokens)
        value = entry.uses * seconds / blocks / max(self._recompute_s(0, tokens), _SECONDS_MIN)
        bonus = math.log(value) if value > _VALUE_MIN else _BONUS_MIN
        return entry.used + self._horizon * self._idle * bonus

    def evicted(self, entry: Entry, geometry: BlockGeometry) -> None:
        if entry.worth(geometry) is not None:
            self._idle += _IDLE_WEIGHT * (self._now - entry.used - self._idle)


class EvictionQueue:
    """What can go, in the order of a policy. An entry's place may be old: it is looked at again
    before the entry goes."""

    def __init__(self, policy: EvictionPolicy, geometry: BlockGeometry):
        self.policy = policy
        self._geometry = geometry
        self._places: list[tuple[float, int, Entry]] = []
        self._places_max = _QUEUE_SLACK
        self._sequence = 0

    def __len__(self) -> int:
        """Places, old ones included."""
        return len(self._places)

    def offer(self, entry: Entry) -> None:
        """Give an entry its place, if it can go; its older places count no more."""
        if entry.evictable:
            self._place(entry, self.policy.priority(entry, self._geometry))

    def pop(self) -> Entry | None:
        """Take out the entry that goes first, of which the policy learns; None: none can go."""
        places = self._places
        while places:
            priority, sequence, entry = heappop(places)
            if entry.queued != sequence:
                continue
            entry.queued = 0
            if not entry.evictable:
                continue
            now = self.policy.priority(entry, self._geometry)
            if now > priority and places and now > places[0][0]:
                self._place(entry, now)
                continue
            self.policy.evicted(entry, self._geometry)
            return entry
        return None

    def _place(self, entry: Entry, priority: float) -> None:
        self._sequence += 1
        entry.queued = self._sequence
        heappush(self._places, (priority, self._sequence, entry))
        if len(self._places) > self._places_max:
            live = [place for place in self._places if place[2].queued == place[1]]
            heapify(live)
            self._places[:] = live
            self._places_max = 2 * len(live) + _QUEUE_SLACK
