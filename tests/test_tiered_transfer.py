"""Transfers with codec "tiered": what arrives, what it costs, and who is asked again."""

from dataclasses import replace

import numpy as np
import pytest
from faults import Held, same_content
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import cache_specs
from tiered_data import Warm

import kvwire
from kvwire import _native, plan
from kvwire.layout import Axis, CacheSpec, DType
from kvwire.presets import preset_names
from kvwire.tensor_spec import GroupKind
from kvwire.tiered import OPAQUE, PART, CodeTable, decode_tiered, element_format

CHUNK_BYTES = 1 << 16
ODD_CHUNK_BYTES = 4096 * 7  # its chunks begin anywhere in a pattern


def attention_spec(layers=2, model="m", **options):
    options = {"kv_heads": 4, "head_dim": 32, "dtype": "bf16"} | options
    return CacheSpec(model, (kvwire.attention(range(layers), **options),))


@pytest.fixture(scope="module")
def links():
    """One receiver, and senders by number of lanes, for as long as the module runs."""
    made = {}
    with kvwire.Receiver() as receiver:
        def sender(lanes=1, chunk_bytes=CHUNK_BYTES):
            key = lanes, chunk_bytes
            if key not in made:
                made[key] = kvwire.Sender(receiver.address, lanes=lanes, codec="tiered",
                                          chunk_bytes=chunk_bytes)
            return made[key]
        yield receiver, sender
        for each in made.values():
            each.close()


def carry(links, source, target, lanes=1, chunk_bytes=CHUNK_BYTES):
    """Send a cache and compare every byte; return raw bytes over bytes on the wire."""
    receiver, sender = links
    ticket = receiver.expect(target.memory)
    sent = sender(lanes, chunk_bytes).send(ticket.id, source.memory).result(20)
    got = ticket.result(20)
    assert sent.verified_bytes == got.verified_bytes == source.memory.bytes
    # Of several lanes one that a busy machine keeps waiting is set aside: its chunks go again.
    assert lanes > 1 or sent.repaired_chunks == 0
    assert same_content(source, target) and target.only_leaves_were_written()
    return sent.verified_bytes / max(sent.wire_bytes, 1)


@settings(max_examples=100)
@given(st.data(), cache_specs(groups_max=3), st.sampled_from((1, 2, 4)),
       st.sampled_from((4096, 65536, 1 << 20)), st.sampled_from((Held, Warm)),
       st.integers(0, 2**32))
def test_any_spec_arrives_bit_exact(links, data, spec, lanes, chunk_bytes, contents, seed):
    start = data.draw(st.integers(0, 40))
    tokens = (start, start + data.draw(st.sampled_from((0, 1, 33, 700))))
    other = spec.map_tensors(lambda group, tensor: tensor if group.block_tokens else replace(
        tensor, axes=tuple(data.draw(st.permutations(tensor.axes)))))
    source = contents(spec, tokens, seed)
    target = Held(other, tokens, seed + 1, writable=True)
    carry(links, source, target, lanes, chunk_bytes)


@pytest.mark.parametrize("dtype, ratio", [("bf16", 1.4), ("fp16", 1.1), ("fp32", 1.15),
                                          ("e5m2", 1.2), ("e4m3", 1.05)])
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("block_tokens", [0, 16, 128])
@pytest.mark.parametrize("fused", [False, True])
def test_layouts_shrink_alike(links, dtype, ratio, order, block_tokens, fused):
    """Partial blocks at both ends; the other side lies in contiguous NHD."""
    tokens = (3, 3 + 1000)
    model = f"{order} in pages of {block_tokens}, {fused}"  # tables of its own
    spec = attention_spec(1, model, dtype=dtype, order=order, block_tokens=block_tokens,
                          fused=fused)
    target = Held(attention_spec(1, model, dtype=dtype), tokens, 2, writable=True)
    assert carry(links, Warm(spec, tokens, 1), target, lanes=2) > ratio


@pytest.mark.parametrize("name", preset_names())
def test_presets(links, name):
    """One layer of each of its groups, as the model has it, and again in pages."""
    whole = CacheSpec.preset(name)
    spec = CacheSpec(name, tuple(replace(group, layers=group.layers[:1])
                                 for group in whole.groups))
    tokens = 70
    paged = spec.with_block_tokens(16)
    ratio = carry(links, Warm(spec, tokens, 1), Held(paged, tokens, 2, writable=True),
                  chunk_bytes=1 << 18)
    assert ratio > 1.1
    assert carry(links, Warm(paged, tokens, 1), Held(spec, tokens, 2, writable=True), lanes=3,
                 chunk_bytes=1 << 18) > 1.1


def test_noise_costs_next_to_nothing(links):
    spec, tokens = attention_spec(), 1000
    assert carry(links, Held(spec, tokens, 1), Held(spec, tokens, 2, writable=True)) > 0.999


