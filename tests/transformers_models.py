"""A tiny random model for each class of cache that transformers has, and how to run it.

Seeded, and for one thread: each process makes the same weights and computes the same bits.
"""

import importlib

import torch

PROMPT_TOKENS = 37
NEW_TOKENS = 24

# With the usual range of 0.02 some of these say one token for ever.
COMMON = dict(vocab_size=256, hidden_size=64, num_hidden_layers=4, eos_token_id=None,
              bos_token_id=None, pad_token_id=0, initializer_range=0.2)
ATTENTION = dict(intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
_LATENT = dict(intermediate_size=128, moe_intermediate_size=32, num_attention_heads=4,
               num_key_value_heads=4, kv_lora_rank=32, qk_rope_head_dim=8, qk_nope_head_dim=16,
               v_head_dim=16)
_EXPERTS = dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
                n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=32)
_MAMBA2 = dict(mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=2, mamba_d_state=16,
               mamba_chunk_size=16)
_GDN = dict(linear_key_head_dim=16, linear_value_head_dim=8, linear_num_key_heads=2,
            linear_num_value_heads=4)
_LINEAR, _FULL = "linear_attention", "full_attention"

# These have states only: no token count, no positions, and `cache_params` for a cache.
MAMBA = {"falcon_mamba", "mamba2"}

# module of transformers.models: (configuration, model, options)
MODELS = {
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridForCausalLM", _LATENT | dict(
        q_lora_rank=32, num_hidden_layers=6, head_dim=16, num_local_experts=4, n_group=1,
        topk_group=1, num_experts_per_tok=2)),
    "bamba": ("BambaConfig", "BambaForCausalLM", ATTENTION | _MAMBA2 | dict(
        attn_layer_indices=[2])),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", _LATENT | _EXPERTS | dict(
        head_dim=8)),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _LATENT | _EXPERTS),
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM", _LATENT | _EXPERTS | dict(
        index_n_heads=2, index_head_dim=16, index_topk=16)),
    "deepseek_v4": ("DeepseekV4Config", "DeepseekV4ForCausalLM", dict(
        moe_intermediate_size=32, num_attention_heads=4, head_dim=64, index_head_dim=16,
        index_n_heads=2, index_topk=2, n_routed_experts=4, num_experts_per_tok=2,
        sliding_window=16, compress_rates={
            "compressed_sparse_attention": 4, "heavily_compressed_attention": 8})),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", ATTENTION | _MAMBA2 | dict(
        head_dim=16, mamba_d_ssm=128)),
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", dict(
        intermediate_size=128, state_size=8, tie_word_embeddings=False)),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", ATTENTION | dict(
        num_hidden_layers=6, head_dim=16, sliding_window=16, tie_word_embeddings=False)),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", ATTENTION | dict(
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=16,
        attn_implementation="eager")),
    "granitemoehybrid": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM",
                         ATTENTION | _MAMBA2 | dict(
                             layer_types=[_LINEAR, _LINEAR, _FULL, _LINEAR], num_local_experts=2,
                             num_experts_per_tok=1, shared_intermediate_size=64)),
    "jamba": ("JambaConfig", "JambaForCausalLM", ATTENTION | dict(
        attn_layer_period=4, attn_layer_offset=2, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=8, mamba_dt_rank=8)),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", _LATENT | dict(
        num_hidden_layers=6, num_local_experts=4, num_experts_per_tok=2, linear_head_dim=16,
        linear_num_heads=4)),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", ATTENTION | dict(
        layer_types=["conv", "conv", _FULL, "conv"])),
    "lfm2_moe": ("Lfm2MoeConfig", "Lfm2MoeForCausalLM", ATTENTION | dict(
        layer_types=["conv", "conv", _FULL, "conv"], num_experts=4, num_experts_per_tok=2,
        num_dense_layers=1, moe_intermediate_size=32)),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", dict(
        num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=16)),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", ATTENTION | dict(
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, block_size=16,
        layer_types=[_LINEAR, _FULL, _LINEAR, _FULL])),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", ATTENTION | dict(
        head_dim=16, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=16,
        chunk_size=16)),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", ATTENTION | _GDN),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", ATTENTION | _GDN | dict(head_dim=16)),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", ATTENTION | _GDN | dict(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32)),
    "zamba2": ("Zamba2Config", "Zamba2ForCausalLM", ATTENTION | dict(
        num_key_value_heads=4, layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1,
        mamba_d_state=16, n_mamba_heads=8, mamba_ngroups=2, chunk_size=16, use_mem_rope=True,
        adapter_rank=8)),
    "llama": ("LlamaConfig", "LlamaForCausalLM", ATTENTION),
}

def make_model(name, dtype=torch.float32, **options):
    config_name, model_name, own = MODELS[name]
    folder = f"transformers.models.{name}"
    config = getattr(importlib.import_module(f"{folder}.configuration_{name}"), config_name)
    model = getattr(importlib.import_module(f"{folder}.modeling_{name}"), model_name)
    torch.manual_seed(0)
    return model(config(**COMMON | own | options)).to(dtype).eval()


def make_prompt(tokens=PROMPT_TOKENS, batch_size=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 200, (batch_size, tokens), generator=generator)


def forward(model, ids, cache=None, position=0):
    """Return (logits of the last token, cache); Mamba calls the cache by another name.

    `position` is that of the first id. Bamba and MiniMax get it wrong when left to themselves.
    """
    mamba = model.config.model_type in MAMBA
    name = "cache_params" if mamba else "past_key_values"
    options = {} if cache is None else {name: cache}
    if not mamba:
        options["position_ids"] = torch.arange(position, position + ids.shape[1])[None]
    output = model(input_ids=ids, use_cache=True, **options)
    return output.logits[0, -1], getattr(output, name)


def greedy(model, cache, token, count=NEW_TOKENS, position=PROMPT_TOKENS):
    """Return the tokens that follow `token`, which is at `position`, and the logits of each."""
    tokens, logits = [], []
    for step in range(count):
        scores, cache = forward(model, torch.tensor([[token]]), cache, position + step)
        token = int(scores.argmax())
        tokens.append(token)
        logits.append(scores)
    return tokens, torch.stack(logits)


def given_tokens(model, tokens):
    return tokens if model.config.model_type in MAMBA else None


def copied(tensors):
    return {key: tensor.clone() for key, tensor in tensors.items()}


def differences(here, there, where="cache"):
    """Return the names of all attributes, of a cache and its layers, that differ."""
    if type(here) is not type(there):
        return [where]
    if isinstance(here, torch.Tensor):
        same = here.dtype == there.dtype and torch.equal(here, there)
        return [] if same else [where]
    if isinstance(here, dict) and here.keys() == there.keys():
        pairs = [(here[key], there[key], f"{where}.{key}") for key in here]
    elif isinstance(here, list) and len(here) == len(there):
        pairs = [(a, b, f"{where}.{index}") for index, (a, b) in enumerate(zip(here, there))]
    elif type(here).__module__.startswith("transformers."):
        pairs = [(vars(here), vars(there), where)]
    else:
        return [] if here == there else [where]
    return [name for pair in pairs for name in differences(*pair)]
