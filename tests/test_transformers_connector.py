"""Every cache class of transformers that kvwire moves: out, through copies, and on with the model.

Models are tiny and random, so their tokens may repeat: logits and tensors are compared too.
"""

import importlib

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvwire.connectors.transformers import (  # noqa: E402
    allocate, describe, export, held_tokens, plan_cache, rebuild,
)
from kvwire.errors import RefusedError, UnsupportedError, UsageError  # noqa: E402
from kvwire.layout import CacheSpec, GroupKind  # noqa: E402

PROMPT_TOKENS = 37
NEW_TOKENS = 24

_COMMON = dict(vocab_size=256, hidden_size=64, num_hidden_layers=4, eos_token_id=None,
               bos_token_id=None, pad_token_id=0)
_ATTENTION = dict(intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
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

# module of transformers.models: (configuration, model, options)
MODELS = {
    "bailing_hybrid": ("BailingHybridConfig", "BailingHybridForCausalLM", _LATENT | dict(
        q_lora_rank=32, num_hidden_layers=6, head_dim=16)),
    "bamba": ("BambaConfig", "BambaForCausalLM", _ATTENTION | _MAMBA2 | dict(
        attn_layer_indices=[2])),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", _LATENT | _EXPERTS),
    "deepseek_v32": ("DeepseekV32Config", "DeepseekV32ForCausalLM", _LATENT | _EXPERTS | dict(
        index_n_heads=2, index_head_dim=16, index_topk=16)),
    "deepseek_v4": ("DeepseekV4Config", "DeepseekV4ForCausalLM", dict(
        moe_intermediate_size=32, num_attention_heads=4, head_dim=64, index_head_dim=16,
        index_n_heads=2, index_topk=2, n_routed_experts=4, num_experts_per_tok=2,
        sliding_window=16, compress_rates={
            "compressed_sparse_attention": 4, "heavily_compressed_attention": 8})),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", _ATTENTION | _MAMBA2 | dict(
        head_dim=16, mamba_d_ssm=128)),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", _ATTENTION | dict(
        num_hidden_layers=6, head_dim=16, sliding_window=16)),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", _ATTENTION | dict(
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=16,
        attn_implementation="eager")),
    "granitemoehybrid": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM",
                         _ATTENTION | _MAMBA2 | dict(
                             layer_types=[_LINEAR, _LINEAR, _FULL, _LINEAR], num_local_experts=2,
                             num_experts_per_tok=1, shared_intermediate_size=64)),
    "jamba": ("JambaConfig", "JambaForCausalLM", _ATTENTION | dict(
        attn_layer_period=4, attn_layer_offset=2, num_experts=2, num_experts_per_tok=1,
        mamba_d_state=8, mamba_dt_rank=8)),
    "kimi_linear": ("KimiLinearConfig", "KimiLinearForCausalLM", _LATENT | dict(
        num_hidden_layers=6, num_local_experts=4, num_experts_per_tok=2, linear_head_dim=16,
        linear_num_heads=4)),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", _ATTENTION | dict(
        layer_types=["conv", "conv", _FULL, "conv"])),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", dict(
        num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=16)),
    "minimax": ("MiniMaxConfig", "MiniMaxForCausalLM", _ATTENTION | dict(
        head_dim=16, num_local_experts=2, num_experts_per_tok=1, block_size=16,
        layer_types=[_LINEAR, _FULL, _LINEAR, _FULL])),
    "nemotron_h": ("NemotronHConfig", "NemotronHForCausalLM", _ATTENTION | dict(
        head_dim=16, mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=16,
        chunk_size=16)),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", _ATTENTION | _GDN),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _ATTENTION | _GDN | dict(head_dim=16)),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _ATTENTION | _GDN | dict(
        head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32)),
    "zamba2": ("Zamba2Config", "Zamba2ForCausalLM", _ATTENTION | dict(
        num_key_value_heads=4, layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1,
        mamba_d_state=16, n_mamba_heads=8, mamba_ngroups=2, chunk_size=16, use_mem_rope=True,
        adapter_rank=8)),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _ATTENTION),
}

