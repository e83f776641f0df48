"""What the reference receiver keeps of each transfer, segment, chunk and lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from kvwire.checksum import crc32c, segment_digest
from kvwire.codec import decode_chunk
from kvwire.control import End, Grant, Item, Segment, SegmentEnd
from kvwire.errors import ErrorCode, KvwireError
from kvwire.manifest import Manifest
from kvwire.reference_memory import ReferenceTicket
from kvwire.structure import fail
from kvwire.tiered import CodeTable
from kvwire.wire import FrameHeader, FrameReader

__all__ = ["ChunkRecord", "ChunkState", "LaneRecord", "SegmentRecord", "TransferRecord",
           "check_digest", "verified_bytes"]


class ChunkState(Enum):
    """What a chunk of a live transfer is."""

    MISSING = "missing"
    LEASED = "leased"
    VERIFIED = "verified"


@dataclass
class ChunkRecord:
    """One chunk of section 10's lease table."""

    state: ChunkState = ChunkState.MISSING
    lane: int | None = None
    attempt: int = 0
    failures: int = 0
    crc: int = 0


@dataclass
class SegmentRecord:
    """An announced segment."""

    payload: bytes
    announced: Segment
    item_bytes: int
    replicas: frozenset[Item]
    chunks: list[ChunkRecord]
    end: SegmentEnd | None = None
    complete: bool = False

    @property
    def digest(self) -> int:
        return segment_digest((index * self.announced.chunk_bytes,
                               self.announced.chunk_raw_bytes(index), chunk.crc)
                              for index, chunk in enumerate(self.chunks))


@dataclass
class TransferRecord:
    """An open transfer; without a grant it waits for its ticket."""

    lane: int
    payload: bytes
    manifest: Manifest
    ticket: ReferenceTicket | None = None
    grant: Grant | None = None
    segments: dict[int, SegmentRecord] = field(default_factory=dict)
    end: End | None = None


@dataclass
class LaneRecord:
    """One lane and the write lease that it holds."""

    reader: FrameReader
    greeted: bool = False
    open: bool = True
    lease: tuple[TransferRecord, int, ChunkRecord] | None = None  # with the segment's index


def check_digest(what: str, stated: int, actual: int) -> None:
    if stated != actual:
        fail(ErrorCode.DIGEST_MISMATCH, f"{what}: the digest differs", expected=stated,
             actual=actual)


def verified_bytes(header: FrameHeader, payload: bytes, item_bytes: int,
                   tables: Mapping[int, CodeTable]) -> bytes:
    """Return a chunk's raw bytes, or raise one of the errors that cost a chunk (§8)."""
    crc = crc32c(payload)
    if crc != header.payload_crc:
        fail(ErrorCode.PAYLOAD_CORRUPT, "chunk payload checksum differs",
             expected=header.payload_crc, actual=crc)
    try:
        raw = decode_chunk(header.codec, payload, header.raw_bytes, item_bytes, tables.get)
    except KvwireError as error:
        fail(error.code, error.args[0], expected=header.raw_crc, actual=crc)
    crc = crc32c(raw)
    if crc != header.raw_crc:
        fail(ErrorCode.RAW_CORRUPT, "chunk's raw bytes have another checksum",
             expected=header.raw_crc, actual=crc)
    return raw
