"""``python -m bench.quality``: what the lossy rungs of FORMAT.md §9.3 cost, on a real model.

Keys and values: SmolLM2-135M-Instruct reads a prefix, the prefix's cache is rounded once as a
hand-off would, and the model goes on reading; compared with the same from the bf16 cache. States:
recurrences driven by SmolLM2's hidden states are rounded once and run on, beside the exact run.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import math
import os
import pydoc_data.topics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import kvwire
from bench import measure
from bench.recurrences import recurrences, relative_errors
from kvwire import Lossy, _native
from kvwire.quantised import QuantisedPart, Rung
from kvwire.tensor_spec import DType

if TYPE_CHECKING:
    import torch

__all__ = ["main"]

CHUNK_BYTES = 256 << 10
FIRST_TOKENS, LAST_TOKENS = 4, 128  # of a prefix, that stay exact
PREFIX_TOKENS, SCORED_TOKENS = 1536, 512
WINDOW_TOKENS = 1024                # of the hidden states that drive recurrences
STATE_LAYER = 6
WARM_UP_TOKENS = 2048               # before a state is handed off
STEPS = (0, 1024, 4096, 16384, 32768)


@dataclass(frozen=True)
class Scheme:
    """How keys and values are rounded; `edges`: the first and last tokens stay exact."""

    name: str
    keys: Rung = Rung.EXACT
    values: Rung = Rung.EXACT
    edges: bool = True
    keys_per_token: bool = False

    @property
    def lossy(self) -> Lossy | None:
        """What a sender is told for it; None: no sender does it."""
        if not self.edges or self.keys_per_token:
            return None
        return Lossy(*(KEY_VALUE_NAMES.get(rung) for rung in (self.keys, self.values)))


KEY_VALUE_NAMES = {Rung.INT8: "int8", Rung.INT6: "int6", Rung.INT4: "int4", Rung.E4M3: "fp8"}
SCHEMES = (
    Scheme("bf16"), Scheme("int8", Rung.INT8, Rung.INT8), Scheme("e4m3", Rung.E4M3, Rung.E4M3),
    Scheme("int6", Rung.INT6, Rung.INT6), Scheme("int8 K, int4 V", Rung.INT8, Rung.INT4),
    Scheme("int6 K, int4 V", Rung.INT6, Rung.INT4), Scheme("int4", Rung.INT4, Rung.INT4),
    Scheme("int4, edges too", Rung.INT4, Rung.INT4, edges=False),
    Scheme("int4, K per token too", Rung.INT4, Rung.INT4, keys_per_token=True),
)


# ---- rounding, by the coder itself

def _through(raw: bytes, part: QuantisedPart) -> tuple[bytes, int]:
    """Return the bytes that a receiver would place, and how many travel."""
    payload = _native.quantised_encode(raw, [(
        part.rung, part.dtype, part.axes, part.row_axes << 4 - len(part.extents),
        part.column_axes << 4 - len(part.extents), [])])
    return _native.quantised_decode(payload, len(raw)), len(payload)


def round_tokens(words: np.ndarray, rung: Rung, per_channel: bool) -> tuple[np.ndarray, int]:
    """Round [token, head, dim] of bf16 words in chunks; return it, and how many bytes travel."""
    tokens, heads, dim = words.shape
    step = max(1, CHUNK_BYTES // words[0].nbytes)
    pieces, travelling = [], 0
    for start in range(0, tokens, step):
        piece = words[start:start + step]
        extents, rows = {
            Rung.E4M3: ((len(piece), heads, dim), 2),
        }.get(rung, ((len(piece), heads * dim), 2) if per_channel else
              ((len(piece) * heads, dim), 1))
        placed, count = _through(piece.tobytes(), QuantisedPart(rung, DType.BF16, extents, rows))
        pieces.append(np.frombuffer(placed, np.uint16).reshape(piece.shape))
        travelling += count
    return np.concatenate(pieces), travelling


def round_prefix(words: np.ndarray, rung: Rung, per_channel: bool,
                 edges: bool) -> tuple[np.ndarray, int]:
    """Round a whole prefix [token, head, dim]; exact tokens count as raw."""
    if rung == Rung.EXACT:
        return words, words.nbytes
    first, last = (FIRST_TOKENS, len(words) - LAST_TOKENS) if edges else (0, len(words))
    middle, travelling = round_tokens(words[first:last], rung, per_channel)
    rounded = np.concatenate([words[:first], middle, words[last:]])
    return rounded, travelling + words.nbytes - middle.nbytes


def round_state(state: torch.Tensor, rung: Rung, rows: int,
                columns: int) -> tuple[torch.Tensor, int]:
    """Round [head, key, value] of fp32; return it, and how many bytes travel."""
    import torch
    array = state.contiguous().numpy()
    placed, travelling = _through(
        array.tobytes(), QuantisedPart(rung, DType.FP32, array.shape, rows, columns))
    rounded = np.frombuffer(placed, np.float32).reshape(array.shape).copy()
    return torch.from_numpy(rounded), travelling


# Axes of the rows' and of the columns' scales, and what a sender calls it.
STATE_RUNGS = {"bf16": (Rung.BF16, 0, 0, "bf16"),
               "int8 rows × columns": (Rung.INT8_GRID, 0b011, 0b101, "int8"),
               "e4m3 per head": (Rung.E4M3, 0b001, 0, "fp8")}


class Wire:
    """A link between two ends here, on which what is rounded is also coded (`codec="tiered"`)."""

    def __enter__(self) -> Wire:
        self._receiver = kvwire.Receiver("127.0.0.1:0", allow_lossy=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._receiver.close()

    def bytes_of(self, group: kvwire.LayerGroup, arrays: dict, tokens: int, lossy: Lossy) -> int:
        """Return how many payload bytes a transfer of `arrays` takes, tables made for it inside."""
        spec = kvwire.CacheSpec("quality", (group,))
        target = {name: np.zeros_like(array) for name, array in arrays.items()}
        with kvwire.Sender(self._receiver.address, codec="tiered") as sender:
            ticket = self._receiver.expect(
                kvwire.CacheMemory(spec, target, tokens=tokens, writable=True))
            sent = sender.send(ticket.id, kvwire.CacheMemory(spec, arrays, tokens=tokens),
                               lossy=lossy).result(120)
            ticket.result(120)
        return sent.wire_bytes

    def kv_bytes(self, layers: list, scheme: Scheme) -> float:
        """As above, of [(keys, values)] of bf16 [token, head, dim]; NaN: no sender does it."""
        if scheme.lossy is None:
            return math.nan
        tokens, heads, dim = layers[0][0].shape
        arrays = {(number, name): words for number, pair in enumerate(layers)
                  for name, words in zip("kv", pair)}
        return self.bytes_of(kvwire.attention(range(len(layers)), kv_heads=heads, head_dim=dim,
                                              dtype="bf16"), arrays, tokens, scheme.lossy)

    def state_bytes(self, state: np.ndarray, rung: str) -> int:
        """As above, of a state [head, key, value] of fp32."""
        heads, keys, values = state.shape
        group = kvwire.recurrent([0], heads=heads, key_dim=keys, value_dim=values, order="KV")
        return self.bytes_of(group, {(0, "state"): state}, 1, Lossy(states=rung))


# ---- keys and values

def _texts() -> tuple[str, str]:
    """English prose and Python, as they come with Python."""
    names = ("integers", "execmodel", "exceptions", "import", "customization", "objects",
             "types", "compound")
    return ("\n\n".join(pydoc_data.topics.topics.get(name, "") for name in names),
            inspect.getsource(difflib))


def _cut(model: object, texts: Sequence[str], tokens: int) -> list[torch.Tensor]:
    """Return non-overlapping pieces [1, token] of the texts, as many as whole ones fit."""
    import torch
    pieces = []
    for text in texts:
        ids = torch.tensor(model.tokens(text))
        pieces += [ids[None, start:start + tokens]
                   for start in range(0, len(ids) - tokens + 1, tokens)]
    return pieces


def _words(tensor: torch.Tensor) -> np.ndarray:
    """Return [1, head, token, dim] as bf16 words [token, head, dim]."""
    import torch
    rounded = tensor[0].transpose(0, 1).contiguous().to(torch.bfloat16)
    return rounded.view(torch.uint16).numpy()


def _tensor(words: np.ndarray) -> torch.Tensor:
    import torch
    values = (words.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(values).transpose(0, 1)[None].contiguous()


def _scores(model: object, layers: list, ids: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities [token, word] of reading on, with this cache before it."""
    import torch
    from transformers import DynamicCache
    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    with torch.no_grad():
        logits = model.model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0]
    return torch.log_softmax(logits.float(), -1)


