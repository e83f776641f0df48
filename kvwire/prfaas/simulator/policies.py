"""Who prefills a request: the four policies that are compared.

| name | routing | wire | pool |
|---|---|---|---|
| homogeneous | all local | - | LRU, states at a prompt's end |
| naive | all remote | raw | the same |
| published | length threshold, two regimes, moved in fixed steps | raw | the same |
| kvwire | priced rule, queues, `Controller`, `Planner` | coded | cost-aware, states at branches |

"Published" is arXiv 2604.15039 with what it leaves open filled in the plainest way: its threshold
is solved for the deployment in front of it (bandwidth and post-hit lengths included), and moves by
a twentieth a period while the link is near full or the queues differ by seconds. How large a step
and how many seconds was chosen in the published policy's favour, by its bearable rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvwire.prfaas.codecs import EXACT_OPTIONS, RAW, TIERED, CodecOption
from kvwire.prfaas.controller import Controller, ControllerSettings, LinkSignals, QueueSignals
from kvwire.prfaas.conversion import (
    ConversionSettings, LengthWindow, Planner, Revision, StageSignals,
)
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.rebalance import Rebalancer
from kvwire.prfaas.router import RouteDecision, Router, RouteRequest, Rule, Target
from kvwire.prfaas.simulator.caches import ClusterIndex
from kvwire.prfaas.simulator.copies import Place
from kvwire.prfaas.simulator.nodes import PrefillNodes, Request
from kvwire.prfaas.throughput import Deployment, Plan, Wire
from kvwire.prfaas.view import NodeView

if TYPE_CHECKING:
    from kvwire.prfaas.simulator.simulation import Simulation

__all__ = ["Choice", "Kvwire", "OneSided", "Policy", "Published"]

NEAR_FULL = 0.9
STEP = 1.05
SURGE_S = 5.0
# A prompt long enough to be offloaded waits rather for the link than for a slower local node.
SETTINGS = ControllerSettings(backlog_max_s=10.0)
SOONER_S = 1.0


class Choice(NamedTuple):
    """Where one request goes.

    Attributes:
        node: of that cluster; None: the first that is free.
        codec: of its transfer.
        fetch_tokens: a prefix of this length is brought from the other cluster first; fetch_node:
            from this node of it.
        prefill_s: expected.
        decision: the router's, for who steers by it.
    """

    remote: bool
    node: int | None = None
    codec: CodecOption = RAW
    fetch_tokens: int = 0
    fetch_node: int = 0
    prefill_s: float = 0.0
    decision: RouteDecision | None = None

    def wire_bytes(self, profile: ModelProfile, tokens: int, held_tokens: int) -> float:
        """Return what travels of a cache whose first tokens' KV is there already."""
        return profile.wire_bytes(tokens, held_tokens, self.codec.kv_ratio,
                                  self.codec.state_ratio)

    def coding_s(self, state_bytes: float) -> float:
        """Return how long states are coded after prefill; KV is coded beside it."""
        return state_bytes * GBPS / self.codec.gbps


class Policy(Protocol):
    """Routes the requests of one simulation.

    Attributes:
        interval_s: between calls of `tick`; 0: never.
    """

    name: str
    interval_s: float

    def attach(self, simulation: Simulation) -> None:
        """Learn of the world; called once, before the first request."""

    def choose(self, request: Request) -> Choice | None:
        """Return where it goes; None: nowhere now."""

    def arrived(self, request: Request, ok: bool) -> None:
        """A remote request's cache is across, or it was taken back before."""

    def tick(self) -> None:
        """A period has passed."""


