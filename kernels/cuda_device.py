"""The device that kvwire.kernels.staging works with, over the CUDA driver. Not yet run on a GPU."""

from __future__ import annotations

import ctypes

import numpy as np

from kvwire.kernels.driver import NOT_READY, Driver, error_of

__all__ = ["CudaDevice"]

_EVENT_DISABLE_TIMING = 2
_STREAM_NON_BLOCKING = 1


class _Event:
    def __init__(self, device: CudaDevice, stream: int):
        self._device, self._handle = device, ctypes.c_void_p()
        device.call("cuEventCreate", ctypes.byref(self._handle),
                    ctypes.c_uint(_EVENT_DISABLE_TIMING))
        device.call("cuEventRecord", self._handle, ctypes.c_void_p(stream))

    def done(self) -> bool:
        result = self._device.library.cuEventQuery(self._handle)
        if result not in (0, NOT_READY):
            raise error_of(result, "cuEventQuery")
        return result == 0

    def wait(self) -> None:
        self._device.call("cuEventSynchronize", self._handle)

    def __del__(self):
        self._device.library.cuEventDestroy_v2(self._handle)


class CudaDevice:
    """Streams, events and pinned memory. Device handles are addresses, events are `_Event`s."""

    def __init__(self, driver: Driver):
        self._driver, self.library = driver, driver.library

    def call(self, name: str, *args) -> None:
        if result := getattr(self.library, name)(*args):
            raise error_of(result, name)

    def stream(self) -> int:
        """Return a stream of the lowest priority, which the default stream does not wait for."""
        least, greatest, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self.call("cuCtxGetStreamPriorityRange", ctypes.byref(least), ctypes.byref(greatest))
        self.call("cuStreamCreateWithPriority", ctypes.byref(handle),
                  ctypes.c_uint(_STREAM_NON_BLOCKING), least)
        return handle.value

    def pinned(self, count: int) -> np.ndarray:
        """Return page-locked memory, which lasts as long as the process: a ring is made once."""
        address = ctypes.c_void_p()
        self.call("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(count),
                  ctypes.c_uint(0))
        return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address.value))

    def record(self, stream: int) -> _Event:
        return _Event(self, stream)

    def wait_for(self, stream: int, event: _Event) -> None:
        self.call("cuStreamWaitEvent", ctypes.c_void_p(stream), event._handle, ctypes.c_uint(0))

    def to_host(self, room: np.ndarray, source: int, stream: int) -> None:
        self.call("cuMemcpyDtoHAsync_v2", ctypes.c_void_p(room.ctypes.data),
                  ctypes.c_uint64(source), ctypes.c_size_t(room.nbytes), ctypes.c_void_p(stream))

    def to_device(self, target: int, room: np.ndarray, stream: int) -> None:
        self.call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(target),
                  ctypes.c_void_p(room.ctypes.data), ctypes.c_size_t(room.nbytes),
                  ctypes.c_void_p(stream))
