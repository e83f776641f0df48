"""One run: a trace through two clusters and the link between them, under one policy.

    arrival -> router -> [request over the link] -> prefill queue -> prefill -> decode slot -> done
                                                      remote: cache over the link meanwhile

A first token is out one decode step after the whole cache and a slot are there. Inside a cluster
the cache moves for nothing (RDMA, hidden behind prefill); between them it moves as links.py says.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvwire.errors import UsageError
from kvwire.prfaas.simulator.caches import ClusterCache
from kvwire.prfaas.simulator.copies import PrefixCopies
from kvwire.prfaas.simulator.events import EventQueue
from kvwire.prfaas.simulator.links import FluidLink, Transfer, pieces_of
from kvwire.prfaas.simulator.nodes import DecodeNodes, PrefillNodes, Request, Stage
from kvwire.prfaas.simulator.policies import Choice, Policy
from kvwire.prfaas.simulator.traces import Trace
from kvwire.prfaas.throughput import Deployment, Link

__all__ = ["Mark", "Records", "Simulation"]

ATTEMPTS_MAX = 4
_SENT = (Stage.DISPATCH, Stage.PREFILL_QUEUE, Stage.PREFILL, Stage.TRANSFER)


@dataclass
class Records:
    """What happened to each request, in the order of the trace.

    Attributes:
        first_token_s, done_s: times; NaN: it never came to that.
        remote: 1 when the first token came from a remote prefill.
        cached_tokens: found in the pool of the cluster that did the prefill.
        attempts: of the way from the router on.
        failed: why, by request.
    """

    arrival_s: Sequence[float]
    first_token_s: array
    done_s: array
    remote: array
    cached_tokens: array
    attempts: array
    failed: dict[int, str]


class Mark(NamedTuple):
    """What was done by a moment: bytes across the link, node seconds, slot seconds."""

    time_s: float
    delivered_bytes: float
    remote_s: float
    local_s: float
    decode_s: float


class Simulation:
    """The clusters, the link and the requests on their way.

    Args:
        trace: the requests.
        deployment: nodes, profiles, link; `deployment.lengths` is not looked at.
        prefill_nodes: of the local nodes; the others decode.
        policy: who routes; see policies.py.
        remote_cache, local_cache: prefix pools, or None for none. Both or neither.
        deadline_s: a request without a first token this long after its arrival fails.
        detect_s: how long a dead cluster or a silent link goes unnoticed.
        conversion_s: how long a drained local node takes to change its role; None: none does.
        lane_count, lane_gbps_max: of one transfer, see `FluidLink`.
        network_gbps: of all copies of prefixes within a cluster.
        warm_up_share: of the requests; the others' arrivals are the window of `marks`.

    Attributes:
        remote, local: `PrefillNodes`, None where there are none.
        copies: of prefixes between pools.
        remote_up, link_up: what the router knows; late by `detect_s`.
        marks: what was done by the window's first arrival, and by its last.
        prefill_nodes: local ones now; a node that changes its role counts as what it was.
        conversions: (when it began, when it was done, 1 for decode to prefill or -1) of each.
    """

    def __init__(self, trace: Trace, deployment: Deployment, prefill_nodes: int, policy: Policy,
                 *, remote_cache: ClusterCache | None = None,
                 local_cache: ClusterCache | None = None, deadline_s: float = math.inf,
                 detect_s: float = 2.0, warm_up_share: float = 0.2,
                 conversion_s: float | None = None, lane_count: int = 8,
                 lane_gbps_max: float = math.inf, network_gbps: float = 100.0):
        self.trace = trace
        self.deployment = deployment
        self.policy = policy
        self.deadline_s = deadline_s
        self.detect_s = detect_s
        self.queue = EventQueue()
        self.remote_cache, self.local_cache = remote_cache, local_cache
        self.remote_up = self.link_up = True
        local = deployment.local
        self.profile = local.profile
        self.conversion_s, self.converting = conversion_s, False
        self.conversions: list[tuple[float, float, int]] = []
        self.prefill_nodes = prefill_nodes
        decode_nodes = local.nodes - prefill_nodes
        # Where roles change, a node has its number in both, and is closed in one.
        changing = conversion_s is not None
        self.local = None
        if prefill_nodes or changing:
            self.local = self._prefill("pd", local.nodes if changing else prefill_nodes,
                                       prefill_nodes)
        self.remote = self.link = self.back_link = None
        if deployment.prfaas is not None:
            self.remote = self._prefill("prfaas", deployment.prfaas.nodes,
                                        deployment.prfaas.nodes)
            lanes = lane_count, lane_gbps_max
            self.link = FluidLink(self.queue, deployment.link, *lanes)
            self.back_link = FluidLink(self.queue, deployment.link, *lanes)
        self.network_gbps = network_gbps
        self.copies = PrefixCopies(
            self.profile, {True: remote_cache, False: local_cache},
            {(True, False): self.link, (False, True): self.back_link,
             (True, True): FluidLink(self.queue, Link(network_gbps)),
             (False, False): FluidLink(self.queue, Link(network_gbps))})
        self.decode = DecodeNodes(self.queue, local.nodes if changing else decode_nodes,
                                  local.batch_max, local.decode_step_s, self._decode_started,
                                  self._decode_ended, decode_nodes)
        self.live: dict[int, Request] = {}
        self.parked: list[Request] = []  # no place to go; tried again when something comes back
        self.records = _records(trace)
        self._expiries: deque[tuple[float, Request]] = deque()
        self._next_index = 0
        self._progress: Callable[[int], None] | None = None
        if not 0 <= warm_up_share < 1 or len(trace) < 2:
            raise UsageError(f"a trace of {len(trace)} requests with a warm-up of "
                             f"{warm_up_share:g} leaves nothing to look at")
        self.window_begin = int(warm_up_share * (len(trace) - 1))
        self.marks: list[Mark] = []

    def _prefill(self, name: str, count: int, open_count: int) -> PrefillNodes:
        return PrefillNodes(self.queue, name, count, self._service_s, self._prefill_ended,
                            open_count)

    def run(self, progress: Callable[[int], None] | None = None) -> Records:
        """Serve the whole trace; `progress` is told now and then how many requests came."""
        self._progress = progress
        self._arrivals = self.trace.arrival_s.tolist()
        self._tokens = self.trace.input_tokens.tolist()
        self._outputs = self.trace.output_tokens.tolist()
        self.policy.attach(self)
        self.queue.at(self._arrivals[0], self._arrive)
        if self.policy.interval_s:
            self.queue.at(self._arrivals[0] + self.policy.interval_s, self._tick)
        self.queue.run()
        return self.records

    @property
    def busy(self) -> bool:
        """Requests are on their way or still to come."""
        return bool(self.live) or self._next_index < len(self.trace)

    # ---- a request's way

    def _arrive(self, _: object) -> None:
        index = self._next_index
        self._next_index += 1
        if self._next_index < len(self._arrivals):
            self.queue.at(self._arrivals[self._next_index], self._arrive)
        if index == self.window_begin or index == len(self._arrivals) - 1:
            self.marks.append(self._mark())
        if self._progress is not None and index % 1000 == 0:
            self._progress(index)
        hashes = self.trace.keys(index) if self.local_cache is not None else ()
        request = Request(index, self.queue.now_s, self._tokens[index], self._outputs[index],
                          hashes)
        self.live[index] = request
        self.expect(request)
        self.route(request)

    def route(self, request: Request) -> None:
        """Send the request to a cluster, or park it while there is none for it."""
        if request.attempt == ATTEMPTS_MAX:
            self.fail(request, "attempts")
            return
        choice = request.choice = self.policy.choose(request)
        if choice is None:
            self.parked.append(request)
            return
        request.attempt += 1
        if choice.fetch_tokens:
            self._fetch(request, choice)
        elif not choice.remote:
            self.local.submit(request, choice.node)
        elif self.link.one_way_s:
            request.stage = Stage.DISPATCH
            self.queue.at(self.queue.now_s + self.link.one_way_s, self._dispatched,
                          (request, request.attempt))
        else:
            self.remote.submit(request, choice.node)

    def _dispatched(self, way: tuple[Request, int]) -> None:
        request, attempt = way
        if request.stage == Stage.DISPATCH and request.attempt == attempt:
            self.remote.submit(request, request.choice.node)

    def _fetch(self, request: Request, choice: Choice) -> None:
        """Bring the prefix that only the other cluster has, before the prefill is queued."""
        link = self.back_link if choice.remote else self.link
        source, target = self._caches(choice.remote)
        request.stage = Stage.DISPATCH
        hashes = request.hashes[:-(-choice.fetch_tokens // self.trace.block_tokens)]
        request.hold(source.hold(hashes, choice.fetch_node))
        room = target.hold(hashes, choice.node)
        request.hold(room)
        request.transfer = Transfer(link, request, self._fetched)
        held = min(choice.fetch_tokens, room.kv_tokens)
        link.send(request.transfer, choice.wire_bytes(self.profile, choice.fetch_tokens, held),
                  last=True)

    def _fetched(self, request: Request) -> None:
        choice = request.choice
        request.commit()
        self._drop(request)
        (self.remote if choice.remote else self.local).submit(request, choice.node)

    def _caches(self, remote: bool) -> tuple[ClusterCache, ClusterCache]:
        """Return the other cluster's cache, and that of the one that is to prefill."""
        caches = self.local_cache, self.remote_cache
        return caches if remote else caches[::-1]

    def _service_s(self, request: Request) -> float:
        """A prefill begins: find its prefix, begin its transfer; return how long it takes."""
        remote = request.cluster is self.remote
        cache = self.remote_cache if remote else self.local_cache
        cached = held = 0
        if cache is not None:
            tail = request.tokens % self.trace.block_tokens if remote else 0
            hold = cache.hold(request.hashes, request.node, tail)
            request.hold(hold)
            cached = min(hold.usable_tokens, request.tokens - 1)
            if remote:
                home = self.local_cache.home(request.hashes)
                room = self.local_cache.hold(request.hashes, home)
                request.hold(room, later=True)
                held = min(room.kv_tokens, request.tokens)
            self.records.cached_tokens[request.index] = cached
        request.cached_tokens, request.held_tokens = cached, held
        profile = self.deployment.prfaas.profile if remote else self.profile
        service_s = profile.prefill_s(request.tokens - cached, cached)
        if remote:
            self._begin_transfer(request, service_s)
        return service_s

    def _begin_transfer(self, request: Request, service_s: float) -> None:
        """KV leaves as prefill makes it, what a cached prefix has of it at once."""
        request.transfer = Transfer(self.link, request, self._arrived)
        ready = max(0, request.cached_tokens - request.held_tokens)
        if ready:
            self._send_kv(request, ready)
        now_s = self.queue.now_s
        pieces = pieces_of(now_s, now_s + service_s)[:-1]
        fresh = request.tokens - max(request.cached_tokens, request.held_tokens)
        if fresh > 0:
            self.queue.at(pieces[0][0], self._piece,
                          (request, request.transfer, fresh, pieces, 0))

    def _piece(self, piece: tuple) -> None:
        request, transfer, fresh, pieces, number = piece
        if transfer.cancelled:
            return
        self._send_kv(request, fresh * pieces[number][1])
        number += 1
        if number < len(pieces):
            self.queue.at(pieces[number][0], self._piece,
                          (request, transfer, fresh, pieces, number))

    def _send_kv(self, request: Request, tokens: float) -> None:
        count = self.profile.kv_bytes_per_token * tokens / request.choice.codec.kv_ratio
        self.link.send(request.transfer, count)

    def _prefill_ended(self, request: Request) -> None:
        request.stage, request.stage_since_s = Stage.TRANSFER, self.queue.now_s
        request.commit()
        if request.cluster is self.local:
            request.release()
            self.decode.submit(request)
            return
        delay_s = request.choice.coding_s(self.profile.state_bytes)
        if delay_s:
            self.queue.at(self.queue.now_s + delay_s, self._send_rest, request.transfer)
        else:
            self._send_rest(request.transfer)

    def _send_rest(self, transfer: Transfer) -> None:
        """The last layers' KV, and the states, which were final only now."""
        if transfer.cancelled:
            return
        request = transfer.owner
        choice = request.choice
        whole = choice.wire_bytes(self.profile, request.tokens,
                                  min(request.held_tokens, request.tokens))
        self.link.send(transfer, max(0.0, whole - transfer.sent_bytes), last=True)

    def _arrived(self, request: Request) -> None:
        """The whole cache is in the local cluster."""
        self.policy.arrived(request, True)
        request.commit(arrived=True)
        self._drop(request)
        self.decode.submit(request)

    def _decode_started(self, request: Request) -> None:
        if request.first_token_s < 0:
            now_s = request.first_token_s = self.queue.now_s + self.decode.token_s
            records, index = self.records, request.index
            records.first_token_s[index] = now_s
            records.remote[index] = request.choice.remote
        request.waits_since_s = math.inf

    def _decode_ended(self, request: Request) -> None:
        request.stage = Stage.DONE
        self.records.done_s[request.index] = self.queue.now_s
        self._forget(request)

    # ---- roles

    def convert(self, step: int) -> bool:
        """Begin to change the role of one local node: it drains, then takes `conversion_s`.

        Args:
            step: 1 for decode to prefill, -1 for prefill to decode.

        Returns: False, and nothing happens, when roles are fixed, a node is changing already, or
            nobody would be left for its role.
        """
        source, target = (self.decode, self.local) if step > 0 else (self.local, self.decode)
        least = 0 if step < 0 and self.remote is not None else 1
        if self.conversion_s is None or self.converting or sum(source.open) <= least:
            return False
        node = source.emptiest() if step > 0 else source.shortest()
        self.converting, begun_s = True, self.queue.now_s

        def drained() -> None:
            self.queue.at(self.queue.now_s + self.conversion_s, converted)

        def converted(_: object) -> None:
            self.converting = False
            self.prefill_nodes += step
            self.conversions.append((begun_s, self.queue.now_s, step))
            target.reopen(node)
            self.route_parked()

        source.close(node, drained)
        return True

    def _mark(self) -> Mark:
        delivered_bytes = 0.0
        if self.link is not None:
            self.link.advance()
            delivered_bytes = self.link.delivered_bytes
        return Mark(self.queue.now_s, delivered_bytes,
                    *(nodes.worked_s() if nodes is not None else 0.0
                      for nodes in (self.remote, self.local, self.decode)))

    # ---- what does not go to plan

    def take_back(self, request: Request) -> None:
        """Undo whatever the request holds anywhere; it may then be routed again or failed."""
        if request.stage in _SENT and request.choice.remote:
            self.policy.arrived(request, False)
        if request.stage in (Stage.PREFILL_QUEUE, Stage.PREFILL):
            request.cluster.withdraw(request)
        elif request.stage in (Stage.DECODE_QUEUE, Stage.DECODE):
            self.decode.withdraw(request)
        elif request.stage == Stage.ARRIVED and request in self.parked:
            self.parked.remove(request)
        self._drop(request)
        request.stage = Stage.ARRIVED

    def fail(self, request: Request, why: str) -> None:
        """End a request that holds nothing any more."""
        request.stage = Stage.FAILED
        self.records.failed[request.index] = why
        self._forget(request)

    def route_parked(self) -> None:
        """Try again those that had no place to go."""
        parked, self.parked = self.parked, []
        for request in parked:
            self.route(request)

    def expect(self, request: Request) -> None:
        """Let the request's deadline run from now."""
        request.waits_since_s = self.queue.now_s
        if self.deadline_s == math.inf:
            return
        if not self._expiries:
            self.queue.at(self.queue.now_s + self.deadline_s, self._expire)
        self._expiries.append((self.queue.now_s, request))

    def _expire(self, _: object) -> None:
        """All deadlines are of one length, so the first to be set is the first to pass."""
        expiries = self._expiries
        while expiries and expiries[0][0] + self.deadline_s <= self.queue.now_s:
            since_s, request = expiries.popleft()
            if request.waits_since_s == since_s and request.index in self.live:
                self.take_back(request)
                self.fail(request, "deadline")
        while expiries and expiries[0][1].waits_since_s != expiries[0][0]:
            expiries.popleft()
        if expiries:
            self.queue.at(expiries[0][0] + self.deadline_s, self._expire)

    def _drop(self, request: Request) -> None:
        if request.transfer is not None:
            request.transfer.link.cancel(request.transfer)
            request.transfer = None
        request.release()

    def _forget(self, request: Request) -> None:
        self.records.attempts[request.index] = request.attempt
        del self.live[request.index]

    def _tick(self, _: object) -> None:
        self.policy.tick()
        if self.busy:
            self.queue.at(self.queue.now_s + self.policy.interval_s, self._tick)

    def leaks(self) -> list[str]:
        """Return in words what is still held after a run; nothing may be."""
        held = {"requests": len(self.live), "parked requests": len(self.parked),
                "decode slots": self.decode.active_count,
                "requests that wait for a slot": self.decode.waiting_count,
                "copies of prefixes": len(self.copies)}
        for nodes in (self.local, self.remote):
            if nodes is not None:
                held[f"{nodes.name} queue"] = nodes.queued_count
                held[f"{nodes.name} nodes"] = nodes.running_count()
        for name, link in (("link", self.link), ("link back", self.back_link)):
            if link is not None:
                held[f"transfers on the {name}"] = link.active_count
        for name, cache in (("local", self.local_cache), ("remote", self.remote_cache)):
            if cache is not None:
                held[f"holds in the {name} pool"] = cache.hold_count
        return [f"{count} {name}" for name, count in held.items() if count]


def _records(trace: Trace) -> Records:
    count = len(trace)
    never = array("d", [math.nan]) * count
    return Records(trace.arrival_s, never, never[:], array("b", bytes(count)),
                   array("q", bytes(8 * count)), array("b", bytes(count)), {})
