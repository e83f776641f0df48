"""Checksums and calibration histograms in Triton, in the interpreter."""

import numpy as np
import pytest
from test_tiered import DTYPES, kinds_of_bytes
from triton_interpreter import torch

from kvwire import _native
from kvwire.errors import UnsupportedError
from kvwire.kernels import crc_math
from kvwire.kernels.triton.crc import crc32c_chunks
from kvwire.kernels.triton.histogram import exponent_histogram
from kvwire.layout import DType
from kvwire.tiered import CodeTable, element_format


def check(raw, chunks):
    got = crc32c_chunks(torch.frombuffer(bytearray(raw), dtype=torch.uint8),
                        np.array(chunks, np.int64))
    assert [crc & 0xFFFFFFFF for crc in got.tolist()] == \
        [_native.crc32c(raw[at:at + size]) for at, size in chunks]


def test_chunks_of_any_length_and_place():
    raw = np.random.default_rng(1).bytes(3 * crc_math.TILE_BYTES)
    check(raw, [(3, 7), (1, crc_math.TILE_BYTES + 4099), (9, 0)])


@pytest.mark.long
def test_chunks_of_more_lengths():
    raw = np.random.default_rng(1).bytes(3 * crc_math.TILE_BYTES)
    check(raw, [(0, 1), (5, 8192), (0, crc_math.TILE_BYTES),
                (1, 2 * crc_math.TILE_BYTES + 4099)])


def test_checksums_of_zeros():
    for size in (0, 1, 4096, 100_003):
        assert crc_math.beginning(size) == _native.crc32c(bytes(size))


@pytest.mark.parametrize("dtype", DTYPES)
def test_histogram_makes_the_reference_table(dtype):
    form = element_format(dtype)
    raw = kinds_of_bytes("gauss", 5003 * form.item_bytes, form.item_bytes, 8)
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    counts = exponent_histogram(data, dtype, torch.zeros(1, dtype=torch.int64), 1)[0].numpy()
    assert tuple(np.argsort(-counts, kind="stable")[:12].tolist()) == \
        CodeTable.of_elements(raw, dtype).offsets

    channels = np.array([0, 2, 1, 2], np.int64)
    counts = exponent_histogram(data, dtype, torch.from_numpy(channels), 3).numpy()
    x = np.frombuffer(raw, f"<u{form.item_bytes}").astype(np.int64)
    exponents = x >> (form.verbatim_bits - 1) & (1 << form.exponent_bits) - 1
    expected = np.zeros_like(counts)
    np.add.at(expected, (channels[np.arange(len(x)) % 4], exponents), 1)
    np.testing.assert_array_equal(counts, expected)


def test_integers_have_no_histogram():
    with pytest.raises(UnsupportedError):
        exponent_histogram(torch.zeros(4, dtype=torch.uint8), DType.INT8, torch.zeros(1), 1)
