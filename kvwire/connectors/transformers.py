"""Moves the caches of Hugging Face transformers (version 5) from one process to another.

    # where the text will go on; before anything has arrived, from the configuration alone
    spec = plan_cache(model, tokens)
    tensors = allocate(spec, tokens)
    ticket = receiver.expect(cache_memory(spec, tensors, tokens, writable=True))

    # where the prompt is read
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    exported = export(cache, model)
    memory = cache_memory(exported.spec, exported.tensors, exported.tokens)
    sender.send(ticket_id, memory, metadata=exported.metadata).result()

    # where the text goes on; the mask tells generate() where it is
    ticket.result()
    cache = rebuild(model, tensors, ticket.metadata)
    model.generate(first_token, attention_mask=torch.ones(1, tokens + 1), past_key_values=cache)

What travels for each class of cache layer, axes of extent 1 left out:

    DynamicLayer                    keys, values [head, token, dim]
      of an MLA model               latents and rotary keys [token, dim]
    DynamicSlidingWindowLayer       keys, values of the newest window - 1 tokens
    DynamicIndexedLayer             what DynamicLayer has, and indexer_keys [token, dim]
    LinearAttentionLayer            conv_states [channel, kernel], recurrent_states; Lfm2: no states
    LinearAttentionAndFullAttentionLayer
                                    what LinearAttentionLayer and DynamicLayer have
    DeepseekV4HCACache, DeepseekV4CSACache
                                    the window's keys (values are the same tensor); compressed_kv
                                    [entry, dim]; buffer_kv, buffer_gate: tokens of an entry that
                                    is not full yet; CSA: overlap_kv, overlap_gate [token, dim];
                                    once for the compressor and once for CSA's indexer
    MiniMaxCache                    keys, values, or in its linear layers linear_cache
                                    [head, key, value]
    DummyLayer                      nothing

Token counts, marks such as has_previous_state and types are not sent: `rebuild` sets them from
the number of tokens and the tensors. Batch size 1. A class that is not in the table is refused by
name, and so is a layer that holds a tensor beyond these: nothing is guessed, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kvwire.connectors import transformers_layout as places_of
from kvwire.connectors.transformers_layout import Place
from kvwire.errors import RefusedError, UnsupportedError, UsageError
from kvwire.layout import Axis, CacheSpec, DType, LayerGroup, TensorSpec
from kvwire.memory import CacheMemory

if TYPE_CHECKING:
    import torch

__all__ = ["Exported", "allocate", "cache_memory", "describe", "export", "held_tokens",
           "plan_cache", "rebuild"]

Tensors = dict[tuple[int, str], "torch.Tensor"]

_KEY_PREFIX = "transformers."
_DRAFT_ADVICE = "export the cache of the model itself; a draft model's stays where it is"
_ADVICE = {
    "StaticCache": "prefill with DynamicCache(config=model.config)",
    "QuantizedCache": "prefill unquantised; kvwire's codecs shrink the bytes on the wire",
    "EncoderDecoderCache": "encoder-decoder models are not handed off between machines",
    "MtpCache": _DRAFT_ADVICE,
    "DFlashCache": _DRAFT_ADVICE,
    "tuple": "the tuples of transformers 4 are gone; prefill with DynamicCache(config=...)",
    "NoneType": "run the model with use_cache=True",
}
# What a layer makes for itself from its configuration.
_OWN_TENSORS = frozenset(("_sliding_window_tensor",))


@dataclass(frozen=True)
class Exported:
    """A cache in kvwire's terms.

    Attributes:
        spec: what is held; equals `plan_cache` of the same configuration and tokens.
        tensors: by (layer, tensor name), shaped as in `spec`, in C order. They are the cache's own
            memory, except where a sliding window is a cut of a longer tensor (a copy). Keep the
            cache unchanged until the transfer has its receipt: decoding on rewrites states.
        tokens: how many tokens the cache covers; a window holds `held_tokens` of them.
        metadata: the scalars that `rebuild` needs, for the transfer's metadata.
    """

    spec: CacheSpec
    tensors: Tensors
    tokens: int
    metadata: dict[str, int | float | bool | str | bytes]


def held_tokens(group: LayerGroup, tokens: int) -> range:
    """Return the token range that the group's tensors hold after `tokens` tokens."""
    return places_of.held_tokens(group.window_tokens, tokens)


