"""Anything on the port: a typed error and a closed stream; no crash, no hang, little memory."""

import os
import random
import socket
import time

import numpy as np
import pytest

import kvwire
from faults import GREETING_BYTES, Held, RawPeer, eventually, same_content
from kvwire.checksum import crc32c, segment_digest, transfer_digest
from kvwire.control import (
    Abort, ChunkRun, Done, End, Grant, Item, Pull, Receipt, Repair, RepairEntry, Segment,
    SegmentEnd,
)
from kvwire.errors import ErrorCode
from kvwire.layout import AxisSpec, Axis, CacheSpec, DType, GroupKind, LayerGroup, TensorSpec
from kvwire.manifest import Manifest
from kvwire.wire import FrameHeader, FrameType, Greeting, Role, encode_frame

TOKENS = 6
SPEC = CacheSpec("m", (kvwire.attention(range(2), kv_heads=2, head_dim=8, dtype="fp16"),))
LAYER_BYTES = SPEC.bytes(TOKENS) // 2
CHUNK = 4096
ITEMS = [[Item(0, tensor, layer, 0, TOKENS) for tensor in range(2)] for layer in range(2)]
RSS_GROWTH_BYTES_MAX = 96 << 20


@pytest.fixture
def receiver():
    with kvwire.Receiver(lease_s=0) as made:
        yield made
        assert_serves(made)


def assert_serves(receiver):
    """What strangers did must not have harmed anybody else."""
    source, target = Held(SPEC, TOKENS, 1), Held(SPEC, TOKENS, 2, writable=True)
    ticket = receiver.expect(target.memory)
    with kvwire.Sender(receiver.address, lanes=1) as sender:
        sender.send(ticket.id, source.memory).result(10)
    ticket.result(10)
    assert same_content(source, target)


def rss_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def manifest(ticket, spec=SPEC, tokens=TOKENS, **options):
    return Manifest(bytes.fromhex(ticket.id) if ticket else random.randbytes(16), spec, 0, tokens,
                    **options)


class Opened:
    """A raw sender whose transfer has been granted."""

    def __init__(self, receiver, spec=SPEC, tokens=TOKENS, **greeting):
        self.target = Held(spec, tokens, 3, writable=True)
        self.ticket = receiver.expect(self.target.memory)
        self.id = random.randbytes(16)
        self.peer = RawPeer(receiver.address, **greeting)
        self.peer.send(FrameType.MANIFEST, self.id, manifest(self.ticket, spec, tokens))
        self.peer.expect(FrameType.GRANT)

    def announce(self, index=0, items=None, raw_bytes=LAYER_BYTES, chunk_bytes=CHUNK):
        self.peer.send(FrameType.SEGMENT, self.id, Segment(
            raw_bytes, chunk_bytes, tuple(ITEMS[index] if items is None else items)),
            segment_index=index)

    def chunk(self, raw, index=0, **fields):
        fields = {"raw_offset": 0, "raw_bytes": len(raw), "raw_crc": crc32c(raw)} | fields
        self.peer.send(FrameType.CHUNK, self.id, raw, segment_index=index, **fields)

    def end_segment(self, raw, index=0, digest=None):
        digest = segment_digest([(0, len(raw), crc32c(raw))]) if digest is None else digest
        self.peer.send(FrameType.SEGMENT_END, self.id, SegmentEnd(1, digest), segment_index=index)
        return digest

    def refused(self, code):
        """The peer hears of it, the ticket fails with the same code, nothing reads as ready."""
        with self.peer:
            abort = Abort.decode(self.peer.expect(FrameType.ABORT).payload)
            assert abort.code == code and abort.message
            error = failure(self.ticket)
            assert error.code == code
            assert "ready" not in error.layers.values()
        return error


def failure(handle, timeout_s=10):
    with pytest.raises(kvwire.KvwireError) as caught:
        handle.result(timeout_s)
    assert caught.value.code != ErrorCode.DEADLINE_EXCEEDED, "nothing ended it"
    return caught.value


def raw_layer(seed=0):
    return random.Random(seed).randbytes(LAYER_BYTES)


