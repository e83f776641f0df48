"""The transformers connector: what it plans, exports and rebuilds, and what it refuses.

The hand-offs themselves are in test_transformers_handoff.py.
"""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvwire.connectors.transformers import (  # noqa: E402
    allocate, describe, export, held_tokens, plan_cache, rebuild,
)
from kvwire.errors import RefusedError, UnsupportedError, UsageError  # noqa: E402
from kvwire.layout import CacheSpec, GroupKind  # noqa: E402
from transformers_models import (  # noqa: E402
    ATTENTION, COMMON, MODELS, PROMPT_TOKENS, copied, differences, forward, given_tokens, greedy,
    make_model, make_prompt,
)

@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


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
@pytest.mark.parametrize("name", ["deepseek_v32", "deepseek_v4", "falcon_h1", "gpt_oss", "jamba",
                                  "kimi_linear", "lfm2", "minimax", "qwen3_next"])
def test_short_prompts_and_window_edges(name, tokens):
    model = make_model(name)
    scores, cache = forward(model, make_prompt(tokens))
    exported = export(cache, model)
    spec = plan_cache(model.config, tokens, "fp32")
    assert spec == exported.spec
    destination = shipped(exported, spec)
    first = int(scores.argmax())
    received = rebuild(model.config, destination, exported.metadata)
    assert differences(received, cache) == []
    expected_tokens, expected_logits = greedy(model, cache, first, 6, tokens)
    got_tokens, got_logits = greedy(model, received, first, 6, tokens)
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
    model = Olmo2ForCausalLM(Olmo2Config(**COMMON | ATTENTION)).eval()
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


def other_caches(config, cache):
    """Return caches of other classes, some filled, and words of what to do instead."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache
    from transformers.cache_utils import DFlashCache, MtpCache, QuantizedCache
    own = type("DynamicCache", (DynamicCache,), {"__module__": "remote.code"})
    return {
        "StaticCache": (StaticCache(config=config, max_cache_len=64), "prefill with DynamicCache"),
        "QuantizedCache": (QuantizedCache("fp8", config), "prefill unquantised"),
        "EncoderDecoderCache": (EncoderDecoderCache(cache, DynamicCache()), "not handed off"),
        "MtpCache": (MtpCache(config=config), "of the model itself"),
        "DFlashCache": (DFlashCache(config=config), "of the model itself"),
        "remote.code.DynamicCache": (own(config=config), "the model makes by itself"),
        "tuple": (((None, None),), "transformers 4"),
        "NoneType": (None, "use_cache=True"),
    }


def test_other_cache_classes_are_refused_by_name():
    from transformers import DynamicCache
    model = make_model("llama")
    _, cache = forward(model, make_prompt())
    for name, (other, advice) in other_caches(model.config, cache).items():
        with pytest.raises(UnsupportedError, match=f"cache class {name} is .*{advice}"):
            export(other, model)
    offloading = DynamicCache(config=model.config)
    offloading.offloading = True
    with pytest.raises(UnsupportedError, match="offload"):
        export(offloading, model)


def test_a_cache_layer_that_the_configuration_does_not_make_is_refused_by_name():
    from transformers.cache_utils import DynamicLayer

    class PackedLayer(DynamicLayer):
        pass

    model = make_model("llama")
    _, cache = forward(model, make_prompt())
    cache.layers[2].__class__ = PackedLayer
    with pytest.raises(UsageError, match="layer 2 is PackedLayer.* makes it DynamicLayer"):
        export(cache, model)


@pytest.mark.parametrize("name, options, words", [
    ("minimax_m3_vl_text",
     {"num_hidden_layers": 2, "layer_types": ["full_attention", "minimax_m3_sparse"]},
     "cache layer 1 is a MiniMaxM3VLSparseCacheLayer.* Read the prompt"),
    ("unlimited_ocr", {}, "layer 0 is a UnlimitedOcrDynamicReferenceSlidingW"),
    ("inkling_text", {}, "layer 0 is a LinearAttentionAndSlidingWindowAttentionL"),
    ("recurrent_gemma", {}, "model_type 'recurrent_gemma' is not known"),
    ("xlstm", {}, "model_type 'xlstm' is not known"),
    ("blt", {}, "no DynamicCache for model type 'blt'"),
])
def test_a_model_whose_cache_is_not_known_is_refused_by_name(name, options, words):
    from transformers import CONFIG_MAPPING
    with pytest.raises(UnsupportedError, match=words):
        plan_cache(CONFIG_MAPPING[name](**options), PROMPT_TOKENS, "bf16")


@pytest.mark.long
def test_every_causal_model_of_transformers_is_planned_or_refused():
    """Default configurations. What is planned from generic fields alone, `export` checks."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    outcomes = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]()
        except Exception:  # a configuration that has no defaults
            continue
        try:
            outcomes[name] = plan_cache(config, PROMPT_TOKENS, "bf16")
        except UnsupportedError as error:
            outcomes[name] = error
    assert len(outcomes) > 150
    assert isinstance(outcomes["llama"], CacheSpec) and isinstance(outcomes["hy_v3"], CacheSpec)
    assert isinstance(outcomes["rwkv"], UnsupportedError)


