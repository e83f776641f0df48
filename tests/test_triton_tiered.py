"""The tiered code in Triton, in the interpreter: the same payloads as the reference's."""

import numpy as np
import pytest
from test_tiered import DTYPES, KINDS, fitted, kinds_of_bytes
from triton_interpreter import torch

from kvwire import _native
from kvwire.errors import ErrorCode, KvwireError
from kvwire.kernels.code_plan import CodePlan, Payload, ReadPlan
from kvwire.kernels.triton.tiered import decode_chunks, encode_chunks
from kvwire.layout import DType
from kvwire.tiered import (
    OPAQUE, CodeTable, Part, decode_tiered, element_format, encode_tiered,
)


def encode(chunks, raw):
    """Return what each slot holds."""
    codes = CodePlan.of_chunks(chunks)
    out = torch.full((codes.out_bytes + 16,), 0xA5, dtype=torch.uint8)
    lengths = encode_chunks(codes, torch.frombuffer(bytearray(raw), dtype=torch.uint8), out)
    assert (out[codes.out_bytes:] == 0xA5).all()
    return [out[row[2]:row[2] + int(size)].numpy().tobytes()
            for row, size in zip(codes.chunks.tolist(), lengths)]


def decode(payloads, raw_bytes, tables=None):
    """Return raw bytes and which chunks are invalid; `payloads`: (coded, raw offset, raw bytes)."""
    found, at, coded = [], 0, b""
    for data, raw_offset, size in payloads:
        found.append(Payload(data, at, raw_offset, size))
        coded += data
        at = len(coded)
    plan = ReadPlan.of_payloads(found, (tables or {}).get)
    raw = torch.full((raw_bytes,), 0xA5, dtype=torch.uint8)
    invalid = decode_chunks(plan, torch.frombuffer(bytearray(coded), dtype=torch.uint8), raw,
                            len(found))
    return raw.numpy().tobytes(), invalid.tolist()


def check(raw, parts, offset=0):
    padded = bytes(offset) + raw
    expected = encode_tiered(raw, parts)
    coded, = encode([(offset, parts)], padded)
    assert coded == (expected if len(expected) < len(raw) else raw)
    tables = {part.table_index: part.table for part in parts if part.table_index}
    got, invalid = decode([(expected, offset, len(raw))], len(padded), tables)
    assert (got[offset:], invalid) == (raw, [0])
    return coded


def native_tables(parts):
    return [(part.raw_bytes, part.table and part.table.encode(), part.position,
             part.table_index if part.table else OPAQUE) for part in parts]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 9, 4096 + 37])
def test_payloads_equal_the_reference(dtype, elements):
    width = element_format(dtype).item_bytes
    for seed, kind in enumerate(("gauss", "specials") if elements > 9 else ("gauss",)):
        raw = kinds_of_bytes(kind, elements * width, width, seed)
        check(raw, [Part(len(raw), fitted(raw, dtype, (2, 2, 2, 2)))])


SHAPES = [(1,), (4,), (2, 2), (1, 2, 3), (3, 3), (2, 2, 2, 2), (1, 1, 1)]


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, tier_bits", list(zip(KINDS, SHAPES)))
def test_all_kinds_of_bytes(dtype, kind, tier_bits):
    form = element_format(dtype)
    if sum((1 << bits) - 1 for bits in tier_bits) > 1 << form.exponent_bits:
        tier_bits = (2, 2)
    for elements in (1, 7, 8, 4095, 4096, 9000):
        raw = kinds_of_bytes(kind, elements * form.item_bytes, form.item_bytes, elements)
        check(raw, [Part(len(raw), fitted(raw, dtype, tier_bits))], offset=elements % 3)


def test_many_parts_patterns_and_a_raw_chunk():
    rng = np.random.default_rng(2)
    keys = kinds_of_bytes("gauss", 2 * 5000, 2, 1)
    state = kinds_of_bytes("gauss", 4 * 4200, 4, 2)
    of_channel = CodeTable(DType.BF16, (2, 2), (3, 4, 5, 2, 6, 1), (7, 2, 3), 0b010, 0b100,
                           bytes([120, 119]), bytes([0, 1, 2]))
    of_state = CodeTable(DType.FP32, (2, 1, 3), (0, 1, 255, 2, 254, 3, 4, 5, 6, 7, 8), (2, 5, 3),
                         0b101, 0b010, bytes([118] * 6), bytes(5))
    assert of_channel.period == 42
    parts = [Part(5), Part(len(keys), of_channel, position=40), Part(3),
             Part(len(state), of_state, position=7, table_index=9), Part(700)]
    raw = rng.bytes(5) + keys + rng.bytes(3) + state + bytes(700)
    coded = check(raw, parts, offset=16)
    assert coded != raw
    tables = {9: of_state.encode()}
    assert _native.tiered_decode(coded, len(raw), tables) == raw
    noise = rng.bytes(4000)
    two = encode([(0, parts), (len(raw), [Part(4000)])], raw + noise)
    assert two == [coded, noise]


def test_native_payloads_decode():
    raw = kinds_of_bytes("gauss", 2 * 4500, 2, 3)
    table = fitted(raw, DType.BF16, (2, 2, 2, 2))
    coded = _native.tiered_encode(raw, [(len(raw), table.encode(), 0, 0)])
    assert decode([(coded, 0, len(raw))], len(raw)) == (raw, [0])


def test_flipped_payloads_are_refused_alike():
    raw = kinds_of_bytes("gauss", 2 * 300, 2, 4)
    table = fitted(raw, DType.BF16, (2, 2))
    good = encode_tiered(raw, [Part(len(raw), table)])
    refused = {"plan": 0, "planes": 0}
    rng = np.random.default_rng(0)
    for bit in [*rng.choice(8 * len(good), 40), 8 * (len(good) - 1)]:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << int(bit) % 8
        try:
            expected = decode_tiered(bytes(bad), len(raw))
        except KvwireError as error:
            expected = error.code
        try:
            got, (invalid,) = decode([(bytes(bad), 0, len(raw))], len(raw))
            refused["planes"] += invalid
            got = ErrorCode.CODED_INVALID if invalid else got
        except KvwireError as error:
            got = error.code
            refused["plan"] += 1
        assert got == expected, bit
    assert refused["plan"] and refused["planes"]
