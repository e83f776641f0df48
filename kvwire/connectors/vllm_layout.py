"""Where vLLM keeps a cache: from its specs and tensors to a `CachePool`. vLLM 0.32 and 0.33.

Every layer is registered as a view [block, head slot, state in block, content] of one raw buffer:
keys and values side by side in the content, MLA latents without values, recurrent layers as bytes
in which their states follow one another. The CPU kernels keep something else in it: of each block
and head first the keys, [dim, token], then the values, [token, dim]. Groups alias the same bytes; a
block belongs to one of them at a time. What is not known here is refused by name when the engine
starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from kvwire.connectors.pool import Array, CachePool, Pages, carrier
from kvwire.errors import UnsupportedError
from kvwire.layout import CacheSpec, LayerGroup
from kvwire.tensor_spec import Axis, AxisSpec, DType, GroupKind, TensorSpec

if TYPE_CHECKING:
    import torch

__all__ = ["Engine", "attention_kernels", "cache_pool", "layer_number", "layer_specs",
           "running_state", "spec_leaves", "table_spec"]


@dataclass(frozen=True)
class Engine:
    """What the specs do not say.

    Attributes:
        model: the name that both sides must agree on.
        rank, count: of tensor parallelism.
        kernels: by layer, whose attention kernels read and write it: "CPU_ATTN vec", for example.
        latent_dims: of MLA: latent and rope.
        mamba_groups: of Mamba-2, over all ranks; None: not known.
        conv_columns_last: VLLM_SSM_CONV_STATE_LAYOUT is DS.
    """

    model: str = ""
    rank: int = 0
    count: int = 1
    kernels: Mapping[str, str] = field(default_factory=dict)
    latent_dims: tuple[int, int] = (512, 64)
    mamba_groups: int | None = None
    conv_columns_last: bool = False


@dataclass(frozen=True)
class _Place:
    """What a layer holds, over all ranks: tensors of one group kind.

    Attributes:
        held_shape: of a state: its shape on this rank.
        content_bytes: the bytes [start, stop) of a block that hold it.
    """

    kind: GroupKind
    tensors: tuple[TensorSpec, ...]
    window_tokens: int = 0
    held_shape: tuple[int, ...] = ()
    content_bytes: tuple[int, int] = (0, 0)


def attention_kernels(vllm_config: object, kv_cache_config: object) -> dict[str, str]:
    """Return the name of each attention layer's backend; of the CPU's also its kernels."""
    found = {}
    for group in kv_cache_config.transfer_groups:
        for name, spec in layer_specs(group).items():
            layer = vllm_config.compilation_config.static_forward_context.get(name)
            if not hasattr(spec, "num_kv_heads") or not hasattr(layer, "get_attn_backend"):
                continue
            found[name] = layer.get_attn_backend().get_name()
            if found[name] == "CPU_ATTN":
                from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
                found[name] += " " + _get_attn_isa(spec.dtype, spec.block_size, spec.head_size,
                                                   vllm_config.cache_config.cache_dtype)
    return found


@cache
def layer_number(name: str) -> int:
    """Return the number of the layer in a name such as "model.layers.3.self_attn.attn"."""
    numbers = re.findall(r"(?<![^.])\d+(?![^.])", name)
    if not numbers:
        raise UnsupportedError(f"vLLM's layer {name!r} has no number; kvwire names layers by it")
    return int(numbers[0])


def running_state(block_ids: Sequence[int], spec: object) -> list[int]:
    """Return the block of a request's running state: the last but those for speculation."""
    return list(block_ids[:len(block_ids) - spec.num_speculative_blocks][-1:])


def table_spec(group: object) -> object:
    """Return the spec of a group, or the first of those that it wraps."""
    return next(iter(layer_specs(group).values()))


def layer_specs(group: object) -> dict[str, object]:
    """Return the spec of each layer of a group: some groups wrap one for each."""
    spec = group.kv_cache_spec
    of_layer = getattr(spec, "kv_cache_specs", None)
    return {name: of_layer[name] if of_layer else spec for name in group.layer_names}


