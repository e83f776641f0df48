"""Pack and unpack of the Triton kernels, in the interpreter, against the planner's definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import POISON, Side, sides
from triton_interpreter import torch

from kvwire import plan
from kvwire.control import Item
from kvwire.kernels.copy_plan import BLOCK_COUNT, CopyPlan
from kvwire.kernels.triton.copy import NO_BAD_ENTRY, DeviceRows, copy_segment
from kvwire.layout import CacheSpec, attention, convolution, recurrent
from kvwire.memory import CacheMemory


def run(copies, segment, pack, **part):
    """Return the least bad entry of the block tables."""
    rows = DeviceRows(copies, torch.device("cpu"))
    copy_segment(rows, torch.from_numpy(segment), pack=pack, **part)
    return int(rows.bad_entry)


def aligned(size):
    """Return zeros at a multiple of 16."""
    room = np.zeros(size + 16, np.uint8)
    start = -room.ctypes.data % 16
    return room[start:start + size]


def check(sent, held, tokens, seed):
    source = Side(sent, tokens, seed)
    target = Side(held, tokens, seed + 1, writable=True)
    source.fill()
    items = [item for layer in sent.groups[0].layers for item in source.memory.items(layer)]
    packed = CopyPlan.of_items(sent, items, source.memory)
    segment = aligned(packed.bytes)
    assert run(packed, segment, pack=True) == NO_BAD_ENTRY
    assert segment.tobytes() == plan.gather(sent, items, source.memory.leaves)

    before = target.snapshot()
    plan.scatter(sent, items, target.memory.leaves, segment.tobytes())
    expected = target.snapshot()
    target.restore(before)
    unpacked = CopyPlan.of_items(sent, items, target.memory)
    assert run(unpacked, segment, pack=False) == NO_BAD_ENTRY
    for raw, want in zip(target.storage, expected):
        np.testing.assert_array_equal(raw, want)


@settings(max_examples=5)
@given(sides(), st.integers(0, 2**32))
def test_any_two_layouts(pair, seed):
    check(*pair, seed)


@pytest.mark.long
@pytest.mark.timeout(1200)
@settings(max_examples=60)
@given(sides(), st.integers(0, 2**32))
def test_any_two_layouts_at_length(pair, seed):
    check(*pair, seed)


def kv(**options):
    return CacheSpec("m", (attention([1, 2], kv_heads=2, head_dim=8, **options),))


@pytest.mark.parametrize("sent, held", [
    (kv(block_tokens=4), kv(block_tokens=4)),
    (kv(block_tokens=4), kv(block_tokens=16)),
    (kv(block_tokens=8, order="HND"), kv(block_tokens=4)),
    (kv(block_tokens=4), kv(block_tokens=4, fused=True)),
], ids=["pages", "block size", "order", "fused"])
def test_layers_of_a_group_in_one_launch(sent, held):
    check(sent, held, (0, 18), 7)


def test_all_states_and_tails_in_one_launch():
    spec = CacheSpec("m", (recurrent([0, 1, 2], heads=2, key_dim=16, value_dim=8),
                           convolution([0, 1, 2], {"q": 8, "k": 16}, columns=3)))
    rng = np.random.default_rng(5)
    arrays = {(layer, tensor.name): rng.integers(0, 1 << 15, [a.held for a in tensor.axes]).astype(
        {2: np.uint16, 4: np.uint32}[tensor.dtype.item_bytes])
        for group in spec.groups for layer in group.layers for tensor in group.tensors}
    memory = CacheMemory(spec, arrays)
    items = [item for layer in range(3) for item in memory.items(layer)]
    copies = CopyPlan.of_items(spec, items, memory)
    segment = aligned(copies.bytes)
    run(copies, segment, pack=True)
    assert segment.tobytes() == plan.gather(spec, items, memory.leaves)


def test_a_part_of_a_segment_touches_nothing_else():
    spec = kv(block_tokens=4, order="HND")
    side = Side(spec, (0, 18), 3, writable=True)
    items = side.memory.items(1)
    copies = CopyPlan.of_items(spec, items, side.memory)
    data = np.random.default_rng(1).bytes(copies.bytes)
    start, stop = 6 * 16 + 8, copies.bytes - 3 * 8  # inside of runs
    plan.scatter(spec, items, side.memory.leaves, bytes(copies.bytes))
    segment = aligned(stop - start)
    segment[:] = np.frombuffer(data[start:stop], np.uint8)
    run(copies, segment, pack=False, start=start, stop=stop)
    want = bytes(start) + data[start:stop] + bytes(copies.bytes - stop)
    assert plan.gather(spec, items, side.memory.leaves) == want
    segment[:] = 0
    run(copies, segment, pack=True, start=start, stop=stop)
    assert segment.tobytes() == data[start:stop]


@pytest.mark.parametrize("bad", [-1, 1 << 40, "count"])
@pytest.mark.parametrize("pack", [True, False])
def test_a_bad_block_id_is_reported_and_touches_nothing(bad, pack):
    spec = CacheSpec("m", (attention([3], kv_heads=2, head_dim=16, block_tokens=4),))
    side = Side(spec, (0, 20), 3, writable=True)
    item = Item(0, 0, 3, 0, 20)
    copies = CopyPlan.of_items(spec, [item], side.memory)
    good = plan.gather(spec, [item], side.memory.leaves)
    copies.block_ids[2] = copies.legs[0, BLOCK_COUNT] if bad == "count" else bad
    segment = aligned(copies.bytes)
    segment[:] = 7
    assert run(copies, segment, pack=pack) == 2
    block = slice(2 * len(good) // 5, 3 * len(good) // 5)
    if pack:
        assert not segment[block].any()
        assert segment[:block.start].tobytes() == good[:block.start]
    else:
        touched = sum(int((raw != POISON).sum()) for raw in side.storage)
        assert touched == len(good) * 4 // 5
