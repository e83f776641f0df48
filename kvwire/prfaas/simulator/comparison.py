"""Policies on one deployment and the same requests, side by side: what `kvwire simulate` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from kvwire.errors import UsageError
from kvwire.prfaas.lengths import Empirical
from kvwire.prfaas.profiles import GBPS
from kvwire.prfaas.simulator import generator
from kvwire.prfaas.simulator.caches import ClusterCache
from kvwire.prfaas.simulator.policies import Kvwire, OneSided, Policy, Published
from kvwire.prfaas.simulator.report import Summary, summarise, times_to_first_token
from kvwire.prfaas.simulator.simulation import Simulation
from kvwire.prfaas.simulator.traces import Trace
from kvwire.prfaas.throughput import Deployment, Plan, solve

__all__ = ["Outcome", "compare", "requests_of", "text"]

REQUESTS_MIN, REQUESTS_MAX = 100, 10_000_000
RATE_RPS_MAX = 1e6
LOAD = 0.8
SPAN_S_MAX = 1e7  # every second of it is looked at


@dataclass(frozen=True)
class Outcome:
    """What one policy made of the requests.

    Attributes:
        times_s: to first token, of each request; infinity where there was none.
        conversions: see `Simulation`.
    """

    plan: Plan
    summary: Summary
    times_s: np.ndarray
    conversions: list[tuple[float, float, int]]


def requests_of(described: Deployment, trace: Trace | None, *, count: int = 10_000,
                rate_rps: float | None = None, seed: int = 1) -> tuple[Deployment, Trace]:
    """Return the deployment with the lengths of the requests, and the requests.

    Args:
        trace: requests that were recorded; None: prompts of the deployment's lengths that share
            nothing.
        count: of these, or how many of the trace at most.
        rate_rps: mean rate of arrival; None: as recorded, or 0.8 of what the plan sustains.

    Raises: UsageError: too few or too many requests, no rate, or no end within `SPAN_S_MAX`.
    """
    if rate_rps is not None and not 0 < rate_rps <= RATE_RPS_MAX:
        raise UsageError(f"the rate is {rate_rps:g} requests/s; it must be above 0, and at most "
                         f"{RATE_RPS_MAX:g}")
    if not REQUESTS_MIN <= count <= REQUESTS_MAX:
        raise UsageError(f"{count} requests are asked for; wanted are {REQUESTS_MIN} to "
                         f"{REQUESTS_MAX:,}")
    if trace is None:
        rate_rps = rate_rps or LOAD * solve(described).lambda_max_rps
        trace = generator.cold_trace(described.lengths, count, rate_rps, seed,
                                     max(1, round(described.output_tokens)))
    else:
        trace = trace.head(count)
        trace = trace if rate_rps is None else trace.at_rate(rate_rps)
        described = replace(described, output_tokens=float(trace.output_tokens.mean()))
    if len(trace) < REQUESTS_MIN:
        raise UsageError(f"there are {len(trace)} requests; wanted are {REQUESTS_MIN} at least")
    alone_s = _longest_alone_s(described, trace)
    if not trace.duration_s + alone_s <= SPAN_S_MAX:
        raise UsageError(f"the requests come within {trace.duration_s:g} s, and one alone may take "
                         f"{alone_s:g} s; at most {SPAN_S_MAX:g} s of both are simulated")
    return described, trace


def _longest_alone_s(described: Deployment, trace: Trace) -> float:
    """Return how long one request may take where it waits for no other."""
    tokens, local = float(trace.input_tokens.max()), described.local
    alone_s = local.profile.prefill_s(tokens)
    if described.prfaas is not None:
        remote, link = described.prfaas.profile, described.link
        alone_s = max(alone_s, remote.prefill_s(tokens) + link.rtt_s
                      + remote.wire_bytes(tokens) * GBPS / link.goodput_gbps)
    return alone_s + float(trace.output_tokens.max()) * local.decode_step_s


def compare(described: Deployment, trace: Trace, *, pool_bytes: float = 0.0,
            conversion_s: float | None = None, progress: Callable[[str, int], None] | None = None
            ) -> Iterator[tuple[str, Outcome]]:
    """Yield the name and the outcome of each policy that the deployment has nodes for.

    Each has its own best plan for these requests: all local, as published, kvwire's.

    Args:
        pool_bytes: of each cluster's prefix pool, the local one's twice as large where it is
            alone; 0: none.
        conversion_s: see `Simulation`; kvwire's policy alone converts.
        progress: told the policy and how many requests have come, now and then.
    """
    given = replace(described, lengths=_lengths(trace, pool_bytes > 0))
    for name, (deployment, plan, policy) in _contenders(given).items():
        caches = _caches(deployment, pool_bytes, trace.block_tokens, name == "kvwire")
        simulation = Simulation(trace, deployment, plan.prefill_nodes, policy, **caches,
                                conversion_s=conversion_s if name == "kvwire" else None)
        simulation.run(None if progress is None else lambda index: progress(name, index))
        yield name, Outcome(plan, summarise(simulation), times_to_first_token(simulation),
                            simulation.conversions)


def _lengths(trace: Trace, cached: bool) -> Empirical:
    """Return the lengths, after what a pool that forgets nothing has of them if `cached`."""
    seen: set[int] = set()
    held = np.zeros(len(trace))
    for index in range(len(trace) if cached else 0):
        full = trace.hashes(index)[:trace.input_tokens[index] // trace.block_tokens]
        known = next((at for at, name in enumerate(full) if name not in seen), len(full))
        held[index] = min(known * trace.block_tokens, trace.input_tokens[index] - 1)
        seen.update(full)
    return Empirical(trace.input_tokens - held, held)


def _contenders(given: Deployment) -> dict[str, tuple[Deployment, Plan, Policy]]:
    alone = replace(given, prfaas=None, link=None, threshold_tokens=None,
                    local=replace(given.local, prefill_nodes=None))
    found = {"all local": (alone, solve(alone), OneSided(remote=False))}
    if given.prfaas is not None:
        raw, coded = replace(given, wire=type(given.wire)()), Kvwire.wire_of(given)
        plans = solve(raw), solve(coded)
        found["published"] = raw, plans[0], Published(plans[0])
        found["kvwire"] = coded, plans[1], Kvwire(coded, plans[1])
    return found


def _caches(deployment: Deployment, pool_bytes: float, block_tokens: int, cost_aware: bool
            ) -> dict[str, ClusterCache]:
    if not pool_bytes:
        return {}
    profile = deployment.local.profile

    def cache(capacity_bytes: float) -> ClusterCache:
        return ClusterCache.of_bytes(profile, capacity_bytes, block_tokens, cost_aware=cost_aware)

    if deployment.prfaas is None:
        return {"local_cache": cache(2 * pool_bytes)}
    return {"local_cache": cache(pool_bytes), "remote_cache": cache(pool_bytes)}


def text(outcomes: dict[str, Outcome]) -> str:
    """Return the outcomes as a table for a terminal."""
    rows = [f"{'policy':<12}{'threshold':>10}{'prefill':>8}{'offered':>9}{'served':>9}"
            f"{'TTFT mean':>11}{'P50':>8}{'P90':>8}{'P99':>8}{'remote':>8}{'cached':>8}{'link':>6}"
            f"{'failed':>8}"]
    for name, outcome in outcomes.items():
        plan, found = outcome.plan, outcome.summary
        threshold = f"{plan.threshold_tokens:,.0f}" if plan.offloaded_share else "-"
        rows.append(
            f"{name:<12}{threshold:>10}{plan.prefill_nodes:>8}{found.offered_rps:>8.2f}/s"
            f"{found.first_token_rps:>7.2f}/s{found.ttft_mean_s:>10.2f}s{found.ttft_p50_s:>7.2f}s"
            f"{found.ttft_p90_s:>7.2f}s{found.ttft_p99_s:>7.2f}s{found.remote_share:>8.1%}"
            f"{found.cached_share:>8.1%}{found.link_utilisation:>6.0%}"
            f"{sum(found.failed.values()):>8}")
        rows += [f"  {begin_s:,.0f} s to {end_s:,.0f} s: a node from "
                 f"{'decode to prefill' if step > 0 else 'prefill to decode'}"
                 for begin_s, end_s, step in outcome.conversions]
    return "\n".join(rows)
