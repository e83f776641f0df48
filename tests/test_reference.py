"""FORMAT.md section 10, as scenarios that any receiver must play alike.

Whatever the order, repetition, loss or damage of frames: every byte in a complete ticket is the
sender's, and nothing is written after a cancel.
"""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_probe import NativeProbe
from reference_probe import Heard, Listener, ReferenceProbe, expected_leaves, sender_of
from vectors.generate import (
    LINK, TICKET, TRANSFER, filled, filled_with_numbers, hybrid_spec, minimal_spec, run,
)
from vectors.invalid import flipped, frames_of, header_with
from vectors.read import stored_vectors

from kvwire.codec import Codec
from kvwire.control import Abort, Item
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec, attention, latent
from kvwire.manifest import Manifest
from kvwire.reference import ReferenceReceiver
from kvwire.reference_memory import ReferenceMemory, ReferenceTicket
from kvwire.wire import FrameReader, FrameType, Greeting, Role, encode_frame

IMPLEMENTATIONS = {"reference": ReferenceProbe, "native": NativeProbe}


@pytest.fixture(params=IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
def probe(request):
    return request.param


SMALL = CacheSpec("small", (latent([0], latent_dim=64, rope_dim=64, dtype="fp16"),))
SMALL_TOKENS = (0, 80)  # five chunks of 4,096 bytes


def structures(tokens=SMALL_TOKENS, spec=SMALL, **options):
    """Return the structures of one transfer on one lane: greeting, frames by name, chunks."""
    sent, _ = run(sender_of(spec, tokens, **options),
                  ReferenceReceiver({TICKET: ReferenceTicket(ReferenceMemory(spec, *tokens))}))
    parts, chunks, offset = frames_of(sent[0], Role.RECEIVER), [], 64
    for header, payload in FrameReader(Role.RECEIVER).feed(sent[0]):
        size = 64 + len(payload)
        if header.type == FrameType.CHUNK:
            chunks.append(sent[0][offset:offset + size])
        offset += size
    return parts, chunks


def started(probe, lanes=1, **options):
    """Return a receiver with an announced segment, its listener, the structures and the chunks."""
    parts, chunks = structures()
    receiver, listener = probe([Manifest(TICKET, SMALL, *SMALL_TOKENS)], **options), Listener()
    for lane in range(lanes):
        greeting = Greeting(Role.SENDER, LINK, lane, lanes).encode()
        assert listener.hear(receiver.feed(lane, greeting)) == Heard()
    assert listener.hear(receiver.feed(0, parts["MANIFEST"])).grants == 1
    for lane in range(lanes):
        assert listener.hear(receiver.feed(lane, parts["SEGMENT"])) == Heard()
    return receiver, listener, parts, chunks


def assert_delivered(receiver):
    assert receiver.complete(TICKET)
    assert receiver.leaves(TICKET) == expected_leaves(SMALL, SMALL_TOKENS)


@pytest.mark.parametrize("vector", stored_vectors("receiver", valid=False), ids=str)
def test_an_invalid_vector_is_refused(probe, vector):
    receiver, listener = probe(vector.expected()), Listener()
    refusals = listener.hear(receiver.feed(0, vector.data)).refusals
    refusals += listener.hear(receiver.lose_patience()).refusals
    receiver.lane_lost(0)
    refusals += [receiver.lane_error(0)]
    assert [code for code in refusals if code][0] == vector.code
    if vector.code < 200 and vector.code != ErrorCode.STATE_INVALID:
        assert receiver.lane_error(0) == vector.code


LINKS = [list(vectors) for _, vectors in itertools.groupby(
    stored_vectors("receiver", valid=True), key=lambda vector: vector.link)]


def play(receiver, streams, pick, piece):
    """Feed the streams of a link in pieces from any lane, the manifest's first."""
    answers, left = [], [list(stream) for stream in streams]
    opening = next(i for i, s in enumerate(streams) if s[66:67] == bytes((FrameType.MANIFEST,)))
    start = 128 + int.from_bytes(streams[opening][68:72], "little")
    answers += receiver.feed(opening, streams[opening][:start])
    del left[opening][:start]
    while any(left):
        lane = pick([lane for lane, rest in enumerate(left) if rest])
        count = piece()
        answers += receiver.feed(lane, bytes(left[lane][:count]))
        del left[lane][:count]
    return answers


@pytest.mark.parametrize("vectors", LINKS, ids=lambda vectors: vectors[0].link)
@pytest.mark.parametrize("seed", range(3))
def test_a_valid_link_is_delivered(probe, vectors, seed):
    """In any interleaving of its lanes and any cut, which must not change the memory either."""
    (expected,) = vectors[0].expected()
    choose = random.Random(seed)
    receiver = probe([expected])
    answers = play(receiver, [vector.data for vector in vectors], choose.choice,
                   lambda: choose.randint(1, 3000))
    heard = Listener().hear(answers)
    assert heard.done and not heard.aborts
    assert receiver.complete(TICKET)
    whole = ReferenceProbe([expected])
    play(whole, [vector.data for vector in vectors], lambda lanes: lanes[0], lambda: 1 << 20)
    assert receiver.leaves(TICKET) == whole.leaves(TICKET)


@pytest.mark.parametrize("codec", Codec)
def test_memory_is_the_senders(probe, codec):
    tokens = (5, 150)
    receiver = probe([Manifest(TICKET, hybrid_spec(0), *tokens)])
    fill = filled_with_numbers if codec == Codec.TIERED else filled
    sender = sender_of(hybrid_spec(), tokens, codec=codec, lane_count=3, seed=7, fill=fill)
    run(sender, receiver, 3)
    assert sender.done and receiver.complete(TICKET)
    assert receiver.leaves(TICKET) == expected_leaves(hybrid_spec(), tokens, hybrid_spec(0), fill)


@settings(max_examples=40)
@given(seed=st.integers(0, 1 << 32), lanes=st.integers(1, 4), tokens=st.integers(0, 150))
def test_any_order_of_chunks_is_delivered(seed, lanes, tokens):
    for probe in IMPLEMENTATIONS.values():
        receiver = probe([Manifest(TICKET, hybrid_spec(0), 0, tokens)])
        sender = sender_of(hybrid_spec(), (0, tokens), lane_count=lanes, seed=seed)
        run(sender, receiver, lanes)
        assert sender.done and receiver.complete(TICKET)
        assert receiver.leaves(TICKET) == expected_leaves(hybrid_spec(), (0, tokens),
                                                          hybrid_spec(0))


def test_every_chunk_is_receipted_then_the_segment_then_the_transfer(probe):
    receiver, listener, parts, chunks = started(probe)
    for number, chunk in enumerate(chunks):
        assert listener.hear(receiver.feed(0, chunk)).chunks == {(0, number)}
    assert listener.hear(receiver.feed(0, parts["SEGMENT_END"])).segments == {0}
    assert not receiver.complete(TICKET)
    (done,) = listener.hear(receiver.feed(0, parts["END"])).done
    assert done.raw_bytes == sum(len(chunk) - 64 for chunk in chunks)
    assert_delivered(receiver)
    assert receiver.layer_ready(TICKET, 0)


def test_ends_may_overtake_chunks(probe):
    receiver, listener, parts, chunks = started(probe, lanes=2)
    heard = listener.hear(receiver.feed(1, parts["END"] + parts["SEGMENT_END"]))
    assert heard == Heard()
    for chunk in chunks[1:]:
        receiver.feed(1, chunk)
    assert listener.hear(receiver.feed(0, chunks[0])).done
    assert_delivered(receiver)


def test_a_damaged_chunk_is_asked_for_again(probe):
    receiver, listener, parts, chunks = started(probe)
    (entry,) = listener.hear(receiver.feed(0, flipped(chunks[2], 99))).repairs
    assert (entry.segment_index, entry.chunk_index, entry.attempt) == (0, 2, 0)
    assert entry.reason == ErrorCode.PAYLOAD_CORRUPT and entry.expected != entry.actual
    again = header_with(chunks[2], attempt=1)
    assert listener.hear(receiver.feed(0, again)).chunks == {(0, 2)}
    for chunk in [*chunks[:2], *chunks[3:], parts["SEGMENT_END"], parts["END"]]:
        receiver.feed(0, chunk)
    assert_delivered(receiver)


def test_an_attempt_below_the_highest_seen_is_read_away(probe):
    receiver, listener, _, chunks = started(probe)
    receiver.feed(0, flipped(header_with(chunks[0], attempt=3), 64))
    assert listener.hear(receiver.feed(0, header_with(chunks[0], attempt=2))) == Heard()
    assert listener.hear(receiver.feed(0, header_with(chunks[0], attempt=3))).chunks == {(0, 0)}


def test_eight_failures_fail_the_transfer(probe):
    receiver, listener, _, chunks = started(probe)
    for attempt in range(7):
        bad = flipped(header_with(chunks[0], attempt=attempt), 64)
        assert len(listener.hear(receiver.feed(0, bad)).repairs) == 1
    last = flipped(header_with(chunks[0], attempt=7), 64)
    assert listener.hear(receiver.feed(0, last)).aborts == [ErrorCode.RETRIES_EXHAUSTED]
    assert receiver.failure(TICKET) == ErrorCode.RETRIES_EXHAUSTED
    assert receiver.lane_error(0) is None


def test_a_higher_attempt_takes_the_lease(probe):
    """The old lane wakes up late: what it still writes must not reach memory."""
    receiver, listener, parts, chunks = started(probe, lanes=2)
    poison = bytes(len(chunks[0]) - 64)
    late = chunks[0][:64] + poison
    receiver.feed(0, late[:1000])
    assert listener.hear(receiver.feed(1, header_with(chunks[0], attempt=1))).chunks == {(0, 0)}
    assert listener.hear(receiver.feed(0, late[1000:])) == Heard()
    for chunk in [*chunks[1:], parts["SEGMENT_END"], parts["END"]]:
        receiver.feed(1, chunk)
    assert_delivered(receiver)


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_lease_is_not_given_twice(probe, attempt):
    receiver, listener, _, chunks = started(probe, lanes=2)
    leased = header_with(chunks[0], attempt=1)
    receiver.feed(0, leased[:100])
    other = header_with(chunks[0], attempt=attempt)
    assert listener.hear(receiver.feed(1, other)) == Heard()
    assert listener.hear(receiver.feed(0, leased[100:])).chunks == {(0, 0)}


def test_a_lost_lane_gives_its_leases_back(probe):
    receiver, listener, parts, chunks = started(probe, lanes=2)
    receiver.feed(0, chunks[0][:200])
    assert listener.hear(receiver.lane_lost(0)) == Heard()
    again = header_with(chunks[0], attempt=1)
    assert listener.hear(receiver.feed(1, again)).chunks == {(0, 0)}
    for chunk in [*chunks[1:], parts["SEGMENT_END"], parts["END"]]:
        receiver.feed(1, chunk)
    assert_delivered(receiver)


def test_nothing_is_written_after_a_cancel(probe):
    receiver, listener, _, chunks = started(probe)
    receiver.feed(0, chunks[0][:500])
    assert listener.hear(receiver.cancel(TICKET)).aborts == [ErrorCode.CANCELLED]
    before = receiver.leaves(TICKET)
    assert listener.hear(receiver.feed(0, chunks[0][500:])) == Heard()
    assert listener.hear(receiver.feed(0, chunks[1])).aborts == [ErrorCode.CANCELLED]
    assert receiver.leaves(TICKET) == before
    assert receiver.failure(TICKET) == ErrorCode.CANCELLED


def test_an_abort_that_overtakes_its_manifest_fails_the_ticket(probe):
    parts, _ = structures()
    receiver, listener = probe([Manifest(TICKET, SMALL, *SMALL_TOKENS)]), Listener()
    greeting = Greeting(Role.SENDER, LINK, 0, 1).encode()
    assert listener.hear(receiver.feed(0, greeting)) == Heard()
    abort = encode_frame(FrameType.ABORT, TRANSFER, Abort(ErrorCode.CANCELLED).encode())
    assert listener.hear(receiver.feed(0, abort)) == Heard()
    assert receiver.failure(TICKET) is None
    for _ in range(2):
        heard = listener.hear(receiver.feed(0, parts["MANIFEST"]))
        assert heard.aborts == [ErrorCode.CANCELLED]
        assert receiver.failure(TICKET) == ErrorCode.CANCELLED


def test_frames_of_an_unknown_transfer_reach_no_memory(probe):
    receiver, listener, parts, chunks = started(probe)
    before = receiver.leaves(TICKET)
    for frame in (parts["SEGMENT"], chunks[0], parts["SEGMENT_END"], parts["END"]):
        stray = header_with(frame, transfer_id=TRANSFER[::-1])
        assert listener.hear(receiver.feed(0, stray)).aborts == [ErrorCode.TRANSFER_UNKNOWN]
    abort = encode_frame(FrameType.ABORT, TRANSFER[::-1], Abort(ErrorCode.CANCELLED).encode())
    assert listener.hear(receiver.feed(0, abort)) == Heard()
    assert receiver.leaves(TICKET) == before and receiver.failure(TICKET) is None


def test_repeated_frames_of_an_open_transfer(probe):
    receiver, listener, parts, chunks = started(probe)
    assert listener.hear(receiver.feed(0, parts["MANIFEST"])).grants == 1
    assert listener.hear(receiver.feed(0, parts["SEGMENT"])) == Heard()
    for _ in range(2):
        assert listener.hear(receiver.feed(0, chunks[0])).chunks == {(0, 0)}
    assert listener.hear(receiver.feed(0, parts["SEGMENT_END"])) == Heard()
    for chunk in chunks[1:]:
        receiver.feed(0, chunk)
    assert listener.hear(receiver.feed(0, parts["SEGMENT_END"])).segments == {0}
    receiver.feed(0, parts["END"])
    assert_delivered(receiver)


def test_repeated_frames_of_a_done_transfer(probe):
    receiver, listener, parts, chunks = started(probe)
    for frame in [*chunks, parts["SEGMENT_END"], parts["END"]]:
        receiver.feed(0, frame)
    for frame in (parts["SEGMENT"], flipped(chunks[0], 64), parts["SEGMENT_END"]):
        assert listener.hear(receiver.feed(0, frame)) == Heard()
    for frame in (parts["MANIFEST"], parts["END"]):
        assert len(listener.hear(receiver.feed(0, frame)).done) == 1
    abort = encode_frame(FrameType.ABORT, TRANSFER, Abort(ErrorCode.CANCELLED).encode())
    assert listener.hear(receiver.feed(0, abort)) == Heard()
    assert_delivered(receiver)


def test_a_failed_transfer_stays_failed(probe):
    receiver, listener, parts, _ = started(probe)
    abort = encode_frame(FrameType.ABORT, TRANSFER, Abort(ErrorCode.SOURCE_CHANGED).encode())
    assert listener.hear(receiver.feed(0, abort)) == Heard()
    assert receiver.failure(TICKET) == ErrorCode.SOURCE_CHANGED
    assert listener.hear(receiver.feed(0, parts["MANIFEST"])).aborts == [ErrorCode.SOURCE_CHANGED]


def test_a_manifest_waits_for_its_ticket(probe):
    parts, chunks = structures()
    receiver, listener = probe(), Listener()
    heard = listener.hear(receiver.feed(0, parts["GREETING"] + parts["MANIFEST"]))
    assert heard == Heard()
    assert listener.hear(receiver.bind(Manifest(TICKET, SMALL, *SMALL_TOKENS))).grants == 1
    for frame in [parts["SEGMENT"], *chunks, parts["SEGMENT_END"], parts["END"]]:
        receiver.feed(0, frame)
    assert_delivered(receiver)


def test_a_link_wide_abort_closes_the_lane(probe):
    receiver, _, _, _ = started(probe)
    receiver.feed(0, encode_frame(FrameType.ABORT, payload=Abort(ErrorCode.INTERNAL).encode()))
    assert receiver.lane_error(0) is not None
    receiver.lease_over()
    assert receiver.failure(TICKET) == ErrorCode.LINK_LOST


def ranks_of(whole, count):
    """Return senders of tensor-parallel shards, and the ticket that they fill."""
    senders = [sender_of(whole.shard(rank, count), (0, 9), rank=rank, ranks=count,
                         transfer_id=bytes((rank + 1,)) * 16) for rank in range(count)]
    return senders, Manifest(TICKET, whole, 0, 9, 0, count)


def frames_in_order(sender, receiver, greet):
    """Play a sender on lane 0, whose greetings may be over already; return what was heard."""
    listener, aborts, writes = Listener(), [], sender.start()
    if not greet:
        greeted = ReferenceReceiver().feed(0, writes[0][1])
        sender.feed(0, greeted[0][1])
        listener.hear(greeted)
        writes = writes[1:]
    while writes:
        following = []
        for lane, data in writes:
            answers = receiver.feed(lane, data)
            aborts += listener.hear(answers).aborts
            for answer_lane, answer in answers:
                following += sender.feed(answer_lane, answer)
        writes = following
    return aborts


def test_ranks_fill_one_ticket(probe):
    whole = CacheSpec("tp", (attention([0, 1], kv_heads=4, head_dim=4),))
    senders, ticket = ranks_of(whole, 2)
    receiver = probe([ticket])
    assert frames_in_order(senders[0], receiver, True) == []
    assert senders[0].done and not receiver.complete(TICKET)
    assert not receiver.layer_ready(TICKET, 0)
    assert frames_in_order(senders[1], receiver, False) == []
    assert receiver.complete(TICKET) and receiver.layer_ready(TICKET, 0)
    for key, data in receiver.leaves(TICKET).items():
        parts = [filled(whole.shard(rank, 2), 0, 9).arrays[key].reshape(9, -1)
                 for rank in range(2)]
        assert data == b"".join(row.tobytes() for rows in zip(*parts) for row in rows)


@pytest.mark.parametrize("replicated, code", [(True, None), (False, ErrorCode.OVERLAP)])
def test_only_replicas_may_overlap(probe, replicated, code):
    whole = CacheSpec("mla", (latent([0], latent_dim=8, rope_dim=4),))
    shard = whole.shard(0, 2) if replicated else whole
    receiver = probe([Manifest(TICKET, whole, 0, 9, 0, 2)])
    aborts = []
    for rank in range(2):
        sender = sender_of(shard, (0, 9), rank=rank, ranks=2,
                           transfer_id=bytes((rank + 1,)) * 16)
        aborts += frames_in_order(sender, receiver, rank == 0)
    assert aborts[:1] == ([code] if code else [])
    assert receiver.complete(TICKET) == replicated and receiver.failure(TICKET) == code


def test_a_layer_is_ready_before_the_transfer_is(probe):
    spec = CacheSpec("two", (latent([0, 1], latent_dim=8, rope_dim=4),))
    receiver = probe([Manifest(TICKET, spec, 0, 9)])
    sender = sender_of(spec, (0, 9))
    ready, writes = [], sender.start()
    while writes:
        following = []
        for lane, data in writes:
            for answer_lane, answer in receiver.feed(lane, data):
                following += sender.feed(answer_lane, answer)
            ready.append([receiver.layer_ready(TICKET, layer) for layer in (0, 1)])
        writes = following
    assert ready[0] == [False, False] and [True, False] in ready and ready[-1] == [True, True]


def test_missing_parts_are_incomplete(probe):
    receiver = probe([Manifest(TICKET, SMALL, *SMALL_TOKENS)])
    sender = sender_of(SMALL, SMALL_TOKENS, items=[Item(0, 0, 0, 0, 79)])
    aborts = frames_in_order(sender, receiver, True)
    assert aborts == [ErrorCode.INCOMPLETE]
    assert receiver.failure(TICKET) == ErrorCode.INCOMPLETE
    assert sender.error.code == ErrorCode.INCOMPLETE


MINIMAL_BYTES = next(
    len(v.data) for v in stored_vectors("receiver") if v.file == "valid/minimal.bin")


@pytest.mark.parametrize("offset", range(MINIMAL_BYTES))
def test_no_flipped_byte_is_delivered_wrong(probe, offset):
    """Each byte of the minimal transfer in turn: repaired, refused, or without effect."""
    (vector,) = [v for v in stored_vectors("receiver") if v.link == "minimal"]
    receiver, listener = probe(vector.expected()), Listener()
    heard = listener.hear(receiver.feed(0, flipped(vector.data, offset)))
    receiver.lane_lost(0)
    good = expected_leaves(minimal_spec(), (0, 3))
    if receiver.complete(TICKET):
        assert receiver.leaves(TICKET) == good
    else:
        assert heard.refusals or receiver.lane_error(0)
