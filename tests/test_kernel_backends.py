"""Every back end, where its kernels can run without a GPU: the same bytes, the same errors."""

import ctypes

import numpy as np
import pytest
from cuda_driver import cuda  # noqa: F401
from cuda_host import aligned, launch, library
from test_plan import Side
from test_tiered import kinds_of_bytes
from triton_interpreter import torch  # noqa: F401

import kvwire
from kvwire import _native, plan
from kvwire.control import Item
from kvwire.errors import ErrorCode, InternalError, LimitError, UnsupportedError, UsageError
from kvwire.kernels import backends, driver
from kvwire.kernels.code_plan import CodePlan, Payload
from kvwire.kernels.copy_plan import BLOCK_COUNT, CopyPlan
from kvwire.kernels.cpu_backend import CpuBackend
from kvwire.kernels.cuda_backend import CudaBackend
from kvwire.kernels.triton_backend import TritonBackend
from kvwire.layout import CacheSpec, DType, attention
from kvwire.tiered import CodeTable, Part, encode_tiered


class HostDriver:
    """Stands for the driver: the device's memory is the CPU's, kernels run there at once."""

    multiprocessors = 2

    def __init__(self):
        self.library, self.rooms, self.freed = library(), {}, 0

    def allocate(self, count):
        room = aligned(max(count, 1))
        self.rooms[room.ctypes.data] = room
        return room.ctypes.data

    def free(self, address):
        del self.rooms[address]
        self.freed += 1

    def write(self, address, data):
        self.rooms[address][:data.nbytes] = data.reshape(-1).view(np.uint8)

    def read(self, address, data):
        data.view(np.uint8)[:] = self.rooms[address][:data.nbytes]

    def copy_async(self, target, source, count, stream):
        self.rooms[target][:count] = self.rooms[source][:count]

    def launch(self, kernel, grid, args, stream):
        launch(self.library, kernel, grid, driver.THREADS, args)


@pytest.fixture(params=["cpu", "cuda", "cuda over its driver", "triton"])
def backend(request):
    if request.param == "cuda over its driver":
        request.getfixturevalue("cuda")
        made = backends.load("cuda")
        yield made
        del made._crc_tables  # the request still holds the rest
    elif request.param == "cuda":
        yield CudaBackend(HostDriver())
    else:
        yield TritonBackend("cpu") if request.param == "triton" else CpuBackend()


def paged(seed, block_tokens):
    spec = CacheSpec("m", (attention([3], kv_heads=2, head_dim=16, block_tokens=block_tokens),))
    return spec, Side(spec, (0, 11), seed, writable=True)


def test_pages_to_pages(backend):
    (sent, source), (_, target) = paged(1, 8), paged(2, 4)
    for array in source.arrays.values():
        array[...] = np.frombuffer(kinds_of_bytes("gauss", 2 * array.size, 2, 5),
                                   np.uint16).reshape(array.shape)
    items = [Item(0, 0, 3, 0, 11), Item(0, 1, 3, 0, 11)]
    raw = plan.gather(sent, items, source.memory.leaves)
    half = len(raw) // 2
    reading = CopyPlan.of_items(sent, items, source.memory)
    writing = CopyPlan.of_items(sent, items, target.memory)
    segment = backend.empty(len(raw))
    backend.pack(reading, segment)
    assert backend.download(segment).tobytes() == raw

    table = CodeTable.of_elements(raw, DType.BF16)
    parts = [[Part(half, table, table_index=7)], [Part(half, table)]]
    codes = CodePlan.of_chunks([(0, parts[0]), (half, parts[1])])
    wanted = [encode_tiered(raw[at:at + half], part) for at, part in zip((0, half), parts)]
    assert all(len(coded) < half for coded in wanted)
    crcs = [_native.crc32c(raw[:half]), _native.crc32c(raw[half:])]
    for place in (segment, reading):
        out = backend.empty(codes.out_bytes)
        sizes, made = backend.encode(codes, place, out)
        slots = backend.download(out)
        assert [slots[at:at + size].tobytes() for at, size in zip(codes.chunks[:, 2], sizes)] == \
            wanted
        assert made.tolist() == crcs

    payloads = [Payload(wanted[0], 0, 0, half), Payload(wanted[1], len(wanted[0]), half, half)]
    coded = backend.upload(np.frombuffer(b"".join(wanted), np.uint8))
    invalid, made = backend.decode(payloads, coded, writing, {7: table}.get)
    assert (invalid.tolist(), made.tolist()) == ([False, False], crcs)
    assert plan.gather(sent, items, target.memory.leaves) == raw

    for array in target.arrays.values():
        array[...] = 0
    backend.unpack(writing, segment)
    assert plan.gather(sent, items, target.memory.leaves) == raw
    chunks = np.array([(0, half), (3, 501)], np.int64)
    assert backend.crc32c(chunks, segment).tolist() == [crcs[0], _native.crc32c(raw[3:504])]


def test_a_flipped_literal_is_reported_by_chunk(backend):
    raw = kinds_of_bytes("specials", 2 * 500, 2, 1)
    good = encode_tiered(raw, [Part(len(raw), CodeTable.of_elements(raw, DType.BF16))])
    index_at = 16 + 48 + 16
    bad = bytearray(good)
    bad[index_at] ^= 1  # the tail's length: the padding hides it, the planes do not
    coded = backend.upload(np.frombuffer(good + bytes(bad), np.uint8))
    target = backend.empty(2 * len(raw))
    payloads = [Payload(good, 0, 0, len(raw)), Payload(bytes(bad), len(good), len(raw), len(raw))]
    assert backend.decode(payloads, coded, target)[0].tolist() == [False, True]
    assert backend.download(target)[:len(raw)].tobytes() == raw


