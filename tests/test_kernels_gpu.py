"""Prepared calls of the CUDA kernels in a CUDA graph."""

import numpy as np
import pytest

import kvwire
from kvwire import _native
from kvwire.kernels import backends
from kvwire.kernels.code_plan import CodePlan, Payload
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.layout import CacheSpec, DType, attention
from kvwire.tiered import CodeTable, Part

pytestmark = pytest.mark.gpu
SPEC = CacheSpec("m", (attention([0], kv_heads=4, head_dim=128, block_tokens=16),))
TOKENS, BLOCKS, CHUNK_BYTES = 4000, 300, 256 << 10


def test_a_graph_captures_and_replays_all_that_moves_a_cache():
    torch = pytest.importorskip("torch")
    backend, generator = backends.load("cuda"), torch.Generator("cuda").manual_seed(1)

    def values():
        return {(0, name): torch.randn((BLOCKS, 16, 4, 128), generator=generator, device="cuda"
                                       ).to(torch.bfloat16) for name in "kv"}
    mine, theirs = values(), values()
    ids = torch.randperm(BLOCKS, generator=generator, device="cuda")[:TOKENS // 16].tolist()
    source, target = (CopyPlan.of_items(SPEC, memory.items(0), memory) for memory in (
        kvwire.CacheMemory(SPEC, arrays, tokens=TOKENS, block_ids=ids, writable=True)
        for arrays in (mine, theirs)))

    def raw():
        return b"".join(mine[0, name][ids].view(torch.uint8).cpu().numpy().tobytes()
                        for name in "kv")
    first = raw()
    table = CodeTable.of_elements(first[:1 << 20], DType.BF16)
    cut = [(at, min(CHUNK_BYTES, len(first) - at)) for at in range(0, len(first), CHUNK_BYTES)]
    codes = CodePlan.of_chunks([(at, [Part(count, table)]) for at, count in cut])
    segment, out = backend.empty(source.bytes), backend.empty(codes.out_bytes)
    sizes, _ = backend.encode(codes, source, out)
    coded, slots = backend.upload(backend.download(out)), backend.download(out)
    payloads = [Payload(slots[slot:slot + size].tobytes(), int(slot), at, count)
                for (at, count), slot, size in zip(cut, codes.chunks[:, 2], sizes)]
    calls = {"pack": backend.prepare("pack", source, segment),
             "encode": backend.prepare("encode", codes, source, out),
             "decode": backend.prepare("decode", payloads, coded, target),
             "unpack": backend.prepare("unpack", target, segment)}
    graphs = {name: torch.cuda.CUDAGraph() for name in calls}
    for name, call in calls.items():
        call.enqueue(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graphs[name]):
            call.enqueue(torch.cuda.current_stream().cuda_stream)

    def replay(name):
        graphs[name].replay()
        torch.cuda.synchronize()
        return calls[name].results()
    for array in theirs.values():
        array.zero_()
    invalid, crcs = replay("decode")
    assert not invalid.any()
    assert crcs.tolist() == [_native.crc32c(first[at:at + count]) for at, count in cut]
    for name in "kv":
        assert torch.equal(theirs[0, name][ids], mine[0, name][ids])
    for _ in range(2):  # each replay takes what lies there
        for key, array in values().items():
            mine[key].copy_(array)
        now = raw()
        replay("pack")
        assert backend.download(segment).tobytes() == now
        sizes, crcs = replay("encode")
        assert crcs.tolist() == [_native.crc32c(now[at:at + count]) for at, count in cut]
        slots = backend.download(out)
        for (at, count), slot, size in zip(cut, codes.chunks[:, 2], sizes):
            assert _native.tiered_decode(slots[slot:slot + size].tobytes(), count, {}) == \
                now[at:at + count]
        replay("unpack")
        for name in "kv":
            assert torch.equal(theirs[0, name][ids], mine[0, name][ids])
    assert np.unique(sizes).size > 1
