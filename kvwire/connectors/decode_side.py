"""`DecodeSide`: receives each request's cache into the blocks that the engine gave it.

    side.begin(request_id, route, tokens, block_ids, metadata)    these blocks are to be filled
    side.drop(request_id)                                         the request is gone
    side.poll()                                                   whose blocks are filled, or failed

Nothing here waits for the network: pulls are asked for in threads of their own. After `drop`, and
when `poll` names a request, nothing is written to its blocks any more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from kvwire.connectors.handoff import Outcome, Pull, Push, Route, Totals, offer_part
from kvwire.connectors.pool import CachePool, source_ranks
from kvwire.errors import KvwireError, RefusedError, TransferCancelled, TransferTimeout, UsageError
from kvwire.receiver import Receiver, Ticket

__all__ = ["DecodeSide"]

_DIAL_THREADS = 4

Metadata = Mapping[str, object]


@dataclass
class _Incoming:
    """One request that waits for its cache."""

    metadata: Metadata
    began: float
    progressed: float
    ticket: Ticket | None = None
    asked: list[Future] = field(default_factory=list)
    verified_bytes: int = 0
    error: KvwireError | None = None


class DecodeSide:
    """The receiving half of a connector.

    Args:
        pool: what this rank of the engine holds.
        receiver: listens, where caches are to be pushed; dials, where they are pulled.
        lease_s: how long a hand-off without progress keeps its blocks.
        now: the clock, in seconds.
    """

    def __init__(self, pool: CachePool, receiver: Receiver, *, lease_s: float = 120.0,
                 now: Callable[[], float] = time.monotonic):
        self._pool, self._receiver = pool, receiver
        self._lease_s, self._now = lease_s, now
        if pool.device is not None:
            receiver.prepare(pool.device)
        self._open: dict[str, _Incoming] = {}
        self._dialling = ThreadPoolExecutor(_DIAL_THREADS, "kvwire-pull")
        self.totals = Totals()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def begin(self, request_id: str, route: Route, tokens: tuple[int, int],
              block_ids: Sequence[Sequence[int]], metadata: Metadata) -> None:
        """Bind a request's blocks: see `CachePool.memory`.

        Args:
            metadata: what the sender must say of the cache, key by key; other keys are its own.
        """
        now = self._now()
        made = self._open[request_id] = _Incoming(metadata, now, now)
        try:
            self._bind(made, route, tokens, block_ids)
        except KvwireError as error:
            made.error = error

    def fail(self, request_id: str, error: KvwireError) -> None:
        """Take on a request that cannot be received; `poll` says so."""
        now = self._now()
        self._open[request_id] = _Incoming({}, now, now, error=error)

    def drop(self, request_id: str) -> None:
        """End a hand-off whose request is gone; `poll` names it as failed."""
        made = self._open[request_id]
        made.error = made.error or TransferCancelled("the request was aborted")
        self._cancel(made)

    def poll(self) -> list[Outcome]:
        """Return what has ended since the last call; it is forgotten then."""
        ended, now = [], self._now()
        for request_id, made in list(self._open.items()):
            if made.error is None and not self._has_ended(made, now):
                continue
            if made.error is not None:
                self._cancel(made)
            del self._open[request_id]
            if made.ticket is not None:
                self.totals.add(made.ticket.progress())
            self.totals.count(made.error, now - made.began)
            ended.append(Outcome(request_id, made.error))
        return ended

    def close(self) -> None:
        """End all hand-offs and links."""
        for made in self._open.values():
            self._cancel(made)
        self._open.clear()
        self._dialling.shutdown(wait=False, cancel_futures=True)
        self._receiver.close()

    def _bind(self, made: _Incoming, route: Route, tokens: tuple[int, int],
              block_ids: Sequence[Sequence[int]]) -> None:
        memory = self._pool.memory(tokens, block_ids)
        count = route.prefill_ranks if isinstance(route, Push) else len(route.addresses)
        here = self._pool.rank, self._pool.count
        ranks = source_ranks(*here, count)
        if isinstance(route, Push) and self._receiver.address is None:
            raise UsageError("the request names a ticket, but this side does not listen: set "
                             "decode_listen, or let the router pull")
        made.ticket = self._receiver.expect(
            memory, source_ranks=ranks, source_rank_count=count, destination_rank=here,
            ticket_id=route.ticket if isinstance(route, Push) else None)
        if isinstance(route, Pull):
            made.asked = [self._dialling.submit(
                self._receiver.pull_into, made.ticket, route.addresses[rank],
                offer_part(route.offer, here[0]), source_rank=rank, destination_rank=here)
                for rank in ranks]

    def _has_ended(self, made: _Incoming, now: float) -> bool:
        """One look at the ticket decides: it may fail at any time."""
        for asked in made.asked:
            if asked.done() and isinstance(asked.exception(), KvwireError):
                made.error = asked.exception()
                return True
        progress = made.ticket.progress()
        if progress.verified_bytes > made.verified_bytes:
            made.verified_bytes, made.progressed = progress.verified_bytes, now
        if progress.ended:
            made.error = made.ticket.exception() or self._difference(made)
        elif now > made.progressed + self._lease_s:
            made.error = TransferTimeout(
                f"nothing came for {self._lease_s} s (lease_s): did the prefill side get the "
                "request?")
        return progress.ended or made.error is not None

    @staticmethod
    def _difference(made: _Incoming) -> KvwireError | None:
        """Return what is wrong when the cache belongs to another prompt."""
        for rank, said in made.ticket.metadata_by_rank().items():
            for key, wanted in made.metadata.items():
                if said.get(key) != wanted:
                    return RefusedError(
                        f"{key} of prefill rank {rank} is {said.get(key)!r}, here it is "
                        f"{wanted!r}: the cache is another request's", expected=wanted,
                        actual=said.get(key))
        return None

    @staticmethod
    def _cancel(made: _Incoming) -> None:
        if made.ticket is not None:
            made.ticket.cancel()
