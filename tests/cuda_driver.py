"""libcuda.so.1 of tests/simt: what kvwire's own calls meet on a machine without a GPU."""

import contextlib
import ctypes
import gc
import tempfile
import time
from functools import lru_cache

import numpy as np
import pytest
from cuda_host import SIMT, build

from kvwire.buffers import Buffer
from kvwire.kernels import backends, driver

KINDS = ("memory", "pinned", "streams", "events")


@lru_cache(maxsize=1)
def library_path():
    """Return where the library lies, for as long as this process lives."""
    folder = tempfile.TemporaryDirectory()
    library_path.folder = folder
    build(f"{folder.name}/libcuda.so.1", SIMT / "libcuda.cpp", SIMT / "kernels.cpp")
    return f"{folder.name}/libcuda.so.1"


class FakeCuda:
    """The library, and what tests ask of it."""

    def __init__(self):
        self.library = ctypes.CDLL(library_path())
        self.library.fake_cuda_end.restype = ctypes.c_char_p

    def fail(self, name, nth=1, code=driver.OUT_OF_MEMORY):
        """Let the nth call from now on of `name` fail; "*": of any."""
        self.library.fake_cuda_fail(name.encode(), nth, code)

    def slow(self, wait_us):
        """Let each piece of work on a stream begin so much later."""
        self.library.fake_cuda_slow(wait_us)

    def calls(self, name):
        return self.library.fake_cuda_calls(name.encode())

    def current(self):
        """Return the device of this thread's context; -1: it has none."""
        return self.library.fake_cuda_current()

    def held(self):
        """Return how many things of each kind there are."""
        gc.collect()
        counts = (ctypes.c_int * 4)()
        self.library.fake_cuda_held(counts)
        return dict(zip(KINDS, counts))

    def end(self):
        """Return what callers did wrong since it was last asked, in lines."""
        return self.library.fake_cuda_end().decode()

    def wait_held(self, expected):
        """Wait until as many things are held as `expected`: threads let go of theirs late."""
        for _ in range(50):
            if self.held() == expected:
                return
            time.sleep(0.02)
        assert self.held() == expected, (self.held(), expected)


class DriverArrays:
    """Arrays in the memory of a device, as `standin_device` has them."""

    def __init__(self, made, name="cuda:0"):
        self.driver, self.name = made, name

    @staticmethod
    def access():
        return contextlib.nullcontext()

    def array(self, shape, dtype=np.uint16):
        """Return a numpy array over device memory, and the Buffer that says so."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape)) * dtype.itemsize
        held = _Held(self.driver, count)
        room = (ctypes.c_uint8 * count).from_address(held.address)
        room.held = held
        array = np.frombuffer(room, dtype).reshape(shape)
        return array, Buffer(held.address, array.shape, array.strides, dtype.itemsize, dtype.name,
                             False, (held, array), self.name)


class _Held:
    def __init__(self, made, count):
        self.driver, self.address = made, made.allocate(count)

    def __del__(self):
        self.driver.free(self.address)


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """A machine with two GPUs. Whatever is left behind or was called wrongly fails the test."""
    fake = FakeCuda()
    fatbin = tmp_path / "kvwire.fatbin"
    fatbin.write_bytes(b"kernels")
    monkeypatch.setattr(driver, "LIBRARY", library_path())
    monkeypatch.setattr(driver, "FATBIN", fatbin)
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    driver._first.cache_clear()
    backends._device.cache_clear()
    held = fake.held()
    yield fake
    driver._first.cache_clear()
    backends._device.cache_clear()
    fake.wait_held(held)
    assert fake.end() == ""