@pytest.mark.parametrize("name, spoil, words", [
    ("llama", lambda layer: setattr(layer, "scales", torch.ones(4)), "holds scales"),
    ("qwen3_next", lambda layer: layer.conv_states.update({1: torch.ones(1, 8, 4)}),
     r"holds conv_states\[1\]"),
    ("deepseek_v32", lambda layer: setattr(layer, "indexer_position_ids", torch.ones(1, 1, 37)),
     "holds indexer_position_ids"),
    ("lfm2", lambda layer: layer.activate_past_recording(), "records its past"),
])
def test_a_layer_that_holds_more_than_can_be_sent_is_refused(name, spoil, words):
    model = make_model(name)
    _, cache = forward(model, make_prompt())
    spoil(cache.layers[0])
    with pytest.raises(UnsupportedError, match=words):
        export(cache, model)


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text"])
def test_layers_that_share_another_layer_s_cache_have_none_of_their_own(name):
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    own = {"gemma4_text": dict(global_head_dim=32),
           "gemma3n_text": dict(laurel_rank=8, altup_num_inputs=2, intermediate_size=[64] * 6,
                                activation_sparsity_pattern=[0.0] * 6)}[name]
    config = CONFIG_MAPPING[name](**COMMON | ATTENTION | dict(
        num_hidden_layers=6, head_dim=16, sliding_window=16, num_kv_shared_layers=2,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=256,
        layer_types=["sliding_attention", "full_attention"] * 3) | own)
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).eval()
    scores, cache = forward(model, make_prompt())
    exported = export(cache, model)
    assert exported.metadata["transformers.layers"] == "WFWF--"
    assert exported.spec == plan_cache(model, PROMPT_TOKENS)
    rebuilt = rebuild(model, copied(exported.tensors), exported.metadata)
    expected, got = (greedy(model, one, int(scores.argmax()), 6)[1] for one in (cache, rebuilt))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "deepseek_v32"])
def test_what_is_left_of_a_cropped_cache_is_exported(name):
    model = make_model(name)
    _, cache = forward(model, make_prompt())
    whole = export(cache, model)
    cache.crop(-5)
    left = export(cache, model)
    assert left.tokens == PROMPT_TOKENS - 5
    assert left.spec == plan_cache(model, left.tokens)
    for group in left.spec.groups:
        for key in [(layer, tensor.name) for layer in group.layers for tensor in group.tensors]:
            axis = left.tensors[key].dim() - 2
            assert torch.equal(left.tensors[key],
                               whole.tensors[key].narrow(axis, 0, left.tokens))


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