def test_a_raw_sender_delivers(receiver):
    opened = Opened(receiver)
    digests = []
    for index in range(2):
        opened.announce(index)
        opened.chunk(raw_layer(index), index)
        digests.append(opened.end_segment(raw_layer(index), index))
    total = transfer_digest((i, digest, LAYER_BYTES) for i, digest in enumerate(digests))
    opened.peer.send(FrameType.END, opened.id, End(2, total, 2 * LAYER_BYTES, {"first": 7}))
    done = Done.decode(opened.peer.expect(FrameType.DONE).payload)
    assert (done.raw_bytes, done.digest) == (2 * LAYER_BYTES, total)
    opened.ticket.result(5)
    assert opened.ticket.metadata == {"first": 7}
    content = opened.target.content()
    layer = b"".join(content[GroupKind.FULL_ATTENTION, 1, name].tobytes() for name in "kv")
    assert layer == raw_layer(1)


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_close_the_stream(receiver, seed):
    with socket.create_connection(receiver.address.rsplit(":", 1), 10) as sock:
        sock.sendall(random.Random(seed).randbytes(random.Random(seed).randint(1, 4096)))
        assert closed_at_once(sock)


@pytest.mark.parametrize("first", [b"GET / HTTP/1.1\r\n\r\n", b"KVWIRE\n", b"\0" * 64, b"K\0"])
def test_strangers_are_told_at_their_first_wrong_byte(receiver, first):
    with socket.create_connection(receiver.address.rsplit(":", 1), 10) as sock:
        sock.sendall(first)
        assert closed_at_once(sock)


def closed_at_once(sock):
    sock.settimeout(3)
    try:
        while sock.recv(4096):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize("seed", range(8))
def test_garbage_after_a_valid_greeting_is_answered_with_an_abort(receiver, seed):
    with RawPeer(receiver.address) as peer:
        peer.write(random.Random(seed).randbytes(200))
        abort = Abort.decode(peer.expect(FrameType.ABORT).payload)
        assert abort.code in (ErrorCode.BAD_MAGIC, ErrorCode.HEADER_CORRUPT)


@pytest.mark.parametrize("kind, payload_bytes, code", [
    (FrameType.MANIFEST, 0xFFFFFFFF, ErrorCode.LIMIT_EXCEEDED),
    (FrameType.MANIFEST, (1 << 20) + 1, ErrorCode.LIMIT_EXCEEDED),
    (FrameType.SEGMENT, 1 << 31, ErrorCode.LIMIT_EXCEEDED),
    (FrameType.END, 0xFFFFFFFF, ErrorCode.LIMIT_EXCEEDED),
    (FrameType.ABORT, 0xFFFFFFFF, ErrorCode.LIMIT_EXCEEDED),
    (0x80, 0xFFFFFFFF, ErrorCode.LIMIT_EXCEEDED),
    (0x10, 0, ErrorCode.TYPE_UNKNOWN),
    (0x00, 0, ErrorCode.TYPE_UNKNOWN),
])
def test_giant_lengths_and_unknown_types_are_refused_by_the_header(receiver, kind, payload_bytes,
                                                                   code):
    before = rss_bytes()
    with RawPeer(receiver.address) as peer:
        peer.write(forged(kind, payload_bytes))
        assert Abort.decode(peer.expect(FrameType.ABORT).payload).code == code
        assert peer.read_to_end() == []
    assert rss_bytes() - before < RSS_GROWTH_BYTES_MAX


def forged(kind, payload_bytes, transfer_id=b"t" * 16, **fields):
    body = bytearray(FrameHeader(FrameType.CHUNK, 0, transfer_id, **fields).encode()[:60])
    body[2], body[4:8] = kind, payload_bytes.to_bytes(4, "little")
    return bytes(body) + crc32c(bytes(body)).to_bytes(4, "little")


@pytest.mark.parametrize("kind", [FrameType.GRANT, FrameType.RECEIPT, FrameType.REPAIR,
                                  FrameType.DONE, FrameType.PULL, FrameType.INDEX,
                                  FrameType.COMMIT])
