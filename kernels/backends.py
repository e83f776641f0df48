"""Which kernels copy and code: chosen in one place, forced by KVWIRE_BACKEND, reported."""

from __future__ import annotations

import os
from functools import lru_cache

from kvwire.errors import UnsupportedError, UsageError

__all__ = ["BACKENDS", "choose", "load", "obstacle", "open_device"]

BACKENDS = ("cuda", "triton", "cpu")  # fastest first
VARIABLE = "KVWIRE_BACKEND"


def choose(name: str | None = None) -> str:
    """Return the back end to use: `name`, else what KVWIRE_BACKEND says, else the first that runs.

    Raises:
        UsageError: no back end has that name.
        UnsupportedError: it cannot run here, and why.
    """
    forced = name or os.environ.get(VARIABLE)
    if forced is None:
        return next(each for each in BACKENDS if not obstacle(each))
    if forced not in BACKENDS:
        raise UsageError(f"there is no back end {forced!r}", expected=BACKENDS, actual=forced)
    if why := obstacle(forced):
        raise UnsupportedError(f"the back end {forced!r} cannot run here: {why}")
    return forced


def obstacle(name: str) -> str:
    """Say why a back end cannot run here; empty where it can."""
    from kvwire.kernels import driver
    if name == "cuda":
        return driver.why_not()
    if name == "triton":
        if absent := driver.why_no_library():  # asked first: importing torch takes seconds
            return absent
        try:
            import torch
            import triton  # noqa: F401
        except ImportError as error:
            return f"{error}; pip install kvwire[triton]"
        return "" if torch.cuda.is_available() else "torch finds no CUDA device"
    return ""


def load(name: str | None = None):
    """Return the chosen back end, whose methods `CudaBackend` describes."""
    name = choose(name)
    if name == "cuda":
        from kvwire.kernels import cuda_backend, driver
        return cuda_backend.CudaBackend(driver.Driver())
    if name == "triton":
        from kvwire.kernels.triton_backend import TritonBackend
        return TritonBackend()
    from kvwire.kernels.cpu_backend import CpuBackend
    return CpuBackend()


def open_device(name: str):
    """Return what stages caches on the device that tensors call `name`, e.g. "cuda:1", by the
    kernels that `choose` names; the same object each time.

    Raises:
        UnsupportedError: they are the CPU's, which cannot reach the device's memory.
    """
    backend = choose()
    if backend == "cpu":
        why = obstacle("cuda") or f"{VARIABLE} asks for it"
        raise UnsupportedError(f"the tensors are on {name}, and the back end is 'cpu', which "
                               f"cannot reach them: {why}", expected=BACKENDS[:2], actual=backend)
    return _device(backend, int(name.partition(":")[2] or 0))


@lru_cache(maxsize=None)
def _device(backend: str, ordinal: int):
    if backend == "cuda":
        from kvwire.kernels.cuda_device import CudaDevice
        from kvwire.kernels.driver import Driver
        return CudaDevice(Driver(ordinal))
    from kvwire.kernels.triton_device import TritonDevice
    return TritonDevice(f"cuda:{ordinal}")
