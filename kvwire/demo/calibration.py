"""`kvwire calibrate`: code tables from what a model makes of a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kvwire import demo
from kvwire.code_book import Calibrated
from kvwire.connectors import transformers as connector
from kvwire.demo import models
from kvwire.errors import UsageError
from kvwire.layout import Axis, CacheSpec, DType, TensorSpec
from kvwire.memory import CacheMemory

__all__ = ["memory_of", "read", "table", "tokens_first"]


def read(name: str, text: str, *, dtype: str, tokens: int) -> tuple[CacheSpec, dict, int]:
    """Return spec, tensors by (layer, tensor name), and tokens of the cache of a text.

    Args:
        name: of a model of the demo, or what transformers' `from_pretrained` takes; nothing is
            downloaded.
        dtype: "fp32", "bf16" or "fp16", of the model's weights and so of its cache.
        tokens: read at most so many; the demo's models have limits of their own.

    Raises:
        UsageError: a package or the model is missing, or the text is empty.
    """
    is_ours = name in models.model_names()
    demo.require_packages([name] if is_ours else [])
    if is_ours:
        loaded = models.load(name)
        model, ids = loaded.model, loaded.encode(text)
    else:
        model, ids = _load(name, text)
    if not ids:
        raise UsageError("the text has no tokens")
    import torch
    model = model.to({"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids[:tokens]]), use_cache=True)
    exported = connector.export(output.past_key_values, model.config)
    return exported.spec, exported.tensors, exported.tokens


def _load(name: str, text: str) -> tuple[object, list[int]]:
    models.quieten()
    from transformers import AutoModelForCausalLM, AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(name, local_files_only=True, dtype="auto")
    except (OSError, ValueError) as error:
        raise UsageError(f"transformers cannot load {name!r}: {error}; the demo's own models are "
                         f"{', '.join(models.model_names())}") from None
    return model.eval(), tokenizer(text).input_ids


def tokens_first(spec: CacheSpec, tensors: dict) -> tuple[CacheSpec, dict]:
    """Return the same cache with each TOKEN axis outermost, as in NHD pages. Copies nothing."""
    def token_axis(tensor: TensorSpec) -> int:
        return next((index for index, axis in enumerate(tensor.axes)
                     if axis.axis == Axis.TOKEN), 0)

    def turned(tensor: TensorSpec) -> TensorSpec:
        at = token_axis(tensor)
        axes = (tensor.axes[at], *tensor.axes[:at], *tensor.axes[at + 1:])
        return dataclasses.replace(tensor, axes=axes)

    views = {(layer, tensor.name): tensors[layer, tensor.name].movedim(token_axis(tensor), 0)
             for group in spec.groups for layer in group.layers for tensor in group.tensors}
    return spec.map_tensors(lambda group, tensor: turned(tensor)), views


def memory_of(spec: CacheSpec, tensors: dict, tokens: int, order: str, name: str) -> CacheMemory:
    """Return the cache as an engine holds it that has `order` and calls the model `name`."""
    if order == "NHD":
        spec, tensors = tokens_first(spec, tensors)
    spec = dataclasses.replace(spec, model=name or spec.model)
    return connector.cache_memory(spec, tensors, tokens)


def table(made: Sequence[Calibrated]) -> list[str]:
    """Return lines that say what came out, one for each kind of tensor."""
    kinds: dict[tuple, list[Calibrated]] = {}
    for one in made:
        kinds.setdefault((one.kind, one.tensor, one.shape, one.dtype), []).append(one)
    lines = [f"{'tensor':28}{'shape':>16}{'dtype':>7}{'tables':>8}{'bits':>7}{'ratio':>7}"]
    for (kind, tensor, shape, dtype), ones in kinds.items():
        # Every layer is as long as the others: bits add up, ratios do not.
        ratio = len(ones) / sum(1 / one.ratio for one in ones)
        bits = 8 * DType(dtype).item_bytes / ratio
        lines.append(f"{f'{kind.name.lower()} {tensor}':28}{'x'.join(map(str, shape)):>16}"
                     f"{dtype.name.lower():>7}{len(ones):>8}{bits:>7.2f}{ratio:>7.3f}")
    return lines
