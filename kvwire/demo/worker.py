"""One of the demo's two model processes: ``python -m kvwire.demo.worker prefill`` or ``decode``.

It takes commands, and answers them, as lines of JSON on its standard streams. They carry what a
serving system's router carries: names, a ticket, an address. The cache goes over TCP.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from kvwire.connectors import transformers as connector
from kvwire.demo import models
from kvwire.errors import KvwireError
from kvwire.layout import CacheSpec, GroupKind
from kvwire.receiver import Receiver
from kvwire.sender import Sender

if TYPE_CHECKING:
    import torch

__all__ = ["Decode", "Prefill", "digests"]

Tell = Callable[[str], None]

_HANDOFF_SECONDS_MAX = 300.0


class Prefill:
    """Reads the prompt and sends the cache; then goes on by itself, as if nothing were split."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self._sender: Sender | None = None

    def load(self, model: str, text: str) -> dict[str, object]:
        self._cache = self._exported = self._model = None
        self._model = models.load(model)
        self._ids = self._model.encode(text)
        return {"tokens": len(self._ids)}

    def prefill(self) -> dict[str, object]:
        began = time.monotonic()
        self._cache, self._first = models.prefill(
            self._model, self._ids, lambda done, count: self._tell(f"layer {done} of {count}"))
        seconds = time.monotonic() - began
        self._exported = connector.export(self._cache, self._model.model)
        return {"seconds": seconds, "digests": digests(self._exported.tensors)}

    def push(self, ticket: str, address: str, lanes: int, codec: str) -> dict[str, object]:
        exported = self._exported
        if self._sender is None:
            self._sender = Sender(address, lanes=lanes)
            self._sender.connect()
        memory = connector.cache_memory(exported.spec, exported.tensors, exported.tokens)
        bytes_before = self._sender.stats()["bytes_sent"]
        began = time.monotonic()
        transfer = self._sender.open(ticket, memory, codec=codec, metadata=exported.metadata,
                                     deadline_s=_HANDOFF_SECONDS_MAX)
        for layer in _layers(exported.spec):
            transfer.push(layer)
        done = transfer.finish({"first_token": self._first}).result()
        return {"began": began, "ended": time.monotonic(), "verified_bytes": done.verified_bytes,
                "repaired_chunks": done.repaired_chunks,
                "wire_bytes": self._sender.stats()["bytes_sent"] - bytes_before}

    def unsplit(self, count: int) -> dict[str, object]:
        tokens = models.decode_tokens(self._model, self._cache, self._first, count)
        return {"tokens": tokens, "text": self._model.decode([self._first, *tokens])}


class Decode:
    """Knows the model only, until the cache comes; then goes on from it."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self._receiver = Receiver()

    def load(self, model: str) -> dict[str, object]:
        self._tensors = self._memory = self._ticket = self._model = None
        self._model = models.load(model)
        return {}

    def expect(self, tokens: int) -> dict[str, object]:
        spec = connector.plan_cache(self._model.model, tokens)
        self._tensors = connector.allocate(spec, tokens)
        self._memory = connector.cache_memory(spec, self._tensors, tokens, writable=True)
        self._ticket = self._receiver.expect(self._memory)
        return {"ticket": self._ticket.id, "address": self._receiver.address,
                "cache_bytes": _bytes_by_kind(spec, self._tensors)}

    def receive(self) -> dict[str, object]:
        layers = _layers(self._memory.spec)
        ready = []
        for layer in layers:
            self._ticket.wait_layer(layer, _HANDOFF_SECONDS_MAX)
            ready.append(time.monotonic())
            self._tell(f"layer {len(ready)} of {len(layers)}")
        self._ticket.result(_HANDOFF_SECONDS_MAX)
        return {"first_layer": ready[0], "digests": digests(self._tensors)}

    def split(self, count: int) -> dict[str, object]:
        """Go on from the received cache, and once more from one with a tensor zeroed."""
        layer, name = victim = _victim(self._memory.spec)
        spoilt = {key: tensor.clone() for key, tensor in self._tensors.items()}
        spoilt[victim].zero_()
        tokens, logits = self._continue(self._tensors, count)
        control, control_logits = self._continue(spoilt, count)
        change = float((logits - control_logits).abs().max())
        first = self._ticket.metadata["first_token"]
        return {"tokens": tokens, "text": self._model.decode([first, *tokens]),
                "control": {"layer": layer, "tensor": name, "tokens": control,
                            "logits_change": change}}

    def _continue(self, tensors: dict, count: int) -> tuple[list[int], torch.Tensor]:
        """Return `count` tokens and their logits [count, vocabulary]. Changes the tensors."""
        import torch
        metadata = self._ticket.metadata
        cache = connector.rebuild(self._model.model, tensors, metadata)
        steps = list(models.decode_steps(self._model, cache, metadata["first_token"], count))
        return [token for token, _ in steps], torch.stack([logits for _, logits in steps])


def digests(tensors: Mapping) -> dict[str, str]:
    """Return the SHA-256 of each tensor's bytes, by "layer.name"."""
    import torch
    return {f"{layer}.{name}": hashlib.sha256(
        tensor.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for (layer, name), tensor in tensors.items()}


def _layers(spec: CacheSpec) -> list[int]:
    return sorted({layer for group in spec.groups for layer in group.layers})


def _bytes_by_kind(spec: CacheSpec, tensors: Mapping) -> dict[str, int]:
    found: dict[str, int] = {}
    for group, layer, tensor in ((group, layer, tensor) for group in spec.groups
                                 for layer in group.layers for tensor in group.tensors):
        found[group.label] = found.get(group.label, 0) + tensors[layer, tensor.name].nbytes
    return found


def _victim(spec: CacheSpec) -> tuple[int, str]:
    """Choose the tensor that the control run goes without: a state where the model has one."""
    group = next((group for group in spec.groups if group.kind == GroupKind.RECURRENT),
                 spec.groups[-1])
    return group.layers[0], group.tensors[-1].name


def main(role: str) -> None:
    # A library that prints must not do so into the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process

    def say(answer: dict[str, object]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    worker = {"prefill": Prefill, "decode": Decode}[role](lambda words: say({"progress": words}))
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            say(getattr(worker, arguments.pop("command"))(**arguments))
        except KvwireError as error:
            say({"error": error.args[0], "code": int(error.code)})


if __name__ == "__main__":
    main(sys.argv[1])
