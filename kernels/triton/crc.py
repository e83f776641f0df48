"""CRC32C of chunks: tiles by themselves, added up by position in any order, so without waiting."""

import numpy as np
import triton
import triton.language as tl

from kvwire.kernels import crc_math
from kvwire.kernels.crc_math import LANES, TILE_BYTES
from kvwire.kernels.triton.upload import upload

__all__ = ["crc32c_chunks"]

_LANES = tl.constexpr(LANES)
_TILE_BYTES = tl.constexpr(TILE_BYTES)
_POLYNOMIAL = tl.constexpr(0x82F63B78)


@triton.jit
def multiply(a, b):
    """a * b modulo the polynomial; uint32, bit 31 is the coefficient of x^0."""
    product = a * 0
    for bit in tl.static_range(32):
        product ^= b * (a >> (31 - bit) & 1)
        b = b >> 1 ^ (b & 1) * _POLYNOMIAL
    return product


@triton.jit
def crc_kernel(raw, chunks, row_step, lane_weights, tile_weights, crcs, ROWS: tl.constexpr):
    """A program takes one tile of a chunk (offset, bytes), counted from the chunk's end: zeros in
    front of it change nothing."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * 2
    behind = tl.program_id(1).to(tl.int64)
    start = tl.load(chunk)
    size = tl.load(chunk + 1)
    if behind * _TILE_BYTES < size:
        register = tl.zeros((_LANES,), tl.uint32)
        lane = tl.arange(0, _LANES).to(tl.int64)
        at = size - (behind + 1) * _TILE_BYTES
        for row in range(tl.maximum(-at, 0) // (4 * _LANES), ROWS):
            stepped = tl.zeros((_LANES,), tl.uint32)
            for bit in tl.static_range(32):
                stepped ^= (register >> bit & 1) * tl.load(row_step + bit)
            register = stepped
            first = at + (row * _LANES + lane) * 4
            for byte in tl.static_range(4):
                value = tl.load(raw + start + first + byte, mask=first + byte >= 0, other=0)
                register ^= value.to(tl.uint32) << (8 * byte)
        remainder = multiply(register, tl.load(lane_weights + lane))
        remainder = tl.xor_sum(remainder.to(tl.int32, bitcast=True), 0)
        remainder = multiply(remainder.to(tl.uint32, bitcast=True), tl.load(tile_weights + behind))
        tl.atomic_xor(crcs + tl.program_id(0), remainder.to(tl.int32, bitcast=True))


def crc32c_chunks(raw, chunks):
    """Enqueue the checksums; return int32 [chunks], the bits of each CRC32C.

    Args:
        raw: uint8 tensor.
        chunks: int64 array [chunks, 2], offset in `raw` and bytes.
    """
    import torch
    tiles = max(-(-int(chunks[:, 1].max(initial=0)) // TILE_BYTES), 1)
    tables = [upload(table.view(np.int32), raw.device).view(torch.uint32)
              for table in (crc_math.row_step(), crc_math.lane_weights(),
                            crc_math.tile_weights(tiles))]
    begin = {size: crc_math.beginning(size) for size in set(chunks[:, 1].tolist())}
    crcs = np.array([begin[size] for size in chunks[:, 1].tolist()], np.uint32).view(np.int32)
    crcs = upload(crcs, raw.device)
    crc_kernel[(len(chunks), tiles)](raw, upload(chunks, raw.device), *tables, crcs,
                                     ROWS=TILE_BYTES // (4 * LANES))
    return crcs
