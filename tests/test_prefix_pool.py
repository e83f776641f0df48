"""The accounting pool: names of prefixes, holds, eviction, and that nothing leaks."""

import random

import numpy as np
import pytest
from prefix_pool_world import KEY, TENANT, SlowPool, audit, conversations, names

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from kvwire.errors import UsageError
from kvwire.prfaas.pool.blocks import BlockGeometry, Match
from kvwire.prfaas.pool.eviction import CostAware, Lru
from kvwire.prfaas.pool.hashes import HASH_BYTES, CacheKey, chain_hashes
from kvwire.prfaas.pool.pool import PrefixPool

STATES = BlockGeometry(block_tokens=4, block_bytes=100, state_blocks=2)
PLAIN = BlockGeometry(block_tokens=4, block_bytes=100)


# ---- names

def test_hashes_name_full_blocks_and_chain():
    tokens = list(range(100, 137))
    hashes = chain_hashes(tokens, 8, KEY)
    assert len(hashes) == 4 and {len(name) for name in hashes} == {HASH_BYTES}
    assert chain_hashes(np.array(tokens, np.int64), 8, KEY) == hashes
    assert chain_hashes(tokens[:16], 8, KEY) == hashes[:2]
    assert chain_hashes(tokens[16:], 8, KEY, after=hashes[1]) == hashes[2:]
    changed = chain_hashes([*tokens[:8], 0, *tokens[9:]], 8, KEY)
    assert changed[0] == hashes[0] and not set(changed[1:]) & set(hashes)
    assert not set(chain_hashes(tokens, 4, KEY)) & set(hashes)


def test_hashes_are_what_the_module_says():
    """Pinned: two machines must agree on them, whatever version they run."""
    key = CacheKey("t", "m", b"s" * 16, b"z" * 32)
    assert key.digest().hex() == "bce6111918b437615cc67bd2946c884d"
    assert chain_hashes([1, 2, 3, 4], 2, key)[1].hex() == (
        "9f7fa102c02f380a772553d6445e2fb0")


OTHERS = [CacheKey("tenant2", "tiny", KEY.spec_fingerprint, b"tokenizer"),
          CacheKey("tenant", "tiny2", KEY.spec_fingerprint, b"tokenizer"),
          CacheKey("tenant", "tiny", b"another spec", b"tokenizer"),
          CacheKey("tenant", "tiny", KEY.spec_fingerprint, b"tokenizer 2"),
          CacheKey("tenant", "tiny", KEY.spec_fingerprint, b"tokenizer", b"adapter"),
          CacheKey("tenan", "ttiny", KEY.spec_fingerprint, b"tokenizer")]


@pytest.mark.parametrize("other", OTHERS, ids=[
    "tenant", "model", "spec", "tokenizer", "salt", "moved boundary"])
def test_another_owner_never_matches(other):
    """Neither by the hashes, nor with stolen hashes under its own key."""
    tokens = list(range(64))
    mine, theirs = chain_hashes(tokens, 4, KEY), chain_hashes(tokens, 4, other)
    assert not set(mine) & set(theirs)
    pool = PrefixPool(STATES, 100)
    assert pool.insert(mine, TENANT)
    assert pool.match(theirs, other.digest()) == Match(0, 0, 0)
    assert pool.match(mine, other.digest()) == Match(0, 0, 0)
    assert pool.lease(mine, other.digest()).tokens == 0
    with pytest.raises(UsageError, match="another tenant"):
        pool.reserve(mine, other.digest())
    assert pool.match(mine, TENANT).usable_tokens == 64


@pytest.mark.parametrize("tokens, block_tokens", [
    ([-1, 2], 1), ([1 << 32], 1), ([1.5], 1), ([[1]], 1), ([1], 0), ([1], True)])
def test_bad_tokens_are_refused(tokens, block_tokens):
    with pytest.raises(UsageError):
        chain_hashes(tokens, block_tokens, KEY)


@pytest.mark.parametrize("fields", [("", "m", b"s", b"t"), ("t", "m", "s", b"t"),
                                    ("t", "m", b"s", b"")])
def test_an_incomplete_key_is_refused(fields):
    with pytest.raises(UsageError, match="CacheKey"):
        CacheKey(*fields)


# ---- against the slow pool

PATHS = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


