"""Staging with Triton's kernels, in the interpreter: the bytes of the CPU's codec, in place."""

import numpy as np
import pytest
from standin_triton import StandInTriton
from test_staging import Cache, gauss

import kvwire
from kvwire import plan
from kvwire.errors import UnsupportedError, UsageError
from kvwire.kernels import backends
from kvwire.kernels.code_plan import CodePlan, Payload, ReadPlan
from kvwire.kernels.copy_plan import BLOCK_COUNT, CopyPlan
from kvwire.kernels.cpu_backend import CpuBackend
from kvwire.kernels.triton_stages import DecodeStage, EncodeStage, laid
from kvwire.layout import CacheSpec, attention, convolution, recurrent
from kvwire.tiered import CodeTable, Part

TOKENS, CHUNK_BYTES = 110, 4096


@pytest.fixture
def device():
    return StandInTriton()


def hybrid(block_tokens=16, order="NHD"):
    return CacheSpec("hybrid", (
        attention([0], kv_heads=2, head_dim=16, block_tokens=block_tokens, order=order),
        recurrent([1], heads=1, key_dim=16, value_dim=16), convolution([1], 32, columns=3)))


def staging(device):
    return kvwire.Staging(device=device, ring_bytes=1 << 20, slice_bytes=64 << 10)


@pytest.mark.parametrize("codec, sides", [
    ("raw", "device to device"), ("tiered", "device to host"), ("tiered", "host to device"),
    pytest.param("tiered", "device to device", marks=pytest.mark.long)])
def test_a_hybrid_cache_arrives_bit_for_bit(device, codec, sides):
    theirs, ours = (device if side == "device" else None for side in sides.split(" to "))
    spec, held = hybrid(), hybrid(8, "HND")
    source = Cache(spec, theirs, 1, tokens=TOKENS)
    target = Cache(held, ours, 2, writable=True, tokens=TOKENS)
    if theirs is None:
        for key, array in source.arrays.items():
            array[...] = gauss(np.random.default_rng(3), array.shape, array.dtype.name)
    with kvwire.Receiver(staging=staging(device)) as receiver, kvwire.Sender(
            receiver.address, codec=codec, staging=staging(device),
            chunk_bytes=CHUNK_BYTES) as sender:
        assert sender.stats()["staging"] == ""
        ticket = receiver.expect(target.memory)
        transfer = sender.send(ticket.id, source.memory)
        assert ticket.result(100).repaired_chunks == 0
        progress = transfer.result(100)
        for side, endpoint in ((theirs, sender), (ours, receiver)):
            assert endpoint.stats()["staging"] == ("cuda:0 triton" if side else "")
    assert target.content(spec, [0, 1]) == source.content(spec, [0, 1])
    if codec == "tiered":
        assert progress.wire_bytes < 0.9 * progress.verified_bytes


class Segment:
    """Keys and values of a layer, and how they are cut: the middle chunk stays raw."""

    def __init__(self, device):
        self.spec = hybrid()
        self.cache = Cache(self.spec, device, 1, tokens=TOKENS, writable=True)
        for array in self.cache.arrays.values():
            array[...] = gauss(np.random.default_rng(4), array.shape, array.dtype.name)
        self.items = self.cache.memory.items(0)
        self.copies = CopyPlan.of_items(self.spec, self.items, self.cache.memory)
        self.raw = plan.gather(self.spec, self.items, self.cache.memory.leaves)
        table = CodeTable.of_elements(self.raw, self.spec.groups[0].tensors[0].dtype)
        cut = [(at, min(CHUNK_BYTES, len(self.raw) - at))
               for at in range(0, len(self.raw), CHUNK_BYTES)]
        self.codes = CodePlan.of_chunks([
            (at, count if at == CHUNK_BYTES else [Part(count, table)]) for at, count in cut])


def test_a_slice_is_coded_as_on_the_cpu(device):
    segment, cpu, stream = Segment(device), CpuBackend(), device.stream()
    stage = EncodeStage(device, 0.5, 64 << 10, stream)
    stage.enqueue(segment.copies, segment.codes, stream)
    made = [(device.tensor(address, count).numpy().tobytes(), crc)
            for address, count, crc in stage.results()]
    out = cpu.empty(segment.codes.out_bytes)
    sizes, crcs = cpu.encode(segment.codes, segment.copies, out)
    assert made == [(out[at:at + size].tobytes(), crc) for at, size, crc
                    in zip(segment.codes.chunks[:, 2], sizes, crcs.tolist())]
    assert stage.raw_bytes == len(segment.raw) and sizes[1] == CHUNK_BYTES > sizes[0]


def test_payloads_in_any_order_touch_only_their_own_pages(device):
    segment, cpu, stream = Segment(device), CpuBackend(), device.stream()
    out = cpu.empty(segment.codes.out_bytes)
    sizes, crcs = cpu.encode(segment.codes, segment.copies, out)
    leaves = segment.cache.memory.leaves
    plan.scatter(segment.spec, segment.items, leaves, bytes(len(segment.raw)))
    chosen, payloads, at = [len(sizes) - 1, 1, 0], [], 0  # 2 and more are not there
    for number in chosen:
        raw_at, raw_bytes, slot = segment.codes.chunks[number, :3].tolist()
        coded = out[slot:slot + int(sizes[number])].copy()
        payloads.append(Payload(memoryview(coded), at, raw_at, raw_bytes, number == 1))
        at += len(coded) + -len(coded) % 16
    assert laid(payloads)[1] == [(0, 0, 2 * CHUNK_BYTES), (
        2 * CHUNK_BYTES, payloads[0].raw_offset, len(segment.raw))]
    stage = DecodeStage(device, 0.5, 64 << 10, stream)
    stage.enqueue(segment.copies, payloads, ReadPlan.of_payloads(payloads), stream)
    assert stage.results() == [(0, int(crcs[number])) for number in chosen]
    gap = slice(2 * CHUNK_BYTES, payloads[0].raw_offset)
    want = bytearray(segment.raw)
    want[gap] = bytes(gap.stop - gap.start)
    assert gap.stop > gap.start
    assert plan.gather(segment.spec, segment.items, leaves) == want


def test_a_block_id_out_of_range_is_reported(device):
    segment, stream = Segment(device), device.stream()
    segment.copies.block_ids[3] = segment.copies.legs[0, BLOCK_COUNT]
    stage = EncodeStage(device, 0.5, 64 << 10, stream)
    stage.enqueue(segment.copies, segment.codes, stream)
    with pytest.raises(UsageError, match="entry 3 of the segment's block tables"):
        stage.results()


def test_triton_stages_where_the_cuda_kernels_cannot(monkeypatch):
    cannot = {"cuda"}
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.setattr(backends, "obstacle", lambda name: "no fatbin" if name in cannot else "")
    monkeypatch.setattr(backends, "_device", backends._device.__wrapped__)
    made = kvwire.Staging().open("cuda:1")
    assert (made.backend, str(made.device)) == ("triton", "cuda:1")
    monkeypatch.setenv(backends.VARIABLE, "cpu")
    with pytest.raises(UnsupportedError, match="on cuda:1.*'cpu'.*no fatbin"):
        kvwire.Staging().open("cuda:1")
    cannot.clear()
    monkeypatch.setenv(backends.VARIABLE, "triton")
    assert kvwire.Staging().open("cuda:0").backend == "triton"
    with pytest.raises(UsageError, match="maps_ring"):
        kvwire.Staging(maps_ring=True).open("cuda:0")