def plan_cache(model_or_config: object, tokens: int, dtype: object = None,
               state_dtype: object = None) -> CacheSpec:
    """Return what transformers will hold after `tokens` tokens, without running the model.

    Args:
        model_or_config: a model or its configuration.
        tokens: at least 1.
        dtype: of the model; by default what the model or the configuration says.
        state_dtype: of recurrent states, by default what transformers' own kernels leave: fp32
            whatever `dtype` is, except for MiniMax-01.

    Raises:
        UnsupportedError: a layer's cache class, or the type of a model with more than plain
            attention, is not known.
    """
    config = places_of.decoder_config(model_or_config)
    dtype = dtype or getattr(model_or_config, "dtype", None) or getattr(config, "dtype", None)
    if dtype is None:
        raise UsageError("the configuration names no dtype; pass dtype, the model's")
    _check_tokens(tokens)
    state = None if state_dtype is None else DType.of(state_dtype)
    layers = places_of.layer_places(config, tokens, DType.of(dtype), state)
    return _spec(config, [[(place, place.spec) for place in places] for places in layers])


def describe(cache: object, model_or_config: object, tokens: int | None = None) -> CacheSpec:
    """Return the spec of a filled cache; see `export`."""
    config = places_of.decoder_config(model_or_config)
    return _spec(config, _found(cache, config, _covered_tokens(cache, config, tokens))[0])


def export(cache: object, model_or_config: object, tokens: int | None = None) -> Exported:
    """Return the cache's spec, tensors and metadata.

    Args:
        cache: filled by a prefill of batch size 1, of the class that the model itself makes.
        model_or_config: the model, or its configuration.
        tokens: how many tokens the cache covers. Needed only where no layer keeps count (pure
            state space models); elsewhere it is checked.

    Raises:
        UnsupportedError: a class that kvwire does not move, named with what to do instead.
        UsageError: empty, batch size above 1, or not the shape that the configuration says.
    """
    config = places_of.decoder_config(model_or_config)
    tokens = _covered_tokens(cache, config, tokens)
    described, tensors = _found(cache, config, tokens)
    return Exported(_spec(config, described), tensors, tokens, _metadata(cache, config, tokens))


def allocate(spec: CacheSpec, tokens: int, device: object = "cpu") -> Tensors:
    """Return uninitialised tensors for `spec`, by (layer, tensor name), to receive into."""
    import torch
    _check_tokens(tokens)
    return {
        (layer, tensor.name): torch.empty(
            _shape(tensor, len(held_tokens(group, tokens))), device=device,
            dtype=_torch_dtype(tensor.dtype))
        for group in spec.groups for layer in group.layers for tensor in group.tensors}


def cache_memory(spec: CacheSpec, tensors: Tensors, tokens: int,
                 writable: bool = False) -> CacheMemory:
    """Return what `Sender` and `Receiver` take: the tensors where they lie, with their tokens.

    Args:
        spec, tensors, tokens: of `export`, or of `plan_cache` and `allocate`; in host memory.
        writable: they are a destination.
    """
    _check_tokens(tokens)
    held = {index: held_tokens(group, tokens) for index, group in enumerate(spec.groups)
            if group.window_tokens}
    return CacheMemory(spec, tensors, tokens=tokens, writable=writable,
                       group_tokens={index: (at.start, at.stop) for index, at in held.items()})


def rebuild(model_or_config: object, tensors: Tensors, metadata: Mapping[str, object]) -> object:
    """Return a cache that the model goes on from: ``past_key_values=`` (Mamba: ``cache_params=``).

    Tell the model where it is, by `position_ids` or by the attention mask of generate(): Bamba
    and MiniMax-01, unsplit too, count from 0 when left to themselves.

    Args:
        model_or_config: the model, or its configuration.
        tensors: all that `export` gave, e.g. those of `allocate`, filled. The cache takes them
            over without a copy and decoding changes states in place: clone them to keep them.
        metadata: what `export` gave; other keys are passed over.

    Raises:
        RefusedError: the other side's cache has other classes than this configuration makes.
        UsageError: a tensor or a metadata key is missing or has another shape.
    """
    config = places_of.decoder_config(model_or_config)
    cache = places_of.empty_cache(config)
    tokens = _agreed_tokens(cache, config, metadata)
    layers = places_of.layer_places(config, tokens, DType.FP32, None)
    for index, places in enumerate(layers):
        found = {place: _given(tensors, index, place, tokens) for place in places}
        for place, tensor in found.items():
            if place.attribute == "linear_cache":
                cache.set_linear_cache(index, tensor)
            elif place.key is None:
                setattr(cache.layers[index], place.attribute, tensor)
            else:
                getattr(cache.layers[index], place.attribute)[place.key] = tensor
        if index < len(cache.layers) and places:
            _mark_filled(cache.layers[index], tokens)
    return cache


def _check_tokens(tokens: object) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise UsageError(f"tokens is {tokens!r}; a cache covers at least 1 token")


