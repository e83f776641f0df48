"""``python -m bench.kv_sample``: the sample that the codec benchmarks measure; prints its folder.

    python -m bench.kv_sample --gguf FILE        # of another model: its keys and values only

Keys and values are real: what SmolLM2-135M-Instruct caches when it reads a text that comes with
Python. States are synthetic: Gated DeltaNet, KDA and Mamba-2 with random weights, as their
published code initialises them, driven by SmolLM2's hidden states. Needs what the demo needs.
"""

from __future__ import annotations

import argparse
import hashlib
import pydoc_data.topics
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench import recurrences
from bench.build import ROOT
from bench.recurrences import convolved, projected, time_step_bias
from kvwire.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["KEYS", "LAYERS", "VALUES", "main", "make", "make_of"]

KEYS, VALUES = "smollm2_k_bf16.npy", "smollm2_v_bf16.npy"
LAYERS = (2, 8, 15, 22, 28)
_TOKENS = 1024  # of other models
_STATE_LAYER = 6  # of which the hidden states drive the recurrences
_TOPICS = ("integers", "execmodel", "exceptions", "import", "customization")
_FOLDER = ROOT / ".build" / "kv-sample"

_HEADS, _HEAD_DIM = 8, 128               # of Gated DeltaNet and KDA
_MAMBA_HEADS, _MAMBA_HEAD_DIM, _MAMBA_STATE_DIM = 16, 64, 128
_SEED = 0


def make() -> Path:
    """Return the folder of the sample; makes it unless this version of it is there.

    It holds KEYS and VALUES, uint16 [layer of LAYERS, token, head, dim] with the bits of bf16, the
    same in fp16 (rounded from fp32, as bf16 is), and three files state_synthetic_NAME_fp32.npy,
    float32 [head, key or channel, value or state].

    Raises:
        UsageError: a package of the demo is missing.
    """
    def tensors() -> dict[str, np.ndarray]:
        from kvwire.demo import require_packages
        from kvwire.demo.models import TRAINED
        require_packages([TRAINED])
        return _tensors(_text())

    return _kept("", tensors)


def make_of(gguf: Path) -> Path:
    """Return the folder of another model's keys and values, of every layer; makes it unless it is
    there. `NAME_k_bf16.npy` and `NAME_v_bf16.npy` are as KEYS and VALUES.

    Raises:
        UsageError: a package of the demo is missing, or transformers cannot load the file.
    """
    if not gguf.is_file():
        raise UsageError(f"{gguf}: there is no such file")
    return _kept(f"{gguf.resolve()} {gguf.stat().st_size}", lambda: _tensors_of(gguf))


def _text() -> str:
    return "\n\n".join(pydoc_data.topics.topics[name] for name in _TOPICS)


def _kept(subject: str, tensors: Callable[[], dict[str, np.ndarray]]) -> Path:
    """Return the folder with this version of the subject's tensors."""
    sources = b"".join(Path(file).read_bytes() for file in (__file__, recurrences.__file__))
    version = hashlib.sha256(sources + (_text() + subject).encode()).hexdigest()[:12]
    folder = _FOLDER / version
    if folder.exists():
        return folder
    print("making the sample: half a minute, once", file=sys.stderr)
    _FOLDER.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=_FOLDER))
    try:
        for name, array in tensors().items():
            np.save(unfinished / name, array)
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _tensors(text: str) -> dict[str, np.ndarray]:
    from kvwire.demo import models
    model = models.load(models.TRAINED)
    import torch  # after load, which keeps what torch imports from showing progress
    hidden = []
    hook = model.model.model.layers[_STATE_LAYER].register_forward_pre_hook(
        lambda _, given: hidden.append(given[0][0]))
    cache, _ = models.prefill(model, model.encode(text))
    hook.remove()
    kept = [cache.layers[layer] for layer in LAYERS]
    tensors = {}
    for name, heads_first in ((KEYS, torch.stack([layer.keys[0] for layer in kept])),
                              (VALUES, torch.stack([layer.values[0] for layer in kept]))):
        tokens_first = heads_first.transpose(1, 2).contiguous()
        tensors[name] = _bf16(tokens_first)
        tensors[name.replace("bf16", "fp16")] = tokens_first.to(torch.float16).numpy()
    for name, state in _states(hidden[0]).items():
        tensors[f"state_synthetic_{name}_fp32.npy"] = state.numpy()
    return tensors


