"""Requests and the nodes that serve them: prefill one at a time, decode in slots."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Protocol

from kvwire.prfaas.simulator.caches import CacheHold
from kvwire.prfaas.simulator.events import EventQueue

__all__ = ["DecodeNodes", "PrefillNodes", "Request", "Stage"]


class QueueView(Protocol):
    """What is told how long a node's queue is."""

    queue_s: float


class Stage(IntEnum):
    """Where a request is; each stage knows what it holds there."""

    ARRIVED = 0
    DISPATCH = 1    # it, or the prefix that it will stand on, is on the link
    PREFILL_QUEUE = 2
    PREFILL = 3
    TRANSFER = 4    # prefill is done, its cache is not all across
    DECODE_QUEUE = 5
    DECODE = 6
    DONE = 7
    FAILED = 8


class Request:
    """One request on its way.

    Attributes:
        index: in the trace.
        tokens: of the prompt; after a restart in decode, with what was generated before.
        output_tokens: still to be generated.
        hashes: keys of the prompt's full blocks, for the prefix pools.
        waits_since_s: of the wait for a first token that its deadline counts from.
        first_token_s: when the user saw something; < 0: not yet.
        cluster: the `PrefillNodes` that it was sent to.
        choice: the policy's, of this attempt.
        cached_tokens: found in that cluster's pool when prefill began.
        held_tokens: KV that the decode side had then.
        attempt: of its way from the router on; 1 is the first.
        transfer: of its cache, or of its prefix.
    """

    __slots__ = ("index", "arrival_s", "tokens", "output_tokens", "hashes", "waits_since_s",
                 "stage", "stage_since_s", "first_token_s", "cluster", "node", "choice",
                 "cached_tokens", "held_tokens", "attempt", "transfer", "_holds")

    def __init__(self, index: int, arrival_s: float, tokens: int, output_tokens: int,
                 hashes: list):
        self.index = index
        self.arrival_s = self.waits_since_s = self.stage_since_s = arrival_s
        self.tokens = tokens
        self.output_tokens = output_tokens
        self.hashes = hashes
        self.stage = Stage.ARRIVED
        self.first_token_s = -1.0
        self.cluster: PrefillNodes | None = None
        self.node: int | None = None
        self.choice = None
        self.cached_tokens = self.held_tokens = 0
        self.attempt = 0
        self.transfer = None
        self._holds: list[tuple[CacheHold, bool]] = []

    def hold(self, hold: CacheHold, later: bool = False) -> None:
        """Keep a part of a pool until `release`.

        Args:
            later: it is filled when the cache has arrived, not when prefill ends.
        """
        self._holds.append((hold, later))

    def commit(self, arrived: bool = False) -> None:
        """What was made, or has arrived, is in the pools."""
        for hold, later in self._holds:
            if later == arrived:
                hold.commit()

    def release(self) -> None:
        """Give back all holds."""
        for hold, _ in self._holds:
            hold.release()
        self._holds.clear()


