"""Every cache class of transformers, handed off over sockets: the model goes on as if unsplit.

Random models repeat tokens, so tensors, logits and all that the caches hold are compared too.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvwire import CacheMemory, Receiver, Sender  # noqa: E402
from kvwire.connectors.transformers import (  # noqa: E402
    allocate, cache_memory, export, held_tokens, plan_cache, rebuild,
)
from kvwire.demo.worker import digests  # noqa: E402
from kvwire.errors import SpecMismatchError  # noqa: E402
from kvwire.layout import Axis, CacheSpec, GroupKind  # noqa: E402
from transformers_models import (  # noqa: E402
    MAMBA, MODELS, NEW_TOKENS, PROMPT_TOKENS, copied, differences, forward, given_tokens, greedy,
    make_model, make_prompt,
)

SECONDS_MAX = 60
DISTINCT_MIN = 4  # of 24 tokens; a model that repeats one would go on from anything
PEER = Path(__file__).with_name("transformers_peer.py")

FULL, LATENT, WINDOW = GroupKind.FULL_ATTENTION, GroupKind.LATENT, GroupKind.SLIDING_WINDOW
STATES = {GroupKind.CONVOLUTION, GroupKind.RECURRENT}

# What of each model's cache must travel.
KINDS = {
    "bailing_hybrid": {LATENT} | STATES,
    "bamba": {FULL} | STATES,
    "deepseek_v2": {LATENT},
    "deepseek_v3": {LATENT},
    "deepseek_v32": {LATENT, GroupKind.AUXILIARY},
    "deepseek_v4": {WINDOW, GroupKind.AUXILIARY},
    "falcon_h1": {FULL} | STATES,
    "falcon_mamba": STATES,
    "gemma3": {FULL, WINDOW},
    "gpt_oss": {FULL, WINDOW},
    "granitemoehybrid": {FULL} | STATES,
    "jamba": {FULL} | STATES,
    "kimi_linear": {LATENT} | STATES,
    "lfm2": {FULL, GroupKind.CONVOLUTION},
    "lfm2_moe": {FULL, GroupKind.CONVOLUTION},
    "llama": {FULL},
    "mamba2": STATES,
    "minimax": {FULL, GroupKind.RECURRENT},
    "nemotron_h": {FULL} | STATES,
    "olmo_hybrid": {FULL} | STATES,
    "qwen3_5": {FULL} | STATES,
    "qwen3_next": {FULL} | STATES,
    "zamba2": {FULL} | STATES,
}
CROPPABLE = ["deepseek_v2", "deepseek_v3", "deepseek_v32", "gemma3", "gpt_oss", "lfm2",
             "lfm2_moe", "llama"]


def mostly_long(*short):
    """Return all models, those that are not named here marked as long."""
    return [pytest.param(name, marks=() if name in short else pytest.mark.long)
            for name in MODELS]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ends():
    """Return a sender and the receiver that it has dialled."""
    with Receiver("127.0.0.1:0") as receiver, Sender(receiver.address, lanes=2) as sender:
        yield sender, receiver


@functools.cache
def loaded(name, dtype=torch.float32):
    return make_model(name, dtype)


def prefilled(model):
    """Return (token that follows the prompt, cache, export of it)."""
    scores, cache = forward(model, make_prompt())
    return int(scores.argmax()), cache, export(cache, model, given_tokens(model, PROMPT_TOKENS))


def handed_off(ends, source, metadata, spec):
    """Send `source`, receive it into new memory for `spec`; return its tensors and metadata."""
    sender, receiver = ends
    tensors = allocate(spec, PROMPT_TOKENS)
    for tensor in tensors.values():
        tensor.view(torch.uint8).fill_(0xFF)  # a NaN, in floats
    memory = cache_memory(spec, tensors, PROMPT_TOKENS, writable=True)
    ticket = receiver.expect(memory, deadline_s=SECONDS_MAX)
    sender.send(ticket.id, source, metadata=metadata).result(SECONDS_MAX)
    ticket.result(SECONDS_MAX)
    return tensors, ticket.metadata


def memory_of(exported):
    return cache_memory(exported.spec, exported.tensors, exported.tokens)


@pytest.mark.parametrize("name", MODELS)
def test_decoding_goes_on_exactly_as_without_the_hand_off(ends, name):
    check_hand_off(ends, name, torch.float32)


@pytest.mark.parametrize("name", mostly_long("deepseek_v32", "falcon_h1", "gpt_oss", "kimi_linear",
                                             "minimax", "qwen3_next"))
def test_a_bf16_model_whose_states_are_fp32_or_bf16(ends, name):
    check_hand_off(ends, name, torch.bfloat16)


def check_hand_off(ends, name, dtype):
    model = loaded(name, dtype)
    first, cache, exported = prefilled(model)
    spec = plan_cache(model.config, PROMPT_TOKENS, dtype)
    assert spec == exported.spec and {group.kind for group in spec.groups} == KINDS[name]
    tensors, metadata = handed_off(ends, memory_of(exported), exported.metadata, spec)
    assert digests(tensors) == digests(exported.tensors)

    received = rebuild(model.config, tensors, metadata)
    assert differences(received, cache) == []
    expected, got = (greedy(model, one, first) for one in (cache, received))
    assert got[0] == expected[0] and len(set(got[0])) >= DISTINCT_MIN
    assert torch.equal(got[1], expected[1])
    position = PROMPT_TOKENS + NEW_TOKENS
    expected, got = (forward(model, make_prompt(5), one, position)[0] for one in (cache, received))
    assert torch.equal(got, expected)
    assert differences(received, cache) == []


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_another_process_goes_on_exactly_as_this_one_would(name):
    model = loaded(name)
    first, cache, exported = prefilled(model)
    sent = digests(exported.tensors)
    command = [sys.executable, str(PEER), name, str(PROMPT_TOKENS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as peer:
        try:
            where = json.loads(peer.stdout.readline())
            with Sender(where["address"]) as sender:
                metadata = exported.metadata | {"first_token": first}
                sender.send(where["ticket"], memory_of(exported), metadata=metadata,
                            deadline_s=SECONDS_MAX).result()
            answer = json.loads(peer.stdout.readline())
        finally:
            peer.kill()
    weights = digests({(0, key): weight for key, weight in model.state_dict().items()})
    tokens, logits = greedy(model, cache, first)
    assert answer == {"tensors": sent, "tokens": tokens, "weights": weights,
                      "logits": digests({(0, "logits"): logits})}


def engine_memory(config, exported):
    """Return the export as engines with other layouts hold it.

    Tokens come first, states are [head, value, key], convolutions [column, channel] with a column
    less than the kernel, and latents are one tensor with their rotary keys.
    """
    spec = CacheSpec.from_hf_config(config, "fp32")
    source = {(group.kind, layer, leaf.name): (exported.tensors[layer, tensor.name], tensor, leaf)
              for group, layer, tensor, leaf in exported.spec.leaves()}
    arrays, held = {}, {}
    for index, group in enumerate(spec.groups):
        tokens = held_tokens(group, PROMPT_TOKENS)
        held[index] = (tokens.start, tokens.stop)
        for layer, tensor in ((layer, tensor) for layer in group.layers
                              for tensor in group.tensors):
            shape = [len(tokens) if axis.axis == Axis.TOKEN else axis.held for axis in tensor.axes]
            array = arrays[layer, tensor.name] = torch.full(shape, torch.nan)
            for leaf in tensor.leaves:
                fill(leaf_view(array, tensor, leaf), tensor,
                     *source[group.kind, layer, leaf.name])
    return CacheMemory(spec, arrays, tokens=PROMPT_TOKENS, group_tokens=held)


def leaf_view(array, tensor, leaf):
    """Return a leaf's part of an array."""
    for place, axis in enumerate(tensor.axes):
        if axis.axis == tensor.fused_axis:
            extent = leaf.full[axis.axis]
            array = array.narrow(place, leaf.offset, extent)
    return array