def spec_leaves(name: str, spec: object, engine: Engine) -> list[_Place]:
    """Return what a layer of vLLM holds. Raises UnsupportedError naming the layer and the spec."""
    kind = type(spec).__name__
    where = f"layer {name}: {kind}"
    describe = _PLACES.get(kind)
    if describe is None:
        raise UnsupportedError(f"{where} is not handed off; known are {', '.join(_PLACES)}. Run "
                               "this model without the connector")
    mode = getattr(spec, "kv_quant_mode", 0)
    if int(mode):
        raise UnsupportedError(f"{where} has kv_quant_mode {mode.name}; its scales would not "
                               "travel. Start both engines with --kv-cache-dtype auto")
    return describe(where, spec, engine, engine.kernels.get(name, ""))


def _keys_and_values(where: str, spec: object, engine: Engine, kernels: str) -> list[_Place]:
    _check_content(where, spec, spec.head_size + spec.head_size_v)
    shards = min(engine.count, spec.max_tp_shards or engine.count)
    heads = AxisSpec.of(Axis.HEAD, spec.num_kv_heads * shards)
    dtype, sizes = DType.of(spec.dtype), {"k": spec.head_size, "v": spec.head_size_v}
    token = AxisSpec(Axis.TOKEN)
    if not kernels or kernels in _GPU_KERNELS:
        tensors = (TensorSpec("kv", dtype, (token, heads, AxisSpec.of(Axis.DIM, sizes))),)
    elif kernels.removeprefix("CPU_ATTN ") in _CPU_KERNELS:
        keys, values = (AxisSpec.of(Axis.DIM, size) for size in sizes.values())
        tensors = (TensorSpec("k", dtype, (heads, keys, token)),
                   TensorSpec("v", dtype, (heads, token, values)))
    else:
        raise UnsupportedError(f"{where} is kept by the kernels {kernels}, which pack it in a way "
                               f"that kvwire does not know. It knows {', '.join(_GPU_KERNELS)} "
                               f"(--attention-backend), and of CPU_ATTN {_CPU_KERNELS}: instead of "
                               "AMX, --dtype float16 or float32 takes these")
    if type(spec).__name__ != "SlidingWindowSpec":
        return [_Place(GroupKind.FULL_ATTENTION, tensors)]
    # The newest token's window begins with itself; of the past, vLLM keeps the others.
    return [_Place(GroupKind.SLIDING_WINDOW, tensors, max(1, spec.sliding_window - 1))]


def _latents(where: str, spec: object, engine: Engine, kernels: str) -> list[_Place]:
    _check_content(where, spec, spec.head_size)
    role = getattr(getattr(spec, "cache_role", None), "value", "sparse")
    if spec.model_version is not None or role != "sparse":
        raise UnsupportedError(f"{where} has model_version {spec.model_version!r} and cache_role "
                               f"{role!r}; plain MLA latents are handed off, nothing else is yet")
    parts = dict(zip(("latent", "rope"), engine.latent_dims))
    if sum(parts.values()) != spec.head_size:
        raise UnsupportedError(f"{where} has head_size {spec.head_size}, the configuration says "
                               f"{parts}; kvwire does not know what the rest is")
    axes = (AxisSpec(Axis.TOKEN), AxisSpec.of(Axis.DIM, parts))
    return [_Place(GroupKind.LATENT, (TensorSpec("mla", DType.of(spec.dtype), axes),))]


def _check_content(where: str, spec: object, elements: int) -> None:
    item_bytes = DType.of(spec.dtype).item_bytes
    if (spec.num_head_slots not in (None, spec.num_kv_heads) or spec.tokens_per_state != 1
            or spec.state_content_bytes not in (None, elements * item_bytes)):
        raise UnsupportedError(
            f"{where} packs its content: {spec.state_content_bytes} bytes in "
            f"{spec.num_head_slots} slots, {spec.tokens_per_state} tokens a state; kvwire knows "
            f"{elements} elements of {item_bytes} bytes for each head and token")


def _states(where: str, spec: object, engine: Engine, kernels: str) -> list[_Place]:
    """Return convolution and recurrent state of Mamba-1, Mamba-2, GDN, KDA, LFM2, lightning."""
    kind = spec.mamba_type.name
    describe = _STATES.get(kind)
    if describe is None:
        raise UnsupportedError(f"{where} of type {kind} is not handed off; known are "
                               f"{', '.join(_STATES)}")
    if spec.num_speculative_blocks:
        raise UnsupportedError(f"{where}: speculative decoding keeps more than one state; hand-off "
                               "knows one. Start both engines without it")
    shapes = [tuple(int(extent) for extent in shape) for shape in spec.shapes]
    wanted, count = describe[0], 1 if spec.tp_replicated else engine.count
    if [len(shape) for shape in shapes] != wanted:
        raise UnsupportedError(f"{where} of type {kind} has states of shapes {shapes}; known are "
                               f"those of {wanted} axes")
    described = describe[1](shapes, count, engine)
    places, start = [], 0
    for (group, name, axes), shape, dtype in zip(described, shapes, spec.dtypes):
        tensor = TensorSpec(name, DType.of(dtype), axes)
        stop = start + math.prod(shape) * tensor.dtype.item_bytes
        places.append(_Place(group, (tensor,), 0, shape, (start, stop)))
        start = stop
    return places


