"""How often each exponent occurs in each channel: what a code table is made of."""

import triton
import triton.language as tl

from kvwire.errors import UnsupportedError
from kvwire.kernels.triton.tiered import load_item
from kvwire.layout import DType
from kvwire.tiered import element_format

__all__ = ["exponent_histogram"]

BLOCK = 4096


@triton.jit
def histogram_kernel(raw, elements, channels, period, counts, ITEM_BYTES: tl.constexpr,
                     EXPONENT_BITS: tl.constexpr, SIZE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    held = i < elements
    item = load_item(raw, i, held, ITEM_BYTES)
    exponent = item >> (8 * ITEM_BYTES - 1 - EXPONENT_BITS) & ((1 << EXPONENT_BITS) - 1)
    channel = tl.load(channels + i % period, mask=held, other=0)
    tl.atomic_add(counts + (channel << EXPONENT_BITS) + exponent.to(tl.int64), 1, mask=held)


def exponent_histogram(raw, dtype: DType, channels, channel_count: int):
    """Enqueue the count; return int64 [channel_count, 1 << exponent bits].

    Args:
        raw: uint8 tensor of whole elements.
        channels: int64 tensor [period]: element i counts in channels[i % period].

    Raises:
        UnsupportedError: the dtype has no exponent.
    """
    import torch
    form = element_format(dtype)
    if form is None:
        raise UnsupportedError(f"{dtype.name.lower()} has no exponent to count")
    elements = raw.numel() // form.item_bytes
    counts = torch.zeros(channel_count << form.exponent_bits, dtype=torch.int64,
                         device=raw.device)
    if elements:
        histogram_kernel[(triton.cdiv(elements, BLOCK),)](
            raw, elements, channels, len(channels), counts, ITEM_BYTES=form.item_bytes,
            EXPONENT_BITS=form.exponent_bits, SIZE=BLOCK)
    return counts.view(channel_count, -1)
