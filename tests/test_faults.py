"""Harm on the path between two real ends: repaired or refused, never delivered wrong, no hang."""

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import kvwire
from faults import ADMISSION_BYTES, DOWN, HEADER_BYTES, UP, Fault, Held, Proxy, eventually
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec

TINY = CacheSpec("t", (kvwire.latent((0,), latent_dim=4, rope_dim=1, dtype="fp16"),
                       kvwire.recurrent((1,), heads=1, key_dim=2, value_dim=2)))
TINY_TOKENS = 3
BIG = CacheSpec("b", (kvwire.attention(range(4), kv_heads=8, head_dim=128, block_tokens=16),))
BIG_TOKENS = 500  # 8 MB
RUN_SECONDS_MAX = 15
LEASE_S = 3


class Run:
    """One transfer through one proxy, and how it ended."""

    def __init__(self, receiver, *faults, spec=TINY, tokens=TINY_TOKENS, lanes=1,
                 chunk_bytes=1 << 18, metadata=None, lease_s=0, all_lanes_first=False,
                 codec="raw", contents=Held, **proxy):
        self.source, self.tokens = contents(spec, tokens, 1), tokens
        self.proxy = Proxy(receiver.address, *faults, **proxy)
        self.sender = kvwire.Sender(self.proxy.address, lanes=lanes, chunk_bytes=chunk_bytes,
                                    codec=codec, lease_s=lease_s)  # 0: the link is not waited for
        if all_lanes_first:  # without a lease, the first few would end the link with themselves
            assert eventually(lambda: self._lanes_at(receiver) == lanes)
        self.send(receiver, metadata)

    def send(self, receiver, metadata=None):
        """Send the source to another target, over the same link."""
        self.target = Held(self.source.spec, self.tokens, 2, writable=True)
        self.ticket = receiver.expect(self.target.memory)
        self.transfer = self.sender.send(self.ticket.id, self.source.memory, metadata=metadata)

    def _lanes_at(self, receiver):
        names = [link.id for link in self.sender.links()]
        return sum(len(link.stats().lanes) for link in receiver.links() if link.id in names)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sender.close()
        self.proxy.__exit__()
        self.ticket.cancel()

    def settle(self):
        """Wait for both ends; a ticket that no transfer reached knows nothing and is cancelled."""
        start = time.monotonic()
        assert self.transfer._native.wait(RUN_SECONDS_MAX), "the sender hangs"
        if not self.ticket._native.wait(0.3 if self.transfer.exception() else RUN_SECONDS_MAX):
            assert not self.ticket.progress().granted or self.ticket._native.wait(
                RUN_SECONDS_MAX), "the receiver hangs"
            self.ticket.cancel()
        assert time.monotonic() - start < 2 * RUN_SECONDS_MAX
        sent, got = self.transfer.exception(), self.ticket.exception()
        for error in (sent, got):
            assert error is None or isinstance(error, (
                kvwire.TransferError, kvwire.FormatError, kvwire.RefusedError)), repr(error)
            assert error is None or error.code != ErrorCode.INTERNAL
        assert got is None or sent is not None, "the sender believes what the receiver denies"
        assert all(self.transfer._native.pushes_returned())
        self._check_layers(got)
        return sent, got

    def _check_layers(self, error):
        ours, theirs = self.source.content(), self.target.content()
        for (kind, layer, name), sent in ours.items():
            state = self.ticket.report()[layer]
            assert state == "ready" or error
            if state == "ready":
                assert theirs[kind, layer, name].tobytes() == sent.tobytes()
        if set(self.ticket.report().values()) == {"unwritten"}:
            assert self.target.is_poison()
        else:
            assert self.target.only_leaves_were_written()


@pytest.fixture(scope="module")
def receiver():
    with kvwire.Receiver(lease_s=0) as made:
        yield made


def stream_lengths(receiver, lanes):
    """Return {(lane, way): bytes} of a transfer without faults."""
    with Run(receiver, lanes=lanes) as run:
        assert run.settle() == (None, None)
        run.sender.close()
        total = run.proxy.passed
    return total


def flips(receiver, lanes):
    longest = {}
    for _ in range(5):  # receipts may be bundled or not
        for key, count in stream_lengths(receiver, lanes).items():
            longest[key] = max(longest.get(key, 0), count)
    return [(lane, way, at) for (lane, way), count in sorted(longest.items())
            for at in range(count)]


