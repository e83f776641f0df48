"""CRC32C: every compiled variant against a bitwise reference and the RFC's vectors."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwire import _native

POLYNOMIAL = 0x82F63B78
VARIANTS = _native.crc32c_variants()

# RFC 3720, appendix B.4; the last is an iSCSI read command.
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (
        bytes.fromhex(
            "01c00000000000000000000000000000140000000000040000000014"
            "0000001828000000000000000200000000000000"
        ),
        0xD9963A56,
    ),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


def crc32c_bitwise(data, crc=0):
    state = crc ^ 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (POLYNOMIAL if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def sample(size):
    """Bytes with no period that a folding width divides."""
    return bytes((i * i * 31 + i * 7) % 251 for i in range(size))


def in_fresh_process(forced):
    code = "from kvwire import _native; print(_native.crc32c_active())"
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={**os.environ, "KVWIRE_CRC32C": forced},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("data, expected", VECTORS, ids=[f"{crc:08x}" for _, crc in VECTORS])
def test_published_vector(variant, data, expected):
    assert _native.crc32c_with(variant, data) == expected
    assert _native.crc32c(data) == expected
    assert crc32c_bitwise(data) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_slicing_of_a_small_buffer(variant):
    data = sample(300)
    prefix = [crc32c_bitwise(data[:end]) for end in range(301)]
    for cut in range(301):
        assert _native.crc32c_with(variant, data[:cut]) == prefix[cut]
        assert _native.crc32c_with(variant, data[cut:], prefix[cut]) == prefix[300]


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    seed=st.binary(min_size=1, max_size=64),
    size=st.integers(0, 40_000),
    offset=st.integers(0, 63),
    crc=st.integers(0, 2**32 - 1),
)
def test_any_size_alignment_and_start(variant, seed, size, offset, crc):
    data = (seed * (size // len(seed) + 65))[: size + offset]
    view = memoryview(data)[offset:]
    expected = _native.crc32c_with("portable", view, crc)
    assert _native.crc32c_with(variant, view, crc) == expected
    if size < 600:
        assert crc32c_bitwise(view, crc) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [65_535, 65_536, 1_000_003])
def test_large_buffer_equals_its_parts(variant, size):
    data = sample(4099) * (size // 4099 + 1)
    view = memoryview(data)[:size]
    crc = 0
    for start in range(0, size, 4099):
        crc = _native.crc32c_with("portable", view[start : min(start + 4099, size)], crc)
    assert _native.crc32c_with(variant, view) == crc


@given(a=st.binary(max_size=300), b=st.binary(max_size=300))
def test_combine_is_concatenation(a, b):
    combined = _native.crc32c_combine(_native.crc32c(a), _native.crc32c(b), len(b))
    assert combined == crc32c_bitwise(a + b)


@given(
    crcs=st.tuples(*[st.integers(0, 2**32 - 1)] * 3),
    sizes=st.tuples(*[st.integers(0, 2**62)] * 2),
)
def test_combine_is_associative_at_sizes_nobody_can_hold(crcs, sizes):
    a, b, c = crcs
    combine = _native.crc32c_combine
    b_bytes, c_bytes = sizes
    left = combine(combine(a, b, b_bytes), c, c_bytes)
    assert left == combine(a, combine(b, c, c_bytes), b_bytes + c_bytes)


@pytest.mark.parametrize("variant", VARIANTS)
def test_forced_variant_is_the_active_one(variant):
    done = in_fresh_process(variant)
    assert (done.stdout.strip(), done.stderr) == (variant, "")


def test_unforced_variant_is_the_fastest():
    assert _native.crc32c_active() == VARIANTS[0]
    assert in_fresh_process("").stdout.strip() == VARIANTS[0]


def test_unknown_forced_variant_fails_the_import_by_name():
    done = in_fresh_process("crc32c9000")
    assert done.returncode != 0
    assert "ImportError" in done.stderr
    assert "KVWIRE_CRC32C=crc32c9000" in done.stderr
    assert ", ".join(VARIANTS) in done.stderr


def test_unknown_variant_is_a_value_error():
    with pytest.raises(ValueError, match="crc32c9000"):
        _native.crc32c_with("crc32c9000", b"")


def test_strided_buffer_is_refused():
    with pytest.raises(BufferError):
        _native.crc32c(memoryview(b"abcdef")[::2])