KINDS = {
    "bailing_hybrid": {GroupKind.LATENT, GroupKind.CONVOLUTION, GroupKind.RECURRENT},
    "deepseek_v3": {GroupKind.LATENT},
    "deepseek_v32": {GroupKind.LATENT, GroupKind.AUXILIARY},
    "deepseek_v4": {GroupKind.SLIDING_WINDOW, GroupKind.AUXILIARY},
    "falcon_h1": {GroupKind.FULL_ATTENTION, GroupKind.CONVOLUTION, GroupKind.RECURRENT},
    "gpt_oss": {GroupKind.FULL_ATTENTION, GroupKind.SLIDING_WINDOW},
    "kimi_linear": {GroupKind.LATENT, GroupKind.CONVOLUTION, GroupKind.RECURRENT},
    "lfm2": {GroupKind.FULL_ATTENTION, GroupKind.CONVOLUTION},
    "mamba2": {GroupKind.CONVOLUTION, GroupKind.RECURRENT},
    "minimax": {GroupKind.FULL_ATTENTION, GroupKind.RECURRENT},
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def make_model(name, dtype=torch.float32, **options):
    config_name, model_name, own = MODELS[name]
    folder = f"transformers.models.{name}"
    config = getattr(importlib.import_module(f"{folder}.configuration_{name}"), config_name)
    model = getattr(importlib.import_module(f"{folder}.modeling_{name}"), model_name)
    torch.manual_seed(0)
    return model(config(**_COMMON | own | options)).to(dtype).eval()


def make_prompt(tokens=PROMPT_TOKENS, batch_size=1):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 200, (batch_size, tokens), generator=generator)


def forward(model, ids, cache=None):
    """Return (logits of the last token, cache); Mamba calls the cache by another name."""
    name = "cache_params" if model.config.model_type == "mamba2" else "past_key_values"
    output = model(input_ids=ids, use_cache=True, **({} if cache is None else {name: cache}))
    return output.logits[0, -1], getattr(output, name)


def greedy(model, cache, token, count=NEW_TOKENS):
    """Return the tokens that follow, and the logits of each step."""
    tokens, logits = [], []
    for _ in range(count):
        scores, cache = forward(model, torch.tensor([[token]]), cache)
        token = int(scores.argmax())
        tokens.append(token)
        logits.append(scores)
    return tokens, torch.stack(logits)


def given_tokens(model, tokens):
    return tokens if model.config.model_type == "mamba2" else None


def copied(tensors):
    return {key: tensor.clone() for key, tensor in tensors.items()}


def shipped(exported, spec):
    """Copy an export into memory that was allocated from the plan alone."""
    destination = allocate(spec, exported.tokens)
    for tensor in destination.values():
        tensor.view(torch.uint8).fill_(0xA5)
    assert destination.keys() == exported.tensors.keys()
    for key, tensor in exported.tensors.items():
        assert destination[key].shape == tensor.shape and destination[key].dtype == tensor.dtype
        destination[key].copy_(tensor)
    return destination


@pytest.mark.parametrize("name", MODELS)
def test_decoding_goes_on_exactly_as_without_the_hand_off(name):
    model = make_model(name)
    scores, cache = forward(model, make_prompt())
    first = int(scores.argmax())
    exported = export(cache, model, given_tokens(model, PROMPT_TOKENS))
    assert exported.tokens == PROMPT_TOKENS
    spec = plan_cache(model.config, PROMPT_TOKENS, torch.float32)
    assert spec == exported.spec
    assert {group.kind for group in spec.groups} >= KINDS.get(name, {GroupKind.FULL_ATTENTION})
    destination = shipped(exported, spec)
    sent = copied(exported.tensors)
    expected_tokens, expected_logits = greedy(model, cache, first)

    rebuilt = rebuild(model.config, copied(destination), exported.metadata)
    again = export(rebuilt, model, given_tokens(model, PROMPT_TOKENS))
    assert again.spec == exported.spec and again.metadata == exported.metadata
    assert again.tensors.keys() == sent.keys()
    assert all(torch.equal(again.tensors[key], sent[key]) for key in sent)

    for _ in range(2):
        cache = rebuild(model.config, copied(destination), exported.metadata)
        tokens, logits = greedy(model, cache, first)
        assert tokens == expected_tokens
        assert torch.equal(logits, expected_logits)