@pytest.fixture(scope="module")
def patient_receiver():
    with kvwire.Receiver(lease_s=LEASE_S) as made:
        yield made


@pytest.mark.timeout(180)
@pytest.mark.parametrize("lanes, lease_s", [
    (1, 0), pytest.param(2, LEASE_S, marks=pytest.mark.long),
])
def test_every_byte_flipped_in_turn(request, lanes, lease_s):
    receiver = request.getfixturevalue("patient_receiver" if lease_s else "receiver")
    places = flips(receiver, lanes)
    assert len(places) > 800
    rng = random.Random(lanes)

    def one(place):
        fault = Fault(*place, "flip", 1 << rng.randrange(8))
        with Run(receiver, fault, lanes=lanes, lease_s=lease_s) as run:
            return place, run.settle()

    with ThreadPoolExecutor(16) as pool:
        outcomes = list(pool.map(one, places))
    delivered = sum(got is None for _, (_, got) in outcomes)
    unseen = sum(sent is None for _, (sent, _) in outcomes)
    if lanes == 2:  # the other lane carries on, whatever is hit
        assert unseen > 0.95 * len(places), [o for o in outcomes if o[1][0]][:9]
    else:
        assert 0 < unseen < delivered < len(places)


def test_flipped_payloads_are_repaired_unnoticed(receiver):
    hits = set()

    def edit(lane, way, head, payload):
        place = head[24], head[32:40]
        if head[2] == 4 and place not in hits and len(hits) < 20:
            hits.add(place)
            return payload[:7] + bytes([payload[7] ^ 0x10]) + payload[8:]
        return payload

    with Run(receiver, spec=BIG, tokens=BIG_TOKENS, lanes=2, edit=edit) as run:
        assert run.settle() == (None, None)
        assert run.transfer.progress().repaired_chunks == len(hits) == 20
        assert run.ticket.progress().repaired_chunks == 20
        assert run.ticket.progress().verified_bytes == run.source.memory.bytes


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_chunk_that_is_always_damaged_fails_with_the_evidence(receiver, lanes):
    def edit(lane, way, head, payload):
        hit = head[2] == 4 and head[24] == 1
        return payload[:-1] + bytes([payload[-1] ^ 1]) if hit else payload

    with Run(receiver, lanes=lanes, edit=edit) as run:
        sent, got = run.settle()
        for error in (sent, got):
            assert isinstance(error, kvwire.ChecksumError)
            assert error.code == ErrorCode.RETRIES_EXHAUSTED
            assert error.expected != error.actual and error.expected
        assert (sent.expected, sent.actual, sent.remote) == (got.expected, got.actual, True)
        assert "0x%08X" % got.expected in str(got)
        assert got.layers == {0: "ready", 1: "partly written"}


@pytest.mark.parametrize("kind", ["cut", "close"])
@pytest.mark.parametrize("way", [UP, DOWN])
def test_a_cut_anywhere_on_the_only_lane(receiver, kind, way):
    lengths = stream_lengths(receiver, 1)
    places = range(0, lengths[0, way], 9)

    def one(at):
        with Run(receiver, Fault(0, way, at, kind)) as run:
            return run.settle()

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(one, places))
    failed = [sent for sent, _ in outcomes if sent]
    assert failed
    assert {error.code for error in failed} <= {
        ErrorCode.LINK_LOST, ErrorCode.CONNECT_FAILED, ErrorCode.PEER_CLOSED}


@pytest.mark.parametrize("seed", range(12))
def test_flips_anywhere_in_a_large_transfer_over_many_lanes(patient_receiver, seed):
    """Chunks, repairs, receipts and lost lanes of all kinds at once."""
    rng = random.Random(seed)
    faults = [Fault(rng.randrange(4), *rng.choice((
        (UP, rng.randrange(128, 1_000_000)), (DOWN, rng.randrange(128, 2_000)))), "flip",
        1 << rng.randrange(8)) for _ in range(rng.randint(1, 12))]  # once lanes are admitted
    with Run(patient_receiver, *faults, spec=BIG, tokens=200, lanes=4, chunk_bytes=1 << 14,
             lease_s=LEASE_S) as run:
        assert run.settle() == (None, None)


