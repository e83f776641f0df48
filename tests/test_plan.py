"""Native planner against the numpy definition, and the definition against plain indexing."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwire import plan
from kvwire.checksum import crc32c_plain
from kvwire.control import Item
from kvwire.errors import FormatError, LimitError, RefusedError, SpecMismatchError
from kvwire.layout import (
    REQUEST_LAYER, Axis, AxisSpec, CacheSpec, DType, GroupKind, LayerGroup, Slice, TensorSpec,
    attention, convolution, latent, recurrent, request_tensor, sliding_window,
)
from kvwire.memory import CacheMemory

POISON = 0xA5
LAYER = 3
CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
AXES = {
    GroupKind.FULL_ATTENTION: (Axis.TOKEN, Axis.HEAD, Axis.DIM),
    GroupKind.LATENT: (Axis.TOKEN, Axis.DIM),
    GroupKind.SLIDING_WINDOW: (Axis.TOKEN, Axis.HEAD, Axis.DIM),
    GroupKind.RECURRENT: (Axis.HEAD, Axis.VALUE, Axis.KEY),
    GroupKind.CONVOLUTION: (Axis.CHANNEL, Axis.COLUMN),
    GroupKind.AUXILIARY: (Axis.TOKEN, Axis.PLANE, Axis.ROW, Axis.ITEM),
    GroupKind.REQUEST: (Axis.PLANE, Axis.ROW, Axis.ITEM),
}


class Side:
    """One machine: strided arrays over poisoned bytes, and their `CacheMemory`."""

    def __init__(self, spec, tokens, seed, writable=False, ring=False, block_ids=None):
        self.rng, self.writable = random.Random(seed), writable
        self.spec, self.storage, self.arrays = spec, [], {}
        start, stop = tokens
        group = spec.groups[0]
        size = group.block_tokens
        blocks = -(-stop // size) - start // size if size else 0
        count = blocks + self.rng.randint(0, 3)
        if block_ids is None:
            block_ids = self.rng.sample(range(count), blocks)
            if not writable and self.rng.random() < 0.3:
                block_ids = [self.rng.choice(block_ids) for _ in block_ids]
        extent = size or stop - start + self.rng.randint(0, 2)
        if ring:
            extent = max(1, min(group.window_tokens, stop - start) + self.rng.randint(0, 2))
        for layer in group.layers:
            for tensor in group.tensors:
                shape = [extent if axis.axis == Axis.TOKEN else axis.held for axis in tensor.axes]
                shape = [count, *shape] if tensor.block_tokens else shape
                self.arrays[layer, tensor.name] = self.strided(shape, tensor.dtype.item_bytes)
        self.memory = CacheMemory(spec, self.arrays, tokens=tokens, block_ids=block_ids, ring=ring,
                                  writable=writable)

    def strided(self, shape, item_bytes):
        """Return an array of this shape, its axes anyhow in memory, with gaps and flips."""
        order = list(range(len(shape)))
        if self.rng.random() < 0.5:
            self.rng.shuffle(order)
        strides, step, offset = [0] * len(shape), item_bytes, self.rng.randint(0, 9)
        for axis in reversed(order):
            strides[axis] = step
            if self.rng.random() < 0.2:
                offset += step * max(0, shape[axis] - 1)
                strides[axis] = -step
            if not self.writable and self.rng.random() < 0.05:
                strides[axis] = 0
            step *= shape[axis] + self.rng.choice((0, 0, 0, 1))
        raw = np.full(step + offset + 16, POISON, np.uint8)
        self.storage.append(raw)
        return np.ndarray(shape, CARRIERS[item_bytes], raw, offset, strides)

    def fill(self):
        noise = np.random.default_rng(self.rng.randint(0, 2**32))
        for raw in self.storage:
            raw[:] = noise.integers(0, 256, len(raw), np.uint8)

    def snapshot(self):
        return [raw.copy() for raw in self.storage]

    def restore(self, before):
        for raw, old in zip(self.storage, before):
            raw[:] = old

    def leaf(self, layer, name, start, stop, ring_tokens=0):
        """Return a leaf by plain indexing: axes in rising order, TOKEN cut to [start, stop)."""
        group = self.spec.groups[0]
        tensor, leaf = next((t, leaf) for t in group.tensors for leaf in t.leaves
                            if leaf.name == name)
        array = self.arrays[layer, tensor.name]
        axes = [spec.axis for spec in tensor.axes]
        if tensor.has_tokens:
            lie = self.memory.leaves[group.kind, layer, name].tokens
            at = axes.index(Axis.TOKEN)
            if tensor.block_tokens:
                pages = [array[block] for block in lie.block_ids]
                array = np.concatenate(pages, at) if pages else array[:0].reshape(
                    [0 if axis == at else n for axis, n in enumerate(array.shape[1:])])
            positions = np.arange(start, stop)
            index = positions % ring_tokens if ring_tokens else positions - lie.origin
            array = array.take(index, at)
        if tensor.fused_axis is not None:
            at = axes.index(tensor.fused_axis)
            array = array.take(range(leaf.offset, leaf.offset + leaf.axes[at].held), at)
        return array.transpose(sorted(range(len(axes)), key=lambda axis: axes[axis]))


@st.composite
def sides(draw):
    """Specs of a sender and a receiver that agree, and the tokens that both hold."""
    kind = draw(st.sampled_from(GroupKind))
    axes = [axis for axis in AXES[kind]
            if axis in (Axis.TOKEN, Axis.COLUMN, Axis.CHANNEL) or draw(st.integers(0, 3))]
    if kind in (GroupKind.RECURRENT, GroupKind.REQUEST) and not axes:
        axes = [AXES[kind][-1]]
    if set(axes) <= {Axis.TOKEN}:
        axes = [*axes, AXES[kind][-1]]
    fusible = [axis for axis in axes if axis not in (Axis.TOKEN, Axis.COLUMN)]
    fused = draw(st.sampled_from(fusible))
    names = ["a", "b", "c"][:draw(st.integers(1, 3))]
    full = {(axis, name): draw(st.integers(1, 5)) for axis in axes
            for name in (names if axis == fused else [""])}
    dtype = draw(st.sampled_from([DType.BYTES, DType.BF16, DType.FP32, DType.INT64]))
    window = draw(st.integers(1, 20)) if kind == GroupKind.SLIDING_WINDOW else 0
    sent = {key: _cut(draw, (0, extent)) for key, extent in full.items()}
    held = {key: _around(draw, sent[key], extent) for key, extent in full.items()}
    specs = []
    for slices in (sent, held):
        columns = draw(st.integers(1, 5))
        order = draw(st.permutations(axes))
        blocks = draw(st.sampled_from([0, 1, 2, 3, 4, 8, 16])) if Axis.TOKEN in axes else 0

        def tensor(label, members):
            specs = []
            for axis in order:
                if axis == Axis.TOKEN:
                    specs.append(AxisSpec(axis))
                elif axis == Axis.COLUMN:
                    specs.append(AxisSpec.of(axis, columns))
                else:
                    keys = [(axis, name) for name in (members if axis == fused else [""])]
                    specs.append(AxisSpec(axis, tuple(
                        Slice(key[1] if len(keys) > 1 else "", full[key], *slices[key])
                        for key in keys)))
            return TensorSpec(label, dtype, tuple(specs), blocks)

        if draw(st.booleans()) and len(names) > 1:
            tensors = (tensor("fused", names),)
        else:
            tensors = tuple(tensor(name, [name]) for name in names)
        layers = (REQUEST_LAYER,) if kind == GroupKind.REQUEST else (LAYER,)
        specs.append(CacheSpec("m", (LayerGroup(kind, layers, tensors, window),)))
    start = draw(st.integers(0, 20))
    return (*specs, (start, start + draw(st.integers(0, 40))))


def _cut(draw, within):
    start = draw(st.integers(within[0], within[1] - 1))
    return start, draw(st.integers(start + 1, within[1]))


def _around(draw, inner, extent):
    return draw(st.integers(0, inner[0])), draw(st.integers(inner[1], extent))


def addresses_of(placement, offset, bytes_, iov_max):
    """Return one address per byte, -1 for skipped ones, of the native extents."""
    parts = [np.empty(0, np.int64)]
    for address, length in placement.extents(offset, bytes_, iov_max):
        parts.append(np.arange(address, address + length) if address else np.full(length, -1))
    return np.concatenate(parts)


def check_extents(placement, spec, items, memory, rng):
    expected = plan._byte_addresses(spec, items, memory.leaves)
    assert placement.bytes == len(expected)
    assert placement.has_skips == bool((expected < 0).any())
    at = 0
    while at < len(expected):
        step = rng.randint(1, len(expected) - at)
        found = addresses_of(placement, at, step, rng.choice((1, 2, 7, 1024)))
        np.testing.assert_array_equal(found, expected[at:at + step])
        at += step
    return expected


@settings(max_examples=400)
@given(sides(), st.integers(0, 2**32), st.booleans())
def test_native_planner_equals_the_definition_and_moves_every_leaf(pair, seed, ring):
    sent, held, tokens = pair
    rng = random.Random(seed)
    window = sent.groups[0].window_tokens
    source = Side(sent, tokens, seed)
    target = Side(held, tokens, seed + 1, writable=True,
                  ring=ring and window > 0 and not held.groups[0].block_tokens)
    source.fill()
    layer = sent.groups[0].layers[0]
    low, high = source.memory.token_range(0)
    start = rng.randint(low, high)
    stop = rng.randint(start, high)
    items = source.memory.items(layer, (start, stop))

    reading = plan.place(sent, items, source.memory)
    check_extents(reading, sent, items, source.memory, rng)
    data = plan.gather(sent, items, source.memory.leaves)
    cut = rng.randint(0, len(data))
    assert reading.gather(0, cut) + reading.gather(cut, len(data) - cut) == data
    assert reading.crc32c(cut, len(data) - cut) == crc32c_plain(data[cut:])
    part = bytearray(len(data) - cut)
    assert reading.gather_into(cut, part) == crc32c_plain(data[cut:]) and part == data[cut:]

    writing = plan.place(sent, items, target.memory)
    places = check_extents(writing, sent, items, target.memory, rng)
    assert len(np.unique(places[places >= 0])) == np.count_nonzero(places >= 0)
    before = target.snapshot()
    plan.scatter(sent, items, target.memory.leaves, data)
    expected = target.snapshot()
    target.restore(before)
    writing.scatter(0, data[:cut])
    writing.scatter(cut, memoryview(data)[cut:])
    for raw, want, old in zip(target.storage, expected, before):
        np.testing.assert_array_equal(raw, want)
        base = raw.ctypes.data
        mine = places[(places >= base) & (places < base + len(raw))] - base
        outside = np.ones(len(raw), bool)
        outside[mine] = False
        np.testing.assert_array_equal(raw[outside], old[outside])
    check_leaves(source, target, items)


def check_leaves(source, target, items):
    """Every leaf has arrived, by plain indexing on both sides; the ring's index is its own."""
    group, theirs = source.spec.groups[0], target.spec.groups[0]
    for item in items:
        for leaf in group.tensors[item.tensor_index].leaves:
            key = group.kind, item.layer, leaf.name
            lie = target.memory.leaves[key].tokens
            ring_tokens = lie.ring_tokens if lie else 0
            sent = source.leaf(item.layer, leaf.name, item.token_start, item.token_stop)
            got = target.leaf(item.layer, leaf.name, item.token_start, item.token_stop,
                              ring_tokens)
            mine = {axis.axis: axis for axis in leaf.axes}
            other = {axis.axis: axis for tensor in theirs.tensors for part in tensor.leaves
                     if part.name == leaf.name for axis in part.axes}
            for at, axis in enumerate(sorted(mine)):
                if axis == Axis.TOKEN:
                    continue
                if axis == Axis.COLUMN:
                    columns = min(mine[axis].held, other[axis].held)
                    sent = sent.take(range(sent.shape[at] - columns, sent.shape[at]), at)
                    got = got.take(range(got.shape[at] - columns, got.shape[at]), at)
                    continue
                first = mine[axis].slices[0].start - other[axis].slices[0].start
                got = got.take(range(first, first + mine[axis].held), at)
            np.testing.assert_array_equal(got, sent)


