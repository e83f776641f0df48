"""What is worth a write to SSD, by seconds of prefill per byte; what is not stays servable."""

import math

import pytest
from prefix_pool_world import BLOCK_TOKENS, TENANT, check_lease, put
from test_prefix_pool_store import files_of, hashes_of, new_store

from kvwire.errors import UsageError
from kvwire.prfaas.pool.admission import CostPerByte
from kvwire.prfaas.pool.blocks import BlockGeometry
from kvwire.prfaas.pool.hashes import HASH_BYTES
from kvwire.prfaas.pool.metadata import EmbeddedIndex
from kvwire.prfaas.pool.publisher import IndexObserver
from kvwire.prfaas.pool.ssd_tier import SsdTier

GB_BLOCKS = BlockGeometry(10, 10 ** 9, state_blocks=2)


def linear_s(cached, total):
    return (total - cached) / 10.0  # a block of GB_BLOCKS takes a second


@pytest.mark.parametrize("start, stop, blocks, admitted", [
    (0, 4, 8, True), (0, 4, 9, False), (3, 4, 2, True), (3, 4, 3, False), (4, 4, 2, False)])
def test_a_run_must_save_its_seconds_per_gigabyte(start, stop, blocks, admitted):
    rule = CostPerByte(linear_s, s_per_gb_min=0.5)
    assert rule.admits(start, stop, blocks, GB_BLOCKS) is admitted
    assert CostPerByte(linear_s, s_per_gb_min=0).admits(start, stop, blocks, GB_BLOCKS)


@pytest.mark.parametrize("least", [-0.1, math.nan, math.inf])
def test_a_rule_that_cannot_be_is_refused(least):
    with pytest.raises(UsageError, match="s_per_gb_min"):
        CostPerByte(linear_s, s_per_gb_min=least)


# ---- with files

def rule_of(blocks):
    """Admit a run with its checkpoint if it saves the prefill of so many blocks."""
    class Rule:
        def admits(self, start, stop, units, geometry):
            return stop - start >= blocks
    return Rule()


@pytest.fixture
def store(tmp_path):
    with new_store(tmp_path, ssd_admission=rule_of(6)) as made:
        yield made
        made.drain()
        assert made.stats().spills_failed == 0 and made.pool.stats().holds == 0


def put_and_forget(store, *chains):
    for hashes in chains:
        put(store, hashes).release()
    store.drain()
    store.pool.evict(64)
    assert all(store.pool.match(hashes, TENANT).kv_blocks == 0 for hashes in chains)


def test_what_is_not_worth_it_is_not_written_and_what_is_comes_back(store):
    short, long = hashes_of(50, 5), hashes_of(51, 6)
    put_and_forget(store, short, long)
    said = store.ssd.stats()
    assert (said.written_runs, said.refused) == (1, 1) and len(files_of(store)) == 1
    assert store.match(short, TENANT).kv_blocks == 0
    with store.lease(long, TENANT) as lease:
        assert lease.blocks == 6
        check_lease(store, long, lease)


def test_small_appends_are_written_as_one_when_together_they_are_worth_it(store):
    hashes = hashes_of(52, 18)
    for blocks in (8, 10, 12, 14, 16, 18):
        put(store, hashes[:blocks]).release()
    store.drain()
    assert sorted((run.start, run.stop) for run in store.ssd._runs) == [(0, 8), (8, 14)]
    assert store.ssd.stats().refused == 4
    store.pool.evict(64)
    for asked, usable in ((18, 14), (13, 8), (7, 0)):
        with store.lease(hashes[:asked], TENANT) as lease:
            assert lease.blocks == usable
            check_lease(store, hashes, lease)


def test_a_checkpoint_within_known_blocks_is_judged_by_what_it_saves(store):
    hashes = hashes_of(53, 16)
    put(store, hashes, checkpoints=(16,)).release()
    put(store, hashes[:5], checkpoints=(5,)).release()   # saves 5 blocks
    put(store, hashes[:12], checkpoints=(12,)).release()  # saves 12: there is none before it
    store.drain()
    assert {(run.start, run.stop) for run in store.ssd._runs} == {(0, 16), (12, 12)}
    store.pool.evict(64)
    with store.lease(hashes[:13], TENANT) as lease:
        assert lease.blocks == 12
        check_lease(store, hashes, lease)


def test_another_process_finds_what_was_admitted(tmp_path):
    hashes = hashes_of(54, 14)
    with new_store(tmp_path, ssd_admission=rule_of(6)) as store:
        put(store, hashes[:8]).release()
        put(store, hashes).release()
    with new_store(tmp_path, ssd_admission=rule_of(6)) as store:
        assert store.ssd.stats().damaged_files == 0
        with store.lease(hashes, TENANT) as lease:
            assert lease.blocks == 14
            check_lease(store, hashes, lease)


def test_the_index_forgets_what_memory_loses_and_no_file_holds(tmp_path):
    index = EmbeddedIndex()
    with new_store(tmp_path, ssd_admission=rule_of(6),
                   observer=IndexObserver(index, "local/0")) as store:
        short, long = hashes_of(55, 5), hashes_of(56, 6)
        put_and_forget(store, short, long)
        assert index.match(TENANT, short) == {}
        assert index.match(TENANT, long)["local/0"].usable_blocks == 6


def test_blocks_without_states_are_judged_each_run_by_itself(tmp_path):
    geometry = BlockGeometry(BLOCK_TOKENS, 1000)
    hashes = [number.to_bytes(HASH_BYTES, "little") for number in range(1, 21)]
    asked = []

    class Rule:
        def admits(self, start, stop, blocks, given):
            asked.append((start, stop, blocks))
            return stop - start >= 6 and given is geometry

    class Accounts(SsdTier):
        def _save(self, run, memory):
            return 1000 * len(run.hashes)

    tier = Accounts(tmp_path, bytes(8), geometry, 10 ** 6, admission=Rule())
    for blocks in (8, 10, 14, 14, 20):
        tier.write(hashes[:blocks], TENANT, (), lambda *run: None)
    assert asked == [(0, 8, 8), (8, 10, 2), (8, 14, 6), (14, 20, 6)]
    assert tier.match(hashes, TENANT).kv_blocks == 20
    assert (tier.stats().written_runs, tier.stats().refused) == (3, 1)
    tier.close()
