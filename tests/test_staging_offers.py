"""Offers of caches in device memory, and pulls into it; see test_staging.py."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from faults import eventually
from standin_device import Event
from test_staging import TOKENS, Cache, device, hybrid, staging

import kvwire
from kvwire import plan
from kvwire.errors import TransferCancelled
from kvwire.layout import CacheSpec, attention

__all__ = ["device"]


@pytest.mark.parametrize("codec", ["raw", "tiered"])
@pytest.mark.parametrize("sides", ["device to device", "device to host", "host to device"])
def test_what_is_offered_arrives(device, codec, sides):
    theirs, ours = sides.split(" to ")
    spec, held = hybrid(), hybrid(8 if ours == "host" else 16, "HND")
    source = Cache(spec, device if theirs == "device" else None, 1)
    target = Cache(held, device if ours == "device" else None, 2, writable=True)
    with kvwire.Sender(listen="127.0.0.1:0", codec=codec, staging=staging(device)) as sender, \
            kvwire.Receiver(None, staging=staging(device)) as receiver:
        offer = sender.offer(source.memory, metadata={"a": 1})
        for layer in range(3):  # before the pull, and after it
            offer.push(layer)
        assert offer.progress().wire_bytes == 0 and not offer.progress().granted
        ticket = receiver.pull(sender.address, offer.offer_id, target.memory)
        for layer in range(3, 6):
            offer.push(layer)
        offer.finish({"first_token": 42})
        ticket.result(100)
        assert offer.result(100).verified_bytes == source.memory.bytes
        assert ticket.metadata == {"a": 1, "first_token": 42}
        assert target.content(spec) == source.content(spec)


@pytest.mark.parametrize("start, stop", [(0, 90), (37, TOKENS), (133, 134), (299, 299)])
def test_a_pull_of_fewer_tokens_brings_those_and_the_states(device, start, stop):
    """Slices end elsewhere than the pull: whole ones, parts of them and none are wanted."""
    spec = CacheSpec("m", (attention([1], kv_heads=2, head_dim=64, block_tokens=16),
                           kvwire.recurrent([0, 2], heads=2, key_dim=32, value_dim=48)))
    source, whole = Cache(spec, device, 1), Cache(spec, device, 2, writable=True)
    ids = whole.memory.leaves[spec.groups[0].kind, 1, "k"].tokens.block_ids
    target = kvwire.CacheMemory(spec, whole.given, tokens=(start, stop),
                                block_ids=ids[start // 16:], writable=True)

    def content(cache, *spans):
        items = [replace(item, token_start=low, token_stop=high)
                 for item in cache.memory.items(1) for low, high in spans if low < high]
        with device.access():
            return plan.gather(spec, items, cache.memory.leaves)

    untouched = content(whole, (0, start), (stop, TOKENS))
    small = staging(device, slice_bytes=64 << 10)
    with kvwire.Sender(listen="127.0.0.1:0", codec="tiered", staging=small) as sender, \
            kvwire.Receiver(None, staging=small) as receiver:
        offer = sender.offer(source.memory).push_all()
        pushes = [offer.push(1, tokens=(0, 0), states=False)]  # nothing at all
        offer.finish()
        ticket = receiver.pull(sender.address, offer.offer_id, target)
        ticket.result(100)
        assert offer.result(100).verified_bytes == target.bytes
        assert all(push.wait(100) for push in pushes)
    assert whole.content(spec, [0, 2]) == source.content(spec, [0, 2])
    assert content(whole, (start, stop)) == content(source, (start, stop))
    assert content(whole, (0, start), (stop, TOKENS)) == untouched


def test_an_offer_that_grows_is_pulled_before_it_is_computed(device):
    gate = Event()
    spec = CacheSpec("m", (attention([0], kv_heads=2, head_dim=64, block_tokens=16),))
    source, target = Cache(spec, device, 1), Cache(spec, device, 2, writable=True)
    ids = source.memory.leaves[spec.groups[0].kind, 0, "k"].tokens.block_ids.tolist()
    want = source.content(spec, [0])
    growing = kvwire.CacheMemory(spec, source.given, tokens=TOKENS, block_ids=ids[:5], growing=True)
    with kvwire.Sender(listen="127.0.0.1:0", codec="tiered", staging=staging(device)) as sender, \
            kvwire.Receiver(None, staging=staging(device)) as receiver:
        offer = sender.offer(growing)
        ticket = receiver.pull(sender.address, offer.offer_id, target.memory)
        offer.push_items(growing.items(0, (0, 75)))
        eventually(lambda: ticket.progress().verified_bytes == 75 * spec.groups[0].row_bytes)
        for array in source.arrays.values():  # the rest has still to be computed
            with device.access():
                final = array[ids[5:]].copy()
                array[ids[5:]] = 0
            device.wait_for(device.engine, gate)
            device.enqueue(device.engine,
                           lambda array=array, final=final: array.__setitem__(ids[5:], final))
        growing.extend_blocks(0, ids[5:])
        with device.access():  # block 4 has tokens of both parts, and is final
            assert np.any(source.arrays[0, "k"][ids[4]])
        offer.push_items(growing.items(0, (75, TOKENS)))
        offer.finish()
        assert not offer.done()
        gate.reached.set()
        ticket.result(100)
        offer.result(100)
    assert target.content(spec, [0]) == want


@pytest.mark.parametrize("pulled", [False, True])
def test_an_offer_that_is_cancelled_lets_go_of_its_pages(device, pulled):
    spec, gate = hybrid(), Event()
    source, target = Cache(spec, device, 1), Cache(spec, device, 2, writable=True)
    with kvwire.Sender(listen="127.0.0.1:0", codec="tiered", staging=staging(device)) as sender, \
            kvwire.Receiver(None, staging=staging(device)) as receiver:
        offer = sender.offer(source.memory)
        push = offer.push(1)
        ticket = None
        if pulled:
            ticket = receiver.pull(sender.address, offer.offer_id, target.memory)
            ticket.wait_layer(1, 100)
        device.wait_for(device.engine, gate)
        late = offer.push(3)
        gate.reached.set()
        offer.cancel()
        assert offer._source.reading == 0
        assert push.wait(100) and late.wait(100)
        for handle in filter(None, (offer, ticket)):
            with pytest.raises(TransferCancelled):
                handle.result(100)
        ring = sender._staged["cuda:0"][0].ring
        eventually(lambda: ring.free_count == ring.count)
        again = sender.offer(source.memory, offer_id=offer.offer_id).push_all().finish()
        receiver.pull(sender.address, again.offer_id, target.memory).result(100)
    assert target.content(spec) == source.content(spec)


def test_who_awaits_a_push_learns_that_its_offer_is_off(device):
    source = Cache(hybrid(), device, 1)

    async def offer_and_cancel():
        with kvwire.Sender(listen="127.0.0.1:0", staging=staging(device)) as sender:
            offer = sender.offer(source.memory)
            pushed = asyncio.ensure_future(wait(offer.push(1)))
            await asyncio.sleep(0)  # it waits now
            offer.cancel()
            await asyncio.wait_for(pushed, 30)

    async def wait(push):
        await push
    asyncio.run(offer_and_cancel())


def test_ranks_pull_their_heads_from_device_memory(device):
    whole = CacheSpec("tp", (attention([0], kv_heads=4, head_dim=32, block_tokens=16),))
    source = Cache(whole, device, 5)
    with kvwire.Sender(listen="127.0.0.1:0", codec="tiered", staging=staging(device)) as sender, \
            kvwire.Receiver(None, staging=staging(device)) as receiver:
        for rank in range(2):
            half = whole.shard(rank, 2)
            target = Cache(half, device, 6, writable=True)
            offer = sender.offer(source.memory, carry=half, destination_rank=(rank, 2))
            offer.push_all().finish()
            receiver.pull(sender.address, offer.offer_id, target.memory,
                          destination_rank=(rank, 2)).result(100)
            items = target.memory.items(0)
            with device.access():
                assert plan.gather(half, items, source.memory.leaves) == \
                    plan.gather(half, items, target.memory.leaves)
