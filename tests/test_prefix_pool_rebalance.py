"""What the rebalancer plans moves: real pools, transfers over loopback, every byte checked."""

import random

import pytest
from prefix_pool_world import BLOCK_TOKENS, SPEC, TENANT, audit, check_lease, put
from test_prefix_pool_store import hashes_of, new_store

import kvwire
from kvwire.errors import KvwireError
from kvwire.prfaas.pool.metadata import EmbeddedIndex
from kvwire.prfaas.pool.publisher import IndexObserver
from kvwire.prfaas.pool.remote_fetch import PrefixOffer, PrefixSource, fetch_prefix
from kvwire.prfaas.profiles import ModelProfile
from kvwire.prfaas.rebalance import Rebalancer
from kvwire.prfaas.router import Router, RouteRequest, Target
from kvwire.prfaas.view import ClusterView, NodeView

# Prefill a millisecond a token; so that a copy of all the cache pays after some requests.
PROFILE = ModelProfile("tiny", SPEC.row_bytes, SPEC.fixed_bytes, ((16, 0.016), (1024, 1.024)))
COPY_GBPS = SPEC.bytes(192) * 8e-9 / 0.5  # half a second for 12 blocks


class Node:
    """A store whose changes the index learns, and what brings prefixes from it and to it."""

    def __init__(self, name, index):
        self.name = name
        self.store = new_store(observer=IndexObserver(index, name))
        self.sender = kvwire.Sender(listen="127.0.0.1:0")
        self.source = PrefixSource(self.store, self.sender, deadline_s=60)
        self.receiver = kvwire.Receiver(None, connect_timeout_s=30.0)

    def close(self):
        self.source.close()
        self.sender.close()
        self.receiver.close()
        assert self.store.pool.stats().holds == self.store.pool.stats().reserved_blocks == 0
        audit(self.store.pool)


class Gateway:
    """Routes to three nodes of the local cluster, and has made what the rebalancer asks for."""

    def __init__(self):
        self.index = EmbeddedIndex()
        self.nodes = {name: Node(name, self.index) for name in ("local/0", "local/1", "local/2")}
        self.router = Router(self.index, BLOCK_TOKENS, PROFILE, PROFILE)
        self.rebalancer = Rebalancer(self.index, BLOCK_TOKENS, {Target.LOCAL: PROFILE}, COPY_GBPS)

    def route(self, request, busy=()):
        """Return the decision, and the copy that it made due; the nodes `busy` have long queues."""
        nodes = [NodeView(name, 60.0 * (name in busy)) for name in self.nodes]
        decision = self.router.route(request, ClusterView(remote=(), local=nodes,
                                                          threshold_tokens=1e9))
        return decision, self.rebalancer.note(0.0, request, decision)

    def until_copy(self, request, busy):
        """Send the request again and again until a copy is due."""
        for count in range(1, 1000):
            decision, copy = self.route(request, busy)
            if copy is not None:
                return count, decision, copy
        raise AssertionError("no copy was ever due")

    def make(self, copy):
        """Make the copy; its lease, every byte of which is right."""
        source, target = self.nodes[copy.source], self.nodes[copy.target]
        offer = source.source.offer(copy.block_hashes, copy.tenant_key)
        try:
            lease = fetch_prefix(target.store, target.receiver, copy.block_hashes,
                                 copy.tenant_key, PrefixOffer.from_json(offer.to_json()))
        finally:
            self.rebalancer.done(copy)
        check_lease(target.store, list(copy.block_hashes), lease)
        return lease

    def close(self):
        for node in self.nodes.values():
            node.close()


@pytest.fixture
def gateway():
    made = Gateway()
    yield made
    made.close()


def asked(hashes):
    return RouteRequest(len(hashes) * BLOCK_TOKENS + 5, hashes, TENANT)


def test_what_was_planned_has_moved_and_is_used(gateway):
    hashes = hashes_of(1, 12)
    put(gateway.nodes["local/0"].store, hashes).release()
    count, before, copy = gateway.until_copy(asked(hashes), busy=("local/0",))
    assert before.cached_tokens == 0 and copy.target == before.node != "local/0"
    assert count == 3, "each prefill of 192 tokens too many takes 0.19 s, a copy half a second"
    assert (copy.source, list(copy.block_hashes)) == ("local/0", hashes)
    with gateway.make(copy) as lease:
        assert lease.blocks == 12
    held = gateway.index.match(TENANT, hashes)
    assert held[copy.target] == held["local/0"] and len(held) == 2
    after, again = gateway.route(asked(hashes), busy=("local/0",))
    assert (after.node, after.cached_tokens, again) == (copy.target, 192, None)
    received = gateway.nodes[copy.target].receiver.stats()["bytes_received"]
    assert SPEC.bytes(192) <= received <= SPEC.bytes(192) + 16_384  # frames, manifests, greetings


def test_only_what_the_target_lacks_travels(gateway):
    hashes = hashes_of(2, 12)
    put(gateway.nodes["local/0"].store, hashes).release()
    for name in ("local/1", "local/2"):
        put(gateway.nodes[name].store, hashes[:8]).release()
    _, decision, copy = gateway.until_copy(asked(hashes), busy=("local/0",))
    assert decision.cached_tokens == 128
    with gateway.make(copy) as lease:
        assert lease.blocks == 12
    least = SPEC.bytes(192) - 128 * SPEC.row_bytes
    received = gateway.nodes[copy.target].receiver.stats()["bytes_received"]
    assert least <= received <= least + 16_384


def test_many_hot_prefixes_all_move_where_they_are_asked_for(gateway):
    """Hot ones of three nodes, asked for in any order while their nodes are busy."""
    rng, hot = random.Random(5), {}
    for number in range(6):
        hashes, home = hashes_of(100 + number, 6), f"local/{number % 3}"
        put(gateway.nodes[home].store, hashes).release()
        hot[home, number] = hashes
    made = []
    for _ in range(200):
        (home, _), hashes = rng.choice(list(hot.items()))
        _, copy = gateway.route(asked(hashes), busy=(home,))
        if copy is not None:
            gateway.make(copy).release()
            made.append((copy.target, copy.block_hashes[-1]))
    assert len(made) == len(set(made)) >= len(hot), "nothing is copied twice"
    for (home, _), hashes in hot.items():
        decision, copy = gateway.route(asked(hashes), busy=(home,))
        assert decision.node != home and decision.cached_tokens == 96 and copy is None


def test_a_source_that_is_gone_costs_the_copy_alone(gateway):
    hashes = hashes_of(3, 12)
    put(gateway.nodes["local/0"].store, hashes).release()
    _, _, copy = gateway.until_copy(asked(hashes), busy=("local/0",))
    target = gateway.nodes[copy.target]
    offer = gateway.nodes["local/0"].source.offer(hashes, TENANT)
    gateway.nodes["local/0"].source.close()
    with pytest.raises(KvwireError):
        fetch_prefix(target.store, target.receiver, hashes, TENANT, offer, deadline_s=5)
    assert target.name not in gateway.index.match(TENANT, hashes)
    assert gateway.route(asked(hashes), busy=("local/0",))[1] is None, "not while it is being made"
    gateway.rebalancer.done(copy)
    _, _, again = gateway.until_copy(asked(hashes), busy=("local/0",))
    assert again[:4] == copy[:4]
    with gateway.make(again) as lease:
        assert lease.blocks == 12
