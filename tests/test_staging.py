"""Caches in device memory over real loopback TCP, by the CUDA kernels compiled for the CPU."""

import asyncio
import contextlib

import numpy as np
import pytest
from faults import eventually
from standin_device import Event, StandInDevice

import kvwire
from kvwire import plan
from kvwire.control import Item
from kvwire.errors import (
    ChecksumError, FormatError, InternalError, LimitError, SpecMismatchError, TransferCancelled,
    UnsupportedError, UsageError,
)
from kvwire.kernels.code_plan import CodePlan
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.slices import slices_of
from kvwire.kernels.stages import EncodeStage
from kvwire.kernels.staging import PinnedRing
from kvwire.layout import CacheSpec, attention, convolution, latent, recurrent, sliding_window
from kvwire.tensor_parallel import shard

TOKENS, BLOCKS = 300, 40
SMALL = dict(ring_bytes=1 << 20, slice_bytes=128 << 10)


@pytest.fixture
def device():
    made = StandInDevice()
    yield made
    made.close()


def hybrid(block_tokens=16, order="NHD", kernel=4):
    return CacheSpec("hybrid", (
        attention([1, 3], kv_heads=2, head_dim=64, block_tokens=block_tokens, order=order),
        latent([4], latent_dim=64, rope_dim=32, block_tokens=block_tokens),
        sliding_window([5], kv_heads=1, head_dim=32, window_tokens=64, block_tokens=block_tokens),
        recurrent([0, 2], heads=2, key_dim=32, value_dim=48),
        convolution([0, 2], 64, columns=kernel - 1)))


class Cache:
    """Arrays of one side, on a device or (device None) in host memory."""

    def __init__(self, spec, device=None, seed=0, writable=False, tokens=TOKENS, **options):
        rng = np.random.default_rng(seed)
        self.device, self.arrays, self.given = device, {}, {}
        for group in spec.groups:
            for layer in group.layers:
                for tensor in group.tensors:
                    key = layer, tensor.name
                    shape = [tensor.block_tokens if axis.axis == kvwire.Axis.TOKEN else axis.held
                             for axis in tensor.axes]
                    if tensor.block_tokens:
                        shape = [BLOCKS * 16 // tensor.block_tokens, *shape]
                    dtype = f"uint{8 * tensor.dtype.item_bytes}"
                    if device is None:
                        self.arrays[key] = self.given[key] = np.zeros(shape, dtype)
                    else:
                        self.arrays[key], self.given[key] = device.array(shape, dtype)
                    if not writable:
                        with self.access():
                            self.arrays[key][...] = gauss(rng, shape, dtype)
        ids = {index: rng.permutation(BLOCKS * 16 // group.block_tokens)[
            :-(-tokens // group.block_tokens)].tolist()
               for index, group in enumerate(spec.groups) if group.block_tokens}
        self.memory = kvwire.CacheMemory(spec, self.given, tokens=tokens, block_ids=ids,
                                         writable=writable, **options)

    def access(self):
        return self.device.access() if self.device else contextlib.nullcontext()

    def content(self, spec, layers=range(6)):
        with self.access():
            return [plan.gather(spec, self.memory.items(layer), self.memory.leaves)
                    for layer in layers]


def gauss(rng, shape, dtype):
    values = rng.normal(size=shape).astype(np.float32).view(np.uint32)
    return values if dtype == "uint32" else (values >> 16).astype(dtype)


def staging(device, **options):
    return kvwire.Staging(device=device, **{**SMALL, **options})


@pytest.mark.parametrize("codec", ["raw", "tiered"])
@pytest.mark.parametrize("sides", ["device to device", "device to host", "host to device"])
def test_a_hybrid_cache_arrives_bit_for_bit(device, codec, sides):
    theirs, ours = sides.split(" to ")
    spec, held = hybrid(16), hybrid(8 if ours == "host" else 16, "HND")
    source = Cache(spec, device if theirs == "device" else None, 1)
    target = Cache(held, device if ours == "device" else None, 2, writable=True)
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec=codec, staging=staging(device)) as sender:
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory, metadata={"a": 1})
        pushes = [transfer.push(layer) for layer in range(6)]
        transfer.finish({"first_token": 42})
        for layer in range(6):
            ticket.wait_layer(layer, 100)
        assert ticket.result(100).repaired_chunks == 0
        progress = transfer.result(100)
        assert all(push.wait(100) and push.done() for push in pushes)
        assert ticket.metadata == {"a": 1, "first_token": 42}
        assert target.content(spec) == source.content(spec)
        if codec == "tiered":
            assert progress.wire_bytes < 0.85 * progress.verified_bytes
        for staged, _ in sender._staged.values():
            eventually(lambda: staged.ring.free_count == staged.ring.count)
        for staged, _ in receiver._staged.values():
            eventually(lambda: staged.zone.rooms_free == staged.room_count)
    if theirs == "device":
        launched = device.launches.count("kvwire_encode")
        least = sum(map(len, source.content(spec))) / SMALL["slice_bytes"]
        assert launched < 4 * least + 30  # by slices, not by pages
    assert max(device.grids, default=1) <= device.blocks_max(0.125)


@pytest.mark.parametrize("codec", ["raw", "tiered"])
@pytest.mark.parametrize("slots", [1, 4])
def test_kernels_write_straight_to_the_ring(device, codec, slots):
    spec = hybrid()
    source, target = Cache(spec, device, 1), Cache(spec, None, 2, writable=True)
    mapped = staging(device, maps_ring=True, ring_bytes=slots * SMALL["slice_bytes"])
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec=codec, staging=mapped) as sender:
        for _ in range(2):
            ticket = receiver.expect(target.memory)
            transfer = sender.send(ticket.id, source.memory)
            ticket.result(100)
            transfer.result(100)
            assert target.content(spec) == source.content(spec)
        (staged, _), = sender._staged.values()
        eventually(lambda: staged.ring.free_count == slots)


