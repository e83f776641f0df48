"""FORMAT.md §9.2: tables of a link, at both receivers and both senders alike."""

import numpy as np
import pytest
from native_probe import NativeProbe, native_memory
from reference_probe import Listener, ReferenceProbe, expected_leaves
from vectors.generate import (
    LINK, TICKET, TRANSFER, all_items, filled_with_numbers, number_like,
)

from kvwire import _native, limits
from kvwire.checksum import crc32c
from kvwire.control import Grant, Item, Repair, RepairEntry, Segment
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec, DType, attention
from kvwire.link_tables import (
    TableAnswer, TableName, TableState, decode_answers, decode_names, encode_answers,
    encode_names, encode_table,
)
from kvwire.manifest import Manifest
from kvwire.reference_sender import ReferenceSender
from kvwire.tiered import OPAQUE, PART, CodeTable, Part, decode_tiered, encode_tiered
from kvwire.wire import FrameReader, FrameType, Greeting, Role, encode_frame

SPEC = CacheSpec("t", (attention([0], kv_heads=2, head_dim=16),))
TOKENS = (0, 256)
CHUNK_BYTES = 4096
RAW = number_like(CHUNK_BYTES // 2, DType.BF16).tobytes()
TABLE = CodeTable.of_elements(RAW, DType.BF16)


def other_table(number):
    return CodeTable(DType.BF16, (2, 2), (1, 2, 3, 4, 5, 6), (number,), 1, 0, bytes(number))


class Opened:
    """A receiver with an announced segment on the first of two lanes; says what it answers."""

    def __init__(self, probe):
        manifest = Manifest(TICKET, SPEC, *TOKENS, codecs=5)
        self.receiver, self.reader = probe([manifest]), FrameReader(Role.SENDER)
        self.listener = Listener()
        for lane in range(2):
            self.receiver.feed(lane, Greeting(Role.SENDER, LINK, lane, 2).encode())
        self.receiver.feed(0, encode_frame(FrameType.MANIFEST, TRANSFER, manifest.encode()))
        item = Item(0, 0, 0, *TOKENS)
        segment = Segment(256 * 2 * 16 * 2, CHUNK_BYTES, (item,))
        self.receiver.feed(0, encode_frame(FrameType.SEGMENT, TRANSFER, segment.encode()))

    def say(self, kind, payload, lane=0):
        """Send a frame; return what is answered about tables."""
        answers = []
        for _, data in self.receiver.feed(lane, encode_frame(kind, payload=payload)):
            reader = FrameReader(Role.SENDER, greeting=Greeting(Role.RECEIVER, LINK))
            answers += [answer for header, payload in reader.feed(data)
                        if header.type == FrameType.TABLE_ANSWER
                        for answer in decode_answers(payload)]
        return [(answer.table_index, answer.state) for answer in answers]

    def name(self, *named, lane=0):
        return self.say(FrameType.TABLE_NAMES, encode_names(
            [TableName(index, name) for index, name in named]), lane)

    def table(self, index, data, lane=0):
        return self.say(FrameType.TABLE, encode_table(index, data), lane)

    def chunk(self, parts, number=0, attempt=0):
        """Send a chunk; return what it is refused for, None when it is receipted."""
        payload = encode_tiered(RAW, parts)
        reader = FrameReader(Role.SENDER, greeting=Greeting(Role.RECEIVER, LINK))
        for _, data in self.receiver.feed(0, encode_frame(
                FrameType.CHUNK, TRANSFER, payload, raw_offset=number * CHUNK_BYTES,
                raw_bytes=CHUNK_BYTES, raw_crc=crc32c(RAW), codec=2, attempt=attempt)):
            for header, answer in reader.feed(data):
                if header.type == FrameType.REPAIR:
                    (entry,) = Repair.decode(answer).entries
                    return entry.reason
                assert header.type == FrameType.RECEIPT
                return None
        raise AssertionError("no answer")


@pytest.fixture(params=[ReferenceProbe, NativeProbe], ids=["reference", "native"])
def opened(request):
    return Opened(request.param)


def test_a_table_is_named_wanted_sent_and_known_on_every_lane(opened):
    assert opened.name((7, TABLE.name)) == [(7, TableState.WANTED)]
    assert opened.chunk([Part(CHUNK_BYTES, TABLE, 0, 7)]) == ErrorCode.TABLE_UNKNOWN
    assert opened.table(7, TABLE.encode(), lane=1) == [(7, TableState.KNOWN)]
    assert opened.chunk([Part(CHUNK_BYTES, TABLE, 0, 7)], attempt=1) is None
    assert opened.chunk([Part(1024, TABLE, 0, 7), Part(CHUNK_BYTES - 1024, TABLE, 0, 7)], 1) is None


def test_what_is_said_again_is_answered_again(opened):
    for _ in range(2):
        assert opened.name((1, TABLE.name)) == [(1, TableState.WANTED)]
    for _ in range(2):
        assert opened.table(1, TABLE.encode()) == [(1, TableState.KNOWN)]
    assert opened.name((1, TABLE.name), lane=1) == [(1, TableState.KNOWN)]


def test_many_at_once(opened):
    tables = [other_table(number) for number in range(1, 40)]
    named = [(number + 1, table.name) for number, table in enumerate(tables)]
    assert opened.name(*named) == [(index, TableState.WANTED) for index, _ in named]
    for index, table in enumerate(tables, 1):
        assert opened.table(index, table.encode()) == [(index, TableState.KNOWN)]


@pytest.mark.parametrize("data", [
    TABLE.encode()[:-1], TABLE.encode() + b"\0", b"", bytes(48), other_table(3).encode(),
    b"\x02" + TABLE.encode()[1:]], ids=["short", "long", "empty", "zero", "other", "another dtype"])
def test_bytes_of_another_name_are_refused(opened, data):
    opened.name((1, TABLE.name))
    assert opened.table(1, data) == [(1, TableState.REFUSED)]
    assert opened.chunk([Part(CHUNK_BYTES, TABLE, 0, 1)]) == ErrorCode.TABLE_UNKNOWN
    assert opened.chunk([Part(CHUNK_BYTES, TABLE)], attempt=1) is None
    for _ in range(2):  # which is final
        assert opened.name((1, TABLE.name)) == [(1, TableState.REFUSED)]
        assert opened.table(1, TABLE.encode()) == [(1, TableState.REFUSED)]


def test_a_table_that_breaks_a_rule_is_refused_under_its_own_name(opened):
    import hashlib
    bad = bytearray(TABLE.encode())
    bad[1] = 5
    opened.name((1, hashlib.sha256(bad).digest()[:16]))
    assert opened.table(1, bytes(bad)) == [(1, TableState.REFUSED)]


@pytest.mark.parametrize("kind, payload, code", [
    (FrameType.TABLE_NAMES, encode_names([TableName(0, bytes(16))]), ErrorCode.FIELD_INVALID),
    (FrameType.TABLE_NAMES, encode_names([TableName(4097, bytes(16))]), ErrorCode.FIELD_INVALID),
    (FrameType.TABLE_NAMES, encode_names([TableName(1, b"a" * 16), TableName(1, b"b" * 16)]),
     ErrorCode.FIELD_INVALID),
    (FrameType.TABLE_NAMES, b"\1\0\0\0\1" + bytes(19), ErrorCode.RESERVED_BIT_SET),
    (FrameType.TABLE, encode_table(1, TABLE.encode()), ErrorCode.FIELD_INVALID),
    (FrameType.TABLE, encode_table(0, TABLE.encode()), ErrorCode.FIELD_INVALID),
    (FrameType.TABLE, b"\1\0\0\0\0\0\0\1" + TABLE.encode(), ErrorCode.RESERVED_BIT_SET),
])
def test_wrong_frames_close_the_lane(opened, kind, payload, code):
    opened.say(kind, payload)
    assert opened.receiver.lane_error(0) == code


@pytest.mark.parametrize("kind, payload", [
    (FrameType.TABLE_NAMES, b""), (FrameType.TABLE_NAMES, bytes(23)), (FrameType.TABLE, bytes(7)),
    (FrameType.TABLE_NAMES, bytes(24 * (limits.TABLE_ENTRY_COUNT_MAX + 1))),
    (FrameType.TABLE_ANSWER, bytes(8))])
def test_frames_without_their_structure_are_skipped(opened, kind, payload):
    assert opened.say(kind, payload) == []
    assert opened.receiver.lane_error(0) is None


def test_a_link_keeps_16_mib_of_tables(opened):
    """Of large ones that are all different; what it says of them is the implementation's."""
    states = []
    for index in range(1, 300):
        bases = np.full(65_000, index % 251, np.uint8)
        bases[0] = index // 251
        table = CodeTable(DType.BF16, (2,), (0, 1, 2), (65_000,), 1, 0, bases.tobytes())
        opened.name((index, table.name))
        states += [state for _, state in opened.table(index, table.encode())]
    assert states[0] == TableState.KNOWN and states[-1] == TableState.REFUSED
    kept = states.count(TableState.KNOWN)
    assert kept * 65_000 <= limits.TABLE_BYTES_MAX < (kept + 2) * 66_000


SENDER_LINK = b"\7" * 16  # of the native probe
MANIFEST = Manifest(TICKET, SPEC, *TOKENS, codecs=7)


def native_sender(memory, lanes):
    probe = _native.SenderProbe(TRANSFER, MANIFEST.encode(), native_memory(memory), lanes=lanes,
                                chunk_bytes=CHUNK_BYTES, codec=2)
    probe.push([(i.group_index, i.tensor_index, i.layer, i.token_start, i.token_stop)
                for i in all_items(SPEC, *TOKENS)])
    return probe


class ReferenceSenderProbe(ReferenceSender):
    def __init__(self, memory, lanes):
        items = all_items(SPEC, *TOKENS)
        super().__init__(MANIFEST, [(items, memory.gather(SPEC, items))], transfer_id=TRANSFER,
                         link_id=SENDER_LINK, lane_count=lanes, chunk_bytes=CHUNK_BYTES,
                         codec=2)

    def lane_error(self, lane):
        error = self.lane_errors.get(lane)
        return error and error.code


class Sender:
    """A sender that has pushed all, and what it writes to a receiver that is played here."""

    def __init__(self, make, lanes=1):
        self.memory = filled_with_numbers(SPEC, *TOKENS)
        self.probe = make(self.memory, lanes)
        self.readers = {lane: FrameReader(Role.RECEIVER) for lane in range(lanes)}
        self.hear(self.probe.start())
        for lane in range(lanes):
            greeting = Greeting(Role.RECEIVER, SENDER_LINK, lane, lanes)
            self.hear(self.probe.feed(lane, greeting.encode()))

    def hear(self, writes):
        return [(lane, header, payload) for lane, data in writes
                for header, payload in self.readers[lane].feed(data)]

    def say(self, kind, payload, transfer_id=bytes(16), lane=0):
        return self.hear(self.probe.feed(lane, encode_frame(kind, transfer_id, payload)))

    def grant(self, window_bytes):
        grant = Grant(window_bytes, 7, limits.CHUNK_BYTES_MAX)
        return self.say(FrameType.GRANT, grant.encode(), TRANSFER)


@pytest.fixture(params=[ReferenceSenderProbe, native_sender], ids=["reference", "native"])
def make_sender(request):
    return lambda lanes=1: Sender(request.param, lanes)


def of_type(frames, kind):
    return [(header, payload) for _, header, payload in frames if header.type == kind]


def table_indices(payload):
    at, found = 0, []
    while at < len(payload):
        header = PART.unpack(payload, at)
        found.append(header["table_index"])
        at += header["coded_bytes"]
    return found


def receipt(sender, chunk, segment=0):
    from kvwire.control import ChunkRun, Receipt
    return sender.say(FrameType.RECEIPT, Receipt((ChunkRun(segment, chunk, 1),)).encode(), TRANSFER)


def test_the_sender_names_tables_and_refers_to_them_once_they_are_known(make_sender):
    sender = make_sender()
    frames = sender.grant(CHUNK_BYTES)  # a window of one chunk
    ((header, payload),) = of_type(frames, FrameType.CHUNK)
    assert header.codec == 2 and table_indices(payload) == [0]
    ((_, names),) = of_type(frames, FrameType.TABLE_NAMES)
    (name,) = decode_names(names)
    wanted = encode_answers([TableAnswer(name.table_index, TableState.WANTED)])
    ((_, sent),) = of_type(sender.say(FrameType.TABLE_ANSWER, wanted), FrameType.TABLE)
    table, taken = CodeTable.decode(sent[8:])
    assert taken == len(sent) - 8 and table.name == name.table_name
    assert not sender.say(FrameType.TABLE_ANSWER, wanted)  # it is on its way
    ((header, payload),) = of_type(receipt(sender, 0), FrameType.CHUNK)
    assert table_indices(payload) == [0]
    sender.say(FrameType.TABLE_ANSWER, encode_answers([
        TableAnswer(name.table_index, TableState.KNOWN)]))
    ((header, payload),) = of_type(receipt(sender, 1), FrameType.CHUNK)
    assert table_indices(payload) == [name.table_index]
    raw = decode_tiered(payload, CHUNK_BYTES, {name.table_index: table}.get)
    assert crc32c(raw) == header.raw_crc


@pytest.mark.parametrize("reason", [ErrorCode.TABLE_UNKNOWN, ErrorCode.CODED_INVALID])
def test_what_failed_goes_with_its_table_inside_and_then_raw(make_sender, reason):
    sender = make_sender()
    frames = sender.grant(CHUNK_BYTES)
    (name,) = decode_names(of_type(frames, FrameType.TABLE_NAMES)[0][1])
    sender.say(FrameType.TABLE_ANSWER, encode_answers([
        TableAnswer(name.table_index, TableState.KNOWN)]))
    ((header, payload),) = of_type(receipt(sender, 0), FrameType.CHUNK)
    assert table_indices(payload) == [name.table_index]
    codecs = []
    for attempt in range(3):
        repair = Repair((RepairEntry(0, 1, attempt, reason, 0, 0),)).encode()
        frames = sender.say(FrameType.REPAIR, repair, TRANSFER)
        ((header, payload),) = of_type(frames, FrameType.CHUNK)
        assert header.attempt == attempt + 1
        codecs.append(header.codec)
        if header.codec == 2:
            assert table_indices(payload) == [0]
    assert codecs == [2, 0, 0]


def test_names_without_an_answer_are_said_again_when_a_lane_is_lost(make_sender):
    sender = make_sender(lanes=2)
    frames = sender.grant(2 * CHUNK_BYTES)
    names = of_type(frames, FrameType.TABLE_NAMES)
    (first,) = decode_names(names[0][1])
    again = of_type(sender.hear(sender.probe.lane_lost(0)), FrameType.TABLE_NAMES)
    assert [decode_names(payload) for _, payload in again] == [[first]]
    sender.say(FrameType.TABLE_ANSWER, encode_answers([
        TableAnswer(first.table_index, TableState.REFUSED)]), lane=1)
    chunks = of_type(sender.say(FrameType.RECEIPT, b"", lane=1), FrameType.CHUNK)
    assert all(table_indices(payload) == [0] for _, payload in chunks)


def test_an_answer_about_what_was_never_named_closes_the_lane(make_sender):
    sender = make_sender()
    sender.say(FrameType.TABLE_ANSWER, encode_answers([TableAnswer(9, TableState.WANTED)]))
    assert sender.probe.lane_error(0) == ErrorCode.FIELD_INVALID


@pytest.mark.parametrize("payload, code", [
    (b"\1\0\0\0\4\0\0\0", ErrorCode.FIELD_INVALID), (bytes(8), ErrorCode.FIELD_INVALID)])
def test_wrong_answers_close_the_lane(make_sender, payload, code):
    sender = make_sender()
    sender.say(FrameType.TABLE_ANSWER, payload)
    assert sender.probe.lane_error(0) == code
