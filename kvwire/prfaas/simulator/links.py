"""A link between two clusters, as a fluid: who shares it, how fast, and what breaks it.

Transfers share the link's rate evenly, as many TCP connections in long transfers do, and none goes
faster than its lanes: with n transfers active each gets ``min(rate / n, lanes x rate of a lane)``.
All rates are alike, so one number, the bytes that a transfer active all the time would have sent
("level"), tells when each ends: O(log n) per transfer and no matter how long the link runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heappop, heappush

from kvwire.errors import InternalError, UsageError
from kvwire.prfaas.throughput import Link
from kvwire.prfaas.simulator.events import EventQueue

__all__ = ["FluidLink", "Transfer", "pieces_of"]

_PIECES = 4


class Transfer:
    """Bytes that cross a link for one owner; handed over in pieces, as prefill makes them.

    Attributes:
        owner: whom `arrived` is called with.
        sent_bytes: handed over so far; all of them are on the wire or across.
    """

    __slots__ = ("link", "owner", "arrived", "sent_bytes", "ends_at_level", "active", "sealed",
                 "cancelled")

    def __init__(self, link: FluidLink, owner: object, arrived: Callable[[object], None]):
        self.link = link
        self.owner = owner
        self.arrived = arrived
        self.sent_bytes = 0.0
        self.ends_at_level = 0.0
        self.active = False
        self.sealed = False
        self.cancelled = False


def pieces_of(begin_s: float, end_s: float, count: int = _PIECES) -> list[tuple[float, float]]:
    """Return (time, share of the bytes) of the pieces in which layer-wise streaming hands over.

    A cache comes into being evenly from `begin_s` to `end_s`. Halves of what is left keep the
    events few and the last piece, the one that a first token waits for, small (1/8 for 4).
    """
    pieces, share = [], 1.0
    for _ in range(count - 1):
        share /= 2
        pieces.append((end_s - (end_s - begin_s) * share, share))
    return [*pieces, (end_s, share)]


class FluidLink:
    """One direction of a link, while it runs.

    Args:
        link: its rate, share, round trip and window, as the throughput model has them.
        lane_count: TCP connections of one transfer.
        lane_gbps_max: what one connection reaches.

    Attributes:
        one_way_s: from one end to the other.
        speed: share of its rate that the link has now; 0 is a blackhole.
        delivered_bytes: what went across so far.
    """

    def __init__(self, queue: EventQueue, link: Link, lane_count: int = 8,
                 lane_gbps_max: float = math.inf):
        if lane_count < 1 or not lane_gbps_max > 0:
            raise UsageError(f"{lane_count} lanes of {lane_gbps_max} Gbit/s carry nothing")
        self.one_way_s = link.rtt_s / 2
        self.speed = 1.0
        self.delivered_bytes = 0.0
        self._queue = queue
        self._capacity = link.goodput_gbps * 1e9 / 8
        self._transfer_max = lane_count * lane_gbps_max * 1e9 / 8
        self._level = 0.0
        self._level_at_s = 0.0
        self._rate = 0.0  # of one transfer
        self._active = 0
        self._ends: list[tuple[float, int, Transfer]] = []
        self._ends_sum = 0.0
        self._order = 0
        self._ticket = 0  # of the one end that is awaited; older calls are stale

    @property
    def active_count(self) -> int:
        """Transfers with bytes that wait or go."""
        return self._active

    @property
    def queued_bytes(self) -> float:
        """Bytes handed over and not across."""
        self.advance()
        return max(0.0, self._ends_sum - self._active * self._level)

    def send(self, transfer: Transfer, count: float, last: bool = False) -> None:
        """Hand over `count` bytes; once the `last` ones are across, `arrived` is called."""
        if transfer.cancelled:
            return
        if transfer.sealed:
            raise InternalError("bytes after the last ones of a transfer")
        transfer.sealed = last
        transfer.sent_bytes += count
        self.advance()
        if transfer.active:
            transfer.ends_at_level += count
        else:
            transfer.active = True
            transfer.ends_at_level = self._level + count
            self._active += 1
            self._ends_sum += self._level
            self._push(transfer)
        self._ends_sum += count
        self._await_next()

    def cancel(self, transfer: Transfer) -> None:
        """Drop what is not across; `arrived` will not be called."""
        if transfer.cancelled:
            return
        transfer.cancelled = True
        if transfer.active:
            self.advance()
            self._leave(transfer)
            self._await_next()

    def set_speed(self, speed: float) -> None:
        """Change the rate, 1 for all of it, 0 for nothing at all."""
        self.advance()
        self.speed = speed
        self._await_next()

    def advance(self) -> None:
        """Bring `delivered_bytes` up to now."""
        now_s = self._queue.now_s
        passed = (now_s - self._level_at_s) * self._rate
        self._level += passed
        self._level_at_s = now_s
        self.delivered_bytes += passed * self._active

    def _push(self, transfer: Transfer) -> None:
        self._order += 1
        heappush(self._ends, (transfer.ends_at_level, self._order, transfer))

    def _leave(self, transfer: Transfer) -> None:
        transfer.active = False
        self._active -= 1
        self._ends_sum -= transfer.ends_at_level
        if not self._active:
            self._ends.clear()  # only cancelled ones are left
            self._ends_sum = self._level = 0.0  # a small level keeps its digits

    def _await_next(self) -> None:
        ends = self._ends
        while ends:  # what is cancelled goes, what got more bytes moves
            level, _, transfer = ends[0]
            if not transfer.active:
                heappop(ends)
            elif transfer.ends_at_level > level:
                heappop(ends)
                self._push(transfer)
            else:
                break
        self._ticket += 1
        if not self._active:
            self._rate = 0.0
            return
        rate = self._capacity * self.speed / self._active
        self._rate = rate = rate if rate < self._transfer_max else self._transfer_max
        if rate:
            left = ends[0][0] - self._level
            left_s = left / rate if left > 0.0 else 0.0
            self._queue.at(self._queue.now_s + left_s, self._end, self._ticket)

    def _end(self, ticket: int) -> None:
        if ticket != self._ticket:
            return
        self.advance()
        ends, done = self._ends, []
        level = self._level
        if level < ends[0][0]:  # rounding must leave no last grain
            level = self._level = ends[0][0]
        while ends and ends[0][0] <= level:
            _, _, transfer = heappop(ends)
            if not transfer.active:
                continue
            if transfer.ends_at_level > level:
                self._push(transfer)
                continue
            self._leave(transfer)
            if transfer.sealed:
                done.append(transfer)
        self._await_next()
        for transfer in done:
            if self.one_way_s:
                self._queue.at(self._queue.now_s + self.one_way_s, self._arrive, transfer)
            else:
                self._arrive(transfer)

    def _arrive(self, transfer: Transfer) -> None:
        if not transfer.cancelled:
            transfer.arrived(transfer.owner)
