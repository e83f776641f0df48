"""The throughput model: what a deployment sustains, and its best threshold and node split.

Source: arXiv 2604.15039 section 4, equations 1 to 8. A *node* is one instance that holds the whole
model. Added to the paper's terms: the share of the link, its round trip and what may be in flight,
lossless ratios, states that travel whole, cached prefixes.

Two readings where the paper is silent. Its T(l_long) is taken as the mean prefill time of the
requests above the threshold, E[T(L) | L > t], which is what a node's rate depends on; the time at
the mean length is less, for T is convex. And a cached prefix is taken to be known on both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from kvwire.errors import UsageError
from kvwire.prfaas.lengths import LengthDistribution
from kvwire.prfaas.profiles import GBPS, ModelProfile

__all__ = ["Deployment", "Link", "LocalCluster", "Plan", "PrefillCluster", "Stages", "Wire",
           "evaluate", "kv_throughput_gbps", "lambda_max", "pool_egress_gbps", "solve",
           "theta_decode", "theta_prefill", "theta_prfaas"]

CANDIDATE_COUNT_MAX = 4096
NODES_MAX = 10_000  # every split of them is looked at
BALANCE = 0.01  # stages whose rates differ by less bind together


def kv_throughput_gbps(cache_bytes: float, prefill_s: float) -> float:
    """Equation 1, Phi_kv: cache made per second of prefill, in 10^9 bits a second."""
    return cache_bytes * GBPS / prefill_s


def pool_egress_gbps(nodes: float, profile: ModelProfile, mean_tokens: float) -> float:
    """Equation 2, B_out: what `nodes` busy prefill nodes send; N / P of the paper is nodes."""
    return nodes * profile.kv_throughput_gbps(mean_tokens)


def theta_prfaas(nodes: float, prefill_s: float, link_gbps: float, wire_bytes: float) -> float:
    """Equation 3: requests a second that the remote cluster prefills and its link carries."""
    return min(theta_prefill(nodes, prefill_s),
               link_gbps / (wire_bytes * GBPS) if wire_bytes else math.inf)


def theta_prefill(nodes: float, prefill_s: float) -> float:
    """Equation 4: requests a second that `nodes` prefill."""
    return nodes / prefill_s if prefill_s else math.inf


def theta_decode(nodes: float, batch_max: int, step_s: float, output_tokens: float) -> float:
    """Equation 5: requests a second that `nodes` decode with full batches."""
    return nodes * batch_max / (step_s * output_tokens)


def lambda_max(prfaas: float, local: float, decode: float, offloaded_share: float) -> float:
    """Equation 6: requests a second of all together; a side without requests does not bind."""
    remote_rate = prfaas / offloaded_share if offloaded_share else math.inf
    local_rate = local / (1 - offloaded_share) if offloaded_share < 1 else math.inf
    return min(remote_rate, local_rate, decode)


@dataclass(frozen=True)
class PrefillCluster:
    """The remote cluster: `nodes` that do nothing but prefill."""

    nodes: int
    profile: ModelProfile

    def __post_init__(self):
        _check(1 <= self.nodes <= NODES_MAX,
               f"nodes are {self.nodes}; wanted are 1 to {NODES_MAX:,}")


@dataclass(frozen=True)
class LocalCluster:
    """The cluster that decodes, and prefills what is not offloaded.

    Attributes:
        nodes: of both roles together.
        profile: of a node in the prefill role.
        batch_max: requests that one decode node holds at once within its latency goal.
        decode_step_s: seconds per token of such a batch.
        prefill_nodes: how many prefill; None lets `solve` choose.
    """

    nodes: int
    profile: ModelProfile
    batch_max: int
    decode_step_s: float
    prefill_nodes: int | None = None

    def __post_init__(self):
        _check(1 <= self.nodes <= NODES_MAX,
               f"nodes are {self.nodes}; wanted are 1 to {NODES_MAX:,}")
        _check(self.batch_max >= 1, f"batch_max is {self.batch_max}; it must be at least 1")
        _check(0 < self.decode_step_s < math.inf,
               f"decode_step_s is {self.decode_step_s:g}; it must be above 0")
        _check(self.prefill_nodes is None or 0 <= self.prefill_nodes < self.nodes,
               f"prefill_nodes is {self.prefill_nodes}; it must be 0 to {self.nodes - 1}, so that "
               "one node is left to decode")


@dataclass(frozen=True)
class Link:
    """The line from the remote cluster to the local one.

    Attributes:
        gbps: what it carries in payload, 10^9 bits a second.
        share: of it, that may be used, above 0 to 1.
        rtt_s: round trip.
        in_flight_bytes_max: what all lanes together may have on their way (send buffers, windows);
            it caps the rate at in_flight_bytes_max / rtt_s. None: no cap.
    """

    gbps: float
    share: float = 1.0
    rtt_s: float = 0.0
    in_flight_bytes_max: float | None = None

    def __post_init__(self):
        _check(0 < self.gbps < math.inf, f"gbps is {self.gbps:g}; it must be above 0")
        _check(0 < self.share <= 1, f"share is {self.share:g}; it must be above 0, at most 1")
        _check(0 <= self.rtt_s < math.inf, f"rtt_s is {self.rtt_s:g}; it must not be negative")
        _check(self.in_flight_bytes_max is None or self.in_flight_bytes_max > 0,
               f"in_flight_bytes_max is {self.in_flight_bytes_max}; it must be above 0")

    @property
    def goodput_gbps(self) -> float:
        """What the cache may use of it."""
        allowed = self.gbps * self.share
        if self.in_flight_bytes_max is None or not self.rtt_s:
            return allowed
        return min(allowed, self.in_flight_bytes_max * GBPS / self.rtt_s)


@dataclass(frozen=True)
class Wire:
    """What a codec makes of the cache: raw bytes for each byte sent, at least 1."""

    kv_ratio: float = 1.0
    state_ratio: float = 1.0

    def __post_init__(self):
        for name in ("kv_ratio", "state_ratio"):
            ratio = getattr(self, name)
            _check(1 <= ratio < math.inf, f"{name} is {ratio:g}; it must be at least 1")


@dataclass(frozen=True)
class Deployment:
    """Two clusters, the link between them, and the requests.

    Without `prfaas` (and `link`) all is local: the paper's homogeneous baseline.
    `threshold_tokens` fixes the routing threshold; None lets `solve` choose.
    """

    name: str
    lengths: LengthDistribution
    output_tokens: float
    local: LocalCluster
    prfaas: PrefillCluster | None = None
    link: Link | None = None
    wire: Wire = field(default_factory=Wire)
    threshold_tokens: float | None = None

    def __post_init__(self):
        _check(0 < self.output_tokens < math.inf,
               f"output_tokens are {self.output_tokens:g}; they must be above 0")
        _check((self.prfaas is None) == (self.link is None),
               "prfaas and link belong together; name both or neither")
        _check(self.threshold_tokens is None or self.threshold_tokens >= 0,
               f"threshold_tokens is {self.threshold_tokens}; it must not be negative")
        if self.prfaas is not None:
            sizes = [(profile.kv_bytes_per_token, profile.state_bytes)
                     for profile in (self.prfaas.profile, self.local.profile)]
            _check(sizes[0] == sizes[1], "the profiles of the two clusters have other cache sizes: "
                   f"(kv_bytes_per_token, state_bytes) is {sizes[0]} and {sizes[1]}")


@dataclass(frozen=True)
class Plan:
    """A threshold, a split of the local nodes, and what they sustain. Rates in requests a second.

    Attributes:
        threshold_tokens: longer uncached lengths are offloaded; inf: none.
        prfaas_nodes, prefill_nodes, decode_nodes: the remote cluster's, and the local ones by role.
        lambda_max_rps: of all requests together (equation 6).
        theta_prfaas_rps, theta_prefill_rps, theta_decode_rps: of each stage (equations 3 to 5).
        offloaded_share: p.
        long_tokens, short_tokens: l_long and l_short, mean uncached lengths of the two sides.
        remote_prefill_s, local_prefill_s: mean prefill times of the two sides.
        wire_bytes: mean bytes on the wire of an offloaded request.
        egress_gbps: of the link at lambda_max_rps; link_utilisation: of its goodput.
        remote_ttft_s, local_ttft_s: mean time to first token of a request alone, without queues.
        bound_by: the stages that limit lambda_max_rps (within 1 %): "remote prefill", "link",
            "local prefill", "decode".
    """

    threshold_tokens: float
    prfaas_nodes: int
    prefill_nodes: int
    decode_nodes: int
    lambda_max_rps: float
    theta_prfaas_rps: float
    theta_prefill_rps: float
    theta_decode_rps: float
    offloaded_share: float
    long_tokens: float
    short_tokens: float
    remote_prefill_s: float
    local_prefill_s: float
    wire_bytes: float
    egress_gbps: float
    link_utilisation: float
    remote_ttft_s: float
    local_ttft_s: float
    bound_by: tuple[str, ...]


class Stages:
    """Every stage's rate of a deployment as a function of the threshold, for many at once.

    Args:
        deployment: whose lengths are taken at equal shares (`LengthDistribution.grid`).

    `thresholds` are the candidates of `solve`, rising, from 0 (all is offloaded) to inf (nothing).
    The arrays beside it belong to the same thresholds: `offloaded_share`, `remote_prefill_s`,
    `local_prefill_s` and `wire_bytes`, means of the two sides, 0 where a side is empty.
    """

    def __init__(self, deployment: Deployment):
        self.deployment = deployment
        lengths, cached = deployment.lengths.grid()
        self._lengths = lengths
        remote, wire = deployment.prfaas, deployment.wire
        self._sums = {"local": _sums(deployment.local.profile.prefill_times(lengths, cached))}
        if remote is not None:
            self._sums["remote"] = _sums(remote.profile.prefill_times(lengths, cached))
            self._sums["bytes"] = _sums(np.array(remote.profile.wire_bytes(
                lengths, 0, wire.kv_ratio, wire.state_ratio)))
        self.thresholds = self._candidates()
        self._measure()

    def _candidates(self) -> np.ndarray:
        fixed = self.deployment.threshold_tokens
        if self.deployment.prfaas is None:
            return np.array([math.inf])
        if fixed is not None:
            return np.array([float(fixed)])
        distinct = np.unique(self._lengths)
        if len(distinct) > CANDIDATE_COUNT_MAX:
            distinct = distinct[:: -(-len(distinct) // CANDIDATE_COUNT_MAX)]
        return np.concatenate(([0.0], distinct[distinct > 0], [math.inf]))

    def _measure(self) -> None:
        count = len(self._lengths)
        self.offloaded_share = self.deployment.lengths.shares_above(self.thresholds)
        below = count * (1 - self.offloaded_share)
        self.local_prefill_s = _mean_below(self._sums["local"], below)
        if self.deployment.prfaas is not None:
            self.remote_prefill_s = _mean_above(self._sums["remote"], below)
            self.wire_bytes = _mean_above(self._sums["bytes"], below)
        else:
            self.remote_prefill_s = self.wire_bytes = np.zeros(len(self.thresholds))

    def remote_rates(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the requests a second of the whole that remote prefill and the link allow."""
        deployment, share = self.deployment, self.offloaded_share
        if deployment.prfaas is None:
            return (np.full(len(share), math.inf),) * 2
        compute = _rate(deployment.prfaas.nodes, self.remote_prefill_s * share)
        link = _rate(deployment.link.goodput_gbps, self.wire_bytes * GBPS * share)
        return compute, link

    def local_rate(self, prefill_nodes: int) -> np.ndarray:
        """Return the requests a second of the whole that local prefill allows."""
        return _rate(prefill_nodes, self.local_prefill_s * (1 - self.offloaded_share))

    def decode_rate(self, decode_nodes: int) -> float:
        """Return the requests a second that the decode nodes allow."""
        local = self.deployment.local
        return theta_decode(decode_nodes, local.batch_max, local.decode_step_s,
                            self.deployment.output_tokens)

    def plan(self, index: int, prefill_nodes: int) -> Plan:
        """Return the plan with threshold number `index` and `prefill_nodes`."""
        deployment = self.deployment
        share = float(self.offloaded_share[index])
        decode_nodes = deployment.local.nodes - prefill_nodes
        compute, link = (float(rates[index]) for rates in self.remote_rates())
        rates = {"remote prefill": compute, "link": link,
                 "local prefill": float(self.local_rate(prefill_nodes)[index]),
                 "decode": self.decode_rate(decode_nodes)}
        best = min(rates.values())
        threshold = float(self.thresholds[index])
        wire_bytes = float(self.wire_bytes[index])
        egress = best * share * wire_bytes * GBPS
        goodput = deployment.link.goodput_gbps if deployment.link else 0.0
        remote_s, local_s = float(self.remote_prefill_s[index]), float(self.local_prefill_s[index])
        return Plan(
            threshold_tokens=threshold,
            prfaas_nodes=deployment.prfaas.nodes if deployment.prfaas else 0,
            prefill_nodes=prefill_nodes, decode_nodes=decode_nodes, lambda_max_rps=best,
            theta_prfaas_rps=min(compute, link) * share if share else 0.0,
            theta_prefill_rps=theta_prefill(prefill_nodes, local_s) if local_s else 0.0,
            theta_decode_rps=rates["decode"], offloaded_share=share,
            long_tokens=deployment.lengths.mean_above(threshold) if share else 0.0,
            short_tokens=deployment.lengths.mean_below(threshold) if share < 1 else 0.0,
            remote_prefill_s=remote_s, local_prefill_s=local_s, wire_bytes=wire_bytes,
            egress_gbps=egress, link_utilisation=egress / goodput if goodput else 0.0,
            remote_ttft_s=self._remote_ttft_s(remote_s, wire_bytes) if share else 0.0,
            local_ttft_s=local_s,
            bound_by=tuple(name for name, rate in rates.items() if rate <= best * (1 + BALANCE)))

    def _remote_ttft_s(self, prefill_s: float, wire_bytes: float) -> float:
        """One round trip (the request out, the cache back), the prefill, and what the transfer
        could not hide behind it: KV leaves as layers are done, states when all tokens are."""
        deployment = self.deployment
        rate = deployment.link.goodput_gbps / GBPS
        state_bytes = deployment.prfaas.profile.state_bytes / deployment.wire.state_ratio
        late_s = max(0.0, (wire_bytes - state_bytes) / rate - prefill_s)
        return deployment.link.rtt_s + prefill_s + late_s + state_bytes / rate


