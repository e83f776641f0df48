"""Where transformers 5 keeps a cache, and what it keeps there, told from the configuration alone.

A `Place` is one tensor of one layer. transformers leads every tensor with a batch axis (and MLA
latents and shared keys with a head axis) of extent 1; specs leave those out. Convolution states
have as many columns as the kernel, one more than the next token reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kvwire.errors import UnsupportedError
from kvwire.layout import Axis, AxisSpec, DType, GroupKind, TensorSpec

_HEADS_TOKENS_DIM = (Axis.HEAD, Axis.TOKEN, Axis.DIM)


class Place(NamedTuple):
    """One tensor of one layer: what it is, and the attribute (and key in it) that holds it."""

    kind: GroupKind
    spec: TensorSpec
    attribute: str
    key: object = None
    unit_axes: int = 1
    window_tokens: int = 0


@dataclass(frozen=True)
class LayerView:
    """What decides a layer's places: its configuration, its empty cache layer, tokens, dtypes."""

    config: object
    layer: object
    tokens: int
    dtype: DType
    state_dtype: DType

    def tensor(self, name: str, *axes: tuple[Axis, object], dtype: DType | None = None):
        return TensorSpec(name, dtype or self.dtype, tuple(
            AxisSpec(axis) if axis == Axis.TOKEN else AxisSpec.of(axis, extent)
            for axis, extent in axes))


def held_tokens(window_tokens: int, tokens: int) -> range:
    """Return which tokens a layer holds: a window's newest token is not kept, only its past."""
    return range(max(0, tokens - window_tokens + 1) if window_tokens else 0, tokens)


def _is_latent(config: object) -> bool:
    return bool(getattr(config, "kv_lora_rank", None))


def _keys_and_values(view: LayerView, kind: GroupKind, window_tokens: int = 0) -> list[Place]:
    config = view.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    key_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    value_dim = getattr(config, "v_head_dim", None) or key_dim
    return [Place(kind, view.tensor(name, *zip(_HEADS_TOKENS_DIM, (heads, None, dim))), attribute,
                  window_tokens=window_tokens)
            for name, attribute, dim in (("k", "keys", key_dim), ("v", "values", value_dim))]


def _full(view: LayerView) -> list[Place]:
    if not _is_latent(view.config):
        return _keys_and_values(view, GroupKind.FULL_ATTENTION)
    parts = (("latent", "keys", view.config.kv_lora_rank),
             ("rope", "values", view.config.qk_rope_head_dim))
    return [Place(GroupKind.LATENT, view.tensor(name, (Axis.TOKEN, None), (Axis.DIM, dim)),
                  attribute, unit_axes=2) for name, attribute, dim in parts]


def _sliding(view: LayerView) -> list[Place]:
    return _keys_and_values(view, GroupKind.SLIDING_WINDOW, view.layer.sliding_window)


def _indexed(view: LayerView) -> list[Place]:
    index_keys = view.tensor("index_k", (Axis.TOKEN, None),
                             (Axis.DIM, view.config.index_head_dim))
    return _full(view) + [Place(GroupKind.AUXILIARY, index_keys, "indexer_keys")]


class _State(NamedTuple):
    """Geometry of a linear layer: convolution channels (fused by name) and a matrix state."""

    channels: int | dict[str, int]
    kernel: int
    state: dict[Axis, int] | None


def _gated_delta_net(config: object) -> _State:
    heads, values = config.linear_num_value_heads, config.linear_value_head_dim
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    return _State({"q": keys, "k": keys, "v": heads * values}, config.linear_conv_kernel_dim,
                  {Axis.HEAD: heads, Axis.KEY: config.linear_key_head_dim, Axis.VALUE: values})


def _kimi_delta(config: object) -> _State:
    heads, dim = config.linear_num_heads, config.linear_head_dim
    return _State(dict.fromkeys("qkv", heads * dim), config.linear_conv_kernel_dim,
                  {Axis.HEAD: heads, Axis.KEY: dim, Axis.VALUE: dim})


def _mamba1(channels: str, state: str, kernel: str) -> Callable[[object], _State]:
    def geometry(config: object) -> _State:
        extent = int(getattr(config, channels) * config.hidden_size)
        return _State(extent, getattr(config, kernel),
                      {Axis.CHANNEL: extent, Axis.KEY: getattr(config, state)})
    return geometry


def _mamba2(*names: str) -> Callable[[object], _State]:
    def geometry(config: object) -> _State:
        heads, head_dim, groups, state, kernel = (getattr(config, name) for name in names)
        return _State({"x": heads * head_dim, "b": groups * state, "c": groups * state}, kernel,
                      {Axis.HEAD: heads, Axis.VALUE: head_dim, Axis.KEY: state})
    return geometry


def _short_convolution(config: object) -> _State:
    return _State(config.hidden_size, config.conv_L_cache, None)


_BAMBA = _mamba2("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state",
                 "mamba_d_conv")
_LINEAR: dict[str, Callable[[object], _State]] = {
    "bailing_hybrid": _kimi_delta,
    "bamba": _BAMBA,
    "falcon_h1": _BAMBA,
    "granitemoehybrid": _BAMBA,
    "jamba": _mamba1("mamba_expand", "mamba_d_state", "mamba_d_conv"),
    "kimi_linear": _kimi_delta,
    "lfm2": _short_convolution,
    "mamba2": _mamba2("num_heads", "head_dim", "n_groups", "state_size", "conv_kernel"),
    "nemotron_h": _mamba2("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size",
                          "conv_kernel"),
    "olmo_hybrid": _gated_delta_net,
    "qwen3_5_text": _gated_delta_net,
    "qwen3_next": _gated_delta_net,
    "zamba2": _mamba2("n_mamba_heads", "mamba_headdim", "mamba_ngroups", "mamba_d_state",
                      "mamba_d_conv"),
}


