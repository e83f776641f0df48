"""Cache geometry of known models, one entry per model; `CacheSpec.preset(name)`.

Attention is bf16. A state has the type that its model's configuration asks for, or, where it asks
for none, the model's own (Mamba, Falcon-H1), except that linear attention states are fp32, as the
published transfer sizes show. Draft (multi-token prediction) layers are left out.

Layers are counted from 0. Entries follow the published config.json of each model; where the
defaults of the configuration class in transformers 5.23 are that model, a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from kvwire.errors import UsageError
from kvwire.layout import (
    CacheSpec, LayerGroup, attention, convolution, latent, recurrent, sliding_window,
)
from kvwire.tensor_spec import DType, GroupKind, TensorSpec

__all__ = ["gated_delta_net", "mamba1", "mamba2", "preset", "preset_names"]

Layers = Iterable[int]
Groups = tuple[LayerGroup, ...]

_CONV_KERNEL = 4


def gated_delta_net(layers: Layers, *, key_heads: int, value_heads: int, key_dim: int = 128,
                    value_dim: int = 128, kernel: int = _CONV_KERNEL, dtype: object = "bf16",
                    state_dtype: object = "fp32") -> Groups:
    """Return GDN, or KDA where both head counts are equal: convolution [q|k|v] and a state."""
    keys, values = key_heads * key_dim, value_heads * value_dim
    return (
        convolution(layers, {"q": keys, "k": keys, "v": values}, columns=kernel - 1, dtype=dtype),
        recurrent(layers, heads=value_heads, key_dim=key_dim, value_dim=value_dim,
                  dtype=state_dtype),
    )


def mamba2(layers: Layers, *, heads: int, head_dim: int, state_dim: int, groups: int,
           kernel: int = _CONV_KERNEL, dtype: object = "bf16",
           state_dtype: object = "bf16") -> Groups:
    """Return Mamba-2: convolution [x|b|c] and a state [head, head size, state size]."""
    blocks = {"x": heads * head_dim, "b": groups * state_dim, "c": groups * state_dim}
    return (
        convolution(layers, blocks, columns=kernel - 1, dtype=dtype),
        recurrent(layers, heads=heads, key_dim=state_dim, value_dim=head_dim, dtype=state_dtype),
    )


def mamba1(layers: Layers, *, channels: int, state_dim: int = 16, kernel: int = _CONV_KERNEL,
           dtype: object = "bf16", state_dtype: object = "bf16") -> Groups:
    """Return Mamba-1: a convolution and a state [channel, state size]."""
    return (
        convolution(layers, channels, columns=kernel - 1, dtype=dtype),
        recurrent(layers, channels=channels, key_dim=state_dim, dtype=state_dtype),
    )


def _lightning(layers: Layers) -> Groups:
    return (recurrent(layers, heads=64, key_dim=128, value_dim=128),)


def _every(period: int, count: int, *more: int) -> tuple[int, ...]:
    """Return each last layer of every `period` of `count` layers, and `more`."""
    return tuple(sorted({*range(period - 1, count, period), *more}))


def _others(layers: Layers, count: int) -> tuple[int, ...]:
    return tuple(sorted(set(range(count)) - set(layers)))


def _pattern(letters: str, letter: str) -> tuple[int, ...]:
    return tuple(layer for layer, kind in enumerate(letters) if kind == letter)


def _kimi(count: int, heads: int) -> Groups:
    mla = _every(4, count, count - 1)
    return (latent(mla),
            *gated_delta_net(_others(mla, count), key_heads=heads, value_heads=heads))


def _qwen(count: int, kv_heads: int, value_heads: int) -> Groups:
    full = _every(4, count)
    return (attention(full, kv_heads=kv_heads, head_dim=256),
            *gated_delta_net(_others(full, count), key_heads=16, value_heads=value_heads))


def _mimo(count: int, full: Layers, kv_heads: int) -> Groups:
    return (attention(full, kv_heads=kv_heads, head_dim=192, value_dim=128),
            sliding_window(_others(full, count), 128, kv_heads=8, head_dim=192, value_dim=128))


def _gpt_oss(count: int) -> Groups:
    return (attention(range(1, count, 2), kv_heads=8, head_dim=64),
            sliding_window(range(0, count, 2), 128, kv_heads=8, head_dim=64))


def _jamba(count: int, channels: int) -> Groups:
    full = range(4, count, 8)
    return (attention(full, kv_heads=8, head_dim=128),
            *mamba1(_others(full, count), channels=channels))


def _nemotron(letters: str, kv_heads: int, heads: int, head_dim: int) -> Groups:
    return (attention(_pattern(letters, "*"), kv_heads=kv_heads, head_dim=128),
            *mamba2(_pattern(letters, "M"), heads=heads, head_dim=head_dim, state_dim=128,
                    groups=8, state_dtype="fp32"))


def _falcon(count: int, kv_heads: int, heads: int, groups: int) -> Groups:
    layers = range(count)
    return (attention(layers, kv_heads=kv_heads, head_dim=128),
            *mamba2(layers, heads=heads, head_dim=128, state_dim=256, groups=groups))


_NEMOTRON_H_8B = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
_NEMOTRON_NANO_9B_V2 = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
_NEMOTRON_3_NANO_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"

_PRESETS: dict[str, Groups] = {
    # KDA + MLA, the last layer MLA too, as linear_attn_config of the checkpoint says; the default
    # layer_types of KimiLinearConfig are others.
    "kimi-linear-48b": _kimi(27, heads=32),
    "kimi-k3": _kimi(93, heads=96),
    # Fitted to the sizes in table 5 of arXiv 2604.15039; not a published configuration.
    "prfaas-1t": _kimi(57, heads=64),
    "qwen3-next-80b": _qwen(48, kv_heads=2, value_heads=32),
    "qwen3.5-397b": _qwen(60, kv_heads=2, value_heads=64),
    "qwen3.5-35b-a3b": _qwen(40, kv_heads=2, value_heads=32),
    "qwen3.6-27b": _qwen(64, kv_heads=4, value_heads=48),
    "ring-2.5-1t": (latent(_every(8, 80)), *_lightning(_others(_every(8, 80), 80))),
    "minimax-m1": (attention(_every(8, 80), kv_heads=8, head_dim=128),
                   *_lightning(_others(_every(8, 80), 80))),
    # The published window is 128 tokens; transformers counts the newest token on top (129).
    "mimo-v2-flash": _mimo(48, _every(6, 48, 0), kv_heads=4),
    "mimo-v2.5-pro": _mimo(70, (0, 7, 15, 23, 31, 39, 47, 55, 62, 69), kv_heads=8),
    "gpt-oss-120b": _gpt_oss(36),
    "gpt-oss-20b": _gpt_oss(24),
    "jamba-1.5-mini": _jamba(32, channels=8192),
    "jamba-1.5-large": _jamba(72, channels=16384),
    # The checkpoint names no state type; NemotronHConfig's default, which engines read, is fp32.
    "nemotron-h-8b": _nemotron(_NEMOTRON_H_8B, 8, heads=128, head_dim=64),
    "nemotron-nano-9b-v2": _nemotron(_NEMOTRON_NANO_9B_V2, 8, heads=128, head_dim=80),
    "nemotron-3-nano-30b-a3b": _nemotron(_NEMOTRON_3_NANO_30B, 2, heads=64, head_dim=64),
    # By the published configurations; the defaults of FalconH1Config are no published model.
    "falcon-h1-7b": _falcon(44, kv_heads=2, heads=24, groups=1),
    "falcon-h1-34b": _falcon(72, kv_heads=4, heads=32, groups=2),
    "minimax-m2.5": (attention(range(62), kv_heads=8, head_dim=128),),
    "qwen3-235b": (attention(range(94), kv_heads=4, head_dim=128),),
    "smollm2-135m": (attention(range(30), kv_heads=3, head_dim=64),),
}


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets."""
    return tuple(_PRESETS)