@pytest.mark.parametrize("head_dim", [16, 1])
def test_bf16_is_packed_as_fp8(backend, head_dim):
    spec = CacheSpec("m", (attention([0], kv_heads=1, head_dim=head_dim, block_tokens=4096),))
    side = Side(spec, (0, 65_536 // head_dim), 1, writable=True)
    bits = np.random.default_rng(1).permutation(65_536).astype(np.uint16)  # every bf16 there is
    for array in side.arrays.values():
        array[...] = np.resize(bits, array.shape)
    copies = CopyPlan.of_items(spec, [Item(0, 0, 0, 0, 65_536 // head_dim)], side.memory)
    raw = np.frombuffer(plan.gather(spec, [Item(0, 0, 0, 0, 65_536 // head_dim)],
                                    side.memory.leaves), np.uint16)
    segment = backend.empty(copies.bytes // 2)
    backend.pack_e4m3(copies, segment)
    values = torch.from_numpy(raw.astype(np.int32) << 16).view(torch.float32)
    want = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(backend.download(segment), want)


@pytest.mark.parametrize("backend", ["cuda", "cuda over its driver", "triton"], indirect=True)
def test_a_bad_block_id_is_an_error(backend):
    spec, side = paged(3, 4)
    copies = CopyPlan.of_items(spec, [Item(0, 0, 3, 0, 11)], side.memory)
    copies.block_ids[1] = copies.legs[0, BLOCK_COUNT]
    for verb in (backend.pack, backend.unpack):
        with pytest.raises(UsageError, match="entry 1 of the segment's block tables"):
            verb(copies, backend.empty(copies.bytes))


def test_prepared_calls_run_again_and_touch_nothing_else(monkeypatch):
    host = HostDriver()
    backend, (spec, side) = CudaBackend(host), paged(1, 8)
    items = [Item(0, 0, 3, 0, 11), Item(0, 1, 3, 0, 11)]
    pages = CopyPlan.of_items(spec, items, side.memory)
    segment, target = backend.empty(pages.bytes), backend.empty(pages.bytes)
    table = CodeTable.of_elements(kinds_of_bytes("gauss", pages.bytes, 2, 5), DType.BF16)
    codes = CodePlan.of_chunks([(0, [Part(pages.bytes, table)])])
    out = backend.empty(codes.out_bytes)
    coded = encode_tiered(bytes(pages.bytes), [Part(pages.bytes, table)])
    payload = backend.upload(np.frombuffer(coded, np.uint8))
    calls = [backend.prepare("pack", pages, segment), backend.prepare("encode", codes, pages, out),
             backend.prepare("crc32c", np.array([(0, 16)]), segment),
             backend.prepare("decode", [Payload(coded, 0, 0, pages.bytes)], payload, target)]
    for seed in (6, 7):
        for array in side.arrays.values():
            array[...] = np.frombuffer(kinds_of_bytes("gauss", 2 * array.size, 2, seed),
                                       np.uint16).reshape(array.shape)
        raw = plan.gather(spec, items, side.memory.leaves)
        host.write(target.address, np.full(pages.bytes, 7, np.uint8))
        with monkeypatch.context() as forbidden:  # as while a graph captures, or replays
            for name in ("allocate", "free", "write", "read"):
                forbidden.setattr(host, name, None)
            for call in calls:
                call.enqueue(5)
        packed, (sizes, crcs), first, decoded = (call.results() for call in calls)
        assert packed is None and backend.download(segment).tobytes() == raw
        assert crcs.tolist() == [_native.crc32c(raw)]
        assert backend.download(out)[:sizes[0]].tobytes() == encode_tiered(
            raw, [Part(len(raw), table)])
        assert first.tolist() == [_native.crc32c(raw[:16])]
        assert decoded[0].tolist() == [False] and not backend.download(target).any()


def test_device_memory_is_freed():
    host = HostDriver()
    backend = CudaBackend(host)
    for _ in range(3):
        backend.upload(np.zeros(99, np.uint8))
    del backend
    assert host.freed == 4 and not host.rooms


def test_wrong_tensors_are_refused():
    backend = TritonBackend("cpu")
    spec, side = paged(3, 4)
    copies = CopyPlan.of_items(spec, [Item(0, 0, 3, 0, 11)], side.memory)
    for segment in (torch.zeros(copies.bytes, dtype=torch.int8),
                    torch.zeros(2 * copies.bytes, dtype=torch.uint8)[::2],
                    torch.zeros(copies.bytes - 1, dtype=torch.uint8),
                    torch.zeros(copies.bytes, dtype=torch.uint8, device="meta")):
        with pytest.raises(UsageError):
            backend.pack(copies, segment)


def test_the_back_end_is_chosen_in_one_place(monkeypatch):
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    usable = [name for name in backends.BACKENDS if not backends.obstacle(name)]
    assert usable[-1] == "cpu"
    assert backends.choose() == usable[0] == kvwire.backends()["backend"]
    monkeypatch.setenv(backends.VARIABLE, "cpu")
    assert backends.choose() == kvwire.backends()["backend"] == backends.load().name == "cpu"
    with pytest.raises(UsageError):
        backends.choose("rocm")
    for name in set(backends.BACKENDS) - set(usable):
        with pytest.raises(UnsupportedError, match=name):
            backends.choose(name)


@pytest.mark.parametrize("result, kind", [(2, LimitError), (100, UnsupportedError),
                                          (700, InternalError), (719, InternalError)])
def test_driver_errors_have_types(result, kind):
    error = driver.error_of(result, "cuLaunchKernel")
    assert type(error) is kind and str(result) in f"{error} {error.actual}"
    assert kind is not LimitError or error.code == ErrorCode.RESOURCES_EXHAUSTED
