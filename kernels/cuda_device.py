"""The device that kvwire.kernels.staging works with, over the CUDA driver. Run over the driver
that tests/simt plays; not yet on a GPU."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from kvwire.kernels.driver import NOT_READY, Driver, error_of

__all__ = ["CudaDevice"]

_EVENT_DISABLE_TIMING = 2
_STREAM_NON_BLOCKING = 1
_HOST_ALLOC_DEVICE_MAP = 2  # kernels may touch it, at the same address
BLOCKS_PER_SM = 3  # of the coding kernels: kernels/cuda/kvwire.cu


class _Event:
    def __init__(self, driver: Driver, stream: int):
        self._driver, self.handle = driver, ctypes.c_void_p()
        driver.call("cuEventCreate", ctypes.byref(self.handle),
                    ctypes.c_uint(_EVENT_DISABLE_TIMING))
        driver.call("cuEventRecord", self.handle, ctypes.c_void_p(stream))

    def done(self) -> bool:
        result = self._driver.answer("cuEventQuery", self.handle)
        if result not in (0, NOT_READY):
            raise error_of(result, "cuEventQuery")
        return result == 0

    def wait(self) -> None:
        self._driver.call("cuEventSynchronize", self.handle)

    def __del__(self):
        if self.handle.value:
            self._driver.answer("cuEventDestroy_v2", self.handle)


class _Stream(int):
    """A stream's handle, destroyed with the object, once what it was given has run."""

    def __new__(cls, driver: Driver, handle: int):
        made = super().__new__(cls, handle)
        made._driver = driver
        return made

    def __del__(self):
        self._driver.answer("cuStreamDestroy_v2", ctypes.c_void_p(self))


class _Pinned:
    """Page-locked memory that kernels may write, too; freed when no array refers to it any more."""

    def __init__(self, driver: Driver, count: int):
        self._driver, self._address = driver, ctypes.c_void_p()
        driver.call("cuMemHostAlloc", ctypes.byref(self._address),
                    ctypes.c_size_t(max(count, 1)), ctypes.c_uint(_HOST_ALLOC_DEVICE_MAP))
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (count,),
                                    "data": (self._address.value, False)}

    def __del__(self):
        if self._address.value:
            self._driver.answer("cuMemFreeHost", self._address)


class CudaDevice:
    """Streams, events, copies and launches that wait for nothing.

    Device memory is known by its address, a stream by its handle. What fails raises `error_of`.
    """

    backend = "cuda"

    def __init__(self, driver: Driver):
        self._driver, self.call = driver, driver.call

    def attach(self) -> None:
        """Nothing: each call brings its context, and the caller's own stays what it is."""

    def stream(self) -> int:
        """Return a stream of the lowest priority, which the default stream does not wait for."""
        least, greatest, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self.call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        self.call("cuStreamCreateWithPriority", ctypes.byref(handle),
                  ctypes.c_uint(_STREAM_NON_BLOCKING), least)
        return _Stream(self._driver, handle.value)

    def engine_event(self) -> _Event:
        """Return an event of what the calling thread has enqueued: on torch's current stream of
        this device where torch is in use, else on the default stream."""
        torch = sys.modules.get("torch")
        has_torch = torch is not None and torch.cuda.is_initialized()
        return self.record(torch.cuda.current_stream(self._driver.ordinal).cuda_stream
                           if has_torch else 0)

    def blocks_max(self, sm_share: float) -> int:
        """Return how many blocks of a kernel take that share of the multiprocessors."""
        return max(1, int(sm_share * self._driver.multiprocessors * BLOCKS_PER_SM))

    def allocate(self, count: int) -> int:
        return self._driver.allocate(count)

    def free(self, address: int) -> None:
        self._driver.free(address)

    def launch(self, kernel: str, grid: tuple[int, int], args: list[int], stream: int) -> None:
        self._driver.launch(kernel, grid, args, stream)

    def pinned(self, count: int) -> np.ndarray:
        """Return `count` bytes of page-locked memory."""
        return np.asarray(_Pinned(self._driver, count))

    def record(self, stream: int) -> _Event:
        return _Event(self._driver, stream)

    def wait_for(self, stream: int, event: _Event) -> None:
        """Enqueue the waiting: no thread waits."""
        self.call("cuStreamWaitEvent", ctypes.c_void_p(stream), event.handle, ctypes.c_uint(0))

    def to_host(self, room: np.ndarray, source: int, stream: int) -> None:
        """Enqueue one copy of len(room)."""
        self.call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(room.ctypes.data),
                  ctypes.c_uint64(source), ctypes.c_size_t(room.nbytes), ctypes.c_void_p(stream))

    def to_device(self, target: int, room: np.ndarray, stream: int) -> None:
        """Enqueue one copy of len(room)."""
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(target),
                  ctypes.c_void_p(room.ctypes.data), ctypes.c_size_t(room.nbytes),
                  ctypes.c_void_p(stream))