def evaluate(deployment: Deployment, threshold_tokens: float, prefill_nodes: int) -> Plan:
    """Return what the deployment sustains with this threshold and split; raises UsageError."""
    local = replace(deployment.local, prefill_nodes=prefill_nodes)
    fixed = replace(deployment, local=local, threshold_tokens=threshold_tokens)
    return Stages(fixed).plan(0, prefill_nodes)


def solve(deployment: Deployment) -> Plan:
    """Return the plan with the highest rate, by search over every split and threshold.

    Equations 7 and 8 hold at the optimum as far as whole nodes allow. Among plans of equal rate
    (decode binds), the one whose prefill has the most to spare.

    Raises:
        UsageError: no split serves any request (e.g. a fixed threshold and no prefill nodes).
    """
    stages = Stages(deployment)
    remote = np.minimum(*stages.remote_rates())
    fixed = deployment.local.prefill_nodes
    splits = range(deployment.local.nodes) if fixed is None else [fixed]
    best = None
    for prefill_nodes in splits:
        prefill = np.minimum(remote, stages.local_rate(prefill_nodes))
        index = int(np.argmax(prefill))
        decode = stages.decode_rate(deployment.local.nodes - prefill_nodes)
        key = (min(float(prefill[index]), decode), float(prefill[index]))
        if best is None or key > best[0]:
            best = key, index, prefill_nodes
    (rate, _), index, prefill_nodes = best
    if rate <= 0:
        raise UsageError(f"deployment {deployment.name!r}: no request can be served; with "
                         f"{deployment.local.nodes} local nodes, prefill_nodes {fixed} and "
                         f"threshold {deployment.threshold_tokens} some requests have no node")
    return stages.plan(index, prefill_nodes)


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UsageError(message)


def _sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate(([0.0], np.cumsum(values)))


def _at(sums: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """`sums` at ranks between its entries."""
    return np.interp(rank, np.arange(len(sums)), sums)


def _mean_below(sums: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(_at(sums, below), below, out=np.zeros_like(below), where=below > 0)


def _mean_above(sums: np.ndarray, below: np.ndarray) -> np.ndarray:
    above = len(sums) - 1 - below
    return np.divide(sums[-1] - _at(sums, below), above, out=np.zeros_like(below),
                     where=above > 1e-9)


def _rate(capacity: float, demand: np.ndarray) -> np.ndarray:
    """`capacity` over `demand`; a stage without demand does not bind."""
    rates = np.full(len(demand), math.inf)
    return np.divide(capacity, demand, out=rates, where=demand > 0)
