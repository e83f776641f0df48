"""FORMAT.md §10: a receiver in memory, slow and readable: what each frame does, and its answer.

It reads whole payloads before it acts on them, but takes the write lease of a chunk at its header,
as a receiver must that lets payloads land in place.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvwire import limits
from kvwire.checksum import transfer_digest
from kvwire.codec import Codec
from kvwire.control import (
    Abort, ChunkRun, Done, End, Grant, Receipt, Repair, RepairEntry, Segment, SegmentEnd,
)
from kvwire.errors import ErrorCode, KvwireError, error_from_code
from kvwire.link_tables import ReceivedTables
from kvwire.manifest import Manifest
from kvwire.reference_memory import ReferenceTicket, check_item, item_raw_bytes
from kvwire.reference_state import (
    ChunkRecord, ChunkState, LaneRecord, SegmentRecord, TransferRecord, check_digest,
    verified_bytes,
)
from kvwire.structure import fail
from kvwire.wire import (
    CODECS_SPOKEN, NO_ID, PING_BYTES, FrameHeader, FrameReader, FrameType, Greeting, Role,
    encode_frame,
)

__all__ = ["ReferenceReceiver"]

Answers = list[tuple[int, bytes]]
_LANE_FATES = range(100, 112)


def _has_more(transfer: TransferRecord | None) -> bool:
    """Say whether the sender has the tokens that the ticket wants, among others."""
    if transfer is None or transfer.ticket is None:
        return False
    manifest, wanted = transfer.manifest, transfer.ticket.memory
    return (manifest.token_start <= wanted.token_start
            and manifest.token_stop >= wanted.token_stop)


class ReferenceReceiver:
    """One link's receiver, which was dialled. Feed it what arrives on each lane.

    Args:
        tickets: destinations by ticket id; `bind` adds more.
        attempts_max: failures of one chunk that fail its transfer.
        window_bytes, chunk_bytes_max, codecs: what its grants say.
        transfers_max: open transfers that it accepts.

    `errors` says why transfers failed, `lane_errors` why lanes were closed.
    """

    def __init__(self, tickets: Mapping[bytes, ReferenceTicket] | None = None, *,
                 attempts_max: int = limits.ATTEMPTS_MAX, window_bytes: int = 1 << 26,
                 chunk_bytes_max: int = limits.CHUNK_BYTES_MAX, codecs: int = CODECS_SPOKEN,
                 transfers_max: int = 1024):
        self.tickets = dict(tickets or {})
        self.errors: dict[bytes, KvwireError] = {}
        self.lane_errors: dict[int, KvwireError] = {}
        self._attempts_max = attempts_max
        self._grant = Grant(window_bytes, codecs, chunk_bytes_max)
        self._transfers_max = transfers_max
        self._lanes: dict[int, LaneRecord] = {}
        self._open: dict[bytes, TransferRecord] = {}
        self._ended: dict[bytes, bytes] = {}  # transfer id: the frame that answers it for ever
        self._overtaken: set[bytes] = set()   # of these, those whose MANIFEST never came
        self._greeting: Greeting | None = None
        self._tables = ReceivedTables()
        self._speaks_tiered = bool(codecs >> Codec.TIERED & 1)
        self._answers: Answers = []
        self._lane = 0  # whose frame is being acted on

    def feed(self, lane: int, data: bytes) -> Answers:
        """Take bytes of a lane's stream; return what is to be written, and on which lane."""
        state = self._lanes.setdefault(lane, LaneRecord(FrameReader(Role.RECEIVER)))
        self._lane = lane
        if state.open:
            try:
                for frame in state.reader.events(data):
                    self._greet(lane, state)
                    self._on_frame(lane, *frame)
                self._greet(lane, state)
            except KvwireError as error:
                self._close_lane(lane, error)
        return self._taken()

    def lane_lost(self, lane: int) -> Answers:
        """The connection of a lane is gone."""
        state = self._lanes.get(lane)
        if state and state.open:
            try:
                state.reader.finish()
                self._close_lane(lane, None)
            except KvwireError as error:
                self._close_lane(lane, error, tell=False)
        return self._taken()

    def lane_opened(self, lane: int) -> None:
        """A new connection takes the place of a lane's lost one."""
        self._lanes[lane] = LaneRecord(FrameReader(Role.RECEIVER))

    def lease_over(self) -> Answers:
        """No lane came back in time."""
        self._fail_all(ErrorCode.LINK_LOST, "no lane came back in time")
        return self._taken()

    def bind(self, ticket_id: bytes, ticket: ReferenceTicket) -> Answers:
        """Add a ticket, and open the transfers that wait for it."""
        self.tickets[ticket_id] = ticket
        for transfer_id, transfer in list(self._open.items()):
            if transfer.grant is None and transfer.manifest.ticket_id == ticket_id:
                self._try(transfer_id, lambda: self._open_transfer(transfer_id, transfer))
        return self._taken()

    def lose_patience(self) -> Answers:
        """Give up on the manifests that wait for a ticket."""
        for transfer_id, transfer in list(self._open.items()):
            if transfer.grant is None:
                self._fail_transfer(transfer_id, error_from_code(
                    ErrorCode.TICKET_UNKNOWN, "no such ticket, and none came in time"))
        return self._taken()

    def cancel(self, ticket_id: bytes) -> Answers:
        """Close a ticket: when this returns, nothing will be written to its memory any more."""
        self._fail_ticket(self.tickets[ticket_id],
                          error_from_code(ErrorCode.CANCELLED, "the receiver cancelled"))
        return self._taken()

    def layer_ready(self, ticket_id: bytes, layer: int) -> bool:
        """True when all parts of a layer are verified and no lane may write them any more."""
        return self.tickets[ticket_id].memory.layer_ready(layer)

    def _taken(self) -> Answers:
        answers, self._answers = self._answers, []
        return answers

    def _answer(self, lane: int, kind: FrameType, transfer_id: bytes, payload: bytes) -> None:
        self._send(lane, encode_frame(kind, transfer_id, payload))

    def _send(self, lane: int, frame: bytes) -> None:
        """Write on `lane`, or on any other when it is gone."""
        able = [index for index, state in self._lanes.items() if state.open and state.greeted]
        if able:
            self._answers.append((lane if lane in able else able[0], frame))

    def _greet(self, lane: int, state: LaneRecord) -> None:
        theirs = state.reader.greeting
        if theirs is None or state.greeted:
            return
        if self._greeting and (theirs.link_id, theirs.lane_count) != (
                self._greeting.link_id, self._greeting.lane_count):
            fail(ErrorCode.FIELD_INVALID, "greeting: the lane belongs to another link")
        self._greeting = self._greeting or theirs
        state.greeted = True
        self._answers.append((lane, Greeting(
            Role.RECEIVER, theirs.link_id, theirs.lane_index, theirs.lane_count,
            self._grant.codecs, transfers_max=self._transfers_max).encode()))

    def _close_lane(self, lane: int, error: KvwireError | None, tell: bool = True) -> None:
        state = self._lanes[lane]
        if error:
            self.lane_errors[lane] = error
            if tell and state.greeted:
                self._answers.append((lane, encode_frame(
                    FrameType.ABORT, NO_ID, Abort.of(error).encode())))
        state.open = False
        self._give_back(state)
        if state.reader.closed and not any(other.open for other in self._lanes.values()):
            self._fail_all(ErrorCode.PEER_CLOSED, "the sender has left")

    def _fail_all(self, code: ErrorCode, why: str) -> None:
        for transfer_id in list(self._open):
            self._fail_transfer(transfer_id, error_from_code(code, why))

    def _give_back(self, state: LaneRecord) -> None:
        if state.lease:
            chunk = state.lease[2]
            chunk.state, chunk.lane, state.lease = ChunkState.MISSING, None, None

    def _try(self, transfer_id: bytes, act) -> None:
        """Run `act`; an error that costs the transfer ends here, one of the lane goes on."""
        try:
            act()
        except KvwireError as error:
            before_grant = error.code == ErrorCode.STATE_INVALID
            if error.code in _LANE_FATES and not before_grant:
                raise
            self._fail_transfer(transfer_id, error)

    def _fail_transfer(self, transfer_id: bytes, error: KvwireError) -> None:
        transfer = self._open.pop(transfer_id, None)
        self.errors[transfer_id] = error
        self._ended[transfer_id] = encode_frame(FrameType.ABORT, transfer_id,
                                                Abort.of(error).encode())
        for state in self._lanes.values():
            if state.lease and state.lease[0] is transfer:
                self._give_back(state)
        if not error.remote:
            self._send(transfer.lane if transfer else self._lane, self._ended[transfer_id])
        refused = error.code == ErrorCode.SPEC_MISMATCH or (
            error.code == ErrorCode.TOKENS_MISMATCH and not _has_more(transfer))
        if transfer and transfer.ticket and (transfer.grant or refused):
            self._fail_ticket(transfer.ticket, error)

    def _fail_ticket(self, ticket: ReferenceTicket, error: KvwireError) -> None:
        if ticket.complete or ticket.error:
            return
        ticket.error = error
        for transfer_id, transfer in list(self._open.items()):
            if transfer.ticket is ticket:
                self._fail_transfer(transfer_id, error_from_code(
                    error.code, f"the ticket failed: {error.args[0]}"))

    def _on_frame(self, lane: int, header: FrameHeader, payload: bytes | None) -> None:
        transfer_id, kind = header.transfer_id, header.type
        if kind == FrameType.CHUNK:
            self._try(transfer_id, lambda: self._on_chunk(lane, header, payload))
        elif payload is None or kind == FrameType.CLOSE:
            return
        elif header.skippable:
            if kind == FrameType.PING and len(payload) == PING_BYTES:
                self._answer(lane, FrameType.PONG, NO_ID, payload)
            answer = self._tables.answer(kind, payload) if self._speaks_tiered else None
            if answer:
                self._answer(lane, FrameType.TABLE_ANSWER, NO_ID, answer)
        elif kind == FrameType.ABORT:
            self._on_abort(lane, transfer_id, Abort.decode(payload))
        elif kind == FrameType.MANIFEST:
            self._try(transfer_id, lambda: self._on_manifest(lane, transfer_id, payload))
        elif transfer_id in self._ended:
            done = self._ended[transfer_id][2] == FrameType.DONE
            if not done or kind == FrameType.END:
                self._stray(lane, transfer_id)
        elif transfer_id not in self._open:
            self._stray(lane, transfer_id)
        else:
            act = {FrameType.SEGMENT: self._on_segment, FrameType.END: self._on_end,
                   FrameType.SEGMENT_END: self._on_segment_end}[kind]
            transfer = self._open[transfer_id]
            self._try(transfer_id, lambda: act(lane, self._granted(transfer), header, payload))

    def _granted(self, transfer: TransferRecord) -> TransferRecord:
        if transfer.grant is None:
            fail(ErrorCode.STATE_INVALID, "the transfer has no grant yet")
        return transfer

    def _stray(self, lane: int, transfer_id: bytes) -> None:
        """Answer a frame of a transfer that is not open: its end again, or ABORT."""
        if transfer_id in self._ended:
            return self._send(lane, self._ended[transfer_id])
        error = error_from_code(ErrorCode.TRANSFER_UNKNOWN, "the transfer is not open here")
        self._answer(lane, FrameType.ABORT, transfer_id, Abort.of(error).encode())

    def _on_abort(self, lane: int, transfer_id: bytes, abort: Abort) -> None:
        error = error_from_code(abort.code, abort.message, expected=abort.expected,
                                actual=abort.actual, offset=abort.offset, remote=True)
        if transfer_id == NO_ID:
            self._close_lane(lane, error, tell=False)
        elif transfer_id not in self._ended:
            if transfer_id not in self._open:
                self._overtaken.add(transfer_id)
            self._fail_transfer(transfer_id, error)

    def _on_manifest(self, lane: int, transfer_id: bytes, payload: bytes) -> None:
        if transfer_id in self._ended:
            self._send(lane, self._ended[transfer_id])
            ticket = self.tickets.get(Manifest.decode(payload).ticket_id) \
                if transfer_id in self._overtaken else None
            self._overtaken.discard(transfer_id)
            return self._fail_ticket(ticket, self.errors[transfer_id]) if ticket else None
        known = self._open.get(transfer_id)
        if known:
            if known.payload != payload:
                fail(ErrorCode.TRANSFER_DUPLICATE, "the id is in use with another manifest")
            if known.grant:
                self._answer(lane, FrameType.GRANT, transfer_id, known.grant.encode())
            return
        manifest = Manifest.decode(payload)
        waiting = sum(transfer.grant is None for transfer in self._open.values())
        if len(self._open) >= self._transfers_max:
            fail(ErrorCode.RESOURCES_EXHAUSTED, "too many open transfers",
                 expected=self._transfers_max, actual=len(self._open))
        bound = manifest.ticket_id in self.tickets
        if not bound and waiting >= limits.WAITING_MANIFESTS_MAX:
            fail(ErrorCode.RESOURCES_EXHAUSTED, "too many manifests wait for their ticket",
                 expected=limits.WAITING_MANIFESTS_MAX, actual=waiting)
        transfer = self._open[transfer_id] = TransferRecord(lane, payload, manifest)
        if bound:
            self._open_transfer(transfer_id, transfer)

    def _open_transfer(self, transfer_id: bytes, transfer: TransferRecord) -> None:
        manifest = transfer.manifest
        transfer.ticket = self.tickets[manifest.ticket_id]
        transfer.ticket.join(manifest)
        transfer.grant = Grant(self._grant.window_bytes, self._grant.codecs & manifest.codecs,
                               self._grant.chunk_bytes_max)
        self._answer(transfer.lane, FrameType.GRANT, transfer_id, transfer.grant.encode())

    def _on_segment(self, lane: int, transfer: TransferRecord, header: FrameHeader,
                    payload: bytes) -> None:
        index = header.segment_index
        if index in transfer.segments:
            if transfer.segments[index].payload != payload:
                fail(ErrorCode.SEGMENT_INVALID, f"segment {index}: announced twice, differently")
            return
        announced, manifest = Segment.decode(payload), transfer.manifest
        if announced.chunk_bytes > transfer.grant.chunk_bytes_max:
            fail(ErrorCode.SEGMENT_INVALID, f"segment {index}: chunk_bytes is over the grant's",
                 expected=transfer.grant.chunk_bytes_max, actual=announced.chunk_bytes)
        tensors = [check_item(manifest.spec, item, manifest.token_start, manifest.token_stop)
                   for item in announced.items]
        raw_bytes = sum(map(item_raw_bytes, tensors, announced.items))
        if raw_bytes != announced.raw_bytes:
            fail(ErrorCode.SEGMENT_INVALID, f"segment {index}: raw_bytes is not the items' sum",
                 expected=raw_bytes, actual=announced.raw_bytes)
        memory = transfer.ticket.memory
        replicas = memory.claim(manifest.spec, announced.items)
        memory.zero_missing_columns(manifest.spec, announced.items)
        chunks = [ChunkRecord() for _ in range(announced.chunk_count)]
        transfer.segments[index] = SegmentRecord(
            payload, announced, tensors[0].dtype.item_bytes, replicas, chunks)
        self._check_end(transfer)

    def _on_chunk(self, lane: int, header: FrameHeader, payload: bytes | None) -> None:
        if payload is None:
            self._on_chunk_header(lane, header)
            return
        state = self._lanes[lane]
        if state.lease:
            transfer, index, chunk = state.lease
            chunk.lane = state.lease = None
            self._on_chunk_payload(lane, transfer, transfer.segments[index], chunk, header, payload)

    def _on_chunk_header(self, lane: int, header: FrameHeader) -> None:
        """Take the lease, or not: without one the payload is read away."""
        transfer = self._open.get(header.transfer_id)
        if transfer is None:
            done = self._ended.get(header.transfer_id)
            if not (done and done[2] == FrameType.DONE):
                self._stray(lane, header.transfer_id)
            return
        header.check_agreed(self._granted(transfer).grant.codecs)
        segment, number = self._chunk_place(transfer, header)
        chunk = segment.chunks[number]
        if chunk.state == ChunkState.VERIFIED:
            self._receipt(lane, header.transfer_id, ChunkRun(header.segment_index, number, 1))
            return
        if chunk.state == ChunkState.LEASED:
            if header.attempt <= chunk.attempt:
                return
            self._give_back(self._lanes[chunk.lane])
        elif header.attempt < chunk.attempt:
            return
        chunk.state, chunk.lane, chunk.attempt = ChunkState.LEASED, lane, header.attempt
        self._lanes[lane].lease = transfer, header.segment_index, chunk

    def _chunk_place(self, transfer: TransferRecord, header: FrameHeader
                     ) -> tuple[SegmentRecord, int]:
        segment = self._segment(transfer, header)
        announced = segment.announced
        number, rest = divmod(header.raw_offset, announced.chunk_bytes)
        raw_bytes = announced.chunk_raw_bytes(number)
        if rest or not raw_bytes:
            fail(ErrorCode.FIELD_INVALID, f"CHUNK: segment {header.segment_index} has no chunk at "
                 f"offset {header.raw_offset}", actual=header.raw_offset)
        if header.raw_bytes != raw_bytes:
            fail(ErrorCode.FIELD_INVALID, f"CHUNK: chunk {number} of segment "
                 f"{header.segment_index} has another length", expected=raw_bytes,
                 actual=header.raw_bytes)
        return segment, number

    def _segment(self, transfer: TransferRecord, header: FrameHeader) -> SegmentRecord:
        if header.segment_index not in transfer.segments:
            fail(ErrorCode.SEGMENT_INVALID, f"{header.name}: segment {header.segment_index} was "
                 "not announced", actual=header.segment_index)
        return transfer.segments[header.segment_index]

    def _on_chunk_payload(self, lane: int, transfer: TransferRecord, segment: SegmentRecord,
                          chunk: ChunkRecord, header: FrameHeader, payload: bytes) -> None:
        """Verify what the lane's lease allowed to be written."""
        number = header.raw_offset // segment.announced.chunk_bytes
        chunk.state = ChunkState.MISSING
        try:
            raw = verified_bytes(header, payload, segment.item_bytes, self._tables.tables)
        except KvwireError as error:
            self._repair(lane, chunk, number, header, error)
            return
        chunk.state, chunk.crc = ChunkState.VERIFIED, header.raw_crc
        transfer.ticket.memory.scatter(transfer.manifest.spec, segment.announced.items,
                                       segment.replicas, header.raw_offset, raw)
        self._receipt(lane, header.transfer_id, ChunkRun(header.segment_index, number, 1))
        self._check_segment(lane, transfer, header, segment)

    def _repair(self, lane: int, chunk: ChunkRecord, number: int, header: FrameHeader,
                error: KvwireError) -> None:
        chunk.failures += 1
        if chunk.failures >= self._attempts_max:
            fail(ErrorCode.RETRIES_EXHAUSTED, f"chunk {number} of segment {header.segment_index} "
                 f"failed {chunk.failures} times: {error.args[0]}", expected=error.expected,
                 actual=error.actual)
        entry = RepairEntry(header.segment_index, number, header.attempt, error.code,
                            error.expected, error.actual)
        self._answer(lane, FrameType.REPAIR, header.transfer_id, Repair((entry,)).encode())

    def _receipt(self, lane: int, transfer_id: bytes, run: ChunkRun) -> None:
        self._answer(lane, FrameType.RECEIPT, transfer_id, Receipt((run,)).encode())

    def _on_segment_end(self, lane: int, transfer: TransferRecord, header: FrameHeader,
                        payload: bytes) -> None:
        end, segment = SegmentEnd.decode(payload), self._segment(transfer, header)
        if end.chunk_count != len(segment.chunks):
            fail(ErrorCode.SEGMENT_INVALID, f"segment {header.segment_index}: chunk_count differs",
                 expected=len(segment.chunks), actual=end.chunk_count)
        if segment.end:
            check_digest(f"repeated end of segment {header.segment_index}", end.digest,
                          segment.end.digest)
        segment.end, segment.complete = end, False
        self._check_segment(lane, transfer, header, segment)

    def _check_segment(self, lane: int, transfer: TransferRecord, header: FrameHeader,
                       segment: SegmentRecord) -> None:
        """Receipt the segment, and then the transfer, when they are whole now."""
        verified = all(chunk.state == ChunkState.VERIFIED for chunk in segment.chunks)
        if segment.end and verified:
            check_digest(f"segment {header.segment_index}", segment.end.digest, segment.digest)
            segment.complete = True
            self._receipt(lane, header.transfer_id,
                          ChunkRun(header.segment_index, 0, 0, segment.digest))
            self._check_transfer(lane, header.transfer_id, transfer)

    def _on_end(self, lane: int, transfer: TransferRecord, header: FrameHeader,
                payload: bytes) -> None:
        end = End.decode(payload)
        if transfer.end and transfer.end != end:
            fail(ErrorCode.INCOMPLETE, "END: contradicts an earlier END",
                 expected=transfer.end.segment_count, actual=end.segment_count)
        transfer.end = end
        self._check_end(transfer)
        self._check_transfer(lane, header.transfer_id, transfer)

    def _check_end(self, transfer: TransferRecord) -> None:
        """Raise INCOMPLETE when END contradicts what is announced so far."""
        end, segments = transfer.end, transfer.segments
        if end is None:
            return
        beyond = max(segments, default=-1)
        raw_bytes = sum(segment.announced.raw_bytes for segment in segments.values())
        if beyond >= end.segment_count:
            fail(ErrorCode.INCOMPLETE, f"END: segment {beyond} was announced, too",
                 expected=end.segment_count, actual=beyond + 1)
        if len(segments) == end.segment_count and raw_bytes != end.raw_bytes:
            fail(ErrorCode.INCOMPLETE, "END: raw_bytes is not the sum of the segments",
                 expected=raw_bytes, actual=end.raw_bytes)

    def _check_transfer(self, lane: int, transfer_id: bytes, transfer: TransferRecord) -> None:
        end, segments = transfer.end, transfer.segments
        if not end or len(segments) < end.segment_count or not all(
                segment.complete for segment in segments.values()):
            return
        digest = transfer_digest((index, segment.digest, segment.announced.raw_bytes)
                                 for index, segment in sorted(segments.items()))
        check_digest("transfer", end.digest, digest)
        transfer.ticket.rank_done(transfer.manifest, end)
        done = encode_frame(FrameType.DONE, transfer_id, Done(end.raw_bytes, digest).encode())
        del self._open[transfer_id]
        self._ended[transfer_id] = done
        self._send(lane, done)
