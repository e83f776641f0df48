"""`TritonDevice` without a GPU: its memory is the host's, and what is enqueued runs at once, in
Triton's interpreter."""

import contextlib
import ctypes
import threading

import numpy as np
from triton_interpreter import torch  # noqa: F401

from kvwire.buffers import Buffer
from kvwire.kernels.triton_device import TritonDevice

_interpreter = threading.Lock()  # it has one state for all threads


class Event:
    """`reached`: set by what it is an event of."""

    def __init__(self, is_reached=True):
        self.reached = threading.Event()
        if is_reached:
            self.reached.set()

    def done(self):
        return self.reached.is_set()

    def wait(self):
        assert self.reached.wait(100)


class StandInTriton(TritonDevice):
    def __init__(self):
        super().__init__("cpu")
        self.copies = []  # bytes of each, to the device and from it

    def attach(self):
        pass

    def stream(self):
        return object()

    @contextlib.contextmanager
    def on(self, stream):
        with _interpreter:
            yield

    def engine_event(self):
        return Event()

    def record(self, stream):
        return Event()

    def wait_for(self, stream, event):
        event.wait()

    def pinned(self, count):
        return np.full(count, 0xA5, np.uint8)

    def to_device(self, target, room, stream):
        self.copies.append(room.nbytes)
        super().to_device(target, room, stream)

    def to_host(self, room, source, stream):
        self.copies.append(room.nbytes)
        super().to_host(room, source, stream)

    def access(self):
        return contextlib.nullcontext()

    def array(self, shape, dtype=np.uint16):
        """Return a numpy array of its memory, and the Buffer that says so."""
        dtype = np.dtype(dtype)
        count = int(np.prod(shape)) * dtype.itemsize
        address = self.allocate(count)
        held = (ctypes.c_uint8 * count).from_address(address)
        array = np.frombuffer(held, dtype).reshape(shape)
        return array, Buffer(address, array.shape, array.strides, dtype.itemsize, dtype.name,
                             False, (self, array), "cuda:0")
