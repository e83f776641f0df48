"""The data model: what is valid, what specs agree about, how they divide, how they print."""

import dataclasses
import hashlib
import math
from dataclasses import replace

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwire.errors import UsageError
from kvwire.layout import (
    REQUEST_LAYER, Axis, AxisSpec, CacheSpec, DType, GroupKind, LayerGroup, Slice, TensorSpec,
    attention, auxiliary, convolution, latent, recurrent, request_tensor, sliding_window,
)
from kvwire.spec_table import compress
from strategies import cache_specs, tensor_specs


def hybrid(**attention_options) -> CacheSpec:
    """One group of each kind, with layers that overlap."""
    options = {"kv_heads": 8, "head_dim": 128, "block_tokens": 16} | attention_options
    return CacheSpec("hybrid", (
        attention([3, 7], **options),
        latent([11], latent_dim=512, rope_dim=64),
        sliding_window(range(12, 14), 128, kv_heads=4, head_dim=192, value_dim=128),
        recurrent([0, 1, 2], heads=32, key_dim=128, value_dim=64),
        convolution([0, 1, 2], {"q": 4096, "k": 4096, "v": 2048}, columns=3),
        auxiliary([11], "indexer_keys", dim=128, dtype="e4m3"),
        request_tensor("penalties", (2, 100), "fp32"),
    ))


def test_constructors_describe_axes_bytes_and_leaves():
    full, mla, window, state, conv, keys, request = hybrid().groups
    assert [leaf.name for tensor in full.tensors for leaf in tensor.leaves] == ["k", "v"]
    assert (full.row_bytes, full.tensors[0].page_bytes) == (2 * 8 * 128 * 2, 16 * 8 * 128 * 2)
    assert [(leaf.name, leaf.offset) for leaf in mla.tensors[0].leaves] == [
        ("latent", 0), ("rope", 512)]
    assert mla.tensors[0].row_bytes == 576 * 2 and mla.tensors[0].fused_axis == Axis.DIM
    assert [tensor.held_extent(Axis.DIM) for tensor in window.tensors] == [192, 128]
    assert [spec.axis for spec in state.tensors[0].axes] == [Axis.HEAD, Axis.VALUE, Axis.KEY]
    assert state.state_bytes == 32 * 128 * 64 * 4 and state.row_bytes == 0
    assert conv.tensors[0].full_extent(Axis.CHANNEL) == 10240
    assert [leaf.full for leaf in conv.tensors[0].leaves] == [
        {Axis.COLUMN: 3, Axis.CHANNEL: extent} for extent in (4096, 4096, 2048)]
    assert keys.tensors[0].row_bytes == 128
    assert request.layers == (REQUEST_LAYER,) and request.state_bytes == 800


def test_orders_and_fusing_change_memory_but_not_identity():
    fused = attention([3, 7], kv_heads=8, head_dim=128, order="HND", fused=True)
    tensor, = fused.tensors
    assert [spec.axis for spec in tensor.axes] == [Axis.HEAD, Axis.TOKEN, Axis.DIM]
    assert [(leaf.name, leaf.offset) for leaf in tensor.leaves] == [("k", 0), ("v", 128)]
    ours = hybrid()
    theirs = replace(ours, groups=(
        fused, latent([11], fused=False), *ours.groups[2:3],
        recurrent([0, 1, 2], heads=32, key_dim=128, value_dim=64, order="KV"),
        convolution([0, 1, 2], {"k": 4096, "q": 4096, "v": 2048}, columns=4, order="DS",
                    fused=False), *ours.groups[5:]))
    assert theirs != ours
    assert ours.difference(theirs, complete=True) is None
    assert ours.fingerprint() == theirs.fingerprint()


def test_mamba1_state_has_channels():
    tensor, = recurrent([0], channels=8192, key_dim=16).tensors
    assert [spec.axis for spec in tensor.axes] == [Axis.CHANNEL, Axis.KEY]