def test_frames_of_the_other_role_are_refused(receiver, kind):
    payload = {FrameType.RECEIPT: Receipt((ChunkRun(0, 0, 1),)).encode(),
               FrameType.REPAIR: Repair((RepairEntry(0, 0, 0, ErrorCode.RAW_CORRUPT, 0, 0),)
                                        ).encode(),
               FrameType.PULL: Pull(b"o" * 16, 0, 1).encode(), FrameType.INDEX: bytes(24),
               FrameType.COMMIT: bytes(32)}.get(kind, Grant(1 << 20, 1, 1 << 16).encode())
    with RawPeer(receiver.address) as peer:
        peer.send(kind, b"t" * 16, payload)
        assert Abort.decode(peer.expect(FrameType.ABORT).payload).code == ErrorCode.STATE_INVALID


def test_skippable_types_are_skipped(receiver):
    opened = Opened(receiver)
    for size in (0, 1, 1 << 20):
        opened.peer.send(0xF0 + size % 7, opened.id, bytes(size))
    opened.announce(items=[Item(9, 0, 0)])
    opened.refused(ErrorCode.SEGMENT_INVALID)


@pytest.mark.parametrize("role, change, answered", [
    (Role.RECEIVER, {}, False), (Role.FILE, {}, False),
    (Role.SENDER, {"lane_index": 3, "lane_count": 2}, False),
    (Role.SENDER, {"lane_count": 65}, False), (Role.SENDER, {"codecs": 2}, False),
    (Role.SENDER, {"version": 0, "version_min": 0}, False),
    (Role.SENDER, {"version": 9, "version_min": 2}, False),
    (Role.SENDER, {"link_id": bytes(16)}, False),
    (Role.SENDER, {"version": 9}, True),
])
def test_greetings_that_do_not_fit_are_refused(receiver, role, change, answered):
    greeting = Greeting(role, **{"link_id": random.randbytes(16)} | change)
    with socket.create_connection(receiver.address.rsplit(":", 1), 10) as sock:
        sock.sendall(greeting.encode())
        sock.settimeout(5)
        try:
            answer = sock.recv(GREETING_BYTES)
        except ConnectionError:
            answer = b""
        assert (len(answer) == GREETING_BYTES) == answered


def test_a_lane_that_comes_again_takes_its_own_place(receiver):
    """Its peer has lost it and dialled again, with the link's key, before we noticed."""
    link = random.randbytes(16)
    opened = Opened(receiver, lane_count=2, link_id=link, key=b"")
    with RawPeer(receiver.address, lane_count=2, link_id=link,
                 link_key=opened.peer.link_key) as again:
        opened.peer.read_to_end()
        again.send(FrameType.END, b"u" * 16, End(0, 0, 0))
        again.expect(FrameType.ABORT)
        assert not opened.ticket.done()


def test_answers_come_on_the_lane_that_asked(receiver):
    """The other lane may be dead already, and only the peer knows."""
    link, transfer = random.randbytes(16), random.randbytes(16)
    ticket = receiver.expect(Held(SPEC, TOKENS, 3, writable=True).memory)
    with RawPeer(receiver.address, lane_count=2, link_id=link, key=b"") as first:
        first.send(FrameType.MANIFEST, transfer, manifest(ticket))
        first.expect(FrameType.GRANT)
        with RawPeer(receiver.address, lane_index=1, lane_count=2, link_id=link,
                     link_key=first.link_key) as second:
            second.send(FrameType.MANIFEST, transfer, manifest(ticket))
            second.expect(FrameType.GRANT)
            second.send(FrameType.END, b"u" * 16, End(0, 0, 0))
            abort = Abort.decode(second.expect(FrameType.ABORT).payload)
            assert abort.code == ErrorCode.TRANSFER_UNKNOWN


def test_slow_greetings_are_cut_off_after_five_seconds(receiver):
    start = time.monotonic()
    host, port = receiver.address.rsplit(":", 1)
    socks = [socket.create_connection((host, port), 20) for _ in range(20)]
    greeting = Greeting(Role.SENDER, random.randbytes(16)).encode()
    for number, sock in enumerate(socks):
        sock.sendall(greeting[:number])
    for sock in socks:
        sock.settimeout(20)
        assert sock.recv(1) == b""
        sock.close()
    assert 4 < time.monotonic() - start < 12
    assert eventually(lambda: receiver.stats()["connections"] == 0)


