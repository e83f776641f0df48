"""Reading a link while it works: counters that add up, overlap, signs of congestion, the cost."""

import gc
import socket
import threading
import time
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

import kvwire
from faults import eventually
from kvwire.link import CongestionThresholds, Link, LinkOptions

LAYERS = 4
SPEC = kvwire.CacheSpec("m", (kvwire.attention(range(LAYERS), kv_heads=8, head_dim=64,
                                               dtype="bf16"),))
TOKENS = 8192
BYTES = LAYERS * 2 * TOKENS * 8 * 64 * 2
LANES = 8


def memory(writable=False):
    return kvwire.CacheMemory(
        SPEC, {(layer, leaf): np.ones((TOKENS, 8, 64), np.uint16)
               for layer in range(LAYERS) for leaf in "kv"}, tokens=TOKENS, writable=writable)


@pytest.fixture
def ends():
    with kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, lanes=LANES) as sender:
        sender.connect()
        assert eventually(lambda: len(sender.links()[0].stats().lanes) == LANES)
        yield sender, receiver


def hand_off(sender, receiver, pause_s=0.0):
    ticket = receiver.expect(memory(writable=True))
    transfer = sender.open(ticket.id, memory())
    for layer in range(LAYERS):
        transfer.push(layer)
        time.sleep(pause_s)
    transfer.finish().result(60)
    ticket.result(60)
    return transfer


def test_the_counters_of_both_sides_add_up(ends):
    sender, receiver = ends
    hand_off(sender, receiver)
    sending, = (link.stats() for link in sender.links())
    receiving, = (link.stats() for link in receiver.links())
    assert sending.link == receiving.link and len(receiving.lanes) == LANES
    assert sending.sent_bytes == sum(lane.sent_bytes for lane in sending.lanes)
    assert BYTES < sending.sent_bytes - sending.retransmitted_bytes < 1.01 * BYTES
    assert sending.effective_gbps * sending.window_s / 8e-9 == pytest.approx(BYTES)
    assert receiving.effective_gbps * receiving.window_s / 8e-9 == pytest.approx(BYTES)
    assert sending.goodput_gbps * sending.window_s / 8e-9 == pytest.approx(BYTES, rel=0.02)
    assert sending.backlog_bytes == sending.queue_bytes == 0
    assert 0 < sending.rtt_min_ms <= sending.rtt_ms < 1000
    assert 0 < sending.utilisation <= 1 and sending.capacity_gbps >= sending.goodput_gbps
    assert {lane.congestion_state for lane in sending.lanes} <= {
        "open", "disorder", "cwr", "recovery", "loss"}
    with pytest.raises(FrozenInstanceError):
        sending.rtt_ms = 0


def test_the_backlog_is_what_waits(ends):
    sender, receiver = ends
    ticket = receiver.expect(memory(writable=True))
    transfer = sender.open(ticket.id, memory())
    assert eventually(lambda: transfer.progress().granted)
    link, = sender.links()
    transfer.push_all()
    seen = []
    while not seen or seen[-1] > 0:
        seen.append(link.stats().backlog_bytes)
    assert seen == sorted(seen, reverse=True)
    transfer.finish().result(60)


def test_overlap_is_what_had_arrived_at_the_last_push(ends):
    sender, receiver = ends
    sender.links()[0].stats()
    shown = hand_off(sender, receiver).stats()
    sender.links()[0].stats()
    hidden = hand_off(sender, receiver, pause_s=0.5).stats()
    assert hidden.overlap_ratio == pytest.approx(1 - 1 / LAYERS)
    assert shown.goodput_gbps > hidden.goodput_gbps > 0
    assert 0 < hidden.link_utilisation < 1


def test_a_poll_is_cheap(ends):
    link, = ends[0].links()
    began = time.thread_time()
    for _ in range(200):
        link.stats()
    assert (time.thread_time() - began) / 200 < 0.002  # 100 Hz in a fifth of a core, at worst


def test_a_link_that_is_gone_says_so(ends):
    sender, receiver = ends
    link, = sender.links()
    receiver.close()
    assert eventually(lambda: not sender.links())
    with pytest.raises(kvwire.UsageError, match=link.id):
        link.stats()


class Readings:
    """What the extension says, by script: (seconds, verified bytes, lanes); a lane is (serial,
    acknowledged, sent, sent again)."""

    def __init__(self, *readings):
        self.readings = list(readings)

    def link_stats(self, name):
        time_s, verified, lanes = self.readings.pop(0)
        return 0, int(time_s * 1e9), verified, 0, [
            (serial, 0, 0, acked, sent, again, *[0] * 10) for serial, acked, sent, again in lanes
        ], (0, 0, 0, [])


