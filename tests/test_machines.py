"""Both C++ machines over a network in memory.

However the streams are cut and interleaved, and whatever lanes are lost or bytes flipped on the
way: a transfer ends delivered and bit-exact, or with a typed error on both sides; every push
completes exactly once; and nothing is written after an end.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native_probe import NativeProbe, native_memory
from test_reference import expected_leaves
from vectors.generate import TICKET, TRANSFER, all_items, filled, filled_with_numbers, hybrid_spec

from kvwire import _native
from kvwire.errors import ErrorCode
from kvwire.manifest import Manifest

FAILURES = {ErrorCode.LINK_LOST, ErrorCode.PEER_CLOSED, ErrorCode.RETRIES_EXHAUSTED}


class Network:
    """Two probes and the bytes between them, per lane and direction."""

    def __init__(self, spec, tokens, *, lanes=2, seed=0, into=None, codec=0, chunk_bytes=4096,
                 per_push=3, finish=True):
        self.choose = random.Random(seed)
        self.fill = filled_with_numbers if codec == 2 else filled
        self.source = self.fill(spec, *tokens)
        self.lanes = lanes
        manifest = Manifest(TICKET, spec, *tokens, codecs=7)
        self.receiver = NativeProbe([Manifest(TICKET, into or spec, *tokens)])
        self.sender = _native.SenderProbe(
            TRANSFER, manifest.encode(), native_memory(self.source), lanes=lanes,
            chunk_bytes=chunk_bytes, codec=codec)
        self.wire = {(side, lane): bytearray() for side in "sr" for lane in range(lanes)}
        self.dead = set()
        self.sent = 0
        self.flip_at = None
        self._put("s", self.sender.start())
        items = all_items(spec, *tokens)
        self.pushes = 0
        for at in range(0, len(items), per_push):
            self._put("s", self.sender.push([
                (i.group_index, i.tensor_index, i.layer, i.token_start, i.token_stop)
                for i in items[at:at + per_push]]))
            self.pushes += 1
        if finish:
            self._put("s", self.sender.finish())

    def _put(self, side, writes):
        for lane, data in writes:
            if lane in self.dead:
                continue
            data = bytearray(data)
            if self.flip_at is not None and self.sent <= self.flip_at < self.sent + len(data):
                data[self.flip_at - self.sent] ^= 1 << self.choose.randrange(8)
            self.sent += len(data)
            self.wire[side, lane] += data

    def cut(self, lane):
        """Lose a lane: what is on its way is gone, and both sides hear of it."""
        if lane in self.dead:
            return
        self.dead.add(lane)
        for side in "sr":
            self.wire[side, lane].clear()
        self._put("s", self.sender.lane_lost(lane))
        self._put("r", self.receiver.lane_lost(lane))

    def reopen(self, lane):
        self.dead.discard(lane)
        self.receiver.lane_opened(lane)
        self._put("s", self.sender.reopen(lane))

    def end_lease(self):
        """Let both sides give up if all lanes are gone."""
        if len(self.dead) == self.lanes:
            self.sender.lease_over()
            self.receiver.lease_over()

    def step(self):
        """Move some bytes of some lane; False when nothing is on its way."""
        waiting = [place for place, data in self.wire.items() if data]
        if not waiting:
            return False
        side, lane = place = self.choose.choice(waiting)
        count = self.choose.choice([1, 7, 64, 100, 4096, 1 << 20])
        data = bytes(self.wire[place][:count])
        del self.wire[place][:count]
        if side == "s":
            self._put("r", self.receiver.feed(lane, data))
            if self.receiver.lane_error(lane):
                self._receiver_closed(lane)
        else:
            self._put("s", self.sender.feed(lane, data))
            if self.sender.lane_error(lane):
                self.cut(lane)
        return True

    def _receiver_closed(self, lane):
        """Its last words still arrive; what the sender has on its way does not."""
        self.wire["s", lane].clear()
        last = bytes(self.wire["r", lane])
        self.wire["r", lane].clear()
        if lane not in self.dead:
            self._put("s", self.sender.feed(lane, last))
            self.cut(lane)

    def run(self):
        while self.step():
            pass

    def check_end(self, spec, tokens, into=None):
        """The invariant of this file."""
        outcome = self.sender.outcome()
        assert outcome is not None
        assert self.sender.pushes_returned() == self.pushes
        expected = expected_leaves(spec, tokens, into, self.fill)
        if outcome == 0:
            assert self.receiver.complete(TICKET)
            assert self.receiver.leaves(TICKET) == expected
        else:
            assert ErrorCode(outcome) in FAILURES
        # A receiver may be done although the sender never heard of it; never the other way round.
        if self.receiver.complete(TICKET):
            assert self.receiver.leaves(TICKET) == expected
        else:  # a ticket whose transfer never came still waits for another
            assert self.receiver.failure(TICKET) in FAILURES | {None}
        return ErrorCode(outcome) if outcome else None


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), lanes=st.integers(1, 5), tokens=st.integers(0, 200),
       codec=st.sampled_from([0, 1, 2]), block=st.sampled_from([0, 16, 48]),
       per_push=st.integers(1, 9))
def test_any_interleaving_is_delivered(seed, lanes, tokens, codec, block, per_push):
    spec, into = hybrid_spec(block), hybrid_spec(0)
    network = Network(spec, (0, tokens), lanes=lanes, seed=seed, into=into, codec=codec,
                      per_push=per_push)
    network.run()
    assert network.check_end(spec, (0, tokens), into) is None
    assert network.sender.verified_bytes() == sum(
        array.size for array in network.source.arrays.values())


@settings(max_examples=120)
@given(seed=st.integers(0, 1 << 32), lanes=st.integers(2, 4), cuts=st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 3)), min_size=1, max_size=3),
    codec=st.sampled_from([0, 2]))
def test_lost_lanes_are_survived_while_one_is_left(seed, lanes, cuts, codec):
    spec, tokens = hybrid_spec(16), (0, 300)
    network = Network(spec, tokens, lanes=lanes, seed=seed, codec=codec)
    due = dict(cuts)
    steps = 0
    while network.step():
        if (lane := due.pop(steps, None)) is not None and lane < lanes:
            if len(network.dead) < lanes - 1:
                network.cut(lane)
        steps += 1
    assert network.check_end(spec, tokens) is None


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), when=st.integers(0, 300))
def test_losing_every_lane_fails_both_sides(seed, when):
    spec, tokens = hybrid_spec(16), (0, 300)
    network = Network(spec, tokens, lanes=2, seed=seed)
    for _ in range(when):
        network.step()
    finished = network.sender.outcome() == 0
    network.cut(0)
    network.cut(1)
    assert finished or network.sender.outcome() is None
    network.end_lease()
    error = network.check_end(spec, tokens)
    assert (error is None) == finished


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32), lanes=st.integers(1, 3),
       cuts=st.lists(st.integers(0, 200), min_size=1, max_size=4), codec=st.sampled_from([0, 2]))
def test_losing_every_lane_is_survived_when_they_come_back(seed, lanes, cuts, codec):
    spec, tokens = hybrid_spec(16), (0, 300)
    network = Network(spec, tokens, lanes=lanes, seed=seed, codec=codec)
    for steps in cuts:
        for _ in range(steps):
            network.step()
        for lane in range(lanes):
            network.cut(lane)
        for lane in range(lanes):
            network.reopen(lane)
    network.run()
    assert network.check_end(spec, tokens) is None


@settings(max_examples=300)
@given(seed=st.integers(0, 1 << 32), lanes=st.integers(1, 3), where=st.floats(0, 1),
       codec=st.sampled_from([0, 2]))
def test_a_flipped_bit_is_repaired_or_refused(seed, lanes, where, codec):
    spec, tokens = hybrid_spec(16), (0, 100)
    clean = Network(spec, tokens, lanes=lanes, seed=seed, codec=codec)
    clean.run()
    network = Network(spec, tokens, lanes=lanes, seed=seed, codec=codec)
    network.flip_at = int(network.sent + where * (clean.sent - network.sent))
    network.run()
    if network.sender.outcome() is None:  # a flipped length: one side waits for more bytes
        for lane in range(lanes):
            network.cut(lane)
    network.end_lease()
    error = network.check_end(spec, tokens)
    if lanes > 1 and len(network.dead) < lanes:
        assert error is None


@settings(max_examples=100)
@given(seed=st.integers(0, 1 << 32), when=st.integers(0, 300), side=st.sampled_from("sr"),
       codec=st.sampled_from([0, 2]))
def test_nothing_is_written_after_a_cancel(seed, when, side, codec):
    spec, tokens = hybrid_spec(16), (0, 300)
    network = Network(spec, tokens, lanes=2, seed=seed, codec=codec)
    for _ in range(when):
        network.step()
    done = network.receiver.complete(TICKET)
    if side == "s":
        ended = network.sender.outcome() is not None
        network._put("s", network.sender.cancel())
        assert network.sender.pushes_returned() == network.pushes
        for array in network.source.arrays.values():
            array[:] = 0xEE  # the source is the caller's again
        network.run()
        assert ended or network.sender.outcome() == ErrorCode.CANCELLED
        assert done or network.receiver.complete(TICKET) or (
            network.receiver.failure(TICKET) in (ErrorCode.CANCELLED, None))
        if network.receiver.complete(TICKET):
            assert network.receiver.leaves(TICKET) == expected_leaves(spec, tokens,
                                                                      fill=network.fill)
        return
    network._put("r", network.receiver.cancel(TICKET))
    before = network.receiver.leaves(TICKET)
    network.run()
    assert network.receiver.leaves(TICKET) == before
    assert done or network.receiver.failure(TICKET) == ErrorCode.CANCELLED
    # On another lane the answer to a late frame may overtake the word that it was cancelled.
    assert network.sender.outcome() in (0, ErrorCode.CANCELLED, ErrorCode.TICKET_EXPIRED,
                                        ErrorCode.TRANSFER_UNKNOWN)


@pytest.mark.parametrize("codec", [0, 2])
def test_a_changed_source_is_found_out_when_a_chunk_travels_again(codec):
    spec, tokens = hybrid_spec(16), (0, 300)
    network = Network(spec, tokens, lanes=2, codec=codec)
    while not network.sender.outcome() and network.sent < 20_000:
        network.step()
    for array in network.source.arrays.values():
        array[:] = 0xEE
    network.cut(0)
    network.run()
    assert network.sender.outcome() in (ErrorCode.SOURCE_CHANGED, 0)
    assert network.sender.pushes_returned() == network.pushes


@pytest.mark.parametrize("lanes", [1, 3])
def test_an_empty_transfer_is_delivered(lanes):
    spec = hybrid_spec(16)
    network = Network(spec.__class__("empty", ()), (0, 0), lanes=lanes)
    network.run()
    assert network.sender.outcome() == 0
    assert network.receiver.complete(TICKET)
