"""The CUDA driver, loaded where it is: no CUDA library is linked, and none is needed to import.

Written from the driver API's documentation, and run over the one that tests/simt plays. It has not
yet run on a GPU: see kernels/README.md.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import numpy as np

from kvwire.errors import ErrorCode, InternalError, LimitError, UnsupportedError

__all__ = ["Driver", "FATBIN", "error_of", "why_no_library", "why_not"]

LIBRARY = "libcuda.so.1"
FATBIN = Path(__file__).parent / "cuda" / "kvwire.fatbin"
THREADS = 256  # of a block: kernels/cuda/cta.cuh

OUT_OF_MEMORY, NOT_READY = 2, 600
_MULTIPROCESSOR_COUNT = 16
# What says that there is nothing to run on; the rest leaves a context that is lost.
ABSENT = {3: "not initialised", 34: "a stub library", 35: "a driver older than the fatbin",
          100: "no device", 101: "no such device", 209: "no code for this device", 803: "driver "
          "and library disagree"}


def error_of(result: int, call: str) -> Exception:
    """Return the error that stands for the driver's answer `result` to `call`."""
    if result == OUT_OF_MEMORY:
        return LimitError(f"{call}: the device is out of memory: code fewer chunks at a time, or "
                          "leave kvwire more", code=ErrorCode.RESOURCES_EXHAUSTED, actual=result)
    if result in ABSENT:
        return UnsupportedError(f"{call}: {ABSENT[result]}; KVWIRE_BACKEND=cpu does without",
                                actual=result)
    return InternalError(f"{call}: CUDA error {result}: the device's context is lost; transfers "
                         "in flight have failed, and the process must be started anew",
                         actual=result)


class Driver:
    """One device's primary context, which torch uses too. Addresses are plain integers.

    Args:
        ordinal: of the device; None: the one that this thread works with already, else the first.
    """

    def __init__(self, ordinal: int | None = None):
        if absent := why_no_library():
            raise UnsupportedError(absent)
        self.library = ctypes.CDLL(LIBRARY)
        device, module = ctypes.c_int(), ctypes.c_void_p()
        self._context = ctypes.c_void_p()
        self._answered("cuInit", ctypes.c_uint(0))
        if ordinal is not None or self.library.cuCtxGetDevice(ctypes.byref(device)):
            self._answered("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal or 0))
        if not FATBIN.exists():
            raise UnsupportedError("kvwire was built without CUDA kernels: install it where nvcc "
                                   "is, or use KVWIRE_BACKEND=triton")
        self._answered("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.call("cuModuleLoadData", ctypes.byref(module), FATBIN.read_bytes())
        self._module, self.ordinal = module, device.value
        count = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(count),
                  ctypes.c_int(_MULTIPROCESSOR_COUNT), device)
        self.multiprocessors = count.value
        self._kernels: dict[str, ctypes.c_void_p] = {}
        self.timed, self.kernel_s = False, 0.0  # while timed, launches are waited for and added up

    def _answered(self, name: str, *args) -> None:
        if result := getattr(self.library, name)(*args):
            raise error_of(result, name)

    def call(self, name: str, *args) -> None:
        """Call an entry point of the library; raises `error_of` its answer."""
        if result := self.answer(name, *args):
            raise error_of(result, name)

    def answer(self, name: str, *args) -> int:
        """Call an entry point in this device's context. The thread gets back the one it had: an
        engine's may work with another device, and so may one that collects garbage."""
        if result := self.library.cuCtxPushCurrent_v2(self._context):
            return result
        try:
            return getattr(self.library, name)(*args)
        finally:
            self.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def launch(self, kernel: str, grid: tuple[int, int], args: list[int], stream: int = 0) -> None:
        """Enqueue a kernel. Numbers go as 8 bytes, which serve for 4 as well."""
        if kernel not in self._kernels:
            function = ctypes.c_void_p()
            self.call("cuModuleGetFunction", ctypes.byref(function), self._module,
                      kernel.encode())
            self._kernels[kernel] = function
        values = [ctypes.c_int64(arg) for arg in args]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        u = ctypes.c_uint
        marks = [self._mark(stream)] if self.timed else []
        self.call("cuLaunchKernel", self._kernels[kernel], u(grid[0]), u(grid[1]), u(1),
                  u(THREADS), u(1), u(1), u(0), ctypes.c_void_p(stream), pointers, None)
        if marks:
            self.kernel_s += self._since(marks[0], self._mark(stream))

    def copy(self, target: int, source: int, count: int) -> None:
        """Copy within the device, timed as kernels are."""
        marks = [self._mark(0)] if self.timed else []
        self.copy_async(target, source, count, 0)
        if marks:
            self.kernel_s += self._since(marks[0], self._mark(0))

    def copy_async(self, target: int, source: int, count: int, stream: int) -> None:
        """Enqueue a copy within the device; it is never timed."""
        self.call("cuMemcpyDtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_uint64(source),
                  ctypes.c_size_t(count), ctypes.c_void_p(stream))

    def _mark(self, stream: int) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self.call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        self.call("cuEventRecord", event, ctypes.c_void_p(stream))
        return event

    def _since(self, begin: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        passed_ms = ctypes.c_float()
        self.call("cuEventSynchronize", end)
        self.call("cuEventElapsedTime", ctypes.byref(passed_ms), begin, end)
        for event in (begin, end):
            self.call("cuEventDestroy_v2", event)
        return passed_ms.value / 1000

    def allocate(self, count: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(count, 1)))
        return address.value

    def free(self, address: int) -> None:
        """Free what `allocate` gave. Of a lost context nothing is left to be freed, nor to be said
        by those who free."""
        self.answer("cuMemFree_v2", ctypes.c_uint64(address))

    def write(self, address: int, data: np.ndarray) -> None:
        """Copy `data` to the device: it is there, for all streams, when this returns."""
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address),
                  ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(data.nbytes))
        self.call("cuStreamSynchronize", ctypes.c_void_p(0))  # it may only have been staged yet

    def read(self, address: int, data: np.ndarray) -> None:
        """Copy to `data`, once all that was enqueued on the default stream has run."""
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(data.ctypes.data),
                  ctypes.c_uint64(address), ctypes.c_size_t(data.nbytes))


@lru_cache(maxsize=None)
def _first() -> Driver:
    return Driver()


def why_no_library() -> str:
    """Say why the driver's library cannot be loaded; empty where it can."""
    try:
        ctypes.CDLL(LIBRARY)
    except OSError as error:
        return f"there is no CUDA driver here: {error}"
    return ""


def why_not() -> str:
    """Say why the CUDA kernels cannot run here; empty where they can."""
    try:
        _first()
    except (UnsupportedError, LimitError, InternalError) as error:
        return str(error)
    return ""
