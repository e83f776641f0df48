"""The device that kvwire.kernels.staging works with, over torch: what Triton's kernels need. Not
yet run on a GPU."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np

from kvwire.errors import ErrorCode, InternalError, LimitError

__all__ = ["TritonDevice"]


@contextmanager
def _typed(what: str):
    """Raise what torch raises as the errors that staging knows."""
    import torch
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise LimitError(f"{what}: the device is out of memory: leave kvwire more",
                         code=ErrorCode.RESOURCES_EXHAUSTED) from error
    except RuntimeError as error:
        raise InternalError(f"{what}: {error}: transfers in flight have failed, and the process "
                            "must be started anew") from error


class _Event:
    def __init__(self, event):
        self.event = event  # of torch

    def done(self) -> bool:
        with _typed("an event"):
            return self.event.query()

    def wait(self) -> None:
        with _typed("an event"):
            self.event.synchronize()


class TritonDevice:
    """As `kvwire.kernels.cuda_device.CudaDevice`, without launches: the kernels are enqueued by
    torch's and Triton's calls, inside `on(stream)`. A stream is torch's."""

    backend = "triton"

    def __init__(self, name: str):
        import torch
        self.device = torch.device(name)
        self._held: dict[int, torch.Tensor] = {}  # by address
        self._stream = None  # whose memory torch gives: no work of another one is pending on it
        self._lock = threading.RLock()  # a garbage collection may free while it is held

    def attach(self) -> None:
        """Nothing: a stream says whose it is, and the caller's current device stays what it is."""

    def stream(self):
        """Return a stream of the lowest priority, which is torch's default."""
        import torch
        return torch.cuda.Stream(self.device)

    @contextmanager
    def on(self, stream):
        """Have torch and Triton enqueue on `stream`."""
        import torch
        with _typed("kernels or memory"), torch.cuda.stream(stream):
            yield

    def engine_event(self) -> _Event:
        """Return an event of what the calling thread has enqueued, on torch's current stream."""
        import torch
        return self.record(torch.cuda.current_stream(self.device))

    def record(self, stream) -> _Event:
        with _typed("an event"):
            return _Event(stream.record_event())

    def wait_for(self, stream, event: _Event) -> None:
        """Enqueue the waiting: no thread waits."""
        with _typed("an event"):
            stream.wait_event(event.event)

    def allocate(self, count: int) -> int:
        import torch
        self._stream = self._stream or self.stream()
        with self.on(self._stream):
            held = torch.empty(max(count, 1), dtype=torch.uint8, device=self.device)
        with self._lock:
            self._held[held.data_ptr()] = held
        return held.data_ptr()

    def free(self, address: int) -> None:
        with self._lock:
            del self._held[address]

    def tensor(self, address: int, count: int):
        """Return `count` bytes of what was allocated, as a uint8 tensor."""
        with self._lock:
            held = self._held.get(address)
            if held is None:
                begin = max(each for each in self._held if each <= address)
                held = self._held[begin][address - begin:]
        return held[:count]

    def pinned(self, count: int) -> np.ndarray:
        """Return `count` bytes of page-locked memory."""
        import torch
        try:
            return torch.empty(count, dtype=torch.uint8, pin_memory=True).numpy()
        except RuntimeError as error:
            raise LimitError(f"the host has no {count} bytes of page-locked memory: {error}",
                             code=ErrorCode.RESOURCES_EXHAUSTED, actual=count) from error

    def to_host(self, room: np.ndarray, source: int, stream) -> None:
        """Enqueue one copy of len(room)."""
        import torch
        with self.on(stream):
            torch.from_numpy(room).copy_(self.tensor(source, room.nbytes), non_blocking=True)

    def to_device(self, target: int, room: np.ndarray, stream) -> None:
        """Enqueue one copy of len(room)."""
        import torch
        with self.on(stream):
            self.tensor(target, room.nbytes).copy_(torch.from_numpy(room), non_blocking=True)