def test_constants_and_zeros_cost_next_to_nothing(links):
    spec = CacheSpec("m", (
        kvwire.attention(range(2), kv_heads=4, head_dim=64),
        kvwire.auxiliary((3,), "scale", heads=200, dtype="int8"),
        kvwire.request_tensor("mask", (40_000,), "int64")))
    source = Held(spec, 500, 1)
    for raw in source.storage:
        raw[:] = 0
    assert carry(links, source, Held(spec, 500, 2, writable=True)) > 50


def exponents_by_place(spec, item):
    """The exponent of each element of an item, in wire order, as a sum over what it depends on.

    So many different ones that only the right bases make them cheap.
    """
    from kvwire.reference_memory import wire_elements
    tensor = spec.groups[item.group_index].tensors[item.tensor_index]
    is_state = spec.groups[item.group_index].kind == GroupKind.RECURRENT
    found = []
    for leaf, where, coordinates in wire_elements(tensor, item):
        axes = [axis for axis in coordinates if axis not in (Axis.TOKEN, Axis.COLUMN)]
        salt = sum(map(ord, leaf.name))
        place = salt
        if is_state:  # what depends on both ends of the state would not be a sum
            inner = axes[-2:]
            outer = sum(coordinates[axis] * 7 for axis in axes[:-2])
            value = sum((coordinates[axis] * (5 + 2 * n) + outer + salt) * 5 % 11
                        for n, axis in enumerate(inner))
        else:
            for n, axis in enumerate(axes):
                place = place + coordinates[axis] * (3 + 2 * n)
            value = place * 5 % 23
        found.append((where, value))
    count = sum(len(where) for where, _ in found)
    exponents = np.zeros(count, np.uint64)
    for where, value in found:
        exponents[where] = value
    return exponents + np.uint64(2)


ONE_GROUP = [
    attention_spec(1), attention_spec(1, order="HND"), attention_spec(1, dtype="e5m2"),
    attention_spec(1, order="HND", block_tokens=16), attention_spec(1, fused=True),
    attention_spec(1, order="HND", block_tokens=16, fused=True, dtype="fp32"),
    CacheSpec("m", (kvwire.latent((0,), latent_dim=48, rope_dim=16, dtype="fp16"),)),
    CacheSpec("m", (kvwire.recurrent((0,), heads=8, key_dim=64, value_dim=32),)),
    CacheSpec("m", (kvwire.recurrent((0,), channels=640, key_dim=16, dtype="bf16"),)),
    CacheSpec("m", (kvwire.convolution((0,), {"q": 900, "k": 900, "v": 1800}, columns=3),)),
    CacheSpec("m", (kvwire.convolution((0,), 5000, columns=4, order="DS"),)),
]


@pytest.mark.parametrize("spec", ONE_GROUP, ids=range(len(ONE_GROUP)))
@pytest.mark.parametrize("tokens", [(0, 1024), (5, 1029)])
def test_bases_belong_to_their_elements(spec, tokens):
    """Where exponents depend on the channel alone, the bases of every part say them exactly."""
    memory = Held(spec, tokens, 1).memory
    book = _native.CodeBook()
    groups = plan.to_native(spec)
    for item in memory.items(0):
        tensor = spec.groups[item.group_index].tensors[item.tensor_index]
        exponents = exponents_by_place(spec, item)
        form = element_format(tensor.dtype)
        noise = np.random.default_rng(3).integers(0, 1 << (form.verbatim_bits - 1),
                                                  len(exponents), np.uint64)
        raw = (exponents << np.uint64(form.verbatim_bits - 1) | noise).astype(
            f"<u{form.item_bytes}").tobytes()
        placement = plan.place(spec, [item], memory)
        placement.scatter(0, raw)
        coder = _native.SegmentCoder(book, spec.model, groups, plan.native_items([item]),
                                     placement, ODD_CHUNK_BYTES)
        for at in range(0, len(raw), ODD_CHUNK_BYTES):
            chunk = raw[at:at + ODD_CHUNK_BYTES]
            coded = coder.encode(at, len(chunk))
            assert coded is not None
            payload, crc = coded
            assert decode_tiered(payload, len(chunk)) == chunk and crc == _native.crc32c(chunk)
            check_parts(payload, chunk, exponents[at // form.item_bytes:], form)


def check_parts(payload, chunk, exponents, form):
    at = element = 0
    while at < len(payload):
        header = PART.unpack(payload, at)
        if header["table_index"] == OPAQUE:  # the rest of a partial block, too short for a table
            assert header["raw_bytes"] < 1000
            at += header["coded_bytes"]
            element += header["raw_bytes"] // form.item_bytes
            continue
        table, _ = CodeTable.decode(payload[at + PART.bytes:])
        count = header["raw_bytes"] // form.item_bytes
        bases = table.bases(header["position"], count)
        mask = (1 << form.exponent_bits) - 1
        distances = (exponents[element:element + count].astype(np.int64) - bases) & mask
        assert len(set(distances.tolist())) == 1, table
        at += header["coded_bytes"]
        element += count
    assert element * form.item_bytes == len(chunk)
