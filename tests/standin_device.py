"""A device without a GPU: copies and kernels run later, on threads of their own, and its memory
can be reached by nobody else: a touch from any other thread at any other time is a fault.

It has the methods of `kvwire.kernels.cuda_device.CudaDevice`, and the kernels are those of
kernels/cuda, run by tests/simt.
"""

import contextlib
import ctypes
import mmap
import queue
import random
import threading
import time

import numpy as np
from cuda_host import launch, library

from kvwire.buffers import Buffer
from kvwire.errors import InternalError, LimitError
from kvwire.kernels.driver import THREADS

MEMORY_BYTES = 96 << 20
_libc = ctypes.CDLL(None, use_errno=True)


class Event:
    def __init__(self):
        self.reached, self.error = threading.Event(), None

    def done(self):
        if self.error:
            raise self.error
        return self.reached.is_set()

    def wait(self):
        assert self.reached.wait(100)
        if self.error:
            raise self.error


class Stream(threading.Thread):
    """Runs what is enqueued in order; after an error nothing more, as a lost context."""

    def __init__(self, device):
        super().__init__(daemon=True)
        self.device, self.work, self.rng = device, queue.Queue(), random.Random(1)
        self.start()

    def run(self):
        while (item := self.work.get()) is not None:
            task, event = item
            if self.rng.random() < 0.2:
                time.sleep(self.rng.random() / 1000)
            try:
                if self.device.lost is None and task is not None:
                    task()
            except Exception as error:
                self.device.lost = error
            if event:
                event.error = self.device.lost
                event.reached.set()


class StandInDevice:
    """`lose_at`: the number of the task on any stream at which the context is lost."""

    backend = "cuda"

    def __init__(self, memory_bytes=MEMORY_BYTES):
        self.library = library()
        self.memory = mmap.mmap(-1, memory_bytes)
        self.base = np.frombuffer(self.memory, np.uint8).ctypes.data
        self.end, self.bytes, self.freed = 0, memory_bytes, 0
        self.users, self.lock = 0, threading.Lock()
        self.tasks, self.lose_at, self.lost = 0, None, None
        self.launches, self.grids = [], set()
        self.flip_copies, self.flip_decodes = set(), set()  # numbers of those that go wrong
        self.large_copies, self.decodes, self.streams = 0, 0, []
        self.engine = self.stream()
        self._protect(0)

    def _protect(self, flags):
        assert _libc.mprotect(ctypes.c_void_p(self.base), ctypes.c_size_t(self.bytes), flags) == 0

    @contextlib.contextmanager
    def access(self):
        with self.lock:
            self.users += 1
            if self.users == 1:
                self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            yield
        finally:
            with self.lock:
                self.users -= 1
                if self.users == 0:
                    self._protect(0)

    def attach(self):
        pass

    def blocks_max(self, sm_share):
        return max(1, int(sm_share * 16))

    def allocate(self, count):
        if self.end + count > self.bytes:
            raise LimitError("the device is out of memory", actual=count)
        address, self.end = self.base + self.end, self.end + count + -count % 256
        return address

    def free(self, address):
        self.freed += 1

    def pinned(self, count):
        room = np.full(count + 256, 0xA5, np.uint8)
        return room[-room.ctypes.data % 256:][:count]

    def stream(self):
        self.streams.append(Stream(self))
        return self.streams[-1]

    def engine_event(self):
        return self.record(self.engine)

    def record(self, stream):
        event = Event()
        stream.work.put((None, event))
        return event

    def wait_for(self, stream, event):
        stream.work.put((event.wait, None))

    def enqueue(self, stream, task):
        def run():
            with self.lock:
                self.tasks += 1
                if self.tasks - 1 == self.lose_at:
                    raise InternalError("the device's context is lost")
            with self.access():
                task()
        stream.work.put((run, None))

    def to_host(self, room, source, stream):
        is_flipped = room.nbytes >= 30_000 and self.large_copies in self.flip_copies
        self.large_copies += room.nbytes >= 30_000

        def task():
            ctypes.memmove(room.ctypes.data, source, room.nbytes)
            if is_flipped:
                room[room.nbytes // 2] ^= 4
        self.enqueue(stream, task)

    def to_device(self, target, room, stream):
        self.enqueue(stream, lambda: ctypes.memmove(target, room.ctypes.data, room.nbytes))

    def launch(self, kernel, grid, args, stream):
        self.launches.append(kernel)
        self.grids.add(grid[0])
        is_decode = kernel == "kvwire_decode"
        is_flipped = is_decode and self.decodes in self.flip_decodes
        self.decodes += is_decode

        def task():
            if is_flipped:  # of what was copied to be decoded
                ctypes.c_uint8.from_address(args[6] + 5000).value ^= 4
            launch(self.library, kernel, grid, THREADS, args)
        self.enqueue(stream, task)

    def array(self, shape, dtype=np.uint16):
        """Return a numpy array in the device's memory, and the Buffer that says so."""
        dtype = np.dtype(dtype)
        address = self.allocate(int(np.prod(shape)) * dtype.itemsize)
        held = (ctypes.c_uint8 * int(np.prod(shape) * dtype.itemsize)).from_address(address)
        array = np.frombuffer(held, dtype).reshape(shape)
        return array, Buffer(address, array.shape, array.strides, dtype.itemsize, dtype.name,
                             False, (self, array), "cuda:0")

    def close(self):
        for stream in self.streams:
            stream.work.put(None)
            stream.join(100)
