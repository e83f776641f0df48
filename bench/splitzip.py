"""SplitZip (arXiv 2605.01708) made again from its description, to be compared with: bf16, lossless.

An element's exponent becomes 4 bits where it is one of the 16 that a calibration found most; its
sign and mantissa go whole. Other exponents are escapes: chunk, position and value, 7 bytes each,
found by a second pass over the input once the host has read their number. The code keeps no table
in its payload, no framing and no checksum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import triton
import triton.language as tl

__all__ = ["Coded", "calibrated", "decode", "encode"]

CHUNK = 1024  # elements
ESCAPE_BYTES = 7


@dataclass
class Coded:
    """rests: sign and mantissa; codes: two to a byte; the rest says where the escapes are."""

    rests: object
    codes: object
    chunks: object
    positions: object
    values: object

    @property
    def bytes(self) -> int:
        return (self.rests.numel() + self.codes.numel()
                + ESCAPE_BYTES * self.values.numel())


def calibrated(raw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the code of each exponent (16: none has it) and the 16 exponents; of uint16 bf16."""
    counts = np.bincount(raw >> 7 & 0xFF, minlength=256)
    top = np.argsort(-counts, kind="stable")[:16].astype(np.uint8)
    codes = np.full(256, 16, np.uint8)
    codes[top] = np.arange(16)
    return codes, top


@triton.jit
def encode_kernel(raw, table, rests, codes, escapes, CHUNK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, CHUNK // 2)
    packed = pair * 0
    count = chunk * 0
    for half in tl.static_range(2):
        at = chunk * CHUNK + 2 * pair + half
        bits = tl.load(raw + at).to(tl.int32) & 0xFFFF
        tl.store(rests + at, (bits >> 8 & 0x80 | bits & 0x7F).to(tl.uint8))
        code = tl.load(table + (bits >> 7 & 0xFF)).to(tl.int32)
        count += tl.sum((code == 16).to(tl.int32), 0)
        packed |= (code & 15) << (4 * half)
    tl.store(codes + chunk * (CHUNK // 2) + pair, packed.to(tl.uint8))
    tl.store(escapes + chunk, count)


@triton.jit
def escape_kernel(raw, table, starts, chunks, positions, values, CHUNK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, CHUNK)
    exponent = tl.load(raw + chunk * CHUNK + i).to(tl.int32) >> 7 & 0xFF
    escapes = (tl.load(table + exponent) == 16).to(tl.int32)
    at = tl.load(starts + chunk) + tl.cumsum(escapes, 0) - 1
    tl.store(chunks + at, (chunk + i * 0).to(tl.int32), mask=escapes != 0)
    tl.store(positions + at, i.to(tl.int16), mask=escapes != 0)
    tl.store(values + at, exponent.to(tl.uint8), mask=escapes != 0)


@triton.jit
def decode_kernel(rests, codes, top, raw, CHUNK: tl.constexpr):
    chunk = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, CHUNK)
    rest = tl.load(rests + chunk * CHUNK + i).to(tl.int32)
    code = tl.load(codes + chunk * (CHUNK // 2) + i // 2).to(tl.int32) >> (4 * (i % 2)) & 15
    exponent = tl.load(top + code).to(tl.int32)
    bits = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
    tl.store(raw + chunk * CHUNK + i, bits.to(tl.int16))


@triton.jit
def mend_kernel(rests, chunks, positions, values, raw, count, CHUNK: tl.constexpr):
    i = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    held = i < count
    at = tl.load(chunks + i, mask=held, other=0).to(tl.int64) * CHUNK
    at += tl.load(positions + i, mask=held, other=0)
    rest = tl.load(rests + at, mask=held, other=0).to(tl.int32)
    exponent = tl.load(values + i, mask=held, other=0).to(tl.int32)
    bits = (rest & 0x80) << 8 | exponent << 7 | rest & 0x7F
    tl.store(raw + at, bits.to(tl.int16), mask=held)


def encode(raw, table) -> Coded:
    """Code an int16 tensor of bf16 bits, whole chunks of it; `table`: uint8 [256]."""
    import torch
    chunks, device = raw.numel() // CHUNK, raw.device
    rests = torch.empty(raw.numel(), dtype=torch.uint8, device=device)
    codes = torch.empty(raw.numel() // 2, dtype=torch.uint8, device=device)
    escapes = torch.empty(chunks, dtype=torch.int64, device=device)
    encode_kernel[(chunks,)](raw, table, rests, codes, escapes, CHUNK=CHUNK)
    stops = torch.cumsum(escapes, 0)
    count = int(stops[-1].item())  # the host waits here
    made = [torch.empty(count, dtype=dtype, device=device)
            for dtype in (torch.int32, torch.int16, torch.uint8)]
    if count:
        escape_kernel[(chunks,)](raw, table, stops - escapes, *made, CHUNK=CHUNK)
    return Coded(rests, codes, *made)


def decode(coded: Coded, top, raw) -> None:
    """Decode into an int16 tensor; `top`: uint8 [16]."""
    decode_kernel[(raw.numel() // CHUNK,)](coded.rests, coded.codes, top, raw, CHUNK=CHUNK)
    if count := coded.values.numel():
        mend_kernel[(triton.cdiv(count, CHUNK),)](coded.rests, coded.chunks, coded.positions,
                                                  coded.values, raw, count, CHUNK=CHUNK)
