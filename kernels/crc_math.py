"""CRC32C as polynomials over GF(2), for kernels that compute parts and combine them by position.

Bit 31 of a word is the coefficient of x^0; csrc/checksum/crc32c_math.hpp has the same. The checksum
of n bytes is their remainder, x^(8n) times the initial register, and the final inversion, summed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["CUDA_SPAN_BYTES", "LANES", "TILE_BYTES", "beginning", "cuda_tables", "lane_weights",
           "multiply", "row_step", "tile_weights", "x_to_the"]

LANES = 1024          # words side by side; each lane goes down its column by Horner's rule
TILE_BYTES = 65_536   # what one program reads
_POLYNOMIAL = 0x82F63B78


def _times_x(a: int) -> int:
    return a >> 1 ^ (_POLYNOMIAL if a & 1 else 0)


def multiply(a: int, b: int) -> int:
    """Return a * b modulo the polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = _times_x(b)
    return product


@lru_cache(maxsize=None)
def x_to_the(exponent: int) -> int:
    """Return x^exponent modulo the polynomial."""
    result, power = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = multiply(result, power)
        power, exponent = multiply(power, power), exponent >> 1
    return result


def beginning(count: int) -> int:
    """Return the CRC32C of `count` zeros: what the bytes' own remainder is added to."""
    return multiply(0xFFFFFFFF, x_to_the(8 * count)) ^ 0xFFFFFFFF


@lru_cache(maxsize=1)
def row_step() -> np.ndarray:
    """Return uint32 [32]: what bit b of a lane's register becomes one row of LANES words on."""
    step = x_to_the(32 * LANES)
    return np.array([multiply(1 << bit, step) for bit in range(32)], np.uint32)


@lru_cache(maxsize=1)
def lane_weights() -> np.ndarray:
    """Return uint32 [LANES]: the factor of each lane's register in the remainder of a tile."""
    return np.array([x_to_the(32 * (LANES - lane)) for lane in range(LANES)], np.uint32)


@lru_cache(maxsize=8)
def tile_weights(count: int) -> np.ndarray:
    """Return uint32 [count]: the factor of the remainder of the tile that so many tiles follow."""
    return np.array([x_to_the(8 * TILE_BYTES * behind) for behind in range(count)], np.uint32)


CUDA_LANES = 256
CUDA_SPAN_BYTES = 65_536  # of a block that makes checksums only: kernels/cuda/crc.cuh
_DIGITS, _DIGIT_BITS = 7, 5


@lru_cache(maxsize=1)
def cuda_tables() -> np.ndarray:
    """Return uint32: `CrcTables` of kernels/cuda/crc.cuh."""
    step = x_to_the(32 * CUDA_LANES)
    single = [multiply(1 << bit, step) for bit in range(32)]
    table = np.zeros((_DIGITS, 1 << _DIGIT_BITS), np.uint32)
    for bit in range(32):
        digit, place = divmod(bit, _DIGIT_BITS)
        holds = np.arange(1 << _DIGIT_BITS) >> place & 1 == 1
        table[digit, holds] ^= np.uint32(single[bit])
    weights = [x_to_the(32 * (CUDA_LANES - lane)) for lane in range(CUDA_LANES)]
    powers, power = [], x_to_the(8)
    for _ in range(64):
        powers.append(power)
        power = multiply(power, power)
    return np.concatenate([table.ravel(), np.array(weights + powers, np.uint32)])