def _convolution(shape: tuple[int, int], parts: int | Mapping[str, int], engine: Engine) -> tuple:
    columns = shape[1] if engine.conv_columns_last else shape[0]
    axes = AxisSpec.of(Axis.COLUMN, columns), AxisSpec.of(Axis.CHANNEL, parts)
    return (GroupKind.CONVOLUTION, "conv", axes[::-1] if engine.conv_columns_last else axes)


def _channels(shape: tuple[int, int], engine: Engine) -> int:
    return shape[0] if engine.conv_columns_last else shape[1]


def _matrix(heads: int, value_dim: int, key_dim: int) -> tuple:
    return (GroupKind.RECURRENT, "state", (
        AxisSpec.of(Axis.HEAD, heads), AxisSpec.of(Axis.VALUE, value_dim),
        AxisSpec.of(Axis.KEY, key_dim)))


def _delta_rule(shapes: list, count: int, engine: Engine) -> list[tuple]:
    conv, (heads, value_dim, key_dim) = shapes
    values = heads * value_dim
    keys = (_channels(conv, engine) - values) // 2
    parts = {"q": keys * count, "k": keys * count, "v": values * count}
    return [_convolution(conv, parts, engine), _matrix(heads * count, value_dim, key_dim)]


def _mamba2(shapes: list, count: int, engine: Engine) -> list[tuple]:
    conv, (heads, head_dim, state_dim) = shapes
    held = (_channels(conv, engine) - heads * head_dim) // 2 // state_dim
    # With fewer groups than ranks each rank has a copy of one.
    groups = held * count if held > 1 or not engine.mamba_groups else min(
        held * count, engine.mamba_groups)
    parts = {"x": heads * head_dim * count, "b": groups * state_dim, "c": groups * state_dim}
    return [_convolution(conv, parts, engine), _matrix(heads * count, head_dim, state_dim)]


def _mamba1(shapes: list, count: int, engine: Engine) -> list[tuple]:
    conv, (channels, state_dim) = shapes
    return [_convolution(conv, channels * count, engine), (GroupKind.RECURRENT, "state", (
        AxisSpec.of(Axis.CHANNEL, channels * count), AxisSpec.of(Axis.KEY, state_dim)))]


def _short_convolution(shapes: list, count: int, engine: Engine) -> list[tuple]:
    return [_convolution(shapes[0], _channels(shapes[0], engine) * count, engine)]


def _lightning(shapes: list, count: int, engine: Engine) -> list[tuple]:
    heads, value_dim, key_dim = shapes[0]
    return [_matrix(heads * count, value_dim, key_dim)]


# By the name of MambaSpec.mamba_type: axes of each state, and what they are.
_STATES = {
    "MAMBA1": ([2, 2], _mamba1),
    "MAMBA2": ([2, 3], _mamba2),
    "GDN_ATTN": ([2, 3], _delta_rule),
    "SHORT_CONV": ([2], _short_convolution),
    "LINEAR": ([3], _lightning),
}
_CPU_KERNELS = ("vec", "vec16")
# That keep keys and values side by side in the content of a head and token.
_GPU_KERNELS = ("FLASH_ATTN", "FLASH_ATTN_DIFFKV", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN",
                "TRITON_ATTN_DIFFKV", "TRITON_FLASH_ATTN")
_PLACES = {
    "FullAttentionSpec": _keys_and_values,
    "SlidingWindowSpec": _keys_and_values,
    "MLAAttentionSpec": _latents,
    "MambaSpec": _states,
}


