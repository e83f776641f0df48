"""What a run shows: rates, times to first token, utilisation; and what a system can bear."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

from kvwire.errors import UsageError
from kvwire.prfaas.profiles import GBPS
from kvwire.prfaas.simulator.nodes import PrefillNodes
from kvwire.prfaas.simulator.simulation import Simulation

__all__ = ["Summary", "bearable_rate", "summarise", "times_to_first_token"]


@dataclass(frozen=True)
class Summary:
    """One run, without its beginning.

    All but `failed` is of the window: from the end of the warm-up to the last arrival. Times to
    first token are of the requests that arrived in it; one that failed counts as infinite.

    Attributes:
        offered_rps: arrivals; first_token_rps, done_rps: first tokens out and answers finished.
        remote_rps, local_rps: first tokens after a remote and after a local prefill.
        remote_share: of all first tokens, those after a remote prefill.
        cached_share: of prompt tokens, those found in the pool of the cluster that prefilled.
        egress_gbps, link_utilisation: from the remote cluster.
        remote_utilisation, prefill_utilisation, decode_utilisation: of the time of the remote and
            the local prefill nodes, and of the decode slots.
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
    if not isinstance(value, float):  # numpy's are floats too
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def summarise(simulation: Simulation) -> Summary:
    """Return what a simulation that ran shows.

    Raises: UsageError when all of the window arrives at one instant.
    """
    records, arrival_s = simulation.records, simulation.trace.arrival_s
    begin, end = simulation.marks[0], simulation.marks[-1]
    window_s = end.time_s - begin.time_s
    if window_s <= 0:
        raise UsageError("all requests after the warm-up arrive at one instant; there is no "
                         "rate to speak of")
    seen = slice(simulation.window_begin, None)
    first_s, done_s = np.asarray(records.first_token_s), np.asarray(records.done_s)
    remote = np.asarray(records.remote, bool)
    out, done = (_within(times, begin.time_s, end.time_s) for times in (first_s, done_s))
    ttft_s = times_to_first_token(simulation)[seen]
    p50, p90, p99 = np.percentile(ttft_s, (50, 90, 99), method="higher")
    cached = np.asarray(records.cached_tokens)[seen]
    done_by = [(after - before) / window_s for before, after in zip(begin[1:], end[1:])]
    egress_gbps = done_by[0] * GBPS
    link, decode = simulation.deployment.link, simulation.decode
    nodes = simulation.deployment.local.nodes
    prefill_nodes = _prefill_nodes(simulation, begin.time_s, end.time_s)
    return Summary(
        policy=simulation.policy.name, request_count=len(arrival_s),
        offered_rps=len(ttft_s) / window_s, first_token_rps=out.sum() / window_s,
        done_rps=done.sum() / window_s, remote_rps=(out & remote).sum() / window_s,
        local_rps=(out & ~remote).sum() / window_s, ttft_mean_s=ttft_s.mean(), ttft_p50_s=p50,
        ttft_p90_s=p90, ttft_p99_s=p99, remote_share=(out & remote).sum() / max(1, out.sum()),
        cached_share=cached.sum() / simulation.trace.input_tokens[seen].sum(),
        egress_gbps=egress_gbps,
        link_utilisation=egress_gbps / link.goodput_gbps if link is not None else 0.0,
        remote_utilisation=_utilisation(done_by[1], simulation.remote),
        prefill_utilisation=done_by[2] / max(1, prefill_nodes),
        decode_utilisation=done_by[3] / ((nodes - prefill_nodes) * decode.slots),
        failed=dict(Counter(records.failed.values())))


def times_to_first_token(simulation: Simulation) -> np.ndarray:
    """Return the time of each request of the trace; infinity where there was no first token."""
    first_s = np.asarray(simulation.records.first_token_s)
    return np.where(np.isnan(first_s), math.inf, first_s - simulation.trace.arrival_s)


def _within(times_s: np.ndarray, begin_s: float, end_s: float) -> np.ndarray:
    return (times_s >= begin_s) & (times_s < end_s)


def _prefill_nodes(simulation: Simulation, begin_s: float, end_s: float) -> float:
    """Return the mean of local prefill nodes over a stretch of time."""
    count = float(simulation.prefill_nodes)
    for _, done_s, step in simulation.conversions:
        before_s = min(max(done_s, begin_s), end_s) - begin_s
        count -= step * before_s / (end_s - begin_s)
    return count


def _utilisation(busy: float, nodes: PrefillNodes | None) -> float:
    return busy / nodes.node_count if nodes is not None else 0.0


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
