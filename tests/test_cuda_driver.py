"""The code that talks to the CUDA driver meets one: tests/simt plays it, strictly."""

import gc
import threading

import numpy as np
import pytest
from cuda_driver import DriverArrays, cuda
from test_staging import SMALL, Cache, hybrid
from test_staging_faults import small_spec

import kvwire
from kvwire import _native
from kvwire.control import Item
from kvwire.errors import InternalError, KvwireError, LimitError
from kvwire.kernels import backends, driver
from kvwire.kernels.cuda_backend import CudaBackend
from kvwire.kernels.cuda_device import CudaDevice
from kvwire.kernels.driver import Driver

__all__ = ["cuda"]


def staging(**options):
    return kvwire.Staging(**{**SMALL, **options})


def moved(spec, source, target, codec, **options):
    """Carry a cache from one device to another over loopback TCP."""
    with kvwire.Receiver(staging=staging()) as receiver, \
            kvwire.Sender(receiver.address, codec=codec, staging=staging(**options)) as sender:
        ticket = receiver.expect(target.memory)
        transfer = sender.send(ticket.id, source.memory)
        ticket.result(60)
        transfer.result(60)


def on_device(spec, ordinal, seed, **options):
    return Cache(spec, DriverArrays(Driver(ordinal), f"cuda:{ordinal}"), seed, **options)


@pytest.mark.parametrize("maps_ring", [False, True], ids=["copied", "mapped"])
@pytest.mark.parametrize("codec", ["raw", "tiered"])
def test_a_cache_goes_from_device_to_device(cuda, codec, maps_ring):
    spec = hybrid()
    source, target = on_device(spec, 0, 1), on_device(spec, 1, 2, writable=True)
    before = cuda.current()
    moved(spec, source, target, codec, maps_ring=maps_ring)
    assert cuda.current() == before
    assert target.content(spec) == source.content(spec)
    assert cuda.end() == ""


def test_what_was_uploaded_is_there_on_any_stream(cuda):
    data = np.random.default_rng(1).integers(0, 256, 100_000, np.uint8)
    backend = CudaBackend(Driver())
    stream = CudaDevice(Driver()).stream()
    for _ in range(5):
        crc = backend.prepare("crc32c", np.array([[0, len(data)]]), backend.upload(data))
        crc.enqueue(stream)
        backend._driver.call("cuStreamSynchronize", driver.ctypes.c_void_p(stream))
        assert crc.results().tolist() == [_native.crc32c(data.tobytes())]


def test_a_thread_needs_no_context_and_keeps_the_one_it_has(cuda):
    before, failed = cuda.current(), []
    backend = backends.load("cuda")
    assert cuda.current() == before

    def call():
        try:
            data = backend.upload(np.zeros(4096, np.uint8))
            assert backend.crc32c(np.array([[0, 4096]]), data).tolist() == [
                _native.crc32c(bytes(4096))]
            assert cuda.current() == -1
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    assert not failed
    other = CudaDevice(Driver(1))
    event, pinned = other.engine_event(), other.pinned(100)
    event.wait()
    del event, pinned
    assert cuda.current() == before


def test_nothing_to_do_is_no_launch(cuda):
    backend = backends.load("cuda")
    assert backend.crc32c(np.zeros((0, 2), np.int64), backend.empty(1)).tolist() == []


def outcomes(receiver, sender, source, target):
    """Carry a cache; return what each side says of it, None: that it arrived."""
    said = []
    try:
        ticket = receiver.expect(target.memory)
    except KvwireError as error:
        return [error]
    try:
        handles = [sender.send(ticket.id, source.memory), ticket]
    except KvwireError as error:
        said.append(error)
        ticket.cancel()
        handles = [ticket]
    for handle in handles:
        try:
            handle.result(60)
            said.append(None)
        except KvwireError as error:
            said.append(error)
    return said


ROOM_CALLS = ("cuMemAlloc_v2", "cuMemHostAlloc", "cuStreamCreateWithPriority", "cuEventCreate")


@pytest.mark.parametrize("call", ROOM_CALLS)
def test_a_call_that_finds_no_room_fails_its_transfer_only(cuda, call):
    spec, nth = small_spec(), 0
    source, target = on_device(spec, 0, 1), on_device(spec, 0, 2, writable=True)
    held = cuda.held()
    while True:
        nth += 1
        with kvwire.Receiver(staging=staging()) as receiver, \
                kvwire.Sender(receiver.address, codec="tiered", staging=staging()) as sender:
            before = cuda.calls(call)
            cuda.fail(call, nth)
            said = outcomes(receiver, sender, source, target)
            if cuda.calls(call) - before < nth:
                break
            assert any(isinstance(error, LimitError) for error in said), (nth, said)
            again = outcomes(receiver, sender, source, target)
            assert again == [None, None], (nth, said, again)
        assert target.content(spec, [0]) == source.content(spec, [0])
    assert said == [None, None] and nth > 3
    del receiver, sender, said
    cuda.wait_held(held)


def test_memory_is_freed_after_what_was_enqueued_on_it(cuda):
    """Whether staging is closed at once, or was never whole."""
    def refused(nth):
        count = 0
        with kvwire.Receiver(staging=staging()) as receiver, \
                kvwire.Sender(receiver.address, staging=staging()) as sender:
            for endpoint in (receiver, sender):
                cuda.slow(20_000)
                cuda.fail("cuMemAlloc_v2", nth)
                try:
                    endpoint._staged_for("cuda:0")
                except LimitError:
                    count += 1
        return count

    backends.open_device("cuda:0")
    counts = []
    for nth in range(1, 15):
        counts.append(refused(nth))
        gc.collect()
        assert cuda.end() == ""
    assert counts[0] == 2 and counts[-1] == 0


@pytest.mark.parametrize("maps_ring", [False, True], ids=["copied", "mapped"])
def test_a_context_lost_anywhere_fails_all_and_leaves_nothing(cuda, maps_ring):
    spec, nth = small_spec(), 1
    source, target = on_device(spec, 0, 1), on_device(spec, 0, 2, writable=True)
    device = backends.open_device("cuda:0")
    held = cuda.held()
    while True:
        with kvwire.Receiver(staging=staging()) as receiver, \
                kvwire.Sender(receiver.address, codec="tiered",
                              staging=staging(maps_ring=maps_ring)) as sender:
            cuda.fail("*", nth, 700)
            said = outcomes(receiver, sender, source, target)
            if said == [None, None]:  # lost later, if at all
                break
            assert any(isinstance(error, InternalError) for error in said), (nth, said)
            with pytest.raises(InternalError, match="context is lost"):
                device.pinned(100)
        del receiver, sender, said
        assert cuda.end() == ""
        cuda.wait_held(held)
        nth += 7
    assert nth > 50
    cuda.end()