def test_rates_cover_the_last_second_or_the_time_since_the_last_poll():
    link = Link(Readings(
        (0.5, 500, [(1, 500, 500, 0)]), (1.0, 1000, [(1, 1000, 1000, 0)]),
        (1.75, 2500, [(1, 2500, 3000, 500)]), (9.75, 4100, [(1, 4100, 4600, 500)])), bytes(16))
    stats = [link.stats() for _ in range(4)]
    assert [s.window_s for s in stats] == [0.5, 1.0, 1.25, 8.0]
    assert [s.effective_gbps / 8e-9 for s in stats] == pytest.approx([1000, 1000, 1600, 200])
    assert [s.loss_rate for s in stats] == pytest.approx([0, 0, 0.2, 0])
    assert stats[3].capacity_gbps / 8e-9 == pytest.approx(1600)
    assert stats[3].utilisation == pytest.approx(0.125)


def test_a_lane_made_again_counts_from_zero():
    link = Link(Readings((0.5, 0, [(1, 5000, 5000, 0)]), (1.0, 0, [(2, 300, 300, 0)])), bytes(16))
    link.stats()
    assert link.stats().goodput_gbps / 8e-9 == pytest.approx(300)


def watchers():
    return [t for t in threading.enumerate() if t.name == "kvwire-congestion"]


EVERYTHING = CongestionThresholds(loss_rate=-1, poll_s=0.001, quiet_s=0)


def test_signs_are_told_once_when_they_begin(ends):
    told = []
    ends[0].on_congestion(lambda signs, stats: told.append((signs, stats)), EVERYTHING)
    assert eventually(lambda: told)
    time.sleep(0.3)
    assert "loss" in told[0][0] and told[0][1].link == ends[0].links()[0].id
    assert len([signs for signs, _ in told if "loss" in signs]) == 1
    assert len(watchers()) == 1
    ends[0].on_congestion(None)
    assert not watchers()


def test_a_quiet_link_shows_no_sign(ends):
    told = []
    ends[0].on_congestion(lambda *event: told.append(event), CongestionThresholds(
        loss_rate=0.5, rtt_rise_ms=1000))  # loopback on a busy machine is not so quiet
    time.sleep(0.5)
    assert told == []


def test_a_callback_that_fails_is_shown_and_called_again(ends, monkeypatch):
    shown = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_type))
    ends[0].on_congestion(lambda *_: 1 / 0, CongestionThresholds(loss_rate=-1, quiet_s=-1))
    assert eventually(lambda: len(shown) >= 2)
    assert set(shown) == {ZeroDivisionError}


def test_the_watch_ends_with_its_endpoint():
    with kvwire.Receiver() as receiver:
        sender = kvwire.Sender(receiver.address)
        sender.connect()
        sender.on_congestion(print, EVERYTHING)
        sender.close()
        assert not watchers()
        sender = kvwire.Sender(receiver.address)
        sender.on_congestion(print, EVERYTHING)
        del sender
        gc.collect()
        assert eventually(lambda: not watchers())


def test_a_callback_may_close(ends):
    sender, _ = ends
    sender.on_congestion(lambda *_: sender.close(), EVERYTHING)
    assert eventually(lambda: not watchers())
    with pytest.raises(kvwire.UsageError, match="closed"):
        sender.links()


@pytest.mark.parametrize("options, words", [
    ({"congestion_control": "no-such"}, "this kernel has"),
    ({"dscp": 64}, "0 to 63"), ({"bandwidth_max_gbps": 0}, "bandwidth_max_gbps is 0"),
])
def test_options_are_refused_before_anything_is_made(options, words):
    with pytest.raises(kvwire.UsageError, match=words):
        kvwire.Receiver(link_options=LinkOptions(**options))


def test_the_mark_is_on_the_wire():
    try:
        tap = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    except PermissionError:
        pytest.skip("raw sockets need CAP_NET_RAW")
    options = LinkOptions(dscp=10, congestion_control="reno")
    with tap, kvwire.Receiver() as receiver, \
            kvwire.Sender(receiver.address, link_options=options) as sender:
        tap.settimeout(10)
        sender.connect()
        port = int(receiver.address.rsplit(":")[-1])
        while True:  # all TCP of the machine's comes by
            datagram = tap.recv(65536)
            head = 4 * (datagram[0] & 15)
            if int.from_bytes(datagram[head + 2:head + 4], "big") == port:
                break
        assert datagram[1] >> 2 == 10
