"""`Sender`: a link to the machine that will decode, and the `Transfer`s on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING

from kvwire import _native, limits
from kvwire.codec import Codec
from kvwire.control import Item
from kvwire.errors import UnsupportedError, UsageError
from kvwire.handles import (
    Endpoint, Handle, Progress, id_bytes, io_threads_of, join_address, lane_count, nanoseconds,
    priority_of, ranks_of, seconds, split_address, wait_connected,
)
from kvwire.layout import CacheSpec
from kvwire.link import GBPS, LinkOptions, TransferStats
from kvwire.lossy import Lossy
from kvwire.manifest import Manifest, encode_metadata
from kvwire.memory import CacheMemory
from kvwire.security import Security, check_listening, options_of
from kvwire.wire import CODECS_SPOKEN

if TYPE_CHECKING:
    from kvwire.code_book import CodeBook
    from kvwire.kernels.staging import Staging

__all__ = ["Offer", "Push", "Sender", "Transfer"]

_AUTO = 0xFF  # CODEC_AUTO in csrc/wire/send_link.hpp


class Sender(Endpoint):
    """Sends caches. Dials a receiver, or listens for receivers that dial.

    Args:
        address: "host:port" of a listening `Receiver`. The link is made now, in the background,
            and made again when a later `open` finds it lost.
        listen: "host:port" to listen on instead (port 0: any; see `.address`), for decoders
            that may only dial out.
        lanes: TCP connections of the link, 1 to 64; "auto": 4, and more on a long link, up to 32,
            as the bandwidth measured times the round trip asks for.
        io_threads: 0: one for each core that the process may use, up to 4.
        codec: "raw", "lz4", "tiered" or "auto", the default of transfers. A chunk that does not
            shrink, or a peer that lacks the codec, gets raw bytes. "auto": on each link and for
            each kind of tensor the one that is measured to bring most cache, always lossless;
            `LinkStats.codecs` says which, and why.
        code_book: the tables that "tiered" begins with, and keeps what it makes in; None: its own.
        chunk_bytes: payload of one frame; 256 KiB stays in the cache between checksum and copy.
        connect_timeout_s: to give up on a dialled lane.
        lease_s: how long a link outlives its last lane, and a silent peer is believed. Until then
            lost lanes are dialled again, and transfers carry on; afterwards they fail with
            `PeerClosedError` and their memory is given back. 0: a link ends with its last lane.
        link_options: congestion control, bandwidth limit and mark of the links.
        security: `Tls`, `TlsPsk` or `HmacAdmission`, the same kind as the receiver's; None:
            cleartext, open to all who reach the port.
        allow_unauthenticated: listen beyond loopback without any security.
        staging: how caches in the memory of a GPU are brought to the wire (`kvwire.Staging`); None:
            with the defaults. There codec "lz4" means raw, and "auto" tiered.

    Threads: every method may be called from any thread. No Python runs on the I/O threads.
    """

    def __init__(self, address: str | None = None, *, listen: str | None = None,
                 lanes: int | str = "auto", codec: str = "raw",
                 code_book: CodeBook | None = None, chunk_bytes: int = 256 << 10,
                 connect_timeout_s: float = 10.0,
                 lease_s: float = limits.LEASE_MS / 1000,
                 link_options: LinkOptions = LinkOptions(),
                 io_threads: int = 0, security: Security | None = None,
                 allow_unauthenticated: bool = False, staging: Staging | None = None):
        if (address is None) == (listen is None):
            raise UsageError("give a Sender an address to dial or listen=..., one of the two")
        if chunk_bytes % limits.CHUNK_BYTES_MIN or not (
                limits.CHUNK_BYTES_MIN <= chunk_bytes <= limits.CHUNK_BYTES_MAX):
            raise UsageError(f"chunk_bytes is {chunk_bytes}; it must be a multiple of "
                             f"{limits.CHUNK_BYTES_MIN} up to {limits.CHUNK_BYTES_MAX}")
        if listen is not None:
            check_listening(split_address(listen, "listen")[0], security, allow_unauthenticated)
        self._book = _native.CodeBook() if code_book is None else code_book.lend()
        super().__init__(_native.SenderEndpoint({
            "chunk_bytes": chunk_bytes, "code_book": self._book,
            "io_threads": io_threads_of(io_threads),
            "lease_ns": nanoseconds(lease_s, "lease_s"),
            "connect_timeout_ns": nanoseconds(connect_timeout_s, "connect_timeout_s"),
            **link_options.native(), **options_of(security)}), link_options, staging)
        self._codec = _codec_number(codec)
        self._connect_timeout_s = connect_timeout_s
        self._peer = split_address(address) if address else None
        self._lanes = lane_count(lanes)
        self._link: bytes | None = None
        if listen is not None:
            host, port = split_address(listen, "listen")
            self.address = join_address(host, self._native.listen(host, port))
        else:
            self.address = address
            self._link = self._native.dial(*self._peer, self._lanes)

    def connect(self, timeout_s: float | None = None) -> None:
        """Wait until the link has a lane; raises what went wrong. Not needed before `open`."""
        native, link = self._checked(), self._live_link()
        wait_connected(native, link, self._connect_timeout_s if timeout_s is None else timeout_s)

    def open(self, ticket: str | bytes, memory: CacheMemory, *, carry: CacheSpec | None = None,
             source_rank: tuple[int, int] | int = 0, destination_rank: tuple[int, int] | int = 0,
             codec: str | None = None, metadata: Mapping[str, object] | None = None,
             deadline_s: float | None = None, link: str | None = None,
             priority: int = 0, lossy: Lossy | None = None) -> Transfer:
        """Open a transfer that fills `ticket`; returns at once, layers can be pushed at once.

        Args:
            ticket: the receiver's `Ticket.id`.
            memory: the source; read until each push completes, never written. In host memory, or
                all on one GPU: then its pages are gathered, checked and coded there.
            carry: the part of `memory` that travels, as a spec with the same groups: the
                destination rank's shard when tensor parallelism differs. All of it by default.
            source_rank, destination_rank: (rank, count) in the hand-off.
            codec: overrides the sender's.
            metadata: str -> int, float, bool, str or bytes; known to the receiver with the grant.
            deadline_s: fail with `TransferTimeout` when not verified by then.
            link: of a listening sender, the id of the receiver's link (`Receiver.dial` returned
                it); needed only when there are several.
            priority: transfers of higher priority go first, equal ones in the order of their
                opening; but every 16th chunk of a link is the oldest transfer's, so that none
                waits for ever.
            lossy: what may be rounded on the way, if the receiver allows it; None: nothing.

        Raises: UsageError. What the network or the peer does shows on the transfer.
        """
        native = self._open_checked()
        manifest = self._manifest(id_bytes(ticket, "ticket"), memory, carry, source_rank,
                                  destination_rank, metadata, lossy)
        staged = None if memory.device is None else self._staged_for(memory.device, lossy)
        handle = native.open(self._choose_link(link), manifest.encode(), memory.native,
                             self._codec_number(codec), seconds(deadline_s, "deadline_s"),
                             priority_of(priority), self._roundings(lossy, manifest.spec))
        if staged is None:
            return self._started(Transfer(self, handle, memory, manifest.spec))
        from kvwire.kernels.staged_handles import StagedTransfer
        return self._started(StagedTransfer(self, handle, memory, manifest.spec, *staged))

    def _staged_for(self, name: str, lossy: Lossy | None = None) -> tuple:
        from kvwire.kernels.staged_sender import StagedSender
        if lossy is not None:
            raise UnsupportedError(f"lossy takes host memory, and the arrays lie on {name}")
        return self._staged_on(name, lambda staging, device: StagedSender(staging, device,
                                                                          self._book))

    def offer(self, memory: CacheMemory, *, carry: CacheSpec | None = None,
              source_rank: tuple[int, int] | int = 0, destination_rank: tuple[int, int] | int = 0,
              codec: str | None = None, metadata: Mapping[str, object] | None = None,
              deadline_s: float | None = None, offer_id: str | bytes | None = None,
              priority: int = 0, lossy: Lossy | None = None) -> Offer:
        """Offer source memory for a receiver to pull; arguments as for `open`.

        Layers are pushed onto the offer as they are produced, before or after it is pulled.
        `offer_id` lets several ranks offer the parts of one hand-off under one name.
        """
        native = self._open_checked()
        name = _native.random_id() if offer_id is None else id_bytes(offer_id, "offer_id")
        manifest = self._manifest(bytes(16), memory, carry, source_rank, destination_rank,
                                  metadata, lossy)
        staged = None if memory.device is None else self._staged_for(memory.device, lossy)
        handle = native.offer(name, manifest.encode(), memory.native, self._codec_number(codec),
                              seconds(deadline_s, "deadline_s"), priority_of(priority),
                              self._roundings(lossy, manifest.spec))
        if staged is None:
            return self._started(Offer(self, handle, memory, manifest.spec, name))
        from kvwire.kernels.staged_handles import StagedOffer
        return self._started(StagedOffer(self, handle, memory, manifest.spec, name, *staged))

    def send(self, ticket: str | bytes, memory: CacheMemory, **options: object) -> Transfer:
        """`open`, push every layer in order, `finish`. Options as for `open`."""
        return self.open(ticket, memory, **options).push_all().finish()

    def _manifest(self, ticket: bytes, memory: CacheMemory, carry: CacheSpec | None,
                  source_rank: object, destination_rank: object,
                  metadata: Mapping[str, object] | None, lossy: Lossy | None) -> Manifest:
        if not isinstance(memory, CacheMemory):
            raise UsageError(f"{type(memory).__name__} is no CacheMemory: describe the arrays "
                             "with kvwire.CacheMemory(spec, arrays, ...)")
        spec = carry if carry is not None else memory.spec
        if [(g.kind, g.layers) for g in spec.groups] != [(g.kind, g.layers)
                                                         for g in memory.spec.groups]:
            raise UsageError("carry must have the groups and layers of the memory's spec")
        source, sources = ranks_of(source_rank, "source_rank")
        destination, destinations = ranks_of(destination_rank, "destination_rank")
        return Manifest(ticket, spec, *memory.tokens, source, sources, destination, destinations,
                        codecs=CODECS_SPOKEN | (lossy is not None) << Codec.QUANTISED,
                        metadata=metadata or {})

    @staticmethod
    def _roundings(lossy: Lossy | None, spec: CacheSpec) -> list[tuple[int, int, int, bool]]:
        return [] if lossy is None else lossy.roundings(spec)

    def _started(self, transfer: Transfer) -> Transfer:
        self._lend(transfer._native, transfer.memory)
        return transfer

    def _codec_number(self, codec: str | None) -> int:
        return self._codec if codec is None else _codec_number(codec)

    def _live_link(self) -> bytes:
        if self._peer is None:
            raise UsageError("a listening Sender waits for receivers to dial; it cannot connect")
        if not self._native.link_alive(self._link):
            self._link = self._native.dial(*self._peer, self._lanes)
        return self._link

    def _choose_link(self, link: str | None) -> bytes:
        if link is not None:
            return id_bytes(link, "link")
        if self._peer is not None:
            return self._live_link()
        links = self._native.link_ids()
        if len(links) != 1:
            raise UsageError(f"{len(links)} receivers have dialled this Sender; name the link")
        return links[0]


class Transfer(Handle):
    """One transfer: push layers as prefill produces them, finish, wait for the receipt.

    Awaitable: ``await transfer`` is ``transfer.result()``.
    """

    def __init__(self, sender: Sender, native: object, memory: CacheMemory, spec: CacheSpec):
        super().__init__(sender, native)
        self.memory = memory
        self.spec = spec

    def push(self, layer: int, *, tokens: tuple[int, int] | None = None,
             states: bool = True, priority: int = 0) -> Push:
        """Send one layer, or a token range of it; returns at once.

        The layer's source memory is lent until the returned push completes: do not change it.
        Each byte may be pushed once. States are final only when prefill of the layer has ended;
        pass ``states=False`` while it has not, and ``tokens=(0, 0)`` for the states alone.
        Of the pushes that wait, those of higher `priority` go first, equal ones in order: what
        the decoder needs first may overtake what was ready first.
        """
        if not any(layer in group.layers for group in self.spec.groups):
            raise UsageError(f"layer {layer} is not in the transfer's spec")
        return self.push_items(self.memory.items(layer, tokens, states), priority=priority)

    def push_items(self, items: Sequence[Item], *, priority: int = 0) -> Push:
        """Send any items (token ranges of tensors) as one push. See `CacheMemory.items`."""
        self._endpoint._checked()
        self.memory.check_known(items)
        return Push(self, self._native.push([
            (i.group_index, i.tensor_index, i.layer, i.token_start, i.token_stop) for i in items],
            priority_of(priority)))

    def push_all(self) -> Transfer:
        """Push every layer, in order; returns the transfer."""
        for layer in sorted({layer for group in self.spec.groups for layer in group.layers}):
            self.push(layer)
        return self

    def finish(self, metadata: Mapping[str, object] | None = None) -> Transfer:
        """Say that all has been pushed; returns the transfer.

        Args:
            metadata: what is known only now (the first token ...); as in `Sender.open`.
        """
        self._endpoint._checked()
        metadata = metadata or {}
        self._native.finish(encode_metadata(metadata), len(metadata))
        return self

    def stats(self) -> TransferStats:
        """Say how the transfer uses its link, or has used it."""
        self._endpoint._check_process()
        first_ns, _, ended_ns, overlapped_bytes = self._native.timing()
        now = self.progress()
        seconds_busy = max((ended_ns or time.monotonic_ns()) - first_ns, 1) / 1e9 if first_ns else 1
        goodput_gbps = now.wire_bytes / seconds_busy * GBPS
        capacity_gbps = self._capacity_gbps()
        return TransferStats(
            overlap_ratio=overlapped_bytes / max(now.verified_bytes, 1), goodput_gbps=goodput_gbps,
            effective_gbps=now.verified_bytes / seconds_busy * GBPS,
            link_utilisation=min(goodput_gbps / capacity_gbps, 1.0) if capacity_gbps else None)

    def _capacity_gbps(self) -> float | None:
        name = self._native.link()
        for link in self._endpoint.links():
            if link.id == name.hex():
                return link.stats().capacity_gbps
        return None

    def result(self, timeout_s: float | None = None,
               on_progress: Callable[[Progress], object] | None = None) -> Progress:
        """Wait until the receiver has verified everything.

        Args:
            timeout_s: how long to wait; the transfer itself goes on.
            on_progress: called in this thread, about ten times a second.

        Raises: what failed the transfer; `TransferTimeout` when it has not ended in time.
        """
        self._wait(timeout_s, on_progress, self._native.wait)
        return self._outcome()

    def __await__(self) -> Generator[object, None, Progress]:
        yield from self._endpoint._until(self, self.done).__await__()
        return self._outcome()


class Offer(Transfer):
    """A transfer that starts when a receiver pulls it.

    Attributes:
        offer_id: what the receiver passes to `Receiver.pull`.
    """

    def __init__(self, sender: Sender, native: object, memory: CacheMemory, spec: CacheSpec,
                 name: bytes):
        super().__init__(sender, native, memory, spec)
        self.offer_id = name.hex()


class Push:
    """The completion of one push: it completes exactly once, also when the transfer fails.

    Awaitable. Completion returns the source memory; whether the bytes arrived is for
    `Transfer.result` to say, though a push of a live transfer completes only when they have.
    """

    def __init__(self, transfer: Transfer, number: int):
        self._transfer = transfer
        self._number = number

    def done(self) -> bool:
        """True when the source memory is the caller's again."""
        self._transfer._endpoint._check_process()
        return self._transfer._native.wait_push(self._number, 0.0)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait for the completion; False when it has not come in time."""
        return self._transfer._wait_for(
            timeout_s, lambda s: self._transfer._native.wait_push(self._number, s))

    def __await__(self) -> Generator[object, None, None]:
        return self._transfer._endpoint._until(self._transfer, self.done).__await__()


def _codec_number(codec: object) -> int:
    return _AUTO if codec == "auto" else int(Codec.of(codec))
