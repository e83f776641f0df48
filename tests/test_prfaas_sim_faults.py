"""Whatever breaks, every request is served or fails by its deadline, and nothing stays held."""

import math
from dataclasses import replace

import numpy as np
import pytest

from kvwire.errors import UsageError
from kvwire.prfaas.lengths import TruncatedLognormal
from kvwire.prfaas.profiles import ModelProfile
from kvwire.prfaas.simulator import generator
from kvwire.prfaas.simulator.caches import ClusterCache
from kvwire.prfaas.simulator.faults import Fault, FaultKind, plan_faults
from kvwire.prfaas.simulator.policies import Kvwire, OneSided, Published
from kvwire.prfaas.simulator.report import times_to_first_token
from kvwire.prfaas.simulator.simulation import Simulation
from kvwire.prfaas.throughput import Deployment, Link, LocalCluster, PrefillCluster, solve

LENGTHS = TruncatedLognormal(9.9, 1.0, 128, 131_072)
FAST = ModelProfile("fast", 17_280, 182_000_000, ((1024, 0.44), (8192, 0.72), (32_768, 1.84),
                                                  (131_072, 7.4)))
DEPLOYMENT = Deployment("case", LENGTHS, 256, LocalCluster(8, FAST.slower("slow", 2.7), 20, 0.025),
                        PrefillCluster(4, FAST), Link(10, rtt_s=0.02))
CODED = Kvwire.wire_of(DEPLOYMENT)
PLAN = solve(DEPLOYMENT)
DEADLINE_S = 60.0

POLICIES = {"published": lambda: Published(PLAN), "kvwire": lambda: Kvwire(CODED, PLAN),
            "naive": lambda: OneSided(remote=True), "homogeneous": lambda: OneSided(remote=False)}
FAULTS = {"remote dead": [Fault(FaultKind.REMOTE, 100, 160)],
          "remote dead for less than it takes to see": [Fault(FaultKind.REMOTE, 100, 101)],
          "link blackholed": [Fault(FaultKind.LINK, 100, 160)],
          "link slow": [Fault(FaultKind.LINK, 100, 160, speed=0.3)],
          "link flapping": [Fault(FaultKind.LINK, at_s, at_s + 5) for at_s in range(80, 200, 12)],
          "prefill restarts": [Fault(FaultKind.PREFILL, 100, 130, node=1)],
          "remote prefill restarts": [Fault(FaultKind.REMOTE_PREFILL, 100, 130, node=2)],
          "decode restarts": [Fault(FaultKind.DECODE, 100, 130, node=0)],
          "all at once": [Fault(kind, 100, 140) for kind in FaultKind]}


def build(policy, trace, pools=False, deadline_s=DEADLINE_S, deployment=DEPLOYMENT):
    caches = [None, None]
    if pools:
        caches = [ClusterCache.of_bytes(FAST, 3e11, 512, cost_aware=policy == "kvwire")
                  for _ in range(2)]
    return Simulation(trace, deployment, PLAN.prefill_nodes, POLICIES[policy](),
                      remote_cache=caches[0], local_cache=caches[1], deadline_s=deadline_s)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_served_or_fails_in_time_and_nothing_is_held(policy, fault):
    trace = generator.session_trace(generator.CONVERSATION, 500, 2.0, 3).spread(3)
    simulation = build(policy, trace, pools=True)
    plan_faults(simulation, FAULTS[fault])
    records = simulation.run()
    times_s = times_to_first_token(simulation)
    assert simulation.leaks() == [] and not simulation.busy
    # A deadline is for a place in decode; the step that makes the token follows.
    assert times_s[np.isfinite(times_s)].max() <= DEADLINE_S + 0.025 + 1e-9
    for index in range(len(trace)):
        ended = not math.isnan(records.done_s[index])
        assert ended != (index in records.failed), "served and failed, or neither"
    assert set(records.failed.values()) <= {"deadline", "attempts"}
    for cache in (simulation.remote_cache, simulation.local_cache):
        stats = cache.pools[0].stats()
        assert stats.holds == stats.reserved_blocks == stats.transfer_blocks == 0


@pytest.mark.parametrize("policy", ["published", "kvwire"])
@pytest.mark.parametrize("kind", [FaultKind.REMOTE, FaultKind.LINK])
def test_what_was_offloaded_falls_back_and_comes_back_when_it_is_over(policy, kind):
    trace = generator.cold_trace(LENGTHS, 400, 0.4, 3)
    simulation = build(policy, trace, deadline_s=math.inf)
    plan_faults(simulation, [Fault(kind, 200, 500)])
    records = simulation.run()
    remote = np.asarray(records.remote, bool)
    during = (trace.arrival_s > 203) & (trace.arrival_s < 470)
    assert not records.failed and not remote[during].any()
    assert remote[trace.arrival_s < 190].any() and remote[trace.arrival_s > 600].any()
    assert simulation.leaks() == []


def test_without_another_place_to_go_requests_wait_and_then_fail_by_their_deadline():
    trace = generator.cold_trace(LENGTHS, 200, 1.0, 3)
    simulation = build("naive", trace)
    plan_faults(simulation, [Fault(FaultKind.REMOTE, 50, 150)])
    records = simulation.run()
    failed = np.zeros(len(trace), bool)
    failed[list(records.failed)] = True
    assert failed[(trace.arrival_s > 55) & (trace.arrival_s < 85)].all()
    assert not failed[trace.arrival_s > 160].any() and simulation.leaks() == []


def test_a_restarted_decode_engine_costs_a_new_prefill_but_no_answer():
    trace = generator.cold_trace(LENGTHS, 200, 1.0, 3, output_tokens=1024)
    lost = build("kvwire", trace, deadline_s=math.inf)
    plan_faults(lost, [Fault(FaultKind.DECODE, 100, 110, node=0)])
    records, before = lost.run(), build("kvwire", trace, deadline_s=math.inf).run()
    again = [index for index, attempts in enumerate(records.attempts) if attempts > 1]
    assert again and not records.failed
    for index in again:
        assert records.done_s[index] > before.done_s[index] + 2.0  # noticed only after detect_s
        assert records.first_token_s[index] == pytest.approx(before.first_token_s[index])


def test_a_request_is_given_up_after_its_last_attempt():
    trace = generator.cold_trace(LENGTHS, 60, 1.0, 3, output_tokens=40_000)
    simulation = build("homogeneous", trace, deadline_s=math.inf)
    nodes = simulation.decode.node_count
    plan_faults(simulation, [Fault(FaultKind.DECODE, at_s, at_s + 1, node=node)
                             for at_s in range(200, 1800, 200) for node in range(nodes)])
    records = simulation.run()
    assert "attempts" in records.failed.values() and simulation.leaks() == []


@pytest.mark.parametrize("make, text", [
    (lambda: Fault(FaultKind.LINK, 5, 5), "stretch of time"),
    (lambda: Fault(FaultKind.LINK, -1, 5), "stretch of time"),
    (lambda: Fault(FaultKind.LINK, 1, 5, speed=-1), "below 0"),
    (lambda: plan_faults(build("published", generator.cold_trace(LENGTHS, 5, 1.0, 1)),
                         [Fault(FaultKind.DECODE, 1, 2, node=99)]), "no such thing"),
    (lambda: plan_faults(build("homogeneous", generator.cold_trace(LENGTHS, 5, 1.0, 1),
                               deployment=replace(DEPLOYMENT, prfaas=None, link=None)),
                         [Fault(FaultKind.REMOTE, 1, 2)]), "no such thing")])
def test_a_fault_that_cannot_be_is_refused(make, text):
    with pytest.raises(UsageError, match=text):
        make()