class OneSided:
    """All requests go to one cluster: "homogeneous" when local, "naive" when remote."""

    interval_s = 0.0

    def __init__(self, *, remote: bool):
        self.name = "naive" if remote else "homogeneous"
        self._choice = Choice(remote)

    def attach(self, simulation: Simulation) -> None:
        """See `Policy`."""
        self._simulation = simulation

    def choose(self, request: Request) -> Choice | None:
        """See `Policy`."""
        simulation = self._simulation
        there = simulation.remote_up and simulation.link_up
        return self._choice if there or not self._choice.remote else None

    def arrived(self, request: Request, ok: bool) -> None:
        """See `Policy`."""

    def tick(self) -> None:
        """See `Policy`."""


class _Node:
    """A `NodeView` whose queue is updated in place, once per request."""

    __slots__ = ("name", "queue_s")

    def __init__(self, name: str):
        self.name = name
        self.queue_s = 0.0


class _View:
    """A `ClusterView` that is kept."""

    __slots__ = ("remote", "local", "threshold_tokens", "abundant", "remote_up", "link_gbps",
                 "backlog_s", "admit_bytes", "promised_s")


class _Routed:
    """What the two policies with a router share."""

    def __init__(self, name: str, rule: Rule, options: Sequence[CodecOption],
                 sooner_s: float = math.inf):
        self.name = name
        self._sooner_s = sooner_s
        self._rule = rule
        self._options = {option.name: option for option in options}
        self._least = max(options, key=lambda option: option.kv_ratio)  # bytes; for fetches

    def attach(self, simulation: Simulation) -> None:
        """See `Policy`."""
        self._simulation = simulation
        self._remote, self._local = clusters = [
            None if nodes is None else (nodes, self._nodes(nodes))
            for nodes in (simulation.remote, simulation.local)]
        views_of = {nodes.name: views for nodes, views in filter(None, clusters)}
        self._places = {view.name: Place(remote, number)
                        for remote, cluster in ((True, self._remote), (False, self._local))
                        if cluster is not None for number, view in enumerate(cluster[1])}
        caches = {"prfaas": simulation.remote_cache, "pd": simulation.local_cache}
        self._index = ClusterIndex(
            {name: [view.name for view in views] for name, views in views_of.items()},
            {name: cache for name, cache in caches.items()
             if cache is not None and name in views_of})
        self._router = Router(self._index, simulation.trace.block_tokens,
                              simulation.deployment.prfaas.profile,
                              simulation.deployment.local.profile, rule=self._rule,
                              options=tuple(self._options.values()), sooner_s=self._sooner_s)
        self._ticked_s, self._delivered_bytes = simulation.queue.now_s, 0.0

    @staticmethod
    def _nodes(nodes: PrefillNodes) -> list[NodeView]:
        return [_Node(f"{nodes.name}-{number}") for number in range(nodes.node_count)]

    def choose(self, request: Request) -> Choice | None:
        """See `Policy`."""
        simulation = self._simulation
        remote, local = _up(self._remote), _up(self._local)
        view = self._view(remote, local)
        if not local and not (remote and view.remote_up):
            return None
        asked = RouteRequest(request.tokens, request.hashes)
        decision = self._router.route(asked, view)
        self._noted(asked, decision)
        is_remote = decision.target is Target.REMOTE
        codec = self._options[decision.codec] if is_remote else self._least
        fetch_tokens = decision.cached_tokens if decision.fetch_tokens else 0
        fetch_node = self._places[decision.fetch_from].node if fetch_tokens else 0
        return Choice(is_remote, self._places[decision.node].node, codec, fetch_tokens,
                      fetch_node, decision.prefill_s, decision)

    def _goodput_gbps(self) -> tuple[float, float]:
        """Return what the link carried since the last call, and how long ago that was."""
        link, now_s = self._simulation.link, self._simulation.queue.now_s
        link.advance()
        passed_s = now_s - self._ticked_s
        gbps = (link.delivered_bytes - self._delivered_bytes) * GBPS / passed_s
        self._ticked_s, self._delivered_bytes = now_s, link.delivered_bytes
        return gbps, passed_s

    def _queue_means_s(self) -> tuple[float, float]:
        """Return how long a new request would wait, in the mean over the nodes of each cluster."""
        means = []
        for cluster in (self._remote, self._local):
            waits = [node.queue_s for node in _up(cluster)]
            means.append(sum(waits) / len(waits) if waits else 0.0)
        return means[0], means[1]


