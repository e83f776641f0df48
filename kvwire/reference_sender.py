"""FORMAT.md §10: the sender of one transfer, in memory, slow and readable."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kvwire import limits
from kvwire.checksum import crc32c, segment_digest, transfer_digest
from kvwire.codec import Codec, encode_chunk
from kvwire.control import Abort, Done, End, Grant, Item, Receipt, Repair, Segment, SegmentEnd
from kvwire.errors import ErrorCode, KvwireError, error_from_code
from kvwire.link_tables import SentTables, holds_structure
from kvwire.manifest import Manifest
from kvwire.quantised import QuantisedPart, decode_quantised, encode_quantised
from kvwire.tensor_spec import DType
from kvwire.tiered import CodeTable, element_format
from kvwire.wire import (
    CODECS_SPOKEN, NO_ID, FrameHeader, FrameReader, FrameType, Greeting, Role, encode_frame,
)

__all__ = ["ReferenceSender"]

Writes = list[tuple[int, bytes]]
Place = tuple[int, int]  # segment index, chunk index
Rounding = Callable[[int, int, bytes], Sequence[QuantisedPart]]
CODED_ATTEMPTS_MAX = 2  # the first one may refer to a table, the second has it inside


@dataclass
class _Lane:
    reader: FrameReader
    open: bool = True
    stalled: bool = False
    announced: set[int] = field(default_factory=set)


@dataclass
class _Sent:
    lane: int
    attempt: int


class ReferenceSender:
    """Dials `lane_count` lanes and sends one transfer over them.

    Args:
        segments: for each its items and its raw bytes.
        codec: what chunks are coded with.
        codecs: what the greetings say.
        names_tables: of TIERED, one for each dtype, named to the receiver; False: each chunk has
            its own one inside.
        rounding: (segment index, offset, raw bytes) -> parts of a chunk, for QUANTISED; without
            effect where that is not granted.
        seed: shuffles chunks and lanes; None: in order, lane after lane.
    """

    def __init__(self, manifest: Manifest, segments: Sequence[tuple[Sequence[Item], bytes]], *,
                 transfer_id: bytes, link_id: bytes, lane_count: int = 1,
                 chunk_bytes: int = limits.CHUNK_BYTES_MIN, codec: Codec = Codec.RAW,
                 codecs: int = CODECS_SPOKEN, names_tables: bool = True,
                 rounding: Rounding | None = None,
                 metadata: dict[str, object] | None = None, seed: int | None = None):
        self.done: Done | None = None
        self.error: KvwireError | None = None
        self.repairs = 0
        self.lane_errors: dict[int, KvwireError] = {}
        self._manifest, self._transfer_id, self._codec = manifest, transfer_id, codec
        self._segments = [Segment(len(raw), chunk_bytes, tuple(items)) for items, raw in segments]
        self._raw = [bytes(raw) for _, raw in segments]
        self._rounding, self._rounded = rounding, {}  # payloads by place
        self._dtypes = [_dtype(manifest, items[0]) for items, _ in segments]
        self._metadata = metadata or {}
        self._greetings = [Greeting(Role.SENDER, link_id, lane, lane_count, codecs)
                           for lane in range(lane_count)]
        self._lanes = {lane: _Lane(FrameReader(Role.SENDER)) for lane in range(lane_count)}
        self._speaks_tiered = bool(codecs >> Codec.TIERED & 1)
        self._names_tables, self._tables = names_tables, SentTables()
        self._table_of: dict[DType, CodeTable] = {}
        self._grant: Grant | None = None
        self._random = random.Random(seed) if seed is not None else None
        self._queue = [(index, chunk) for index, segment in enumerate(self._segments)
                       for chunk in range(segment.chunk_count)]
        if self._random:
            self._random.shuffle(self._queue)
        self._sent: dict[Place, _Sent] = {}
        self._verified: set[Place] = set()
        self._ends_sent: dict[int, int] = {}
        self._receipted: set[int] = set()
        self._end_lane: int | None = None
        self._turn = 0
        self._writes: Writes = []

    def _round(self, index: int) -> bytes:
        """Keep the payloads of a segment's chunks; return its raw bytes as placed."""
        segment, raw, placed = self._segments[index], self._raw[index], []
        for chunk in range(segment.chunk_count):
            offset = chunk * segment.chunk_bytes
            part = raw[offset:offset + segment.chunk_raw_bytes(chunk)]
            payload = encode_quantised(part, self._rounding(index, offset, part))
            self._rounded[index, chunk] = payload
            placed.append(decode_quantised(payload, len(part)))
        return b"".join(placed)

    def start(self) -> Writes:
        """Return the greetings of all lanes, and the manifest on the first."""
        self._writes = [(lane, greeting.encode()) for lane, greeting in enumerate(self._greetings)]
        self._write(0, FrameType.MANIFEST, self._manifest.encode())
        return self._taken()

    def feed(self, lane: int, data: bytes) -> Writes:
        """Take what the receiver wrote on a lane; return what is to be written."""
        state = self._lanes[lane]
        if state.open and self.error is None:
            try:
                for header, payload in state.reader.feed(data):
                    self._on_frame(lane, header, payload)
                if state.reader.greeting:
                    self._greetings[lane].check_answer(state.reader.greeting)
                self._pump()
            except KvwireError as error:
                self.lane_errors[lane] = error
                self._drop(lane)
        return self._taken()

    def lane_lost(self, lane: int) -> Writes:
        """Send again on other lanes what the lost one may not have delivered."""
        self._drop(lane)
        return self._taken()

    def lane_opened(self, lane: int) -> Writes:
        """Greet on a new connection; with no other lane, say again what was not answered."""
        alone = not self._open_lanes()
        self._lanes[lane] = _Lane(FrameReader(Role.SENDER))
        self._writes.append((lane, self._greetings[lane].encode()))
        if alone:
            self._repeat(lambda sent: True)
        return self._taken()

    def lane_stalled(self, lane: int) -> Writes:
        """Send again on other lanes what this one holds up; it stays open."""
        self._lanes[lane].stalled = True
        self._repeat(lambda sent: sent.lane == lane)
        return self._taken()

    def lease_over(self) -> None:
        """No lane came back in time."""
        self.error = self.error or error_from_code(ErrorCode.LINK_LOST, "no lane came back in time")

    def close(self) -> Writes:
        for lane in self._open_lanes():
            self._writes.append((lane, encode_frame(FrameType.CLOSE)))
        return self._taken()

    def _taken(self) -> Writes:
        writes, self._writes = self._writes, []
        return writes

    def _open_lanes(self) -> list[int]:
        return [lane for lane, state in self._lanes.items() if state.open]

    def _write(self, lane: int, kind: FrameType, payload: bytes, **fields: int) -> None:
        self._writes.append((lane, encode_frame(kind, self._transfer_id, payload, **fields)))

    def _say_names(self) -> None:
        if names := self._tables.names():
            self._writes.append((self._next_lane(), encode_frame(FrameType.TABLE_NAMES,
                                                                 payload=names)))

    def _next_lane(self) -> int:
        able = self._open_lanes()
        able = [lane for lane in able if not self._lanes[lane].stalled] or able
        if self._random:
            return self._random.choice(able)
        self._turn += 1
        return able[(self._turn - 1) % len(able)]

    def _drop(self, lane: int) -> None:
        self._lanes[lane].open = False
        if self._open_lanes():
            self._repeat(lambda sent: sent.lane == lane)

    def _repeat(self, held_up: Callable[[_Sent], bool]) -> None:
        if self.done or self.error:
            return
        self._tables.lane_lost()
        self._say_names()
        if self._grant is None:
            self._write(self._next_lane(), FrameType.MANIFEST, self._manifest.encode())
            return
        for place, sent in self._sent.items():
            if held_up(sent) and place not in self._verified:
                self._send_chunk(place)
        for index in self._ends_sent:
            if index not in self._receipted:
                self._send_segment_end(index)
        if self._end_lane is not None:
            self._send_end()

    def _on_frame(self, lane: int, header: FrameHeader, payload: bytes) -> None:
        if header.type == FrameType.TABLE_ANSWER and self._speaks_tiered:
            for table in self._tables.on_answer(payload) if holds_structure(
                    header.type, payload) else ():
                self._writes.append((lane, encode_frame(FrameType.TABLE, payload=table)))
        if header.type == FrameType.ABORT and header.transfer_id in (NO_ID, self._transfer_id):
            abort = Abort.decode(payload)
            error = error_from_code(abort.code, abort.message, expected=abort.expected,
                                    actual=abort.actual, offset=abort.offset, remote=True)
            if header.transfer_id == NO_ID:
                raise error
            self.error = self.error or error
        if self.error or self.done or header.transfer_id != self._transfer_id:
            return
        if header.type == FrameType.GRANT:
            self._grant = self._grant or Grant.decode(payload)
            if self._rounding and self._grant.codecs >> Codec.QUANTISED & 1 and not self._rounded:
                self._raw = [self._round(index) for index in range(len(self._segments))]
        elif header.type == FrameType.RECEIPT:
            self._on_receipt(Receipt.decode(payload))
        elif header.type == FrameType.REPAIR:
            self._on_repair(Repair.decode(payload))
        elif header.type == FrameType.DONE:
            self.done = Done.decode(payload)

    def _on_receipt(self, receipt: Receipt) -> None:
        for run in receipt.runs:
            if run.chunk_count == 0:
                self._receipted.add(run.segment_index)
            for chunk in range(run.chunk_first, run.chunk_first + run.chunk_count):
                self._verified.add((run.segment_index, chunk))

    def _on_repair(self, repair: Repair) -> None:
        for entry in repair.entries:
            place = entry.segment_index, entry.chunk_index
            sent = self._sent.get(place)
            if sent and entry.attempt == sent.attempt and place not in self._verified:
                self.repairs += 1
                self._send_chunk(place)

    def _pump(self) -> None:
        """Send what the grant's window allows; SEGMENT_ENDs and END when all chunks are out."""
        if self._grant is None or self.error or self.done:
            return
        on_way = sum(self._chunk_bytes(place) for place in self._sent
                     if place not in self._verified)
        while self._queue and on_way + self._chunk_bytes(self._queue[0]) <= (
                self._grant.window_bytes):
            on_way += self._chunk_bytes(self._queue[0])
            self._send_chunk(self._queue.pop(0))
        if not self._queue and self._end_lane is None:
            for index in range(len(self._segments)):
                self._send_segment_end(index)
            self._send_end()

    def _chunk_bytes(self, place: Place) -> int:
        return self._segments[place[0]].chunk_raw_bytes(place[1])

    def _announce(self, lane: int, index: int) -> None:
        if index not in self._lanes[lane].announced:
            self._lanes[lane].announced.add(index)
            self._write(lane, FrameType.SEGMENT, self._segments[index].encode(),
                        segment_index=index)

    def _send_chunk(self, place: Place) -> None:
        index, chunk = place
        lane, before = self._next_lane(), self._sent.get(place)
        attempt = before.attempt + 1 if before else 0
        self._sent[place] = _Sent(lane, attempt)
        self._announce(lane, index)
        offset = chunk * self._segments[index].chunk_bytes
        raw = self._raw[index][offset:offset + self._chunk_bytes(place)]
        agreed = self._codec if self._grant.codecs >> self._codec & 1 else Codec.RAW
        codec, payload = agreed, self._rounded.get(place, raw)
        if agreed != Codec.QUANTISED or len(payload) >= len(raw):
            codec, payload = self._encode(agreed, raw, self._dtypes[index], attempt)
        self._write(lane, FrameType.CHUNK, payload, segment_index=index, attempt=attempt,
                    raw_offset=offset, raw_bytes=len(raw), raw_crc=crc32c(raw), codec=codec)
        self._say_names()

    def _encode(self, codec: Codec, raw: bytes, dtype: DType, attempt: int) -> tuple[Codec, bytes]:
        if codec != Codec.TIERED or not self._names_tables or element_format(dtype) is None:
            return encode_chunk(codec, raw, dtype)
        if attempt >= CODED_ATTEMPTS_MAX:
            return encode_chunk(Codec.RAW, raw, dtype)
        whole = len(raw) // dtype.item_bytes * dtype.item_bytes
        if dtype not in self._table_of:
            self._table_of[dtype] = CodeTable.of_elements(raw[:whole], dtype)
        table = self._table_of[dtype]
        return encode_chunk(codec, raw, dtype, table,
                            self._tables.index_of(table) if attempt == 0 else 0)

    def _digest(self, index: int) -> int:
        size = self._segments[index].chunk_bytes
        raw = self._raw[index]
        return segment_digest((offset, len(raw[offset:offset + size]),
                               crc32c(raw[offset:offset + size]))
                              for offset in range(0, len(raw), size))

    def _send_segment_end(self, index: int) -> None:
        lane = self._ends_sent[index] = self._next_lane()
        self._announce(lane, index)
        end = SegmentEnd(self._segments[index].chunk_count, self._digest(index))
        self._write(lane, FrameType.SEGMENT_END, end.encode(), segment_index=index)

    def _send_end(self) -> None:
        self._end_lane = self._next_lane()
        raw_bytes = sum(map(len, self._raw))
        digest = transfer_digest((index, self._digest(index), len(raw))
                                 for index, raw in enumerate(self._raw))
        end = End(len(self._segments), digest, raw_bytes, self._metadata)
        self._write(self._end_lane, FrameType.END, end.encode())


def _dtype(manifest: Manifest, item: Item) -> DType:
    return manifest.spec.groups[item.group_index].tensors[item.tensor_index].dtype
