"""Codecs of FORMAT.md section 9, held against numpy and the ``lz4`` package."""

import os
import subprocess
import sys

import lz4.block
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kvwire import _native

RAW, LZ4 = 0, 1
WIDTHS = st.sampled_from([1, 2, 3, 4, 5, 8, 16])
needs_lz4 = pytest.mark.skipif(
    not _native.codecs_available() >> LZ4 & 1, reason="liblz4.so.1 is not installed"
)


def split_reference(raw: bytes, item_bytes: int) -> bytes:
    items = len(raw) // item_bytes
    body = np.frombuffer(raw, np.uint8, items * item_bytes).reshape(items, item_bytes)
    return body.T.tobytes() + raw[items * item_bytes :]


def join_reference(planes: bytes, item_bytes: int) -> bytes:
    items = len(planes) // item_bytes
    body = np.frombuffer(planes, np.uint8, items * item_bytes).reshape(item_bytes, items)
    return body.T.tobytes() + planes[items * item_bytes :]


def bfloat16_like(raw_bytes: int, seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).standard_normal(raw_bytes // 2 + 1).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").tobytes()[:raw_bytes]


@given(st.binary(max_size=300), WIDTHS)
def test_planes_equal_numpy(raw, item_bytes):
    planes = _native.split_planes(raw, item_bytes)
    assert planes == split_reference(raw, item_bytes)
    assert _native.join_planes(planes, item_bytes) == raw


@pytest.mark.parametrize("item_bytes", [1, 2, 4, 8, 3])
@pytest.mark.parametrize("raw_bytes", [1, 16383, 16384, 16385, 65537, 262147])
def test_planes_equal_numpy_at_chunk_sizes(raw_bytes, item_bytes):
    raw = np.random.default_rng(raw_bytes).bytes(raw_bytes)
    assert _native.split_planes(raw, item_bytes) == split_reference(raw, item_bytes)
    assert _native.join_planes(raw, item_bytes) == join_reference(raw, item_bytes)


def test_planes_refuse_items_of_no_bytes():
    with pytest.raises(ValueError, match="item_bytes"):
        _native.split_planes(b"ab", 0)


def test_codec_names():
    assert [_native.codec_name(number) for number in (0, 1, 2, 3, 255)] == [
        "RAW", "LZ4", "TIERED", "QUANTISED", None]


def test_raw_is_never_coded_and_has_one_length():
    assert _native.codec_encode(RAW, b"a" * 100, 2) is None
    assert _native.codec_decode(RAW, b"abc", 2, 3) == b"abc"
    assert _native.codec_decode(RAW, b"abc", 2, 4) is None
    assert _native.codec_decode(RAW, b"", 2, 0) == b""


@pytest.mark.parametrize("codec", [2, 3])
def test_unknown_codec_and_one_that_needs_parts_do_nothing(codec):
    assert _native.codec_encode(codec, b"a" * 100, 2) is None
    assert _native.codec_decode(codec, b"abc", 2, 3) is None


@needs_lz4
@given(st.integers(64, 20000), WIDTHS, st.integers(0, 9))
def test_lz4_package_reads_what_we_write(raw_bytes, item_bytes, seed):
    raw = bfloat16_like(raw_bytes, seed)
    coded = _native.codec_encode(LZ4, raw, item_bytes)
    assume(coded is not None)
    assert 0 < len(coded) < raw_bytes
    planes = lz4.block.decompress(coded, uncompressed_size=raw_bytes)
    assert join_reference(planes, item_bytes) == raw


@needs_lz4
@given(st.binary(min_size=1, max_size=3000), WIDTHS, st.sampled_from(["default", "fast"]))
@example(bytes(70000), 4, "default")
def test_we_read_what_the_lz4_package_writes(raw, item_bytes, mode):
    coded = lz4.block.compress(split_reference(raw, item_bytes), mode=mode, store_size=False)
    assert _native.codec_decode(LZ4, coded, item_bytes, len(raw)) == raw


@needs_lz4
def test_planes_make_bfloat16_shrink():
    raw = bfloat16_like(1 << 16)
    coded = _native.codec_encode(LZ4, raw, 2)
    assert len(coded) < 0.9 * len(raw)
    assert _native.codec_encode(LZ4, raw, 1) is None
    assert _native.codec_decode(LZ4, coded, 2, len(raw)) == raw


@needs_lz4
def test_encode_gives_up_without_room_or_gain():
    raw = bytes(1000)
    coded = _native.codec_encode(LZ4, raw, 2)
    assert _native.codec_encode(LZ4, raw, 2, out_max=len(coded)) == coded
    assert _native.codec_encode(LZ4, raw, 2, out_max=len(coded) - 1) is None
    assert _native.codec_encode(LZ4, np.random.default_rng(1).bytes(1000), 2, 5000) is None
    assert _native.codec_encode(LZ4, b"", 2) is None
    assert _native.codec_encode(LZ4, b"a", 2) is None
    assert _native.codec_encode(LZ4, raw, 0) is None


@needs_lz4
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_lz4_decode_refuses_truncation_and_other_lengths(item_bytes):
    raw = bytes(range(250)) * 8
    coded = _native.codec_encode(LZ4, raw, item_bytes)
    for stop in range(len(coded)):
        assert _native.codec_decode(LZ4, coded[:stop], item_bytes, len(raw)) is None
    for raw_bytes in (0, 1, len(raw) - 1, len(raw) + 1, 2 * len(raw)):
        assert _native.codec_decode(LZ4, coded, item_bytes, raw_bytes) is None
    assert _native.codec_decode(LZ4, coded, 0, len(raw)) is None


@needs_lz4
def test_lz4_decode_survives_every_flipped_bit():
    raw = bfloat16_like(800)
    coded = _native.codec_encode(LZ4, raw, 2)
    outcomes = set()
    for position in range(8 * len(coded)):
        damaged = bytearray(coded)
        damaged[position // 8] ^= 1 << position % 8
        decoded = _native.codec_decode(LZ4, bytes(damaged), 2, len(raw))
        assert decoded is None or len(decoded) == len(raw)
        outcomes.add(decoded is None)
    assert outcomes == {True, False}


@needs_lz4
@given(st.binary(max_size=200), WIDTHS, st.integers(0, 1000))
def test_lz4_decode_survives_any_bytes(coded, item_bytes, raw_bytes):
    decoded = _native.codec_decode(LZ4, coded, item_bytes, raw_bytes)
    assert decoded is None or len(decoded) == raw_bytes


@needs_lz4
@pytest.mark.parametrize("shown", ["0", "1"])
def test_environment_hides_lz4(shown):
    code = (
        "from kvwire import _native as n; block = bytes([0x90]) + b'123456789'\n"
        "print(n.codecs_available(), n.codec_decode(1, block, 2, 9),"
        " n.codec_encode(1, bytes(1000), 2) is not None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KVWIRE_LZ4": shown},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {"0": ["13", "None", "False"], "1": ["15", "b'152637489'", "True"]}
    assert done.stdout.split() == expected[shown]