def test_waiting_manifests_are_bounded(receiver):
    before = rss_bytes()
    with RawPeer(receiver.address) as peer:
        for _ in range(3000):
            peer.send(FrameType.MANIFEST, random.randbytes(16), manifest(None))
        refused = [Abort.decode(peer.expect(FrameType.ABORT).payload).code
                   for _ in range(3000 - 64)]
        assert set(refused) == {ErrorCode.RESOURCES_EXHAUSTED}
        assert receiver.stats()["open_transfers"] == 0
    assert rss_bytes() - before < RSS_GROWTH_BYTES_MAX


def test_large_manifests_that_wait_are_bounded(receiver):
    tensor = TensorSpec("x", DType.BYTES, (AxisSpec(Axis.TOKEN), AxisSpec.of(Axis.DIM, 4)))
    groups = tuple(LayerGroup(GroupKind.AUXILIARY, tuple(range(i * 4096, i * 4096 + 4096)),
                              (tensor,)) for i in range(15))
    big = Manifest(random.randbytes(16), CacheSpec("m", groups), 0, TOKENS).encode()
    fit = (2 << 20) // len(big)
    before = rss_bytes()
    with RawPeer(receiver.address, timeout_s=60) as peer:
        for _ in range(60):
            peer.send(FrameType.MANIFEST, random.randbytes(16), big)
        for _ in range(60 - fit):
            code = Abort.decode(peer.expect(FrameType.ABORT).payload).code
            assert code == ErrorCode.RESOURCES_EXHAUSTED
    assert rss_bytes() - before < RSS_GROWTH_BYTES_MAX


def test_frames_before_the_grant_fail_the_transfer(receiver):
    with RawPeer(receiver.address) as peer:
        for kind, payload in ((FrameType.SEGMENT, Segment(LAYER_BYTES, CHUNK, tuple(ITEMS[0]))),
                              (FrameType.END, End(0, 0, 0))):
            transfer = random.randbytes(16)
            peer.send(FrameType.MANIFEST, transfer, manifest(None))
            peer.send(kind, transfer, payload)
            abort = peer.expect(FrameType.ABORT)
            assert abort.header.transfer_id == transfer
            assert Abort.decode(abort.payload).code == ErrorCode.STATE_INVALID


@pytest.mark.parametrize("kind, payload", [
    (FrameType.SEGMENT, Segment(LAYER_BYTES, CHUNK, tuple(ITEMS[0]))),
    (FrameType.SEGMENT_END, SegmentEnd(1, 0)), (FrameType.END, End(0, 0, 0)),
    (FrameType.CHUNK, raw_layer())])
def test_unknown_transfers_are_told_so(receiver, kind, payload):
    fields = {"raw_bytes": LAYER_BYTES, "raw_crc": crc32c(raw_layer())}
    with RawPeer(receiver.address) as peer:
        for _ in range(3):
            peer.send(kind, b"t" * 16, payload, **fields if kind == FrameType.CHUNK else {})
            abort = Abort.decode(peer.expect(FrameType.ABORT).payload)
            assert abort.code == ErrorCode.TRANSFER_UNKNOWN


@pytest.mark.parametrize("items, fields", [
    ([Item(1, 0, 0, 0, TOKENS)], {}), ([Item(0, 2, 0, 0, TOKENS)], {}),
    ([Item(0, 0, 5, 0, TOKENS)], {}), ([Item(0, 0, 0, 0, TOKENS + 1)], {}),
    ([Item(0, 0, 0, 4, 2)], {}), ([Item(0, 0, 0, 0, 1 << 63)], {}),
    ([Item(0, 0, 0, 1 << 63, 1)], {}),
    (None, {"raw_bytes": LAYER_BYTES + 1}), (None, {"raw_bytes": 1 << 63}),
    (None, {"chunk_bytes": 0}), (None, {"chunk_bytes": 4097}),
    (None, {"chunk_bytes": 1 << 22}), (None, {"chunk_bytes": 0xFFFFF000}),
])
def test_announcements_that_contradict_are_refused(receiver, items, fields):
    opened = Opened(receiver)
    opened.announce(items=items, **fields)
    opened.refused(ErrorCode.SEGMENT_INVALID)
    assert opened.target.is_poison()


