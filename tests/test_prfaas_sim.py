"""The simulator: its clock, its link, its nodes, and that it agrees with the closed form."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwire.errors import InternalError, UsageError
from kvwire.prfaas.conversion import ConversionSettings
from kvwire.prfaas.lengths import TruncatedLognormal
from kvwire.prfaas.profiles import ModelProfile
from kvwire.prfaas.simulator import generator
from kvwire.prfaas.simulator.caches import ClusterCache
from kvwire.prfaas.simulator.events import EventQueue
from kvwire.prfaas.simulator.faults import Fault, FaultKind, plan_faults
from kvwire.prfaas.simulator.links import FluidLink, Transfer, pieces_of
from kvwire.prfaas.simulator.nodes import Stage
from kvwire.prfaas.simulator.policies import Kvwire, OneSided, Published
from kvwire.prfaas.simulator.report import bearable_rate, summarise, times_to_first_token
from kvwire.prfaas.simulator.simulation import Simulation
from kvwire.prfaas.simulator.traces import Trace
from kvwire.prfaas.throughput import (
    Deployment, Link, LocalCluster, PrefillCluster, evaluate, solve,
)

LENGTHS = TruncatedLognormal(9.9, 1.0, 128, 131_072)
FAST = ModelProfile("fast", 17_280, 182_000_000, ((1024, 0.44), (8192, 0.72), (32_768, 1.84),
                                                  (131_072, 7.4)))
DEPLOYMENT = Deployment("case", LENGTHS, 1024, LocalCluster(8, FAST.slower("slow", 2.7), 20, 0.025),
                        PrefillCluster(4, FAST), Link(100))
PLAN = evaluate(DEPLOYMENT, 19_400, 3)


def requests(arrival_s, tokens, output_tokens=10):
    count = len(arrival_s)
    return Trace(np.array(arrival_s, float), np.array(tokens, np.int64),
                 np.full(count, output_tokens, np.int64))


def simulate(trace, policy, deployment=DEPLOYMENT, prefill_nodes=3, **more):
    simulation = Simulation(trace, deployment, prefill_nodes, policy, **more)
    simulation.run()
    assert simulation.leaks() == []
    return simulation


# ---- the clock

def test_calls_come_by_time_and_at_one_instant_in_the_order_asked_for():
    queue, seen = EventQueue(), []
    for time_s, name in ((2.0, "c"), (1.0, "a"), (2.0, "d"), (1.0, "b")):
        queue.at(time_s, seen.append, name)
    queue.run(until_s=1.5)
    assert seen == ["a", "b"] and queue.now_s == 1.0 and len(queue) == 2
    queue.run()
    assert seen == ["a", "b", "c", "d"] and queue.call_count == 4


@pytest.mark.parametrize("time_s", [0.5, math.nan])
def test_a_call_in_the_past_is_a_bug(time_s):
    queue = EventQueue()
    queue.at(1.0, lambda _: None)
    queue.run()
    with pytest.raises(InternalError, match="1.0 s"):
        queue.at(time_s, print)


# ---- the link

class World:
    def __init__(self, gbps=8e-9, **more):
        self.queue, self.arrived = EventQueue(), {}
        self.link = FluidLink(self.queue, Link(gbps, rtt_s=more.pop("rtt_s", 0.0)), **more)

    def transfer(self, name):
        return Transfer(self.link, name, lambda name: self.arrived.update({name: self.queue.now_s}))

    def send(self, at_s, transfer, count, last=True):
        self.queue.at(at_s, lambda _: self.link.send(transfer, count, last))


def test_transfers_share_the_rate_evenly():
    world = World()  # 1 byte a second
    world.send(0, world.transfer("long"), 10)
    world.send(2, world.transfer("short"), 3)
    world.queue.run()
    # Alone to 2 s, then half each: the short one ends at 8 s, the long one has 5 bytes left.
    assert world.arrived == {"short": pytest.approx(8), "long": pytest.approx(13)}
    assert world.link.delivered_bytes == pytest.approx(13) and world.link.active_count == 0


def test_a_transfer_goes_no_faster_than_its_lanes_and_arrives_half_a_round_trip_later():
    world = World(gbps=8.0, lane_count=2, lane_gbps_max=1.0, rtt_s=0.04)
    world.send(0, world.transfer("one"), 1e9)  # 8 Gbit over 2 of the link's 8 Gbit/s
    world.queue.run()
    assert world.arrived["one"] == pytest.approx(4.02)


def test_pieces_arrive_only_when_the_last_one_has():
    world = World()
    transfer = world.transfer("one")
    world.send(0, transfer, 1, last=False)
    world.send(5, transfer, 2, last=False)
    world.send(6, transfer, 3)
    world.queue.run()
    assert world.arrived == {"one": pytest.approx(10)}


def test_a_cancelled_transfer_leaves_the_rate_to_the_others():
    world = World()
    one, two = world.transfer("one"), world.transfer("two")
    world.send(0, one, 10)
    world.send(0, two, 10)
    world.queue.at(4, lambda _: world.link.cancel(two))
    world.queue.run()
    assert world.arrived == {"one": pytest.approx(12)}
    world.link.send(two, 5)  # nothing comes of it
    assert world.link.active_count == 0


def test_a_blackhole_holds_everything_until_it_is_over():
    world = World()
    world.send(0, world.transfer("one"), 4)
    world.queue.at(1, lambda _: world.link.set_speed(0.0))
    world.queue.run()
    assert not world.arrived and world.link.queued_bytes == pytest.approx(3)
    world.queue.at(11, lambda _: world.link.set_speed(0.5))
    world.queue.run()
    assert world.arrived == {"one": pytest.approx(17)}


def test_bytes_after_the_last_ones_are_a_bug():
    world = World()
    transfer = world.transfer("one")
    world.link.send(transfer, 1, last=True)
    with pytest.raises(InternalError):
        world.link.send(transfer, 1)


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 20)), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_link_serves_as_a_slow_model_of_it_does(sizes):
    """The readable model: steps of time in which all active transfers get the same."""
    world = World()
    for number, (at_s, count) in enumerate(sizes):
        world.send(at_s, world.transfer(number), count)
    world.queue.run()
    left = {number: count for number, (_, count) in enumerate(sizes)}
    ends, now_s = {}, 0.0
    while left:
        active = [number for number in left if sizes[number][0] <= now_s + 1e-12]
        due = [sizes[number][0] for number in left if sizes[number][0] > now_s + 1e-12]
        if not active:
            now_s = min(due)
            continue
        step_s = min([left[number] * len(active) for number in active]
                     + [at_s - now_s for at_s in due])
        now_s += step_s
        for number in active:
            left[number] -= step_s / len(active)
            if left[number] <= 1e-9:
                ends[number] = now_s
                del left[number]
    assert world.arrived == {number: pytest.approx(end_s, abs=1e-5)
                             for number, end_s in ends.items()}


def test_pieces_are_all_of_the_bytes_none_before_it_was_made():
    pieces = pieces_of(10.0, 18.0)
    assert sum(share for _, share in pieces) == 1 and pieces[-1][0] == 18.0
    made = 0.0
    for time_s, share in pieces:
        made += share
        assert made <= (time_s - 10.0) / 8.0 + 1e-12


# ---- one request, by hand

def test_a_local_request_alone_takes_its_prefill_and_one_step():
    simulation = simulate(requests([0, 50], [8192, 8192]), OneSided(remote=False))
    expected = DEPLOYMENT.local.profile.prefill_s(8192) + 0.025
    assert times_to_first_token(simulation) == pytest.approx(expected)
    assert simulation.records.done_s[0] == pytest.approx(expected - 0.025 + 10 * 0.025)


def test_a_remote_request_alone_adds_a_round_trip_and_what_follows_the_prefill():
    deployment = replace(DEPLOYMENT, link=Link(10.0, rtt_s=0.03))
    simulation = simulate(requests([0, 50], [32_768, 32_768]), OneSided(remote=True), deployment)
    rest_bytes = 182_000_000 + 17_280 * 32_768 / 8  # the states and the last piece of KV
    expected = 1.84 + 0.03 + rest_bytes * 8 / 10e9 + 0.025
    assert times_to_first_token(simulation) == pytest.approx(expected, rel=1e-6)
    assert simulation.link.delivered_bytes == pytest.approx(2 * FAST.cache_bytes(32_768))


def test_few_slow_lanes_hold_up_what_follows_the_prefill():
    trace = requests([0, 50], [32_768, 32_768])
    times = [times_to_first_token(simulate(trace, OneSided(remote=True), lane_count=2,
                                           lane_gbps_max=gbps))[0] for gbps in (50.0, 2.5)]
    tail_bytes = 182_000_000 + 17_280 * 32_768 / 8
    assert times[1] - times[0] == pytest.approx(tail_bytes * 8 / 5e9 - tail_bytes * 8 / 100e9,
                                                rel=1e-6)


def test_requests_wait_for_slots_in_order():
    local = replace(DEPLOYMENT.local, nodes=2, batch_max=1)
    deployment = replace(DEPLOYMENT, local=local, prfaas=None, link=None)
    trace = requests([0, 0.001, 0.002], [1024] * 3, output_tokens=1000)
    simulation = simulate(trace, OneSided(remote=False), deployment, prefill_nodes=1)
    first_s = np.asarray(simulation.records.first_token_s)
    assert np.diff(first_s) == pytest.approx(25.0)


def test_a_run_is_a_function_of_its_inputs():
    trace = generator.cold_trace(LENGTHS, 400, 3.0, seed=5)
    coded = Kvwire.wire_of(DEPLOYMENT)
    times = [times_to_first_token(simulate(trace, Kvwire(coded, solve(coded)))).tolist()
             for _ in range(2)]
    assert times[0] == times[1]


# ---- the closed form

@pytest.mark.parametrize("gbps", [100.0, 10.0])
def test_stages_are_as_busy_as_equations_3_to_6_say(gbps):
    deployment = replace(DEPLOYMENT, link=Link(gbps))
    plan = evaluate(deployment, 19_400, 3)
    rate, p = 0.7 * plan.lambda_max_rps, plan.offloaded_share
    found = summarise(simulate(generator.cold_trace(LENGTHS, 6000, rate, 3),
                               Published(plan, stepping=False), deployment))
    assert found.done_rps == pytest.approx(rate, rel=0.05)
    assert found.remote_utilisation == pytest.approx(rate * p * plan.remote_prefill_s / 4, rel=0.08)
    assert found.prefill_utilisation == pytest.approx(
        rate * (1 - p) * plan.local_prefill_s / 3, rel=0.08)
    assert found.decode_utilisation == pytest.approx(rate / plan.theta_decode_rps, rel=0.05)
    assert found.link_utilisation == pytest.approx(0.7 * plan.link_utilisation, rel=0.08)


def test_overloaded_stages_serve_what_equations_3_to_5_say():
    p = PLAN.offloaded_share
    much = 1.5 * max(PLAN.theta_prfaas_rps / p, PLAN.theta_prefill_rps / (1 - p))
    trace = generator.cold_trace(LENGTHS, 6000, much, 3)
    found = summarise(simulate(trace, Published(PLAN, stepping=False)))
    assert found.remote_rps == pytest.approx(PLAN.theta_prfaas_rps, rel=0.05)
    assert found.local_rps == pytest.approx(PLAN.theta_prefill_rps, rel=0.05)
    starved = replace(DEPLOYMENT, local=replace(DEPLOYMENT.local, nodes=4))
    found = summarise(simulate(trace, Published(evaluate(starved, 19_400, 3), stepping=False),
                               starved))
    assert found.first_token_rps == pytest.approx(20 / 25.6, rel=0.05)


# ---- policies

def test_a_narrow_link_bears_more_with_kvwire_than_as_published():
    deployment = replace(DEPLOYMENT, link=Link(7.0))
    coded = Kvwire.wire_of(deployment)
    plan, coded_plan = solve(deployment), solve(coded)
    trace = generator.cold_trace(LENGTHS, 3000, 0.8 * plan.lambda_max_rps, 3)
    published = summarise(simulate(trace, Published(plan), deployment, plan.prefill_nodes))
    ours = summarise(simulate(trace, Kvwire(coded, coded_plan), deployment,
                              coded_plan.prefill_nodes))
    assert ours.ttft_p90_s < 0.9 * published.ttft_p90_s
    assert "link" in plan.bound_by


def test_prefixes_are_found_again_held_and_given_back():
    trace = generator.session_trace(generator.CONVERSATION, 800, 3.4, 2).spread(2)
    share = trace.statistics().reused_block_share
    coded = Kvwire.wire_of(DEPLOYMENT)
    for policy in (Published(PLAN), Kvwire(coded, PLAN)):
        caches = [ClusterCache.of_bytes(FAST, 50e12, 512, cost_aware=policy.name == "kvwire")
                  for _ in range(2)]
        simulation = simulate(trace, policy, remote_cache=caches[0], local_cache=caches[1],
                              warm_up_share=0.0)
        found = summarise(simulation)
        assert 0.6 * share < found.cached_share <= share + 0.02
        for cache in caches:
            stats = cache.pools[0].stats()
            assert stats.holds == stats.reserved_blocks == stats.transfer_blocks == 0
            assert stats.kv_blocks > 0


def test_a_cached_prefix_does_not_travel_again_but_the_states_do():
    keys = np.arange(64)
    trace = Trace(np.array([0.0, 100.0]), np.array([32_768, 32_768]), np.array([5, 5]),
                  np.concatenate((keys, keys)), np.array([0, 64, 128]))
    caches = [ClusterCache.of_bytes(FAST, 50e12, 512, cost_aware=False) for _ in range(2)]
    simulation = simulate(trace, OneSided(remote=True), remote_cache=caches[0],
                          local_cache=caches[1])
    assert list(simulation.records.cached_tokens) == [0, 32_767]
    assert simulation.link.delivered_bytes == pytest.approx(
        FAST.cache_bytes(32_768) + FAST.state_bytes)


def test_the_bearable_rate_is_found_between_its_bounds():
    class Found:
        def __init__(self, ttft_p90_s):
            self.ttft_p90_s = ttft_p90_s

    rate, found = bearable_rate(lambda rate: Found(rate), 1.0, 100.0, 7.0, steps=12)
    assert rate == pytest.approx(7.0, rel=0.01) and found.ttft_p90_s <= 7.0
    assert bearable_rate(lambda rate: Found(9.0), 1.0, 100.0, 7.0)[0] == 0.0


def test_a_trace_with_nothing_to_look_at_is_refused():
    with pytest.raises(UsageError, match="nothing to look at"):
        Simulation(requests([0], [1024]), DEPLOYMENT, 3, OneSided(remote=False))
    with pytest.raises(UsageError, match="one instant"):
        summarise(simulate(requests([0, 0, 0], [1024] * 3), OneSided(remote=False)))


def test_stages_end_where_nothing_is_held():
    assert max(Stage) is Stage.FAILED


# ---- nodes that change their roles

class Converting(OneSided):
    """All local; every ten seconds one node changes its role, to and fro."""

    def __init__(self, steps):
        super().__init__(remote=False)
        self.interval_s, self._steps, self.begun = 10.0, list(steps), []

    def attach(self, simulation):
        super().attach(simulation)
        self._simulation = simulation

    def tick(self):
        if self._steps:
            self.begun.append(self._simulation.convert(self._steps.pop(0)))


LOCAL = replace(DEPLOYMENT, prfaas=None, link=None)


def test_a_node_drains_changes_and_serves_in_its_new_role():
    trace = requests(np.arange(200) * 0.5, [20_000] * 200, 400)
    policy = Converting([1, 1, -1])
    simulation = simulate(trace, policy, LOCAL, 3, conversion_s=7.0)
    assert policy.begun[0] and len(simulation.conversions) == sum(policy.begun) >= 2
    for begin_s, end_s, _ in simulation.conversions:
        assert end_s - begin_s >= 7.0
    assert sum(step for _, _, step in simulation.conversions) == simulation.prefill_nodes - 3
    assert sum(simulation.local.open) == simulation.prefill_nodes
    assert sum(simulation.decode.open) == 8 - simulation.prefill_nodes
    assert not simulation.records.failed and not np.isnan(simulation.records.done_s).any()


def test_what_a_draining_node_has_is_finished_first():
    """A prefill of 20 s and a decode of 10 s hold their nodes; a second change waits for none."""
    trace = requests([0.0, 0.0, 40.0], [150_000, 150_000, 1000], 400)
    policy = Converting([-1, -1])
    deployment = replace(LOCAL, local=replace(LOCAL.local, nodes=3))
    simulation = simulate(trace, policy, deployment, 2, conversion_s=5.0)
    (begin_s, end_s, step), = simulation.conversions
    assert policy.begun == [True, False] and (begin_s, step) == (10.0, -1)
    prefill_s = LOCAL.local.profile.prefill_s(150_000)
    assert end_s == pytest.approx(max(prefill_s, 10.0) + 5.0)


def test_roles_stay_without_a_time_to_change_them_and_where_one_node_is_left():
    trace = requests(np.arange(50) * 1.0, [1000] * 50)
    fixed = Converting([1, -1])
    simulate(trace, fixed, LOCAL, 3)
    assert fixed.begun == [False, False]
    last = Converting([1, -1])
    simulate(trace, last, replace(LOCAL, local=replace(LOCAL.local, nodes=2)), 1, conversion_s=1.0)
    assert last.begun == [False, False]


@pytest.mark.parametrize("kind", [FaultKind.PREFILL, FaultKind.DECODE])
def test_a_node_that_restarts_while_it_drains_changes_all_the_same(kind):
    trace = requests(np.arange(200) * 0.5, [20_000] * 200, 400)
    simulation = Simulation(trace, LOCAL, 3, Converting([-1 if kind is FaultKind.PREFILL else 1]),
                            conversion_s=5.0)
    faults = [Fault(kind, 11.0, 30.0, node) for node in range(8)]
    plan_faults(simulation, faults)
    simulation.run()
    assert simulation.leaks() == [] and len(simulation.conversions) == 1
    assert not simulation.records.failed


def test_the_planner_converts_when_requests_change():
    """Prompts become short, so that decode is short of nodes: one changes and the wait ends."""
    short = replace(DEPLOYMENT, lengths=TruncatedLognormal(8.0, 1.0, 128, 131_072))
    trace = generator.cold_trace(short.lengths, 8000, 4.3, 1, 1024)
    planned, quick = solve(DEPLOYMENT), ConversionSettings(cooldown_s=300.0)
    times_s = {}
    for conversion_s in (None, 20.0):
        policy = Kvwire(DEPLOYMENT, planned, revise_s=60.0, conversion=quick)
        simulation = simulate(trace, policy, DEPLOYMENT, planned.prefill_nodes,
                              conversion_s=conversion_s)
        times_s[conversion_s] = times_to_first_token(simulation)[-2000:]
        summary = summarise(simulation)
        assert 0 < summary.decode_utilisation < 1.001 and 0 < summary.prefill_utilisation < 1
    assert {step for _, _, step in simulation.conversions} == {-1}
    assert np.percentile(times_s[20.0], 90) < 0.2 * np.percentile(times_s[None], 90)