def test_bytes_counts_tokens_windows_and_states():
    spec = hybrid()
    row = 2 * (2 * 8 * 128 * 2) + 576 * 2 + 128
    window_row = 2 * 4 * (192 + 128) * 2
    fixed = 3 * (32 * 128 * 64 * 4 + 3 * 10240 * 2) + 800
    assert spec.row_bytes == row
    assert spec.fixed_bytes == fixed + 128 * window_row
    for tokens in (0, 1, 127, 128, 129, 5000):
        assert spec.bytes(tokens) == tokens * row + min(tokens, 128) * window_row + fixed
    kinds = spec.bytes_by_kind(200)
    assert kinds[GroupKind.SLIDING_WINDOW] == 128 * window_row
    assert kinds[GroupKind.LATENT] == 200 * 576 * 2
    assert sum(kinds.values()) == spec.bytes(200)
    with pytest.raises(UsageError, match="tokens is -1"):
        spec.bytes(-1)


@given(cache_specs(), st.integers(0, 100))
def test_bytes_equals_leaf_by_leaf_sum(spec, tokens):
    total = 0
    for group, _, tensor, leaf in spec.leaves():
        rows = min(tokens, group.window_tokens) if group.window_tokens else tokens
        total += (rows if tensor.has_tokens else 1) * leaf.row_bytes
    assert spec.bytes(tokens) == total


@given(tensor_specs(whole=False))
def test_leaves_lie_side_by_side(tensor):
    leaves = tensor.leaves
    assert sum(leaf.row_bytes for leaf in leaves) == tensor.row_bytes
    offset = 0
    for leaf in leaves:
        assert leaf.offset == (offset if len(leaves) > 1 else 0)
        offset += next((spec.held for spec in leaf.axes if spec.axis == tensor.fused_axis), 0)
        assert [spec.axis for spec in leaf.axes] == [spec.axis for spec in tensor.axes]
    assert offset == (tensor.held_extent(tensor.fused_axis) if len(leaves) > 1 else 0)


def test_dtype_of_names_numpy_and_torch():
    assert DType.of("bf16") is DType.of("torch.bfloat16") is DType.of(DType.BF16) is DType.BF16
    assert DType.of(numpy.float32) is DType.of(numpy.dtype("float32")) is DType.FP32
    assert DType.of("float8_e4m3fn") is DType.E4M3 and DType.of("uint8") is DType.BYTES
    assert [dtype.item_bytes for dtype in DType] == [4, 2, 2, 1, 1, 1, 1, 4, 8]
    with pytest.raises(UsageError, match="complex64.*bytes"):
        DType.of("complex64")


DIM = AxisSpec.of(Axis.DIM, 4)
TOKEN = AxisSpec(Axis.TOKEN)
ROW = TensorSpec("k", DType.BF16, (TOKEN, DIM))


