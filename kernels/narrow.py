"""bf16 to fp8 e4m3 while packing: to nearest, ties to even; what is above 448 becomes 448, and NaN
stays NaN. Lossy: only where the caller asks for it. This is the definition."""

from __future__ import annotations

import numpy as np

__all__ = ["e4m3_of_bf16"]

TOP, NAN = 0x7E, 0x7F
NORMAL_MIN = 121 << 7  # bf16 of 2^-6, the least normal number of e4m3
REBIAS = (127 - 7) << 3


def e4m3_of_bf16(bits: np.ndarray) -> np.ndarray:
    """Return uint8 codes of uint16 bf16 bits; kernels/cuda/copy.cuh has the same."""
    magnitude = bits.astype(np.int64) & 0x7FFF
    normal = (magnitude + 7 + (magnitude >> 4 & 1) >> 4) - REBIAS
    # Below that, units of 2^-9: the significand goes right by so many places.
    significand = magnitude & 0x7F | 0x80
    places = np.clip(125 - (magnitude >> 7), 1, 10)
    half = (1 << places - 1) - 1 + (significand >> places & 1)
    code = np.where(magnitude >= NORMAL_MIN, np.minimum(normal, TOP),
                    significand + half >> places)
    code = np.where(magnitude > 0x7F80, NAN, code)
    return (code | bits.astype(np.int64) >> 15 << 7).astype(np.uint8)
