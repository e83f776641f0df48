"""What a run shows: rates, times to first token, utilisation; and what a system can bear."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from kvwire.errors import UsageError
from kvwire.prfaas.profiles import GBPS
from kvwire.prfaas.simulator.simulation import Simulation

__all__ = ["Summary", "bearable_rate", "summarise"]


@dataclass(frozen=True)
class Summary:
    """One run, without its beginning.

    The window goes from the end of the warm-up to the last arrival. Times to first token are of
    the requests that arrived in it; one that failed counts as infinite.

    Attributes:
        offered_rps: arrivals; first_token_rps, done_rps: first tokens out and answers finished.
        remote_rps, local_rps: first tokens after a remote and after a local prefill.
        remote_share: of all first tokens, those after a remote prefill.
        cached_share: of prompt tokens, those found in the pool of the cluster that prefilled.
        egress_gbps, link_utilisation: from the remote cluster, in the mean over the whole run.
        prefill_utilisation, decode_utilisation: of the local nodes' and slots' time, whole run.
        failed: requests by reason, whole run.
    """

    policy: str
    request_count: int
    offered_rps: float
    first_token_rps: float
    done_rps: float
    remote_rps: float
    local_rps: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    remote_share: float
    cached_share: float
    egress_gbps: float
    link_utilisation: float
    remote_utilisation: float
    prefill_utilisation: float
    decode_utilisation: float
    failed: dict[str, int]

    def as_json(self) -> dict[str, object]:
        """Return the figures in four digits; None for what is not finite."""
        return {name: _rounded(value) for name, value in asdict(self).items()}


def _rounded(value: object) -> object:
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def summarise(simulation: Simulation, warm_up_share: float = 0.2) -> Summary:
    """Return what a simulation that ran shows.

    Args:
        warm_up_share: of the requests, that are left out at the beginning.

    Raises: UsageError when nothing is left to look at.
    """
    records, arrival_s = simulation.records, simulation.trace.arrival_s
    begin_s, end_s = arrival_s[int(warm_up_share * len(arrival_s))], arrival_s[-1]
    seen = arrival_s >= begin_s
    if end_s <= begin_s:
        raise UsageError(f"{len(arrival_s)} requests and a warm-up of {warm_up_share:g} leave "
                         "nothing to look at")
    window_s = end_s - begin_s
    first_s, done_s = np.asarray(records.first_token_s), np.asarray(records.done_s)
    remote = np.asarray(records.remote, bool)
    out = (first_s >= begin_s) & (first_s < end_s)
    ttft_s = np.where(np.isnan(first_s), math.inf, first_s - arrival_s)[seen]
    p50, p90, p99 = np.percentile(ttft_s, (50, 90, 99), method="higher")
    cached = np.asarray(records.cached_tokens)
    passed_s = max(simulation.queue.now_s - arrival_s[0], window_s)
    egress_gbps = capacity_gbps = 0.0
    if simulation.link is not None:
        simulation.link.advance()
        egress_gbps = simulation.link.delivered_bytes * GBPS / passed_s
        capacity_gbps = simulation.deployment.link.goodput_gbps
    return Summary(
        policy=simulation.policy.name, request_count=len(arrival_s),
        offered_rps=float(seen.sum() / window_s), first_token_rps=float(out.sum() / window_s),
        done_rps=float(((done_s >= begin_s) & (done_s < end_s)).sum() / window_s),
        remote_rps=float((out & remote).sum() / window_s),
        local_rps=float((out & ~remote).sum() / window_s),
        ttft_mean_s=float(ttft_s.mean()), ttft_p50_s=float(p50), ttft_p90_s=float(p90),
        ttft_p99_s=float(p99), remote_share=float((out & remote).sum() / max(1, out.sum())),
        cached_share=float(cached[seen].sum() / simulation.trace.input_tokens[seen].sum()),
        egress_gbps=egress_gbps,
        link_utilisation=egress_gbps / capacity_gbps if capacity_gbps else 0.0,
        remote_utilisation=_busy(simulation.remote, passed_s),
        prefill_utilisation=_busy(simulation.local, passed_s),
        decode_utilisation=simulation.decode.busy_s / passed_s
        / (simulation.decode.node_count * simulation.decode.slots),
        failed=dict(Counter(records.failed.values())))


def _busy(nodes, passed_s: float) -> float:
    return nodes.busy_s / (nodes.node_count * passed_s) if nodes is not None else 0.0


def bearable_rate(run: Callable[[float], Summary], low_rps: float, high_rps: float,
                  ttft_p90_max_s: float, steps: int = 7) -> tuple[float, Summary]:
    """Return the highest rate at which P90 of the time to first token is within its bound.

    By halving between `low_rps` and `high_rps`, on a logarithmic scale.

    Args:
        run: simulates at a mean rate.

    Returns: the rate, 0 when not even `low_rps` is bearable, and the summary there.
    """
    best = 0.0, run(low_rps)
    if best[1].ttft_p90_s > ttft_p90_max_s:
        return best
    best = low_rps, best[1]
    for _ in range(steps):
        middle = math.sqrt(low_rps * high_rps)
        summary = run(middle)
        if summary.ttft_p90_s <= ttft_p90_max_s:
            low_rps, best = middle, (middle, summary)
        else:
            high_rps = middle
    return best
