"""FORMAT.md section 10: lanes that are lost, stall and come back, as any receiver must play it."""

from hypothesis import given, settings
from hypothesis import strategies as st
from reference_probe import Heard, Listener, sender_of
from test_reference import (
    IMPLEMENTATIONS, SMALL, SMALL_TOKENS, assert_delivered, probe, started, structures,
)
from vectors.generate import LINK, TICKET, TRANSFER
from vectors.invalid import header_with

from kvwire.control import Abort
from kvwire.errors import ErrorCode
from kvwire.manifest import Manifest
from kvwire.wire import FrameType, Greeting, Role, encode_frame

__all__ = ["probe"]


def test_a_link_without_lanes_waits_for_its_lease(probe):
    receiver, listener, parts, chunks = started(probe)
    receiver.feed(0, chunks[0] + chunks[1][:100])
    receiver.lane_lost(0)
    assert receiver.failure(TICKET) is None
    receiver.lane_opened(0)
    listener = Listener()
    heard = listener.hear(receiver.feed(0, parts["GREETING"] + parts["SEGMENT"] + chunks[0]))
    assert heard.chunks == {(0, 0)} and not heard.aborts
    for chunk in [header_with(chunks[1], attempt=1), *chunks[2:]]:
        assert listener.hear(receiver.feed(0, chunk)).chunks
    receiver.feed(0, parts["SEGMENT_END"] + parts["END"])
    assert_delivered(receiver)


def test_the_end_of_the_lease_fails_the_transfers(probe):
    receiver, _, _, chunks = started(probe)
    receiver.feed(0, chunks[0])
    receiver.lane_lost(0)
    receiver.lease_over()
    assert receiver.failure(TICKET) == ErrorCode.LINK_LOST


def test_a_sender_that_said_close_is_not_waited_for(probe):
    receiver, _, _, chunks = started(probe)
    receiver.feed(0, chunks[0] + encode_frame(FrameType.CLOSE))
    assert receiver.failure(TICKET) is None
    receiver.lane_lost(0)
    assert receiver.failure(TICKET) == ErrorCode.PEER_CLOSED


def test_a_ping_is_answered_where_it_came_from(probe):
    receiver, listener, _, chunks = started(probe, lanes=2)
    receiver.feed(0, chunks[0][:100])
    assert listener.hear(receiver.feed(1, encode_frame(FrameType.PING, payload=b"12345678"))
                         ).pongs == [b"12345678"]
    for other in (encode_frame(FrameType.PING, payload=b"1234567"),
                  encode_frame(FrameType.PONG, payload=b"12345678"), encode_frame(0x82)):
        assert listener.hear(receiver.feed(1, other)) == Heard()
    assert receiver.lane_error(1) is None
    assert listener.hear(receiver.feed(0, chunks[0][100:])).chunks == {(0, 0)}


def test_an_abort_that_overtakes_its_manifest_is_not_forgotten(probe):
    parts, _ = structures()
    receiver, listener = probe([Manifest(TICKET, SMALL, *SMALL_TOKENS)]), Listener()
    for lane in range(2):
        receiver.feed(lane, Greeting(Role.SENDER, LINK, lane, 2).encode())
    abort = encode_frame(FrameType.ABORT, TRANSFER, Abort(ErrorCode.CANCELLED).encode())
    receiver.feed(1, abort)
    listener = Listener()
    receiver.lane_lost(1)
    heard = listener.hear([(0, Greeting(Role.RECEIVER, LINK).encode()),
                           *receiver.feed(0, parts["MANIFEST"])])
    assert heard.aborts == [ErrorCode.CANCELLED] and heard.grants == 0


def parted(receiver, sender, lose, lanes):
    """Play a link; lanes are lost as `lose` says, and both sides hear of it."""
    writes, step = [(lane, data) for lane, data in sender.start()], 0
    while writes:
        lane, data = writes.pop(0)
        step += 1
        if (step, lane) in lose and len(lose) < lanes:
            receiver.feed(lane, data[:len(data) // 2])
            receiver.lane_lost(lane)
            writes = [(other, rest) for other, rest in writes if other != lane]
            writes += sender.lane_lost(lane)
            continue
        for answer_lane, answer in receiver.feed(lane, data):
            writes += sender.feed(answer_lane, answer)


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), lanes=st.integers(2, 4),
       lose=st.sets(st.tuples(st.integers(1, 60), st.integers(0, 3)), max_size=3))
def test_transfers_survive_all_lanes_but_one(seed, lanes, lose):
    """The lost lane's half frame, its leases and its unanswered frames are all made good."""
    lose = {(step, lane) for step, lane in lose if lane < lanes - 1}
    for probe in IMPLEMENTATIONS.values():
        receiver = probe([Manifest(TICKET, SMALL, *SMALL_TOKENS)])
        sender = sender_of(SMALL, SMALL_TOKENS, lane_count=lanes, seed=seed)
        parted(receiver, sender, lose, lanes)
        if sender.error is None:
            assert sender.done
            assert_delivered(receiver)
        else:
            assert not receiver.complete(TICKET)


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), lanes=st.integers(1, 3),
       cuts=st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True),
       stalls=st.booleans())
def test_transfers_survive_the_loss_of_all_lanes(seed, lanes, cuts, stalls):
    """Whatever was on its way is gone; with new connections only what has no receipt is sent."""
    for probe in IMPLEMENTATIONS.values():
        receiver = probe([Manifest(TICKET, SMALL, *SMALL_TOKENS)])
        sender = sender_of(SMALL, SMALL_TOKENS, lane_count=lanes, seed=seed)
        writes, step, due = list(sender.start()), 0, sorted(cuts)
        while writes and not (sender.done and receiver.complete(TICKET)):
            step += 1
            if due and step >= due[0]:
                del due[0]
                lane, data = writes[0]
                receiver.feed(lane, data[:len(data) // 2])
                for lane in range(lanes):
                    sender.lane_lost(lane)
                    receiver.lane_lost(lane)
                writes = []
                for lane in range(lanes):
                    receiver.lane_opened(lane)
                    writes += sender.lane_opened(lane)
            elif stalls and step % 7 == 0:
                writes += sender.lane_stalled(step % lanes)
            else:
                lane, data = writes.pop(0)
                for answer_lane, answer in receiver.feed(lane, data):
                    writes += sender.feed(answer_lane, answer)
        assert sender.done and sender.error is None
        assert_delivered(receiver)
