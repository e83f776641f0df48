"""Between a device's pages and the wire: pinned memory, and what both directions share.

    pages -> kernel -> device memory -> copy -> pinned ring -> TCP -> pinned rooms -> copy ->
    device memory -> kernel -> pages

All device work is enqueued by a thread of kvwire's own, on a stream of the lowest priority. The
engine's thread is never waited for; its stream is, by the device, through an event. A device is
`CudaDevice`, `TritonDevice`, or what has their methods.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from kvwire.errors import (
    ErrorCode, InternalError, KvwireError, LimitError, TransferCancelled, UsageError,
)

__all__ = ["Arena", "DeviceBytes", "PinnedRing", "Slot", "Staging"]

ALIGNMENT = 256  # of what goes to the device in one copy


@dataclass(frozen=True)
class Staging:
    """How caches in device memory are brought to the wire and from it.

    Attributes:
        ring_bytes: page-locked host memory of a `Sender`, and of a `Receiver`.
        slice_bytes: what one launch takes; no state tensor may be larger.
        sm_share: of the device's multiprocessors that the kernels may use, above 0 and up to 1.
            Triton's take what is free.
        maps_ring: a `Sender`'s kernels write payloads straight to page-locked memory; a copy brings
            them there otherwise. `bench.gpu_staging` measures which is faster. CUDA kernels only.
        device: what to work with; None: the GPU whose number the tensors say.
    """

    ring_bytes: int = 128 << 20
    slice_bytes: int = 8 << 20
    sm_share: float = 0.125
    maps_ring: bool = False
    device: object | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for name in ("ring_bytes", "slice_bytes"):
            if type(getattr(self, name)) is not int:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be an integer")
        if not 0 < self.sm_share <= 1:
            raise UsageError(f"sm_share is {self.sm_share}; it must be above 0 and up to 1")
        if type(self.maps_ring) is not bool:
            raise UsageError(f"maps_ring is {self.maps_ring!r}; it must be true or false")
        if self.slice_bytes < 1 << 16 or self.slice_bytes % 4096:
            raise UsageError(f"slice_bytes is {self.slice_bytes}; it must be a multiple of 4096, "
                             "at least 65536")
        if self.ring_bytes < self.slice_bytes:
            raise UsageError(f"ring_bytes is {self.ring_bytes}; it must hold a slice, "
                             f"{self.slice_bytes}")

    def open(self, name: str):
        """Return the device that tensors call `name`, e.g. "cuda:1".

        Raises:
            UsageError: `maps_ring`, and its kernels cannot.
            As `kvwire.kernels.backends.open_device`.
        """
        device = self.device
        if device is None:
            from kvwire.kernels import backends
            device = backends.open_device(name)
        if self.maps_ring and device.backend != "cuda":
            raise UsageError(f"maps_ring: only CUDA kernels write to the host's memory, and {name} "
                             f"has those of {device.backend}")
        return device


class DeviceBytes:
    """Device memory that is freed with the object."""

    def __init__(self, device, count: int):
        self.device, self.bytes = device, count
        self.address = device.allocate(count)

    def __del__(self):
        if hasattr(self, "address"):
            self.device.free(self.address)


class Arena:
    """Arrays that go to the device in one copy, and some of them back in another.

    It grows when more is laid than ever before, which no steady state does.
    """

    def __init__(self, device):
        self._device, self._host, self._held, self._end = device, None, None, 0

    def lay(self, arrays: list[np.ndarray], stream) -> list[int]:
        """Enqueue the copy of `arrays`; return their addresses on the device. What was laid before
        must have been copied."""
        offsets, end = [], 0
        for array in arrays:
            offsets.append(end)
            end += array.nbytes + -array.nbytes % ALIGNMENT
        if self._held is None or end > self._held.bytes:
            count = 1 << max(end - 1, 1 << 16).bit_length()
            held, host = DeviceBytes(self._device, count), self._device.pinned(count)
            self._held, self._host = held, host  # both or none
        for at, array in zip(offsets, arrays):
            self._host[at:at + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(
                np.uint8)
        self._end = end
        self._device.to_device(self._held.address, self._host[:end], stream)
        return [self._held.address + at for at in offsets]

    def fetch(self, address: int, stream) -> np.ndarray:
        """Enqueue the copy of all from `address` on to the host; return where it will be."""
        room = self._host[address - self._held.address:self._end]
        self._device.to_host(room, address, stream)
        return room


@dataclass(eq=False)
class Slot:
    """A room of the ring. Whoever holds it gives it back once, by release()."""

    room: np.ndarray
    ring: PinnedRing
    held: bool = False

    def release(self) -> None:
        self.ring._take_back(self)


class PinnedRing:
    """`count` slots of `slot_bytes`, all that staging ever pins for chunks. Any thread may use it.

    Raises:
        LimitError: the host has no page-locked memory for it.
    """

    def __init__(self, device, count: int, slot_bytes: int):
        if count < 1 or slot_bytes < 1:
            raise UsageError("a ring needs at least one slot of one byte", expected=1,
                             actual=min(count, slot_bytes))
        self.count, self.slot_bytes = count, slot_bytes
        self._changed = threading.Condition()
        memory = device.pinned(count * slot_bytes)
        self._free = deque(Slot(memory[at * slot_bytes:(at + 1) * slot_bytes], self)
                           for at in range(count))
        self._closed = False

    @property
    def free_count(self) -> int:
        with self._changed:
            return len(self._free)

    def try_acquire(self) -> Slot | None:
        with self._changed:
            self._check_open()
            return self._give() if self._free else None

    def close(self) -> None:
        """Give out no more. Slots that are out may still be given back."""
        with self._changed:
            self._closed = True

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


@contextlib.contextmanager
def settled(device, stream):
    """Where the body fails, wait until nothing of it runs on `stream`: memory that outlives the
    body may be freed then."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            device.record(stream).wait()
        raise


def settle(stages) -> None:
    """Wait until the memory of stages may be freed, or their device is lost."""
    for stage in stages:
        with contextlib.suppress(Exception):
            stage.wait()


def typed(error: BaseException) -> KvwireError:
    """Return what stands for whatever has stopped a staging thread."""
    if isinstance(error, KvwireError):
        return error
    stands = InternalError(f"the staging thread has stopped: {type(error).__name__}: {error}")
    stands.__cause__ = error
    return stands


def check_fits(what: str, count: int, slice_bytes: int) -> None:
    """Raise LimitError where something that is not divided is larger than a slice."""
    if count > slice_bytes:
        raise LimitError(f"{what} has {count} bytes: give Staging a slice_bytes that holds it",
                         expected=slice_bytes, actual=count)
