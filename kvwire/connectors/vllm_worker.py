"""The connector's half in each of vLLM's workers: carries out what the scheduler decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm.logger import init_logger

from kvwire.connectors.decode_side import DecodeSide
from kvwire.connectors.handoff import Outcome
from kvwire.connectors.options import Options
from kvwire.connectors.prefill_side import PrefillSide
from kvwire.connectors.vllm_layout import Engine, attention_kernels, cache_pool, layer_number
from kvwire.connectors.vllm_scheduler import Step
from kvwire.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["Worker"]

logger = init_logger(__name__)

_PROMPT = "vllm.prompt"


class Worker:
    """One rank.

    Args:
        vllm_config, kv_cache_config: vLLM's.
        prefills, decodes: which sides this engine has (kv_role).
    """

    def __init__(self, vllm_config: object, kv_cache_config: object, options: Options,
                 engine: Engine, *, prefills: bool, decodes: bool):
        self._vllm_config = vllm_config
        self._config, self._options, self._engine = kv_cache_config, options, engine
        self._sides = prefills, decodes
        # vLLM's second model runner clears new blocks before it says whose they were.
        self._clears_early = getattr(vllm_config, "use_v2_model_runner", False)
        self._prefill: PrefillSide | None = None
        self._decode: DecodeSide | None = None
        self._sent: set[str] = set()   # whose bytes are no longer read
        self._ended: set[str] = set()  # that the scheduler is done with
        self.sent: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[str] = set()

    def register(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the engine's memory, and begin to listen."""
        engine = replace(self._engine, kernels=attention_kernels(self._vllm_config, self._config))
        pool = cache_pool(self._config, tensors, engine)
        options, rank = self._options, self._engine.rank
        options.check_pool(pool)
        if self._sides[0]:
            self._prefill = PrefillSide(pool, connect=options.sender, offers=options.offers(rank),
                                        lease_s=options.lease_s)
        if self._sides[1]:
            receiver = options.receiver(rank)
            self._decode = DecodeSide(pool, receiver, lease_s=options.lease_s)
            logger.info("kvwire: rank %d takes caches at %s", rank, receiver.address)

    def suspend(self, step: Step) -> None:
        """Stop reading the blocks of requests that lose them before this step."""
        for request_id in step.preempted:
            if request_id in self._prefill:
                self._prefill.suspend(request_id, overwritten=self._clears_early)

    def begin(self, step: Step) -> None:
        """Before the forward pass: requests may have new blocks."""
        for request_id, chunk in step.chunks.items():
            if chunk.begin is not None:
                begin = chunk.begin
                self._prefill.begin(request_id, begin.route, (0, begin.tokens),
                                    {_PROMPT: begin.prompt})
            if request_id in self._prefill:
                self._prefill.extend(request_id, chunk.new_blocks)

    def layer_computed(self, step: Step, name: str) -> None:
        """In the forward pass: an attention layer has written its keys and values."""
        for request_id, chunk in step.chunks.items():
            if request_id in self._prefill:
                self._prefill.computed(request_id, chunk.stop, [layer_number(name)])

    def end(self, step: Step) -> None:
        """After the forward pass."""
        for request_id, chunk in step.chunks.items():
            if request_id not in self._prefill:
                continue
            if chunk.states is None:
                self._prefill.computed(request_id, chunk.stop)
            else:
                self._prefill.finish(request_id, chunk.states)
        for request_id, complete in step.ended.items():
            if request_id in self._prefill and not complete:
                self._prefill.drop(request_id)
                self._sent.add(request_id)
            self._ended.add(request_id)

    def receive(self, step: Step) -> None:
        """Bind the blocks that are to be filled; let go of those of requests that are gone."""
        for request_id, receive in step.receives.items():
            if receive.route is None:
                self._decode.fail(request_id, UsageError(receive.problem))
            else:
                self._decode.begin(request_id, receive.route, receive.tokens, receive.block_ids,
                                   {_PROMPT: receive.prompt})
        for request_id in step.dropped:
            if request_id in self._decode:
                self._decode.drop(request_id)

    def poll(self) -> None:
        """Collect what has ended in `sent`, `received` (all) and `failed` (of these)."""
        for outcome in self._prefill.poll() if self._prefill else ():
            _log(outcome, "sent")
            self._sent.add(outcome.request_id)
        self.sent = self._sent & self._ended
        self._sent -= self.sent
        self._ended -= self.sent
        arrived = self._decode.poll() if self._decode else ()
        for outcome in arrived:
            _log(outcome, "received")
        self.received = {outcome.request_id for outcome in arrived}
        self.failed = {outcome.request_id for outcome in arrived if outcome.error is not None}

    def totals(self) -> dict[str, float]:
        """Return the counters since the last call, by side and name."""
        sides = {"prefill": self._prefill, "decode": self._decode}
        return {f"{name}_{counter}": value for name, side in sides.items() if side is not None
                for counter, value in side.totals.take().items()}

    def close(self) -> None:
        """End all hand-offs; nothing is read or written any more."""
        for side in filter(None, (self._prefill, self._decode)):
            side.close()


def _log(outcome: Outcome, verb: str) -> None:
    if outcome.error is not None:
        logger.warning("The cache of request %s was not %s: %s", outcome.request_id, verb,
                       outcome.error)
