"""Where transformers 5 keeps a cache, and how what it keeps differs from the neutral spec.

A `Place` is one tensor of one layer. transformers leads every tensor with a batch axis (and MLA
latents with a head axis too) of extent 1, which specs leave out. Heads come before tokens, delta
rule states are [head, key, value], convolution states are [channel, column] with as many columns
as the kernel, and a window's newest token is not kept, only its past.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from kvwire.errors import UnsupportedError
from kvwire.hf_config import spec_from_config, supported_model_types
from kvwire.layout import (
    Axis, AxisSpec, CacheSpec, DType, GroupKind, LayerGroup, TensorSpec, attention, sliding_window,
)

if TYPE_CHECKING:
    import torch

# One letter a layer is the form in which metadata carries the classes of a cache's layers.
_LETTERS = {
    "DynamicLayer": "F",
    "DynamicSlidingWindowLayer": "W",
    "DynamicIndexedLayer": "I",
    "LinearAttentionLayer": "L",
    "LinearAttentionAndFullAttentionLayer": "H",
    "DeepseekV4HCACache": "A",
    "DeepseekV4CSACache": "C",
    "MiniMaxLinear": "M",
    "DummyLayer": "-",
}
_ATTENTION_LETTERS = frozenset("FW-")
_MAMBA2_LEAVES = ["x", "b", "c"]


class Place(NamedTuple):
    """One tensor of one layer: what it is, and the attribute (and key in it) that holds it."""

    kind: GroupKind
    spec: TensorSpec
    attribute: str
    key: object = None
    unit_axes: int = 1
    window_tokens: int = 0


def held_tokens(window_tokens: int, tokens: int) -> range:
    """Return which tokens a layer holds after `tokens` tokens; window 0: all."""
    return range(max(0, tokens - window_tokens + 1) if window_tokens else 0, tokens)


def decoder_config(model_or_config: object) -> object:
    """Return the configuration of the layers that have a cache."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.get_text_config(decoder=True)


