"""Whether the remote cluster can be used: goes down at once, comes back in steps.

    UP ── lost, or failures_max failures ──> DOWN ── hold over, not lost ──> PROBING
    ^                                         ^  hold doubles                  │  │
    └───────────── probes succeeded ──────────┼────────────────────────────────┘  │
                                              └────────────── one failed ─────────┘

Each fall doubles the hold, so that a flapping link is left alone for longer and longer: in a time T
there are at most log2(hold_max / hold) + T / hold_max + 1 falls. It is short again after memory_s
without a fall.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from kvwire.errors import UsageError

__all__ = ["Breaker", "BreakerSettings", "Health"]


class Health(str, Enum):
    """What a `Breaker` thinks."""

    UP = "up"
    DOWN = "down"
    PROBING = "probing"


@dataclass(frozen=True)
class BreakerSettings:
    """When a remote side counts as gone, and how it comes back.

    Attributes:
        failures_max: failed requests within window_s that make it go down.
        hold_s, hold_max_s: how long it stays down at first, and at most.
        memory_s: without a fall for so long, the hold is hold_s again.
        probes: requests that must succeed, one after the other, before it is up.
    """

    failures_max: int = 3
    window_s: float = 30.0
    hold_s: float = 5.0
    hold_max_s: float = 320.0
    memory_s: float = 600.0
    probes: int = 2

    def __post_init__(self):
        if min(self.failures_max, self.probes) < 1:
            raise UsageError("failures_max and probes must be at least 1")
        if not 0 < self.hold_s <= self.hold_max_s < math.inf:
            raise UsageError(f"hold_s is {self.hold_s:g}, hold_max_s {self.hold_max_s:g}; wanted "
                             "is 0 < hold_s <= hold_max_s")


class Breaker:
    """Not locked: its owner calls it from one thread at a time. Times only ever rise."""

    def __init__(self, settings: BreakerSettings = BreakerSettings()):
        self._settings = settings
        self._health = Health.UP
        self._lost = False
        self._failures: list[float] = []
        self._hold_s = settings.hold_s
        self._until_s = -math.inf
        self._fell_s = -math.inf
        self._probing = 0
        self._probed = 0
        self.falls = 0

    def health(self, now_s: float) -> Health:
        """Return what holds at `now_s`."""
        if self._health is Health.DOWN and now_s >= self._until_s and not self._lost:
            self._health = Health.PROBING
            self._probing = self._probed = 0
        return self._health

    def permits(self, now_s: float) -> bool:
        """May one more request be sent there? While probing, one at a time."""
        health = self.health(now_s)
        return health is Health.UP or (health is Health.PROBING and self._probing == 0)

    def sent(self, now_s: float) -> None:
        """A request was sent there."""
        if self.health(now_s) is Health.PROBING:
            self._probing += 1

    def succeeded(self, now_s: float) -> None:
        """A request that was sent there came back well."""
        if self.health(now_s) is not Health.PROBING or not self._probing:
            return  # an old one, from before the fall: says nothing of now
        self._probing -= 1
        self._probed += 1
        if self._probed >= self._settings.probes:
            self._health = Health.UP
            self._failures.clear()

    def failed(self, now_s: float) -> None:
        """A request that was sent there failed."""
        health = self.health(now_s)
        if health is Health.PROBING and self._probing:  # else an old one, from before the fall
            self._fall(now_s)
        elif health is Health.UP:
            start = now_s - self._settings.window_s
            self._failures = [at for at in self._failures if at > start] + [now_s]
            if len(self._failures) >= self._settings.failures_max:
                self._fall(now_s)

    def lost(self, now_s: float) -> None:
        """It is certainly unusable: no lane, no heartbeat, no progress."""
        if self.health(now_s) is not Health.DOWN:
            self._fall(now_s)
        self._lost = True

    def found(self) -> None:
        """That certainty is over; the hold still runs."""
        self._lost = False

    def _fall(self, now_s: float) -> None:
        settings = self._settings
        recent = now_s - self._fell_s < settings.memory_s
        self._hold_s = min(2 * self._hold_s, settings.hold_max_s) if recent else settings.hold_s
        self._health = Health.DOWN
        self._until_s = now_s + self._hold_s
        self._fell_s = now_s
        self._failures.clear()
        self.falls += 1
