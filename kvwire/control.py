"""FORMAT.md §7.4 to §7.11: control payloads, all but the MANIFEST.

``decode`` checks what the payload alone can break; what needs the manifest, the announcement or
the state of the transfer is checked by the machines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvwire import limits
from kvwire.errors import ErrorCode
from kvwire.manifest import decode_metadata, encode_metadata
from kvwire.structure import Cursor, Structure, fail

__all__ = ["Abort", "ChunkRun", "Commit", "Done", "End", "Grant", "Index", "Item", "Pull",
           "Receipt", "Repair", "RepairEntry", "Segment", "SegmentEnd", "SegmentIndex"]

GRANT = Structure("GRANT", window_bytes="Q", codecs="I", chunk_bytes_max="I")
SEGMENT = Structure("SEGMENT", raw_bytes="Q", chunk_bytes="I", item_count="I")
ITEM = Structure("SEGMENT item", group_index="H", tensor_index="H", layer="I", token_start="Q",
                 token_stop="Q")
SEGMENT_END = Structure("SEGMENT_END", chunk_count="I", digest="I")
END = Structure("END", segment_count="I", digest="I", raw_bytes="Q", metadata_count="H",
                reserved="6s")
RECEIPT = Structure("RECEIPT", segment_index="I", chunk_first="I", chunk_count="I", digest="I")
REPAIR = Structure("REPAIR", segment_index="I", chunk_index="I", attempt="I", reason="H",
                   reserved="H", expected="I", actual="I")
DONE = Structure("DONE", raw_bytes="Q", digest="I", reserved="I")
ABORT = Structure("ABORT", code="H", message_bytes="H", reserved="I", expected="Q", actual="Q",
                  offset="Q")
PULL = Structure("PULL", offer_id="16s", token_start="Q", token_stop="Q", source_rank="H",
                 destination_rank="H", destination_rank_count="H", reserved="10s")
INDEX = Structure("INDEX segment", segment_offset="Q", chunk_count="I", digest="I")
COMMIT = Structure("COMMIT", index_offset="Q", file_bytes="Q", segment_count="I", digest="I",
                   chunk_count="I", reserved="I")

REPAIR_REASONS = (ErrorCode.PAYLOAD_CORRUPT, ErrorCode.RAW_CORRUPT, ErrorCode.CODED_INVALID,
                  ErrorCode.TABLE_UNKNOWN)
_CHUNK_OFFSET_BYTES = 8
_U64_MAX = 0xFFFFFFFFFFFFFFFF


def _unpack_one(structure: Structure, data: bytes) -> dict:
    values = structure.unpack(data)
    if len(data) != structure.bytes:
        fail(ErrorCode.FIELD_INVALID, f"{structure.name}: bytes follow its structure",
             expected=structure.bytes, actual=len(data), offset=structure.bytes)
    if "reserved" in values:
        structure.require_zero(values, "reserved")
        del values["reserved"]
    return values


@dataclass(frozen=True)
class Grant:
    """§7.4: destinations are bound; payload may flow."""

    window_bytes: int
    codecs: int
    chunk_bytes_max: int

    def encode(self) -> bytes:
        return GRANT.pack(vars(self))

    @classmethod
    def decode(cls, data: bytes) -> Grant:
        values = _unpack_one(GRANT, data)
        chunk_bytes_max = values["chunk_bytes_max"]
        GRANT.require(values, "window_bytes", values["window_bytes"] >= limits.CHUNK_BYTES_MIN,
                      expected=limits.CHUNK_BYTES_MIN)
        GRANT.require(values, "codecs", values["codecs"] & 1)
        GRANT.require(values, "chunk_bytes_max",
                      limits.CHUNK_BYTES_MIN <= chunk_bytes_max <= limits.CHUNK_BYTES_MAX)
        return cls(**values)


@dataclass(frozen=True)
class Item:
    """§7.5: a token range, or the whole, of one tensor of one layer."""

    group_index: int
    tensor_index: int
    layer: int
    token_start: int = 0
    token_stop: int = 0


@dataclass(frozen=True)
class Segment:
    """§7.5: announces the bytes of `items`, one after another, in chunks of `chunk_bytes`."""

    raw_bytes: int
    chunk_bytes: int
    items: tuple[Item, ...]

    @property
    def chunk_count(self) -> int:
        return -(-self.raw_bytes // self.chunk_bytes)

    def chunk_raw_bytes(self, chunk_index: int) -> int:
        """Return the length of a chunk; 0 when there is no such chunk."""
        left = self.raw_bytes - chunk_index * self.chunk_bytes
        return max(0, min(left, self.chunk_bytes))

    def encode(self) -> bytes:
        fixed = SEGMENT.pack({**vars(self), "item_count": len(self.items)})
        return fixed + b"".join(ITEM.pack(vars(item)) for item in self.items)

    @classmethod
    def decode(cls, data: bytes) -> Segment:
        values = SEGMENT.unpack(data)
        code = ErrorCode.SEGMENT_INVALID
        SEGMENT.require(values, "raw_bytes", values["raw_bytes"] <= limits.SEGMENT_BYTES_MAX,
                        code, limits.SEGMENT_BYTES_MAX)
        chunk_bytes = values["chunk_bytes"]
        SEGMENT.require(values, "chunk_bytes", chunk_bytes % limits.CHUNK_BYTES_MIN == 0
                        and 0 < chunk_bytes <= limits.CHUNK_BYTES_MAX, code)
        held, rest = divmod(len(data) - SEGMENT.bytes, ITEM.bytes)
        SEGMENT.require(values, "item_count", values["item_count"] == held and rest == 0
                        and 1 <= held <= limits.ITEM_COUNT_MAX, code, held)
        items = tuple(Item(**ITEM.unpack(data, offset))
                      for offset in range(SEGMENT.bytes, len(data), ITEM.bytes))
        return cls(values["raw_bytes"], chunk_bytes, items)


@dataclass(frozen=True)
class SegmentEnd:
    """§7.6: all chunks of the segment were sent."""

    chunk_count: int
    digest: int

    def encode(self) -> bytes:
        return SEGMENT_END.pack(vars(self))

    @classmethod
    def decode(cls, data: bytes) -> SegmentEnd:
        return cls(**_unpack_one(SEGMENT_END, data))


@dataclass(frozen=True)
class End:
    """§7.7: all segments were announced. `metadata` overrides the manifest's, key by key."""

    segment_count: int
    digest: int
    raw_bytes: int
    metadata: Mapping[str, object] = field(default_factory=dict)

    def encode(self) -> bytes:
        fixed = END.pack({**vars(self), "metadata_count": len(self.metadata)})
        return fixed + encode_metadata(self.metadata)

    @classmethod
    def decode(cls, data: bytes) -> End:
        values = END.unpack(data)
        END.require(values, "segment_count", values["segment_count"] <= limits.SEGMENT_COUNT_MAX,
                    ErrorCode.INCOMPLETE, limits.SEGMENT_COUNT_MAX)
        count = values.pop("metadata_count")
        END.require({"metadata_count": count}, "metadata_count",
                    count <= limits.METADATA_COUNT_MAX, ErrorCode.LIMIT_EXCEEDED,
                    limits.METADATA_COUNT_MAX)
        END.require_zero(values, "reserved")
        del values["reserved"]
        cursor = Cursor(data, "END", END.bytes)
        metadata = decode_metadata(cursor, count)
        cursor.finish()
        return cls(**values, metadata=metadata)