def test_the_engines_stream_is_waited_for_and_its_thread_is_not(device):
    spec = hybrid()
    source, target = Cache(spec, device, 1), Cache(spec, None, 2, writable=True)
    gate = Event()
    want = source.content(spec)
    for array in source.arrays.values():  # prefill has still to run
        with device.access():
            final = array.copy()
            array[...] = 0
        device.wait_for(device.engine, gate)
        device.enqueue(device.engine, lambda array=array, final=final: np.copyto(array, final))
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec="tiered", staging=staging(device)) as sender:
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)
        transfer.push_all().finish()  # returns although nothing is final
        assert not transfer.done() and transfer.progress().wire_bytes == 0
        gate.reached.set()
        ticket.result(100)
        transfer.result(100)
    assert target.content(spec) == want


def test_chunked_prefill_with_blocks_that_come_later_awaited(device):
    spec = CacheSpec("m", (attention([0], kv_heads=2, head_dim=64, block_tokens=16),))
    source, target = Cache(spec, device, 1), Cache(spec, device, 2, writable=True)
    ids = source.memory.leaves[spec.groups[0].kind, 0, "k"].tokens.block_ids.tolist()
    growing = kvwire.CacheMemory(spec, source.given, tokens=TOKENS, block_ids=ids[:5], growing=True)

    async def hand_off():
        with kvwire.Receiver(staging=staging(device)) as receiver, \
                kvwire.Sender(receiver.address, codec="tiered", staging=staging(device)) as sender:
            ticket = receiver.expect(target.memory)
            transfer = sender.open(ticket.id, growing)
            first = transfer.push(0, tokens=(0, 75))
            with pytest.raises(UsageError, match="not known yet"):
                transfer.push(0, tokens=(75, TOKENS))
            growing.extend_blocks(0, ids[5:])
            second = transfer.push(0, tokens=(75, TOKENS), priority=1)
            transfer.finish()
            with pytest.raises(UsageError, match="push after finish"):
                transfer.push(0, tokens=(0, 0))
            await first
            await second
            await ticket.layer(0)
            await ticket
            await transfer
            assert transfer.stats().effective_gbps > 0
    asyncio.run(hand_off())
    assert target.content(spec, [0]) == source.content(spec, [0])


