"""Prefixes with their bytes: host memory, cache files on SSD, kill -9 at any point."""

import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from prefix_pool_world import (
    BLOCK_TOKENS, KEY, SPEC, TENANT, audit, check_lease, put, state_tensors,
)

import kvwire
from kvwire.errors import FormatError, UnsupportedError, UsageError
from kvwire.prfaas.pool.hashes import CacheKey, chain_hashes
from kvwire.prfaas.pool.host_tier import HostTier
from kvwire.prfaas.pool.store import PrefixStore

TESTS = Path(__file__).parent


def hashes_of(seed, blocks, key=KEY):
    tokens = random.Random(seed).choices(range(50_000), k=blocks * BLOCK_TOKENS)
    return chain_hashes(tokens, BLOCK_TOKENS, key)


def new_store(folder=None, capacity_blocks=64, ssd_bytes=1 << 22, **options):
    return PrefixStore(SPEC, block_tokens=BLOCK_TOKENS, capacity_blocks=capacity_blocks,
                       ssd_folder=folder, ssd_bytes=ssd_bytes, **options)


@pytest.fixture
def store(tmp_path):
    with new_store(tmp_path) as made:
        yield made
        made.drain()
        assert made.stats().spills_failed == 0
        assert made.pool.stats().holds == 0, "something was not given back"
        audit(made.pool)


# ---- host memory

def test_what_was_written_is_what_is_read(store):
    hashes = hashes_of(1, 10)
    put(store, hashes, checkpoints=(3, 10)).release()
    for length, usable in ((10, 10), (9, 3), (2, 0)):
        with store.lease(hashes[:length], TENANT) as lease:
            assert lease.blocks == usable
            check_lease(store, hashes, lease)


def test_a_lease_is_a_cache_memory_that_kvwire_moves(store):
    hashes = hashes_of(2, 6)
    with put(store, hashes) as lease:
        with store.pool.reserve_transfer(lease.tokens) as room:
            target = store.memory(room)
            assert target.bytes == store.memory(lease).bytes == SPEC.bytes(lease.tokens)
            with kvwire.Receiver("127.0.0.1:0") as receiver, (
                    kvwire.Sender(receiver.address)) as sender:
                ticket = receiver.expect(target, deadline_s=30)
                sender.send(ticket.id, store.memory(lease))
                ticket.result()
            for block, slot in zip(lease.chain(), room.slots):
                for array in store.tier._arrays.values():
                    assert (array[block.slot] == array[slot]).all()
            for wanted, tensor in state_tensors(store, hashes[-1], room.state_slots,
                                                lease.tokens):
                assert (wanted == tensor).all()


def test_slots_of_a_checkpoint_hold_all_its_tensors_apart():
    tier = HostTier(SPEC, BLOCK_TOKENS, 4)
    ends = []
    for key, place in tier._states.items():
        count = tier._state_array(key, tuple(range(tier.geometry.state_blocks))).nbytes
        ends.append((place.slot_index, place.offset, place.offset + count))
    ends.sort()
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in zip(ends, ends[1:]))
    assert max(end for _, _, end in ends) <= tier.geometry.block_bytes


def test_real_geometry_packs_states_tightly():
    spec = kvwire.CacheSpec.preset("kimi-linear-48b")
    tier = HostTier(spec, 320, 64)
    least = -(-spec.fixed_bytes // tier.geometry.block_bytes)
    assert least <= tier.geometry.state_blocks <= least * 1.3
    with pytest.raises(UsageError, match="must have at least"):
        HostTier(spec, 16, 64)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(UnsupportedError, match="no attention"):
        HostTier(SPEC.select([0, 3]), BLOCK_TOKENS, 4)
    with pytest.raises(UsageError, match="slots"):
        HostTier(SPEC, BLOCK_TOKENS, 4).memory([0], (8, 16))
    with pytest.raises(UsageError, match="neither"):
        HostTier(SPEC, BLOCK_TOKENS, 4).memory((), (16, 16))


def test_leaving_without_commit_frees_the_room(store):
    with pytest.raises(ZeroDivisionError):
        with store.write(hashes_of(3, 8), TENANT):
            raise ZeroDivisionError
    assert store.pool.stats().free_blocks == 64
    assert store.match(hashes_of(3, 8), TENANT).kv_blocks == 0


# ---- SSD

def test_what_memory_loses_comes_back_from_ssd(store):
    hashes = hashes_of(4, 12)
    put(store, hashes, checkpoints=(5, 12)).release()
    store.drain()
    assert store.ssd.stats().runs == 2
    store.pool.evict(64)
    assert store.pool.match(hashes, TENANT).kv_blocks == 0
    assert store.match(hashes, TENANT) == (12, 12 * BLOCK_TOKENS, 12 * BLOCK_TOKENS)
    with store.lease(hashes[:7], TENANT) as lease:
        assert lease.blocks == 5
        check_lease(store, hashes, lease)
    with store.lease(hashes, TENANT) as lease:
        assert lease.blocks == 12
        check_lease(store, hashes, lease)
    store.drain()
    assert store.ssd.stats().written_runs == 2, "what is there is not written again"


def test_states_alone_are_kept_where_the_kv_is_known(store):
    hashes = hashes_of(5, 8)
    put(store, hashes).release()
    put(store, hashes[:3]).release()
    store.drain()
    store.pool.evict(64)
    with store.lease(hashes[:4], TENANT) as lease:
        assert lease.blocks == 3
        check_lease(store, hashes, lease)


def test_another_process_finds_the_prefixes(tmp_path):
    parted = hashes_of(6, 9)
    with new_store(tmp_path) as store:
        put(store, parted, checkpoints=(4, 9)).release()
        store.drain()
        (tmp_path / "x.kvc.0123.tmp").write_bytes(b"half")
        folder = next(tmp_path.glob("*-16"))
        (folder / "ab").mkdir(exist_ok=True)
        (folder / "ab" / "half.kvc.00.tmp").write_bytes(b"half")
        (folder / "ab" / "foreign.kvc").write_bytes(b"no cache file at all" * 50)
    with new_store(tmp_path) as store:
        assert store.ssd.stats().runs == 2 and store.ssd.stats().damaged_files == 1
        assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("foreign*"))
        with store.lease(parted, TENANT) as lease:
            assert lease.blocks == 9
            check_lease(store, parted, lease)