def _up(cluster: tuple[PrefillNodes, list[_Node]] | None) -> list[_Node]:
    """Return the nodes that are known to be up, their queues as they are now."""
    if cluster is None:
        return []
    nodes, views = cluster
    if nodes.tell_queues(views):
        return views
    return [view for view in views if view.queue_s < math.inf]


class Published(_Routed):
    """PrfaaS as published.

    Args:
        plan: solved for raw transfers.
        stepping: move the threshold in steps; else it stays as planned.
    """

    def __init__(self, plan: Plan, *, stepping: bool = True, interval_s: float = 1.0):
        super().__init__("published" if stepping else "published, static", Rule.PUBLISHED, (RAW,))
        self.interval_s = interval_s if stepping else 0.0
        self._plan = plan
        view = self._kept = _View()
        view.threshold_tokens = plan.threshold_tokens
        view.abundant = plan.link_utilisation < NEAR_FULL
        view.backlog_s, view.admit_bytes, view.promised_s = 0.0, math.inf, 0.0
        self._scarce_ticks = 0

    def attach(self, simulation: Simulation) -> None:
        """See `Policy`."""
        super().attach(simulation)
        self._kept.link_gbps = simulation.deployment.link.goodput_gbps

    def _view(self, remote: list[_Node], local: list[_Node]) -> _View:
        view, simulation = self._kept, self._simulation
        view.remote, view.local = remote, local
        view.remote_up = simulation.remote_up and simulation.link_up
        return view

    def _noted(self, request: RouteRequest, decision: RouteDecision) -> None:
        pass

    def arrived(self, request: Request, ok: bool) -> None:
        """See `Policy`."""

    def tick(self) -> None:
        """See `Policy`."""
        gbps, _ = self._goodput_gbps()
        link, view = self._simulation.link, self._kept
        full = gbps >= NEAR_FULL * view.link_gbps
        backlog_s = link.queued_bytes * GBPS / view.link_gbps
        remote_s, local_s = self._queue_means_s()
        remote_s += backlog_s
        planned = max(self._plan.threshold_tokens, 1.0)
        if planned == math.inf:
            return
        threshold = max(view.threshold_tokens, 1.0)
        if remote_s > local_s + SURGE_S or (full and backlog_s > SURGE_S):
            threshold *= STEP
        elif local_s > remote_s + SURGE_S and not full:
            threshold /= STEP
        elif threshold > planned:
            threshold = max(planned, threshold / STEP)
        else:
            threshold = min(planned, threshold * STEP)
        view.threshold_tokens = min(max(threshold, planned / 8), planned * 8)


