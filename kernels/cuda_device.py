"""The device that kvwire.kernels.staging works with, over the CUDA driver. Not yet run on a GPU."""

from __future__ import annotations

import ctypes
import sys

import numpy as np

from kvwire.kernels.driver import NOT_READY, Driver, error_of

__all__ = ["CudaDevice"]

_EVENT_DISABLE_TIMING = 2
_STREAM_NON_BLOCKING = 1
BLOCKS_PER_SM = 3  # of the coding kernels: kernels/cuda/kvwire.cu


class _Event:
    def __init__(self, device: CudaDevice, stream: int):
        self._device, self.handle = device, ctypes.c_void_p()
        device.call("cuEventCreate", ctypes.byref(self.handle),
                    ctypes.c_uint(_EVENT_DISABLE_TIMING))
        device.call("cuEventRecord", self.handle, ctypes.c_void_p(stream))

    def done(self) -> bool:
        result = self._device.library.cuEventQuery(self.handle)
        if result not in (0, NOT_READY):
            raise error_of(result, "cuEventQuery")
        return result == 0

    def wait(self) -> None:
        self._device.call("cuEventSynchronize", self.handle)

    def __del__(self):
        self._device.attach()
        self._device.library.cuEventDestroy_v2(self.handle)


class _Pinned:
    """Page-locked memory, freed when no array refers to it any more."""

    def __init__(self, device: CudaDevice, count: int):
        self._device, self._address = device, ctypes.c_void_p()
        device.call("cuMemHostAlloc", ctypes.byref(self._address),
                    ctypes.c_size_t(max(count, 1)), ctypes.c_uint(0))
        self.__array_interface__ = {"version": 3, "typestr": "|u1", "shape": (count,),
                                    "data": (self._address.value, False)}

    def __del__(self):
        if self._address.value:
            self._device.attach()
            self._device.library.cuMemFreeHost(self._address)


class CudaDevice:
    """Streams, events, copies and launches that wait for nothing.

    Device memory is known by its address, a stream by its handle. What fails raises `error_of`.
    """

    backend = "cuda"

    def __init__(self, driver: Driver):
        self._driver, self.library = driver, driver.library

    def call(self, name: str, *args) -> None:
        if result := getattr(self.library, name)(*args):
            raise error_of(result, name)

    def attach(self) -> None:
        """To be called once by each thread that calls."""
        self._driver.attach()

    def stream(self) -> int:
        """Return a stream of the lowest priority, which the default stream does not wait for."""
        least, greatest, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self.call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        self.call("cuStreamCreateWithPriority", ctypes.byref(handle),
                  ctypes.c_uint(_STREAM_NON_BLOCKING), least)
        return handle.value

    def engine_event(self) -> _Event:
        """Return an event of what the calling thread has enqueued: on torch's current stream where
        torch is in use, else on the default stream."""
        self.attach()
        torch = sys.modules.get("torch")
        has_torch = torch is not None and torch.cuda.is_initialized()
        return self.record(torch.cuda.current_stream().cuda_stream if has_torch else 0)

    def blocks_max(self, sm_share: float) -> int:
        """Return how many blocks of a kernel take that share of the multiprocessors."""
        return max(1, int(sm_share * self._driver.multiprocessors * BLOCKS_PER_SM))

    def allocate(self, count: int) -> int:
        return self._driver.allocate(count)

    def free(self, address: int) -> None:
        self.attach()  # a garbage collection may run on any thread
        self._driver.free(address)

    def launch(self, kernel: str, grid: tuple[int, int], args: list[int], stream: int) -> None:
        self._driver.launch(kernel, grid, args, stream)

    def pinned(self, count: int) -> np.ndarray:
        """Return `count` bytes of page-locked memory."""
        return np.asarray(_Pinned(self, count))

    def record(self, stream: int) -> _Event:
        return _Event(self, stream)

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
