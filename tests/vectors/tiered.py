"""The worked example of FORMAT.md §9.1, written by the reference."""

import numpy as np

from kvwire.layout import DType
from kvwire.tiered import PART, CodeTable, Part, encode_tiered
from vectors.generate import hex_lines

ELEMENTS = np.array([0x3F80, 0xBF00, 0x3F40, 0x3E80, 0xBFC0, 0x3F00, 0x4000, 0xBE00, 0x3F20,
                     0x3A00], "<u2")
TABLE = CodeTable(DType.BF16, (2, 2), (3, 4, 5, 2, 6, 1), (2,), 1, 0, bytes([122, 123]))
EXAMPLE = """\
**Example.** A part of ten `BF16` elements of two channels in turn, whose bases are 122 and 123:

| | |
|---|---|
| elements | {elements} |
| exponents | {exponents} |
| distances | {distances} |
| ranks | {ranks} |
| tier 1 | {tier_1} |
| tier 2 | {tier_2}, of those that went on |
| literals | {literals} |

```
{lines}
```"""


def payload() -> bytes:
    return encode_tiered(ELEMENTS.tobytes(), [Part(ELEMENTS.nbytes, TABLE)])


def pieces(payload: bytes):
    """Yield (caption, bytes) of the example's payload."""
    titles = {"part header: raw_bytes 20, position 0": PART.bytes,
              "code table: tier_bits 2 2, offsets 3 4 5 2 6 1, extents 1 1 1 2, row_axes 8":
                  len(TABLE.encode()),
              "index: form TIERED, tail of 3 bytes": 16, "body: verbatim values": 10,
              "body: planes of tier 1": 4, "tail: planes of tier 2": 2, "tail: literals": 1}
    at = 0
    for title, count in (titles | {"zeros": len(payload) - sum(titles.values())}).items():
        yield title, payload[at:at + count]
        at += count


def example() -> str:
    exponents = (ELEMENTS >> 7 & 0xFF).astype(int)
    distances = (exponents - np.tile([122, 123], 5)) % 256
    ranks = [TABLE.offsets.index(d) if d in TABLE.offsets else 99 for d in distances]
    tier_2 = [min(rank - 3, 3) for rank in ranks if rank > 2]
    lines, at = [], 0
    for title, data in pieces(payload()):
        lines += [title, *hex_lines(data, at)]
        at += len(data)
    rows = {"elements": [f"{element:04x}" for element in ELEMENTS], "exponents": exponents,
            "distances": distances, "ranks": ["–" if rank == 99 else rank for rank in ranks],
            "tier_1": [min(rank, 3) for rank in ranks], "tier_2": tier_2,
            "literals": [distance for distance, rank in zip(distances, ranks) if rank == 99]}
    return EXAMPLE.format(lines="\n".join(lines), **{
        name: " ".join(map(str, values)) for name, values in rows.items()})