def empty_cache(config: object) -> object:
    """Return a new cache of the class, and with the layers, that the model itself would make."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer
    if config.model_type == "minimax":
        from transformers.models.minimax.modeling_minimax import MiniMaxCache
        cache = MiniMaxCache()
        last_full = max((index for index, kind in enumerate(config.layer_types)
                         if kind == "full_attention"), default=-1)
        cache.layers = [DynamicLayer() for _ in range(last_full + 1)]
        return cache
    module = type(config).__module__.replace(".configuration_", ".modeling_")
    with contextlib.suppress(ModuleNotFoundError):  # there, layer classes of its own register
        importlib.import_module(module)
    try:
        return DynamicCache(config=config)
    except (AttributeError, KeyError, ValueError) as error:
        raise UnsupportedError(f"transformers makes no DynamicCache for model type "
                               f"{config.model_type!r}: {type(error).__name__}: {error}. Read the "
                               "prompt where the text goes on") from error


def layer_class_names(cache: object, config: object) -> list[str]:
    """Return the class name of each layer of a cache."""
    if config.model_type == "minimax":
        return ["DynamicLayer" if kind == "full_attention" else "MiniMaxLinear"
                for kind in config.layer_types]
    return [type(layer).__name__ for layer in cache.layers]


def layer_tensors(layer: object) -> Iterator[tuple[tuple[str, object], torch.Tensor]]:
    """Yield each tensor with elements that a layer holds, by its attribute and key (or None)."""
    for attribute, value in vars(layer).items():
        held = value if isinstance(value, dict) else {None: value}
        for key, tensor in held.items():
            if hasattr(tensor, "numel") and tensor.numel():
                yield (attribute, key), tensor


def layer_letters(names: list[str]) -> str:
    """Return one letter per layer. Raises UnsupportedError at a class that kvwire cannot move."""
    for index, name in enumerate(names):
        if name not in _LETTERS:
            raise UnsupportedError(
                f"cache layer {index} is a {name}, which kvwire does not move; it moves "
                f"{', '.join(_LETTERS)}. Read the prompt where the text goes on")
    return "".join(_LETTERS[name] for name in names)


def layer_places(config: object, tokens: int, dtype: DType,
                 state_dtype: DType | None) -> list[list[Place]]:
    """Return the places of every layer after `tokens` tokens."""
    cache = empty_cache(config)
    names = layer_class_names(cache, config)
    letters = layer_letters(names)
    if config.model_type == "deepseek_v4":
        return [_compressed_places(config, layer, tokens, dtype)
                if hasattr(layer, "compressed_kv") else _sliding_places(config, layer, dtype)
                for layer in cache.layers]
    if config.model_type not in supported_model_types() and _plain_attention(config, letters):
        spec = _attention_spec(config, cache, dtype)
    else:
        spec = spec_from_config(config, dtype, state_dtype=state_dtype)
    found: list[list[Place]] = [[] for _ in names]
    for group in spec.groups:
        for layer in group.layers:
            found[layer] += _places(group, letters[layer], _conv_leaves(spec, layer))
    return found


def _plain_attention(config: object, letters: str) -> bool:
    """Return whether all layers hold keys and values of heads, as far as a configuration says."""
    return _ATTENTION_LETTERS.issuperset(letters) and all(
        getattr(own, "num_attention_heads", None) and not getattr(own, "kv_lora_rank", None)
        for own in config.per_layer_config)


def _attention_spec(config: object, cache: object, dtype: DType) -> CacheSpec:
    """Return the spec of a model with attention only; `export` checks it against the shapes."""
    alike: dict[tuple, list[int]] = {}
    for index, (layer, own) in enumerate(zip(cache.layers, config.per_layer_config)):
        if type(layer).__name__ != "DummyLayer":
            window_tokens = layer.sliding_window if layer.is_sliding else 0
            alike.setdefault((window_tokens, *_heads(own)), []).append(index)
    return CacheSpec(config.model_type, tuple(
        _attention(layers, window_tokens, kv_heads, head_dim, dtype)
        for (window_tokens, kv_heads, head_dim), layers in alike.items()))


def _attention(layers: list[int], window_tokens: int, kv_heads: int, head_dim: int,
               dtype: DType) -> LayerGroup:
    heads = {"kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    return (sliding_window(layers, window_tokens, **heads) if window_tokens
            else attention(layers, **heads))


def _heads(config: object) -> tuple[int, int]:
    """Return the number of key and value heads, and their size."""
    heads = config.num_attention_heads
    return (getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads)


def _conv_leaves(spec: CacheSpec, layer: int) -> list[str]:
    return [leaf.name for group, index, _, leaf in spec.leaves()
            if index == layer and group.kind == GroupKind.CONVOLUTION]


def _places(group: LayerGroup, letter: str, conv_leaves: list[str]) -> list[Place]:
    """Return where transformers keeps a neutral group's tensors, and in which order of axes."""
    kind, window = group.kind, group.window_tokens
    if kind in (GroupKind.FULL_ATTENTION, GroupKind.SLIDING_WINDOW):
        return [Place(kind, _ordered(tensor, Axis.HEAD, Axis.TOKEN, Axis.DIM), attribute,
                      window_tokens=window)
                for tensor, attribute in zip(group.tensors, ("keys", "values"))]
    if kind == GroupKind.LATENT:
        leaves = group.tensors[0].leaves
        return [Place(kind, TensorSpec(leaf.name, leaf.dtype, leaf.axes), attribute, unit_axes=2)
                for leaf, attribute in zip(leaves, ("keys", "values"))]
    tensor = group.tensors[0]
    if kind == GroupKind.AUXILIARY:
        return [Place(kind, tensor, "indexer_keys")]
    if kind == GroupKind.CONVOLUTION:
        wider = AxisSpec.of(Axis.COLUMN, tensor.full_extent(Axis.COLUMN) + 1)
        axes = (_axis(tensor, Axis.CHANNEL), wider)
        return [Place(kind, replace(tensor, axes=axes), "conv_states", 0)]
    if len(tensor.axes) == 3 and conv_leaves != _MAMBA2_LEAVES:
        tensor = _ordered(tensor, Axis.HEAD, Axis.KEY, Axis.VALUE)
    if letter == "M":
        return [Place(kind, tensor, "linear_cache")]
    return [Place(kind, tensor, "recurrent_states", 0)]


def _axis(tensor: TensorSpec, axis: Axis) -> AxisSpec:
    return next(spec for spec in tensor.axes if spec.axis == axis)


def _ordered(tensor: TensorSpec, *axes: Axis) -> TensorSpec:
    return replace(tensor, axes=tuple(_axis(tensor, axis) for axis in axes))


def _sliding_places(config: object, layer: object, dtype: DType) -> list[Place]:
    return _places(_attention([0], layer.sliding_window, *_heads(config), dtype), "W", [])


def _compressed_places(config: object, layer: object, tokens: int, dtype: DType) -> list[Place]:
    """DeepSeek-V4: shared keys and values in a window, and one entry per `compress_rate` tokens.

    Their numbers of rows depend on the token count, so here the spec does too. What has no rows
    yet is left out.
    """
    places = [_sliding_places(config, layer, dtype)[0]]
    rate, overlaps = layer.compress_rate, hasattr(layer, "overlap_kv")
    for name in layer.buffer_kv:
        dim = config.index_head_dim if name == "indexer" else config.head_dim
        tail = (tokens % rate, dim * (2 if overlaps else 1))
        shapes = {"compressed_kv": (tokens // rate, dim), "buffer_kv": tail, "buffer_gate": tail}
        if overlaps and tokens >= rate:
            shapes |= {"overlap_kv": (rate, dim), "overlap_gate": (rate, dim)}
        for attribute, (rows, columns) in shapes.items():
            if rows:
                axes = (AxisSpec.of(Axis.ROW, rows), AxisSpec.of(Axis.DIM, columns))
                spec = TensorSpec(f"{name}_{attribute}", dtype, axes)
                places.append(Place(GroupKind.AUXILIARY, spec, attribute, name))
    return places
