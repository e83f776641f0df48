"""Prefixes from another pool over real sockets: in part, whole states, or nothing."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from prefix_pool_world import TENANT, audit, check_lease, put
from test_prefix_pool_store import hashes_of, new_store

import kvwire
from kvwire.errors import KvwireError, RefusedError, UsageError
from kvwire.prfaas.pool.hashes import chain_hashes
from kvwire.prfaas.pool.remote_fetch import PrefixOffer, PrefixSource, fetch_prefix

TESTS = Path(__file__).parent


class World:
    """Two stores, and the sender and receiver between them."""

    def __init__(self, capacity_blocks=64):
        self.here, self.there = new_store(capacity_blocks=capacity_blocks), new_store()
        self.sender = kvwire.Sender(listen="127.0.0.1:0")
        self.receiver = kvwire.Receiver(None)
        self.source = PrefixSource(self.there, self.sender, deadline_s=60)

    def fetch(self, hashes, offer, **options):
        return fetch_prefix(self.here, self.receiver, hashes, TENANT, offer, **options)

    def close(self):
        self.source.close()
        self.sender.close()
        self.receiver.close()
        for store in (self.here, self.there):
            assert store.pool.stats().holds == store.pool.stats().reserved_blocks == 0
            audit(store.pool)


@pytest.fixture
def world():
    made = World()
    yield made
    made.close()


def test_only_what_is_missing_travels_and_states_whole(world):
    hashes = hashes_of(1, 12)
    put(world.there, hashes, checkpoints=(5, 12)).release()
    put(world.here, hashes[:8], checkpoints=(2,)).release()
    with world.fetch(hashes, world.source.offer(hashes, TENANT)) as lease:
        assert lease.blocks == 12
        check_lease(world.here, hashes, lease)
    geometry, spec = world.here.tier.geometry, world.here.tier.spec
    cache_bytes = 4 * geometry.block_tokens * spec.row_bytes + spec.fixed_bytes
    control_bytes = 16_384  # greetings, manifests and frames
    received = world.receiver.stats()["bytes_received"]
    assert cache_bytes <= received <= cache_bytes + control_bytes


def test_states_alone_travel_where_the_kv_is_here(world):
    hashes = hashes_of(2, 12)
    put(world.there, hashes).release()
    put(world.here, hashes, checkpoints=(2,)).release()
    with world.fetch(hashes, world.source.offer(hashes, TENANT)) as lease:
        assert lease.blocks == 12
        check_lease(world.here, hashes, lease)


def test_what_has_no_room_here_is_left_there():
    world = World(capacity_blocks=8)
    hashes = hashes_of(3, 12)
    put(world.there, hashes).release()
    with world.fetch(hashes, world.source.offer(hashes, TENANT)) as lease:
        assert lease.blocks == 0
    world.close()


def test_nothing_usable_is_no_offer(world):
    put(world.there, hashes_of(4, 3)).release()
    assert world.source.offer(hashes_of(4, 2), TENANT) is None
    assert world.there.pool.stats().holds == 0


def test_an_offer_travels_as_json():
    offer = PrefixOffer("127.0.0.1:1", "ab", "", "cd", "ef", 3, 16)
    assert PrefixOffer.from_json(offer.to_json()) == offer
    for text in ("{", "[]", "{}", offer.to_json().replace("3", '"3"'), "[" * 100_000,
                 offer.to_json().replace("3", "1e400")):
        with pytest.raises(UsageError, match="prefix offer"):
            PrefixOffer.from_json(text)


@pytest.mark.parametrize("field, value", [
    ("tenant_key", "00" * 16), ("end_hash", "00" * 16), ("blocks", 3), ("blocks", 0),
    ("blocks", 99), ("block_tokens", 32), ("state_offer", "")])
def test_an_offer_for_another_prefix_is_refused(world, field, value):
    hashes = hashes_of(5, 6)
    put(world.there, hashes).release()
    offer = world.source.offer(hashes, TENANT)
    with pytest.raises(RefusedError):
        world.fetch(hashes, dataclasses.replace(offer, **{field: value}))
    assert world.here.match(hashes, TENANT).kv_blocks == 0


def test_a_prefix_under_another_name_is_not_served(world):
    """The offer says what was asked for; what the sender holds under it is something else."""
    hashes, other = hashes_of(6, 6), hashes_of(7, 6)
    for chain in (hashes, other):
        put(world.there, chain).release()
    right, wrong = (world.source.offer(chain, TENANT) for chain in (hashes, other))
    forged = dataclasses.replace(right, kv_offer=wrong.kv_offer, state_offer=wrong.state_offer)
    with pytest.raises(KvwireError, match="another prefix"):
        world.fetch(hashes, forged)
    assert world.here.match(hashes, TENANT).kv_blocks == 0


def test_a_source_that_withdraws_leaves_nothing_here(world):
    hashes = hashes_of(8, 6)
    put(world.there, hashes).release()
    offer = world.source.offer(hashes, TENANT)
    world.source.close()
    with pytest.raises(KvwireError):
        world.fetch(hashes, offer, deadline_s=5)
    assert world.here.match(hashes, TENANT).kv_blocks == 0
    assert world.there.pool.stats().holds == 0


SOURCE = """
import os, sys
sys.path.insert(0, {tests!r})
import kvwire
from prefix_pool_world import TENANT, put
from test_prefix_pool_store import hashes_of, new_store
from kvwire.prfaas.pool.remote_fetch import PrefixSource
store = new_store()
put(store, hashes_of(9, 12)).release()
sender = kvwire.Sender(listen="127.0.0.1:0")
source = PrefixSource(store, sender)
print(source.offer(hashes_of(9, 12), TENANT).to_json(), flush=True)
if sys.stdin.readline() == "reap\\n":
    while source.reap():
        os.sched_yield()
    print(store.pool.stats().holds, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def source_process():
    process = subprocess.Popen([sys.executable, "-c", SOURCE.format(tests=str(TESTS))], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_from_another_process(source_process):
    hashes = hashes_of(9, 12)
    offer = PrefixOffer.from_json(source_process.stdout.readline())
    here = new_store()
    put(here, hashes[:3]).release()
    with kvwire.Receiver(None) as receiver:
        with fetch_prefix(here, receiver, hashes, TENANT, offer) as lease:
            assert lease.blocks == 12
            check_lease(here, hashes, lease)
        source_process.stdin.write("reap\n")
        source_process.stdin.flush()
        assert source_process.stdout.readline() == "0\n", "the source keeps nothing afterwards"
    audit(here.pool)


def test_a_dead_source_costs_its_deadline_and_leaks_nothing(source_process):
    hashes = hashes_of(9, 12)
    offer = PrefixOffer.from_json(source_process.stdout.readline())
    source_process.kill()
    source_process.wait()
    here = new_store()
    with kvwire.Receiver(None, connect_timeout_s=2.0) as receiver:
        with pytest.raises(KvwireError):
            fetch_prefix(here, receiver, hashes, TENANT, offer, deadline_s=2.0)
    assert here.match(hashes, TENANT).kv_blocks == 0
    assert here.pool.stats().free_blocks == 64 and here.pool.stats().holds == 0


def test_hashes_decide_not_the_offer():
    """A chain of another tenant for the same text has other hashes, so its offer never fits."""
    from prefix_pool_world import KEY
    other = dataclasses.replace(KEY, tenant="other")
    tokens = list(range(64))
    offer = PrefixOffer("127.0.0.1:1", "ab", "cd", other.digest().hex(),
                        chain_hashes(tokens, 16, other)[-1].hex(), 4, 16)
    with pytest.raises(RefusedError, match="another tenant"):
        fetch_prefix(new_store(), None, chain_hashes(tokens, 16, KEY), TENANT, offer)
    stolen = dataclasses.replace(offer, tenant_key=TENANT.hex())
    with pytest.raises(RefusedError, match="not a prefix"):
        fetch_prefix(new_store(), None, chain_hashes(tokens, 16, KEY), TENANT, stolen)