class PoolMachine(RuleBasedStateMachine):
    """No matter what is asked in which order, the pool does what the slow pool does."""

    state_blocks, capacity = 2, 12
    leases, reservations, transfers = Bundle("leases"), Bundle("reservations"), Bundle("transfers")

    def __init__(self):
        super().__init__()
        self.pool = PrefixPool(BlockGeometry(4, 100, self.state_blocks), self.capacity)
        self.slow = SlowPool(self.capacity, self.state_blocks)
        self.holds = 0

    def checkpoints(self, path, chosen):
        return tuple(sorted({1 + c % len(path) for c in chosen})) if self.state_blocks else ()

    @rule(path=PATHS, chosen=st.lists(st.integers(0, 5), max_size=2))
    def insert(self, path, chosen):
        ends = self.checkpoints(path, chosen)
        done = self.pool.insert(names(path), checkpoints=ends)
        reservation = self.slow.reserve(path, ends)
        assert done == (reservation is not None)
        if done:
            self.slow.release(self.slow.commit(reservation))

    @rule(target=reservations, path=PATHS, chosen=st.lists(st.integers(0, 5), max_size=2))
    def reserve(self, path, chosen):
        ends = self.checkpoints(path, chosen)
        pair = self.pool.reserve(names(path), checkpoints=ends), self.slow.reserve(path, ends)
        assert (pair[0] is None) == (pair[1] is None)
        self.holds += pair[0] is not None
        return pair

    @rule(target=leases, pair=consumes(reservations))
    def commit(self, pair):
        if pair[0] is None:
            return pair
        lease, prefix = pair[0].commit(), self.slow.commit(pair[1])
        assert lease.blocks == len(prefix)
        return lease, prefix

    @rule(pair=consumes(reservations))
    def abort(self, pair):
        if pair[0] is not None:
            self.holds -= 1
            pair[0].abort()
            pair[0].abort()
            self.slow.abort(pair[1])

    @rule(target=leases, path=PATHS)
    def lease(self, path):
        lease, prefix = self.pool.lease(names(path)), self.slow.lease(path)
        assert [block.hash for block in lease.chain()] == names(prefix)
        self.holds += 1
        return lease, prefix

    @rule(pair=consumes(leases))
    def release(self, pair):
        if pair[0] is not None:
            self.holds -= 1
            pair[0].release()
            pair[0].release()
            self.slow.release(pair[1])

    @rule(target=transfers, tokens=st.integers(0, 30), states=st.booleans())
    def transfer(self, tokens, states):
        count = -(-tokens // 4) + (self.state_blocks if states else 0)
        room = self.slow.make_room(count)
        blocks = self.pool.reserve_transfer(tokens, states=states)
        assert (blocks is not None) == room
        if room:
            self.slow.held += count
            self.holds += 1
        return blocks, count

    @rule(pair=consumes(transfers))
    def drop(self, pair):
        if pair[0] is not None:
            self.holds -= 1
            pair[0].drop()
            self.slow.held -= pair[1]

    @rule(count=st.integers(0, 5))
    def evict(self, count):
        before = self.slow.free()
        self.slow.make_room(min(before + count, self.capacity))
        assert self.pool.evict(count) == self.slow.free() - before

    @invariant()
    def holds_the_same(self):
        assert set(self.pool._index) == {names(prefix)[-1] for prefix in self.slow.blocks}
        held = {block.hash for block in self.pool._index.values() if block.state}
        assert held == {names(prefix)[-1] for prefix in self.slow.states}
        assert self.pool.stats().free_blocks == self.slow.free()
        assert self.pool.stats().holds == self.holds
        audit(self.pool)

    @rule(path=PATHS)
    def match(self, path):
        found = self.pool.match(names(path))
        assert found == (self.slow.deepest(path), 4 * self.slow.usable(path),
                         4 * self.slow.usable(path))


class PlainMachine(PoolMachine):
    """The same for a model without states."""

    state_blocks = 0


machine_settings = settings(max_examples=40, stateful_step_count=25)
TestPool = PoolMachine.TestCase
TestPool.settings = machine_settings
TestPlainPool = PlainMachine.TestCase
TestPlainPool.settings = machine_settings


# ---- holds

def test_states_match_at_exactly_their_length():
    pool, path = PrefixPool(STATES, 100), names(range(10))
    assert pool.insert(path, checkpoints=(4, 9))
    assert pool.match(path) == Match(10, 36, 36)
    assert pool.match(path[:8]) == Match(8, 16, 16)
    assert pool.match(path[:3]) == Match(3, 0, 0)
    assert pool.match([]) == pool.match(names((7, 7))) == Match(0, 0, 0)


def test_what_is_reserved_cannot_be_matched():
    pool, path = PrefixPool(STATES, 100), names(range(5))
    reservation = pool.reserve(path)
    assert pool.match(path).kv_blocks == 0
    reservation.commit().release()
    assert pool.match(path).usable_tokens == 20
    with pytest.raises(UsageError, match="committed"):
        reservation.commit()


def test_two_reservations_of_one_prefix_make_one():
    pool, path = PrefixPool(STATES, 100), names(range(5))
    first, second = pool.reserve(path), pool.reserve(path)
    first.commit().release()
    second.commit().release()
    assert pool.stats().kv_blocks == 5 and pool.stats().free_blocks == 100 - 5 - 2
    audit(pool)


def test_hashes_that_are_no_chain_are_refused_and_nothing_leaks():
    pool = PrefixPool(STATES, 100)
    good, other = names((1, 2, 3)), names((2, 2, 3))
    assert pool.insert(good)
    with pytest.raises(UsageError, match="no chain"):
        pool.insert([other[0], good[1]])
    with pytest.raises(UsageError, match="no chain"):
        pool.insert([other[0], other[0]])
    late = pool.reserve([other[0], other[1]])
    assert pool.insert([names((4,))[0], other[1]])
    with pytest.raises(UsageError, match="no chain"):
        late.commit()
    assert pool.stats().reserved_blocks == pool.stats().holds == 0
    audit(pool)


def test_a_leased_prefix_stays_and_the_rest_goes():
    pool, path, other = PrefixPool(STATES, 20), names(range(6)), names((9, 9, 9))
    assert pool.insert(path, checkpoints=(4,)) and pool.insert(other)
    lease = pool.lease(path)
    assert pool.evict(20) == 20 - 4 - 2 - 7
    assert pool.match(path) == Match(4, 16, 16) and pool.match(other).kv_blocks == 0
    assert pool.reserve(names(range(20, 37))) is None, "only 14 of 20 blocks can be had"
    lease.release()
    assert pool.insert(names(range(20, 37)))
    audit(pool)


def test_overdue_leases_are_taken_back_when_room_is_needed():
    now = [0.0]
    pool, path = PrefixPool(STATES, 10, clock=lambda: now[0]), names(range(6))
    assert pool.insert(path)
    leases = [pool.lease(path, lease_s=5.0), pool.lease(path, lease_s=9.0)]
    transfer = pool.reserve_transfer(5, lease_s=7.0, states=False)
    now[0] = 8.0
    assert pool.reserve(names((9, 9, 9))) is None
    assert [lease.held for lease in leases] == [False, True] and not transfer.held
    with pytest.raises(UsageError, match="deadline"):
        leases[0].chain()
    leases[0].release()
    now[0] = 9.0
    assert pool.insert(names((9, 9, 9)))
    assert pool.stats().expired_holds == 3 and pool.stats().holds == 0
    audit(pool)


def test_a_reservation_is_never_taken_back():
    """Somebody may be writing to it."""
    now = [0.0]
    pool = PrefixPool(STATES, 10, clock=lambda: now[0])
    reservation = pool.reserve(names(range(8)))
    now[0] = 1e9
    assert pool.evict(10) == 0 and reservation.held


def test_bad_calls_are_refused():
    with pytest.raises(UsageError, match="capacity"):
        PrefixPool(STATES, 0)
    with pytest.raises(UsageError, match="block_tokens"):
        BlockGeometry(0, 1)
    with pytest.raises(UsageError, match="hold nothing"):
        BlockGeometry.of_sizes(16, 0, 100)
    with pytest.raises(UsageError, match="lengths"):
        PrefixPool(STATES, 10).insert(names((1,)), checkpoints=(2,))
    with pytest.raises(UsageError, match="no states"):
        PrefixPool(PLAIN, 10).insert(names((1,)), checkpoints=(1,))
    with pytest.raises(UsageError, match="negative"):
        PrefixPool(PLAIN, 10).reserve_transfer(-1)


def test_boundaries_are_the_end_and_where_prompts_part():
    pool = PrefixPool(STATES, 100)
    assert pool.boundaries(names((1, 2, 3))) == (3,)
    pool.insert(names((1, 2, 3)))
    assert pool.boundaries(names((1, 2, 3))) == (3,)
    assert pool.boundaries(names((1, 2, 3, 4))) == (4,)
    assert pool.boundaries(names((1, 2, 4, 4))) == (2, 4)
    assert PrefixPool(PLAIN, 10).boundaries(names((1,))) == ()


# ---- eviction policies

def prefill_s(cached, total):
    """Linear and quadratic parts, as attention has them."""
    return (total - cached) * 1e-4 + (total**2 - cached**2) * 1e-8


def test_cost_aware_drops_worthless_kv_first():
    pool = PrefixPool(STATES, 100, policy=CostAware(prefill_s))
    pool.insert(names((1, 1, 1, 1, 1)), checkpoints=(2,))
    pool.insert(names((2, 2)))
    assert pool.evict(3) == 3
    assert pool.match(names((1, 1, 1, 1, 1))) == Match(2, 8, 8)
    assert pool.match(names((2, 2))).usable_tokens == 8


def test_cost_aware_never_keeps_kv_without_a_checkpoint_when_it_evicts_one():
    rng = random.Random(3)
    pool = PrefixPool(STATES, 60, policy=CostAware(prefill_s))
    for _ in range(400):
        path = names([rng.randint(0, 2) for _ in range(rng.randint(1, 8))])
        pool.insert(path, checkpoints=rng.sample(range(1, len(path) + 1), 1))
        pool.lease(names([rng.randint(0, 2) for _ in range(8)])).release()
        before = pool.stats().evicted_checkpoints
        pool.evict(2)
        if pool.stats().evicted_checkpoints > before:
            ends = [block for block in pool._index.values()
                    if not block.children and block.state is None]
            assert len(ends) <= 1, "one may have lost its checkpoint just now"
        audit(pool)


def test_cost_aware_keeps_the_dearer_of_two_equally_old():
    geometry = BlockGeometry(1024, 1 << 20, 8)
    pool = PrefixPool(geometry, 200, policy=CostAware(prefill_s))
    long, short = names((1,) * 60), names((2,) * 2)
    for number in range(3, 30):  # the policy learns how long things stay
        pool.insert(names((number,) * 9))
    pool.insert(long)
    pool.insert(short)
    while pool.match(short).usable_tokens and pool.match(long).usable_tokens:
        pool.evict(1)
    assert pool.match(long).usable_tokens and not pool.match(short).usable_tokens


def replay(policy, prompts, geometry, capacity_blocks):
    """Return the seconds of prefill saved, of all."""
    pool, saved, total = PrefixPool(geometry, capacity_blocks, policy=policy), 0.0, 0.0
    for hashes in prompts:
        with pool.lease(hashes) as lease:
            saved += prefill_s(0, lease.tokens)
            total += prefill_s(0, len(hashes) * geometry.block_tokens)
            pool.insert(hashes, checkpoints=pool.boundaries(hashes) or None)
    assert pool.stats().holds == pool.stats().reserved_blocks == 0
    return saved / total


@pytest.mark.parametrize("state_blocks", [0, 21], ids=["attention", "hybrid"])
def test_cost_aware_saves_more_than_lru_on_a_generated_trace(state_blocks):
    geometry = BlockGeometry(512, 8 << 20, state_blocks)
    prompts = list(conversations(seed=6, requests=1500))
    capacity = 20 * (25 + state_blocks)
    lru = replay(Lru(), prompts, geometry, capacity)
    cost_aware = replay(CostAware(prefill_s), prompts, geometry, capacity)
    print(f"saved: lru {lru:.3f}, cost-aware {cost_aware:.3f}")
    assert 0.05 < lru < cost_aware


def test_the_queue_does_not_grow_with_hits():
    pool = PrefixPool(STATES, 100)
    pool.insert(names((1, 2, 3)))
    for _ in range(10_000):
        pool.lease(names((1, 2, 3))).release()
    assert len(pool._queue) < 5000