class PrefillNodes:
    """Prefill instances of one kind, each serving one request at a time.

    A request sent to a node waits in that node's queue; one sent to none is served by the first
    node that is free. Own queues go first. A closed node finishes its own queue and takes no more.

    Args:
        service_s: called when a request's prefill begins; returns how long it takes.
        finished: called when it ends.
        open_count: the first of the nodes, which are open at first; all by default.

    Attributes:
        up: per node; a node that is down serves nothing.
        open: per node; a closed one is draining, or does something else.
        busy_s: node seconds of the prefills that ended.
    """

    def __init__(self, queue: EventQueue, name: str, node_count: int,
                 service_s: Callable[[Request], float], finished: Callable[[Request], None],
                 open_count: int | None = None):
        self.name = name
        self.node_count = node_count
        self.up = [True] * node_count
        open_count = node_count if open_count is None else open_count
        self.open = [node < open_count for node in range(node_count)]
        self._drained: dict[int, Callable[[], None]] = {}
        self._down_count = node_count - open_count  # and closed
        self.busy_s = 0.0
        self.queued_tokens = 0
        self.queued_count = 0
        self._queue = queue
        self._service_s = service_s
        self._finished = finished
        self._running: list[Request | None] = [None] * node_count
        self._until_s = [0.0] * node_count
        self._idle = list(range(open_count))[::-1]
        self._any: deque[tuple[Request, int]] = deque()
        self._own: list[deque[tuple[Request, int]]] = [deque() for _ in range(node_count)]
        self._own_s = [0.0] * node_count  # expected of those that wait for just this node

    def submit(self, request: Request, node: int | None = None) -> None:
        """Queue the request; its prefill may begin at once."""
        request.cluster, request.node = self, node
        request.stage, request.stage_since_s = Stage.PREFILL_QUEUE, self._queue.now_s
        self.queued_tokens += request.tokens
        self.queued_count += 1
        if node is None:
            self._any.append((request, request.attempt))
            if self._idle:
                self._next(self._idle.pop())
        else:
            self._own[node].append((request, request.attempt))
            self._own_s[node] += request.choice.prefill_s
            if node in self._idle:
                self._idle.remove(node)
                self._next(node)

    def withdraw(self, request: Request) -> None:
        """Take back a request that waits or runs here; its node goes on with the next one.

        The caller gives the request a new stage or attempt, which makes its place stale.
        """
        if request.stage == Stage.PREFILL_QUEUE:
            self._unqueue(request)
        elif request.stage == Stage.PREFILL:
            node = request.node
            self.busy_s += self._queue.now_s - request.stage_since_s
            self._running[node] = None
            self._until_s[node] = self._queue.now_s
            request.stage = Stage.ARRIVED
            self._next(node)

    def stop(self, node: int) -> None:
        """Take a node down; what runs or waits on it stays there until somebody withdraws it."""
        self._down_count += self.up[node] and self.open[node]
        self.up[node] = False
        if node in self._idle:
            self._idle.remove(node)

    def start(self, node: int) -> None:
        """Bring a node back."""
        self._down_count -= not self.up[node] and self.open[node]
        self.up[node] = True
        if self._running[node] is None and node not in self._idle:
            self._next(node)

    def close(self, node: int, drained: Callable[[], None]) -> None:
        """Give an open node no more requests; `drained` is called when it has none left."""
        self._down_count += self.up[node]
        self.open[node] = False
        self._drained[node] = drained
        if node in self._idle:
            self._idle.remove(node)
            self._next(node)

    def reopen(self, node: int) -> None:
        """Let a closed node that is drained serve again."""
        self.open[node] = True
        self._down_count -= self.up[node]
        self._next(node)

    def shortest(self) -> int:
        """Return the open node with the shortest own queue."""
        now_s = self._queue.now_s
        return min((node for node in range(self.node_count) if self.open[node]),
                   key=lambda node: self._own_s[node] + max(0.0, self._until_s[node] - now_s))

    def requests_of(self, node: int) -> list[Request]:
        """Return what runs on a node or waits for just this one."""
        waiting = [request for request, attempt in self._own[node] if _waits(request, attempt)]
        running = self._running[node]
        return waiting if running is None else [running, *waiting]

    def requests(self) -> list[Request]:
        """Return all that run or wait here."""
        waiting = [request for request, attempt in self._any if _waits(request, attempt)]
        return waiting + [request for node in range(self.node_count)
                          for request in self.requests_of(node)]

    def tell_queues(self, views: Sequence[QueueView]) -> bool:
        """Set each node's `queue_s`, how long a new request would wait there; infinity: it takes
        none.

        Returns: whether all are up and open.
        """
        now_s, until_s, own_s = self._queue.now_s, self._until_s, self._own_s
        for node, view in enumerate(views):
            left_s = until_s[node] - now_s
            view.queue_s = own_s[node] + left_s if left_s > 0 else own_s[node]
        if self._down_count:
            for view, up, opened in zip(views, self.up, self.open):
                view.queue_s = view.queue_s if up and opened else math.inf
        return not self._down_count

    def worked_s(self) -> float:
        """Return the node seconds of all prefills so far, those that run included."""
        now_s = self._queue.now_s
        return self.busy_s + sum(now_s - request.stage_since_s for request in self._running
                                 if request is not None)

    def running_count(self) -> int:
        """Return how many nodes are busy."""
        return sum(request is not None for request in self._running)

    def _unqueue(self, request: Request) -> None:
        self.queued_tokens -= request.tokens
        self.queued_count -= 1
        if request.node is not None:
            self._own_s[request.node] -= request.choice.prefill_s
        request.stage = Stage.ARRIVED

    def _next(self, node: int) -> None:
        """Serve the next request on a node that has none."""
        own, shared = self._own[node], self._any
        while self.up[node] and (own or (shared and self.open[node])):
            request, attempt = (own or shared).popleft()
            if _waits(request, attempt):
                self._begin(request, node)
                return
        if not self.up[node]:
            return
        if self.open[node]:
            self._idle.append(node)
        elif node in self._drained:
            self._drained.pop(node)()

    def _begin(self, request: Request, node: int) -> None:
        self._unqueue(request)
        request.stage, request.stage_since_s = Stage.PREFILL, self._queue.now_s
        request.node = node
        self._running[node] = request
        end_s = self._until_s[node] = self._queue.now_s + self._service_s(request)
        self._queue.at(end_s, self._end, (node, request, request.attempt))

    def _end(self, run: tuple[int, Request, int]) -> None:
        node, request, attempt = run
        if self._running[node] is not request or request.attempt != attempt or not self.up[node]:
            return
        self._running[node] = None
        self.busy_s += self._queue.now_s - request.stage_since_s
        self._finished(request)
        self._next(node)


def _waits(request: Request, attempt: int) -> bool:
    return request.stage == Stage.PREFILL_QUEUE and request.attempt == attempt


