"""`CacheSpec.from_hf_config`: from a transformers configuration to a spec.

Checked against transformers 5.23. The spec is engine-neutral: NHD, [head, value, key], SD, one
convolution column less than the kernel. transformers itself holds K (not K - 1) columns and one
token less than the window; both ends align at the newest, so such memory fits the spec.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvwire.errors import UnsupportedError, UsageError
from kvwire.layout import (
    CacheSpec, LayerGroup, attention, auxiliary, convolution, latent, recurrent, sliding_window,
)
from kvwire.presets import gated_delta_net, mamba1, mamba2
from kvwire.tensor_spec import DType

__all__ = ["spec_from_config", "supported_model_types"]

Groups = tuple[LayerGroup, ...]
Layers = list[int]

_ATTENTION_TYPES = frozenset((
    "gemma2", "gemma3_text", "gpt_oss", "llama", "mimo_v2_flash", "minimax_m2", "mistral",
    "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3",
))
_LATENT_TYPES = frozenset((
    "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_linear",
    "minicpm3", "youtu",
))

_FULL = frozenset(("full_attention", "indexed_attention", "hybrid"))
_SLIDING = frozenset(("sliding_attention", "hybrid_sliding"))
_LINEAR = frozenset(("linear_attention", "conv", "hybrid", "hybrid_sliding"))
_NO_CACHE = frozenset(("moe", "mlp"))

# Heads, head size, state size, groups and kernel as each Mamba-2 configuration names them.
_MAMBA2_FIELDS = {
    "bamba": ("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_n_groups", "mamba_d_conv"),
    "mamba2": ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel"),
    "nemotron_h": ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups",
                   "conv_kernel"),
    "zamba2": ("n_mamba_heads", "mamba_headdim", "mamba_d_state", "mamba_ngroups",
               "mamba_d_conv"),
}
_MAMBA2_FIELDS["falcon_h1"] = _MAMBA2_FIELDS["granitemoehybrid"] = _MAMBA2_FIELDS["bamba"]


def _mamba2(config, layers: Layers, dtype: DType, state: DType) -> Groups:
    names = ("heads", "head_dim", "state_dim", "groups", "kernel")
    values = (getattr(config, field) for field in _MAMBA2_FIELDS[config.model_type])
    return mamba2(layers, **dict(zip(names, values)), dtype=dtype, state_dtype=state)


def _mamba1(config, layers: Layers, dtype: DType, state: DType) -> Groups:
    return mamba1(layers, channels=config.mamba_expand * config.hidden_size,
                  state_dim=config.mamba_d_state, kernel=config.mamba_d_conv, dtype=dtype,
                  state_dtype=state)


def _mamba1_alone(config, layers: Layers, dtype: DType, state: DType) -> Groups:
    return mamba1(layers, channels=config.intermediate_size, state_dim=config.state_size,
                  kernel=config.conv_kernel, dtype=dtype, state_dtype=state)


def _gated_delta_net(config, layers: Layers, dtype: DType, state: DType) -> Groups:
    return gated_delta_net(
        layers, key_heads=config.linear_num_key_heads, value_heads=config.linear_num_value_heads,
        key_dim=config.linear_key_head_dim, value_dim=config.linear_value_head_dim,
        kernel=config.linear_conv_kernel_dim, dtype=dtype, state_dtype=state)


def _kimi_delta(config, layers: Layers, dtype: DType, state: DType) -> Groups:
    heads, dim = config.linear_num_heads, config.linear_head_dim
    return gated_delta_net(layers, key_heads=heads, value_heads=heads, key_dim=dim, value_dim=dim,
                           kernel=config.linear_conv_kernel_dim, dtype=dtype, state_dtype=state)


def _lightning(config, layers: Layers, dtype: DType, state: DType) -> Groups:
    dim = _head_dim(config)
    return (recurrent(layers, heads=config.num_attention_heads, key_dim=dim, value_dim=dim,
                      dtype=state),)


def _short_convolution(config, layers: Layers, dtype: DType, state: DType) -> Groups:
    return (convolution(layers, config.hidden_size, columns=config.conv_L_cache - 1, dtype=dtype),)


_LINEAR_BUILDERS: dict[str, Callable[..., Groups]] = {
    **dict.fromkeys(_MAMBA2_FIELDS, _mamba2),
    "bailing_hybrid": _kimi_delta,
    "falcon_mamba": _mamba1_alone,
    "jamba": _mamba1,
    "kimi_linear": _kimi_delta,
    "lfm2": _short_convolution,
    "lfm2_moe": _short_convolution,
    "mamba": _mamba1_alone,
    "minimax": _lightning,
    "olmo_hybrid": _gated_delta_net,
    "qwen3_5_moe_text": _gated_delta_net,
    "qwen3_5_text": _gated_delta_net,
    "qwen3_next": _gated_delta_net,
}


def supported_model_types() -> tuple[str, ...]:
    """Return every ``model_type`` that `spec_from_config` knows."""
    return tuple(sorted(_ATTENTION_TYPES | _LATENT_TYPES | _LINEAR_BUILDERS.keys()))


def spec_from_config(config: object, dtype: object = None, *, state_dtype: object = None,
                     model: str | None = None) -> CacheSpec:
    """Return the whole cache of a transformers model.

    Args:
        config: a configuration object, or its dict (config.json; needs transformers installed).
        dtype: of attention and convolution states; by default the configuration's.
        state_dtype: of recurrent states; by default what transformers holds: fp32, except
            MiniMax-01, whose states have the model's type. Engines may differ.
        model: the spec's name, by default the configuration's ``model_type``.

    Raises:
        UsageError: the configuration names no dtype and none is given.
        UnsupportedError: the model type or one of its layer types is unknown.
    """
    config = _text_config(config)
    kind = getattr(config, "model_type", None)
    if kind not in supported_model_types():
        raise UnsupportedError(_unknown(kind))
    dtype = _dtype(config, dtype)
    default = dtype if kind == "minimax" else DType.FP32
    state = default if state_dtype is None else DType.of(state_dtype)
    types = _layer_types(config)
    full, sliding, linear = ([layer for layer, name in enumerate(types) if name in names]
                             for names in (_FULL, _SLIDING, _LINEAR))
    groups: Groups = ()
    if full:
        groups += _full(config, full, dtype)
    if sliding:
        groups += (sliding_window(sliding, config.sliding_window, dtype=dtype,
                                  **_heads(config, sliding=True)),)
    if linear:
        groups += _LINEAR_BUILDERS[kind](config, linear, dtype, state)
    return CacheSpec(kind if model is None else model, groups)


def _text_config(config: object) -> object:
    """Return the configuration object of the decoder that owns the cache."""
    if isinstance(config, Mapping):
        try:
            from transformers import AutoConfig
        except ImportError:
            raise UnsupportedError("a configuration dict needs transformers, which fills in its "
                                   "defaults: install it, or use a preset") from None
        try:
            config = AutoConfig.for_model(**config)
        except (TypeError, ValueError):
            raise UnsupportedError(_unknown(config.get("model_type"))) from None
    if hasattr(config, "get_text_config"):
        return config.get_text_config(decoder=True)
    return getattr(config, "text_config", config)


def _unknown(kind: object) -> str:
    return (f"model_type {kind!r} is not known to kvwire; known are "
            f"{', '.join(supported_model_types())}. Describe its cache with CacheSpec(...) and "
            "the constructors of kvwire.layout")


def _dtype(config: object, dtype: object) -> DType:
    if dtype is None:
        dtype = getattr(config, "dtype", None)
    if dtype is None:
        raise UsageError(f"the configuration of {config.model_type} names no dtype; pass dtype=, "
                         "the model's element type")
    return DType.of(dtype)


def _layer_types(config: object) -> list[str]:
    """Return what each layer holds, as transformers' cache decides it."""
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        name = "full_attention" if window is None else "sliding_attention"
        types = [name] * config.num_hidden_layers
    known = _FULL | _SLIDING | _NO_CACHE
    known |= _LINEAR if config.model_type in _LINEAR_BUILDERS else frozenset()
    unknown = sorted(set(types) - known)
    if unknown:
        raise UnsupportedError(f"layers of type {', '.join(unknown)} in {config.model_type} are "
                               "not known to kvwire; describe the cache with CacheSpec(...)")
    return list(types)


def _full(config: object, layers: Layers, dtype: DType) -> Groups:
    if config.model_type not in _LATENT_TYPES:
        return (attention(layers, dtype=dtype, **_heads(config, sliding=False)),)
    groups: Groups = (latent(layers, latent_dim=config.kv_lora_rank,
                             rope_dim=config.qk_rope_head_dim, dtype=dtype),)
    if config.model_type == "deepseek_v32":
        groups += (auxiliary(layers, "indexer_keys", dim=config.index_head_dim, dtype=dtype),)
    return groups


def _heads(config: object, sliding: bool) -> dict[str, int]:
    heads = {"kv_heads": config.num_key_value_heads, "head_dim": _head_dim(config)}
    if config.model_type == "mimo_v2_flash":
        # Its sliding layers have twice the KV heads, by a rule of the model's code.
        heads["kv_heads"] *= 2 if sliding else 1
        heads["value_dim"] = config.v_head_dim
    return heads


def _head_dim(config: object) -> int:
    dim = getattr(config, "head_dim", None)
    return config.hidden_size // config.num_attention_heads if dim is None else dim