def test_destinations_cannot_be_claimed_twice(receiver):
    opened = Opened(receiver)
    opened.announce(0)
    opened.announce(1, items=ITEMS[0])
    opened.refused(ErrorCode.OVERLAP)


@pytest.mark.parametrize("change, code", [
    ({"codec": 1}, None), ({"codec": 7, }, ErrorCode.CODEC_UNSUPPORTED),
    ({"table_index": 5}, ErrorCode.TABLE_UNKNOWN),
])
def test_codecs_and_tables_that_were_not_agreed_fail_the_transfer(receiver, change, code):
    opened = Opened(receiver)
    opened.announce()
    coded = b"x" * 10 if "codec" in change else raw_layer()
    opened.chunk(coded, raw_bytes=LAYER_BYTES, raw_crc=crc32c(raw_layer()), **change)
    opened.refused(code or ErrorCode.CODEC_UNSUPPORTED)


@pytest.mark.parametrize("fields", [
    {"raw_offset": 1}, {"raw_offset": CHUNK}, {"raw_offset": 1 << 62}, {"attempt": 1 << 20},
])
def test_chunks_off_the_grid_close_the_lane(receiver, fields):
    opened = Opened(receiver)
    opened.announce()
    opened.chunk(raw_layer(), **fields)
    with opened.peer:
        opened.peer.expect(FrameType.ABORT)
        opened.peer.read_to_end()
    assert failure(opened.ticket).code in (ErrorCode.LINK_LOST, ErrorCode.FIELD_INVALID)


def test_a_wrong_digest_fails_the_transfer(receiver):
    opened = Opened(receiver)
    opened.announce()
    opened.chunk(raw_layer())
    opened.end_segment(raw_layer(), digest=1)
    error = opened.refused(ErrorCode.DIGEST_MISMATCH)
    assert error.expected != error.actual


def test_a_corrupt_chunk_is_asked_for_again_then_gives_up_with_the_evidence(receiver):
    opened = Opened(receiver)
    opened.announce()
    for attempt in range(8):
        header = FrameHeader(FrameType.CHUNK, LAYER_BYTES, opened.id, raw_bytes=LAYER_BYTES,
                             raw_crc=1, payload_crc=1, attempt=attempt)
        opened.peer.write(header.encode() + raw_layer())
        if attempt < 7:
            entry, = Repair.decode(opened.peer.expect(FrameType.REPAIR).payload).entries
            assert (entry.attempt, entry.expected) == (attempt, 1)
            assert entry.actual == crc32c(raw_layer())
    error = opened.refused(ErrorCode.RETRIES_EXHAUSTED)
    assert (error.expected, error.actual) == (1, crc32c(raw_layer()))
    assert error.layers == {0: "partly written", 1: "unwritten"}


def test_an_unwritten_layer_is_not_touched():
    """Columns that do not travel are set to zero: from then on the layer is partly written."""
    sent, held = (CacheSpec("m", (kvwire.convolution(range(2), 4, columns=columns),))
                  for columns in (2, 3))
    with kvwire.Receiver(lease_s=0) as receiver:
        target = Held(held, 0, writable=True)
        ticket = receiver.expect(target.memory)
        transfer = random.randbytes(16)
        with RawPeer(receiver.address) as peer:
            peer.send(FrameType.MANIFEST, transfer, manifest(ticket, sent, 0))
            peer.expect(FrameType.GRANT)
            raw_bytes = sent.bytes(0) // 2
            peer.send(FrameType.SEGMENT, transfer,
                      Segment(raw_bytes, CHUNK, (Item(0, 0, 0),)), segment_index=0)
        error = failure(ticket)
        assert error.layers[1] == "unwritten"
        assert target.is_poison() or error.layers[0] == "partly written"