def test_another_tenant_model_or_block_size_finds_nothing_on_ssd(tmp_path):
    hashes = hashes_of(7, 6)
    with new_store(tmp_path) as store:
        put(store, hashes).release()
        store.drain()
        store.pool.evict(64)
        other = CacheKey("other", *(getattr(KEY, name) for name in (
            "model", "spec_fingerprint", "tokenizer_fingerprint")))
        assert store.match(hashes, other.digest()).kv_blocks == 0
        assert store.lease(hashes, other.digest()).blocks == 0
    wider = kvwire.CacheSpec("tiny", (*SPEC.groups[:3], kvwire.sliding_window(
        [2], 25, kv_heads=2, head_dim=8, dtype="bf16")))
    with PrefixStore(wider, block_tokens=16, capacity_blocks=8, ssd_folder=tmp_path,
                     ssd_bytes=1 << 20) as store:
        assert store.match(hashes, TENANT).kv_blocks == 0


def test_a_folder_belongs_to_one_tier_at_a_time(tmp_path):
    with new_store(tmp_path):
        with pytest.raises(UsageError, match="another SsdTier"):
            new_store(tmp_path)
    new_store(tmp_path).close()


def files_of(store):
    return sorted(store.ssd._folder.rglob("*.kvc"))


def test_what_is_no_file_is_left_alone(tmp_path):
    hashes = hashes_of(13, 5)
    with new_store(tmp_path) as store:
        put(store, hashes).release()
        folder = store.ssd._folder
    (folder / "folder.kvc").mkdir()
    (folder / "folder.tmp").mkdir()
    os.mkfifo(folder / "pipe.kvc")
    (folder / "loop.kvc").symlink_to("loop.kvc")
    with new_store(tmp_path) as store:
        assert store.ssd.stats().runs == 1 and store.ssd.stats().damaged_files == 0
        with store.lease(hashes, TENANT) as lease:
            assert lease.blocks == 5
            check_lease(store, hashes, lease)
    assert len([path for path in folder.iterdir() if path.suffix in (".kvc", ".tmp")]) == 4


