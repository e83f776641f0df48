"""Lossy chunks of the vectors, and the worked example of FORMAT.md §9.3, by the reference."""

import numpy as np

from kvwire.layout import CacheSpec, DType, attention, recurrent
from kvwire.quantised import (
    CODE_BITS, PART, QuantisedPart, Rung, decode_quantised, encode_quantised,
)
from kvwire.tiered import CodeTable, Part
from vectors.generate import hex_lines

SPEC = CacheSpec("lossy", (attention([0, 2], kv_heads=2, head_dim=8),
                           recurrent([1], heads=2, key_dim=64, value_dim=64)))
EXACT_BYTES = 96  # at the end of each chunk
KEY_VALUE = Rung.INT8, Rung.INT6, Rung.INT4, Rung.E4M3, Rung.INT8_GRID
STATE = Rung.BF16, Rung.INT8_GRID, Rung.E4M3
STATE_SEGMENT = 4  # keys and values of two layers come first
NARROW = {Rung.BF16: DType.BF16, Rung.E4M3: DType.E4M3}


def parts(segment: int, offset: int, raw: bytes) -> list[QuantisedPart]:
    """Return the parts of a chunk: one rung after the other in turn, then EXACT."""
    is_state = segment == STATE_SEGMENT
    rungs, dtype, width = (STATE, DType.FP32, 64) if is_state else (KEY_VALUE, DType.BF16, 16)
    rung = rungs[(segment + offset // 4096) % len(rungs)]
    rows = (len(raw) - EXACT_BYTES) // (dtype.item_bytes * width)
    axes = {Rung.BF16: (0, 0), Rung.INT8_GRID: (1, 2), Rung.E4M3: (1, 0)}.get(
        rung, (2 if segment % 2 else 1, 0))
    nested = ()
    if rung in NARROW:
        table = CodeTable(NARROW[rung], (2, 2), (0, 1, 2, 3, 4, 5),
                          row_bases=b"\x7e" if rung == Rung.BF16 else b"\x0b")
        nested = (Part(rows * width * NARROW[rung].item_bytes, table),)
    rounded = QuantisedPart(rung, dtype, (rows, width), *axes, nested)
    rest = len(raw) - rounded.raw_bytes
    return [rounded, QuantisedPart(Rung.EXACT, DType.BYTES, (rest,))]


CHANNELS = np.array([[0.5, 1.0, 2.0, -1.0, 0.25], [8.0, 16.0, 11.5, 12.0, 9.0]], np.float32)
EXAMPLE = """\
**Example.** `INT4` makes of ten `BF16` elements, five tokens of two channels, {bytes} bytes:

| channel | 0 | 1 |
|---|---|---|
| elements | {elements[0]} | {elements[1]} |
| minimum | {minima[0]} | {minima[1]} |
| scale | {scales[0]} | {scales[1]} |
| codes | {codes[0]} | {codes[1]} |
| as placed | {placed[0]} | {placed[1]} |

```
{lines}
```"""


def example_raw() -> bytes:
    return (CHANNELS.T.ravel().view(np.uint32) >> 16).astype("<u2").tobytes()


def example_payload() -> bytes:
    return encode_quantised(example_raw(), [QuantisedPart(Rung.INT4, DType.BF16, (5, 2), 2)])


def _bf16(raw: bytes) -> np.ndarray:
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


def example() -> str:
    payload, raw = example_payload(), example_raw()
    scales_at, codes_at = PART.bytes, PART.bytes + 16
    nibbles = np.frombuffer(payload[codes_at:], np.uint8) & (1 << CODE_BITS[Rung.INT4]) - 1
    columns = {"elements": CHANNELS, "codes": nibbles[:10].reshape(5, 2).T,
               "placed": _bf16(decode_quantised(payload, len(raw))).reshape(5, 2).T,
               "scales": _bf16(payload[scales_at:scales_at + 4])[:, None],
               "minima": _bf16(payload[scales_at + 4:scales_at + 8])[:, None]}
    titles = {"part header: raw_bytes 20, rung INT4, dtype BF16, row_axes 8, extents 1 1 5 2":
              PART.bytes, "scales, minima, zeros": 16, "codes": len(payload) - codes_at}
    lines, at = [], 0
    for title, count in titles.items():
        lines += [title, *hex_lines(payload[at:at + count], at)]
        at += count
    return EXAMPLE.format(bytes=len(payload), lines="\n".join(lines), **{
        name: [" ".join(f"{number:.7g}" for number in row) for row in rows]
        for name, rows in columns.items()})
