"""Drives the demo's two processes as a serving system's router would, and compares their results.

It moves names and addresses only, and never imports torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from kvwire.demo.models import TRAINED
from kvwire.errors import ErrorCode, error_from_code

__all__ = ["Control", "NEW_TOKENS", "Outcome", "Router", "Worker"]

NEW_TOKENS = 24

_STATUS_SECONDS = 0.1


@dataclass(frozen=True)
class Control:
    """The run with one tensor of the cache zeroed.

    Attributes:
        layer, tensor: which.
        tokens: what came out.
        logits_change: largest difference to a logit of the run with the whole cache.
    """

    layer: int
    tensor: str
    tokens: list[int]
    logits_change: float


@dataclass(frozen=True)
class Outcome:
    """What one model's hand-off came to.

    Attributes:
        cache_bytes: by group kind, as the decode process allocated them before data came.
        verified_bytes: raw bytes with a receipt; wire_bytes: sent over TCP, framing included.
        transfer_seconds: from opening the transfer to the receipt of its last byte.
        first_layer_seconds: until the decode process could use the first layer.
        tensor_count: tensors compared; wrong_tensors: those whose digests differ.
        unsplit, split: the new tokens of both runs; their texts with the token before.
    """

    model: str
    prompt_tokens: int
    prefill_seconds: float
    cache_bytes: dict[str, int]
    verified_bytes: int
    wire_bytes: int
    repaired_chunks: int
    transfer_seconds: float
    first_layer_seconds: float
    tensor_count: int
    wrong_tensors: list[str]
    unsplit: list[int]
    split: list[int]
    unsplit_text: str
    split_text: str
    control: Control

    @property
    def speaks(self) -> bool:
        """True when the model was trained, so that its text means something."""
        return self.model == TRAINED

    @property
    def identical(self) -> bool:
        """True when every byte arrived as it was, and the split changed no token."""
        return (self.unsplit == self.split and not self.wrong_tensors
                and self.verified_bytes == sum(self.cache_bytes.values()))

    @property
    def control_differs(self) -> bool:
        """True when the cache matters: without one tensor of it something else comes out."""
        return self.control.tokens != self.split or self.control.logits_change != 0

    @property
    def good(self) -> bool:
        return self.identical and self.control_differs


class Worker:
    """One of the two processes. Answers one command at a time.

    Attributes:
        progress: what it last said about the command that it is at.
    """

    def __init__(self, role: str):
        self.role = role
        self.progress = ""
        self._process = subprocess.Popen([sys.executable, "-m", "kvwire.demo.worker", role],
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid

    def call(self, command: str, **arguments: object) -> dict:
        """Return the answer; raises the error that the process answers with, under its name."""
        self.progress = ""
        try:
            print(json.dumps({"command": command, **arguments}), file=self._process.stdin,
                  flush=True)
            for line in self._process.stdout:
                answer = json.loads(line)
                if "error" in answer:
                    raise error_from_code(answer["code"],
                                          f"{self.role} process: {answer['error']}")
                if "progress" not in answer:
                    return answer
                self.progress = answer["progress"]
        except BrokenPipeError:
            pass
        raise error_from_code(ErrorCode.PEER_CLOSED, f"the {self.role} process ended by itself "
                              f"(exit code {self._process.wait()}); see its last words above")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Router:
    """Both processes, and the order in which they are asked.

    Args:
        on_status: called about ten times a second while the processes work, with the phase and
            with what they said of it last.
    """

    def __init__(self, lanes: int, codec: str, on_status: Callable[[str, str], object]):
        self._wire = {"lanes": lanes, "codec": codec}
        self._on_status = on_status
        self._threads = ThreadPoolExecutor(2)
        self.prefill, self.decode = Worker("prefill"), Worker("decode")

    def __enter__(self) -> Router:
        return self

    def __exit__(self, *exc: object) -> None:
        for worker in (self.prefill, self.decode):
            worker.kill()
        self._threads.shutdown()

    def run(self, model: str, text: str) -> Outcome:
        """Hand one model's cache over, and go on from it in both processes."""
        loaded, _ = self._both("both load the model",
                               self._ask(self.prefill, "load", model=model, text=text),
                               self._ask(self.decode, "load", model=model))
        tokens = loaded["tokens"]
        bound, = self._both("decode binds memory", self._ask(self.decode, "expect", tokens=tokens))
        read, = self._both(f"prefill reads {tokens:,} tokens", self._ask(self.prefill, "prefill"))
        ticket = {"ticket": bound["ticket"], "address": bound["address"]}
        received, sent = self._both("the cache travels", self._ask(self.decode, "receive"),
                                    self._ask(self.prefill, "push", **ticket, **self._wire))
        unsplit, split = self._both("both continue", *(
            self._ask(self.prefill, "unsplit", count=NEW_TOKENS),
            self._ask(self.decode, "split", count=NEW_TOKENS)))
        # Both processes read the same clock: the monotonic one is the machine's.
        return Outcome(
            model, tokens, read["seconds"], bound["cache_bytes"], sent["verified_bytes"],
            sent["wire_bytes"], sent["repaired_chunks"],
            transfer_seconds=sent["ended"] - sent["began"],
            first_layer_seconds=received["first_layer"] - sent["began"],
            tensor_count=len(read["digests"]),
            wrong_tensors=differences(read["digests"], received["digests"]),
            unsplit=unsplit["tokens"], split=split["tokens"], unsplit_text=unsplit["text"],
            split_text=split["text"], control=Control(**split["control"]))

    def _ask(self, worker: Worker, command: str, **arguments: object) -> Future:
        return self._threads.submit(worker.call, command, **arguments)

    def _both(self, phase: str, *asked: Future) -> list[dict]:
        """Wait for what was asked; the first error ends the wait, and with it the run."""
        pending = set(asked)
        while pending:
            self._on_status(phase, self.prefill.progress or self.decode.progress)
            done, pending = wait(pending, _STATUS_SECONDS, FIRST_EXCEPTION)
            for future in done:
                future.result()
        return [future.result() for future in asked]


def differences(here: dict[str, str], there: dict[str, str]) -> list[str]:
    """Return the names under which the two do not hold the same, or only one holds anything."""
    return sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