def _linear(view: LayerView) -> list[Place]:
    model_type = view.config.model_type
    if model_type not in _LINEAR:
        raise UnsupportedError(
            f"the linear layers of model type {model_type!r} are not described yet; kvwire knows "
            f"those of {', '.join(sorted(_LINEAR))}. Build the CacheSpec by hand for this model")
    known = _LINEAR[model_type](view.config)
    conv = view.tensor("conv", (Axis.CHANNEL, known.channels), (Axis.COLUMN, known.kernel))
    places = [Place(GroupKind.CONVOLUTION, conv, "conv_states", 0)]
    if known.state:
        state = view.tensor("state", *known.state.items(), dtype=view.state_dtype)
        places.append(Place(GroupKind.RECURRENT, state, "recurrent_states", 0))
    return places


def _lightning(view: LayerView) -> list[Place]:
    """MiniMax-01: a state in the model's own type, kept on the cache and not on its layers."""
    heads = view.config.num_attention_heads
    dim = getattr(view.config, "head_dim", None) or view.config.hidden_size // heads
    state = view.tensor("state", (Axis.HEAD, heads), (Axis.KEY, dim), (Axis.VALUE, dim))
    return [Place(GroupKind.RECURRENT, state, "linear_cache")]


def _compressed(view: LayerView) -> list[Place]:
    """DeepSeek-V4: shared keys and values in a window, and one entry per `compress_rate` tokens.

    Their numbers of rows depend on the token count, so here the spec does too. What has no rows
    yet is left out.
    """
    config, layer, tokens = view.config, view.layer, view.tokens
    keys = view.tensor("k", *zip(_HEADS_TOKENS_DIM, (1, None, config.head_dim)))
    places = [Place(GroupKind.SLIDING_WINDOW, keys, "keys", window_tokens=layer.sliding_window)]
    rate, overlaps = layer.compress_rate, hasattr(layer, "overlap_kv")
    for name in layer.buffer_kv:
        dim = config.index_head_dim if name == "indexer" else config.head_dim
        tail = (tokens % rate, dim * (2 if overlaps else 1))
        shapes = {"compressed_kv": (tokens // rate, dim), "buffer_kv": tail, "buffer_gate": tail}
        if overlaps and tokens >= rate:
            shapes |= {"overlap_kv": (rate, dim), "overlap_gate": (rate, dim)}
        places += [
            Place(GroupKind.AUXILIARY, view.tensor(f"{name}_{attribute}", *zip(
                (Axis.ROW, Axis.DIM), shape)), attribute, name)
            for attribute, shape in shapes.items() if shape[0]]
    return places


# One letter a layer is the form in which metadata carries the classes of a cache's layers.
_LAYERS: dict[str, tuple[str, tuple[Callable[[LayerView], list[Place]], ...]]] = {
    "DynamicLayer": ("F", (_full,)),
    "DynamicSlidingWindowLayer": ("W", (_sliding,)),
    "DynamicIndexedLayer": ("I", (_indexed,)),
    "LinearAttentionLayer": ("L", (_linear,)),
    "LinearAttentionAndFullAttentionLayer": ("H", (_full, _linear)),
    "LinearAttentionAndSlidingWindowAttentionLayer": ("S", (_sliding, _linear)),
    "DeepseekV4HCACache": ("A", (_compressed,)),
    "DeepseekV4CSACache": ("C", (_compressed,)),
    "MiniMaxLinear": ("M", (_lightning,)),
    "DummyLayer": ("-", ()),
}


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
    try:
        return DynamicCache(config=config)
    except KeyError:  # layer classes of its own register when the model's module is imported
        module = type(config).__module__
        importlib.import_module(module.replace(".configuration_", ".modeling_"))
        return DynamicCache(config=config)


def layer_class_names(cache: object, config: object) -> list[str]:
    """Return the class name of each layer of a cache."""
    if config.model_type == "minimax":
        return ["DynamicLayer" if kind == "full_attention" else "MiniMaxLinear"
                for kind in config.layer_types]
    return [type(layer).__name__ for layer in cache.layers]


def layer_letters(names: list[str]) -> str:
    """Return one letter per layer. Raises UnsupportedError at a class that kvwire cannot move."""
    for index, name in enumerate(names):
        if name not in _LAYERS:
            raise UnsupportedError(
                f"cache layer {index} is a {name}, which kvwire does not move; it moves "
                f"{', '.join(_LAYERS)}. Prefill with DynamicCache(config=model.config)")
    return "".join(_LAYERS[name][0] for name in names)


def layer_places(config: object, tokens: int, dtype: DType,
                 state_dtype: DType) -> list[list[Place]]:
    """Return the places of every layer after `tokens` tokens."""
    cache = empty_cache(config)
    names = layer_class_names(cache, config)
    layer_letters(names)
    found = []
    for index, (name, own) in enumerate(zip(names, config.per_layer_config)):
        layer = cache.layers[index] if index < len(cache.layers) else None
        view = LayerView(own, layer, tokens, dtype, state_dtype)
        found.append([place for part in _LAYERS[name][1] for place in part(view)])
    return found