@settings(max_examples=50)
@given(sides(), st.integers(0, 2**32))
def test_columns_that_do_not_travel_are_zeroed(pair, seed):
    sent, held, tokens = pair
    target = Side(held, tokens, seed, writable=True)
    before = target.snapshot()
    plan.zero_missing_columns(sent, items_of(sent, tokens), target.memory)
    changed = sum(int(np.count_nonzero(raw != old)) for raw, old in zip(target.storage, before))
    missing = 0
    for leaf in (leaf for tensor in sent.groups[0].tensors for leaf in tensor.leaves):
        if columns := leaf.full.get(Axis.COLUMN):
            more = held.groups[0].tensors[0].held_extent(Axis.COLUMN) - columns
            missing += max(0, more) * leaf.row_bytes // columns
    assert changed == missing


def items_of(spec, tokens):
    """Return one item for each tensor of the first layer of the first group."""
    group = spec.groups[0]
    start = max(tokens[0], tokens[1] - group.window_tokens) if group.window_tokens else tokens[0]
    return [Item(0, index, group.layers[0], *((start, tokens[1]) if tensor.has_tokens else (0, 0)))
            for index, tensor in enumerate(group.tensors)]


def compact_memory(spec, tokens, gap=2):
    """Return contiguous arrays of the first group; of the blocks, every `gap`th is used."""
    arrays, group = {}, spec.groups[0]
    size = group.block_tokens
    blocks = -(-tokens // size) if size else 0
    for tensor in group.tensors:
        shape = [tensor.block_tokens or tokens if axis.axis == Axis.TOKEN else axis.held
                 for axis in tensor.axes]
        shape = [gap * blocks, *shape] if tensor.block_tokens else shape
        arrays[group.layers[0], tensor.name] = np.zeros(shape, CARRIERS[tensor.dtype.item_bytes])
    return CacheMemory(spec, arrays, tokens=tokens, block_ids=range(0, gap * blocks, gap))


def kv(**options):
    return CacheSpec("m", (attention([LAYER], kv_heads=8, head_dim=128, **options),))


def mla(**options):
    return CacheSpec("m", (latent([LAYER], **options),))


PAGE = 16 * 8 * 128 * 2


@pytest.mark.parametrize("sent, held, pieces, run_bytes", [
    (kv(block_tokens=16), kv(block_tokens=16), 2, PAGE),
    (kv(block_tokens=16, order="HND"), kv(block_tokens=16, order="HND"), 2, PAGE),
    (kv(block_tokens=16, fused=True), kv(block_tokens=16, fused=True), 1, 2 * PAGE),
    (kv(block_tokens=16, fused=True, order="HND"), kv(block_tokens=16, fused=True, order="HND"),
     1, 2 * PAGE),
    (kv(), kv(block_tokens=16), 2, PAGE),
    (kv(block_tokens=64, order="HND"), kv(block_tokens=16, order="HND"), 2, 16 * 128 * 2),
    (kv(block_tokens=16, order="HND"), kv(block_tokens=64, order="HND"), 2, 16 * 128 * 2),
    (kv(block_tokens=16, fused=True), kv(block_tokens=16), 1, 128 * 2),
    (kv(block_tokens=16), kv(block_tokens=16, fused=True), 2, 128 * 2),
    (kv(block_tokens=16, order="HND"), kv(block_tokens=16), 2, 128 * 2),
    (mla(block_tokens=16), mla(block_tokens=16), 1, 16 * 576 * 2),
    (mla(block_tokens=16), mla(block_tokens=16, fused=False), 1, (512 + 64)),
])
def test_regular_layouts_need_few_pieces_and_give_whole_pages(sent, held, pieces, run_bytes):
    placement = plan.place(sent, items_of(sent, (0, 6400)), compact_memory(held, 6400))
    assert (placement.piece_count, placement.mean_run_bytes) == (pieces, run_bytes)


def test_adjacent_pages_become_one_run():
    spec = kv(block_tokens=16)
    memory = compact_memory(spec, 6400, gap=1)
    placement = plan.place(spec, items_of(spec, (0, 6400)), memory)
    address = memory.leaves[GroupKind.FULL_ATTENTION, LAYER, "k"].address
    assert placement.extents(0, 400 * PAGE) == [(address, 400 * PAGE)]
    assert placement.extents(PAGE + 3, 2 * PAGE) == [(address + PAGE + 3, 2 * PAGE)]


def test_ragged_ends_and_single_tokens():
    spec, tokens = kv(block_tokens=16), 50
    memory = compact_memory(spec, tokens)
    base = memory.leaves[GroupKind.FULL_ATTENTION, LAYER, "k"].address
    row = PAGE // 16
    runs = {(5, 6): [(5, 1)], (0, 50): [(0, 16), (32, 16), (64, 16), (96, 2)], (7, 7): [],
            (15, 33): [(15, 1), (32, 16), (64, 1)]}
    for (start, stop), expected in runs.items():
        placement = plan.place(spec, [Item(0, 0, LAYER, start, stop)], memory)
        assert placement.extents(0, placement.bytes) == [
            (base + first * row, count * row) for first, count in expected]


def test_transposed_states_arrive_transposed():
    sent = CacheSpec("m", (recurrent([LAYER], heads=2, key_dim=3, value_dim=5),))
    tensor = sent.groups[0].tensors[0]
    turned = replace(tensor, axes=(tensor.axes[0], tensor.axes[2], tensor.axes[1]))
    held = CacheSpec("m", (replace(sent.groups[0], tensors=(turned,)),))
    shape = [axis.held for axis in turned.axes]
    array = np.zeros(shape, np.float32)
    memory = CacheMemory(held, {(LAYER, tensor.name): array}, writable=True)
    values = np.arange(30, dtype=np.float32).reshape([axis.held for axis in tensor.axes])
    plan.place(sent, items_of(sent, (0, 0)), memory).scatter(0, values.tobytes())
    np.testing.assert_array_equal(array, values.transpose(0, 2, 1))


def test_newest_columns_arrive_and_older_ones_are_skipped():
    def conv(columns, **options):
        return CacheSpec("m", (convolution([LAYER], {"q": 2, "k": 3}, columns=columns,
                                           **options),))
    sent, held = conv(4), conv(3)
    tensor = sent.groups[0].tensors[0]
    shape = [3 if axis.axis == Axis.COLUMN else axis.held
             for axis in held.groups[0].tensors[0].axes]
    array = np.zeros(shape, np.uint16)
    memory = CacheMemory(held, {(LAYER, tensor.name): array}, writable=True)
    values = np.arange(20, dtype=np.uint16).reshape([axis.held for axis in tensor.axes])
    placement = plan.place(sent, items_of(sent, (0, 0)), memory)
    placement.scatter(0, values.tobytes())
    at = [axis.axis for axis in tensor.axes].index(Axis.COLUMN)
    np.testing.assert_array_equal(array, values.take([1, 2, 3], at))
    assert placement.has_skips


BASE = kv(block_tokens=4)


@pytest.mark.parametrize("sent, items, error, words", [
    (kv(dtype="fp16"), [Item(0, 0, LAYER, 0, 8)], SpecMismatchError,
     "group full_attention, layer 3, leaf k: dtype fp16 at the sender, bf16 here"),
    (CacheSpec("m", (attention([LAYER], kv_heads=4, head_dim=128),)), [Item(0, 0, LAYER, 0, 8)],
     SpecMismatchError, "leaf k: head axis of 4 at the sender, of 8 here"),
    (CacheSpec("m", (attention([5], kv_heads=8, head_dim=128),)), [Item(0, 1, 5, 0, 8)],
     SpecMismatchError, "layer 5, leaf v: sent by the sender, not held here"),
    (CacheSpec("m", (LayerGroup(GroupKind.FULL_ATTENTION, (LAYER,), (TensorSpec(
        "k", DType.BF16, (AxisSpec(Axis.TOKEN), AxisSpec.of(Axis.DIM, 128))),)),)),
     [Item(0, 0, LAYER, 0, 8)], SpecMismatchError, "head axis here, none at the sender"),
    (mla(), [Item(0, 0, LAYER, 0, 8)], SpecMismatchError, "group latent, layer 3, leaf latent"),
    (BASE, [Item(0, 0, LAYER, 0, 9)], RefusedError, r"tokens \[0, 9\) announced, \[2, 8\) held"),
    (BASE, [Item(0, 0, LAYER, 1, 8)], RefusedError, r"tokens \[1, 8\) announced"),
    (BASE, [Item(0, 0, LAYER, 8, 7)], FormatError, "token range"),
    (BASE, [Item(0, 2, LAYER, 2, 8)], FormatError, "tensor that its group lacks"),
    (BASE, [Item(1, 0, LAYER, 2, 8)], FormatError, "group that the spec lacks"),
])
def test_a_mismatch_is_refused_by_field(sent, items, error, words):
    held = Side(BASE, (2, 8), 1, writable=True)
    with pytest.raises(error, match=words):
        plan.place(sent, items, held.memory)


def test_slices_must_lie_within_what_is_held():
    whole = kv()
    ranks = [whole.shard(rank, 2) for rank in range(2)]
    held = Side(ranks[1], (0, 4), 1, writable=True)
    with pytest.raises(SpecMismatchError, match=r"head axis \[0, 4\) of 8 at the sender, "
                                                r"\[4, 8\) of 8 here"):
        plan.place(ranks[0], items_of(ranks[0], (0, 4)), held.memory)
    quarter = whole.shard(3, 4)
    placement = plan.place(quarter, items_of(quarter, (0, 4)), held.memory)
    assert placement.bytes == whole.bytes(4) // 4


def test_a_ring_takes_no_more_than_it_holds():
    spec = CacheSpec("m", (sliding_window([LAYER], 8, kv_heads=1, head_dim=4),))
    arrays = {(LAYER, name): np.zeros((6, 1, 4), np.uint16) for name in "kv"}
    memory = CacheMemory(spec, arrays, tokens=20, ring=True, writable=True)
    assert memory.token_range(0) == (14, 20)
    with pytest.raises(RefusedError, match=r"\[13, 20\) announced, \[14, 20\) held"):
        plan.place(spec, [Item(0, 0, LAYER, 13, 20)], memory)
    values = np.arange(6 * 4, dtype=np.uint16).reshape(6, 1, 4)
    plan.place(spec, [Item(0, 0, LAYER, 14, 20)], memory).scatter(0, values.tobytes())
    np.testing.assert_array_equal(arrays[LAYER, "k"], np.roll(values, 14 % 6, 0))


def test_layouts_without_a_common_pattern_have_a_limit():
    sent, held = kv(block_tokens=7, order="HND"), kv(block_tokens=16, order="HND")
    tokens = 16 << 16
    arrays = {(LAYER, name): np.zeros((1, 8, 16, 128), np.uint16) for name in "kv"}
    memory = CacheMemory(held, arrays, tokens=tokens, block_ids=[0] * (tokens // 16))
    with pytest.raises(LimitError, match="too different to plan"):
        plan.place(sent, items_of(sent, (0, tokens)), memory)


def test_request_tensors_have_no_layer():
    spec = CacheSpec("m", (request_tensor("logits", (2, 3), "fp32"),))
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    memory = CacheMemory(spec, {(REQUEST_LAYER, "logits"): array})
    items = memory.items(REQUEST_LAYER)
    assert plan.place(spec, items, memory).gather(0, 24) == array.tobytes()