@dataclass(frozen=True)
class ChunkRun:
    """§7.8: verified chunks; the whole segment, with its digest, when `chunk_count` is 0."""

    segment_index: int
    chunk_first: int
    chunk_count: int
    digest: int = 0


@dataclass(frozen=True)
class Receipt:
    """§7.8: 1 to 4,096 runs of chunks that are verified."""

    runs: tuple[ChunkRun, ...]

    def encode(self) -> bytes:
        return b"".join(RECEIPT.pack(vars(run)) for run in self.runs)

    @classmethod
    def decode(cls, data: bytes) -> Receipt:
        return cls(tuple(ChunkRun(**values) for values in _entries(RECEIPT, data, _check_run)))


def _check_run(values: dict) -> None:
    chunk_count = values["chunk_count"]
    if chunk_count == 0:
        RECEIPT.require(values, "chunk_first", values["chunk_first"] == 0, expected=0)
    else:
        RECEIPT.require(values, "digest", values["digest"] == 0, expected=0)


@dataclass(frozen=True)
class RepairEntry:
    """§7.8: one chunk that must be sent again, and why."""

    segment_index: int
    chunk_index: int
    attempt: int
    reason: ErrorCode
    expected: int
    actual: int


@dataclass(frozen=True)
class Repair:
    """§7.8: 1 to 2,730 chunks that must be sent again."""

    entries: tuple[RepairEntry, ...]

    def encode(self) -> bytes:
        return b"".join(REPAIR.pack(vars(entry)) for entry in self.entries)

    @classmethod
    def decode(cls, data: bytes) -> Repair:
        entries = []
        for values in _entries(REPAIR, data, _check_repair):
            del values["reserved"]
            entries.append(RepairEntry(**values | {"reason": ErrorCode(values["reason"])}))
        return cls(tuple(entries))


def _check_repair(values: dict) -> None:
    REPAIR.require(values, "reason", values["reason"] in REPAIR_REASONS)
    REPAIR.require_zero(values, "reserved")


def _entries(structure: Structure, data: bytes, check) -> list[dict]:
    if not data:
        fail(ErrorCode.TRUNCATED, f"{structure.name}: it holds no entry",
             expected=structure.bytes, actual=0, offset=0)
    entries = [structure.unpack(data, offset) for offset in range(0, len(data), structure.bytes)]
    for values in entries:
        check(values)
    return entries


