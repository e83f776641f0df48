"""One sender, one receiver: every way to push, and what arrives."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvwire
from faults import Ends, Held, eventually, same_content
from kvwire.control import Item
from kvwire.layout import REQUEST_LAYER, CacheSpec
from strategies import cache_specs

TOKENS = 21
LAYERS = 3


def attention_spec(**options):
    options = {"kv_heads": 4, "head_dim": 16, "dtype": "bf16"} | options
    return CacheSpec("m", (kvwire.attention(range(LAYERS), **options),))


SPEC = attention_spec()
BIG = attention_spec(kv_heads=8, head_dim=128)
HYBRID = CacheSpec("hybrid", (
    kvwire.attention((1, 3), kv_heads=2, head_dim=8, block_tokens=4),
    kvwire.latent((5,), latent_dim=12, rope_dim=4, block_tokens=8),
    kvwire.sliding_window((1, 7), 6, kv_heads=1, head_dim=4, dtype="e4m3"),
    kvwire.recurrent((0, 2), heads=2, key_dim=4, value_dim=8),
    kvwire.convolution((0, 2), {"q": 4, "k": 4, "v": 8}, columns=3),
    kvwire.auxiliary((3,), "scale", heads=2, dtype="fp32"),
    kvwire.request_tensor("rope_delta", (3,), "int64"),
))


@pytest.fixture(scope="module")
def links():
    """One receiver, and senders by (lanes, codec, chunk_bytes), for as long as the module runs."""
    made = {}
    with kvwire.Receiver() as receiver:
        def sender(lanes, codec, chunk_bytes):
            key = lanes, codec, chunk_bytes
            if key not in made:
                made[key] = kvwire.Sender(receiver.address, lanes=lanes, codec=codec,
                                          chunk_bytes=chunk_bytes)
            return made[key]
        yield receiver, sender
        for each in made.values():
            each.close()


@pytest.fixture
def ends():
    with Ends() as made:
        yield made


def caches(spec=SPEC, tokens=TOKENS, held=None, **options):
    return (Held(spec, tokens, 1, **options),
            Held(held or spec, tokens, 2, writable=True))


@settings(max_examples=150)
@given(st.data(), cache_specs(groups_max=3), st.sampled_from((1, 2, 4)),
       st.sampled_from(("raw", "lz4")), st.sampled_from((4096, 65536, 1 << 20)),
       st.integers(0, 2**32))
def test_any_spec_arrives_bit_exact(links, data, spec, lanes, codec, chunk_bytes, seed):
    receiver, sender = links
    start = data.draw(st.integers(0, 40))
    tokens = (start, start + data.draw(st.sampled_from((0, 1, 3, 16, 33))))
    other = spec.map_tensors(lambda group, tensor: tensor if group.block_tokens else replace(
        tensor, axes=tuple(data.draw(st.permutations(tensor.axes)))))
    if not data.draw(st.booleans()):
        other = spec
    source = Held(spec, tokens, seed, repeat_blocks=data.draw(st.booleans()))
    for raw in source.storage:
        raw.flags.writeable = False
    target = Held(other, tokens, seed + 1, writable=True)
    ticket = receiver.expect(target.memory)
    transfer = sender(lanes, codec, chunk_bytes).open(ticket.id, source.memory)
    layers = sorted({layer for group in spec.groups for layer in group.layers})
    pushes = [transfer.push(layer) for layer in data.draw(st.permutations(layers))]
    sent = transfer.finish().result(20)
    got = ticket.result(20)
    assert all(push.done() for push in pushes)
    assert sent.verified_bytes == got.verified_bytes == source.memory.bytes
    assert ticket.layers_ready() == set(layers) and set(ticket.report().values()) == {"ready"}
    assert same_content(source, target) and target.only_leaves_were_written()


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.sampled_from((0, 1, 4, 16)), st.sampled_from((0, 2, 16)),
       st.sampled_from(("NHD", "HND")), st.booleans(), st.integers(0, 70), st.integers(0, 9))
def test_engines_may_lay_their_caches_out_otherwise(links, seed, here, there, order, fused, count,
                                                   start):
    receiver, sender = links
    tokens = start, start + count
    source = Held(attention_spec(block_tokens=here), tokens, seed, repeat_blocks=bool(seed % 2))
    target = Held(attention_spec(block_tokens=there, order=order, fused=fused), tokens, seed + 1,
                  writable=True)
    ticket = receiver.expect(target.memory)
    sender(2, "raw", 65536).send(ticket.id, source.memory).result(20)
    ticket.result(20)
    assert same_content(source, target) and target.only_leaves_were_written()


@pytest.mark.parametrize("codec", ["raw", "lz4"])
def test_every_kind_at_once(ends, codec):
    source, target = caches(HYBRID, repeat_blocks=True)
    ticket = ends.receiver.expect(target.memory)
    ends.sender.send(ticket.id, source.memory, codec=codec).result(10)
    assert ticket.result(10).verified_bytes == source.memory.bytes
    assert same_content(source, target) and target.only_leaves_were_written()


def test_nan_payloads_travel_as_they_are(ends):
    spec = attention_spec(dtype="fp32")
    source, target = caches(spec)
    for raw in source.storage:
        raw[:] = np.full(raw.size // 4, 0x7FA00001, np.uint32).view(np.uint8)[:raw.size]
    ticket = ends.receiver.expect(target.memory)
    ends.sender.send(ticket.id, source.memory, codec="lz4").result(10)
    ticket.result(10)
    assert (target.content()[source.spec.groups[0].kind, 1, "k"] == 0x7FA00001).all()


@pytest.mark.parametrize("here, there", [(3, 4), (4, 3), (1, 4)])
def test_convolution_columns_align_at_the_newest(ends, here, there):
    spec, other = (CacheSpec("m", (kvwire.convolution((0,), 6, columns=columns, order=order),))
                   for columns, order in ((here, "SD"), (there, "DS")))
    source, target = caches(spec, 0, other)
    ticket = ends.receiver.expect(target.memory)
    ends.sender.send(ticket.id, source.memory).result(10)
    ticket.result(10)
    sent, = source.content().values()
    got, = target.content().values()
    common = min(here, there)
    assert (sent[:, here - common:] == got[:, there - common:]).all()
    assert not got[:, :there - common].any()


def test_the_short_form(ends):
    rng = np.random.default_rng(0)
    tensors = {"x": rng.normal(size=(3, 5, 7)), "flag": np.array(True), "y": np.arange(9)[::2],
               "empty_name_": np.float16(2.5) * np.ones((1, 1, 4), np.float16)}
    got = {name: np.zeros_like(array, order="C") for name, array in tensors.items()}
    ticket = kvwire.receive(ends.receiver, got)
    kvwire.send(ends.receiver.address, ticket.id, tensors)
    ticket.result(10)
    for name, array in tensors.items():
        assert (got[name] == array).all(), name


def test_layers_are_ready_one_by_one(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.open(ticket.id, source.memory)
    for done, layer in enumerate((2, 0, 1)):
        with pytest.raises(kvwire.TransferTimeout):
            ticket.wait_layer(layer, 0.02)
        assert transfer.push(layer).wait(10)
        ticket.wait_layer(layer, 10)
        assert len(ticket.layers_ready()) == done + 1 and not ticket.done()
    transfer.finish().result(10)
    ticket.result(10)


def test_token_ranges_then_states(ends):
    source, target = caches(HYBRID)
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.open(ticket.id, source.memory)
    layers = sorted({layer for group in HYBRID.groups for layer in group.layers})
    for tokens in ((0, 5), (5, 16), (16, TOKENS)):
        pushes = [transfer.push(layer, tokens=tokens, states=False) for layer in layers]
    assert all(push.wait(10) for push in pushes)
    assert ticket.layers_ready() == {1, 3, 5, 7}, "layers with states are not ready yet"
    for layer in layers:
        transfer.push(layer, tokens=(0, 0))
    transfer.finish().result(10)
    ticket.result(10)
    assert same_content(source, target)


def test_layer_waits_for_all_its_tokens(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.open(ticket.id, source.memory)
    for tokens in ((10, TOKENS), (0, 9)):
        transfer.push(0, tokens=tokens).wait(10)
    assert ticket.report() == {0: "partly written", 1: "unwritten", 2: "unwritten"}
    transfer.push(0, tokens=(9, 10)).wait(10)
    assert ticket.report() == {0: "ready", 1: "unwritten", 2: "unwritten"}


METADATA = {"int": -(1 << 63), "max": (1 << 63) - 1, "float": float("inf"), "yes": True,
            "text": "Grüße, 你好", "data": bytes(range(256)), "": ""}


def test_metadata_of_every_type(ends):
    entries = {key: value for key, value in METADATA.items() if key}
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.open(ticket.id, source.memory, metadata=entries | {"over": 1})
    assert eventually(lambda: ticket.progress().granted)
    assert ticket.metadata == entries | {"over": 1}
    assert type(ticket.metadata["yes"]) is bool and type(ticket.metadata["int"]) is int
    transfer.push_all().finish({"over": 2.5, "first": 77}).result(10)
    ticket.result(10)
    assert ticket.metadata == entries | {"over": 2.5, "first": 77}
    assert ticket.metadata_by_rank() == {0: ticket.metadata}


@pytest.mark.parametrize("bad", [
    {"": 1}, {1: 1}, {"a": None}, {"a": [1]}, {"a": 1 << 63}, {"a": b"x" * 65536},
    {str(n): 0 for n in range(65)}, {"x" * 256: 1}, {"a\0": 1},
])
def test_metadata_that_cannot_travel_is_refused_by_the_call(ends, bad):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    with pytest.raises(kvwire.UsageError):
        ends.sender.open(ticket.id, source.memory, metadata=bad)
    transfer = ends.sender.open(ticket.id, source.memory)
    with pytest.raises(kvwire.UsageError):
        transfer.finish(bad)
    transfer.push_all().finish().result(10)


def test_calls_out_of_turn_are_refused(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    transfer = ends.sender.open(ticket.id, source.memory)
    with pytest.raises(kvwire.UsageError, match="layer 9"):
        transfer.push(9)
    with pytest.raises(kvwire.UsageError, match="layer 9"):
        ticket.wait_layer(9)
    for item in (Item(9, 0, 0, 0, 1), Item(0, 9, 0, 0, 1), Item(0, 0, 9, 0, 1),
                 Item(0, 0, 0, 0, TOKENS + 1), Item(0, 0, 0, 5, 4)):
        with pytest.raises(kvwire.UsageError):
            transfer.push_items([item])
    transfer.push_all().finish()
    with pytest.raises(kvwire.UsageError, match="finish"):
        transfer.push(0)
    with pytest.raises(kvwire.UsageError, match="finish"):
        transfer.finish()
    transfer.result(10)
    ticket.result(10)
    transfer.cancel()
    ticket.cancel()
    assert ticket.exception() is transfer.exception() is None


def test_progress_is_reported_in_the_waiting_thread():
    with Ends(bytes_per_s=10_000_000) as ends:
        source, target = caches(BIG, 700)
        ticket = ends.receiver.expect(target.memory)
        transfer = ends.sender.send(ticket.id, source.memory)
        seen = []
        ticket.result(20, lambda progress: seen.append((threading.get_ident(), progress)))
        assert {thread for thread, _ in seen} == {threading.get_ident()}
        done = [progress.verified_bytes for _, progress in seen]
        assert done == sorted(done) and done[-1] == source.memory.bytes and len(set(done)) > 2
        assert transfer.result(10).repaired_chunks == 0
        with pytest.raises(ZeroDivisionError):
            ends.receiver.expect(target.memory).result(1, lambda progress: 1 / 0)


def test_stats_count(ends):
    source, target = caches()
    ticket = ends.receiver.expect(target.memory)
    ends.sender.send(ticket.id, source.memory).result(10)
    ticket.result(10)
    stats = ends.receiver.stats()
    assert stats["connections"] == 4 and stats["links"] == 1 and stats["open_transfers"] == 0
    assert stats["bytes_received"] > source.memory.bytes
    assert ends.sender.stats()["bytes_sent"] > source.memory.bytes
    assert REQUEST_LAYER not in ticket.report()