class Kvwire(_Routed):
    """kvwire's router, controller and planner, with lossless transfers.

    Args:
        deployment, plan: solved with the lossless ratios (`wire_of`).
        sooner_s: see `Router`.
        revise_s: how often the planner looks at the lengths that were seen.
        conversion: when it changes a node's role, if the simulation lets it.
        rebalance: copy hot prefixes between the pools of nodes.
    """

    def __init__(self, deployment: Deployment, plan: Plan, *, rule: Rule = Rule.PRICED,
                 options: Sequence[CodecOption] = EXACT_OPTIONS,
                 settings: ControllerSettings = SETTINGS, sooner_s: float = SOONER_S,
                 revise_s: float = 600.0, conversion: ConversionSettings = ConversionSettings(),
                 rebalance: bool = False):
        super().__init__("kvwire", rule, options, sooner_s)
        self.interval_s = settings.period_s
        self._controller = Controller(deployment, plan, settings)
        self._deployment, self._plan, self._conversion = deployment, plan, conversion
        self._revise_s = revise_s
        self._revised_s = 0.0
        self._worked = 0.0, 0.0
        self._converting: Revision | None = None
        self._rebalance, self._rebalancer = rebalance, None

    def attach(self, simulation: Simulation) -> None:
        """See `Policy`."""
        super().attach(simulation)
        fixed = None if simulation.conversion_s is not None else self._plan.prefill_nodes
        split = replace(self._deployment, local=replace(self._deployment.local,
                                                        prefill_nodes=fixed))
        self._planner = Planner(split, self._plan, self._conversion, window=LengthWindow(1024))
        if self._rebalance:
            deployment = simulation.deployment
            profiles = {Target.REMOTE: deployment.prfaas.profile,
                        Target.LOCAL: deployment.local.profile}
            self._rebalancer = Rebalancer(self._index, simulation.trace.block_tokens, profiles,
                                          simulation.network_gbps)

    @staticmethod
    def wire_of(deployment: Deployment, codec: CodecOption = TIERED) -> Deployment:
        """Return the deployment with the ratios of kvwire's lossless code."""
        return replace(deployment, wire=Wire(codec.kv_ratio, codec.state_ratio))

    def _view(self, remote: list[_Node], local: list[_Node]):
        simulation = self._simulation
        view = self._controller.view(simulation.queue.now_s, remote, local)
        gone = not (simulation.remote_up and simulation.link_up)  # known before the next tick
        return view._replace(remote_up=False) if gone else view

    def _noted(self, request: RouteRequest, decision: RouteDecision) -> None:
        simulation, now_s = self._simulation, self._simulation.queue.now_s
        self._controller.note(now_s, decision)
        self._planner.note(decision.uncached_tokens, decision.tokens - decision.uncached_tokens)
        if self._rebalancer is not None:
            copy = self._rebalancer.note(now_s, request, decision)
            if copy is not None:
                simulation.copies.start(copy.block_hashes, self._places[copy.source],
                                        self._places[copy.target],
                                        lambda: self._rebalancer.done(copy))

    def arrived(self, request: Request, ok: bool) -> None:
        """See `Policy`."""
        self._controller.done(self._simulation.queue.now_s, request.choice.decision, ok)

    def tick(self) -> None:
        """See `Policy`."""
        simulation = self._simulation
        gbps, _ = self._goodput_gbps()
        up = simulation.remote_up and simulation.link_up
        self._controller.observe(
            simulation.queue.now_s,
            LinkSignals(gbps, simulation.link.queued_bytes, up=up),
            QueueSignals(*self._queue_means_s()))
        if self._converting is not None and not simulation.converting:
            self._controller.replan(self._converting.deployment, self._converting.plan)
            self._converting = None
        if simulation.queue.now_s - self._revised_s >= self._revise_s:
            self._revise()

    def _revise(self) -> None:
        simulation, now_s = self._simulation, self._simulation.queue.now_s
        if self._converting is not None:
            return
        revision = self._planner.revise(now_s, self._stages(now_s - self._revised_s))
        self._revised_s = now_s
        if revision is not None and revision.convert and simulation.convert(revision.convert):
            self._converting = revision  # its threshold holds once the node is there
        elif revision is not None:
            self._controller.replan(revision.deployment, revision.plan)

    def _stages(self, passed_s: float) -> StageSignals:
        """Return how busy the local stages were since the last look."""
        simulation = self._simulation
        if simulation.conversion_s is None:
            return StageSignals(0.0, 0.0)
        before, decode = self._worked, simulation.decode
        self._worked = simulation.local.worked_s(), decode.worked_s()
        prefill_s, decode_s = (now - was for now, was in zip(self._worked, before))
        nodes = max(1, simulation.prefill_nodes)
        slots = decode.slots * max(1, self._deployment.local.nodes - simulation.prefill_nodes)
        return StageSignals(prefill_s / passed_s / nodes, decode_s / passed_s / slots)