@pytest.mark.parametrize("harm", ["flipped byte", "cut short", "gone", "exchanged"])
def test_a_damaged_file_is_not_served_and_costs_only_itself(tmp_path, harm):
    hashes, others = hashes_of(8, 9), hashes_of(9, 9)
    with new_store(tmp_path) as store:
        put(store, hashes, checkpoints=(4, 9)).release()
        put(store, others, checkpoints=(4, 9)).release()
        store.drain()
        store.pool.evict(64)
        victim = store.ssd._states[hashes[8]].path
        data = bytearray(victim.read_bytes())
        if harm == "flipped byte":
            data[len(data) // 2] ^= 1
            victim.write_bytes(data)
        elif harm == "cut short":
            victim.write_bytes(data[:len(data) // 2])
        elif harm == "gone":
            victim.unlink()
        else:
            victim.write_bytes(store.ssd._states[others[8]].path.read_bytes())
        with store.lease(hashes, TENANT) as lease:
            assert lease.blocks == 4
            check_lease(store, hashes, lease)
        assert store.ssd.stats().damaged_files == 1 and not victim.exists()
        with store.lease(others, TENANT) as lease:
            assert lease.blocks == 9
            check_lease(store, others, lease)
        assert store.pool.stats().holds == 0
        audit(store.pool)


def test_reading_a_damaged_file_by_itself_is_a_format_error(store):
    hashes = hashes_of(10, 3)
    put(store, hashes).release()
    store.drain()
    path = files_of(store)[0]
    path.write_bytes(path.read_bytes()[:-1])
    with store.pool.reserve_transfer(3 * BLOCK_TOKENS) as room, pytest.raises(FormatError):
        store.ssd.read(hashes, TENANT, 0, lambda low, high, state: store.memory(room))
    with pytest.raises(UsageError, match="match"):
        store.ssd.read(hashes, TENANT, 0, lambda low, high, state: None)


def test_ssd_keeps_within_its_bytes_and_evicts_leaves_first(tmp_path):
    with new_store(tmp_path, ssd_bytes=200_000) as store:
        first = hashes_of(11, 10)
        for seed in range(11, 40):
            put(store, hashes_of(seed, 10), checkpoints=(5, 10)).release()
            store.drain()
            store.ssd.match(first, TENANT)
            said = store.ssd.stats()
            assert sum(path.stat().st_size for path in files_of(store)) == said.file_bytes
            assert said.file_bytes <= said.capacity_bytes
        assert said.evicted_runs > 10 and said.full == 0
        for run in store.ssd._runs:
            assert run.before is None or run.before in store.ssd._runs
    with new_store(tmp_path, ssd_bytes=200_000) as again:
        assert again.ssd.stats().runs == said.runs and again.ssd.stats().damaged_files == 0


def test_a_full_disk_costs_the_file_only(tmp_path, monkeypatch):
    hashes = hashes_of(12, 4)
    with new_store(tmp_path) as store:
        def no_space(fd):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "fsync", no_space)
        put(store, hashes).release()
        store.drain()
        monkeypatch.undo()
        assert store.stats().spills_failed == 1 and store.ssd.stats().runs == 0
        assert not list(tmp_path.rglob("*.kvc*"))
        with store.lease(hashes, TENANT) as lease:
            check_lease(store, hashes, lease)
        assert store.pool.stats().holds == 0


def test_many_threads_are_served_right_bytes(tmp_path):
    """Memory holds a third of what is asked for, so everything comes and goes."""
    chains = [hashes_of(seed, 6 + seed % 5) for seed in range(20, 28)]
    faults = []

    def work(seed):
        rng = random.Random(seed)
        try:
            for _ in range(25):
                hashes = rng.choice(chains)
                with store.lease(hashes, TENANT) as lease:
                    check_lease(store, hashes, lease)
                    if lease.blocks < len(hashes) and (
                            made := store.write(hashes, TENANT)) is not None:
                        made.reservation.abort()
                        put(store, hashes).release()
        except Exception as error:
            faults.append(error)

    with new_store(tmp_path, capacity_blocks=40) as store:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        store.drain()
        assert not faults, faults
        assert store.pool.stats().holds == store.pool.stats().reserved_blocks == 0
        audit(store.pool)


# ---- kill -9

WRITER = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from prefix_pool_world import TENANT, put
from test_prefix_pool_store import hashes_of, new_store
from kvwire import direct_io

left = {steps}
direct_io.PIECE_BYTES = {piece_bytes}

def step(function):
    # One operation on the file system; before the last of them the process dies.
    def counted(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return counted

write_some = step(os.pwrite)
os.pwrite = lambda fd, data, at: write_some(fd, data[:{write_bytes}], at)
os.fsync, os.replace, os.unlink = step(os.fsync), step(os.replace), step(os.unlink)
with new_store({folder!r}, capacity_blocks=200, ssd_bytes=300_000) as store:
    for seed in range(100_000):
        hashes = hashes_of(seed % 40, 8 + seed % 5)
        with store.lease(hashes, TENANT):
            pass
        put(store, hashes, checkpoints=(4, len(hashes))).release()
        store.drain()
        print(seed, flush=True)
"""


def check_what_a_dead_writer_left(folder):
    """Return how many blocks are served."""
    served = 0
    with new_store(folder, capacity_blocks=400, ssd_bytes=300_000) as store:
        assert store.ssd.stats().damaged_files == 0, "a name appeared before its file was whole"
        assert not list(store.ssd._folder.rglob("*.tmp"))
        for number in range(40):
            hashes = hashes_of(number, 12)
            with store.lease(hashes, TENANT) as lease:
                check_lease(store, hashes, lease)
                served += lease.blocks
        assert store.ssd.stats().damaged_files == 0
    return served


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [2, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("when", ["before an operation", "at any time"])
@pytest.mark.parametrize(("piece_bytes", "write_bytes"), [(4 << 20, 700), (8192, 4096)],
                         ids=["at the end", "in pieces"])
def test_killed_at_any_point_nothing_half_written_is_served(tmp_path, piece_bytes, write_bytes,
                                                            when, kills):
    rng, served = random.Random(kills), 0
    for _ in range(kills):
        by_itself = when == "before an operation"
        code = WRITER.format(tests=str(TESTS), folder=str(tmp_path), piece_bytes=piece_bytes,
                             write_bytes=write_bytes, steps=rng.randint(1, 200) if by_itself else 0)
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        if not by_itself:
            writer.stdout.readline()
            # A moment of its work, not of its start; a prefix takes it some milliseconds.
            threading.Event().wait(rng.uniform(0, 0.08))
            writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert writer.returncode == -signal.SIGKILL
        served = check_what_a_dead_writer_left(tmp_path)
    assert served, "the writers were killed before they wrote anything"
