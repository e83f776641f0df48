"""`PrefillSide`: sends each request's cache while it is computed, whatever the engine.

    side.begin(request_id, route, tokens, metadata)   the request will be handed off
    side.extend(request_id, block_ids)                it was given blocks
    side.computed(request_id, stop, layers)           tokens before `stop` are final in these layers
    side.finish(request_id, state_blocks)             prefill has ended, states are final
    side.suspend(request_id) / side.drop(request_id)  it lost its blocks / will never be finished
    side.poll()                                       who is done, or failed

Nothing here waits for the network but `suspend` and `drop`, which return when no byte of the
request's blocks is read any more. One thread calls all of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from kvwire.connectors.handoff import Outcome, Push, Route, Totals, offer_part, retries
from kvwire.connectors.pool import CachePool, destination_ranks
from kvwire.control import Item
from kvwire.errors import ErrorCode, KvwireError, TransferTimeout, UnsupportedError, UsageError
from kvwire.layout import CacheSpec
from kvwire.limits import GROUP_COUNT_MAX, SEGMENT_COUNT_MAX
from kvwire.sender import Push as Pushed
from kvwire.sender import Sender, Transfer

__all__ = ["PrefillSide"]

# Layers go together until they make two chunks of the default size: a push costs about 50 us.
_PUSH_BYTES_MIN = 512 << 10
_LAST_PUSHES_MAX = 2 * GROUP_COUNT_MAX

_RETRY_S = 0.2
_SUSPEND_WAIT_S = 5.0

Metadata = Mapping[str, object]


@dataclass
class _Stream:
    """The part of one request that goes to one decode rank."""

    rank: int
    start: int
    transfer: Transfer | None = None
    grown: dict[int, None] = field(default_factory=dict)  # layers of which more is ready, in order
    pushed: dict[int, int] = field(default_factory=dict)
    pushes: list[Pushed] = field(default_factory=list)
    finished: bool = False
    due: float = 0.0
    verified_bytes: int = 0
    ended: bool = False

    def restart(self, start: int, due: float) -> None:
        """Begin again: what was sent has been forgotten by the receiver."""
        self.start, self.due = start, due
        self.transfer, self.finished = None, False
        self.grown.update(self.pushed)
        self.pushed.clear()
        self.pushes.clear()


@dataclass
class _Outgoing:
    """One request that is handed off."""

    route: Route
    tokens: tuple[int, int]
    metadata: Metadata
    block_ids: list[list[int]]
    ready: dict[int, int]
    streams: list[_Stream]
    began: float
    progressed: float
    states: dict = field(default_factory=dict)
    unpushed_bytes: int = 0
    finished: bool = False
    suspended: bool = False
    error: KvwireError | None = None


class PrefillSide:
    """The sending half of a connector.

    Args:
        pool: what this rank of the engine holds.
        connect: address -> `Sender` that dials it; called once per address.
        offers: the listening `Sender` that offers are made of; None: this side only pushes.
        lease_s: how long a hand-off without progress keeps its blocks.
        now: the clock, in seconds.
    """

    def __init__(self, pool: CachePool, *, connect: Callable[[str], Sender],
                 offers: Sender | None = None, lease_s: float = 120.0,
                 now: Callable[[], float] = time.monotonic):
        self._pool, self._connect, self._offers = pool, connect, offers
        self._lease_s, self._now = lease_s, now
        if offers is not None and pool.device is not None:
            offers.prepare(pool.device)
        self._senders: dict[str, Sender] = {}
        self._token_bytes = pool.token_bytes()
        self._open: dict[str, _Outgoing] = {}
        self.totals = Totals()

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._open

    def begin(self, request_id: str, route: Route, tokens: tuple[int, int],
              metadata: Metadata) -> None:
        """Take on a request. `tokens`: positions [start, stop) that will be computed for it."""
        now = self._now()
        made = _Outgoing(route, tokens, metadata, [[] for _ in range(self._pool.table_count)],
                         dict.fromkeys(self._pool.layers, 0), [], now, now)
        self._open[request_id] = made
        try:
            counts = self._pool.rank, self._pool.count, self._destination_count(route)
            made.streams = [_Stream(rank, tokens[0]) for rank in destination_ranks(*counts)]
        except KvwireError as error:
            made.error = error

    def extend(self, request_id: str, block_ids: Sequence[Sequence[int]]) -> None:
        """Add the blocks that a request was given, by block table; after `suspend`, from the
        first token on."""
        made = self._open[request_id]
        made.suspended = False
        for table, added in enumerate(block_ids):
            made.block_ids[table].extend(added)
        try:
            for stream in made.streams:
                if stream.transfer is not None:
                    self._pool.extend(stream.transfer.memory, made.block_ids)
        except KvwireError as error:
            made.error = made.error or error

    def computed(self, request_id: str, stop: int, layers: Iterable[int] | None = None) -> None:
        """Send what has become final: the tokens before `stop` of some layers, or of all.

        Of some: they may wait for further ones, to go together.
        """
        made = self._open[request_id]
        stop = min(stop, made.tokens[1])
        for layer in self._pool.layers if layers is None else layers:
            if stop > made.ready.get(layer, stop):  # another layer's cache may serve this one
                made.unpushed_bytes += (stop - made.ready[layer]) * self._token_bytes[layer]
                made.ready[layer] = stop
                for stream in made.streams:
                    stream.grown[layer] = None
        if not made.suspended and (layers is None or made.unpushed_bytes >= _PUSH_BYTES_MIN):
            self._advance(made)

    def finish(self, request_id: str, block_ids: Sequence[Sequence[int]]) -> None:
        """Send what is left, states too; `block_ids` of a table of states: the state's block."""
        made = self._open[request_id]
        if made.error is None:
            try:
                made.states = made.states or self._pool.staged_states()
                self._pool.stage(block_ids, made.states)
            except KvwireError as error:
                made.error = error
        for stream in made.streams:
            stream.grown.update(dict.fromkeys(self._pool.layers))  # their states
        made.finished = True
        made.progressed = self._now()
        self.computed(request_id, made.tokens[1])

    def suspend(self, request_id: str, *, overwritten: bool = False) -> None:
        """The request is about to lose its blocks, and will get others and be computed again.

        What has arrived stays; what the receiver has not granted yet is sent again later.

        Args:
            overwritten: others may have them already: what was read lately counts for nothing, and
                a hand-off that was granted fails.
        """
        made = self._open[request_id]
        due = self._now() + _SUSPEND_WAIT_S
        for stream in made.streams:
            if stream.transfer is None:
                continue
            if stream.transfer.done():
                stream.transfer.cancel()  # returns when a GPU reads no page for it any more
                continue
            granted = stream.transfer.progress().granted
            if granted and not overwritten and all(
                    push.wait(max(0.0, due - self._now())) for push in stream.pushes):
                stream.transfer.memory.forget_blocks()
                continue
            stream.transfer.cancel()
            if granted:
                made.error = UnsupportedError("the prefill engine preempted the request while its "
                                              "cache was on its way")
            else:
                stream.restart(stream.start, 0.0)
        made.block_ids = [[] for _ in made.block_ids]
        made.ready = dict.fromkeys(made.ready, 0)
        made.suspended, made.finished = True, False

    def drop(self, request_id: str) -> None:
        """Forget a request that will never be finished; its receivers learn of it."""
        self._cancel(self._open.pop(request_id))

    def poll(self) -> list[Outcome]:
        """Return what has ended since the last call; it is forgotten then."""
        ended = []
        for request_id, made in list(self._open.items()):
            self._look_after(made)
            if made.error is not None:
                self._cancel(made)
            if made.error is not None or all(stream.ended for stream in made.streams):
                del self._open[request_id]
                self.totals.count(made.error, self._now() - made.began)
                ended.append(Outcome(request_id, made.error))
        return ended

    def close(self) -> None:
        """End all hand-offs and links."""
        for request_id in list(self._open):
            self.drop(request_id)
        for sender in (*self._senders.values(), *filter(None, [self._offers])):
            sender.close()

    def _destination_count(self, route: Route) -> int:
        return len(route.addresses) if isinstance(route, Push) else route.decode_ranks

    def _look_after(self, made: _Outgoing) -> None:
        """See what has ended, what made progress, and what is to be tried again."""
        now = self._now()
        for stream in made.streams:
            if stream.transfer is None or stream.ended:
                continue
            progress = stream.transfer.progress()
            if progress.verified_bytes > stream.verified_bytes:
                stream.verified_bytes = progress.verified_bytes
                made.progressed = now
            if progress.ended:
                self._ended(made, stream, now)
        if made.error is None and made.finished and now > made.progressed + self._lease_s:
            made.error = TransferTimeout(
                f"the hand-off made no progress for {self._lease_s} s (lease_s): did the decode "
                "side get the request?")
        elif not made.suspended:
            self._advance(made)

    def _ended(self, made: _Outgoing, stream: _Stream, now: float) -> None:
        error = stream.transfer.exception()
        self.totals.add(stream.transfer.progress())
        if error is None:
            stream.ended = True
            self.totals.overlapped_bytes += int(
                stream.transfer.stats().overlap_ratio * stream.transfer.progress().verified_bytes)
        elif (wanted := self._wanted_start(made, stream, error)) is not None:
            stream.restart(wanted, now)
        elif retries(error):
            self.totals.retries += 1
            stream.restart(stream.start, now + _RETRY_S)
        else:
            made.error = made.error or error

    @staticmethod
    def _wanted_start(made: _Outgoing, stream: _Stream, error: KvwireError) -> int | None:
        """Return where to begin when the receiver has the tokens before it already."""
        if error.code != ErrorCode.TOKENS_MISMATCH or not error.remote:
            return None
        start = made.tokens[1] - int(error.expected or 0)
        return start if stream.start < start <= made.tokens[1] else None

    def _advance(self, made: _Outgoing) -> None:
        """Hand over to kvwire what is ready and has not been."""
        made.unpushed_bytes = 0
        if made.error is not None:  # its states may be nothing: an end must not be said
            return
        try:
            for stream in made.streams:
                if not stream.ended and stream.due <= self._now():
                    if stream.transfer is None and any(made.block_ids):
                        self._open_stream(made, stream)
                    if stream.transfer is not None and not stream.transfer.done():
                        self._push(made, stream)
        except KvwireError as error:
            made.error = error

    def _open_stream(self, made: _Outgoing, stream: _Stream) -> None:
        if not made.states:
            made.states = self._pool.staged_states()
        memory = self._pool.source((stream.start, made.tokens[1]), made.block_ids, made.states)
        route = made.route
        options = {"carry": self._carry(route, stream.rank), "metadata": made.metadata,
                   "source_rank": (self._pool.rank, self._pool.count),
                   "destination_rank": (stream.rank, self._destination_count(route))}
        if isinstance(route, Push):
            sender = self._sender(route.addresses[stream.rank])
            stream.transfer = sender.open(route.ticket, memory, **options)
        elif self._offers is None:
            raise UsageError("this side cannot offer: it has no address to listen on, and the "
                             "request names no ticket to push to")
        else:
            stream.transfer = self._offers.offer(
                memory, offer_id=offer_part(route.offer, stream.rank), **options)

    def _carry(self, route: Route, rank: int) -> CacheSpec | None:
        """Return what a decode rank holds of what this one does; None: all of it."""
        count = self._destination_count(route)
        return self._pool.whole.shard(rank, count) if count > self._pool.count else None

    def _sender(self, address: str) -> Sender:
        if address not in self._senders:
            self._senders[address] = self._connect(address)
        return self._senders[address]

    @staticmethod
    def _push(made: _Outgoing, stream: _Stream) -> None:
        room = len(stream.pushes) + _LAST_PUSHES_MAX < SEGMENT_COUNT_MAX
        if stream.finished or not room and not made.finished:
            return
        grown, stream.grown = stream.grown, {}
        items: dict[int, list[Item]] = {}  # of each group: one kind, one codec
        for layer in grown:
            done, stop = stream.pushed.get(layer, stream.start), made.ready[layer]
            stream.pushed[layer] = max(stop, done)
            for item in stream.transfer.memory.items(layer, (done, stop), made.finished):
                items.setdefault(item.group_index, []).append(item)
        for same in items.values():
            stream.pushes.append(stream.transfer.push_items(same))
        if made.finished:
            stream.transfer.finish()
            stream.finished = True

    @staticmethod
    def _cancel(made: _Outgoing) -> None:
        for stream in made.streams:
            if stream.transfer is not None:
                stream.transfer.cancel()