@pytest.mark.parametrize("name", MODELS)
def test_each_kind_of_tensor_matters(name):
    """Control: a zeroed tensor of any kind changes the logits.

    Auxiliary tensors are zeroed together: a sparse selection need not look at each of them.
    """
    model = make_model(name)
    exported = export(forward(model, make_prompt())[1], model, given_tokens(model, PROMPT_TOKENS))

    def logits(zeroed=()):
        tensors = copied(exported.tensors)
        for key in zeroed:
            tensors[key].zero_()
        cache = rebuild(model.config, tensors, exported.metadata)
        return greedy(model, cache, 7, count=6)[1]

    expected = logits()
    for group in exported.spec.groups:
        keys = [(group.layers[0], spec.name) for spec in group.tensors]
        for zeroed in [keys] if group.kind == GroupKind.AUXILIARY else [[key] for key in keys]:
            assert not torch.equal(logits(zeroed), expected), (group.kind, zeroed)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17])
@pytest.mark.parametrize("name", ["deepseek_v4", "gpt_oss", "qwen3_next", "kimi_linear"])
def test_short_prompts_and_window_edges(name, tokens):
    model = make_model(name)
    scores, cache = forward(model, make_prompt(tokens))
    exported = export(cache, model)
    spec = plan_cache(model.config, tokens, "fp32")
    assert spec == exported.spec
    destination = shipped(exported, spec)
    first = int(scores.argmax())
    expected_tokens, expected_logits = greedy(model, cache, first, count=6)
    got_tokens, got_logits = greedy(
        model, rebuild(model.config, destination, exported.metadata), first, count=6)
    assert got_tokens == expected_tokens and torch.equal(got_logits, expected_logits)


@pytest.mark.parametrize("name", MODELS)
def test_the_plan_knows_the_types_of_a_bf16_model(name):
    model = make_model(name, torch.bfloat16)
    _, cache = forward(model, make_prompt())
    described = describe(cache, model, given_tokens(model, PROMPT_TOKENS))
    assert described == plan_cache(model, PROMPT_TOKENS)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "deepseek_v4"])
def test_the_plan_agrees_with_the_engine_neutral_spec(name):
    config = make_model(name).config
    neutral = CacheSpec.from_hf_config(config, "bf16")
    assert neutral.difference(plan_cache(config, PROMPT_TOKENS, "bf16"), complete=True) is None


def test_a_model_with_plain_attention_needs_no_entry_of_its_own():
    from transformers import Olmo2Config, Olmo2ForCausalLM
    model = Olmo2ForCausalLM(Olmo2Config(**_COMMON | _ATTENTION)).eval()
    exported = export(forward(model, make_prompt())[1], model)
    assert exported.spec == plan_cache(model, PROMPT_TOKENS, "fp32")
    assert exported.tensors[3, "v"].shape == (2, PROMPT_TOKENS, 16)


def test_a_window_holds_one_token_less_than_the_model_sees():
    model = make_model("gpt_oss")
    exported = export(forward(model, make_prompt())[1], model)
    group = next(g for g in exported.spec.groups if g.kind == GroupKind.SLIDING_WINDOW)
    assert group.window_tokens == 16
    assert held_tokens(group, PROMPT_TOKENS) == range(22, 37)
    assert exported.tensors[group.layers[0], "k"].shape == (2, 15, 16)


