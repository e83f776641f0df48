"""The short-term scheduler: moves the threshold with the link and the queues, and admits transfers.

The law, its stability argument and its limits are section "Controller" of README.md here. In short,
with y = -ln(share of all cache bytes that is offloaded), a coordinate in which the link's load
answers linearly to what is done, whatever the distribution of lengths:

    y = y(plan) + balance + z            threshold = the length at which the share is exp(-y)
    balance = b (queue there - queue here)        proportional, bounded
    z <- max(0, z + g ln(load / goal))            integral, only ever away from the link
    goal = utilisation_max (1 - excess / drain) caution      excess: backlog over one request

Beneath it two things act at once, not in steps: a transfer that would make the link's backlog
longer than backlog_max_s is not admitted, and a remote side that is gone is not used (`health`).
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvwire.errors import UsageError
from kvwire.prfaas.health import Breaker, BreakerSettings, Health
from kvwire.prfaas.profiles import GBPS
from kvwire.prfaas.router import RouteDecision, Target
from kvwire.prfaas.throughput import Deployment, Plan
from kvwire.prfaas.view import ClusterView, NodeView

if TYPE_CHECKING:
    from kvwire.link import LinkStats

__all__ = ["Controller", "ControllerSettings", "ControllerState", "LinkSignals", "QueueSignals",
           "critical_gain", "loop_radius"]

LEAST_LEFT = 1e-3  # a smaller share of all bytes is too little to steer by


class LinkSignals(NamedTuple):
    """What the link says, for one period; `of_stats` takes it from `link.stats()`.

    Attributes:
        goodput_gbps: payload on the wire.
        backlog_bytes: ready to be sent, or sent, and not verified.
        congested: the kernel saw losses or a growing round trip.
        up: there is a lane.
    """

    goodput_gbps: float
    backlog_bytes: float = 0.0
    congested: bool = False
    up: bool = True

    @classmethod
    def of_stats(cls, links: Sequence[LinkStats], signs: Collection[str] = ()) -> LinkSignals:
        """Take the `link.stats()` of all senders on one line, and what
        `CongestionThresholds.signs` found in any of them."""
        goodput_gbps = sum(stats.goodput_gbps for stats in links)
        effective_gbps = sum(stats.effective_gbps for stats in links)
        coded = goodput_gbps / effective_gbps if effective_gbps > 0 else 1.0
        backlog_bytes = min(coded, 1.0) * sum(stats.backlog_bytes for stats in links)
        return cls(goodput_gbps, backlog_bytes, bool({"loss", "rtt"} & set(signs)),
                   any(stats.lanes for stats in links))


class QueueSignals(NamedTuple):
    """Seconds that a new request would wait for a prefill node: the mean over a cluster's nodes."""

    remote_s: float = 0.0
    local_s: float = 0.0


