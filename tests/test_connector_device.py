"""Connectors of engines whose caches lie in device memory: hand-offs between pools, both routes.

The stand-in's memory can be touched by its own streams only, at their time: what the engine
computes is enqueued on its stream, and a read too early finds poison.
"""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from standin_device import Event, StandInDevice
from test_connector_core import (
    BLOCKS, SAID, STATE_TABLE, TOKENS, WHOLE, Memory, hand_off, outcomes, paged, pull_routes,
    push_routes,
)

torch = pytest.importorskip("torch")

import kvwire
from faults import eventually
from kvwire.connectors import prefill_side
from kvwire.connectors.decode_side import DecodeSide
from kvwire.connectors.options import Options
from kvwire.connectors.pool import CachePool, Pages
from kvwire.connectors.prefill_side import PrefillSide
from kvwire.errors import ErrorCode, LimitError, UnsupportedError, UsageError
from kvwire.connectors.vllm_layout import Engine, cache_pool
from standin_tensors import DeviceTensors, plain
from test_vllm_layout import FULL, GDN, attention, config, memory_of

POISON = 0xA5
SMALL = dict(ring_bytes=1 << 20, slice_bytes=64 << 10)


def raw(array):
    """Return its bytes: torch does little with uint16."""
    return plain(array).view(torch.uint8)


class DeviceMemory(Memory):
    """An engine's memory on a device. `final` is what prefill computes, tensor by tensor."""

    def __init__(self, device, seed, **options):
        self.device, tensors = device, DeviceTensors(device)
        super().__init__(seed, place=tensors.of, **options)
        with device.access():
            self.final = {key: plain(array).clone() for key, array in self.arrays.items()}
        assert self.pool.device == "cuda:0"

    def content(self, block_ids, start=0):
        with self.device.access():
            return super().content(block_ids, start)

    def poison(self):
        with self.device.access():
            for array in self.arrays.values():
                raw(array).fill_(POISON)

    def compute(self, layer, block_ids):
        """Enqueue what a forward pass writes into a layer's blocks; of states into theirs."""
        for (index, of_layer, name), array in self.arrays.items():
            if of_layer == layer:
                split = self.pool._pages[index].split
                ids = [block * split + part for block in block_ids[min(index, STATE_TABLE)]
                       for part in range(split)]
                target, final = raw(array), raw(self.final[index, layer, name])
                self.device.enqueue(self.device.engine, lambda target=target, final=final, ids=ids:
                                    target.__setitem__(ids, final[ids]))

    def overwrite(self, block_ids):
        """Enqueue that others write into these blocks."""
        for (index, _, _), array in self.arrays.items():
            ids, target = block_ids[min(index, STATE_TABLE)], raw(array)
            self.device.enqueue(self.device.engine,
                                lambda target=target, ids=ids: target.__setitem__(ids, POISON))


@pytest.fixture
def device():
    made = StandInDevice()
    yield made
    made.close()


@pytest.fixture
def sides(device):
    made, staging = [], kvwire.Staging(device=device, **SMALL)

    def make(memory, decode, **options):
        if decode:
            receiver = kvwire.Receiver(patience_s=30, staging=staging)
            side = DecodeSide(memory.pool, receiver, **options)
        else:
            side = PrefillSide(
                memory.pool, offers=kvwire.Sender(listen="127.0.0.1:0", staging=staging),
                connect=lambda at: kvwire.Sender(at, lanes=1, codec="tiered", staging=staging),
                **options)
        made.append(side)
        return side

    yield make
    for side in made:
        side.close()


@pytest.fixture
def gate(sides):
    """What stops the engine's stream until it is opened."""
    made = Event()
    yield made
    made.reached.set()


def routes_of(how, prefill, decode, ranks=(1, 1)):
    return push_routes(decode, ranks) if how == "push" else pull_routes(prefill, ranks)


@pytest.mark.parametrize("how", ["push", "pull"])
@pytest.mark.parametrize("places, start, splits", [
    ("device to device", 0, (1, 1)), ("device to device", 28, (2, 1)),
    ("device to host", 8, (1, 2)), ("host to device", 8, (2, 1))])