@pytest.mark.parametrize("make, words", [
    (lambda: Slice("", 0, 0, 0), "full is 0"),
    (lambda: Slice("", 2**24 + 1, 0, 1), "full is 16777217"),
    (lambda: Slice("", 4, 2, 2), "stop is 2; it must be an integer from 3 to 4"),
    (lambda: Slice("", 4, 0, 5), "stop is 5"),
    (lambda: Slice("", True, 0, 1), "full is True"),
    (lambda: Slice("é" * 128, 4, 0, 4), "1 to 255 bytes"),
    (lambda: AxisSpec(Axis.TOKEN, (Slice("", 4, 0, 4),)), "axis token has slices"),
    (lambda: AxisSpec(Axis.DIM, ()), "axis dim has no slices"),
    (lambda: AxisSpec.of(Axis.DIM, {"k": 4}), "single slice 'k'"),
    (lambda: AxisSpec(Axis.DIM, (Slice("k", 4, 0, 4),) * 2), "distinct"),
    (lambda: AxisSpec(Axis.DIM, 4), "sequence of Slice"),
    (lambda: AxisSpec(3, ()), "axis is 3; it must be of type Axis"),
    (lambda: AxisSpec(Axis.COLUMN, (Slice("", 4, 1, 4),)), "axis column must have one whole"),
    (lambda: AxisSpec.of(Axis.DIM, {str(part): 1 for part in range(17)}), "at most 16"),
    (lambda: TensorSpec("", DType.BF16, (DIM,)), "tensor name is ''"),
    (lambda: TensorSpec("k", "bf16", (DIM,)), "dtype is 'bf16'; it must be of type DType"),
    (lambda: TensorSpec("k", DType.BF16, (TOKEN,)), "axes are token"),
    (lambda: TensorSpec("k", DType.BF16, ()), "axes are none"),
    (lambda: TensorSpec("k", DType.BF16, (DIM, DIM)), "an axis may appear once"),
    (lambda: TensorSpec("k", DType.BF16, (
        AxisSpec.of(Axis.DIM, {"a": 1, "b": 2}), AxisSpec.of(Axis.HEAD, {"c": 1, "d": 2}))),
     "more than one axis is fused"),
    (lambda: TensorSpec("k", DType.BF16, (DIM,), 16), "block_tokens is 16 but there is no token"),
    (lambda: TensorSpec("k", DType.BF16, (TOKEN, DIM), -1), "block_tokens is -1"),
    (lambda: TensorSpec("k", DType.BF16, (TOKEN, DIM), 0, 1), "replicated is 1"),
    (lambda: ROW.held_extent(Axis.HEAD), "no extent along head"),
    (lambda: ROW.full_extent(Axis.TOKEN), "no extent along token"),
    (lambda: LayerGroup(GroupKind.FULL_ATTENTION, (), (ROW,)), "must rise and not be empty"),
    (lambda: LayerGroup(GroupKind.FULL_ATTENTION, (2, 2), (ROW,)), "must rise"),
    (lambda: LayerGroup(GroupKind.FULL_ATTENTION, (REQUEST_LAYER,), (ROW,)), "layer is"),
    (lambda: LayerGroup(GroupKind.FULL_ATTENTION, (1,), ()), "tensors are empty"),
    (lambda: LayerGroup(GroupKind.FULL_ATTENTION, (1,), (ROW,), 8), "window_tokens is 8"),
    (lambda: LayerGroup(GroupKind.SLIDING_WINDOW, (1,), (ROW,)), "window_tokens is 0"),
    (lambda: LayerGroup(GroupKind.RECURRENT, (1,), (ROW,)), "recurrent has none"),
    (lambda: LayerGroup(GroupKind.CONVOLUTION, (1,), (TensorSpec("c", DType.BF16, (DIM,)),)),
     "needs the axes channel and column"),
    (lambda: LayerGroup(GroupKind.LATENT, (1,), (TensorSpec("c", DType.BF16, (DIM,)),)),
     "latent needs one"),
    (lambda: LayerGroup(GroupKind.REQUEST, (0,), (TensorSpec("c", DType.BF16, (DIM,)),)),
     "REQUEST_LAYER"),
    (lambda: LayerGroup(GroupKind.AUXILIARY, (1,), (TensorSpec(
        "c", DType.BF16, (DIM, AxisSpec.of(Axis.COLUMN, 3))),)), "only convolution has one"),
    (lambda: LayerGroup(GroupKind.FULL_ATTENTION, (1,), (ROW, replace(
        ROW, name="v", block_tokens=16))), r"block_tokens are \[0, 16\]"),
    (lambda: LayerGroup(GroupKind.FULL_ATTENTION, (1,), (ROW, ROW)), "must be distinct"),
    (lambda: CacheSpec(None, ()), "model is None"),
    (lambda: CacheSpec("m", (attention([1, 2], kv_heads=1, head_dim=4),
                             attention([2, 3], kv_heads=1, head_dim=4))),
     "group full_attention, layer 2, leaf k appears twice"),
    (lambda: attention([0], kv_heads=1, head_dim=4, order="NDD"), "order is 'NDD'"),
    (lambda: recurrent([0], key_dim=4, value_dim=4), "heads and value_dim, or channels"),
    (lambda: recurrent([0], heads=2, channels=2, key_dim=4, value_dim=4), "or channels alone"),
    (lambda: request_tensor("x", (1, 2, 3, 4), "fp32"), "1 to 3 axes"),
    (lambda: hybrid().shard(2, 2), "rank is 2"),
    (lambda: hybrid().shard(0, 3), "leaf k: 8 heads or groups cannot be divided by count 3"),
    (lambda: hybrid().shard(0, 2).shard(0, 2), "divides whole tensors"),
    (lambda: hybrid().select([500]), "have no cache"),
])
def test_what_is_not_valid_is_said_in_words(make, words):
    with pytest.raises(UsageError, match=words):
        make()


def test_specs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        hybrid().model = "other"


