"""A small world for the short-term scheduler: arrivals, queues and a link, a second at a time."""

from dataclasses import dataclass, field

import numpy as np

from kvwire.prfaas.codecs import RAW
from kvwire.prfaas.controller import Controller, LinkSignals, QueueSignals
from kvwire.prfaas.health import Health
from kvwire.prfaas.lengths import TruncatedLognormal
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.router import Router, RouteRequest, Target
from kvwire.prfaas.throughput import Deployment, Link, LocalCluster, PrefillCluster, solve
from kvwire.prfaas.view import NodeView

FAST = ModelProfile("fast", 17_280, 182_353_920,
                    ((1024, 0.44), (8192, 0.72), (32768, 1.84), (131072, 7.40)))
SLOW = FAST.slower("slow", 2.9, 1.6)
LENGTHS = TruncatedLognormal(9.90, 1.00, 128, 131_072)
DEADLINE_S = 60.0


def case(gbps, lengths=LENGTHS):
    return Deployment("plant", lengths, 1024, LocalCluster(8, SLOW, 20, 0.025),
                      PrefillCluster(4, FAST), Link(gbps))


class NoIndex:
    def match(self, tenant_key, hashes):
        return {}


@dataclass
class Step:
    """What happened in one second."""

    state: object
    sent: int
    delivered_bytes: float
    backlog_bytes: float
    arrived: int


@dataclass
class Plant:
    """Arrivals at `rate(t)` requests a second over a link of `gbps(t)`; 0: it is gone.

    `even`: no chance in it: the same number of requests each second, of lengths that take turns.
    """

    nominal_gbps: float
    gbps: object
    rate: object
    even: bool = False
    seed: int = 1
    congested: object = lambda t: False
    blackhole: bool = False
    transfers: list = field(default_factory=list)

    def __post_init__(self):
        self.deployment = case(self.nominal_gbps)
        self.plan = solve(self.deployment)
        self.controller = Controller(self.deployment, self.plan)
        self.router = Router(NoIndex(), 512, FAST, SLOW, options=(RAW,))
        self.rng = np.random.default_rng(self.seed)
        self.lengths = LENGTHS.grid(997)[0]
        self.arrived = 0
        self.owed = self.remote_s = self.local_s = 0.0

    def run(self, seconds):
        return [self.step(t) for t in range(seconds)]

    def step(self, t):
        prompts = self.prompts(self.rate(t))
        sent = sum(self.arrive(t, tokens) for tokens in prompts)
        self.remote_s = max(0.0, self.remote_s - 1)
        self.local_s = max(0.0, self.local_s - 1)
        rate = self.gbps(t) / GBPS
        left = rate
        for transfer in [one for one in self.transfers if one[0] <= t]:
            taken = min(left, transfer[1])
            transfer[1] -= taken
            left -= taken
            late = t - transfer[0] > DEADLINE_S
            if transfer[1] <= 0 or late or (rate == 0 and not self.blackhole):
                self.transfers.remove(transfer)
                self.controller.done(t, transfer[2], ok=transfer[1] <= 0)
        backlog = sum(one[1] for one in self.transfers if one[0] <= t)
        state = self.controller.observe(
            t + 1, LinkSignals((rate - left) * GBPS, backlog, self.congested(t),
                               up=rate > 0 or self.blackhole),
            QueueSignals(self.remote_s, self.local_s))
        return Step(state, sent, rate - left, backlog, len(prompts))

    def prompts(self, rate):
        if not self.even:
            return LENGTHS.sample(self.rng, self.rng.poisson(rate))
        self.owed += rate
        count, self.owed = int(self.owed), self.owed % 1
        self.arrived += count
        return [self.lengths[(self.arrived - back) * 389 % 997] for back in range(count)]

    def arrive(self, t, tokens):
        view = self.controller.view(t, [NodeView("remote/0", self.remote_s)],
                                    [NodeView("local/0", self.local_s)])
        decision = self.router.route(RouteRequest(int(tokens)), view)
        self.controller.note(t, decision)
        if decision.target is Target.LOCAL:
            self.local_s += decision.prefill_s / self.plan.prefill_nodes
            return 0
        self.remote_s += decision.prefill_s / self.plan.prfaas_nodes
        self.transfers.append([t + self.remote_s + decision.prefill_s, decision.wire_bytes,
                               decision])
        return 1


def up(step):
    return step.state.health is Health.UP
