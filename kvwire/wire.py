"""FORMAT.md §5 and §6 in plain Python: greeting, frame header, and a parser without I/O.

Together with `checksum`, `control`, `manifest` and `codec` this is the executable specification:
what it accepts is the format, and the C++ core must agree with it on every byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from kvwire import limits
from kvwire.checksum import crc32c
from kvwire.codec import Codec
from kvwire.errors import ErrorCode, KvwireError, error_from_code
from kvwire.structure import Structure, fail

__all__ = ["Frame", "FrameHeader", "FrameReader", "FrameType", "Greeting", "Role", "encode_frame"]

FORMAT_VERSION = 1
GREETING_MAGIC = b"KVWIRE\r\n"
FRAME_MAGIC = b"KW"
NO_ID = bytes(16)
CODECS_SPOKEN = 1 << Codec.RAW | 1 << Codec.LZ4 | 1 << Codec.TIERED

GREETING = Structure(
    "greeting", magic="8s", version="H", version_min="H", role="B", reserved_a="B", flags="H",
    link_id="16s", lane_index="H", lane_count="H", codecs="I", payload_bytes_max="I",
    control_bytes_max="I", transfers_max="I", reserved_b="8s", greeting_crc="I")

HEADER = Structure(
    "frame header", magic="2s", type="B", flags="B", payload_bytes="I", transfer_id="16s",
    segment_index="I", attempt="I", raw_offset="Q", raw_bytes="I", raw_crc="I", payload_crc="I",
    table_index="I", codec="B", unused="B", reserved="H", header_crc="I")

_CRC_BYTES = 4
_GREETING_FLAGS_RESERVED = 0x00FF
FLAG_PROOF, FLAG_JOIN = 0x0100, 0x0200
_HEADER_FLAGS_RESERVED = 0x0F


class Role(IntEnum):
    """Who writes a stream (§5)."""

    SENDER = 1
    RECEIVER = 2
    FILE = 3


class FrameType(IntEnum):
    """What a frame is (§6). 0x80 to 0xFF, listed or not, may be skipped."""

    MANIFEST = 0x01
    GRANT = 0x02
    SEGMENT = 0x03
    CHUNK = 0x04
    SEGMENT_END = 0x05
    END = 0x06
    RECEIPT = 0x07
    REPAIR = 0x08
    ABORT = 0x09
    PULL = 0x0A
    DONE = 0x0B
    INDEX = 0x0C
    COMMIT = 0x0D
    CLOSE = 0x0E
    PING = 0x80
    PONG = 0x81
    TABLE_NAMES = 0x82
    TABLE_ANSWER = 0x83
    TABLE = 0x84
    SPEEDS = 0x85


SKIPPABLE_TYPE_MIN = 0x80
PING_BYTES = 8
_SENDER_AND_FILE = frozenset((Role.SENDER, Role.FILE))
_RECEIVER = frozenset((Role.RECEIVER,))
_BOTH = frozenset((Role.SENDER, Role.RECEIVER))
_FILE = frozenset((Role.FILE,))

WRITERS = {
    FrameType.MANIFEST: _SENDER_AND_FILE, FrameType.GRANT: _RECEIVER,
    FrameType.SEGMENT: _SENDER_AND_FILE, FrameType.CHUNK: _SENDER_AND_FILE,
    FrameType.SEGMENT_END: _SENDER_AND_FILE, FrameType.END: _SENDER_AND_FILE,
    FrameType.RECEIPT: _RECEIVER, FrameType.REPAIR: _RECEIVER, FrameType.ABORT: _BOTH,
    FrameType.PULL: _RECEIVER, FrameType.DONE: _RECEIVER, FrameType.INDEX: _FILE,
    FrameType.COMMIT: _FILE, FrameType.CLOSE: _BOTH, FrameType.PING: _BOTH, FrameType.PONG: _BOTH,
    FrameType.TABLE_NAMES: frozenset((Role.SENDER,)), FrameType.TABLE_ANSWER: _RECEIVER,
    FrameType.TABLE: frozenset((Role.SENDER,)),
    FrameType.SPEEDS: _RECEIVER,
}
"""Which roles write a frame type (§6)."""

_WITH_SEGMENT = (FrameType.CHUNK, FrameType.SEGMENT, FrameType.SEGMENT_END)
_CHUNK_ONLY = ("attempt", "raw_offset", "raw_bytes", "raw_crc", "table_index", "codec")


@dataclass(frozen=True)
class Greeting:
    """The first 64 bytes of a stream (§5). `flags`: FLAG_PROOF and FLAG_JOIN."""

    role: Role
    link_id: bytes
    lane_index: int = 0
    lane_count: int = 1
    codecs: int = CODECS_SPOKEN
    payload_bytes_max: int = limits.CHUNK_BYTES_MAX
    control_bytes_max: int = limits.CONTROL_BYTES_MAX
    transfers_max: int = 1024
    version: int = FORMAT_VERSION
    version_min: int = FORMAT_VERSION
    flags: int = 0

    def encode(self) -> bytes:
        body = GREETING.pack({"magic": GREETING_MAGIC, **vars(self)})[:-_CRC_BYTES]
        return body + crc32c(body).to_bytes(_CRC_BYTES, "little")

    @classmethod
    def decode(cls, data: bytes, reader: Role | None = None) -> Greeting:
        """Return the greeting in the first 64 bytes of `data`.

        `reader` is the reader's role: a sender takes only a receiver's greeting and the other way
        round, a reader of files only a file's; None takes all.
        """
        values = GREETING.unpack(data)
        GREETING.require(values, "magic", values["magic"] == GREETING_MAGIC, ErrorCode.BAD_MAGIC)
        crc = crc32c(data[:GREETING.bytes - _CRC_BYTES])
        GREETING.require(values, "greeting_crc", values["greeting_crc"] == crc,
                         ErrorCode.GREETING_CORRUPT, crc)
        low, high = values["version_min"], values["version"]
        GREETING.require(values, "version", high >= 1, ErrorCode.VERSION_UNSUPPORTED)
        GREETING.require(values, "version_min", 1 <= low <= min(high, FORMAT_VERSION),
                         ErrorCode.VERSION_UNSUPPORTED, FORMAT_VERSION)
        cls._check_fields(values, reader)
        return cls(**{field: values[field] for field in cls.__dataclass_fields__}
                   | {"role": Role(values["role"]),
                      "flags": values["flags"] & (FLAG_PROOF | FLAG_JOIN)})

    @staticmethod
    def _check_fields(values: dict, reader: Role | None) -> None:
        role, require = values["role"], GREETING.require
        require(values, "role", role in tuple(Role))
        if reader is not None and reader != Role.FILE:
            require(values, "role", role != reader, ErrorCode.ROLE_CONFLICT)
        if reader is not None:
            require(values, "role", (role == Role.FILE) == (reader == Role.FILE))
        GREETING.require_zero(values, "reserved_a")
        require(values, "flags", not values["flags"] & _GREETING_FLAGS_RESERVED,
                ErrorCode.RESERVED_BIT_SET)
        require(values, "flags", values["flags"] & (FLAG_PROOF | FLAG_JOIN) != FLAG_JOIN)
        require(values, "link_id", values["link_id"] != NO_ID)
        lane_count = values["lane_count"]
        require(values, "lane_index", values["lane_index"] < (1 if role == Role.FILE
                                                              else lane_count))
        require(values, "lane_count", 1 <= lane_count <= limits.LANE_COUNT_MAX)
        require(values, "codecs", values["codecs"] & 1)
        for field, least in (("payload_bytes_max", limits.PAYLOAD_BYTES_MIN),
                             ("control_bytes_max", limits.CONTROL_BYTES_MIN),
                             ("transfers_max", 1)):
            require(values, field, values[field] >= least, expected=least)
        GREETING.require_zero(values, "reserved_b")

    def check_answer(self, answer: Greeting) -> None:
        """Raise FIELD_INVALID unless the acceptor's `answer` echoes this dialler's greeting."""
        for field in ("link_id", "lane_index", "lane_count"):
            GREETING.require(vars(answer), field, getattr(answer, field) == getattr(self, field),
                             expected=getattr(self, field))


@dataclass(frozen=True)
class FrameHeader:
    """The 64 bytes before every payload (§6)."""

    type: int
    payload_bytes: int = 0
    transfer_id: bytes = NO_ID
    segment_index: int = 0
    attempt: int = 0
    raw_offset: int = 0
    raw_bytes: int = 0
    raw_crc: int = 0
    payload_crc: int = 0
    table_index: int = 0
    codec: int = 0

    def encode(self) -> bytes:
        body = HEADER.pack({"magic": FRAME_MAGIC, **vars(self)})[:-_CRC_BYTES]
        return body + crc32c(body).to_bytes(_CRC_BYTES, "little")

    @classmethod
    def decode(cls, data: bytes, payload_bytes_max: int = limits.CHUNK_BYTES_MAX,
               control_bytes_max: int = limits.CONTROL_BYTES_MAX) -> FrameHeader:
        """Return the header in the first 64 bytes of `data`; the limits are the reader's own.

        Raises every error that costs the lane. What costs only the transfer, a codec or table that
        was not agreed on, is `check_agreed`'s.
        """
        values = HEADER.unpack(data)
        HEADER.require(values, "magic", values["magic"] == FRAME_MAGIC, ErrorCode.BAD_MAGIC)
        crc = crc32c(data[:HEADER.bytes - _CRC_BYTES])
        HEADER.require(values, "header_crc", values["header_crc"] == crc,
                       ErrorCode.HEADER_CORRUPT, crc)
        kind = values["type"]
        HEADER.require(values, "type", kind in tuple(FrameType) or kind >= SKIPPABLE_TYPE_MIN,
                       ErrorCode.TYPE_UNKNOWN)
        HEADER.require(values, "flags", not values["flags"] & _HEADER_FLAGS_RESERVED,
                       ErrorCode.RESERVED_BIT_SET)
        least, most, step = payload_rule(kind, payload_bytes_max, control_bytes_max)
        payload_bytes = values["payload_bytes"]
        HEADER.require(values, "payload_bytes", payload_bytes <= most,
                       ErrorCode.LIMIT_EXCEEDED, most)
        HEADER.require(values, "payload_bytes",
                       payload_bytes >= least and (payload_bytes - least) % step == 0,
                       ErrorCode.TRUNCATED, least)
        if kind < SKIPPABLE_TYPE_MIN:
            _check_header_fields(values)
        HEADER.require_zero(values, "reserved")
        return cls(**{field: values[field] for field in cls.__dataclass_fields__})

    @property
    def name(self) -> str:
        return FrameType(self.type).name if self.type in tuple(FrameType) else f"{self.type:#x}"

    @property
    def skippable(self) -> bool:
        return self.type >= SKIPPABLE_TYPE_MIN

    def check_agreed(self, codecs: int) -> None:
        """Raise TABLE_UNKNOWN or CODEC_UNSUPPORTED unless a CHUNK's coding was agreed on.

        `codecs` is what the greetings, the manifest and the grant all permit.
        """
        HEADER.require(vars(self), "table_index", self.table_index == 0, ErrorCode.TABLE_UNKNOWN)
        HEADER.require(vars(self), "codec", codecs >> self.codec & 1 and self.codec < 32,
                       ErrorCode.CODEC_UNSUPPORTED)


def payload_rule(kind: int, payload_bytes_max: int, control_bytes_max: int
                 ) -> tuple[int, int, int]:
    """Return least and most `payload_bytes` of a frame type, and their step (§6)."""
    return {
        FrameType.MANIFEST: (64, control_bytes_max, 1),
        FrameType.GRANT: (16, 16, 1),
        FrameType.SEGMENT: (16 + 24, 16 + 24 * limits.ITEM_COUNT_MAX, 24),
        FrameType.CHUNK: (1, payload_bytes_max, 1),
        FrameType.SEGMENT_END: (8, 8, 1),
        FrameType.END: (24, 24 + limits.METADATA_BYTES_MAX, 1),
        FrameType.RECEIPT: (16, 16 * limits.RECEIPT_COUNT_MAX, 16),
        FrameType.REPAIR: (24, 24 * limits.REPAIR_COUNT_MAX, 24),
        FrameType.ABORT: (32, 32 + limits.MESSAGE_BYTES_MAX, 1),
        FrameType.PULL: (48, 48, 1),
        FrameType.DONE: (16, 16, 1),
        FrameType.INDEX: (0, limits.INDEX_BYTES_MAX, 8),
        FrameType.COMMIT: (32, 32, 1),
        FrameType.CLOSE: (0, 0, 1),
    }.get(kind, (0, control_bytes_max, 1))


def _check_header_fields(values: dict) -> None:
    require, kind = HEADER.require, values["type"]
    if kind == FrameType.CLOSE:
        require(values, "transfer_id", values["transfer_id"] == NO_ID)
    elif kind != FrameType.ABORT:
        require(values, "transfer_id", values["transfer_id"] != NO_ID)
    if kind in _WITH_SEGMENT:
        require(values, "segment_index", values["segment_index"] < limits.SEGMENT_COUNT_MAX,
                ErrorCode.LIMIT_EXCEEDED, limits.SEGMENT_COUNT_MAX - 1)
    else:
        require(values, "segment_index", values["segment_index"] == 0)
    if kind != FrameType.CHUNK:
        for field in _CHUNK_ONLY:
            require(values, field, values[field] == 0, expected=0)
        return
    raw_bytes, payload_bytes = values["raw_bytes"], values["payload_bytes"]
    require(values, "attempt", values["attempt"] <= limits.ATTEMPT_MAX, ErrorCode.LIMIT_EXCEEDED,
            limits.ATTEMPT_MAX)
    require(values, "raw_offset", values["raw_offset"] % limits.CHUNK_BYTES_MIN == 0)
    require(values, "raw_bytes", 1 <= raw_bytes <= limits.CHUNK_BYTES_MAX)
    if values["codec"] == Codec.RAW:
        require(values, "payload_bytes", payload_bytes == raw_bytes, expected=raw_bytes)
        require(values, "payload_crc", values["payload_crc"] == values["raw_crc"],
                expected=values["raw_crc"])
    else:
        require(values, "payload_bytes", payload_bytes < raw_bytes)


def encode_frame(kind: int, transfer_id: bytes = NO_ID, payload: bytes = b"", **fields) -> bytes:
    """Return a whole frame; length and checksum of the payload are filled in."""
    header = FrameHeader(kind, len(payload), transfer_id, payload_crc=crc32c(payload), **fields)
    return header.encode() + payload


class Frame(NamedTuple):
    """A frame: its header has arrived, and when `payload` is not None the rest has, too."""

    header: FrameHeader
    payload: bytes | None


class FrameReader:
    """Bytes in, frames out; without I/O, and the same however the bytes are cut.

    Args:
        reader: the reader's role. The stream begins with the peer's greeting, which is then found
            in `greeting`.
        payload_bytes_max, control_bytes_max: what the reader's own greeting states.
        greeting: the peer's, where it has been read already, with an admission behind it (§5.1).

    After an error the stream cannot be read on: every later call raises the same error.
    """

    def __init__(self, reader: Role, payload_bytes_max: int = limits.CHUNK_BYTES_MAX,
                 control_bytes_max: int = limits.CONTROL_BYTES_MAX,
                 greeting: Greeting | None = None):
        self.greeting = greeting
        self.offset = 0
        self.closed = False
        self._reader = reader
        self._limits = payload_bytes_max, control_bytes_max
        self._buffer = bytearray()
        self._header: FrameHeader | None = None
        self._error: KvwireError | None = None

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take `data` and return an iterator over the frames that are whole now.

        The error, if there is one, is raised when the frames before it have been taken.
        """
        return (frame for frame in self.events(data) if frame.payload is not None)

    def events(self, data: bytes) -> Iterator[Frame]:
        """As `feed`, but yields each frame twice: first with its header alone, payload None."""
        self._buffer += data
        return self._events()

    def finish(self) -> None:
        """Raise TRUNCATED if the stream may not end here."""
        if self._error is None and (self._buffer or self._header or self.greeting is None):
            self._error = error_from_code(
                ErrorCode.TRUNCATED, "stream: the bytes end inside a greeting or frame",
                offset=self.offset + len(self._buffer))
        if self._error:
            raise self._error

    def _events(self) -> Iterator[Frame]:
        while True:
            if self._error:
                raise self._error
            try:
                frame = self._next()
            except KvwireError as error:
                self._error = error
                raise
            if frame is None:
                return
            yield frame

    def _next(self) -> Frame | None:
        if self.greeting is None:
            if len(self._buffer) < GREETING.bytes:
                return None
            self.greeting = Greeting.decode(self._take(GREETING.bytes), self._reader)
        if self._header is None:
            if len(self._buffer) < HEADER.bytes:
                return None
            header = FrameHeader.decode(bytes(self._buffer[:HEADER.bytes]), *self._limits)
            if self.closed:
                fail(ErrorCode.STATE_INVALID, f"stream: {header.name} after CLOSE",
                     offset=self.offset)
            if header.type == FrameType.CHUNK:
                self._check_writer(header)
            self._take(HEADER.bytes)
            self._header = header
            return Frame(header, None)
        header = self._header
        if len(self._buffer) < header.payload_bytes:
            return None
        payload = self._take(header.payload_bytes)
        self._header = None
        if header.type != FrameType.CHUNK:
            crc = crc32c(payload)
            if crc != header.payload_crc:
                fail(ErrorCode.CONTROL_CORRUPT, f"{header.name}: payload checksum differs",
                     expected=header.payload_crc, actual=crc, offset=self.offset)
            self._check_writer(header)
        self.closed = header.type == FrameType.CLOSE
        return Frame(header, payload)

    def _check_writer(self, header: FrameHeader) -> None:
        if not header.skippable and self.greeting.role not in WRITERS[header.type]:
            fail(ErrorCode.STATE_INVALID, f"stream: {header.name} is never written by a "
                 f"{self.greeting.role.name.lower()}", actual=header.type, offset=self.offset)

    def _take(self, count: int) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        self.offset += count
        return data
