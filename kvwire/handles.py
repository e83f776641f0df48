"""What a transfer and a ticket have in common: waiting, progress, errors; threads and asyncio."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvwire.errors import (
    ErrorCode, ForkedError, KvwireError, TransferTimeout, UsageError, error_from_code,
)
from kvwire.link import CongestionThresholds, CongestionWatch, Link, LinkOptions, LinkStats
from kvwire.limits import LANE_COUNT_MAX, RANK_COUNT_MAX

if TYPE_CHECKING:
    from kvwire.kernels.staging import Staging

__all__ = ["Endpoint", "Handle", "Progress"]

IO_THREADS_MAX = 64
WAIT_SLICE_S = 0.1
SECONDS_MAX = 1e8  # three years: beyond it clocks overflow


@dataclass(frozen=True)
class Progress:
    """A snapshot of a transfer or ticket.

    Attributes:
        verified_bytes: raw bytes that are in place at the receiver and proved.
        wire_bytes: chunk payload bytes, sent (sender) or accepted (receiver).
        repaired_chunks: chunks that had to travel again.
        granted: the two sides agree and destinations are bound.
        ended: delivered or failed; nothing more will happen.
    """

    verified_bytes: int
    wire_bytes: int
    repaired_chunks: int
    granted: bool
    ended: bool


class Endpoint:
    """Base of `Sender` and `Receiver`: one native endpoint with one I/O thread.

    Keeps every array that is lent to the native side alive until its transfer or ticket has
    ended, so that dropping a handle is safe.
    """

    def __init__(self, native: object, options: LinkOptions, staging: Staging | None):
        self._native = native
        self._options = options
        self._staging = staging
        self._staged: dict[str, tuple] = {}  # by device: its staging thread, and the device
        self._staged_finalizers: list[weakref.finalize] = []
        self._staged_lock = threading.Lock()
        self._links: dict[bytes, Link] = {}
        self._watch: CongestionWatch | None = None
        self._pid = os.getpid()
        self._lent: dict[int, tuple[object, object]] = {}  # native handle, memory
        self._lent_lock = threading.RLock()  # a collection may end handles while it is held
        self._close_lock = threading.Lock()
        self._draining = False
        self._waiters: dict[int, list[tuple[Callable[[], bool], asyncio.Future]]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._finalizer = weakref.finalize(self, _close, native, self._lent, self._pid)

    def close(self, drain_s: float = 0.0) -> None:
        """Abort what is open, close all connections, end the I/O threads. Idempotent.

        When it returns no array that was lent is read or written any more.

        Args:
            drain_s: first refuse new transfers or tickets (`UsageError`), and wait for so long, at
                most, for those that are open to end; pushes onto them go on.
        """
        if drain_s and os.getpid() == self._pid and self._finalizer.alive:
            self._drain_open(nanoseconds(drain_s, "drain_s") / 1e9)
        if os.getpid() == self._pid:  # a forked lock may never open
            if self._watch is not None:
                self._watch.stop()
            with self._close_lock:  # a second caller returns when it is closed, too, not before
                self._finalizer()
            with self._staged_lock:
                staged = list(self._staged.values())
            for thread, _ in staged:
                thread.close()
            for finalizer in self._staged_finalizers:  # what broke a thread may refer to all of us
                finalizer.detach()
        self._on_loop(self._leave_loop)

    def prepare(self, device: str) -> None:
        """Take now what caches on a device need, e.g. "cuda:0", not with the first of them.

        Raises:
            UnsupportedError: the kernels cannot run there.
            LimitError: the device, or page-locked memory, has no room.
        """
        self._checked()
        self._staged_for(device)

    def _staged_on(self, name: str, start: Callable[[Staging, object], object]) -> tuple:
        """Return the staging thread for a device, started when first needed, and the device."""
        from kvwire.kernels.staging import Staging
        with self._staged_lock:
            if name not in self._staged:
                staging = self._staging or Staging()
                device = staging.open(name)
                thread = start(staging, device)
                self._staged[name] = thread, device
                self._staged_finalizers.append(weakref.finalize(self, thread.close))
            return self._staged[name]

    def stats(self) -> dict[str, int | str]:
        """Return counters: connections, links, open_transfers, bytes_sent, bytes_received,
        send_calls, receive_calls (system calls), lanes_lost, lanes_redialled, zero_copy_sends,
        zero_copies_copied (notices that the kernel copied all the same), zero_copies_refused (sends
        that it copied at once). `io`: what the I/O threads wait with, "epoll" or "io_uring";
        `io_note`: why not with what KVWIRE_IO asks for. `zero_copy`: "off", "on" or "always" (what
        KVWIRE_ZEROCOPY=1 forces); `zero_copy_note`: why a lane did without when asked. `staging`:
        each device whose memory it brings to the wire or from it, and whose kernels do so, as in
        "cuda:0 triton"."""
        native = self._checked()
        with self._staged_lock:
            staging = [f"{name} {device.backend}" for name, (_, device) in self._staged.items()]
        return native.stats() | {"staging": ", ".join(staging)}

    def links(self) -> list[Link]:
        """Return the links that have a lane; the same `Link` for the same link each time."""
        names = self._checked().link_ids()
        with self._lent_lock:
            self._links = {name: self._links.get(name) or Link(
                self._native, name, self._options.bandwidth_max_gbps) for name in names}
            return list(self._links.values())

    def on_congestion(self, callback: Callable[[frozenset[str], LinkStats], object] | None,
                      thresholds: CongestionThresholds = CongestionThresholds()) -> None:
        """Have `callback(signs, stats)` called at early signs of congestion on any link.

        Args:
            callback: told which of "loss", "rtt" and "backlog" have begun, in a thread of its
                own that lives as long as it is set; None: no more. It replaces the one before.
            thresholds: what counts as a sign, and how often to look.
        """
        self._checked()
        if self._watch is not None:
            self._watch.stop()
        self._watch = None if callback is None else CongestionWatch(
            weakref.WeakMethod(self.links), callback, thresholds)

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.close()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(f"this {type(self).__name__} belongs to process {self._pid}; its I/O "
                              "thread did not survive the fork: make a new one in the child")

    def _checked(self) -> object:
        self._check_process()
        if not self._finalizer.alive:
            raise UsageError(f"this {type(self).__name__} is closed")
        return self._native

    def _open_checked(self) -> object:
        """As `_checked`, for calls that open something new."""
        native = self._checked()
        if self._draining:
            raise UsageError(f"this {type(self).__name__} is draining, to be closed")
        return native

    def _drain_open(self, drain_s: float) -> None:
        self._draining = True
        due = time.monotonic() + drain_s
        with self._lent_lock:
            open_now = [lent for lent, _ in self._lent.values()]
        for lent in open_now:
            while (left := due - time.monotonic()) > 0 and self._finalizer.alive:
                if lent.wait(min(left, WAIT_SLICE_S)):
                    break

    def _lend(self, native_handle: object, memory: object) -> None:
        with self._lent_lock:
            for number, (lent, _) in list(self._lent.items()):
                if _has_ended(lent):
                    self._lent.pop(number, None)
            self._lent[native_handle.number] = (native_handle, memory)

    def _return(self, native_handle: object) -> None:
        """Let go of what was lent for a transfer or ticket that has ended."""
        with self._lent_lock:
            self._lent.pop(native_handle.number, None)

    async def _until(self, handle: Handle, condition: Callable[[], bool]) -> None:
        """Wait on the running event loop until `condition()`, checked at each news of `handle`."""
        if not self._finalizer.alive:  # another thread may be closing it: all ends in a moment
            self.close()
        if condition():
            return
        native = self._checked()
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            if self._loop is not None and self._waiters and self._loop.is_running():
                raise UsageError(f"another event loop waits on this {type(self).__name__}; one "
                                 "at a time")
            self._detach_loop()
            loop.add_reader(native.event_fd(), _drain, weakref.ref(self))
            self._loop = loop
        future = loop.create_future()
        waiting = (condition, future)
        self._waiters.setdefault(handle._native.number, []).append(waiting)
        try:
            if not condition():
                await future
        finally:
            remaining = [w for w in self._waiters.pop(handle._native.number) if w is not waiting]
            if remaining:
                self._waiters[handle._native.number] = remaining

    def _detach_loop(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._native.event_fd())
        self._loop = None

    def _leave_loop(self) -> None:
        """After close: all has ended, so everybody who waits wakes up."""
        self._detach_loop()
        self._wake(list(self._waiters))

    def _wake_soon(self, number: int) -> None:
        """For threads that know more of a transfer than its native handle says."""
        self._on_loop(self._wake, [number])

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the event loop that waits here call it, if there is one; from any thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            try:
                loop.call_soon_threadsafe(function, *arguments)
            except RuntimeError:  # closed meanwhile: nobody waits there any more
                pass

    def _wake(self, numbers: list[int]) -> None:
        for number in numbers:
            for condition, future in list(self._waiters.get(number, ())):
                if not future.done() and condition():
                    future.set_result(None)


def _drain(endpoint: weakref.ref) -> None:
    if (found := endpoint()) is not None:
        found._wake(found._native.drain_events())


def _close(native: object, lent: dict, pid: int) -> None:
    if os.getpid() == pid:
        native.close()
        lent.clear()  # after close: nobody reads or writes these arrays any more


class Handle:
    """A transfer or a ticket: wait for it in a thread (``result``) or await it."""

    def __init__(self, endpoint: Endpoint, native: object):
        self._endpoint = endpoint
        self._native = native

    @property
    def id(self) -> str:
        """128-bit name, 32 hexadecimal digits."""
        return self._native.id.hex()

    def __del__(self):
        native = getattr(self, "_native", None)
        if native is None or os.getpid() != self._endpoint._pid:  # a forked lock may never open
            return
        if _has_ended(native):
            self._endpoint._return(native)

    def done(self) -> bool:
        """True when delivered or failed."""
        self._endpoint._check_process()
        return _has_ended(self._native)

    def progress(self) -> Progress:
        self._endpoint._check_process()
        return Progress(*self._native.progress()[:5])

    def exception(self) -> KvwireError | None:
        """The error that ended it, or None."""
        self._endpoint._check_process()
        return self._error(self._native.progress()[5])

    def cancel(self) -> None:
        """End it now. When this returns no byte of its memory is read or written any more.

        The other side learns of it (`TransferCancelled`). No effect on what has ended.
        """
        self._endpoint._checked()
        self._native.cancel()

    def _wait(self, timeout_s: float | None, on_progress: Callable[[Progress], object] | None,
              wait: Callable[[float], bool]) -> None:
        report = None if on_progress is None else lambda: on_progress(self.progress())
        if not self._wait_for(timeout_s, wait, report):
            raise error_from_code(ErrorCode.DEADLINE_EXCEEDED,
                                  f"{type(self).__name__.lower()} {self.id} has not ended within "
                                  f"{timeout_s} s; it goes on: wait again or cancel it")

    def _wait_for(self, timeout_s: float | None, wait: Callable[[float], bool],
                  report: Callable[[], object] | None = None) -> bool:
        """Call `wait` until it is True, in slices between which Python handles signals."""
        self._endpoint._check_process()
        timeout_s = seconds(timeout_s, "timeout_s")
        end = math.inf if timeout_s < 0 else time.monotonic() + timeout_s
        while True:
            left = end - time.monotonic()
            finished = wait(max(0.0, min(WAIT_SLICE_S, left)))
            if report is not None:
                report()
            if finished or left <= WAIT_SLICE_S and time.monotonic() >= end:
                return finished

    def _outcome(self) -> Progress:
        """Return the final progress or raise what ended it; the memory is given back."""
        if _has_ended(self._native):
            self._endpoint._return(self._native)
        if (error := self.exception()) is not None:
            raise error
        return self.progress()

    def _error(self, fields: tuple | None) -> KvwireError | None:
        if fields is None:
            return None
        code, message, expected, actual, offset, remote = fields
        return error_from_code(code, message, expected=expected, actual=actual, offset=offset,
                               remote=remote)


def _has_ended(native_handle: object) -> bool:
    return native_handle.progress()[4]


def seconds(value: float | None, what: str) -> float:
    """Take a time span in seconds; None and infinity, for ever, become -1."""
    if value is None or value == math.inf:
        return -1.0
    if not value >= 0:
        raise UsageError(f"{what} is {value}; it must not be negative")
    return min(float(value), SECONDS_MAX)


def split_address(address: str, what: str = "address") -> tuple[str, int]:
    """Split "host:port" or "[v6::address]:port"."""
    host, colon, port = str(address).rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise UsageError(f"{what} is {address!r}; it must be 'host:port'")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(host: str, port: int) -> str:
    """The address that `split_address` takes apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def id_bytes(name: object, what: str) -> bytes:
    """Take an id as 32 hexadecimal digits, 16 bytes, or an object with an ``id``."""
    if isinstance(name, (bytes, bytearray)) and len(name) == 16:
        return bytes(name)
    text = getattr(name, "id", name)
    if isinstance(text, str):
        try:
            decoded = bytes.fromhex(text)
        except ValueError:
            decoded = b""
        if len(decoded) == 16:
            return decoded
    raise UsageError(f"{what} is {name!r}; it must be 32 hexadecimal digits or 16 bytes")


