"""Specs from transformers configurations, against presets and against real caches' bytes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from kvwire.errors import UnsupportedError, UsageError
from kvwire.hf_config import supported_model_types
from kvwire.layout import Axis, CacheSpec, DType, GroupKind

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

TOKENS = 37

_COMMON = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128,
           "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
           "eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
_MLA = {"num_key_value_heads": 4, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "qk_nope_head_dim": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
_DEEPSEEK = {**_MLA, "num_hidden_layers": 2, "q_lora_rank": 32, "n_routed_experts": 4,
             "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_GDN = {"linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 24,
           "mamba_chunk_size": 16}
_EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
_LINEAR3 = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]

TINY = {
    "bailing_hybrid": {**_MLA, "num_hidden_layers": 6},
    "bamba": {**_MAMBA2, "attn_layer_indices": [2]},
    "deepseek_v2": {**_DEEPSEEK, "head_dim": 8},
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {**_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16},
    "falcon_mamba": {"state_size": 8},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 128, "head_dim": 16},
    "gemma3_text": {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 16},
    "glm4_moe_lite": _DEEPSEEK,
    "gpt_oss": {**_EXPERTS, "head_dim": 16, "sliding_window": 16},
    "granitemoehybrid": {**_MAMBA2, **_EXPERTS, "layer_types": _LINEAR3,
                         "shared_intermediate_size": 64},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 2,
              "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "kimi_linear": {**_MLA, "num_hidden_layers": 6, "linear_head_dim": 16,
                    "linear_num_heads": 4, "num_local_experts": 4, "pad_token_id": 0},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_experts": 4,
                 "num_experts_per_tok": 2, "num_dense_layers": 1, "moe_intermediate_size": 32},
    "llama": {},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 24, "n_groups": 2,
               "chunk_size": 16},
    "mimo_v2_flash": {"head_dim": 24, "v_head_dim": 16, "sliding_window": 17,
                      "n_routed_experts": 2, "num_experts_per_tok": 1,
                      "moe_intermediate_size": 32, "num_attention_heads": 8},
    "minimax": {**_EXPERTS, "head_dim": 16, "block_size": 16},
    "minicpm3": {**_MLA, "q_lora_rank": 32},
    "mistral": {"sliding_window": 16, "head_dim": 16},
    "nemotron_h": {"head_dim": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
                   "ssm_state_size": 24, "chunk_size": 16},
    "olmo_hybrid": {**_GDN, "linear_num_key_heads": 4},
    "qwen3_5_text": {**_GDN, "head_dim": 16},
    "qwen3_next": {**_GDN, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "youtu": {**_MLA, "q_lora_rank": 32},
    "zamba2": {"num_key_value_heads": 4, "mamba_d_state": 24, "n_mamba_heads": 8,
               "mamba_ngroups": 2, "chunk_size": 16, "use_mem_rope": True, "adapter_rank": 8,
               "layers_block_type": ["linear_attention", "hybrid"] * 2},
}


def tiny_config(model_type):
    return transformers.AutoConfig.for_model(model_type, **{**_COMMON, **TINY[model_type]})


@pytest.fixture(params=sorted(TINY))
def prefilled(request):
    """A model type, its configuration, and the cache after a bf16 prefill of TOKENS tokens."""
    torch.manual_seed(0)
    config = tiny_config(request.param)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    prompt = torch.randint(3, 200, (1, TOKENS))
    with torch.no_grad():
        output = model(input_ids=prompt, use_cache=True)
    cache = output.get("past_key_values") or output.get("cache_params")
    return request.param, config, cache


def held_bytes(cache, layer) -> int:
    """Bytes that the real cache keeps for a layer, as the spec counts columns and windows."""
    total = 0
    fields = vars(cache.layers[layer]) if layer < len(cache.layers) else {}
    window = getattr(cache.layers[layer], "sliding_window", None) if fields else None
    for name in ("keys", "values", "indexer_keys"):
        tensor = fields.get(name)
        if tensor is not None and tensor.numel():
            full_window = window is not None and TOKENS >= window
            rows = tensor.shape[-2] + (1 if full_window else 0)
            total += tensor.nbytes // tensor.shape[-2] * rows
    for tensor in fields.get("conv_states", {}).values():
        total += tensor[..., 1:].nbytes if tensor is not None else 0
    for tensor in fields.get("recurrent_states", {}).values():
        total += tensor.nbytes if tensor is not None else 0
    linear = getattr(cache, "linear_cache", [])[layer:layer + 1]
    return total + sum(tensor.nbytes for tensor in linear if len(tensor))


def test_bytes_of_each_layer_of_a_real_cache(prefilled):
    model_type, config, cache = prefilled
    spec = CacheSpec.from_hf_config(config, torch.bfloat16)
    owners = {layer for group in spec.groups for layer in group.layers}
    assert owners
    for layer in range(len(cache.layers)):
        expected = spec.select([layer]).bytes(TOKENS) if layer in owners else 0
        assert held_bytes(cache, layer) == expected, f"{model_type}, layer {layer}"


def test_every_known_architecture_with_states_is_tried():
    plain = {"gemma2", "minimax_m2", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3",
             "qwen3_5_moe_text"}
    assert set(supported_model_types()) - plain == set(TINY)


# Where the defaults of a configuration class are the preset's model.
@pytest.mark.parametrize("model_type, changes, preset, options", [
    ("qwen3_next", {}, "qwen3-next-80b", {}),
    ("qwen3_5_moe_text", {}, "qwen3.5-35b-a3b", {}),
    ("gpt_oss", {}, "gpt-oss-120b", {}),
    ("gpt_oss", {"num_hidden_layers": 24}, "gpt-oss-20b", {}),
    ("minimax_m2", {}, "minimax-m2.5", {}),
    ("mimo_v2_flash", {}, "mimo-v2-flash", {}),
    ("jamba", {}, "jamba-1.5-mini", {"state_dtype": "bf16"}),
    ("jamba", {"num_hidden_layers": 72, "hidden_size": 8192, "num_attention_heads": 64},
     "jamba-1.5-large", {"state_dtype": "bf16"}),
    ("kimi_linear", {"linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [layer for layer in range(1, 27) if layer % 4]}}, "kimi-linear-48b", {}),
    ("nemotron_h", {"hybrid_override_pattern":
                    "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
     "nemotron-h-8b", {}),
    ("qwen3_moe", {"num_hidden_layers": 94, "head_dim": 128}, "qwen3-235b", {}),
])
def test_presets_agree_with_configuration_classes(model_type, changes, preset, options):
    config = transformers.AutoConfig.for_model(model_type, **changes)
    spec = CacheSpec.from_hf_config(config, "bf16", model=preset, **options)
    assert spec.difference(CacheSpec.preset(preset), complete=True) is None
    assert spec.fingerprint() == CacheSpec.preset(preset).fingerprint()


def test_kimi_linear_by_transformers_own_default_layers():
    spec = CacheSpec.from_hf_config({"model_type": "kimi_linear"}, "bf16")
    assert spec.groups[0].layers == (4, 8, 12, 16, 20, 24)
    preset = CacheSpec.preset("kimi-linear-48b")
    mine, theirs = ([replace(group, layers=(0,)) for group in groups.groups]
                    for groups in (spec, preset))
    assert mine == theirs


def test_leaves_are_canonical():
    spec = CacheSpec.from_hf_config(tiny_config("falcon_h1"), "bf16")
    attention, conv, state = spec.groups
    assert attention.kind == GroupKind.FULL_ATTENTION
    assert [part.name for part in conv.tensors[0].axes[1].slices] == ["x", "b", "c"]
    assert [part.full for part in conv.tensors[0].axes[1].slices] == [128, 48, 48]
    assert conv.tensors[0].held_extent(Axis.COLUMN) == 3
    assert [axis.axis for axis in state.tensors[0].axes] == [Axis.HEAD, Axis.VALUE, Axis.KEY]
    assert state.tensors[0].held_extent(Axis.KEY) == 24
    assert (conv.tensors[0].dtype, state.tensors[0].dtype) == (DType.BF16, DType.FP32)


def test_nested_text_config_and_its_dtype():
    nested = {"model_type": "qwen3_5", "dtype": "bfloat16", "text_config": {
        "model_type": "qwen3_5_text", "num_hidden_layers": 8, "dtype": "bfloat16"}}
    spec = CacheSpec.from_hf_config(nested)
    assert spec.model == "qwen3_5_text"
    assert [group.layers for group in spec.groups] == [(3, 7), *[(0, 1, 2, 4, 5, 6)] * 2]
    assert spec.groups[0].tensors[0].dtype == DType.BF16


def test_window_and_state_dtype():
    spec = CacheSpec.from_hf_config(tiny_config("gpt_oss"), "fp16")
    assert [(group.label, group.window_tokens) for group in spec.groups] == [
        ("full_attention", 0), ("sliding_window", 16)]
    spec = CacheSpec.from_hf_config(tiny_config("jamba"), "bf16", state_dtype="bf16")
    assert {tensor.dtype for group in spec.groups for tensor in group.tensors} == {DType.BF16}


@pytest.mark.parametrize("config, words", [
    ({"model_type": "deepseek_v4"}, "model_type 'deepseek_v4' is not known.*CacheSpec"),
    ({"model_type": "never_heard_of"}, "model_type 'never_heard_of' is not known"),
    ({}, "model_type None is not known"),
    (SimpleNamespace(), "model_type None is not known"),
    (SimpleNamespace(model_type="llama", layer_types=["chunked_attention"]),
     "chunked_attention in llama"),
    (SimpleNamespace(model_type="llama", layer_types=["linear_attention"]),
     "linear_attention in llama"),
])
def test_what_is_not_known_is_refused_by_name(config, words):
    with pytest.raises(UnsupportedError, match=words):
        CacheSpec.from_hf_config(config, "bf16")


def test_a_configuration_without_dtype_needs_one():
    with pytest.raises(UsageError, match="configuration of llama names no dtype"):
        CacheSpec.from_hf_config({"model_type": "llama"})


def test_a_plain_object_needs_no_transformers():
    config = SimpleNamespace(model_type="llama", dtype="bfloat16", num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    spec = CacheSpec.from_hf_config(config)
    assert spec.row_bytes == 2 * 2 * 2 * 16 * 2