def cache_pool(kv_cache_config: object, tensors: Mapping[str, torch.Tensor],
               engine: Engine) -> CachePool:
    """Return the pool of one rank.

    Args:
        kv_cache_config: vLLM's KVCacheConfig; block tables are numbered as its transfer groups.
        tensors: as `register_kv_caches` gives them.

    Raises: UnsupportedError naming the layer, and what it has that kvwire does not know.
    """
    collected: dict[tuple, tuple[list[int], dict]] = {}
    for table, group in enumerate(kv_cache_config.transfer_groups):
        for name, spec in layer_specs(group).items():
            layer, places = layer_number(name), spec_leaves(name, spec, engine)
            for place in places:
                views = _views(name, tensors[name], place)
                block_tokens = views[0][0].block_tokens
                split = spec.block_size // block_tokens if block_tokens else 1
                held = tuple(tensor for tensor, _ in views)
                key = (place.kind, held, place.window_tokens, table, split)
                layers, arrays = collected.setdefault(key, ([], {}))
                if layer in layers:
                    raise UnsupportedError(f"layer {name}: another layer has number {layer}, too")
                layers.append(layer)
                arrays.update({(layer, tensor.name): array for tensor, array in views})
    groups, pages = [], []
    for (kind, held, window, table, split), (layers, arrays) in collected.items():
        groups.append(LayerGroup(kind, tuple(sorted(layers)), held, window))
        pages.append(Pages(table, arrays, split))
    return CachePool(CacheSpec(engine.model, tuple(groups)), pages, rank=engine.rank,
                     count=engine.count)


def _views(name: str, tensor: torch.Tensor, place: _Place) -> list[tuple[TensorSpec, Array]]:
    """Return each tensor's spec over all ranks, its axes in the order of this memory, and the view
    [block, *axes] of what this rank holds."""
    if not hasattr(tensor, "data_ptr") or tensor.dim() != 4:
        raise UnsupportedError(f"layer {name}: the cache is registered as {_shape_words(tensor)}; "
                               "kvwire knows [block, head, state, content], as of vLLM 0.32")
    if tensor.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"layer {name}: the cache is on {tensor.device}; kvwire moves "
                               "memory of CPUs and of CUDA devices: run vLLM on one of these")
    dtype = place.tensors[0].dtype
    if place.held_shape:
        return [(place.tensors[0], _array(_state_view(tensor, place), dtype))]
    view = tensor.view(_torch_carrier(dtype))
    described = [replace(held, block_tokens=view.shape[2]) for held in place.tensors]
    if place.kind == GroupKind.LATENT:
        views = [view[:, 0]]
    elif len(described) == 2:
        views = _cpu_views(view, described[0])
    elif view.stride(1) < view.stride(2):  # [token, head, content] within a block
        views = [view.transpose(1, 2)]
    else:
        token, head, content = described[0].axes
        described, views = [replace(described[0], axes=(head, token, content))], [view]
    return [(held, _array(each, dtype)) for held, each in zip(described, views)]


def _cpu_views(view: torch.Tensor, keys: TensorSpec) -> list[torch.Tensor]:
    """Return the keys [block, head, dim, token] and values [block, head, token, dim] of the CPU
    kernels, out of the view [block, head, token, content]."""
    tokens, content = view.shape[2:]
    key_dim, start = keys.full_extent(Axis.DIM), view.storage_offset()
    return [view.as_strided((*view.shape[:2], *shape), (*view.stride()[:2], shape[1], 1), at)
            for shape, at in (((key_dim, tokens), start),
                              ((tokens, content - key_dim), start + key_dim * tokens))]


def _state_view(tensor: torch.Tensor, place: _Place) -> torch.Tensor:
    dtype, shape = place.tensors[0].dtype, place.held_shape
    start, stop = place.content_bytes
    flat = tensor.view(_torch_carrier(DType.BYTES))[:, 0, 0, start:stop].view(_torch_carrier(dtype))
    return flat.unflatten(1, shape)


def _torch_carrier(dtype: DType) -> torch.dtype:
    import torch
    return {1: torch.uint8, 2: torch.uint16, 4: torch.uint32, 8: torch.uint64}[dtype.item_bytes]


def _array(view: torch.Tensor, dtype: DType) -> Array:
    """Return a view of host memory as numpy, in a type that numpy has: that costs the engine less.
    """
    return view.numpy().view(carrier(dtype)) if view.device.type == "cpu" else view


def _shape_words(tensor: object) -> str:
    return f"a tensor {list(tensor.shape)}" if hasattr(tensor, "shape") else type(tensor).__name__
