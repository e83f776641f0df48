"""The long-term scheduler: re-solves the plan on what is seen, converts nodes between roles.

Source: arXiv 2604.15039 section 3.4. Its "much less" and "much more" become a gain that must be
worth a conversion, confirmed by the stages' own load, in several windows, and not too often.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace

import numpy as np

from kvwire.errors import UsageError
from kvwire.prfaas.lengths import Empirical
from kvwire.prfaas.throughput import Deployment, Plan, solve

__all__ = ["ConversionSettings", "LengthWindow", "Planner", "Revision", "StageSignals"]


@dataclass(frozen=True)
class StageSignals:
    """How busy the local stages were over a window, 0 to 1: share of node time in prefill, and of
    decode slots taken. A stage whose queue never emptied counts as 1."""

    prefill_busy: float
    decode_busy: float


@dataclass(frozen=True)
class ConversionSettings:
    """When a plan is revised.

    Attributes:
        requests_min: seen, before their distribution is trusted.
        threshold_change_min: relative; a smaller change is not worth announcing.
        gain_min: of lambda_max_rps by one conversion; less is left alone.
        busy_min: the stage that would be helped is at least so busy, the other less than it.
        windows: how many in a row must say the same.
        cooldown_s: between two conversions.
    """

    requests_min: int = 200
    threshold_change_min: float = 0.05
    gain_min: float = 0.05
    busy_min: float = 0.8
    windows: int = 3
    cooldown_s: float = 1800.0


@dataclass(frozen=True)
class Revision:
    """A new plan. `convert`: nodes that change from decode to prefill; below 0 the other way; 0:
    only the threshold is new. `why` is a sentence."""

    deployment: Deployment
    plan: Plan
    convert: int
    why: str


class LengthWindow:
    """The last requests' uncached and cached lengths. Any thread may add."""

    def __init__(self, count_max: int = 4096):
        if count_max < 1:
            raise UsageError(f"count_max is {count_max}; it must be at least 1")
        self._lock = threading.Lock()
        self._count_max = count_max
        self._rows: list[tuple[float, float]] = []
        self._seen = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, uncached_tokens: float, cached_tokens: float = 0) -> None:
        """Take one request in; the oldest goes when the window is full."""
        row = uncached_tokens, cached_tokens
        with self._lock:
            if self._seen < self._count_max:
                self._rows.append(row)
            else:
                self._rows[self._seen % self._count_max] = row
            self._seen += 1

    def distribution(self) -> Empirical:
        """Return the lengths as they are now; raises UsageError while there are none."""
        with self._lock:
            rows = np.array(self._rows, float).reshape(-1, 2)
        return Empirical(rows[:, 0], rows[:, 1])


class Planner:
    """Revises a plan. `note` may be called by any thread, `revise` by one, once a window.

    Args:
        deployment, plan: as they are now; its `threshold_tokens` and `local.prefill_nodes`, where
            set, are what the operator fixed and stay.
    """

    def __init__(self, deployment: Deployment, plan: Plan,
                 settings: ConversionSettings = ConversionSettings(),
                 window: LengthWindow | None = None):
        self.deployment = deployment
        self.plan = plan
        self._settings = settings
        self._window = window or LengthWindow()
        self._wanted = 0
        self._agreeing = 0
        self._converted_s = -math.inf

    def note(self, uncached_tokens: float, cached_tokens: float = 0) -> None:
        """A request came; what the prefix cache left of it."""
        self._window.add(uncached_tokens, cached_tokens)

    def revise(self, now_s: float, stages: StageSignals) -> Revision | None:
        """Return a revision that the caller should carry out, or None. It becomes `plan`."""
        settings = self._settings
        if len(self._window) < settings.requests_min:
            return None
        seen = replace(self.deployment, lengths=self._window.distribution())
        stay = _with_split(seen, self.plan.prefill_nodes)
        best = solve(seen)
        step = (best.prefill_nodes > self.plan.prefill_nodes) - (
            best.prefill_nodes < self.plan.prefill_nodes)
        step = step if self._supported(step, stages) else 0
        moved = _with_split(seen, self.plan.prefill_nodes + step) if step else stay
        gain = moved.lambda_max_rps / stay.lambda_max_rps - 1
        if self._confirmed(step if gain >= settings.gain_min else 0, now_s):
            self._converted_s, self._agreeing = now_s, 0
            roles = "decode to prefill" if step > 0 else "prefill to decode"
            return self._become(moved, seen, step, f"one node from {roles}: {gain:+.1%} requests "
                                f"a second; prefill was {stages.prefill_busy:.0%} busy, decode "
                                f"{stages.decode_busy:.0%}")
        change = _change(stay.threshold_tokens, self.plan.threshold_tokens)
        if change > settings.threshold_change_min:
            return self._become(stay, seen, 0, f"threshold {self.plan.threshold_tokens:,.0f} to "
                                f"{stay.threshold_tokens:,.0f} on the last {len(self._window):,} "
                                "requests")
        return None

    def _supported(self, step: int, stages: StageSignals) -> bool:
        """Is the stage that would gain a node the busier one, and busy?"""
        helped, other = ((stages.prefill_busy, stages.decode_busy) if step > 0
                         else (stages.decode_busy, stages.prefill_busy))
        return step != 0 and helped >= self._settings.busy_min and helped > other

    def _confirmed(self, step: int, now_s: float) -> bool:
        self._agreeing = self._agreeing + 1 if step and step == self._wanted else int(step != 0)
        self._wanted = step
        return (self._agreeing >= self._settings.windows
                and now_s - self._converted_s >= self._settings.cooldown_s)

    def _become(self, plan: Plan, seen: Deployment, convert: int, why: str) -> Revision:
        self.plan = plan
        return Revision(seen, plan, convert, why)


def _with_split(deployment: Deployment, prefill_nodes: int) -> Plan:
    return solve(replace(deployment, local=replace(deployment.local,
                                                   prefill_nodes=prefill_nodes)))


def _change(new: float, old: float) -> float:
    """Relative change of a threshold, which may be 0 or inf."""
    if new == old:
        return 0.0
    if min(new, old) <= 0 or max(new, old) == math.inf:
        return math.inf
    return abs(math.log(new / old))