def _tensors_of(gguf: Path) -> dict[str, np.ndarray]:
    from kvwire.demo import models, require_packages
    require_packages([])
    try:
        model = models.load_gguf(gguf)
    except Exception as error:  # of a file that is none it raises anything
        raise UsageError(f"transformers cannot load {gguf}: {error}") from None
    import torch
    from transformers import DynamicCache
    cache = DynamicCache()  # without the model's windows: every layer holds every token
    ids = torch.tensor([model.encode(_text())[:_TOKENS]])
    with torch.no_grad():
        logits = model.model(input_ids=ids, past_key_values=cache, use_cache=True,
                             logits_to_keep=_TOKENS // 4).logits[0, :-1]
    scored = ids[0, -len(logits):]
    loss = torch.nn.functional.cross_entropy(logits, scored)
    print(f"{model.name}, {len(cache.layers)} layers, perplexity {loss.exp():.1f}",
          file=sys.stderr)  # a model that was read wrong has thousands
    return {f"{model.name}_{letter}_bf16.npy": _bf16(torch.stack(
        [getattr(layer, held)[0].transpose(0, 1) for layer in cache.layers]))
        for letter, held in (("k", "keys"), ("v", "values"))}


def _bf16(tensor: torch.Tensor) -> np.ndarray:
    """Return the bits."""
    import torch
    return tensor.contiguous().to(torch.bfloat16).view(torch.uint16).numpy()


def _states(hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return each recurrence's state after all of `hidden` [token, channel]."""
    import torch
    from torch.nn.functional import normalize, softplus
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        x = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        width, shape = _HEADS * _HEAD_DIM, (len(x), _HEADS, _HEAD_DIM)
        keys = normalize(convolved(projected(x, width)).view(shape), dim=-1)
        values = convolved(projected(x, width)).view(shape)
        writes = torch.sigmoid(projected(x, _HEADS))
        per_head = -(torch.empty(_HEADS).uniform_(0.01, 16)
                     * softplus(projected(x, _HEADS) + time_step_bias(_HEADS)))
        low_rank = projected(projected(x, _HEAD_DIM // 2), width) + time_step_bias(width)
        per_key = -(torch.empty(_HEADS, 1).uniform_(1, 16) * softplus(low_rank).view(shape))
        steps = softplus(projected(x, _MAMBA_HEADS) + time_step_bias(_MAMBA_HEADS))
        channels = convolved(projected(x, _MAMBA_HEADS * _MAMBA_HEAD_DIM))
        return {
            "gdn": _delta_rule(keys, values, writes, per_head[:, :, None].exp()),
            "kda": _delta_rule(keys, values, writes, per_key.exp()),
            "mamba2": _mamba2(
                channels.view(len(x), _MAMBA_HEADS, _MAMBA_HEAD_DIM) * steps[:, :, None],
                convolved(projected(x, _MAMBA_STATE_DIM)),
                (-steps * torch.empty(_MAMBA_HEADS).uniform_(1, 16)).exp()),
        }


def _delta_rule(keys: torch.Tensor, values: torch.Tensor, writes: torch.Tensor,
                decays: torch.Tensor) -> torch.Tensor:
    """Gated DeltaNet, or KDA where `decays` differ by key.

    keys [token, head, key], values [token, head, value], writes [token, head],
    decays [token, head, key or 1]; returns [head, key, value].
    """
    import torch
    state = torch.zeros(keys.shape[1], keys.shape[2], values.shape[2])
    for key, value, write, decay in zip(keys, values, writes, decays):
        state *= decay[:, :, None]
        known = torch.einsum("hkv,hk->hv", state, key)
        state += key[:, :, None] * ((value - known) * write[:, None])[:, None, :]
    return state


def _mamba2(inputs: torch.Tensor, into: torch.Tensor, decays: torch.Tensor) -> torch.Tensor:
    """inputs [token, head, dim], into [token, state], decays [token, head]; returns
    [head, dim, state]."""
    import torch
    state = torch.zeros(inputs.shape[1], inputs.shape[2], into.shape[1])
    for row, column, decay in zip(inputs, into, decays):
        state = state * decay[:, None, None] + row[:, :, None] * column
    return state


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.kv_sample",
                                     description="Makes the codec benchmarks' sample.")
    parser.add_argument("--gguf", type=Path, metavar="FILE",
                        help="a model that transformers can load: its keys and values instead")
    options = parser.parse_args(given)
    try:
        print(make_of(options.gguf) if options.gguf else make())
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
