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
    ATTENTION, COMMON, MODELS, PROMPT_TOKENS, copied, forward, given_tokens, greedy, make_model,
    make_prompt,
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