def test_a_peer_that_never_reads_is_not_fed(receiver):
    """Answers pile up only to a limit; then it is not read from either."""
    before = rss_bytes()
    with RawPeer(receiver.address) as peer:
        peer.sock.settimeout(1)
        frame = encode_frame(FrameType.END, b"t" * 16, End(0, 0, 0).encode()) * 1000
        written = 0
        try:
            while written < 400 << 20:
                written += peer.sock.send(frame)
        except TimeoutError:
            pass
        assert written < 400 << 20
        assert rss_bytes() - before < RSS_GROWTH_BYTES_MAX
        assert_serves(receiver)


def test_hundreds_of_idle_connections(receiver):
    peers = [RawPeer(receiver.address) for _ in range(300)]
    assert receiver.stats()["connections"] == 300
    for peer in peers:
        peer.sock.close()
    assert eventually(lambda: receiver.stats()["links"] == 0)


def test_random_frames_with_valid_checksums(receiver):
    """Fuzz below the checksums: every byte of each payload may be anything."""
    rng = random.Random(7)
    for _ in range(150):
        opened = Opened(receiver)
        opened.announce()
        with opened.peer:
            kind = rng.choice((FrameType.MANIFEST, FrameType.SEGMENT, FrameType.SEGMENT_END,
                               FrameType.END, FrameType.ABORT))
            good = {FrameType.MANIFEST: manifest(opened.ticket).encode(),
                    FrameType.SEGMENT: Segment(LAYER_BYTES, CHUNK, tuple(ITEMS[1])).encode(),
                    FrameType.SEGMENT_END: SegmentEnd(1, 5).encode(),
                    FrameType.END: End(2, 5, 2 * LAYER_BYTES, {"a": 1}).encode(),
                    FrameType.ABORT: Abort(ErrorCode.CANCELLED, "x").encode()}[kind]
            payload = bytearray(good)
            for _ in range(rng.randint(1, 4)):
                payload[rng.randrange(len(payload))] = rng.randrange(256)
            del payload[rng.randint(len(payload) // 2, len(payload)):]
            index = 1 if kind in (FrameType.SEGMENT, FrameType.SEGMENT_END) else 0
            transfer = opened.id if rng.random() < 0.8 else random.randbytes(16)
            opened.peer.send(kind, transfer, bytes(payload), segment_index=index)
            opened.peer.sock.shutdown(socket.SHUT_WR)
            opened.peer.read_to_end()
        error = failure(opened.ticket)
        assert "ready" not in error.layers.values()
        assert opened.target.is_poison()


def test_fuzzed_streams_are_only_ever_refused(receiver):
    """A whole valid stream with a few bytes anyhow: checksums find every one."""
    rng = random.Random(11)
    source = Held(SPEC, TOKENS, 1)
    raw = [b"".join(np.ascontiguousarray(source.arrays[0, layer, name][:TOKENS]).tobytes()
                    for name in "kv") for layer in range(2)]
    for _ in range(60):
        target = Held(SPEC, TOKENS, 3, writable=True)
        ticket = receiver.expect(target.memory)
        transfer = random.randbytes(16)
        stream = bytearray(Greeting(Role.SENDER, random.randbytes(16)).encode())
        stream += encode_frame(FrameType.MANIFEST, transfer, manifest(ticket).encode())
        for index in range(2):
            stream += encode_frame(FrameType.SEGMENT, transfer, Segment(
                LAYER_BYTES, CHUNK, tuple(ITEMS[index])).encode(), segment_index=index)
            stream += encode_frame(FrameType.CHUNK, transfer, raw[index], segment_index=index,
                                   raw_bytes=LAYER_BYTES, raw_crc=crc32c(raw[index]))
        stream[rng.randrange(64, len(stream))] ^= 1 << rng.randrange(8)
        with socket.create_connection(receiver.address.rsplit(":", 1), 10) as sock:
            try:
                sock.sendall(bytes(stream))
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # it was closed in the middle
            closed_at_once(sock)
        ticket.cancel()
        assert ticket.exception() and "ready" not in ticket.report().values()