def _rounded_layers(layers: list, scheme: Scheme) -> tuple[list, int]:
    rounded, travelling = [], 0
    for keys, values in layers:
        keys, key_bytes = round_prefix(keys, scheme.keys, not scheme.keys_per_token, scheme.edges)
        values, value_bytes = round_prefix(values, scheme.values, False, scheme.edges)
        rounded.append((_tensor(keys), _tensor(values)))
        travelling += key_bytes + value_bytes
    return rounded, travelling


def _ratio(raw_bytes: float, wire_bytes: float) -> float | None:
    return None if math.isnan(wire_bytes) else round(raw_bytes / wire_bytes, 3)


def measure_kv(model: object, wire: Wire, schemes: Sequence[Scheme] = SCHEMES,
               segments_max: int = 4) -> list[dict[str, object]]:
    """Return a row for each scheme, over segments of prose and of code in equal number."""
    import torch
    from transformers import DynamicCache
    sums = {scheme.name: dict.fromkeys(("kl", "same", "nll", "tokens", "raw", "coded", "wire"),
                                       0.0) for scheme in schemes}
    pieces = [_cut(model, [text], PREFIX_TOKENS + SCORED_TOKENS)[:max(1, segments_max // 2)]
              for text in _texts()]
    for number, ids in enumerate(piece for of_text in pieces for piece in of_text):
        with torch.no_grad():
            cache = DynamicCache()
            model.model(input_ids=ids[:, :PREFIX_TOKENS], past_key_values=cache, use_cache=True,
                        logits_to_keep=1)
        layers = [(_words(layer.keys), _words(layer.values)) for layer in cache.layers]
        raw_bytes = sum(keys.nbytes + values.nbytes for keys, values in layers)
        exact = _scores(model, _rounded_layers(layers, SCHEMES[0])[0], ids[:, PREFIX_TOKENS:])
        for scheme in schemes:
            measure.progress(f"segment {number + 1}: {scheme.name}")
            rounded, travelling = _rounded_layers(layers, scheme)
            found = _scores(model, rounded, ids[:, PREFIX_TOKENS:])
            total = sums[scheme.name]
            total["kl"] += float((exact.exp() * (exact - found)).sum())
            total["same"] += int((exact.argmax(-1) == found.argmax(-1)).sum())
            following = ids[0, PREFIX_TOKENS + 1:]
            total["nll"] -= float(found[:-1].gather(1, following[:, None]).sum())
            total["tokens"] += len(found)
            total["raw"] += raw_bytes
            total["coded"] += travelling
            total["wire"] += wire.kv_bytes(layers, scheme)
    measure.progress("")
    scored = {name: total["tokens"] * (1 - 1 / SCORED_TOKENS) for name, total in sums.items()}
    return [{"kind": "kv", "rung": name, "ratio": round(total["raw"] / total["coded"], 3),
             "ratio_then_tiers": _ratio(total["raw"], total["wire"]),
             "kl": round(total["kl"] / total["tokens"], 6),
             "same_top": round(total["same"] / total["tokens"], 4),
             "perplexity": round(math.exp(total["nll"] / scored[name]), 4),
             "tokens": int(total["tokens"])} for name, total in sums.items()]


# ---- states

def _hidden(model: object, tokens: int) -> torch.Tensor:
    """Return hidden states [token, channel] before a layer, of text read in windows."""
    import torch
    texts = [*_texts(), "\n\n".join(pydoc_data.topics.topics.values())]
    pieces = _cut(model, texts, WINDOW_TOKENS)[:-(-tokens // WINDOW_TOKENS)]
    layers = model.model.model.layers
    found = []
    hook = layers[STATE_LAYER].register_forward_pre_hook(
        lambda _, given: found.append(given[0][0].clone()))
    kept, model.model.model.layers = layers, layers[:STATE_LAYER + 1]
    try:
        for number, ids in enumerate(pieces):
            measure.progress(f"hidden states: {number * WINDOW_TOKENS} of {tokens} tokens")
            with torch.no_grad():
                model.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
        model.model.model.layers = kept
    hidden = torch.cat(found)[:tokens]
    if len(hidden) < tokens:
        raise measure.Unable(f"Python's texts have {len(hidden)} tokens, {tokens} are wanted")
    return hidden


def measure_states(model: object, wire: Wire, steps: Sequence[int] = STEPS,
                   warm_up: int = WARM_UP_TOKENS) -> list[dict[str, object]]:
    """Return a row for each recurrence, rung and number of further steps."""
    rows, ratios, of_wire = [], {}, {}

    def rounder(name: str) -> Callable:
        def rounded(state: torch.Tensor) -> torch.Tensor:
            *how, sent_as = STATE_RUNGS[name]
            placed, travelling = round_state(state, *how)
            raw_bytes = 4 * state.numel()
            ratios[name] = round(raw_bytes / travelling, 3)
            of_wire[name] = _ratio(raw_bytes, wire.state_bytes(state.contiguous().numpy(), sent_as))
            return placed
        return rounded

    rounders = {name: rounder(name) for name in STATE_RUNGS}
    for recurrence in recurrences(_hidden(model, warm_up + steps[-1])):
        measure.progress(f"{recurrence.name}: {steps[-1]} steps")
        errors = relative_errors(recurrence, rounders, warm_up, list(steps))
        rows += [{"kind": "state", "recurrence": recurrence.name, "rung": rung,
                  "ratio": ratios[rung], "ratio_then_tiers": of_wire[rung],
                  "steps": error["steps"],
                  "state_error": float(f"{error['state']:.3g}"),
                  "read_error": float(f"{error['read']:.3g}")}
                 for rung, of_rung in errors.items() for error in of_rung]
    measure.progress("")
    return rows


# ---- tables

def print_tables(rows: list[dict[str, object]]) -> None:
    if kv := [row for row in rows if row["kind"] == "kv"]:
        print(f"\n{'keys and values':24} {'ratio':>6} {'then tiers':>10} {'KL (nats)':>10} "
              f"{'same top':>9} {'perplexity':>11}")
        for row in kv:
            tiers = row["ratio_then_tiers"] or "–"
            print(f"{row['rung']:24} {row['ratio']:6.2f} {tiers:>10} {row['kl']:10.5f} "
                  f"{100 * row['same_top']:8.2f}% {row['perplexity']:11.3f}")
    states = [row for row in rows if row["kind"] == "state"]
    if not states:
        return
    steps = sorted({row["steps"] for row in states})
    print(f"\n{'relative error of what is read, after':44} ratio then tiers "
          + " ".join(f"{count:>9}" for count in steps))
    for recurrence in dict.fromkeys(row["recurrence"] for row in states):
        for rung in STATE_RUNGS:
            errors = {row["steps"]: row["read_error"] for row in states
                      if (row["recurrence"], row["rung"]) == (recurrence, rung)}
            first = next(row for row in states
                         if (row["recurrence"], row["rung"]) == (recurrence, rung))
            print(f"{recurrence:20} {rung:23} {first['ratio']:5.2f} "
                  f"{first['ratio_then_tiers']:10.2f} "
                  + " ".join(f"{errors[n]:9.1e}" for n in steps))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("kv", "states"), help="measure only these")
    parser.add_argument("--quick", action="store_true", help="less text, fewer steps")
    parser.add_argument("--json", type=Path, help="write machine and rows to this file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from kvwire.demo import require_packages
    from kvwire.demo.models import TRAINED, load
    require_packages([TRAINED])
    model = load(TRAINED)
    rows = []
    with Wire() as wire:
        if options.only != "states":
            rows += measure_kv(model, wire, segments_max=2 if options.quick else 4)
        if options.only != "kv":
            rows += measure_states(model, wire, (0, 256, 1024) if options.quick else STEPS,
                                   512 if options.quick else WARM_UP_TOKENS)
    print_tables(rows)
    if options.json:
        import torch
        import transformers
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        options.json.write_text(json.dumps([{"machine": measure.machine(versions)}, *rows],
                                           indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