def fill(view, spec, source, source_spec, leaf):
    """Copy a leaf between two orders of axes, aligned at the newest tokens and columns."""
    source = leaf_view(source, source_spec, leaf)
    order = [axis.axis for axis in source_spec.axes]
    source = source.permute([order.index(axis.axis) for axis in spec.axes])
    newest = tuple(slice(-min(a, b), None) for a, b in zip(view.shape, source.shape))
    view[newest] = source[newest]


@pytest.mark.parametrize("name", [name for name in MODELS if name != "deepseek_v4"])
def test_a_cache_from_an_engine_with_other_layouts(ends, name):
    model = loaded(name)
    first, cache, exported = prefilled(model)
    source = engine_memory(model.config, exported)
    spec = plan_cache(model, PROMPT_TOKENS)
    tensors, _ = handed_off(ends, source, {}, spec)
    convolutions = [(layer, tensor.name) for group in spec.groups for tensor in group.tensors
                    if group.kind == GroupKind.CONVOLUTION for layer in group.layers]
    for key in convolutions:  # kvwire zeroes the column that they do not keep
        assert not tensors[key][:, 0].any()
        assert torch.equal(tensors[key][:, 1:], exported.tensors[key][:, 1:])
    assert all(torch.equal(tensors[key], exported.tensors[key])
               for key in tensors if key not in convolutions)
    received = rebuild(model, tensors, exported.metadata)
    expected, got = (greedy(model, one, first) for one in (cache, received))
    assert got[0] == expected[0] and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", mostly_long("bamba", "gpt_oss", "mamba2", "minimax", "qwen3_next"))
def test_generate_goes_on_from_a_rebuilt_cache(name):
    model = loaded(name)
    first, _, exported = prefilled(model)
    expected = model.generate(make_prompt(), max_new_tokens=9, do_sample=False)
    rebuilt = rebuild(model, copied(exported.tensors), exported.metadata)
    key = "cache_params" if name in MAMBA else "past_key_values"
    attention_mask = torch.ones(1, PROMPT_TOKENS + 1, dtype=torch.long)
    got = model.generate(torch.tensor([[first]]), attention_mask=attention_mask, max_new_tokens=8,
                         do_sample=False, **{key: rebuilt})
    assert got[0].tolist() == expected[0, PROMPT_TOKENS:].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_a_rebuilt_cache_can_be_rolled_back_where_the_model_s_own_can(name):
    model = loaded(name)
    _, cache, exported = prefilled(model)
    rebuilt = rebuild(model, copied(exported.tensors), exported.metadata)
    assert rebuilt.is_croppable == cache.is_croppable
    if name not in CROPPABLE:
        return
    for one in (cache, rebuilt):
        one.activate_past_recording()
        forward(model, make_prompt(4), one, PROMPT_TOKENS)
        one.crop(-3)
    assert differences(rebuilt, cache) == []
    expected, got = (greedy(model, one, 7, 3, PROMPT_TOKENS + 1)[1] for one in (cache, rebuilt))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("wrong, leaf", [("dtype", "leaf q"), ("state_dtype", "leaf state")])
def test_a_cache_of_another_type_is_refused_with_the_tensor_named(ends, wrong, leaf):
    model = loaded("qwen3_next")
    _, _, exported = prefilled(model)
    spec = plan_cache(model, PROMPT_TOKENS, **{wrong: "bf16"})
    with pytest.raises(SpecMismatchError, match=f"{leaf}: dtype fp32 at the sender, bf16 here"):
        handed_off(ends, memory_of(exported), exported.metadata, spec)
