"""vLLM's specs and memory, imitated: what the connector makes of them. Needs torch, not vLLM."""

from enum import IntEnum
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import kvwire
from kvwire.connectors.vllm_layout import (
    Engine, cache_pool, layer_number, running_state, spec_leaves,
)
from kvwire.layout import GroupKind
from kvwire.plan import gather

BLOCKS = 6


class QuantMode(IntEnum):
    NONE = 0
    FP8_PER_TOKEN_HEAD = 3


def named(kind, **fields):
    return type(kind, (SimpleNamespace,), {})(**fields)


def attention(kind="FullAttentionSpec", heads=2, size=8, block=32, **more):
    fields = {"block_size": block, "num_kv_heads": heads, "head_size": size, "head_size_v": size,
              "dtype": torch.bfloat16, "kv_quant_mode": QuantMode.NONE, "num_head_slots": None,
              "tokens_per_state": 1, "state_content_bytes": None, "max_tp_shards": None,
              "sliding_window": None, "model_version": None}
    return named(kind, **fields | more)


def mamba(kind, shapes, dtypes=None, **more):
    dtypes = dtypes or (torch.bfloat16, torch.float32)[:len(shapes)]
    fields = {"block_size": 32, "shapes": shapes, "dtypes": dtypes,
              "mamba_type": SimpleNamespace(name=kind), "num_speculative_blocks": 0,
              "tp_replicated": False}
    return named("MambaSpec", **fields | more)


def config(*groups):
    """Groups of {layer name: spec}, of one spec each."""
    return SimpleNamespace(transfer_groups=tuple(
        SimpleNamespace(layer_names=list(layers),
                        kv_cache_spec=SimpleNamespace(kv_cache_specs=layers))
        for layers in groups))


def memory_of(*groups, page_bytes=32768, seed=0):
    """One raw buffer that all groups alias, as vLLM registers it."""
    rng = np.random.default_rng(seed)
    raw = torch.from_numpy(rng.integers(0, 256, BLOCKS * page_bytes, np.uint8)).view(torch.int8)
    found = {}
    for layers in groups:
        for name, spec in layers.items():
            if hasattr(spec, "shapes"):
                items = [torch.empty(0, dtype=dtype).element_size() for dtype in spec.dtypes]
                used = sum(int(np.prod(shape)) * item for shape, item in zip(spec.shapes, items))
                found[name] = raw.as_strided((BLOCKS, 1, 1, used), (page_bytes, used, used, 1))
                continue
            heads = 1 if spec.head_size_v == 0 else spec.num_kv_heads
            content = spec.head_size + spec.head_size_v
            tokens, step = spec.block_size, page_bytes // 2
            found[name] = raw.view(torch.bfloat16).as_strided(
                (BLOCKS, heads, tokens, content),
                (step, tokens * content, content, 1))
    return found


def content(pool, tokens, block_ids):
    memory = pool.memory((0, tokens), block_ids)
    return {(item.group_index, item.tensor_index, layer): gather(memory.spec, [item], memory.leaves)
            for layer in pool.layers for item in memory.items(layer)}


FULL = {"model.layers.3.self_attn.attn": attention()}
GDN = {"model.layers.0.linear_attn": mamba("GDN_ATTN", ((3, 64), (4, 8, 8)))}


def test_states_are_where_vllm_puts_them():
    groups = GDN, FULL
    tensors = memory_of(*groups)
    pool = cache_pool(config(*groups), tensors, Engine("m"))
    raw = tensors["model.layers.0.linear_attn"][4, 0, 0].numpy().tobytes()
    found = content(pool, 40, [[4], [2, 5]])
    conv, state = (found[index, 0, 0] for index in (0, 1))
    assert (conv, state) == (raw[:384], raw[384:384 + 1024])
    assert [(group.kind, group.tensors[0].leaves[0].name) for group in pool.spec.groups] == [
        (GroupKind.CONVOLUTION, "q"), (GroupKind.RECURRENT, "state"),
        (GroupKind.FULL_ATTENTION, "k")]


def test_cpu_kernels_keep_keys_by_dim():
    tensors = memory_of(FULL)
    name = next(iter(FULL))
    pool = cache_pool(config(FULL), tensors, Engine("m", kernels={name: "CPU_ATTN vec"}))
    memory = pool.memory((0, 40), [[2, 5]])
    flat = tensors[name].reshape(BLOCKS, 2, -1).view(torch.int16).numpy()
    rows = {}
    for item in memory.items(3):
        rows[item.tensor_index] = np.frombuffer(gather(memory.spec, [item], memory.leaves), "<i2")
    keys, values = flat[2, 1, :256].reshape(8, 32), flat[2, 1, 256:].reshape(32, 8)
    assert (rows[0][:512].reshape(2, 8, 32)[1] == keys).all()
    assert (rows[1][:512].reshape(2, 32, 8)[1] == values).all()
    assert len(rows[0]) == len(rows[1]) == 40 * 2 * 8


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_views_are_read_by_their_strides(order):
    tensors = memory_of(FULL)
    name = next(iter(FULL))
    if order == "LBNHC":
        tensors[name] = tensors[name].reshape(BLOCKS, 32, 2, 16).transpose(1, 2)
    pool = cache_pool(config(FULL), tensors, Engine("m"))
    leaf = pool.memory((0, 40), [[2, 5]]).leaves[GroupKind.FULL_ATTENTION, 3, "v"]
    element = tensors[name][5, 1, 7, 8 + 3]
    coordinates = {kvwire.Axis.TOKEN: np.array(39), kvwire.Axis.HEAD: np.array(1),
                   kvwire.Axis.DIM: np.array(3)}
    assert int(leaf.addresses(coordinates, 0)) == element.data_ptr()


