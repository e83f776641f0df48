"""FORMAT.md §9: the codecs of chunk payloads. Needs the `lz4` package only for LZ4."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

import numpy as np

from kvwire.errors import ErrorCode, UsageError
from kvwire.quantised import decode_quantised
from kvwire.structure import fail
from kvwire.tensor_spec import DType
from kvwire.tiered import CodeTable, Part, decode_tiered, encode_tiered

__all__ = ["Codec", "decode_chunk", "encode_chunk", "join_planes", "split_planes"]


class Codec(IntEnum):
    """How a chunk's payload is made of its raw bytes. QUANTISED is for `Lossy`."""

    RAW = 0
    LZ4 = 1
    TIERED = 2
    QUANTISED = 3

    @classmethod
    def of(cls, codec: object) -> Codec:
        """Return the `Codec` of a `Codec` or a name ("raw", "lz4", "tiered")."""
        found = cls.__members__.get(codec.upper()) if isinstance(codec, str) else codec
        if found not in (cls.RAW, cls.LZ4, cls.TIERED):
            raise UsageError(f"codec is {codec!r}; it must be 'raw', 'lz4' or 'tiered'")
        return cls(found)


def split_planes(raw: bytes, item_bytes: int) -> bytes:
    """Return all first bytes of the items, then all second bytes ..., then the left-over bytes."""
    count = len(raw) // item_bytes
    planes = np.frombuffer(raw, np.uint8, count * item_bytes).reshape(count, item_bytes)
    return planes.T.tobytes() + bytes(memoryview(raw)[count * item_bytes:])


def join_planes(planes: bytes, item_bytes: int) -> bytes:
    """Return the bytes that `split_planes` took apart."""
    count = len(planes) // item_bytes
    items = np.frombuffer(planes, np.uint8, count * item_bytes).reshape(item_bytes, count)
    return items.T.tobytes() + bytes(memoryview(planes)[count * item_bytes:])


def encode_chunk(codec: Codec, raw: bytes, dtype: DType, table: CodeTable | None = None,
                 table_index: int = 0) -> tuple[Codec, bytes]:
    """Return the payload and its codec, which is RAW where the chunk does not shrink.

    `dtype` is that of the first item of the chunk's segment: TIERED is told no more here, and all
    elements have one base, that of `table` or of the chunk's own one.
    """
    item_bytes = dtype.item_bytes
    if codec == Codec.TIERED:
        whole = len(raw) // item_bytes * item_bytes
        table = table or CodeTable.of_elements(raw[:whole], dtype)
        parts = [Part(whole, table, 0, table_index), Part(len(raw) - whole)]
        payload = encode_tiered(raw, [part for part in parts if part.raw_bytes])
        if len(payload) < len(raw):
            return codec, payload
    if codec == Codec.LZ4:
        import lz4.block
        payload = lz4.block.compress(split_planes(raw, item_bytes), store_size=False)
        if len(payload) < len(raw):
            return codec, payload
    return Codec.RAW, bytes(raw)


def decode_chunk(codec: Codec, payload: bytes, raw_bytes: int, item_bytes: int,
                 table_of: Callable[[int], CodeTable | None] = lambda index: None) -> bytes:
    """Return the `raw_bytes` raw bytes; CODED_INVALID when the payload does not decode to them.

    `table_of`: the link's code table of an index, for TIERED; None: TABLE_UNKNOWN.
    """
    if codec == Codec.RAW:
        return payload
    if codec == Codec.TIERED:
        return decode_tiered(payload, raw_bytes, table_of)
    if codec == Codec.QUANTISED:
        return decode_quantised(payload, raw_bytes, table_of)
    import lz4.block
    try:
        planes = lz4.block.decompress(payload, uncompressed_size=raw_bytes)
    except (lz4.block.LZ4BlockError, ValueError) as error:
        fail(ErrorCode.CODED_INVALID, f"chunk: no LZ4 block of {raw_bytes} bytes: {error}",
             expected=raw_bytes, actual=0)
    if len(planes) != raw_bytes:
        fail(ErrorCode.CODED_INVALID, f"chunk: {len(planes)} bytes decoded, {raw_bytes} stated",
             expected=raw_bytes, actual=len(planes))
    return join_planes(planes, item_bytes)