def _spec(config: object, layers: list[list[tuple[Place, TensorSpec]]]) -> CacheSpec:
    """Gather the tensors of each layer into groups, and equal groups of several layers into one."""
    groups: dict[tuple, list[int]] = {}
    for index, described in enumerate(layers):
        own: dict[tuple, list[TensorSpec]] = {}
        for place, spec in described:
            own.setdefault((place.kind, place.window_tokens), []).append(spec)
        for (kind, window_tokens), specs in own.items():
            groups.setdefault((kind, window_tokens, tuple(specs)), []).append(index)
    return CacheSpec(config.model_type, tuple(
        LayerGroup(kind, tuple(members), specs, window_tokens)
        for (kind, window_tokens, specs), members in groups.items()))


def _shape(spec: TensorSpec, token_count: int) -> tuple[int, ...]:
    return tuple(token_count if axis.axis == Axis.TOKEN else axis.held for axis in spec.axes)


def _torch_dtype(dtype: DType) -> torch.dtype:
    import torch
    return getattr(torch, {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
                           "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "bytes": "uint8",
                           }.get(dtype.name.lower(), dtype.name.lower()))


def _covered_tokens(cache: object, config: object, tokens: int | None) -> int:
    """Check that the cache is of a class that can be moved, and return its token count."""
    own = type(places_of.empty_cache(config))
    if type(cache) is not own:
        name = _distinct_name(type(cache), own)
        advice = _ADVICE.get(name, "prefill with the cache that the model makes by itself")
        raise UnsupportedError(f"cache class {name} is not one that kvwire moves for model type "
                               f"{config.model_type!r} (that is {own.__name__}); {advice}")
    if cache.offloading:
        raise UnsupportedError(f"the {own.__name__} offloads its layers, so they are not in one "
                               "place; prefill with offloading=False")
    counts = {layer.get_seq_length() for layer in cache.layers
              if hasattr(layer, "get_seq_length") and layer.is_initialized}
    if tokens is not None:
        _check_tokens(tokens)
        counts.add(tokens)
    counts.discard(0)
    if len(counts) > 1:
        raise UsageError(f"the layers and the argument disagree on tokens: {sorted(counts)}")
    if not counts:
        raise UsageError("the cache does not say how many tokens it covers: it is empty, or has "
                         "only states; run the prefill first, and pass tokens")
    return counts.pop()


def _distinct_name(given: type, own: type) -> str:
    """Return a class's name, with its module where a model's own code reuses a known name."""
    same = given.__name__ == own.__name__
    return f"{given.__module__}.{given.__name__}" if same else given.__name__


def _found(cache: object, config: object,
           tokens: int) -> tuple[list[list[tuple[Place, TensorSpec]]], Tensors]:
    """Return each layer's places with the spec of what is there, and the tensors themselves."""
    names = places_of.layer_class_names(cache, config)
    wanted = places_of.layer_class_names(places_of.empty_cache(config), config)
    if names != wanted:
        index = next((i for i, (a, b) in enumerate(zip(names, wanted)) if a != b),
                     min(len(names), len(wanted)))
        have, want = (dict(enumerate(each)).get(index, "missing") for each in (names, wanted))
        raise UsageError(f"cache layer {index} is {have}, but the configuration makes it {want}; "
                         "prefill with DynamicCache(config=model.config)",
                         expected=want, actual=have)
    described, tensors = [], {}
    layers = places_of.layer_places(config, tokens, DType.FP32, None)
    for index, places in enumerate(layers):
        if index < len(cache.layers):
            _check_layer(index, cache.layers[index], places)
        described.append([])
        for place in places:
            tensor = _held(cache, index, place, tokens)
            spec = replace(place.spec, dtype=DType.of(tensor.dtype))
            described[-1].append((place, spec))
            tensors[index, spec.name] = tensor
    return described, tensors


def _check_layer(index: int, layer: object, places: list[Place]) -> None:
    """Refuse a layer that is not filled, or that holds more than its places."""
    where = f"cache layer {index} ({type(layer).__name__})"
    if getattr(layer, "record_past", False):
        raise UnsupportedError(f"{where} records its past for speculative decoding; export a "
                               "cache on which activate_past_recording was not called")
    if not all(getattr(layer, "has_previous_state", {0: True}).values()):
        raise UsageError(f"{where} has no state yet; run the prefill first")
    found = dict(places_of.layer_tensors(layer))
    moved = {(place.attribute, place.key) for place in places}
    known = {id(found[at]) for at in moved & found.keys()}
    for (attribute, key), tensor in found.items():
        if id(tensor) not in known and attribute not in _OWN_TENSORS:
            name = attribute if key is None else f"{attribute}[{key!r}]"
            raise UnsupportedError(f"{where} holds {name}, which kvwire does not move; read the "
                                   "prompt where the text goes on")


