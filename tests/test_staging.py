"""The staging pipeline over a stand-in device whose copies happen later, on another thread."""

import queue
import random
import threading
import time

import numpy as np
import pytest

from kvwire.errors import InternalError, TransferCancelled, UsageError
from kvwire.kernels.staging import Inbound, PinnedRing, send_chunks

SLOT_BYTES = 512
POISON = 0xA5


class Event:
    def __init__(self):
        self.reached, self.error = threading.Event(), None

    def done(self):
        return self.reached.is_set() and self.error is None

    def wait(self):
        assert self.reached.wait(60)
        if self.error:
            raise self.error


class Stream(threading.Thread):
    """Runs what is enqueued in order; after an error nothing more, as a lost context."""

    def __init__(self, seed=0):
        super().__init__(daemon=True)
        self.work, self.error, self.rng = queue.Queue(), None, random.Random(seed)
        self.start()

    def run(self):
        while (item := self.work.get()) is not None:
            task, event = item
            if self.rng.random() < 0.5:
                time.sleep(self.rng.random() / 1000)
            try:
                if self.error is None:
                    task()
            except Exception as error:
                self.error = error
            if event:
                event.error = self.error
                event.reached.set()


class Device:
    """Device memory is a numpy array; a handle is a slice of it."""

    def __init__(self):
        self.pinned_rooms, self.streams, self.fail_at, self.copies = [], [], None, 0

    def pinned(self, count):
        self.pinned_rooms.append(np.full(count, POISON, np.uint8))
        return self.pinned_rooms[-1]

    def stream(self):
        self.streams.append(Stream(len(self.streams)))
        return self.streams[-1]

    def record(self, stream):
        event = Event()
        stream.work.put((lambda: None, event))
        return event

    def wait_for(self, stream, event):
        stream.work.put((event.wait, None))

    def _copy(self, target, source):
        if self.copies == self.fail_at:
            raise InternalError("the device's context is lost")
        self.copies += 1
        target[...] = source

    def to_host(self, room, source, stream):
        stream.work.put((lambda: self._copy(room, source), None))

    def to_device(self, target, room, stream):
        stream.work.put((lambda: self._copy(target, room), None))

    def close(self):
        for stream in self.streams:
            stream.work.put((lambda: None, None))
            stream.work.put(None)
            stream.join(60)


@pytest.fixture
def device():
    made = Device()
    yield made
    made.close()


class Job:
    """Chunks of device memory that a kernel has yet to fill; their sizes are known afterwards."""

    def __init__(self, device, count, seed=1):
        rng = np.random.default_rng(seed)
        self.device = device
        self.content = [rng.integers(0, 256, rng.integers(1, SLOT_BYTES + 1), np.uint8)
                        for _ in range(count)]
        self.memory = np.full((count, SLOT_BYTES), POISON, np.uint8)
        self.sizes = np.full(count, -1)

    def enqueue(self, chunk, stream):
        def kernel():
            content = self.content[chunk]
            self.memory[chunk, :len(content)] = content
            self.sizes[chunk] = len(content)
        stream.work.put((kernel, None))
        event = self.device.record(stream)

        def size():
            event.wait()
            count = int(self.sizes[chunk])
            return self.memory[chunk, :count], count
        return size


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_chunks_arrive_whole_and_in_order(device, slots):
    job, ring, stream = Job(device, 60), PinnedRing(device, slots, SLOT_BYTES), device.stream()
    ready = Event()
    threading.Timer(0.02, ready.reached.set).start()
    wire, arrived = queue.Queue(), []

    def send():
        while (item := wire.get()) is not None:
            chunk, slot, count = item
            arrived.append((chunk, slot.room[:count].copy()))
            slot.room[:] = POISON
            slot.release()
    sender = threading.Thread(target=send)
    sender.start()
    send_chunks(device, ring, stream, ready, range(60), job.enqueue,
                lambda *item: wire.put(item))
    wire.put(None)
    sender.join(60)
    assert [chunk for chunk, _ in arrived] == list(range(60))
    for (_, got), want in zip(arrived, job.content):
        np.testing.assert_array_equal(got, want)
    assert ring.free_count == slots and len(device.pinned_rooms) == slots


