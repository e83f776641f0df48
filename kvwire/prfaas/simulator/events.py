"""The clock of a simulation: calls in the order of their times."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush

from kvwire.errors import InternalError

__all__ = ["EventQueue"]


class EventQueue:
    """Calls to come, by time; those of the same instant in the order in which they were asked for.

    The order depends on nothing else, so a simulation is a function of its inputs and seed.
    Nothing is taken back: who changed their mind ignores the call when it comes.

    Attributes:
        now_s: the simulated time, from 0.
        call_count: calls made.
    """

    def __init__(self):
        self.now_s = 0.0
        self.call_count = 0
        self._heap: list[tuple[float, int, Callable, object]] = []
        self._order = 0

    def __len__(self) -> int:
        return len(self._heap)

    def at(self, time_s: float, action: Callable[[object], None], argument: object = None) -> None:
        """Call ``action(argument)`` at `time_s`, which is now or later."""
        if not time_s >= self.now_s:
            raise InternalError(f"a call for {time_s} s was asked for at {self.now_s} s")
        self._order += 1
        heappush(self._heap, (time_s, self._order, action, argument))

    def run(self, until_s: float = math.inf) -> None:
        """Make the calls up to and including `until_s`; the clock stops at the last one made."""
        heap = self._heap
        made = 0
        while heap and heap[0][0] <= until_s:
            self.now_s, _, action, argument = heappop(heap)
            made += 1
            action(argument)
        self.call_count += made
