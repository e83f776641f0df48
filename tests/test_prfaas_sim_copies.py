"""Pools on each node, and hot prefixes copied between them by the rebalancer of production."""

from dataclasses import replace

import numpy as np
import pytest
from test_prfaas_sim import DEPLOYMENT, FAST, simulate

from kvwire.prfaas.simulator import generator
from kvwire.prfaas.simulator.caches import ClusterCache
from kvwire.prfaas.simulator.copies import Place
from kvwire.prfaas.simulator.faults import Fault, FaultKind, plan_faults
from kvwire.prfaas.simulator.policies import Choice, Kvwire, OneSided
from kvwire.prfaas.simulator.report import summarise
from kvwire.prfaas.simulator.simulation import Simulation
from kvwire.prfaas.simulator.traces import Trace
from kvwire.prfaas.throughput import Link, solve

BLOCKS, BLOCK_TOKENS = 64, 512
TOKENS = BLOCKS * BLOCK_TOKENS + 100  # the last ones are each request's own


def same_prefix(arrival_s):
    """Requests with one prompt, whose full blocks all are shared."""
    count = len(arrival_s)
    return Trace(np.array(arrival_s, float), np.full(count, TOKENS), np.full(count, 5),
                 np.tile(np.append(np.arange(BLOCKS), 10_000), count),
                 np.arange(count + 1) * (BLOCKS + 1))


def pools(capacity_bytes=50e12, block_tokens=BLOCK_TOKENS):
    return {name: ClusterCache.of_bytes(FAST, capacity_bytes, block_tokens, cost_aware=True,
                                        pool_count=count)
            for name, count in (("local_cache", 3), ("remote_cache", 4))}


class Placed(OneSided):
    """Request number i is prefilled on the i-th of these places; before it, something happens."""

    def __init__(self, places, before=lambda index, simulation: None):
        super().__init__(remote=False)
        self._places, self._before = places, before

    def choose(self, request):
        self._before(request.index, self._simulation)
        place = self._places[request.index]
        return Choice(place.remote, place.node)


LOCAL, OTHER, REMOTE = Place(False, 0), Place(False, 1), Place(True, 2)


def copying(source, target, ended):
    """Start the copy of all blocks when the second request comes."""
    def before(index, simulation):
        if index == 1:
            simulation.copies.start(simulation.trace.keys(0), source, target,
                                    lambda: ended.append(simulation.queue.now_s))
    return before


def test_a_node_has_what_it_prefilled_and_no_other_has():
    simulation = simulate(same_prefix([0, 100, 200]), Placed([LOCAL, OTHER, LOCAL]), **pools())
    assert list(simulation.records.cached_tokens) == [0, 0, BLOCKS * BLOCK_TOKENS]


def test_a_copy_takes_the_networks_time_and_is_used():
    ended = []
    simulation = simulate(same_prefix([0, 100, 200]),
                          Placed([LOCAL, LOCAL, OTHER], copying(LOCAL, OTHER, ended)),
                          network_gbps=1.0, **pools())
    wire_bytes = FAST.wire_bytes(BLOCKS * BLOCK_TOKENS)
    assert ended == [pytest.approx(100 + wire_bytes * 8e-9)]
    assert simulation.copies.count == 1 and simulation.copies.sent_bytes == wire_bytes
    assert list(simulation.records.cached_tokens)[2] == BLOCKS * BLOCK_TOKENS


def test_a_copy_that_comes_too_late_is_no_use_to_who_did_not_wait():
    simulation = simulate(same_prefix([0, 100]), Placed([LOCAL, OTHER], copying(LOCAL, OTHER, [])),
                          network_gbps=1.0, **pools())
    assert list(simulation.records.cached_tokens) == [0, 0]


def test_between_the_clusters_a_copy_shares_the_link():
    ended = []
    simulation = simulate(same_prefix([0, 100, 200]),
                          Placed([LOCAL, LOCAL, LOCAL], copying(LOCAL, REMOTE, ended)), **pools())
    assert simulation.copies.sent_bytes > 0
    assert simulation.back_link.delivered_bytes == pytest.approx(simulation.copies.sent_bytes)
    assert simulation.link.delivered_bytes == 0 and len(ended) == 1


def test_what_has_no_room_is_not_copied():
    ended = []
    caches = pools() | {"remote_cache": ClusterCache.of_bytes(
        FAST, 4e8, BLOCK_TOKENS, cost_aware=True)}
    simulation = simulate(same_prefix([0, 100]),
                          Placed([LOCAL, LOCAL], copying(LOCAL, REMOTE, ended)), **caches)
    assert simulation.copies.count == 0 and ended == [100.0]


@pytest.mark.parametrize("kind", [FaultKind.REMOTE, FaultKind.LINK])
def test_a_copy_ends_with_what_it_needs(kind):
    """One copy is on its way when the fault strikes, one is asked for before it is noticed."""
    ended = []

    def before(index, simulation):
        if index:
            simulation.copies.start(simulation.trace.keys(0), LOCAL, REMOTE,
                                    lambda: ended.append(simulation.queue.now_s))

    simulation = Simulation(same_prefix([0, 100, 101.5]), replace(DEPLOYMENT, link=Link(0.1)), 3,
                            Placed([LOCAL] * 3, before), **pools())
    plan_faults(simulation, [Fault(kind, 101, 150)])
    simulation.run()
    assert simulation.leaks() == []
    assert ended == ([101.0, 101.5] if kind is FaultKind.REMOTE else [103.0, 103.0])
    assert simulation.remote_cache.pools[2].stats().kv_blocks == 0


def test_what_arrives_from_the_other_cluster_goes_where_most_of_it_is():
    caches = pools()
    trace = same_prefix([0, 100])
    local = caches["local_cache"]
    assert local.pools[1].insert(trace.keys(0)[:10])
    assert local.home(trace.keys(0)) == 1
    simulate(trace, Placed([REMOTE, REMOTE]), **caches)
    assert [pool.stats().kv_blocks for pool in local.pools] == [0, BLOCKS, 0]


def agentic_run(rebalance):
    """Agents whose long prefixes lie on one of three nodes each, and a link that is scarce."""
    trace = generator.session_trace(generator.AGENTIC, 900, 3.0, 1).coarser(4)
    deployment = replace(DEPLOYMENT, link=Link(4.0))
    coded = Kvwire.wire_of(deployment)
    simulation = Simulation(trace.at_rate(5.0), deployment, 3,
                            Kvwire(coded, solve(coded), rebalance=rebalance),
                            **pools(4e12, trace.block_tokens))
    simulation.run()
    assert simulation.leaks() == []
    return simulation


def test_the_rebalancer_finds_copies_that_pay_and_is_deterministic():
    off, on, again = agentic_run(False), agentic_run(True), agentic_run(True)
    assert off.copies.count == 0 < on.copies.count
    assert summarise(on).cached_share > summarise(off).cached_share
    assert summarise(on).ttft_mean_s < summarise(off).ttft_mean_s
    assert list(on.records.first_token_s) == list(again.records.first_token_s)