@dataclass(frozen=True)
class ControllerSettings:
    """How the short-term scheduler reacts; the gains follow from these (README.md).

    Attributes:
        period_s: between calls of `Controller.observe`.
        smoothing: of the offered load, per period: weight of the newest, above 0 to 1.
        delay_periods: how late queues show what was decided, at most; bounds the balance gain.
        utilisation_max: of the link, that the loop aims for.
        drain_s: so many seconds of backlog beyond one request lower the goal to its least.
        backlog_max_s: transfers are not admitted beyond it.
        dead_band: relative deviation of load from goal that is left alone.
        balance_max: bound of the balance term, in units of y.
        least_share: of the plan's threshold, below which it never goes.
        stall_s: a backlog without any goodput for so long means that the link is gone.
        scarce_above, abundant_below: utilisation at which the regime changes.
        calm_s: how long it must be below before bandwidth counts as abundant.
        return_share: of the plan's offloaded bytes, that a returned link starts with.
    """

    period_s: float = 1.0
    smoothing: float = 0.1
    delay_periods: int = 3
    utilisation_max: float = 0.9
    drain_s: float = 10.0
    backlog_max_s: float = 5.0
    dead_band: float = 0.05
    balance_max: float = 1.0
    least_share: float = 0.25
    stall_s: float = 3.0
    scarce_above: float = 0.8
    abundant_below: float = 0.5
    calm_s: float = 10.0
    return_share: float = 0.25
    breaker: BreakerSettings = field(default_factory=BreakerSettings)

    def __post_init__(self):
        for name in ("smoothing", "utilisation_max", "least_share", "return_share"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise UsageError(f"{name} is {value:g}; it must be above 0, at most 1")
        for name in ("period_s", "drain_s", "backlog_max_s", "stall_s"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} is {value:g}; it must be above 0")
        if not 0 < self.abundant_below < self.scarce_above:
            raise UsageError("abundant_below must be above 0 and below scarce_above, or the "
                             "regime would flap")

    @property
    def load_gain(self) -> float:
        """g: the largest gain at which the loop through the smoothed load does not swing."""
        return self.smoothing / 4


class ControllerState(NamedTuple):
    """What the controller does now, and from what; for people and for tests.

    `load` is the offered bytes a second over capacity_gbps, `goal` what it should be.
    """

    threshold_tokens: float
    health: Health
    abundant: bool
    load: float
    goal: float
    capacity_gbps: float
    backlog_s: float
    balance: float
    retreat: float


class Controller:
    """Short-term scheduler of one link. Any number of threads may call it.

    A gateway calls `view` for each request, `note` with each decision, `done` when an offloaded
    one has its cache or failed, and `observe` once a period.

    Args:
        deployment, plan: the plan to depart from; the deployment must have a link.
        settings: see there.

    Times are seconds of any clock that never goes back, given by the caller.
    """

    def __init__(self, deployment: Deployment, plan: Plan,
                 settings: ControllerSettings = ControllerSettings()):
        if deployment.link is None:
            raise UsageError(f"deployment {deployment.name!r} has no link to control")
        self._settings = settings
        self._lock = threading.Lock()
        self._breaker = Breaker(settings.breaker)
        self._capacity_gbps = deployment.link.goodput_gbps
        self._load_gbps = self._offered_bytes = self._outstanding_bytes = 0.0
        self._retreat = self._balance = 0.0
        self._backlog_gbit = self._backlog_s = self._stalled_s = 0.0
        self._recent_count = self._recent_bytes = self._recent_byte_s = self._excess_s = 0.0
        self._caution = 1.0
        self._abundant, self._calm_since_s = True, -math.inf
        self._observed_s: float | None = None
        self._goal = settings.utilisation_max
        self._adopt(deployment, plan)

    # ---- what the gateway tells and asks

    def view(self, now_s: float, remote: Sequence[NodeView],
             local: Sequence[NodeView]) -> ClusterView:
        """Return what the router needs for a request that arrives now."""
        with self._lock:
            return ClusterView(
                tuple(remote), tuple(local), self._threshold_tokens, self._abundant,
                self._breaker.permits(now_s), self._capacity_gbps, self._backlog_s,
                self._admit_bytes(), self._outstanding_bytes * GBPS / self._capacity_gbps)

    def note(self, now_s: float, decision: RouteDecision) -> None:
        """A request was routed. What it wanted from the link counts, admitted or not."""
        with self._lock:
            self._offered_bytes += decision.wire_bytes
            if decision.target is not Target.REMOTE:
                return
            self._outstanding_bytes += decision.wire_bytes
            self._breaker.sent(now_s)
            ahead_s = decision.queue_s + decision.prefill_s
            self._recent_count = 0.95 * self._recent_count + 1
            self._recent_bytes = 0.95 * self._recent_bytes + decision.wire_bytes
            self._recent_byte_s = 0.95 * self._recent_byte_s + decision.wire_bytes * ahead_s

    def done(self, now_s: float, decision: RouteDecision, ok: bool = True) -> None:
        """An offloaded request has its cache here, or failed and was taken back."""
        if decision.target is not Target.REMOTE:
            return
        with self._lock:
            self._outstanding_bytes = max(0.0, self._outstanding_bytes - decision.wire_bytes)
            (self._breaker.succeeded if ok else self._breaker.failed)(now_s)

    def observe(self, now_s: float, link: LinkSignals, queues: QueueSignals) -> ControllerState:
        """Take one period's signals and move the threshold."""
        with self._lock:
            elapsed_s = self._elapsed(now_s)
            was = self._breaker.health(now_s)
            self._watch(now_s, elapsed_s, link)
            health = self._breaker.health(now_s)
            self._measure(elapsed_s, link)
            if health is Health.DOWN:
                self._retreat = max(self._retreat, self._returning)
            elif was is health:
                self._retreat = self._retreated(link)
            self._balance = self._balanced(queues)
            self._set_regime(now_s)
            self._threshold_tokens = self._threshold()
            return self._state(health)

    def replan(self, deployment: Deployment, plan: Plan) -> None:
        """Depart from another plan from now on; what was learned of the link stays."""
        with self._lock:
            self._adopt(deployment, plan)

    # ---- the plan, in units of y

    def _adopt(self, deployment: Deployment, plan: Plan) -> None:
        if deployment.link is None or deployment.prfaas is None:
            raise UsageError(f"deployment {deployment.name!r} has no link to control")
        self._nominal_gbps = deployment.link.goodput_gbps
        profile = deployment.prfaas.profile
        lengths, _ = deployment.lengths.grid(1024)
        sizes = profile.wire_bytes(lengths, 0, deployment.wire.kv_ratio,
                                   deployment.wire.state_ratio)
        left = np.concatenate((np.cumsum(sizes[::-1])[::-1][1:], [0.0])) / np.sum(sizes)
        kept = left > LEAST_LEFT
        self._tokens = [0.0, *lengths[kept].tolist(), float(lengths[-1])]
        self._retreats = [0.0, *(-np.log(left[kept])).tolist(), -math.log(LEAST_LEFT)]
        planned = min(plan.threshold_tokens, self._tokens[-1])
        self._planned = float(np.interp(planned, self._tokens, self._retreats))
        self._least_tokens = self._settings.least_share * planned
        self._returning = -math.log(self._settings.return_share)
        self._remote_prefill_s = plan.remote_prefill_s
        self._balance_gain = _balance_gain(deployment, plan, self._settings)
        self._threshold_tokens = self._threshold()

    def _threshold(self) -> float:
        wanted = self._planned + self._balance + self._retreat
        return max(_interpolated(wanted, self._retreats, self._tokens), self._least_tokens)

    # ---- one period

    def _elapsed(self, now_s: float) -> float:
        last, self._observed_s = self._observed_s, now_s
        if last is None:
            return self._settings.period_s
        if now_s <= last:
            raise UsageError(f"observed at {now_s:g} s after {last:g} s; time must rise")
        return now_s - last

    def _watch(self, now_s: float, elapsed_s: float, link: LinkSignals) -> None:
        """Tell the breaker when the link is certainly gone, and when it no longer is."""
        stuck = link.backlog_bytes > 0 and link.goodput_gbps <= 0
        self._stalled_s = self._stalled_s + elapsed_s if stuck else 0.0
        if not link.up or self._stalled_s >= self._settings.stall_s:
            self._breaker.lost(now_s)
        else:
            self._breaker.found()

    def _measure(self, elapsed_s: float, link: LinkSignals) -> None:
        settings = self._settings
        weight = 1 - (1 - settings.smoothing) ** (elapsed_s / settings.period_s)
        offered_gbps = self._offered_bytes * GBPS / elapsed_s
        self._offered_bytes = 0.0
        self._load_gbps += weight * (offered_gbps - self._load_gbps)
        waited_gbit, backlog_gbit = self._backlog_gbit, link.backlog_bytes * GBPS
        self._backlog_gbit = backlog_gbit
        if waited_gbit > 1.01 * link.goodput_gbps * elapsed_s > 0:  # never idle: it was the limit
            self._capacity_gbps += weight * (link.goodput_gbps - self._capacity_gbps)
        else:  # nothing shows that it is less than promised: believe the promise again, slowly
            self._capacity_gbps += 0.05 * weight * (self._nominal_gbps - self._capacity_gbps)
        self._capacity_gbps = max(self._capacity_gbps, 1e-3 * self._nominal_gbps)
        self._backlog_s = backlog_gbit / self._capacity_gbps
        if link.congested and self._backlog_s > 0.1:  # losses that hold nothing up cost nothing
            self._caution = max(0.5, self._caution * (1 - 0.2 * weight / settings.smoothing))
        else:
            self._caution = min(1.0, self._caution + 0.02 * weight / settings.smoothing)
        one_s = self._recent_bytes * GBPS / max(self._recent_count, 1.0) / self._capacity_gbps
        self._excess_s += weight * (max(0.0, self._backlog_s - one_s) - self._excess_s)
        room = min(max(1 - self._excess_s / settings.drain_s, 0.1), 1.0)
        self._goal = settings.utilisation_max * room * self._caution

    def _retreated(self, link: LinkSignals) -> float:
        """z after this period: integrates the logarithm of load over goal, and stops at its
        bounds (0, and where next to nothing is offloaded), so that nothing winds up."""
        error = math.log(max(self._load_gbps / self._capacity_gbps, 1e-9) / self._goal)
        if abs(error) < self._settings.dead_band:
            return self._retreat
        moved = self._retreat + self._settings.load_gain * min(max(error, -1.0), 1.0)
        return min(max(moved, 0.0), self._retreats[-1] - self._planned)

    def _balanced(self, queues: QueueSignals) -> float:
        difference_s = queues.remote_s - queues.local_s
        difference_s -= min(max(difference_s, -1.0), 1.0)  # a second is no imbalance
        bound = self._settings.balance_max
        return min(max(self._balance_gain * difference_s, -bound), bound)

    def _set_regime(self, now_s: float) -> None:
        settings, load = self._settings, self._load_gbps / self._capacity_gbps
        if load >= settings.abundant_below or self._retreat or self._backlog_s > 0.5:
            self._calm_since_s = now_s
        if load > settings.scarce_above or self._backlog_s > settings.backlog_max_s / 2:
            self._abundant = False
        elif now_s - self._calm_since_s >= settings.calm_s:
            self._abundant = True

    def _admit_bytes(self) -> float:
        """All or nothing: what is promised may keep the link busy for backlog_max_s beyond the
        time that promises are made ahead of their bytes (by Little's law; the mean, weighted by
        bytes, of the last ones' queue and prefill), and one request more."""
        lead_s = self._remote_prefill_s
        if self._recent_bytes:
            lead_s = max(lead_s, self._recent_byte_s / self._recent_bytes)
        horizon_s = self._settings.backlog_max_s + lead_s
        free = self._outstanding_bytes < self._capacity_gbps / GBPS * horizon_s
        return math.inf if free else 0.0

    def _state(self, health: Health) -> ControllerState:
        return ControllerState(
            self._threshold_tokens, health, self._abundant,
            self._load_gbps / self._capacity_gbps, self._goal, self._capacity_gbps,
            self._backlog_s, self._balance, self._retreat)


def _interpolated(x: float, xs: list[float], ys: list[float]) -> float:
    """Return `np.interp` of one number, without numpy's tens of microseconds."""
    at = bisect_right(xs, x) - 1
    if at < 0 or at == len(xs) - 1:
        return ys[max(at, 0)]
    return (ys[at + 1] - ys[at]) / (xs[at + 1] - xs[at]) * (x - xs[at]) + ys[at]


def critical_gain(delay_periods: int) -> float:
    """Return the largest gain of an integrating loop with that delay that does not swing.

    x[k+1] = x[k] - gain x[k-d] has real, positive roots up to d^d / (d+1)^(d+1).
    """
    return delay_periods**delay_periods / (delay_periods + 1) ** (delay_periods + 1)


def loop_radius(gain: float, smoothing: float, delay_periods: int = 0) -> float:
    """Return the spectral radius of the load loop: below 1 it is stable.

    z[k+1] = z[k] + gain m[k],  m[k+1] = (1 - smoothing) m[k] - smoothing z[k-d]; the roots of
    w^d (w - 1)(w - 1 + smoothing) + gain smoothing.
    """
    polynomial = np.polymul([1.0, -1.0], [1.0, smoothing - 1])
    polynomial = np.concatenate((polynomial, np.zeros(delay_periods)))
    polynomial[-1] += gain * smoothing
    return float(np.abs(np.roots(polynomial)).max())


def _balance_gain(deployment: Deployment, plan: Plan, settings: ControllerSettings) -> float:
    """b, in units of y for a second of queue difference: half of the critical gain over K, the
    seconds of work a second that one unit of y moves from one queue to the other."""
    lengths, _ = deployment.lengths.grid(256)
    profile, local = deployment.prfaas.profile, deployment.local
    work_s = (profile.prefill_times(lengths) / deployment.prfaas.nodes
              + local.profile.prefill_times(lengths) / max(plan.prefill_nodes, 1))
    sizes = profile.wire_bytes(lengths, 0, deployment.wire.kv_ratio, deployment.wire.state_ratio)
    left = np.cumsum(sizes[::-1])[::-1]
    # One unit of y is `left` bytes; at a length, bytes / sizes requests, each with its work.
    # left at 0 is all bytes: beyond it y cannot go.
    moved_s = float(np.max(work_s / sizes * left)) / len(lengths)
    rate = plan.lambda_max_rps * moved_s
    return 0.5 * critical_gain(settings.delay_periods) / (rate * settings.period_s)