@dataclass(frozen=True)
class Done:
    """§7.8: the whole transfer is in place and verified."""

    raw_bytes: int
    digest: int

    def encode(self) -> bytes:
        return DONE.pack(vars(self))

    @classmethod
    def decode(cls, data: bytes) -> Done:
        return cls(**_unpack_one(DONE, data))


@dataclass(frozen=True)
class Abort:
    """§7.9: the transfer, or the stream, has failed."""

    code: ErrorCode
    message: str = ""
    expected: int = 0
    actual: int = 0
    offset: int = 0

    @classmethod
    def of(cls, error: Exception) -> Abort:
        """Return the frame that tells the peer about a `KvwireError`."""
        def evidence(value: object) -> int:
            return value & _U64_MAX if isinstance(value, int) else 0
        return cls(error.code, error.args[0], evidence(error.expected), evidence(error.actual),
                   evidence(error.offset))

    def encode(self) -> bytes:
        message = self.message.encode()[:limits.MESSAGE_BYTES_MAX]
        message = message.decode(errors="ignore").encode()
        return ABORT.pack({**vars(self), "message_bytes": len(message)}) + message

    @classmethod
    def decode(cls, data: bytes) -> Abort:
        values = ABORT.unpack(data)
        held = len(data) - ABORT.bytes
        ABORT.require(values, "message_bytes", values["message_bytes"] == held
                      and held <= limits.MESSAGE_BYTES_MAX, expected=held)
        ABORT.require_zero(values, "reserved")
        known = values["code"] in tuple(ErrorCode)
        message = Cursor(data, "ABORT", ABORT.bytes).text(held, "its message")
        return cls(ErrorCode(values["code"]) if known else ErrorCode.INTERNAL, message,
                   values["expected"], values["actual"], values["offset"])


@dataclass(frozen=True)
class Pull:
    """§7.10: asks for an offer to be sent to the ticket that the header names."""

    offer_id: bytes
    token_start: int
    token_stop: int
    source_rank: int = 0
    destination_rank: int = 0
    destination_rank_count: int = 1

    def encode(self) -> bytes:
        return PULL.pack(vars(self))

    @classmethod
    def decode(cls, data: bytes) -> Pull:
        values = _unpack_one(PULL, data)
        PULL.require(values, "token_stop", values["token_start"] <= values["token_stop"]
                     <= limits.TOKEN_COUNT_MAX, ErrorCode.TOKENS_MISMATCH)
        PULL.require(values, "source_rank", values["source_rank"] < limits.RANK_COUNT_MAX,
                     ErrorCode.RANK_UNEXPECTED)
        count = values["destination_rank_count"]
        PULL.require(values, "destination_rank", values["destination_rank"] < count,
                     ErrorCode.RANK_UNEXPECTED)
        PULL.require(values, "destination_rank_count", count <= limits.RANK_COUNT_MAX,
                     ErrorCode.RANK_UNEXPECTED, limits.RANK_COUNT_MAX)
        return cls(**values)


@dataclass(frozen=True)
class SegmentIndex:
    """§7.11: where the frames of one segment lie in a file."""

    segment_offset: int
    digest: int
    chunk_offsets: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """§7.11: where the frames of all segments lie in a file."""

    segments: tuple[SegmentIndex, ...]

    def encode(self) -> bytes:
        heads = (INDEX.pack({**vars(segment), "chunk_count": len(segment.chunk_offsets)})
                 for segment in self.segments)
        offsets = (offset.to_bytes(_CHUNK_OFFSET_BYTES, "little")
                   for segment in self.segments for offset in segment.chunk_offsets)
        return b"".join((*heads, *offsets))

    @classmethod
    def decode(cls, data: bytes, segment_count: int) -> Index:
        """Return the index; `segment_count` is the COMMIT's."""
        heads_bytes = segment_count * INDEX.bytes
        heads = [INDEX.unpack(data, offset)
                 for offset in range(0, min(heads_bytes, len(data)), INDEX.bytes)]
        expected = heads_bytes + _CHUNK_OFFSET_BYTES * sum(head["chunk_count"] for head in heads)
        if len(data) != expected:
            fail(ErrorCode.FILE_INDEX_CORRUPT, "INDEX: its length contradicts its counts",
                 expected=expected, actual=len(data))
        cursor = Cursor(data, "INDEX", heads_bytes)
        return cls(tuple(SegmentIndex(
            head["segment_offset"], head["digest"],
            tuple(cursor.integer(_CHUNK_OFFSET_BYTES) for _ in range(head["chunk_count"])))
            for head in heads))


@dataclass(frozen=True)
class Commit:
    """§7.11: the file is whole."""

    index_offset: int
    file_bytes: int
    segment_count: int
    digest: int
    chunk_count: int

    def encode(self) -> bytes:
        return COMMIT.pack(vars(self))

    @classmethod
    def decode(cls, data: bytes) -> Commit:
        return cls(**_unpack_one(COMMIT, data))