def test_tensor_parallel_shards_into_device_memory(device):
    whole = CacheSpec("tp", (attention([0], kv_heads=4, head_dim=32, block_tokens=16),))
    shards = [shard(whole, rank, 2) for rank in range(2)]
    sources = [Cache(part, device, 5 + rank) for rank, part in enumerate(shards)]
    target = Cache(whole, device, 9, writable=True)
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="tiered", staging=staging(device)) as sender:
        ticket = receiver.expect(target.memory, source_ranks=2)
        for rank, source in enumerate(sources):
            sender.send(ticket.id, source.memory, source_rank=(rank, 2))
        ticket.result(100)
    for part, source in zip(shards, sources):
        items = source.memory.items(0)
        with device.access():
            assert plan.gather(part, items, target.memory.leaves) == \
                plan.gather(part, items, source.memory.leaves)


@pytest.mark.parametrize("codec", ["raw", "tiered"])
def test_a_slice_of_the_heads_leaves_device_memory(device, codec):
    whole = CacheSpec("tp", (attention([0], kv_heads=4, head_dim=32, block_tokens=16),))
    half = shard(whole, 1, 2)
    source, target = Cache(whole, device, 5), Cache(half, None, 6, writable=True)
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec=codec, staging=staging(device)) as sender:
        ticket = receiver.expect(target.memory, destination_rank=(1, 2))
        sender.send(ticket.id, source.memory, carry=half, destination_rank=(1, 2))
        ticket.result(100)
    items = target.memory.items(0)
    with device.access():
        assert plan.gather(half, items, source.memory.leaves) == \
            plan.gather(half, items, target.memory.leaves)
    assert any(name.startswith("kvwire_pack_") for name in device.launches)  # runs of 128 bytes


@pytest.mark.parametrize("lose_at", [pytest.param(0, marks=pytest.mark.long), 7,
                                     pytest.param(25, marks=pytest.mark.long)])
@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_a_lost_context_fails_both_sides_and_gives_the_memory_back(device, side, lose_at):
    spec = hybrid()
    source = Cache(spec, device if side == "sender" else None, 1)
    target = Cache(spec, device if side == "receiver" else None, 2, writable=True)
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="tiered", staging=staging(device)) as sender:
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)
        device.lose_at = device.tasks + lose_at
        transfer.push_all().finish()
        mine, theirs = (transfer, ticket) if side == "sender" else (ticket, transfer)
        with pytest.raises(InternalError, match="context is lost"):
            mine.result(100)
        with pytest.raises(TransferCancelled):
            theirs.result(100)
        for staged, _ in sender._staged.values():
            eventually(lambda: staged.ring.free_count == staged.ring.count)
            with pytest.raises(InternalError):
                sender.open(ticket.id, source.memory).push_all().finish().result(100)
        for staged, _ in receiver._staged.values():
            eventually(lambda: staged.zone.rooms_free == staged.room_count)
            with pytest.raises(InternalError):
                receiver.expect(target.memory)


@pytest.mark.parametrize("codec", ["raw", "tiered"])
def test_what_the_bus_changes_on_the_way_in_is_asked_for_again(device, codec):
    spec = hybrid()
    source, target = Cache(spec, None, 1), Cache(spec, device, 2, writable=True)
    for key in source.arrays:
        source.arrays[key][...] = gauss(np.random.default_rng(1), source.arrays[key].shape,
                                        source.arrays[key].dtype.name)
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec=codec) as sender:
        ticket = receiver.expect(target.memory)
        device.flip_decodes = {device.decodes}
        sender.send(ticket.id, source.memory)
        assert ticket.result(100).repaired_chunks == 1
    assert target.content(spec) == source.content(spec)