@given(cache_specs(whole=False))
def test_a_spec_agrees_with_itself_in_any_layout(spec):
    assert spec.difference(spec, complete=True) is None
    turned = spec.with_block_tokens(7).map_tensors(lambda group, tensor: replace(
        tensor, axes=tensor.axes[::-1], replicated=not tensor.replicated))
    assert spec.difference(turned, complete=True) is None
    assert spec.fingerprint() == turned.fingerprint()


@given(cache_specs(), st.data())
def test_every_leaf_field_counts(spec, data):
    group, layer, tensor, _ = data.draw(st.sampled_from(list(spec.leaves())))
    leaf = f"group {group.label}"
    sized = [index for index, axis in enumerate(tensor.axes)
             if axis.axis not in (Axis.TOKEN, Axis.COLUMN)]
    dtypes = [dtype for dtype in DType if dtype != tensor.dtype]
    changed = data.draw(st.sampled_from(["dtype", *sized]))
    if changed == "dtype":
        other = replace(tensor, dtype=data.draw(st.sampled_from(dtypes)))
        words = (f"dtype {tensor.dtype.name.lower()} here, {other.dtype.name.lower()} there")
    else:
        axes = list(tensor.axes)
        first, *rest = axes[changed].slices
        grown = replace(first, full=first.full + 1)
        axes[changed] = AxisSpec(axes[changed].axis, (grown, *rest))
        other = replace(tensor, axes=tuple(axes))
        words = f"{axes[changed].axis.name.lower()} extent {first.full} here, {grown.full} there"
    theirs = spec.map_tensors(lambda _, mine: other if mine is tensor else mine)
    assert spec.fingerprint() != theirs.fingerprint()
    said = spec.difference(theirs)
    assert said.startswith(leaf) and said.endswith(words)


def test_difference_names_the_field_and_both_values():
    ours = hybrid()
    assert ours.difference(hybrid(dtype="fp16")) == (
        "group full_attention, layer 3, leaf k: dtype bf16 here, fp16 there")
    assert ours.difference(hybrid(value_dim=64)) == (
        "group full_attention, layer 3, leaf v: dim extent 128 here, 64 there")
    flat = attention([3, 7], kv_heads=8, head_dim=128).tensors
    flat = tuple(replace(tensor, axes=(TOKEN, AxisSpec.of(Axis.DIM, 1024))) for tensor in flat)
    theirs = replace(ours, groups=(replace(ours.groups[0], tensors=flat), *ours.groups[1:]))
    assert ours.difference(theirs) == (
        "group full_attention, layer 3, leaf k: axes token, head, dim here, token, dim there")
    request = replace(ours, groups=(request_tensor("penalties", (2, 99), "fp32"),))
    assert ours.difference(request) == (
        "group request, leaf penalties: item extent 100 here, 99 there")


def test_difference_of_models_and_missing_leaves():
    ours = hybrid()
    assert ours.difference(replace(ours, model="x")) == "model: 'hybrid' here, 'x' there"
    assert ours.difference(replace(ours, model="")) is None
    half = ours.select(range(0, 8))
    assert ours.difference(half) is None
    assert half.difference(ours, complete=True) == (
        "group latent, layer 11, leaf latent: there only")
    assert ours.difference(half, complete=True).endswith("here only")
    assert ours.fingerprint() != half.fingerprint() != replace(half, model="").fingerprint()


def test_fingerprint_is_what_its_description_says():
    keys = attention([3], kv_heads=2, head_dim=128, order="HND", block_tokens=16)
    spec = CacheSpec("é", (
        convolution([9], 8, columns=3),
        LayerGroup(GroupKind.FULL_ATTENTION, (3,), keys.tensors[:1])))
    text = "kvwire spec 1\n2:é\n1 3 1:k 3 1:* 2:2 3:128\n5 9 4:conv 3 4:8 5:*\n"
    assert spec.fingerprint() == hashlib.sha256(text.encode()).digest()[:16]