class DecodeNodes:
    """Decode instances with batch slots; every slot makes a token each `token_s`.

    A closed node goes on with what it decodes and takes no more.

    Args:
        started: called when a request got its slot; finished: when its last token is made.
        open_count: the last of the nodes, which are open at first; all by default.

    Attributes:
        busy_s: slot seconds of the decodes that ended.
        up, open: see `PrefillNodes`.
    """

    def __init__(self, queue: EventQueue, node_count: int, slots: int, token_s: float,
                 started: Callable[[Request], None], finished: Callable[[Request], None],
                 open_count: int | None = None):
        self.node_count = node_count
        open_count = node_count if open_count is None else open_count
        self.open = [node >= node_count - open_count for node in range(node_count)]
        self._drained: dict[int, Callable[[], None]] = {}
        self.slots = slots
        self.token_s = token_s
        self.busy_s = 0.0
        self.up = [True] * node_count
        self._queue = queue
        self._started = started
        self._finished = finished
        self._free = [slots * opened for opened in self.open]
        self._free_sum = slots * open_count
        self._waiting: deque[tuple[Request, int]] = deque()
        self._waiting_count = 0
        self._active: list[dict[int, Request]] = [{} for _ in range(node_count)]

    @property
    def waiting_count(self) -> int:
        """Requests whose cache is here and that have no slot."""
        return self._waiting_count

    @property
    def active_count(self) -> int:
        """Slots taken."""
        return sum(map(len, self._active))

    def worked_s(self) -> float:
        """Return the slot seconds of all decodes so far, those that run included."""
        now_s = self._queue.now_s
        return self.busy_s + sum(now_s - request.stage_since_s
                                 for active in self._active for request in active.values())

    def submit(self, request: Request) -> None:
        """Give the request a slot, or let it wait for one."""
        if self._free_sum:
            self._begin(request)
            return
        request.stage, request.stage_since_s = Stage.DECODE_QUEUE, self._queue.now_s
        self._waiting_count += 1
        self._waiting.append((request, request.attempt))

    def withdraw(self, request: Request) -> None:
        """Take back a request; its slot, if it has one, is free at once."""
        if request.stage == Stage.DECODE_QUEUE:
            self._waiting_count -= 1
            request.stage = Stage.ARRIVED
        elif request.stage == Stage.DECODE:
            self.busy_s += self._queue.now_s - request.stage_since_s
            self._leave(request)
            self._serve()

    def stop(self, node: int) -> list[Request]:
        """Take a node down; return the requests that it lost, withdrawn."""
        self.up[node] = False
        self._free_sum -= self._free[node]
        self._free[node] = 0
        lost = list(self._active[node].values())
        for request in lost:
            self.withdraw(request)
        return lost

    def start(self, node: int) -> None:
        """Bring a node back, empty."""
        self.up[node] = True
        self._offer(node)

    def close(self, node: int, drained: Callable[[], None]) -> None:
        """Give an open node no more requests; `drained` is called when it has none left."""
        self.open[node] = False
        self._free_sum -= self._free[node]
        self._free[node] = 0
        self._drained[node] = drained
        self._tell_drained(node)

    def reopen(self, node: int) -> None:
        """Let a closed node that is drained serve again."""
        self.open[node] = True
        self._offer(node)

    def emptiest(self) -> int:
        """Return the open node with the fewest requests."""
        return min((node for node in range(self.node_count) if self.open[node]),
                   key=lambda node: len(self._active[node]))

    def _offer(self, node: int) -> None:
        if self.up[node] and self.open[node]:
            self._free[node] = self.slots
            self._free_sum += self.slots
            self._serve()

    def _tell_drained(self, node: int) -> None:
        if not self._active[node] and node in self._drained:
            self._drained.pop(node)()

    def requests(self) -> list[Request]:
        """Return all that decode or wait here."""
        waiting = [request for request, attempt in self._waiting
                   if request.stage == Stage.DECODE_QUEUE and request.attempt == attempt]
        return waiting + [request for active in self._active for request in active.values()]

    def _begin(self, request: Request) -> None:
        node = self._free.index(max(self._free))
        self._free[node] -= 1
        self._free_sum -= 1
        request.stage, request.stage_since_s = Stage.DECODE, self._queue.now_s
        request.node = node
        self._active[node][request.index] = request
        end_s = self._queue.now_s + request.output_tokens * self.token_s
        self._queue.at(end_s, self._end, (request, request.attempt))
        self._started(request)

    def _leave(self, request: Request) -> None:
        node = request.node
        del self._active[node][request.index]
        request.stage = Stage.ARRIVED
        if not self.open[node]:
            self._tell_drained(node)
        elif self.up[node]:
            self._free[node] += 1
            self._free_sum += 1

    def _serve(self) -> None:
        while self._free_sum and self._waiting:
            request, attempt = self._waiting.popleft()
            if request.stage == Stage.DECODE_QUEUE and request.attempt == attempt:
                self._waiting_count -= 1
                self._begin(request)

    def _end(self, run: tuple[Request, int]) -> None:
        request, attempt = run
        if request.stage != Stage.DECODE or request.attempt != attempt:
            return
        self.busy_s += self._queue.now_s - request.stage_since_s
        self._leave(request)
        self._finished(request)
        self._serve()
