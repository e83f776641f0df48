"""Which node holds what: the embedded index against a slow one, Redis that comes and goes."""

import shutil
import socket
import subprocess
import time

import pytest
from prefix_pool_world import TENANT, names
from test_prefix_pool_store import hashes_of, new_store

from hypothesis import given, settings
from hypothesis import strategies as st

from kvwire.errors import TransferError, UsageError
from kvwire.prfaas.pool.blocks import BlockGeometry, Chain
from kvwire.prfaas.pool.metadata import EmbeddedIndex, NodeMatch
from kvwire.prfaas.pool.pool import PrefixPool
from kvwire.prfaas.pool.publisher import IndexObserver, IndexPublisher

GEOMETRY = BlockGeometry(4, 100, 1)
SERVER = shutil.which("redis-server") or shutil.which("valkey-server")
WAIT_S = 60.0


def until(condition, what):
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.01)


def held(pool, hashes, tenant_key=TENANT):
    found = pool.match(hashes, tenant_key)
    return NodeMatch(found.kv_blocks, found.usable_tokens // pool.geometry.block_tokens)


# ---- embedded

PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=5)
STEPS = st.lists(st.tuples(st.sampled_from(["a/0", "a/1", "b/0"]), PATHS,
                           st.lists(st.integers(0, 4), max_size=2), st.integers(0, 6)),
                 max_size=25)


@settings(max_examples=100)
@given(steps=STEPS, asked=st.lists(PATHS, min_size=1, max_size=4), gone=st.booleans())
def test_the_index_says_what_the_pools_hold(steps, asked, gone):
    index, pools = EmbeddedIndex(), {}
    for node, path, chosen, evicted in steps:
        if node not in pools:
            pools[node] = PrefixPool(GEOMETRY, 12, observer=IndexObserver(index, node))
        pools[node].insert(names(path), TENANT,
                           checkpoints={1 + end % len(path) for end in chosen})
        pools[node].evict(evicted)
    if gone and pools:
        index.forget(next(iter(pools)))
        del pools[next(iter(pools))]
    for path in asked:
        wanted = {node: held(pool, names(path)) for node, pool in pools.items()}
        assert index.match(TENANT, names(path)) == {
            node: found for node, found in wanted.items() if found.kv_blocks}
        assert index.match(b"x" * 16, names(path)) == {}
    for pool in pools.values():
        pool.evict(12)
    assert index.block_count() == 0 and not index._tenants


def test_a_node_may_come_back_under_its_name():
    index, hashes = EmbeddedIndex(), names((1, 2))
    index.publish("a/0", Chain(TENANT, hashes[0]), hashes, hashes)
    index.forget("a/0")
    assert index.match(TENANT, hashes) == {} and index.nodes() == []
    index.publish("b/0", Chain(TENANT, hashes[0]), hashes[:1])
    index.publish("a/0", Chain(TENANT, hashes[0]), hashes, hashes[:1])
    assert index.match(TENANT, hashes) == {"a/0": (2, 1), "b/0": (1, 0)}
    with pytest.raises(UsageError, match="node"):
        index.publish("", Chain(TENANT, hashes[0]), hashes)


def test_without_states_every_block_is_usable():
    index, hashes = EmbeddedIndex(states=False), names((1, 2, 3))
    index.publish("a/0", Chain(TENANT, hashes[0]), hashes[:2])
    assert index.match(TENANT, hashes) == {"a/0": (2, 2)}