@pytest.mark.parametrize("codec", ["raw", "tiered"])
def test_what_the_bus_changes_on_the_way_out_is_never_delivered(device, codec):
    spec = hybrid()
    source, target = Cache(spec, device, 1), Cache(spec, None, 2, writable=True)
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, codec=codec, staging=staging(device)) as sender:
        sender.send(receiver.expect(target.memory).id, source.memory).result(100)  # makes tables
        ticket = receiver.expect(target.memory)
        device.flip_copies = {device.large_copies + 1}
        transfer = sender.send(ticket.id, source.memory)
        for handle in (ticket, transfer):
            with pytest.raises((ChecksumError, FormatError),
                               match="not what it read|RAW_CORRUPT|CODED_INVALID"):
                handle.result(100)
        ring = sender._staged["cuda:0"][0].ring
        eventually(lambda: ring.free_count == ring.count)


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_cancelled_transfer_leaves_nothing_behind(device, who):
    spec, gate = hybrid(), Event()
    source, target = Cache(spec, device, 1), Cache(spec, device, 2, writable=True)
    with kvwire.Receiver(staging=staging(device)) as receiver, \
            kvwire.Sender(receiver.address, codec="tiered", staging=staging(device)) as sender:
        ticket = receiver.expect(target.memory)
        transfer = sender.open(ticket.id, source.memory)
        transfer.push(1)
        ticket.wait_layer(1, 100)
        device.wait_for(device.engine, gate)
        transfer.push(3)  # will not be ready before it is cancelled
        gate.reached.set()
        (transfer if who == "sender" else ticket).cancel()
        with pytest.raises(TransferCancelled):
            transfer.result(100)
        with pytest.raises(TransferCancelled):
            ticket.result(100)
        assert transfer._source.reading == ticket._target.writing == 0
        ring, zone = sender._staged["cuda:0"][0].ring, receiver._staged["cuda:0"][0].zone
        eventually(lambda: ring.free_count == ring.count)
        eventually(lambda: zone.rooms_free == receiver._staged["cuda:0"][0].room_count)
        again = receiver.expect(target.memory)  # and both go on
        sender.send(again.id, source.memory)
        again.result(100)
    assert target.content(spec) == source.content(spec)


def test_a_small_ring_carries_a_large_cache(device):
    spec = hybrid()
    source, target = Cache(spec, device, 1), Cache(spec, device, 2, writable=True)
    tiny = staging(device, ring_bytes=64 << 10, slice_bytes=64 << 10)
    with kvwire.Receiver(staging=tiny, chunk_bytes_max=64 << 10) as receiver, \
            kvwire.Sender(receiver.address, codec="tiered", staging=tiny) as sender:
        ticket = receiver.expect(target.memory)
        transfer = sender.send(ticket.id, source.memory)
        ticket.result(100)
        transfer.result(100)
        assert sender._staged["cuda:0"][0].ring.count == 1
    assert target.content(spec) == source.content(spec)


def test_no_room_on_the_device_is_a_typed_error():
    device = StandInDevice(memory_bytes=3 << 20)
    spec = CacheSpec("m", (attention([0], kv_heads=1, head_dim=64, block_tokens=16),))
    source = Cache(spec, device, 1)
    with kvwire.Receiver() as receiver, kvwire.Sender(
            receiver.address, staging=kvwire.Staging(device=device)) as sender:
        with pytest.raises(LimitError, match="out of memory"):
            sender.open(bytes(16), source.memory)
    device.close()