def ranks_of(value: tuple[int, int] | int, what: str) -> tuple[int, int]:
    """Take (rank, count), or a count of 1."""
    rank, count = value if isinstance(value, tuple) else (value, 1)
    if not 0 <= rank < count <= RANK_COUNT_MAX:
        raise UsageError(f"{what} is {value!r}; it must be (rank, count) with rank < count, at "
                         f"most {RANK_COUNT_MAX}")
    return rank, count


def whole(value: int, least: int, most: int, what: str, wanted: str) -> int:
    """Take a whole number from `least` to `most`; `wanted` says to the caller what it may be."""
    if not isinstance(value, int) or not least <= value <= most:
        raise UsageError(f"{what} is {value!r}; it must be {wanted}")
    return value


def lane_count(value: int | str) -> int:
    """Take a number of lanes; "auto" becomes 0."""
    if value == "auto":
        return 0
    return whole(value, 1, LANE_COUNT_MAX, "lanes", f"'auto' or 1 to {LANE_COUNT_MAX}")


def io_threads_of(value: int) -> int:
    """Take a number of I/O threads, 0: as many as suit the machine."""
    return whole(value, 0, IO_THREADS_MAX, "io_threads", f"0 to {IO_THREADS_MAX}")


def priority_of(value: int) -> int:
    """Take a priority: any number of 32 bits, 0 the usual."""
    return whole(value, -1 << 31, (1 << 31) - 1, "priority", "a whole number of 32 bits")


def wait_connected(native: object, link: bytes, timeout_s: float) -> None:
    """Wait until a dialled link has a lane, in slices between which Python handles signals."""
    end = time.monotonic() + nanoseconds(timeout_s, "timeout_s") / 1e9
    while True:
        try:
            return native.wait_connected(link, max(0.0, min(WAIT_SLICE_S, end - time.monotonic())))
        except TransferTimeout as error:
            if error.code != ErrorCode.DEADLINE_EXCEEDED or time.monotonic() >= end:
                raise


def nanoseconds(value: float, what: str) -> int:
    """A time span in seconds as nanoseconds, bounded."""
    span = seconds(value, what)
    return int((SECONDS_MAX if span < 0 else span) * 1e9)
