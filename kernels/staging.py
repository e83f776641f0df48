"""Chunks between a device and the wire, through a bounded ring of pinned host memory.

Copies of later chunks run while earlier ones are on the wire. The caller's thread here is kvwire's
staging thread: the engine's is never waited for; its stream is, by the device, through an event.

A device has, with handles of its own:

    pinned(count) -> uint8 array of page-locked memory
    to_host(room, source, stream) / to_device(target, room, stream): enqueue one copy of len(room)
    record(stream) -> event        wait_for(stream, event): the stream waits, no thread does
    event.done() -> bool           event.wait(): until all before it has run; raises its error
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from kvwire.errors import ErrorCode, TransferCancelled, UsageError

__all__ = ["Inbound", "PinnedRing", "Slot", "send_chunks"]


@dataclass(eq=False)
class Slot:
    """A room of the ring. Whoever holds it gives it back once, by release()."""

    room: np.ndarray
    ring: PinnedRing
    held: bool = False

    def release(self) -> None:
        self.ring._take_back(self)


class PinnedRing:
    """`count` slots of `slot_bytes`, all that staging ever pins. Any thread may use it."""

    def __init__(self, device, count: int, slot_bytes: int):
        if count < 1 or slot_bytes < 1:
            raise UsageError("a ring needs at least one slot of one byte", expected=1,
                             actual=min(count, slot_bytes))
        self.count, self.slot_bytes = count, slot_bytes
        self._changed = threading.Condition()
        self._free = deque(Slot(device.pinned(slot_bytes), self) for _ in range(count))
        self._closed = False

    @property
    def free_count(self) -> int:
        with self._changed:
            return len(self._free)

    def try_acquire(self) -> Slot | None:
        with self._changed:
            self._check_open()
            return self._give() if self._free else None

    def acquire(self) -> Slot:
        """Wait for a slot; TransferCancelled when the ring is closed meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            self._check_open()
            return self._give()

    def close(self) -> None:
        """Wake who waits. Slots that are out may still be given back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise TransferCancelled("the staging ring was closed", code=ErrorCode.CANCELLED)

    def _give(self) -> Slot:
        slot = self._free.popleft()
        slot.held = True
        return slot

    def _take_back(self, slot: Slot) -> None:
        with self._changed:
            if not slot.held:
                raise UsageError("the slot was given back already")
            slot.held = False
            self._free.append(slot)
            self._changed.notify()


def send_chunks(device, ring: PinnedRing, stream, ready, chunks: Iterable,
                enqueue: Callable, deliver: Callable) -> None:
    """Bring chunks to the host, in order. Returns when the last one has been delivered.

    Args:
        stream: for the copies; a device gives it a lower priority than the engine's.
        ready: event of the engine's stream after which the pages are final.
        enqueue: enqueue(chunk, stream) starts whatever makes the chunk and returns size(), which
            waits for it and returns (device handle, bytes): what of the slot's worth is to go.
        deliver: deliver(chunk, slot, bytes) owns the slot from then on, and must release it.

    Raises:
        What the device raises. All slots that were not delivered are back in the ring then, and
        none of them is written any more.
    """
    device.wait_for(stream, ready)
    made, copying = deque(), deque()

    def deliver_oldest() -> None:
        chunk, slot, count, event = copying[0]
        event.wait()
        copying.popleft()
        deliver(chunk, slot, count)

    def copy_oldest() -> None:
        chunk, size = made.popleft()
        slot = ring.try_acquire()
        while slot is None and copying:
            deliver_oldest()
            slot = ring.try_acquire()
        slot = slot or ring.acquire()
        try:
            source, count = size()
            if not 0 < count <= ring.slot_bytes:
                raise UsageError("a chunk does not fit a slot of the ring",
                                 expected=ring.slot_bytes, actual=count)
            device.to_host(slot.room[:count], source, stream)
            event = device.record(stream)
        except BaseException:
            slot.release()
            raise
        copying.append((chunk, slot, count, event))
        while copying and copying[0][-1].done():
            deliver_oldest()

    try:
        for chunk in chunks:
            made.append((chunk, enqueue(chunk, stream)))
            if len(made) > 1:  # one is made while the one before it is copied
                copy_oldest()
        while made:
            copy_oldest()
        while copying:
            deliver_oldest()
    finally:
        _give_back(copying)


def _give_back(copying: deque) -> None:
    for _, slot, _, event in copying:
        try:
            event.wait()
        except Exception:  # the error that is on its way says it
            pass
        slot.release()


class Inbound:
    """The same, mirrored: what the wire received into a slot goes to the device and is decoded.

    Args:
        target_of: target_of(chunk) is where its bytes go on the device.
        land: land(chunk, bytes, stream) enqueues what follows the copy: decoding into pages.
    """

    def __init__(self, device, ring: PinnedRing, stream, target_of: Callable, land: Callable):
        self._device, self._ring, self._stream = device, ring, stream
        self._target_of, self._land = target_of, land
        self._copying: deque = deque()

    def slot(self) -> Slot:
        """Return room for the wire to receive into, as soon as there is any."""
        while True:
            self._collect(all_done=False)
            slot = self._ring.try_acquire()
            if slot is not None:
                return slot
            if not self._copying:
                return self._ring.acquire()
            self._oldest()

    def submit(self, chunk, slot: Slot, count: int) -> None:
        """Send `count` received bytes on; the slot is given back when they have been copied."""
        try:
            self._device.to_device(self._target_of(chunk), slot.room[:count], self._stream)
            event = self._device.record(self._stream)
            self._copying.append((chunk, slot, count, event))
        except BaseException:
            slot.release()
            raise
        self._land(chunk, count, self._stream)

    def finish(self) -> None:
        """Wait for everything submitted, raising what went wrong; no slot is out then."""
        try:
            self._collect(all_done=True)
            self._device.record(self._stream).wait()
        finally:
            _give_back(self._copying)
            self._copying.clear()

    def _oldest(self) -> None:
        _, slot, _, event = self._copying[0]
        event.wait()
        self._copying.popleft()
        slot.release()

    def _collect(self, all_done: bool) -> None:
        while self._copying and (all_done or self._copying[0][-1].done()):
            self._oldest()
