"""The connector's half in vLLM's scheduler: which request is handed off, and what each step does.

Of a prompt of N tokens, N - 1 are handed off, whatever the model: a recurrent state can only be
given as it was before the token that the decode side computes first, and a sliding window is kept
for that token, too. So prefill reads N - 1 tokens, and the token that it then draws means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import MambaSpec

from kvwire.connectors.handoff import Pull, Route, decode_route, prefill_route, prompt_digest
from kvwire.connectors.options import Options
from kvwire.connectors.vllm_layout import running_state, table_spec
from kvwire.errors import KvwireError

__all__ = ["Begin", "Chunk", "Receive", "Scheduler", "Step"]

logger = init_logger(__name__)

BlockIds = list[list[int]]


@dataclass(frozen=True)
class Begin:
    """A request will be handed off, once it is computed."""

    route: Route
    tokens: int
    prompt: bytes


@dataclass(frozen=True)
class Chunk:
    """What a step computes of a request.

    Attributes:
        begin: with its first chunk.
        new_blocks: by block table, those that it did not have before; of states none.
        stop: tokens that are computed when the step ends.
        states: the blocks of its states, by table, with its last chunk.
    """

    begin: Begin | None
    new_blocks: BlockIds
    stop: int
    states: BlockIds | None


@dataclass(frozen=True)
class Receive:
    """Blocks that are to be filled; `problem` in place of a route that makes no sense."""

    route: Route | None
    tokens: tuple[int, int]
    block_ids: BlockIds
    prompt: bytes
    problem: str = ""


@dataclass
class Step(KVConnectorMetadata):
    """What the workers do in one step; by request id.

    Attributes:
        chunks, receives: see there.
        preempted: requests that lose their blocks before this step.
        ended: prefill requests that are finished; False: aborted before their end.
        dropped: decode requests that are gone.
    """

    chunks: dict[str, Chunk] = field(default_factory=dict)
    receives: dict[str, Receive] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)
    ended: dict[str, bool] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


@dataclass
class _Prefill:
    """A request that this engine computes for another."""

    begin: Begin
    begun: bool = False
    complete: bool = False
    known: list[int] = field(default_factory=list)  # blocks that the workers know, by table


class Scheduler:
    """Decides; the workers do it.

    Args:
        kv_cache_config: vLLM's KVCacheConfig.
        ranks: of tensor parallelism.
        prefills, decodes: which sides this engine has (kv_role).
    """

    def __init__(self, kv_cache_config: object, options: Options, ranks: int, *,
                 prefills: bool, decodes: bool):
        self._sides = {"do_remote_decode": prefills, "do_remote_prefill": decodes}
        self._config, self._options, self._ranks = kv_cache_config, options, ranks
        self._tables = kv_cache_config.transfer_groups
        self._prefills: dict[str, _Prefill] = {}
        self._receiving: set[str] = set()
        self._step = Step()

    def on_new_request(self, request: object) -> None:
        """Prepare a request that is to be handed off: it ends one token early."""
        for wish, able in self._sides.items():
            if not able and self._wishes(request, wish):
                logger.error("Request %s has %s, which is not this engine's kv_role: it is "
                             "computed here", request.request_id, wish)
        params = request.kv_transfer_params
        if not self._may(request, "do_remote_decode") or request.num_prompt_tokens < 2:
            return
        if request.prompt_token_ids is None or request.request_id in self._prefills:
            return
        try:
            route = prefill_route(params, self._ranks)
        except KvwireError as error:
            logger.error("Request %s is not handed off: %s", request.request_id, error)
            return
        del request.prompt_token_ids[-1:]
        del request._all_token_ids[-1:]
        request.num_prompt_tokens -= 1
        request.max_tokens = 1
        self._prefills[request.request_id] = _Prefill(Begin(
            route, request.num_prompt_tokens, _prompt(request, request.num_prompt_tokens)))

    def matched_tokens(self, request: object, computed_tokens: int) -> tuple[int, bool]:
        """Return how many tokens after those the other engine has, and that they come later."""
        if not self._may(request, "do_remote_prefill"):
            return 0, False
        missing = request.num_prompt_tokens - 1 - computed_tokens
        return (missing, True) if missing > 0 else (0, False)

    def allocated(self, request: object, block_ids: Sequence[Sequence[int]],
                  external_tokens: int) -> None:
        """Have the blocks filled that the request was given for the tokens that come."""
        if not external_tokens or not self._may(request, "do_remote_prefill"):
            return
        params = request.kv_transfer_params
        params["do_remote_prefill"] = False
        stop = request.num_prompt_tokens - 1
        route, problem = None, ""
        try:
            route = decode_route(params, self._ranks)
        except KvwireError as error:
            problem = str(error.args[0])
        self._receiving.add(request.request_id)
        self._step.receives[request.request_id] = Receive(
            route, (stop - external_tokens, stop), self._table_ids(block_ids),
            _prompt(request, stop), problem)

    def build_step(self, scheduled: object) -> Step:
        """Return what the workers do in the step that was just scheduled."""
        step, self._step = self._step, Step()
        for request_id in scheduled.preempted_req_ids or ():
            made = self._prefills.get(request_id)
            if made is not None and made.begun:
                step.preempted.append(request_id)
                made.known, made.complete = [], False
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        cached = scheduled.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens))
        for request_id, count in scheduled.num_scheduled_tokens.items():
            made = self._prefills.get(request_id)
            if made is not None and not made.complete:
                block_ids = scheduled.kv_connector_block_state.get_block_ids(request_id)
                step.chunks[request_id] = self._chunk(made, block_ids,
                                                      computed[request_id] + count)
        return step

    def received(self, request_ids: set[str]) -> None:
        """The workers have said that these are filled, or failed."""
        self._receiving -= request_ids

    def finished(self, request: object) -> tuple[bool, dict[str, object] | None]:
        """Return whether the request's blocks are still read, and what the router passes on."""
        request_id = request.request_id
        if request_id in self._receiving:
            self._receiving.discard(request_id)
            self._step.dropped.append(request_id)
        made = self._prefills.pop(request_id, None)
        if made is None or not made.begun:
            return False, None
        self._step.ended[request_id] = made.complete
        return True, self._answer(made.begin.route) if made.complete else None

    @staticmethod
    def _wishes(request: object, wish: str) -> bool:
        return bool((request.kv_transfer_params or {}).get(wish))

    def _may(self, request: object, wish: str) -> bool:
        return self._sides[wish] and self._wishes(request, wish)

    def _answer(self, route: Route) -> dict[str, object]:
        """Return the parameters with which a decode engine gets the cache."""
        if not isinstance(route, Pull):
            return {"do_remote_prefill": True, "ticket": route.ticket,
                    "prefill_ranks": self._ranks}
        return {"do_remote_prefill": True, "offer": route.offer,
                "prefill_addresses": self._options.prefill_addresses(self._ranks)}

    def _chunk(self, made: _Prefill, block_ids: Sequence[Sequence[int]], stop: int) -> Chunk:
        ids = self._config.select_transfer_block_ids(block_ids)
        known = made.known or [0] * len(ids)
        paged = [[] if isinstance(table_spec(group), MambaSpec) else list(held)
                 for group, held in zip(self._tables, ids)]
        new_blocks = [held[first:] for held, first in zip(paged, known)]
        made.known = [len(held) for held in paged]
        begin = None if made.begun else made.begin
        made.begun, made.complete = True, stop >= made.begin.tokens
        return Chunk(begin, new_blocks, stop, self._table_ids(block_ids) if made.complete else None)

    def _table_ids(self, block_ids: Sequence[Sequence[int]]) -> BlockIds:
        """Return the block ids by table; of states the running one."""
        ids = self._config.select_transfer_block_ids(block_ids)
        return [running_state(held, table_spec(group))
                if isinstance(table_spec(group), MambaSpec) else list(held)
                for group, held in zip(self._tables, ids)]


def _prompt(request: object, tokens: int) -> bytes:
    """Return a digest of all that a cache of the first tokens depends on."""
    lora = getattr(request.lora_request, "lora_name", "") if request.lora_request else ""
    media = [feature.identifier for feature in getattr(request, "mm_features", None) or ()]
    variant = "\0".join([lora, request.cache_salt or "", *media])
    return prompt_digest(request.prompt_token_ids[:tokens], variant)