def test_a_store_is_known_for_what_it_has_on_ssd_too(tmp_path):
    index = EmbeddedIndex()
    hashes = hashes_of(1, 8)
    with new_store(tmp_path, ssd_bytes=60_000, observer=IndexObserver(index, "a/0")) as store:
        with store.write(hashes, TENANT, (3, 8)) as new:
            new.commit().release()
        store.drain()
        store.pool.evict(64)
        assert index.match(TENANT, hashes) == {"a/0": (8, 8)}
        for seed in range(2, 12):
            with store.write(hashes_of(seed, 8), TENANT) as new:
                new.commit().release()
            store.drain()
        store.pool.evict(64)
        for seed in range(1, 12):
            found = store.match(hashes_of(seed, 8), TENANT)
            said = index.match(TENANT, hashes_of(seed, 8)).get("a/0", NodeMatch(0, 0))
            assert said == (found.kv_blocks, found.usable_tokens // 16)
        assert store.match(hashes, TENANT).kv_blocks == 0, "the oldest was evicted"
        told = {name for _, some, _ in store.snapshot() for name in some}
        assert len(told) == index.block_count() > 0


# ---- Redis

class Server:
    """A real server on a port of its own, without persistence."""

    def __init__(self, folder, *arguments):
        self.port = 65535
        while self.port + 10_000 > 65535:  # in Cluster mode it listens there, too
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        self.folder, self.arguments, self.process = folder, arguments, None
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        import redis
        self.process = subprocess.Popen(
            [SERVER, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir",
             str(self.folder), "--appendonly", "no", *self.arguments], stdout=subprocess.DEVNULL)

        def answers():
            assert self.process.poll() is None, "the server did not start"
            try:
                return self.client().ping()
            except redis.ConnectionError:
                return False
        until(answers, "the server")

    def client(self):
        import redis
        return redis.Redis(port=self.port)

    def kill(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path):
    yield from started(Server(tmp_path))


@pytest.fixture
def cluster_server(tmp_path):
    for made in started(Server(tmp_path, "--cluster-enabled", "yes")):
        made.client().execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        until(lambda: made.client().cluster("INFO")["cluster_state"] == "ok", "the cluster")
        yield made


def started(server):
    if SERVER is None:
        pytest.skip("neither redis-server nor valkey-server is installed")
    pytest.importorskip("redis", reason="the package redis is not installed")
    server.start()
    yield server
    server.kill()


def redis_index(server, **options):
    from kvwire.prfaas.pool.redis_metadata import RedisIndex
    # A server that is starved of CPU is no server that is gone.
    return RedisIndex(server.url, **{"timeout_s": 10.0, "refresh_s": 0.0, **options})


def published(index, node):
    publisher = IndexPublisher(index, node, announce_s=0.1)
    pool = PrefixPool(GEOMETRY, 100, observer=publisher)
    publisher.follow(pool.snapshot)
    return pool, publisher


def same(index, pools, hashes):
    wanted = {node: held(pool, hashes) for node, pool in pools.items()}
    return index.match(TENANT, hashes) == {
        node: found for node, found in wanted.items() if found.kv_blocks}


def check_two_nodes(index):
    hashes, other = names(range(60)), names((7, 8, 9))
    (first, one), (second, two) = published(index, "a/0"), published(index, "b/0")
    pools = {"a/0": first, "b/0": second}
    with one, two:
        first.insert(hashes, TENANT, checkpoints=(20, 60))
        second.insert(hashes[:30], TENANT, checkpoints=(10,))
        first.insert(other, b"another tenant!!")
        until(lambda: one.synced() and two.synced(), "the index to be told")
        for length in (60, 59, 30, 15, 5):
            assert same(index, pools, hashes[:length])
        assert index.match(TENANT, other) == {}
        assert index.match(b"another tenant!!", other) == {"a/0": (3, 3)}
        first.evict(30)
        second.insert(hashes, TENANT)
        until(lambda: one.synced() and two.synced(), "the index to be told")
        assert same(index, pools, hashes)
    assert index.match(TENANT, hashes) == {}, "closed publishers take their nodes off"


def test_redis_says_what_the_pools_hold(server):
    index = redis_index(server)
    check_two_nodes(index)
    index.close()


def test_redis_in_cluster_mode(cluster_server):
    index = redis_index(cluster_server, cluster=True)
    check_two_nodes(index)
    index.publish("a/0", Chain(TENANT, b"h" * 16), names(range(50)))
    client = cluster_server.client()
    slots = {client.execute_command("CLUSTER", "KEYSLOT", key) for key in client.keys(
        f"kvwire:{{*{(b'h' * 16).hex()}}}*")}
    assert len(client.keys(f"kvwire:{{*{(b'h' * 16).hex()}}}*")) == 50 and len(slots) == 1
    index.close()


@pytest.mark.parametrize("loss", ["flushed", "killed and started again"])
def test_what_redis_has_lost_is_said_again(server, loss):
    index, hashes = redis_index(server), names(range(9))
    pool, publisher = published(index, "a/0")
    with publisher:
        pool.insert(hashes, TENANT)
        until(publisher.synced, "the index to be told")
        if loss == "flushed":
            server.client().flushall()
        else:
            server.kill()
            assert index.match(TENANT, hashes) == {}, "gone, and no error"
            pool.insert(names((5, 5)), TENANT)
            pool.evict(4)
            server.start()
        until(lambda: same(index, {"a/0": pool}, hashes), "the index to be rebuilt")
        assert same(index, {"a/0": pool}, names((5, 5)))
        assert publisher.said_count >= 2


def test_without_redis_requests_go_on(tmp_path):
    pytest.importorskip("redis", reason="the package redis is not installed")
    index = redis_index(Server(tmp_path))
    pool, publisher = published(index, "a/0")
    with publisher:
        for number in range(500):
            assert pool.insert(names((number % 7, number % 5, 1)), TENANT)
            assert index.match(TENANT, names((1, 1, 1))) == {}
        assert len(publisher._waiting) <= 500 and not publisher.synced()
    with pytest.raises(TransferError, match="metadata server"):
        index.publish("a/0", Chain(TENANT, b"h"), [b"h"])
    assert pool.stats().holds == 0


def test_a_node_that_died_is_forgotten_and_what_it_said_does_not_come_back(server):
    hashes, chain = names(range(5)), Chain(TENANT, names((0,))[0])
    before = redis_index(server, node_ttl_s=0.2)
    before.announce("a/0")
    before.publish("a/0", chain, hashes, hashes)
    asking = redis_index(server)
    until(lambda: asking.match(TENANT, hashes) == {}, "the node to be taken for dead")
    after = redis_index(server)
    assert after.announce("a/0") is False
    assert asking.match(TENANT, hashes) == {}
    after.publish("a/0", chain, hashes[:2])
    assert asking.match(TENANT, hashes) == {"a/0": (2, 0)}
    for index in (before, asking, after):
        index.close()


def test_what_others_write_under_the_keys_breaks_no_request(server):
    index, hashes = redis_index(server), names(range(5))
    pool, publisher = published(index, "a/0")
    with publisher:
        pool.insert(hashes, TENANT)
        until(publisher.synced, "the index to be told")
        client, key = server.client(), next(index._keys(Chain(TENANT, hashes[0]), hashes[2:3]))
        client.sadd("kvwire:nodes", b"\xff", "")
        client.hset(key, mapping={b"\xff": b"\xff", "b/0": "never announced"})
        assert same(index, {"a/0": pool}, hashes)
        client.delete(key)
        client.set(key, "no hash")
        assert index.match(TENANT, hashes) == {}, "it falls back, without an error"
        client.delete(key)
        # It may have been said again meanwhile, since the index could not be told for a moment.
        until(lambda: index.match(TENANT, hashes).get("a/0", NodeMatch(0, 0)).kv_blocks >= 2,
              "the index to be asked again")
    index.close()


def test_a_server_that_hangs_costs_the_timeout_once(server):
    index, hashes = redis_index(server, timeout_s=0.3), names(range(5))
    index.match(TENANT, hashes)
    server.client().execute_command("CLIENT", "PAUSE", 60_000)
    assert index.match(TENANT, hashes) == {}
    assert not index.available, "the next requests do not wait"
    index.close()


def test_a_bad_url_is_refused():
    pytest.importorskip("redis", reason="the package redis is not installed")
    from kvwire.prfaas.pool.redis_metadata import RedisIndex
    with pytest.raises(UsageError, match="url"):
        RedisIndex("localhost:6379")
