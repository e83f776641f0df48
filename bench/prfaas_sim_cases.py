"""What `python -m bench.prfaas_sim` simulates, each part as rows of figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.prfaas_tables import THRESHOLD_TOKENS, CaseStudy
from kvwire.prfaas.lengths import Empirical
from kvwire.prfaas.simulator import generator
from kvwire.prfaas.simulator.caches import ClusterCache
from kvwire.prfaas.simulator.faults import Fault, FaultKind, plan_faults
from kvwire.prfaas.simulator.policies import Kvwire, OneSided, Policy, Published
from kvwire.prfaas.simulator.report import (
    Summary, bearable_rate, summarise, times_to_first_token,
)
from kvwire.prfaas.simulator.simulation import Simulation
from kvwire.prfaas.simulator.traces import Trace
from kvwire.prfaas.throughput import Deployment, Link, Plan, evaluate, solve

__all__ = ["FAULTS", "Traffic", "agentic", "beyond", "closed_form", "cold", "conversation",
           "conversion", "faults", "four_policies", "rebalance", "table_6"]

TTFT_PAPER_S = {"PrfaaS-PD": (2.22, 3.51), "homogeneous PD": (4.44, 9.73),
                "naive heterogeneous PD": (1.74, 3.51)}
"""Mean and P90 of table 6."""

LOADS = (0.02, 0.5, 0.7, 0.9)
POOL_BYTES = 4e12
"""Of each cluster: half a terabyte of host memory on each of eight nodes."""

Row = dict[str, object]


# ---- the closed form and table 6

def closed_form(case: CaseStudy, count: int, seed: int) -> Iterator[Row]:
    """Yield what stages serve when too much is offered, and how busy they are when it is not,
    beside equations 3 to 6."""
    given = case.remote_prefill
    narrow = replace(given, link=Link(10.0))
    starved = replace(given, local=replace(given.local, nodes=4))
    plan, tight, short = (evaluate(deployment, THRESHOLD_TOKENS, 3)
                          for deployment in (given, narrow, starved))
    p = plan.offloaded_share
    much_rps = 1.4 * max(plan.theta_prfaas_rps / p, plan.theta_prefill_rps / (1 - p))
    found = _static(given, plan, much_rps, count, seed)
    yield from _compared("overload", [
        ("Theta_prfaas", plan.theta_prfaas_rps, found.remote_rps),
        ("Theta_pd-p", plan.theta_prefill_rps, found.local_rps),
        ("Lambda_max", plan.lambda_max_rps, min(found.remote_rps / p, found.local_rps / (1 - p)))])
    found = _static(starved, short, much_rps, count, seed)
    yield from _compared("overload, one decode node", [
        ("Theta_pd-d", short.theta_decode_rps, found.first_token_rps)])
    for name, deployment, solved in (("100 Gbit/s", given, plan), ("10 Gbit/s", narrow, tight)):
        rate = 0.8 * solved.lambda_max_rps
        found = _static(deployment, solved, rate, count, seed)
        yield from _compared(f"80 % of Lambda_max, {name}", [
            ("requests/s", rate, found.done_rps),
            ("remote nodes busy", rate * p * solved.remote_prefill_s / 4,
             found.remote_utilisation),
            ("local prefill nodes busy", rate * (1 - p) * solved.local_prefill_s / 3,
             found.prefill_utilisation),
            ("decode slots busy", rate / solved.theta_decode_rps, found.decode_utilisation),
            ("egress Gbit/s", 0.8 * solved.egress_gbps, found.egress_gbps)])


def _static(deployment: Deployment, plan: Plan, rate_rps: float, count: int,
            seed: int) -> Summary:
    trace = generator.cold_trace(deployment.lengths, count, rate_rps, seed)
    simulation = Simulation(trace, deployment, plan.prefill_nodes,
                            Published(plan, stepping=False))
    simulation.run()
    return summarise(simulation)


def _compared(name: str, figures: list[tuple[str, float, float]]) -> Iterator[Row]:
    for figure, closed, simulated in figures:
        yield {"part": "closed form", "case": name, "figure": figure,
               "closed_form": _short(closed), "simulated": _short(simulated),
               "rel_error": round(simulated / closed - 1, 4)}


def deployments(case: CaseStudy) -> dict[str, tuple[Deployment, Plan, Callable[[], Policy]]]:
    """Return the three of table 6, as the paper set them up."""
    remote, alone = case.remote_prefill, case.homogeneous
    published = evaluate(remote, THRESHOLD_TOKENS, 3)
    return {"PrfaaS-PD": (remote, published, lambda: Published(published, stepping=False)),
            "homogeneous PD": (alone, solve(alone), lambda: OneSided(remote=False)),
            "naive heterogeneous PD": (remote, evaluate(remote, 0, 0),
                                       lambda: OneSided(remote=True))}


def table_6(case: CaseStudy, count: int, seed: int, loads: tuple[float, ...] = LOADS,
            keep: dict[str, np.ndarray] | None = None) -> Iterator[Row]:
    """Yield mean and P90 time to first token of each deployment at each share of its Lambda_max.

    Args:
        keep: is given the times at the last load, for a plot.
    """
    for name, (deployment, plan, policy) in deployments(case).items():
        for load in loads:
            trace = generator.cold_trace(deployment.lengths, count, load * plan.lambda_max_rps,
                                         seed)
            run = Simulation(trace, deployment, plan.prefill_nodes, policy())
            run.run()
            found = summarise(run)
            if keep is not None:
                keep[name] = times_to_first_token(run)
            for figure, paper, ours in zip(("mean TTFT s", "P90 TTFT s"), TTFT_PAPER_S[name],
                                           (found.ttft_mean_s, found.ttft_p90_s)):
                yield {"part": "table 6", "deployment": name, "load": load, "figure": figure,
                       "paper": paper, "ours": _short(ours),
                       "rel_error": round(ours / paper - 1, 4)}


# ---- beyond the paper

@dataclass(frozen=True)
class Traffic:
    """Requests of one kind, and what is asked for them.

    Attributes:
        deployment: the paper's hardware, with these requests' lengths after prefix hits.
        pool_bytes: of each cluster's prefix pool; 0: none.
        slow_share: of the requests, that arrive slowly at first, so that pools fill.
        ttft_p90_max_s: what makes a rate bearable.
    """

    name: str
    trace: Trace
    deployment: Deployment
    pool_bytes: float
    slow_share: float
    ttft_p90_max_s: float

    def simulation(self, policy: Policy, link: Link | None, prefill_nodes: int, rate_rps: float,
                   deployment: Deployment | None = None, *, own_pools: bool = False,
                   **more: object) -> Simulation:
        """Return a simulation of this traffic at a mean rate, not yet run.

        Args:
            own_pools: each prefill node has its share of its cluster's pool to itself.
        """
        given = deployment or replace(self.deployment, link=link)
        trace = self.trace.at_rate(rate_rps)
        if self.slow_share:
            trace = generator.with_slow_start(trace, self.slow_share, max(1.0, rate_rps))
            more = {"warm_up_share": self.slow_share + 0.05} | more
        if self.pool_bytes:
            nodes = {"remote_cache": given.prfaas.nodes, "local_cache": prefill_nodes}
            more |= {name: ClusterCache.of_bytes(
                given.local.profile, self.pool_bytes, trace.block_tokens,
                cost_aware=isinstance(policy, Kvwire), pool_count=count if own_pools else 1)
                for name, count in nodes.items()}
        return Simulation(trace, given, prefill_nodes, policy, **more)

    def run(self, *arguments: object, **more: object) -> Summary:
        """Simulate and summarise; see `simulation`."""
        simulation = self.simulation(*arguments, **more)
        simulation.run()
        return summarise(simulation)


def cold(case: CaseStudy, count: int, seed: int) -> Traffic:
    """Return the paper's prompts, which share nothing."""
    deployment = case.remote_prefill
    trace = generator.cold_trace(deployment.lengths, count, 1.0, seed)
    return Traffic("cold", trace, deployment, 0.0, 0.0, 10.0)