def _held(cache: object, index: int, place: Place, tokens: int) -> torch.Tensor:
    """Return the tensor at a place, without its unit axes, after checking its shape."""
    if place.attribute == "linear_cache":
        tensor = dict(enumerate(cache.linear_cache)).get(index)
    else:
        tensor = getattr(cache.layers[index], place.attribute)
    tensor = tensor if place.key is None else tensor[place.key]
    where = f"layer {index}, {place.spec.name}"
    if not hasattr(tensor, "shape"):
        raise UsageError(f"{where}: the cache holds nothing there; run the prefill first")
    count = len(places_of.held_tokens(place.window_tokens, tokens))
    wanted = (1,) * place.unit_axes + _shape(place.spec, count)
    actual = tuple(tensor.shape)
    if actual[1:] == wanted[1:] and actual[0] > 1:
        raise UnsupportedError(f"{where}: batch size is {actual[0]}; kvwire hands off one request "
                               "at a time: prefill it alone, without beams")
    if actual != wanted:
        raise UnsupportedError(f"{where}: shape is {actual}, the configuration says {wanted}; this "
                               "model's cache is not laid out as kvwire knows it",
                               expected=wanted, actual=actual)
    return tensor.detach()[(0,) * place.unit_axes].contiguous()


def _metadata(cache: object, config: object, tokens: int) -> dict[str, int | str]:
    names = places_of.layer_class_names(cache, config)
    return {_KEY_PREFIX + "cache": type(cache).__name__, _KEY_PREFIX + "tokens": tokens,
            _KEY_PREFIX + "layers": places_of.layer_letters(names)}


def _agreed_tokens(cache: object, config: object, metadata: Mapping[str, object]) -> int:
    tokens = metadata.get(_KEY_PREFIX + "tokens")
    if tokens is None:
        raise UsageError(f"metadata has no {_KEY_PREFIX}tokens; pass what export() returned")
    _check_tokens(tokens)
    for key, wanted in _metadata(cache, config, tokens).items():
        if metadata.get(key) != wanted:
            raise RefusedError(f"{key} is {metadata.get(key)!r} there, {wanted!r} here; both sides "
                               "need the same configuration and release of transformers",
                               expected=wanted, actual=metadata.get(key))
    return tokens


def _given(tensors: Tensors, index: int, place: Place, tokens: int) -> torch.Tensor:
    """Return the tensor for a place, with its unit axes."""
    where = (index, place.spec.name)
    if where not in tensors:
        raise UsageError(f"tensors lack {where}, layer {index}'s {place.spec.name}")
    count = len(places_of.held_tokens(place.window_tokens, tokens))
    wanted, actual = _shape(place.spec, count), tuple(tensors[where].shape)
    if actual != wanted:
        raise UsageError(f"tensor {where} has shape {actual}, expected {wanted}",
                         expected=wanted, actual=actual)
    return tensors[where][(None,) * place.unit_axes]


def _mark_filled(layer: object, tokens: int) -> None:
    """Set what a layer's own update() would have set; without it the layer takes itself for new."""
    if getattr(layer, "keys", None) is not None:
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        layer.is_initialized = True
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = tokens
        layer._sliding_window_tensor = layer._sliding_window_tensor.to(layer.device)
    if getattr(layer, "indexer_keys", None) is not None:
        layer.indexer_dtype = layer.indexer_keys.dtype
        layer.indexer_device = layer.indexer_keys.device
        layer.is_indexer_initialized = True
    if hasattr(layer, "conv_states"):
        conv, state = layer.conv_states[0], layer.recurrent_states[0]
        layer.dtype, layer.device = conv.dtype, conv.device
        layer.conv_kernel_size[0] = conv.shape[-1]
        layer.is_conv_states_initialized[0] = True
        layer.is_recurrent_states_initialized[0] = state is not None
        layer.has_previous_state[0] = True
    if hasattr(layer, "compressed_kv"):
        _mark_compressed(layer, tokens)


def _mark_compressed(layer: object, tokens: int) -> None:
    """Set what DeepSeek-V4 keeps besides: shared values, counts, and tensors without rows."""
    layer.values = layer.keys
    for name in layer.compressed_kv:
        layer.entry_count[name] = tokens // layer.compress_rate
        known = next(held[name] for held in (layer.compressed_kv, layer.buffer_kv)
                     if held[name] is not None)
        dim = known.shape[-1]
        if layer.compressed_kv[name] is None:
            entry_dim = dim // 2 if hasattr(layer, "overlap_kv") else dim
            layer.compressed_kv[name] = known.new_zeros((1, 0, entry_dim))
        if layer.buffer_kv[name] is None:
            tail_dim = dim * 2 if hasattr(layer, "overlap_kv") else dim
            layer.buffer_kv[name] = known.new_zeros((1, 0, tail_dim))
            layer.buffer_gate[name] = known.new_zeros((1, 0, tail_dim))