@pytest.mark.parametrize("count", [1, 2, 4, 8, 16, 32])
def test_shards_cover_everything_once_unless_replicated(count):
    whole = hybrid()
    held: dict = {}
    for rank in range(count):
        part = whole.shard(rank, count)
        assert part.difference(whole, complete=True) is None
        for group, layer, tensor, leaf in part.leaves():
            box = tuple((spec.slices[0].start, spec.slices[0].stop)
                        for spec in leaf.axes if spec.slices)
            held.setdefault((group.kind, layer, leaf.name), []).append((tensor.replicated, box))
    for group, layer, _, leaf in whole.leaves():
        parts = held[group.kind, layer, leaf.name]
        boxes = {box for _, box in parts}
        size = sum(math.prod(stop - start for start, stop in box) for box in boxes)
        assert size == math.prod(leaf.full.values())
        assert all(replicated == (len(boxes) < count) for replicated, _ in parts)


def test_shard_by_hand():
    part = hybrid().shard(5, 16)
    k = part.groups[0].tensors[0]
    assert k.axes[1].slices == (Slice("", 8, 2, 3),) and k.replicated
    assert part.groups[1] == replace(hybrid().groups[1], tensors=(
        replace(hybrid().groups[1].tensors[0], replicated=True),))
    state, conv = part.groups[3].tensors[0], part.groups[4].tensors[0]
    assert state.axes[0].slices == (Slice("", 32, 10, 12),) and not state.replicated
    assert conv.axes[1].slices == (Slice("q", 4096, 1280, 1536), Slice("k", 4096, 1280, 1536),
                                   Slice("v", 2048, 640, 768))


@pytest.mark.parametrize("groups, count, bounds", [(8, 4, (256, 512)), (8, 16, (0, 128)),
                                                   (1, 4, (0, 128)), (2, 8, (0, 128))])
def test_mamba2_groups_are_copied_when_they_do_not_divide(groups, count, bounds):
    conv = {"x": 64 * 32, "b": groups * 128, "c": groups * 128}
    spec = CacheSpec("m", (convolution([0], conv, columns=3),
                           recurrent([0], heads=64, value_dim=32, key_dim=128)))
    tensor = spec.shard(1, count).groups[0].tensors[0]
    x, b, c = tensor.axes[1].slices
    assert (x.start, x.stop) == (2048 // count, 2 * 2048 // count)
    assert (b.start, b.stop) == (c.start, c.stop) == bounds
    assert tensor.replicated == (groups % count != 0)


def test_select_and_blocks():
    spec = hybrid()
    stage = spec.select(range(0, 4))
    assert [(group.label, group.layers) for group in stage.groups] == [
        ("full_attention", (3,)), ("recurrent", (0, 1, 2)), ("convolution", (0, 1, 2))]
    assert spec.select([REQUEST_LAYER]).groups == spec.groups[-1:]
    paged = spec.with_block_tokens(64)
    assert [group.block_tokens for group in paged.groups] == [64, 64, 64, 0, 0, 64, 0]
    assert paged.bytes(1000) == spec.bytes(1000)


@pytest.mark.parametrize("layers, text", [
    (range(48), "0-47"), (range(3, 48, 4), "3,7,11..47"), ([5], "5"), ([1, 2, 9], "1-2,9"),
    ([3, 7, 11, 15, 19, 23, 26], "3,7,11..23,26"),
    ([*(i for i in range(26) if i % 4 != 3)], "0-25 but 3,7,11..23"),
])
def test_layers_in_few_characters(layers, text):
    assert compress(tuple(layers)) == text


def test_printed_spec_is_a_table():
    text = str(hybrid().shard(1, 8))
    assert text.isascii()
    head, titles, rule, first, *_, footer = text.split("\n")
    assert head == "hybrid"
    assert titles.split() == ["kind", "layers", "tensor", "dtype", "axes", "page", "bytes",
                              "bytes"]
    assert set(rule) == {"-", " "}
    assert first.split() == ["full_attention", "3,7", "k", "bf16", "[token,", "head", "1:2/8,",
                             "dim", "128]", "4,096", "256", "/token"]
    assert "[token, dim latent 512+rope 64] copied" in text
    assert "sliding_window 128" in text
    assert "channel q 512:1024/4096+k 512:1024/4096+v 256:512/2048" in text
    assert footer.startswith("2,304 bytes/token, ") and "MiB at 32K tokens" in footer


@given(cache_specs(whole=False))
def test_any_spec_prints_one_row_per_tensor(spec):
    lines = str(spec).split("\n")
    assert len(lines) == 4 + sum(len(group.tensors) for group in spec.groups)