def test_kernel_blocks_divide_the_engines_blocks():
    name = next(iter(FULL))
    tensors = memory_of(FULL, page_bytes=2048)
    whole = cache_pool(config(FULL), tensors, Engine("m"))
    split = {name: tensors[name].view(BLOCKS, 2, 32, 16).permute(0, 2, 1, 3).contiguous()
             .view(BLOCKS * 2, 16, 2, 16).permute(0, 2, 1, 3)}
    parts = cache_pool(config(FULL), split, Engine("m"))
    assert parts.spec.groups[0].block_tokens == 16 and whole.spec.groups[0].block_tokens == 32
    ordered = parts.memory((0, 40), [[2, 5]])
    elements = np.frombuffer(gather(ordered.spec, ordered.items(3), ordered.leaves), "<i2")
    wanted = tensors[name][[2, 5]].permute(0, 2, 1, 3).reshape(64, 2, 16)[:40]
    assert (elements == wanted.contiguous().view(torch.int16).numpy().ravel()).all()


@pytest.mark.parametrize("kind, shapes, leaves", [
    ("GDN_ATTN", ((3, 64), (4, 8, 8)), {"q": 16, "k": 16, "v": 32, "state": None}),
    ("MAMBA2", ((3, 48), (4, 8, 8)), {"x": 32, "b": 8, "c": 8, "state": None}),
    ("MAMBA1", ((3, 32), (32, 8)), {"conv": 32, "state": None}),
    ("SHORT_CONV", ((2, 32),), {"conv": 32}),
    ("LINEAR", ((4, 8, 8),), {"state": None}),
])
@pytest.mark.parametrize("last", [False, True])
def test_states_of_every_kind(kind, shapes, leaves, last):
    conv_first = len(shapes[0]) == 2
    if last and conv_first:
        shapes = (shapes[0][::-1], *shapes[1:])
    found = {leaf.name: leaf for place in spec_leaves(
        "layers.0", mamba(kind, shapes), Engine(conv_columns_last=last))
        for tensor in place.tensors for leaf in tensor.leaves}
    assert list(found) == list(leaves)
    for name, channels in leaves.items():
        if channels:
            assert found[name].full[kvwire.Axis.CHANNEL] == channels
            assert found[name].full[kvwire.Axis.COLUMN] == min(shapes[0])


@pytest.mark.parametrize("count, groups, held", [(2, 1, 1), (2, 4, 2), (4, 2, 1)])
def test_mamba2_groups_over_ranks(count, groups, held):
    spec = mamba("MAMBA2", ((3, 32 + 2 * 8 * held), (4, 8, 8)))
    engine = Engine(count=count, mamba_groups=groups)
    leaves = {leaf.name: leaf for place in spec_leaves("layers.0", spec, engine)
              for tensor in place.tensors for leaf in tensor.leaves}
    assert leaves["b"].full[kvwire.Axis.CHANNEL] == 8 * groups
    assert leaves["x"].full[kvwire.Axis.CHANNEL] == 32 * count


@pytest.mark.parametrize("spec, kernels, words", [
    (named("ChunkedLocalAttentionSpec", block_size=16), "", "ChunkedLocalAttentionSpec is not"),
    (attention(kv_quant_mode=QuantMode.FP8_PER_TOKEN_HEAD), "", "FP8_PER_TOKEN_HEAD"),
    (attention(state_content_bytes=99), "", "packs its content: 99 bytes"),
    (attention(), "CPU_ATTN amx", "kernels CPU_ATTN amx"),
    (attention(), "ROCM_ATTN", "kernels ROCM_ATTN.*knows FLASH_ATTN, .*--attention-backend"),
    (attention("MLAAttentionSpec", 1, 576, head_size_v=0, model_version="v4"), "", "'v4'"),
    (attention("MLAAttentionSpec", 1, 656, head_size_v=0), "", "head_size 656"),
    (mamba("GDN_ATTN", ((3, 64), (4, 8, 8)), num_speculative_blocks=2), "", "speculative"),
    (mamba("CUSTOM", ((3, 64),)), "", "type CUSTOM is not handed off"),
    (mamba("MAMBA2", ((3, 48), (4, 8, 8), (4, 4))), "", "states of shapes"),
])
def test_what_is_not_known_is_refused_by_name(spec, kernels, words):
    with pytest.raises(kvwire.UnsupportedError, match=words):
        spec_leaves("layers.7.attn", spec, Engine(kernels={"layers.7.attn": kernels}))


def test_memory_of_other_devices_is_refused_by_layer():
    tensors = {name: tensor.to("meta") for name, tensor in memory_of(FULL).items()}
    with pytest.raises(kvwire.UnsupportedError, match=r"layer model.layers.3.*is on meta"):
        cache_pool(config(FULL), tensors, Engine())


def test_two_layers_of_one_number_are_refused():
    groups = [{"model.layers.3.attn": attention(), "mtp.layers.3.attn": attention()}]
    with pytest.raises(kvwire.UnsupportedError, match="another layer has number 3"):
        cache_pool(config(*groups), memory_of(*groups), Engine())


def test_names_and_running_states():
    assert layer_number("model.layers.12.self_attn.attn") == 12
    assert layer_number("model.4.mixer") == 4
    with pytest.raises(kvwire.UnsupportedError, match="no number"):
        layer_number("model.l3.attn")
    spec = SimpleNamespace(num_speculative_blocks=2)
    assert running_state([0, 0, 5, 6, 7], spec) == [5]
    assert running_state([9], SimpleNamespace(num_speculative_blocks=0)) == [9]