def test_what_device_memory_does_not_do_is_refused(device, tmp_path):
    spec = hybrid()
    source, target = Cache(spec, device, 1), Cache(spec, device, 2, writable=True)
    with pytest.raises(UnsupportedError, match="save.*cuda:0"):
        kvwire.save(tmp_path / "cache", source.memory)
    fewer = Cache(hybrid(kernel=3), None, 3)
    small = staging(device, slice_bytes=64 << 10)
    large = CacheSpec("m", (recurrent([0], heads=8, key_dim=64, value_dim=64),))
    with kvwire.Receiver(staging=staging(device)) as receiver, kvwire.Sender(
            receiver.address, staging=small) as sender, kvwire.Sender(receiver.address) as plain:
        with pytest.raises(LimitError, match="slice_bytes"):
            sender.open(bytes(16), Cache(large, device, 4).memory).push(0)
        ticket = receiver.expect(target.memory)
        plain.send(ticket.id, fewer.memory)
        with pytest.raises(SpecMismatchError):
            ticket.result(100)
        with pytest.raises(UnsupportedError):  # no GPU here, and no other device is named
            plain.open(bytes(16), source.memory)
    with pytest.raises(UsageError, match="one place"):
        arrays = {(0, name): device.array((4, 16, 1, 64))[1] if name == "k" else
                  np.zeros((4, 16, 1, 64), np.uint16) for name in "kv"}
        kvwire.CacheMemory(CacheSpec("m", (attention([0], kv_heads=1, head_dim=64,
                                                     block_tokens=16),)),
                           arrays, tokens=16, block_ids=[1]).device


def test_a_launch_neither_allocates_nor_waits(device, monkeypatch):
    spec, gate = hybrid(), Event()
    source, stream = Cache(spec, device, 1), device.stream()
    stage = EncodeStage(device, 0.25, 128 << 10, stream)
    copies = CopyPlan.of_items(spec, source.memory.items(1, (0, 128)), source.memory)
    codes = CodePlan.of_chunks([(0, copies.bytes)])
    stage.enqueue(copies, codes, stream)
    first = stage.results()
    for name in ("allocate", "pinned", "free"):
        monkeypatch.setattr(device, name, None)
    device.wait_for(stream, gate)  # nothing runs
    stage.enqueue(copies, codes, stream)
    gate.reached.set()
    assert stage.results() == first
    monkeypatch.undo()


def test_slices_keep_blocks_whole():
    spec = CacheSpec("m", (attention([0], kv_heads=2, head_dim=64, block_tokens=16),
                           recurrent([0], heads=2, key_dim=32, value_dim=32)))
    items = [Item(0, tensor, 0, 5, 205) for tensor in (0, 1)] + [Item(1, 0, 0)]
    slices = list(slices_of(spec, items, 20_000))
    assert slices[0] == items[2:]
    assert [(s[0].token_start, s[0].token_stop) for s in slices[1:]] == \
        [(5, 32), (32, 64), (64, 96), (96, 128), (128, 160), (160, 192), (192, 205)]
    with pytest.raises(LimitError, match="slice_bytes"):
        list(slices_of(spec, items, 8000))


def test_layers_that_fit_share_a_slice():
    spec = CacheSpec("m", (attention(range(6), kv_heads=2, head_dim=64, block_tokens=16),
                           attention([6], kv_heads=2, head_dim=64, block_tokens=16)))
    items = [Item(layer // 6, tensor, layer, 0, stop) for layer, stop in
             enumerate((10, 20, 9, 1, 40, 2, 3)) for tensor in (0, 1)]
    slices = list(slices_of(spec, items, 20_000))  # 39 tokens of 512 bytes
    assert [[(item.layer, item.token_start, item.token_stop) for item in part[::2]]
            for part in slices] == [[(0, 0, 10), (1, 0, 20), (2, 0, 9)], [(3, 0, 1)],
                                    [(4, 0, 32)], [(4, 32, 40), (5, 0, 2)], [(6, 0, 3)]]
    assert sorted(sum(slices, [])[:8], key=repr) == sorted(items[:8], key=repr)


def test_slots_are_given_back_once(device):
    ring = PinnedRing(device, 1, 512)
    slot = ring.try_acquire()
    assert ring.try_acquire() is None
    slot.release()
    with pytest.raises(UsageError):
        slot.release()
    ring.close()
    with pytest.raises(TransferCancelled):
        ring.try_acquire()
    with pytest.raises(UsageError):
        PinnedRing(device, 0, 1)
    for wrong in (dict(sm_share=0), dict(slice_bytes=5), dict(ring_bytes=1), dict(maps_ring=1)):
        with pytest.raises(UsageError):
            kvwire.Staging(**wrong)
