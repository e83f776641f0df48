"""FORMAT.md §8: CRC32C and the digests made of it, in plain Python: this is the definition.

`use` swaps in a faster function that gives the same numbers, as `kvwire._native.crc32c` does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

__all__ = ["crc32c", "crc32c_plain", "segment_digest", "transfer_digest", "use"]

_POLYNOMIAL = 0x82F63B78


def _table() -> tuple[int, ...]:
    values = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        values.append(value)
    return tuple(values)


_TABLE = _table()


def crc32c_plain(data: bytes, crc: int = 0) -> int:
    """Return the CRC32C of `data`, going on from the `crc` of the bytes before it."""
    crc ^= 0xFFFFFFFF
    for byte in memoryview(data).cast("B"):
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


_active: Callable[[bytes, int], int] = crc32c_plain


def use(function: Callable[[bytes, int], int] | None) -> None:
    """Compute checksums with ``function(data, crc)`` from now on; None: with the plain one."""
    global _active
    _active = function or crc32c_plain


def crc32c(data: bytes, crc: int = 0) -> int:
    """Return the CRC32C of `data` (bytes-like, C-contiguous), by the function in `use`."""
    return _active(data, crc)


def segment_digest(chunks: Iterable[tuple[int, int, int]]) -> int:
    """Return the digest over (raw_offset, raw_bytes, raw_crc) of each chunk, in order of offset."""
    return crc32c(b"".join(struct.pack("<QII", *chunk) for chunk in chunks))


def transfer_digest(segments: Iterable[tuple[int, int, int]]) -> int:
    """Return the digest over (segment_index, segment digest, raw_bytes) of each, in order."""
    return crc32c(b"".join(struct.pack("<IIQ", *segment) for segment in segments))