def conversation(case: CaseStudy, trace: Trace) -> Traffic:
    """Return the requests of a trace file, or of one that was generated alike."""
    return Traffic("conversation", trace, _deployment(case, trace), POOL_BYTES / 4, 0.0, 5.0)


def agentic(case: CaseStudy, count: int, seed: int) -> Traffic:
    """Return turns of agents: long prefixes, short appends."""
    trace = generator.session_trace(generator.AGENTIC, count, 3.0, seed).coarser(4)
    return Traffic("agentic", trace, _deployment(case, trace), POOL_BYTES, 0.5, 5.0)


def _deployment(case: CaseStudy, trace: Trace) -> Deployment:
    """Return the paper's hardware for the lengths that an unbounded prefix cache leaves over."""
    seen: set[int] = set()
    cached = np.zeros(len(trace))
    for index in range(len(trace)):
        full = trace.hashes(index)[:trace.input_tokens[index] // trace.block_tokens]
        cached[index] = next((number for number, name in enumerate(full) if name not in seen),
                             len(full)) * trace.block_tokens
        seen.update(full)
    uncached = np.maximum(1, trace.input_tokens - cached)
    return replace(case.remote_prefill, lengths=Empirical(uncached, cached),
                   output_tokens=float(trace.output_tokens.mean()))


def contenders(traffic: Traffic, link: Link) -> dict[str, tuple[Plan, Callable[[], Policy]]]:
    """Return the policies that are compared at a bandwidth, each with its own best plan."""
    given = replace(traffic.deployment, link=link)
    coded = Kvwire.wire_of(given)
    raw_plan, plan = solve(given), solve(coded)
    found = {"published": (raw_plan, lambda: Published(raw_plan)),
             "published, static": (raw_plan, lambda: Published(raw_plan, stepping=False)),
             "kvwire": (plan, lambda: Kvwire(coded, plan))}
    if traffic.name == "cold":
        paper = evaluate(given, THRESHOLD_TOKENS, 3)
        found["published, the paper's t"] = (paper, lambda: Published(paper))
    return found


def beyond(traffic: Traffic, link: Link, steps: int) -> Iterator[Row]:
    """Yield for each policy the highest rate with P90 TTFT in bounds, and P90 TTFT at one rate.

    The first is looked for between half and 1.1 times the rate of the policy's plan. The second
    is nine tenths of what the better of the two re-solved published policies bears.
    """
    found, rates = contenders(traffic, link), {}
    for name, (plan, policy) in found.items():
        rates[name] = bearable_rate(
            lambda rate: traffic.run(policy(), link, plan.prefill_nodes, rate),
            0.5 * plan.lambda_max_rps, 1.1 * plan.lambda_max_rps, traffic.ttft_p90_max_s, steps)
    best = max(rates["published"][0], rates["published, static"][0])
    same_rps = 0.9 * best or 0.5 * found["published"][0].lambda_max_rps
    for name, (plan, policy) in found.items():
        rate, at_best = rates[name]
        same = traffic.run(policy(), link, plan.prefill_nodes, same_rps)
        yield {"part": "beyond", "traffic": traffic.name, "link_gbps": link.gbps, "policy": name,
               "threshold_tokens": _short(plan.threshold_tokens),
               "prefill_nodes": plan.prefill_nodes, "plan_rps": _short(plan.lambda_max_rps),
               "plan_bound_by": list(plan.bound_by), "ttft_p90_max_s": traffic.ttft_p90_max_s,
               "bearable_rps": _short(rate),
               "over_published": _short(rate / best) if best else None,
               "link_utilisation": _short(at_best.link_utilisation),
               "remote_share": _short(at_best.remote_share),
               "cached_share": _short(at_best.cached_share), "same_rps": _short(same_rps),
               "ttft_mean_s": _short(same.ttft_mean_s), "ttft_p90_s": _short(same.ttft_p90_s)}


def rebalance(traffic: Traffic, link: Link, steps: int) -> Iterator[Row]:
    """Yield what kvwire's policy bears with one pool a cluster, and with one on each prefill node,
    without and with copies of hot prefixes from node to node; all at nine tenths of the plan too.
    """
    coded = Kvwire.wire_of(replace(traffic.deployment, link=link))
    plan = solve(coded)
    for pools, own_pools, copied in (("one a cluster", False, False),
                                     ("one a node", True, False), ("one a node", True, True)):
        def simulated(rate_rps: float) -> tuple[Simulation, Summary]:
            simulation = traffic.simulation(Kvwire(coded, plan, rebalance=copied), link,
                                            plan.prefill_nodes, rate_rps, own_pools=own_pools)
            simulation.run()
            return simulation, summarise(simulation)

        rate, _ = bearable_rate(lambda rate_rps: simulated(rate_rps)[1],
                                0.5 * plan.lambda_max_rps, 1.1 * plan.lambda_max_rps,
                                traffic.ttft_p90_max_s, steps)
        simulation, found = simulated(0.9 * plan.lambda_max_rps)
        yield {"part": "rebalance", "traffic": traffic.name, "link_gbps": link.gbps,
               "pools": pools, "rebalanced": copied, "ttft_p90_max_s": traffic.ttft_p90_max_s,
               "bearable_rps": _short(rate), "same_rps": _short(0.9 * plan.lambda_max_rps),
               "ttft_mean_s": _short(found.ttft_mean_s), "ttft_p90_s": _short(found.ttft_p90_s),
               "cached_share": _short(found.cached_share), "copies": simulation.copies.count,
               "copied_gb": _short(simulation.copies.sent_bytes / 1e9),
               "leaks": simulation.leaks()}


def four_policies(case: CaseStudy, traffic: Traffic, link: Link,
                  keep: dict[str, np.ndarray]) -> Iterator[Row]:
    """Yield summaries of all four at one rate: nine tenths of the homogeneous system's plan."""
    alone = replace(case.homogeneous, lengths=traffic.deployment.lengths,
                    output_tokens=traffic.deployment.output_tokens)
    alone_plan = solve(alone)
    rate = 0.9 * alone_plan.lambda_max_rps
    naive = replace(traffic.deployment, link=link)
    runs = {"homogeneous": (alone_plan, lambda: OneSided(remote=False), alone),
            "naive": (evaluate(naive, 0, 0), lambda: OneSided(remote=True), naive)}
    for name, (plan, policy) in contenders(traffic, link).items():
        runs[name] = (plan, policy, naive)
    for name, (plan, policy, deployment) in runs.items():
        caches = traffic if deployment.prfaas is not None else replace(traffic, pool_bytes=0.0)
        simulation = caches.simulation(policy(), link, plan.prefill_nodes, rate, deployment)
        if deployment.prfaas is None and traffic.pool_bytes:
            simulation.local_cache = ClusterCache.of_bytes(
                deployment.local.profile, 2 * traffic.pool_bytes, traffic.trace.block_tokens,
                cost_aware=False)
        simulation.run()
        keep[name] = times_to_first_token(simulation)
        yield {"part": "policies", "traffic": traffic.name, "link_gbps": link.gbps,
               **summarise(simulation).as_json(), "policy": name}


# ---- conversion

def conversion(case: CaseStudy, hours: float, seed: int, conversion_s: float = 120.0
               ) -> Iterator[Row]:
    """Yield what becomes of requests whose prompts get four times shorter after a quarter of the
    time, with the split that was right before, and with nodes that change their roles."""
    given = replace(case.remote_prefill, link=Link(100.0))
    coded = Kvwire.wire_of(given)
    lengths = given.lengths
    shorter = replace(coded, lengths=replace(lengths, mu=lengths.mu - math.log(4)))
    plan, best = solve(coded), solve(shorter)
    stays = solve(replace(shorter, local=replace(shorter.local,
                                                 prefill_nodes=plan.prefill_nodes)))
    trace, changes_s = _two_phases(hours * 3600, (
        (coded, 0.8 * plan.lambda_max_rps), (shorter, 0.9 * best.lambda_max_rps)), seed)
    for name, time_s in (("fixed", None), ("converting", conversion_s)):
        simulation = Simulation(trace, given, plan.prefill_nodes, Kvwire(coded, plan),
                                conversion_s=time_s)
        simulation.run()
        times_s = times_to_first_token(simulation)
        last = trace.arrival_s >= trace.arrival_s[-1] - 0.25 * (trace.arrival_s[-1] - changes_s)
        yield {"part": "conversion", "roles": name, "requests": len(trace),
               "changes_s": round(changes_s), "prefill_nodes_before": plan.prefill_nodes,
               "prefill_nodes_best": best.prefill_nodes,
               "lambda_max_rps": _short(stays.lambda_max_rps),
               "lambda_max_best_rps": _short(best.lambda_max_rps),
               "conversion_s": conversion_s,
               "conversions": [[round(begin_s), round(end_s), step]
                               for begin_s, end_s, step in simulation.conversions],
               "ttft_p90_before_s": _p90(times_s[trace.arrival_s < changes_s]),
               "ttft_p90_s": _p90(times_s[last]), "leaks": simulation.leaks()}


def _two_phases(duration_s: float, phases: Sequence[tuple[Deployment, float]], seed: int
                ) -> tuple[Trace, float]:
    """Return a trace of requests as a deployment expects them, at a rate, for a quarter of the
    time, and of others then; and when that is."""
    parts, begins_s = [], [0.0]
    for (given, rate_rps), share in zip(phases, (0.25, 0.75)):
        part = generator.cold_trace(given.lengths, int(rate_rps * share * duration_s), rate_rps,
                                    seed + len(parts), round(given.output_tokens))
        parts.append(replace(part, arrival_s=part.arrival_s + begins_s[-1]))
        begins_s.append(float(parts[-1].arrival_s[-1]))
    joined = (np.concatenate([getattr(part, field) for part in parts])
              for field in ("arrival_s", "input_tokens", "output_tokens"))
    return Trace(*joined), begins_s[1]


# ---- faults

FAULTS = {"remote cluster dead": (0.2, Fault(FaultKind.REMOTE, 600, 900)),
          "remote cluster dead, too much for the rest": (0.5, Fault(FaultKind.REMOTE, 600, 900)),
          "link blackholed": (0.2, Fault(FaultKind.LINK, 600, 900)),
          "link at half rate": (0.5, Fault(FaultKind.LINK, 600, 900, speed=0.5)),
          "local prefill engine restarts": (0.5, Fault(FaultKind.PREFILL, 600, 660)),
          "decode engine restarts": (0.5, Fault(FaultKind.DECODE, 600, 660))}
"""Each with the share of the plan's rate at which it strikes."""


def faults(case: CaseStudy, count: int, seed: int, deadline_s: float,
           keep: dict[str, tuple[np.ndarray, np.ndarray]]) -> Iterator[Row]:
    """Yield what becomes of the requests when something breaks."""
    given = replace(case.remote_prefill, link=Link(10.0))
    coded = Kvwire.wire_of(given)
    plan = solve(coded)
    for name, (load, fault) in FAULTS.items():
        trace = generator.cold_trace(given.lengths, count, load * plan.lambda_max_rps, seed)
        simulation = Simulation(trace, given, plan.prefill_nodes, Kvwire(coded, plan),
                                deadline_s=deadline_s)
        plan_faults(simulation, [fault])
        records = simulation.run()
        times_s = times_to_first_token(simulation)
        keep[name] = trace.arrival_s, times_s
        hit = (trace.arrival_s >= fault.begin_s) & (trace.arrival_s < fault.end_s)
        yield {"part": "faults", "fault": name, "load": load, "begin_s": fault.begin_s,
               "end_s": fault.end_s, "requests": count, "during": int(hit.sum()),
               "failed": len(records.failed), "deadline_s": deadline_s,
               "routed_again": int((np.asarray(records.attempts) > 1).sum()),
               "ttft_p90_before_s": _p90(times_s[trace.arrival_s < fault.begin_s]),
               "ttft_p90_during_s": _p90(times_s[hit]),
               "ttft_p90_after_s": _p90(times_s[trace.arrival_s >= fault.end_s + 300]),
               "leaks": simulation.leaks()}


def _p90(values: np.ndarray) -> float | None:
    return _short(np.percentile(values, 90, method="higher")) if len(values) else None


def _short(value: float) -> float | None:
    """Four digits; None for what is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
