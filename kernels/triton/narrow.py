"""bf16 to fp8 e4m3, as kvwire.kernels.narrow defines it; by bits, as casts differ."""

import triton
import triton.language as tl

__all__ = ["narrow"]

BLOCK = 4096


@triton.jit
def narrow_kernel(raw, codes, elements, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    held = i < elements
    bits = tl.load(raw + i, mask=held, other=0).to(tl.int32) & 0xFFFF
    magnitude = bits & 0x7FFF
    normal = ((magnitude + 7 + (magnitude >> 4 & 1)) >> 4) - 960
    significand = magnitude & 0x7F | 0x80
    places = tl.minimum(tl.maximum(125 - (magnitude >> 7), 1), 10)
    one = significand * 0 + 1
    half = (one << (places - 1)) - 1 + (significand >> places & 1)
    code = tl.where(magnitude >= 15488, tl.minimum(normal, 0x7E), (significand + half) >> places)
    code = tl.where(magnitude > 0x7F80, 0x7F, code) | (bits >> 15) << 7
    tl.store(codes + i, code.to(tl.uint8), mask=held)


def narrow(raw, codes) -> None:
    """Enqueue the change of `raw`, uint8 of bf16 elements, to `codes`, half as many bytes."""
    import torch
    elements = codes.numel()
    if elements:
        narrow_kernel[(triton.cdiv(elements, BLOCK),)](
            raw[:2 * elements].view(torch.int16), codes, elements, SIZE=BLOCK)
