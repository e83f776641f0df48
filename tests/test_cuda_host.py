"""The CUDA kernels on a CPU: bit for bit what planner and reference say, in whatever order blocks
and threads run."""

import numpy as np
import pytest
from cuda_host import NO_BAD_ENTRY, Host, aligned, aligned_copy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import CARRIERS, Side, sides
from test_tiered import KINDS, code_tables, kinds_of_bytes

from kvwire import _native, plan
from kvwire.control import Item
from kvwire.errors import ErrorCode, KvwireError, UnsupportedError
from kvwire.kernels.code_plan import PERIOD_MAX, CodePlan, Payload
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.cuda_backend import tiles_of
from kvwire.kernels.driver import THREADS
from kvwire.layout import CacheSpec, DType, attention
from kvwire.tiered import CodeTable, Part, decode_tiered, element_format, encode_tiered


@pytest.fixture(scope="module", params=[(1 << 30, 0), (1, 1), (3, 2)],
                ids=["forward", "one block backward", "three blocks shuffled"])
def host(request):
    return Host(*request.param)


@settings(max_examples=60)
@given(sides(), st.integers(0, 2**32),
       st.sampled_from([(1, 1), (4, 16), (32, 64), (256, 2), (1, 4096)]))
def test_copies_equal_the_planner(host, pair, seed, shape):
    sent, held, tokens = pair
    source, target = Side(sent, tokens, seed), Side(held, tokens, seed + 1, writable=True)
    source.fill()
    items = source.memory.items(sent.groups[0].layers[0])
    reading = CopyPlan.of_items(sent, items, source.memory)
    writing = CopyPlan.of_items(sent, items, target.memory)
    segment = aligned(reading.bytes)
    host.copy(reading, segment, True, *shape)
    data = plan.gather(sent, items, source.memory.leaves)
    assert segment.tobytes() == data

    chunks = [(at, min(1000, len(data) - at)) for at in range(0, len(data), 1000)]
    crcs = [_native.crc32c(data[at:at + size]) for at, size in chunks]
    assert host.crc(chunks, reading) == host.crc(chunks, segment) == crcs

    before = target.snapshot()
    plan.scatter(sent, items, target.memory.leaves, data)
    expected = target.snapshot()
    target.restore(before)
    host.copy(writing, segment, False, *shape)
    for raw, want in zip(target.storage, expected):
        np.testing.assert_array_equal(raw, want)
    assert host.bad_entry[0] == NO_BAD_ENTRY


class AlignedSide(Side):
    def strided(self, shape, item_bytes):
        self.storage.append(aligned(int(np.prod(shape)) * item_bytes))
        return self.storage[-1].view(CARRIERS[item_bytes]).reshape(shape)


