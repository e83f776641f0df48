"""`Receiver`: binds destination memory to tickets and places what comes, verified."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING

from kvwire import _native, limits
from kvwire.errors import KvwireError, TransferError, UsageError
from kvwire.handles import (
    Endpoint, Handle, Progress, id_bytes, io_threads_of, join_address, lane_count, nanoseconds,
    ranks_of, seconds, split_address, wait_connected,
)
from kvwire.link import LinkOptions
from kvwire.manifest import decode_metadata
from kvwire.limits import RANK_COUNT_MAX
from kvwire.memory import CacheMemory
from kvwire.security import Security, check_listening, options_of
from kvwire.structure import Cursor

if TYPE_CHECKING:
    from kvwire.kernels.staging import Staging

__all__ = ["Receiver", "Ticket"]


class Receiver(Endpoint):
    """Receives caches. Listens for senders, or dials senders that listen.

    Args:
        listen: "host:port"; port 0 takes any (see `.address`). None: do not listen.
        window_bytes: raw bytes per transfer that may be on their way without a receipt.
        chunk_bytes_max: largest chunk that a sender may use, 64 KiB to 4 MiB.
        transfers_max: open transfers per link.
        patience_s: how long a manifest may wait for its ticket to be bound.
        lease_s: how long a link outlives its last lane, and a silent peer is believed. Until then
            lost lanes are dialled again, and transfers carry on; afterwards they fail with
            `PeerClosedError` and their memory is given back. 0: a link ends with its last lane.
        link_options: congestion control and mark of what this side sends: its answers.
        io_threads: 0: one for each core that the process may use, up to 4.
        security: `Tls`, `TlsPsk` or `HmacAdmission`, the same kind as the sender's; None:
            cleartext, open to all who reach the port.
        allow_unauthenticated: listen beyond loopback without any security.
        allow_lossy: let senders round what their callers told them to (`Lossy`).
        staging: how caches are brought into the memory of a GPU (`kvwire.Staging`); None: with the
            defaults.

    Threads: every method may be called from any thread. No Python runs on the I/O threads.
    """

    def __init__(self, listen: str | None = "127.0.0.1:0", *, window_bytes: int = 256 << 20,
                 chunk_bytes_max: int = 1 << 20, transfers_max: int = 1024,
                 patience_s: float = 30.0, connect_timeout_s: float = 10.0,
                 lease_s: float = limits.LEASE_MS / 1000,
                 link_options: LinkOptions = LinkOptions(), io_threads: int = 0,
                 security: Security | None = None, allow_unauthenticated: bool = False,
                 allow_lossy: bool = False, staging: Staging | None = None):
        if not limits.PAYLOAD_BYTES_MIN <= chunk_bytes_max <= limits.CHUNK_BYTES_MAX:
            raise UsageError(f"chunk_bytes_max is {chunk_bytes_max}; it must be "
                             f"{limits.PAYLOAD_BYTES_MIN} to {limits.CHUNK_BYTES_MAX}")
        if window_bytes < chunk_bytes_max or transfers_max < 1:
            raise UsageError("window_bytes must hold a chunk, and transfers_max at least 1")
        if listen is not None:
            check_listening(split_address(listen, "listen")[0], security, allow_unauthenticated)
        super().__init__(_native.ReceiverEndpoint({
            "window_bytes": window_bytes, "chunk_bytes_max": chunk_bytes_max,
            "io_threads": io_threads_of(io_threads), "allow_lossy": bool(allow_lossy),
            "transfers_max": transfers_max, "patience_ns": nanoseconds(patience_s, "patience_s"),
            "lease_ns": nanoseconds(lease_s, "lease_s"),
            "connect_timeout_ns": nanoseconds(connect_timeout_s, "connect_timeout_s"),
            **link_options.native(), **options_of(security)}), link_options, staging)
        self._connect_timeout_s = connect_timeout_s
        self._dialled: dict[str, bytes] = {}
        self._chunk_bytes_max = chunk_bytes_max
        self.address: str | None = None
        if listen is not None:
            host, port = split_address(listen, "listen")
            self.address = join_address(host, self._native.listen(host, port))

    def expect(self, memory: CacheMemory, *, source_ranks: int | Iterable[int] = 1,
               source_rank_count: int | None = None, destination_rank: tuple[int, int] | int = 0,
               deadline_s: float | None = None, ticket_id: str | bytes | None = None) -> Ticket:
        """Bind `memory` (made with ``writable=True``) as the destination of one hand-off.

        Args:
            memory: all that it covers must arrive; written until the ticket ends. In host memory,
                or all on one GPU: then chunks are decoded, checked and scattered there, after what
                the engine has enqueued by now.
            source_ranks: how many source ranks will send to this one, or which of them.
            source_rank_count: of how many, when only some of them send here.
            destination_rank: (rank, count) of this receiver.
            deadline_s: fail with `TransferTimeout` when not complete by then.
            ticket_id: to name the ticket oneself; it must be unguessable and never reused.

        Returns: a ticket; hand its ``id`` to the sender.
        """
        native = self._open_checked()
        if not isinstance(memory, CacheMemory) or not memory.writable:
            raise UsageError("expect() needs a CacheMemory made with writable=True")
        ranks = list(range(source_ranks)) if isinstance(source_ranks, int) else sorted(source_ranks)
        count = len(ranks) if source_rank_count is None else source_rank_count
        if not ranks or not 0 <= ranks[0] <= ranks[-1] < count <= RANK_COUNT_MAX:
            raise UsageError(f"source_ranks are {ranks} of {count}: at least one, each below the "
                             f"count, which is at most {RANK_COUNT_MAX}")
        rank, destination_count = ranks_of(destination_rank, "destination_rank")
        name = _native.random_id() if ticket_id is None else id_bytes(ticket_id, "ticket_id")
        def bind(zone: object = None) -> object:
            return native.bind(name, memory.spec.model, *memory.tokens, ranks, count, rank,
                               destination_count, memory.native,
                               seconds(deadline_s, "deadline_s"), zone)

        if memory.device is None:
            ticket = Ticket(self, bind(), memory)
        else:
            ticket = self._staged_ticket(name, memory, bind)
        self._lend(ticket._native, memory)
        return ticket

    def _staged_ticket(self, name: bytes, memory: CacheMemory, bind: Callable) -> Ticket:
        from kvwire.kernels.staged_handles import StagedTicket
        staged, device = self._staged_for(memory.device)
        target = staged.add(name, memory, device.engine_event())
        handle = None
        try:
            handle = bind(staged.zone)
        finally:
            staged.bound(target, handle)
        return StagedTicket(self, handle, memory, staged, target)

    def _staged_for(self, name: str) -> tuple:
        from kvwire.kernels.staged_receiver import StagedReceiver
        return self._staged_on(name, lambda staging, device: StagedReceiver(
            staging, device, self._native.landed, self._chunk_bytes_max))

    def dial(self, address: str, *, lanes: int | str = "auto",
             timeout_s: float | None = None) -> str:
        """Make a link to a listening `Sender`; returns its id. Raises what went wrong."""
        native = self._checked()
        link = native.dial(*split_address(address), lane_count(lanes))
        wait_connected(native, link, self._connect_timeout_s if timeout_s is None else timeout_s)
        self._dialled[address] = link
        return link.hex()

    def pull(self, address: str, offer: str | bytes, memory: CacheMemory, *,
             source_rank: tuple[int, int] | int = 0, destination_rank: tuple[int, int] | int = 0,
             deadline_s: float | None = None, lanes: int | str = "auto") -> Ticket:
        """Fetch an offer of the Sender that listens at `address` into `memory`.

        Only the tokens of `memory` travel; states travel whole. Further source ranks: `expect`
        with ``source_ranks``, then `pull_into` for each.
        """
        rank, count = ranks_of(source_rank, "source_rank")
        ticket = self.expect(memory, source_ranks=[rank], source_rank_count=count,
                             destination_rank=destination_rank, deadline_s=deadline_s)
        try:
            self.pull_into(ticket, address, offer, source_rank=rank,
                           destination_rank=destination_rank, lanes=lanes)
        except KvwireError:
            ticket.cancel()
            raise
        return ticket

    def pull_into(self, ticket: Ticket, address: str, offer: str | bytes, *,
                  source_rank: int = 0, destination_rank: tuple[int, int] | int = 0,
                  lanes: int | str = "auto") -> None:
        """Ask one source rank for its part of `ticket`."""
        native = self._checked()
        link = self._dialled.get(address)
        if link is None or link not in native.link_ids():
            link = bytes.fromhex(self.dial(address, lanes=lanes))
        rank, count = ranks_of(destination_rank, "destination_rank")
        native.pull(link, ticket._native.id, id_bytes(offer, "offer"), *ticket.memory.tokens,
                    source_rank, rank, count)


class Ticket(Handle):
    """The destination of one hand-off.

    Awaitable: ``await ticket`` is ``ticket.result()``; ``await ticket.layer(3)`` waits for one.
    """

    def __init__(self, receiver: Receiver, native: object, memory: CacheMemory):
        super().__init__(receiver, native)
        self.memory = memory

    def result(self, timeout_s: float | None = None,
               on_progress: Callable[[Progress], object] | None = None) -> Progress:
        """Wait until everything is in place and verified.

        Raises: what failed the hand-off, with ``error.layers`` = `report()`; `TransferTimeout`
        when it has not ended within `timeout_s` (it goes on).
        """
        self._wait(timeout_s, on_progress, self._native.wait)
        return self._outcome()

    def wait_layer(self, layer: int, timeout_s: float | None = None) -> None:
        """Wait until all parts of one layer are in place and verified. Raises like `result`."""
        self._check_layer(layer)
        self._wait(timeout_s, None, lambda s: self._native.wait_layer(layer, s))
        self._layer_outcome(layer)

    async def layer(self, layer: int) -> None:
        """`wait_layer` for asyncio."""
        self._check_layer(layer)
        await self._endpoint._until(
            self, lambda: layer in self._native.layers_ready() or self.done())
        self._layer_outcome(layer)

    def layers_ready(self) -> set[int]:
        """The layers that are complete and verified."""
        return self._native.layers_ready()

    def report(self) -> dict[int, str]:
        """Say of every layer: "ready", "partly written" or "unwritten"."""
        ready, touched = self._native.layers_ready(), self._native.layers_touched()
        return {layer: "ready" if layer in ready else
                "partly written" if layer in touched else "unwritten"
                for layer in self._layers()}

    @property
    def metadata(self) -> dict[str, object]:
        """What the senders said: the manifest's entries, overridden by those of the end; of
        several source ranks, the higher rank's override."""
        together: dict[str, object] = {}
        for entries in self.metadata_by_rank().values():
            together.update(entries)
        return together

    def metadata_by_rank(self) -> dict[int, dict[str, object]]:
        """`metadata` of each source rank by itself."""
        return {rank: {**decode_metadata(Cursor(first, "MANIFEST"), first_count),
                       **decode_metadata(Cursor(last, "END"), last_count)}
                for rank, first, first_count, last, last_count in self._native.metadata()}

    def exception(self) -> KvwireError | None:
        """The error that ended it, with what became of each layer (`layers`), or None."""
        error = super().exception()
        if error is not None:
            error.layers = self.report()
        return error

    def __await__(self) -> Generator[object, None, Progress]:
        yield from self._endpoint._until(self, self.done).__await__()
        return self._outcome()

    def _layer_outcome(self, layer: int) -> None:
        if layer in self._native.layers_ready():
            return
        raise self.exception() or TransferError(f"layer {layer} never came")

    def _layers(self) -> list[int]:
        return sorted({layer for group in self.memory.spec.groups for layer in group.layers})

    def _check_layer(self, layer: int) -> None:
        if layer not in self._layers():
            raise UsageError(f"layer {layer} is not in the ticket's spec")
