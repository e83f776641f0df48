"""Tiny models with random weights, one for each kind of cache; made on the spot by transformers.

``python tests/vllm_models.py FOLDER NAME...`` writes them. Head sizes and the like are the least
that vLLM's CPU kernels take.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

# Wide weights: what a model says depends on more than the last token.
_COMMON = {"vocab_size": 512, "hidden_size": 128, "num_attention_heads": 4,
           "num_key_value_heads": 2, "tie_word_embeddings": False, "initializer_range": 0.1,
           "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
_MLP = _COMMON | {"intermediate_size": 128, "max_position_embeddings": 4096}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16,
           "mamba_expand": 2, "mamba_chunk_size": 16}
_MLA = _MLP | {"num_key_value_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
               "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 64,
               "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
               "num_hidden_layers": 2}

MODELS = {
    "llama": ("Llama", _MLP | {"num_hidden_layers": 3, "head_dim": 32}),
    "qwen3_next": ("Qwen3Next", _MLP | {
        "num_hidden_layers": 4, "head_dim": 64, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64}),
    "granitemoehybrid": ("GraniteMoeHybrid", _MLP | _MAMBA2 | {
        "num_hidden_layers": 4, "layer_types": ["mamba", "mamba", "attention", "mamba"],
        "num_local_experts": 2, "num_experts_per_tok": 1, "shared_intermediate_size": 128}),
    "falcon_h1": ("FalconH1", _MLP | _MAMBA2 | {
        "num_hidden_layers": 4, "head_dim": 32, "mamba_d_ssm": 256}),
    "deepseek_v2": ("DeepseekV2", _MLA | {"q_lora_rank": None, "first_k_dense_replace": 2}),
    "deepseek_v3": ("DeepseekV3", _MLA | {"q_lora_rank": 64, "first_k_dense_replace": 1,
                                          "n_group": 1, "topk_group": 1,
                                          "topk_method": "noaux_tc"}),
    "gpt_oss": ("GptOss", _MLP | {
        "num_hidden_layers": 4, "head_dim": 64, "num_local_experts": 2, "num_experts_per_tok": 1,
        "sliding_window": 64}),
    "gemma3": ("Gemma3", _MLP | {"num_hidden_layers": 6, "head_dim": 32, "sliding_window": 64}),
    "jamba": ("Jamba", _MLP | {
        "num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 2,
        "num_experts_per_tok": 1, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
        "mamba_dt_rank": 8, "use_mamba_kernels": False}),
    "qwen3_5": ("Qwen3_5", _MLP | {
        "num_hidden_layers": 4, "head_dim": 64, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    "lfm2": ("Lfm2", _MLP | {
        "num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False, "conv_dim": 128, "block_dim": 128}),
    # No experts: vLLM's experts without a gate are not for CPUs.
    "nemotron_h": ("NemotronH", _MLP | {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
        "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 1,
        "ssm_state_size": 16, "chunk_size": 16}),
    "kimi_linear": ("KimiLinear", _MLA | {
        "num_hidden_layers": 4, "num_local_experts": 4, "mla_use_nope": True,
        "linear_attn_config": {"head_dim": 128, "num_heads": 4, "short_conv_kernel_size": 4,
                               "kda_layers": [1, 2, 4], "full_attn_layers": [3]}}),
}


def missing(name):
    """Return what a model needs of vLLM and this build of it lacks; None: nothing."""
    import torch
    import vllm._custom_ops  # noqa: F401  (loads the operators)
    from vllm.triton_utils import HAS_TRITON
    if name in ("qwen3_next", "qwen3_5") and torch.cpu._is_amx_tile_supported():
        return "bf16 attention whose packing kvwire knows: this CPU has AMX"
    if name == "jamba" and not hasattr(torch.ops._C, "selective_scan_fwd"):
        return "the operator _C.selective_scan_fwd (Mamba-1)"
    if name == "kimi_linear" and not HAS_TRITON:
        return "Triton, and with it chunk_kda_with_fused_gate (KDA)"
    if name == "qwen3_5" and find_spec("torchvision") is None:
        return "a torchvision for CPUs, which the images that Qwen3.5 takes need"
    return None


def dtype(name):
    """Return that of the weights and the cache: bf16, except where a CPU with AMX would pack the
    keys in a way that kvwire refuses."""
    import torch
    packs = torch.cpu._is_amx_tile_supported() and not name.startswith("deepseek")  # no keys
    return "float32" if packs else "bfloat16"


def make(folder, name):
    """Return the path of a model, written there unless it is there already."""
    path = Path(folder) / name
    if (path / "config.json").exists():
        return path
    import torch
    import transformers
    kind, values = MODELS[name]
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(
        transformers, f"{kind}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config_class(**values))
    model.to(torch.bfloat16).save_pretrained(path)
    return path


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        make(sys.argv[1], wanted)