def test_more_legs_than_threads_of_widest_words(host):
    layers = range(THREADS * 5 // 8)
    spec = CacheSpec("m", (attention(layers, kv_heads=1, head_dim=64, block_tokens=16),))
    source, target = AlignedSide(spec, (0, 40), 1), AlignedSide(spec, (0, 40), 2, writable=True)
    source.fill()
    items = [item for layer in layers for item in source.memory.items(layer)]
    reading = CopyPlan.of_items(spec, items, source.memory)
    assert len(reading.legs) > THREADS and reading.word_bytes == 16
    data, segment = plan.gather(spec, items, source.memory.leaves), aligned(reading.bytes)
    rows, words, _ = tiles_of(reading, 16)
    host.copy(reading, segment, True, rows, words)
    assert segment.tobytes() == data
    host.copy(CopyPlan.of_items(spec, items, target.memory), segment, False, rows, words)
    assert plan.gather(spec, items, target.memory.leaves) == data
    chunks = [(at, min(20_000, len(data) - at)) for at in range(0, len(data), 99_983)]
    assert host.crc(chunks, reading) == [_native.crc32c(data[at:at + size]) for at, size in chunks]


@st.composite
def chunks_of_parts(draw):
    """Return raw bytes and the parts that cover them."""
    raw, parts = b"", []
    for number in range(draw(st.integers(1, 3))):
        table = draw(st.none() | code_tables(window=24))
        width = element_format(table.dtype).item_bytes if table else 1
        count = draw(st.sampled_from([1, 7, 8, 33, 4095, 4096, 5000]) | st.integers(1, 9000))
        kind = draw(st.sampled_from(KINDS))
        raw += kinds_of_bytes(kind, count * width, width, draw(st.integers(0, 99))) \
            if width > 1 or table else np.random.default_rng(count).bytes(count)
        position = draw(st.integers(0, table.period - 1)) if table else 0
        parts.append(Part(count * width, table, position, draw(st.sampled_from([0, 5 + number]))))
    return raw, parts


@settings(max_examples=120)
@given(chunks_of_parts(), st.integers(0, 3))
def test_payloads_equal_the_reference(host, chunk, lead):
    raw, parts = chunk
    expected = encode_tiered(raw, parts)
    codes = CodePlan.of_chunks([(lead, parts), (0, [Part(max(lead, 1))])])
    padded = aligned_copy(bytes(lead) + raw)
    slots, crcs = host.encode(codes, padded)
    assert slots[0] == (expected if len(expected) < len(raw) else raw)
    assert crcs[0] == _native.crc32c(raw)

    tables = {part.table_index: part.table for part in parts if part.table}
    got = aligned(len(padded), 0xA5)
    invalid, crcs = host.decode([Payload(expected, 0, lead, len(raw))], expected, got, tables)
    assert (got[lead:].tobytes(), invalid, crcs) == (raw, [0], [_native.crc32c(raw)])


@settings(max_examples=150)
@given(chunks_of_parts(), st.randoms(use_true_random=False))
def test_flipped_payloads_are_refused_alike(host, chunk, random):
    raw, parts = chunk
    tables = {part.table_index: part.table for part in parts if part.table}
    bad = bytearray(encode_tiered(raw, parts))
    for _ in range(random.randint(1, 3)):
        bad[random.randrange(len(bad))] ^= 1 << random.randrange(8)
    bad = bytes(bad)
    try:
        expected = decode_tiered(bad, len(raw), tables.get)
    except KvwireError as error:
        expected = error.code
    got = aligned(len(raw))
    try:
        (invalid,), crcs = host.decode([Payload(bad, 0, 0, len(raw))], bad, got, tables)
        got = ErrorCode.CODED_INVALID if invalid else got.tobytes()
    except UnsupportedError as error:  # a flipped extent may ask for more bases than a kernel has
        assert error.expected == PERIOD_MAX < error.actual
        return
    except KvwireError as error:
        got = error.code
    assert got == expected


@pytest.mark.parametrize("order", ["NHD", "HND"])
def test_coded_from_pages_and_decoded_into_pages(host, order):
    def side(seed, block_tokens):
        spec = CacheSpec("m", (attention([3], kv_heads=2, head_dim=64, block_tokens=block_tokens,
                                         order=order),))
        return spec, Side(spec, (0, 50), seed, writable=True)

    sent, source = side(1, 16)
    _, target = side(2, 8)
    for array in source.arrays.values():
        array[...] = np.frombuffer(kinds_of_bytes("gauss", 2 * array.size, 2, 5),
                                   np.uint16).reshape(array.shape)
    items = [Item(0, 0, 3, 0, 50), Item(0, 1, 3, 0, 50)]
    raw = plan.gather(sent, items, source.memory.leaves)
    half = len(raw) // 2
    parts = [Part(half, CodeTable.of_elements(raw, DType.BF16))] * 2
    codes = CodePlan.of_chunks([(0, parts[:1]), (half, parts[1:])])
    slots, crcs = host.encode(codes, CopyPlan.of_items(sent, items, source.memory))
    assert slots == [encode_tiered(raw[at:at + half], parts[:1]) for at in (0, half)]
    assert crcs == [_native.crc32c(raw[at:at + half]) for at in (0, half)]

    payloads = [Payload(slots[0], 0, 0, half), Payload(slots[1], len(slots[0]), half, half)]
    invalid, written = host.decode(payloads, b"".join(slots),
                                   CopyPlan.of_items(sent, items, target.memory))
    assert (invalid, written) == ([0, 0], crcs)
    assert plan.gather(sent, items, target.memory.leaves) == raw


@pytest.mark.parametrize("block", [-1, 1 << 60, (1 << 63) - 1])
def test_a_bad_block_id_is_reported_and_never_followed(host, block):
    spec = CacheSpec("m", (attention([3], kv_heads=2, head_dim=16, block_tokens=4),))
    side = Side(spec, (0, 20), 3, writable=True)
    copies = CopyPlan.of_items(spec, [Item(0, 0, 3, 0, 20)], side.memory)
    copies.block_ids[3] = block
    for raw in side.storage:
        raw[:] = 1
    for pack, segment in (True, aligned(copies.bytes, 9)), (False, aligned(copies.bytes, 2)):
        host.bad_entry[0] = NO_BAD_ENTRY
        host.copy(copies, segment, pack)
        assert host.bad_entry[0] == 3
        if pack:  # zeros stand for the block
            assert np.bincount(segment).tolist() == [copies.bytes // 5, copies.bytes // 5 * 4]
    assert sum((raw == 2).sum() for raw in side.storage) == copies.bytes // 5 * 4
    host.bad_entry[0] = NO_BAD_ENTRY
    host.crc([(0, copies.bytes)], copies)
    assert host.bad_entry[0] == 3
    host.bad_entry[0] = NO_BAD_ENTRY