def preset(model: str, *, block_tokens: int = 0, kv_dtype: object = None,
           state_dtype: object = None, conv_dtype: object = None) -> CacheSpec:
    """Return the whole cache of `model`, in canonical order (NHD, [head, value, key], SD).

    Args:
        model: one of `preset_names()`.
        block_tokens: tokens per page of the attention tensors; 0 for contiguous.
        kv_dtype, state_dtype, conv_dtype: element type of attention (K, V, latents), of recurrent
            states and of convolution states, where an engine holds them otherwise than published.

    Raises:
        UsageError: the name or a dtype is unknown.
    """
    if model not in _PRESETS:
        raise UsageError(f"preset {model!r} is unknown; known are {', '.join(_PRESETS)}. Describe "
                         "another model with CacheSpec.from_hf_config or CacheSpec(...)")
    chosen = {GroupKind.RECURRENT: state_dtype, GroupKind.CONVOLUTION: conv_dtype}

    def typed(group: LayerGroup, tensor: TensorSpec) -> TensorSpec:
        dtype = chosen.get(group.kind, kv_dtype)
        return tensor if dtype is None else replace(tensor, dtype=DType.of(dtype))

    spec = CacheSpec(model, _PRESETS[model]).map_tensors(typed)
    return spec.with_block_tokens(block_tokens)