@pytest.mark.parametrize("seed", range(6))
def test_lanes_are_lost_one_by_one_and_the_last_delivers(receiver, seed):
    rng = random.Random(seed)
    lanes = 4
    lost = rng.sample(range(lanes), lanes - 1)
    faults = [Fault(lane, rng.choice((UP, UP, DOWN)), rng.randint(1_000, 900_000),
                    rng.choice(("cut", "close"))) for lane in lost]
    with Run(receiver, *faults, spec=BIG, tokens=BIG_TOKENS, lanes=lanes, chunk_bytes=1 << 16,
             bytes_per_s=20_000_000, all_lanes_first=True) as run:
        assert run.settle() == (None, None)


def test_lanes_cut_by_hand_while_it_flows(receiver):
    with Run(receiver, spec=BIG, tokens=BIG_TOKENS, lanes=3, chunk_bytes=1 << 16,
             bytes_per_s=3_000_000, all_lanes_first=True) as run:
        for lane in (2, 0):
            before = run.ticket.progress().verified_bytes
            assert eventually(lambda: run.ticket.progress().verified_bytes > before + 200_000)
            run.proxy.cut(lane)
        assert run.settle() == (None, None)
        assert run.sender.stats()["lanes_lost"] >= 2
        assert run.transfer.progress().repaired_chunks > 0


def test_a_lane_that_wakes_up_late_harms_nothing():
    """It stalls with a leased chunk; the sender gives it up; its bytes come when all is done."""
    with kvwire.Receiver(lease_s=0) as receiver:
        stall = Fault(0, UP, 300_000, "stall", 1.5)
        with Run(receiver, stall, spec=BIG, tokens=BIG_TOKENS, lanes=2) as run:
            time.sleep(0.3)
            run.proxy.cut(0, near_end_only=True)
            assert run.settle() == (None, None)
            before = [raw.copy() for raw in run.target.storage]
            time.sleep(1.6)
            assert all((a == b).all() for a, b in zip(before, run.target.storage))


def test_a_stall_ends_at_the_deadline(receiver):
    with Run(receiver, Fault(None, UP, 400, "stall", 60)) as run:
        with pytest.raises(kvwire.TransferTimeout):
            run.transfer.result(0.2)
        assert not run.transfer.done()
        target = Held(TINY, TINY_TOKENS, 3, writable=True)
        ticket = receiver.expect(target.memory, deadline_s=0.3)
        with pytest.raises(kvwire.TransferTimeout) as caught:
            ticket.result(5)
        assert caught.value.code == ErrorCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("faults", [
    [Fault(0, UP, 64, "stall", 0.2), Fault(0, DOWN, 64, "stall", 0.2)],
    [Fault(0, UP, at, "stall", 0.01) for at in range(1, 400, 7)],
    [Fault(1, UP, 0, "stall", 0.5), Fault(0, DOWN, 100, "stall", 0.3)],
])
def test_delays_only_delay(receiver, faults):
    with Run(receiver, *faults, lanes=2) as run:
        assert run.settle() == (None, None)


def test_swallowed_answers_are_asked_for_again(patient_receiver):
    """The lane that carries the receiver's last words dies with them; the other repeats them."""
    for at in range(64, 400, 16):
        with Run(patient_receiver, Fault(0, DOWN, at, "cut"), lanes=2, lease_s=LEASE_S) as run:
            assert run.settle() == (None, None)


def test_metadata_is_never_delivered_wrong(receiver):
    metadata = {"first": 1234567, "text": "x" * 40}

    def one(at):
        with Run(receiver, Fault(0, UP, at, "flip", 0x20), metadata=metadata) as run:
            run.settle()
            return run.ticket.metadata

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(ADMISSION_BYTES + HEADER_BYTES, 584, 3)))
    assert all(each in ({}, metadata) for each in found)
    assert metadata in found and {} in found


def test_both_ends_may_be_proxied_over_a_slow_path_with_small_windows():
    with kvwire.Receiver(window_bytes=1 << 16, chunk_bytes_max=1 << 16, lease_s=0) as receiver:
        faults = [Fault(lane, UP, at, "flip", 4) for lane in range(2)
                  for at in range(500, 2_000_000, 100_003)]
        with Run(receiver, *faults, spec=BIG, tokens=100, lanes=2) as run:
            sent, got = run.settle()
            assert got is None or sent is not None