def test_fused_convolutions_name_their_sub_blocks():
    named = {"qwen3_next": ["q", "k", "v"], "falcon_h1": ["x", "b", "c"], "jamba": ["conv"]}
    for name, leaves in named.items():
        spec = plan_cache(make_model(name), PROMPT_TOKENS, "fp32")
        conv = next(g for g in spec.groups if g.kind == GroupKind.CONVOLUTION).tensors[0]
        assert [leaf.name for leaf in conv.leaves] == leaves


def test_exported_tensors_are_the_cache_s_own_memory():
    model = make_model("qwen3_next")
    _, cache = forward(model, make_prompt())
    exported = export(cache, model)
    assert exported.tensors[3, "k"].data_ptr() == cache.layers[3].keys.data_ptr()
    assert exported.tensors[0, "state"].data_ptr() == cache.layers[0].recurrent_states[0].data_ptr()


def test_other_cache_classes_are_refused_by_name():
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache
    model = make_model("llama")
    _, cache = forward(model, make_prompt())
    static = StaticCache(config=model.config, max_cache_len=64)
    for other in (static, EncoderDecoderCache(cache, DynamicCache()), ((None, None),)):
        with pytest.raises(UnsupportedError, match=type(other).__name__):
            export(other, model)
    offloading = DynamicCache(config=model.config)
    offloading.offloading = True
    with pytest.raises(UnsupportedError, match="offload"):
        export(offloading, model)


def test_a_cache_layer_that_is_not_known_is_refused_by_name():
    from transformers.cache_utils import DynamicLayer

    class PackedLayer(DynamicLayer):
        pass

    model = make_model("llama")
    _, cache = forward(model, make_prompt())
    cache.layers[2].__class__ = PackedLayer
    with pytest.raises(UnsupportedError, match="layer 2 is a PackedLayer"):
        export(cache, model)


def test_a_cache_made_without_the_configuration_is_refused():
    from transformers import DynamicCache
    model = make_model("gpt_oss")
    cache = DynamicCache()
    forward(model, make_prompt(), cache)
    with pytest.raises(UsageError, match="DynamicSlidingWindowLayer"):
        export(cache, model)


def test_batches_and_empty_caches_are_refused():
    from transformers import DynamicCache
    for name in ("llama", "qwen3_next", "kimi_linear", "mamba2"):
        model = make_model(name)
        _, cache = forward(model, make_prompt(batch_size=2))
        with pytest.raises(UnsupportedError, match="batch size is 2"):
            export(cache, model, given_tokens(model, PROMPT_TOKENS))
        with pytest.raises(UsageError, match="run the prefill first"):
            export(DynamicCache(config=model.config), model)


def test_the_token_count_is_checked_and_needed_where_no_layer_keeps_it():
    model = make_model("llama")
    _, cache = forward(model, make_prompt())
    with pytest.raises(UsageError, match=r"\[36, 37\]"):
        export(cache, model, tokens=36)
    model = make_model("mamba2")
    _, cache = forward(model, make_prompt())
    with pytest.raises(UsageError, match="pass tokens"):
        export(cache, model)


def test_an_unknown_linear_architecture_is_refused_by_name():
    model = make_model("qwen3_next")
    _, cache = forward(model, make_prompt())
    model.config.model_type = "qwen9"
    with pytest.raises(UnsupportedError, match="'qwen9'"):
        plan_cache(model.config, PROMPT_TOKENS, "fp32")
    with pytest.raises(UnsupportedError, match="'qwen9'"):
        export(cache, model)


def test_rebuild_refuses_what_does_not_fit():
    model = make_model("llama")
    exported = export(forward(model, make_prompt())[1], model)
    other = make_model("gpt_oss")
    with pytest.raises(RefusedError, match="layers"):
        rebuild(other, exported.tensors, exported.metadata)
    with pytest.raises(UsageError, match="tokens"):
        rebuild(model, exported.tensors, {})
    with pytest.raises(UsageError, match="lack"):
        rebuild(model, {}, exported.metadata)
    short = exported.tensors | {(1, "v"): exported.tensors[1, "v"][:, :-1]}
    with pytest.raises(UsageError, match="shape"):
        rebuild(model, short, exported.metadata)