def test_layers_leave_when_they_are_computed(sides, device, gate, monkeypatch, how, places, start,
                                             splits):
    """Chunked prefill, layer by layer, the last chunk long in coming; states overwritten at once.
    """
    monkeypatch.setattr(prefill_side, "_PUSH_BYTES_MIN", 1)
    here, there = (DeviceMemory(device, seed, split=split) if place == "device" else
                   Memory(seed, split=split)
                   for place, seed, split in zip(places.split(" to "), (1, 2), splits))
    sent, got = here.blocks(3), there.blocks(4)
    want = here.content(sent, start)
    prefill, decode = sides(here, False), sides(there, True)
    routes = routes_of(how, prefill, decode)
    on_device = isinstance(here, DeviceMemory)
    if on_device:
        here.poison()
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    if how == "push":
        decode.begin("d", routes[1], (start, TOKENS), got, SAID)
    done = 0
    for stop in (8, 16, TOKENS):
        blocks = -(-stop // (4 * here.split))
        prefill.extend("p", paged(sent, done, blocks))
        if stop == TOKENS:
            device.wait_for(device.engine, gate)
        for layer in here.pool.layers:
            if on_device:
                here.compute(layer, paged(sent, done, blocks)[:STATE_TABLE] +
                             [sent[STATE_TABLE] if stop == TOKENS else []])
            prefill.computed("p", stop, [layer])
        done = blocks
    prefill.finish("p", sent)  # has waited for nothing: the last chunk is not computed
    if how == "pull":
        decode.begin("d", routes[1], (start, TOKENS), got, SAID)
    if on_device:
        here.overwrite([[], [], [], sent[STATE_TABLE]])
        assert prefill.poll() == []
        assert decode.poll() == []
    gate.reached.set()
    assert outcomes(prefill, decode) == [None, None]
    assert there.content(got, start) == want
    assert decode.totals.cache_bytes == there.pool.memory((start, TOKENS), got).bytes


@pytest.mark.parametrize("how", ["push", "pull"])
@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_tensor_parallelism_may_differ_on_devices(sides, device, how, ranks):
    sources = [DeviceMemory(device, 9, rank=rank, count=ranks[0]) for rank in range(ranks[0])]
    targets = [DeviceMemory(device, 8, rank=rank, count=ranks[1]) for rank in range(ranks[1])]
    sent = sources[0].blocks(3)
    prefills = [sides(part, False) for part in sources]
    decodes = [sides(part, True) for part in targets]
    routes = routes_of(how, prefills, decodes, ranks)
    hand_off(prefills, decodes, routes, sent)
    for source in sources:
        for target in targets:
            carry = max(source, target, key=lambda memory: memory.pool.count).pool.spec
            mine, theirs = (each.pool.memory((0, TOKENS), sent) for each in (source, target))
            with device.access():
                for layer in WHOLE.groups[0].layers:
                    items = mine.items(layer)
                    assert kvwire.plan.gather(carry, items, mine.leaves) == \
                        kvwire.plan.gather(carry, items, theirs.leaves)


@pytest.mark.parametrize("how", ["push", "pull"])
@pytest.mark.parametrize("granted", [True, False])
def test_a_preempted_request_leaves_its_pages_at_once(sides, device, how, granted):
    here, there = DeviceMemory(device, 1), DeviceMemory(device, 2)
    prefill, decode = sides(here, False), sides(there, True)
    first, got = here.blocks(3), there.blocks(4)
    second = [[block for block in range(BLOCKS) if block not in ids][:len(ids)] for ids in first]
    for key, final in here.final.items():  # computed again, a token is the same
        table = min(key[0], STATE_TABLE)
        raw(final)[second[table]] = raw(final)[first[table]].clone()
    want = here.content(first)
    here.poison()
    routes = routes_of(how, prefill, decode)
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    prefill.extend("p", paged(first, 0, 4))
    for layer in here.pool.layers:
        here.compute(layer, paged(first, 0, 4)[:STATE_TABLE] + [[]])
        prefill.computed("p", 13, [layer])
    prefill.computed("p", 13)
    transfer = prefill._open["p"].streams[0].transfer
    if granted:
        decode.begin("d", routes[1], (0, TOKENS), got, SAID)
        assert eventually(lambda: transfer.progress().granted)
    prefill.suspend("p")
    assert transfer._source.reading == 0
    here.overwrite(first)
    prefill.extend("p", paged(second))
    for layer in here.pool.layers:
        here.compute(layer, second)
    assert transfer.done() != granted
    if not granted and how == "push":
        decode.begin("d", routes[1], (0, TOKENS), got, SAID)
    prefill.finish("p", second)
    if not granted and how == "pull":  # as the router does: when prefill has answered
        decode.begin("d", routes[1], (0, TOKENS), got, SAID)
    errors = outcomes(prefill, decode)
    if errors == [None, None]:
        assert there.content(got) == want
    else:  # decode took up the first transfer before it heard that it was off
        assert not granted and errors[1].code == ErrorCode.CANCELLED


def test_blocks_that_others_may_have_cleared_fail_the_hand_off(sides, device):
    here, there = DeviceMemory(device, 1), DeviceMemory(device, 2)
    prefill, decode = sides(here, False), sides(there, True)
    routes, sent = push_routes(decode), here.blocks(3)
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    prefill.extend("p", paged(sent))
    prefill.computed("p", TOKENS)
    decode.begin("d", routes[1], (0, TOKENS), there.blocks(4), SAID)
    transfer = prefill._open["p"].streams[0].transfer
    assert eventually(lambda: transfer.progress().granted)
    prefill.suspend("p", overwritten=True)
    assert transfer._source.reading == 0
    errors = outcomes(prefill, decode)
    assert isinstance(errors[0], UnsupportedError) and "preempted" in str(errors[0])
    assert errors[1].code == ErrorCode.CANCELLED and errors[1].remote


@pytest.mark.parametrize("how", ["push", "pull"])
@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_an_abort_in_mid_copy_leaves_the_pages_to_others(sides, device, gate, how, who):
    here, there = DeviceMemory(device, 1), DeviceMemory(device, 2)
    prefill, decode = sides(here, False), sides(there, True)
    routes, sent, got = routes_of(how, prefill, decode), here.blocks(3), there.blocks(4)
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    prefill.extend("p", paged(sent))
    prefill.computed("p", 8)
    decode.begin("d", routes[1], (0, TOKENS), got, SAID)
    ticket = decode._open["d"].ticket
    assert eventually(lambda: prefill.poll() == [] and ticket.progress().verified_bytes > 0)
    transfer = prefill._open["p"].streams[0].transfer
    device.wait_for(device.engine, gate)  # what is pushed now is still to be computed
    prefill.finish("p", sent)
    gate.reached.set()
    if who == "prefill":
        prefill.drop("p")
        assert transfer._source.reading == 0
    else:
        decode.drop("d")
        assert ticket._target.writing == 0
    here.poison()
    there.poison() if who == "decode" else None
    [error] = outcomes(decode if who == "prefill" else prefill)
    if error is not None:  # None: all had arrived before
        assert error.code == ErrorCode.CANCELLED and error.remote
    zone = decode._receiver._staged["cuda:0"][0]
    assert eventually(lambda: zone.zone.rooms_free == zone.room_count)
    if who == "decode":
        with device.access():
            assert all((raw(array) == POISON).all()
                       for array in there.arrays.values())


@pytest.mark.parametrize("who", ["prefill", "decode"])
def test_a_drop_waits_for_the_device_to_leave_the_pages(sides, device, gate, who):
    here, there = DeviceMemory(device, 1), DeviceMemory(device, 2)
    prefill, decode = sides(here, False), sides(there, True)
    routes, sent = push_routes(decode), here.blocks(3)
    prefill.begin("p", routes[0], (0, TOKENS), SAID)
    prefill.extend("p", paged(sent))
    decode.begin("d", routes[1], (0, TOKENS), there.blocks(4), SAID)
    prefill.computed("p", 8)
    transfer, ticket = prefill._open["p"].streams[0].transfer, decode._open["d"].ticket
    handle, stream, busy, drop = {
        "prefill": (transfer, transfer._staged._compute, lambda: transfer._source.reading > 0,
                    lambda: prefill.drop("p")),
        "decode": (ticket, ticket._staged._stream, lambda: ticket._target.writing > 0,
                   lambda: decode.drop("d"))}[who]
    device.wait_for(stream, gate)  # the next kernel is long in coming
    prefill.computed("p", TOKENS)
    assert eventually(busy)
    dropping = threading.Thread(target=drop)
    dropping.start()
    assert eventually(handle.done)
    dropping.join(0.2)
    assert dropping.is_alive() and busy()
    gate.reached.set()
    dropping.join(30)
    assert not dropping.is_alive() and not busy()


@pytest.mark.parametrize("places", ["host to device", "device to host"])
def test_vllm_on_a_cpu_and_on_a_gpu_hand_off_to_each_other(sides, device, places):
    """Other kernels, other orders of keys and of convolution columns, one aliased buffer each."""
    latents = {"layers.5.mla": attention("MLAAttentionSpec", 1, 24, head_size_v=0)}
    groups, pools, tensors = (GDN, FULL, latents), {}, {}
    blocks, tokens = {"host": [[4], [2, 5], [0, 1]], "device": [[1], [3, 0], [5, 4]]}, 40
    for place, kernels in (("host", "CPU_ATTN vec"), ("device", "FLASH_ATTN")):
        held = tensors[place] = memory_of(*groups, seed=len(place))
        if place == "device":
            name = next(iter(FULL))
            held[name] = held[name].reshape(6, 32, 2, 16).transpose(1, 2)
            tensors[place] = {name: DeviceTensors(device).of(each) for name, each in held.items()}
        engine = Engine("m", kernels=dict.fromkeys(FULL, kernels), latent_dims=(16, 8))
        pools[place] = cache_pool(config(*groups), tensors[place], engine)
    assert pools["host"].device is None and pools["device"].device == "cuda:0"
    theirs, ours = places.split(" to ")
    prefill, decode = (sides(SimpleNamespace(pool=pools[place]), place == ours)
                       for place in (theirs, ours))
    routes = push_routes(decode)
    prefill.begin("p", routes[0], (0, tokens), SAID)
    prefill.extend("p", [[], *blocks[theirs][1:]])
    prefill.finish("p", blocks[theirs])
    decode.begin("d", routes[1], (0, tokens), blocks[ours], SAID)
    assert outcomes(prefill, decode) == [None, None]
    memories = [pools[place].memory((0, tokens), blocks[place]) for place in (theirs, ours)]
    with device.access():
        for layer in pools[theirs].layers:
            items = memories[0].items(layer)
            sent, got = (kvwire.plan.gather(pools[theirs].spec, items, memory.leaves)
                         for memory in memories)
            assert sent == got
        name = next(iter(FULL))
        keys = plain(tensors["device"][name])[3, 1, 7, :8].view(torch.int16)
        flat = tensors["host"][name].as_strided((6, 2, 512), (16384, 512, 1)).view(torch.int16)
        assert (flat[2, 1, :256].view(8, 32)[:, 7] == keys).all()


def test_no_room_for_states_fails_the_request_alone(sides, device, monkeypatch):
    def full(self, shape):
        raise torch.OutOfMemoryError("CUDA out of memory")
    here = DeviceMemory(device, 1)
    prefill = sides(here, False)
    tensor = here.arrays[3, 0, "state"]
    monkeypatch.setattr(type(tensor), "new_empty", full)
    prefill.begin("p", pull_routes(prefill)[0], (0, TOKENS), SAID)
    prefill.extend("p", paged(here.blocks(3)))
    prefill.computed("p", 8)
    [error] = outcomes(prefill)
    assert isinstance(error, LimitError) and "no room on cuda:0" in str(error)


def test_a_pool_is_in_one_place(device):
    spec = kvwire.CacheSpec("m", (kvwire.attention([0, 1], kv_heads=1, head_dim=8,
                                                   block_tokens=4, fused=True),))
    arrays = {(layer, "kv"): np.zeros((4, 4, 1, 16), np.uint16) for layer in (0, 1)}
    arrays[1, "kv"] = DeviceTensors(device).of(arrays[1, "kv"])
    with pytest.raises(UsageError, match="on None, cuda:0"):
        CachePool(spec, [Pages(0, arrays)])


def test_what_would_fail_every_hand_off_is_refused_at_start(device):
    pool = DeviceMemory(device, 1).pool
    with pytest.raises(UnsupportedError, match="cuda:0"):  # no GPU here
        Options.of({}).check_pool(pool)
    Options(staging=kvwire.Staging(device=device)).check_pool(pool)
    Options.of({}).check_pool(Memory(1).pool)
    large = kvwire.CacheSpec("m", (kvwire.recurrent([0], heads=8, key_dim=64, value_dim=64),))
    state = DeviceTensors(device).empty((2, 8, 64, 64), torch.float32)
    with pytest.raises(LimitError, match="state has 131072 bytes: give Staging a slice_bytes"):
        Options(staging=kvwire.Staging(device=device, **SMALL)).check_pool(
            CachePool(large, [Pages(0, {(0, "state"): state})]))


@pytest.mark.parametrize("staging, words", [
    ({"ring": 1}, "may have ring_bytes, slice_bytes, sm_share"), (5, "staging is 5"),
    ({"sm_share": "all"}, "numbers each"), ({"sm_share": 2}, "above 0 and up to 1"),
    ({"slice_bytes": 5}, "multiple of 4096")])
def test_bad_staging_is_named(staging, words):
    with pytest.raises(UsageError, match=words):
        Options.of({"staging": staging})


def test_staging_reaches_senders_and_receivers():
    options = Options.of({"prefill_listen": "127.0.0.1:0", "staging": {"sm_share": 0.5}})
    made = [options.receiver(0), options.offers(0), options.sender("127.0.0.1:1")]
    for each in made:
        with each:
            assert each._staging == kvwire.Staging(sm_share=0.5)