def test_copies_go_on_while_the_wire_holds_a_chunk(device):
    job, ring, stream = Job(device, 6), PinnedRing(device, 4, SLOT_BYTES), device.stream()
    held = queue.Queue()
    ready = Event()
    ready.reached.set()
    staging = threading.Thread(target=send_chunks, args=(
        device, ring, stream, ready, range(6), job.enqueue, lambda *item: held.put(item)))
    staging.start()
    out = [held.get(timeout=60) for _ in range(4)]  # nothing was given back, and yet four came
    assert [chunk for chunk, *_ in out] == [0, 1, 2, 3] and ring.free_count == 0
    for _, slot, _ in out:
        slot.release()
    rest = [held.get(timeout=60) for _ in range(2)]
    staging.join(60)
    assert not staging.is_alive()
    for _, slot, _ in rest:
        slot.release()
    assert ring.free_count == 4


@pytest.mark.parametrize("fail_at", [0, 3, 9])
def test_a_lost_context_gives_the_memory_back(device, fail_at):
    job, ring, stream = Job(device, 12), PinnedRing(device, 3, SLOT_BYTES), device.stream()
    device.fail_at = fail_at
    ready, delivered = Event(), []
    ready.reached.set()

    def deliver(chunk, slot, count):
        delivered.append(chunk)
        slot.release()
    with pytest.raises(InternalError, match="context is lost"):
        send_chunks(device, ring, stream, ready, range(12), job.enqueue, deliver)
    assert delivered == list(range(len(delivered))) and len(delivered) <= fail_at
    assert ring.free_count == 3


def test_a_chunk_that_is_too_large_is_refused(device):
    job, ring, stream = Job(device, 3), PinnedRing(device, 2, 1), device.stream()
    job.content[1] = np.zeros(2, np.uint8)
    job.content[0] = job.content[2] = np.ones(1, np.uint8)
    ready = Event()
    ready.reached.set()
    with pytest.raises(UsageError, match="slot"):
        send_chunks(device, ring, stream, ready, range(3), job.enqueue,
                    lambda chunk, slot, count: slot.release())
    assert ring.free_count == 2


def test_closing_the_ring_wakes_who_waits(device):
    job, ring, stream = Job(device, 4), PinnedRing(device, 1, SLOT_BYTES), device.stream()
    ready, held = Event(), queue.Queue()
    ready.reached.set()

    def close():
        held.get(timeout=60)
        ring.close()
    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(TransferCancelled):
        send_chunks(device, ring, stream, ready, range(4), job.enqueue,
                    lambda *item: held.put(item))
    closer.join(60)


@pytest.mark.parametrize("slots", [1, 3])
def test_received_chunks_reach_their_pages(device, slots):
    content = Job(device, 40).content
    ring, stream = PinnedRing(device, slots, SLOT_BYTES), device.stream()
    coded, pages = (np.full((40, SLOT_BYTES), POISON, np.uint8) for _ in range(2))

    def land(chunk, count, stream):
        def decode():
            pages[chunk, :count] = coded[chunk, :count] ^ 0xFF
        stream.work.put((decode, None))
    inbound = Inbound(device, ring, stream,
                      lambda chunk: coded[chunk, :len(content[chunk])], land)
    for chunk, data in enumerate(content):
        slot = inbound.slot()
        slot.room[:len(data)] = data  # as recv_into does
        inbound.submit(chunk, slot, len(data))
    inbound.finish()
    for chunk, data in enumerate(content):
        np.testing.assert_array_equal(pages[chunk, :len(data)], data ^ 0xFF)
    assert ring.free_count == slots and (pages[0, len(content[0]):] == POISON).all()


def test_a_failed_landing_gives_the_memory_back(device):
    device.fail_at = 2
    ring, stream = PinnedRing(device, 3, SLOT_BYTES), device.stream()
    target = np.zeros(SLOT_BYTES, np.uint8)
    inbound = Inbound(device, ring, stream, lambda chunk: target, lambda *item: None)
    with pytest.raises(InternalError):
        for chunk in range(9):
            inbound.submit(chunk, inbound.slot(), SLOT_BYTES)
        inbound.finish()
    with pytest.raises(InternalError):
        inbound.finish()
    assert ring.free_count == 3


def test_slots_are_given_back_once(device):
    ring = PinnedRing(device, 1, SLOT_BYTES)
    slot = ring.acquire()
    assert ring.try_acquire() is None
    slot.release()
    with pytest.raises(UsageError):
        slot.release()
    with pytest.raises(UsageError):
        PinnedRing(device, 0, 1)
