"""A small urgent transfer on a long link that a large one keeps full; the bandwidth limit."""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from test_netlab import be_urgent

import kvwire
from kvwire.link import LinkOptions

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.build import BuildError  # noqa: E402
from bench.netlab import Link, LinkUnavailable, enter  # noqa: E402

RTT_S = 0.04
TOKEN_BYTES = 4096
WAIT_S = 60


def memory(tokens, writable=False):
    spec = kvwire.CacheSpec("m", (kvwire.latent((0,), latent_dim=TOKEN_BYTES - 64, dtype="int8"),))
    return kvwire.CacheMemory(spec, {(0, "mla"): np.ones((tokens, TOKEN_BYTES), np.int8)},
                              tokens=tokens, writable=writable)


@pytest.fixture
def ends():
    """Make a sender and a receiver at the two ends of a link."""
    threads = {side: ThreadPoolExecutor(1) for side in ("left", "right")}
    made = []

    def make(rate_gbit, **options):
        try:
            link = Link(rate_gbit=rate_gbit, rtt_ms=RTT_S * 1e3, tcp_bytes_max=None)
        except (LinkUnavailable, BuildError) as error:
            pytest.skip(str(error))
        made.append(link)
        for side, thread in threads.items():
            thread.submit(enter, link.namespace(side)).result(WAIT_S)
            thread.submit(be_urgent).result(WAIT_S)
        receiver = threads["right"].submit(
            kvwire.Receiver, f"{link.address['right']}:0",
            allow_unauthenticated=True).result(WAIT_S)
        made.append(receiver)
        sender = threads["left"].submit(kvwire.Sender, receiver.address, **options).result(WAIT_S)
        made.append(sender)
        sender.connect()
        return sender, receiver

    yield make
    for each in reversed(made):
        each.close()
    for thread in threads.values():
        thread.shutdown()


def hand_off(sender, receiver, tokens, **options):
    ticket = receiver.expect(memory(tokens, writable=True))
    return sender.send(ticket.id, memory(tokens), **options)


def test_an_urgent_transfer_takes_a_few_round_trips(ends):
    sender, receiver = ends(0.4, lanes=4)
    large = hand_off(sender, receiver, (128 << 20) // TOKEN_BYTES)
    while large.progress().verified_bytes < 16 << 20:
        time.sleep(0.01)
    took_s = []
    while not large.done() and len(took_s) < 10:
        began = time.monotonic()
        hand_off(sender, receiver, 1, priority=1).result(WAIT_S)
        took_s.append(time.monotonic() - began)
    # Two when queues are empty, five to twelve here; behind the large one it would be sixty. What
    # else the machine does can only make it longer.
    assert min(took_s) < 20 * RTT_S
    large.result(WAIT_S)


@pytest.mark.parametrize("congestion_control", ["bbr", "cubic"])
def test_the_limit_is_kept_and_used(ends, congestion_control):
    limit_gbps = 0.2
    try:
        options = LinkOptions(bandwidth_max_gbps=limit_gbps, congestion_control=congestion_control)
        sender, receiver = ends(0.4, lanes=4, link_options=options)
    except kvwire.UsageError as error:
        pytest.skip(str(error))
    large = hand_off(sender, receiver, (100 << 20) // TOKEN_BYTES)
    while large.progress().verified_bytes < 10 << 20:
        time.sleep(0.01)
    link, = sender.links()
    for tries_left in range(5, -1, -1):  # a machine that stands still keeps no rate
        before, began, rtts_ms = link.stats(), time.monotonic(), []
        while time.monotonic() < began + 0.6:
            time.sleep(0.05)
            rtts_ms.append(link.stats().rtt_ms)
        after, seconds = link.stats(), time.monotonic() - began
        assert not large.done()
        sent_gbps = (after.sent_bytes - before.sent_bytes) / seconds * 8e-9
        used = sent_gbps > 0.7 * limit_gbps and after.utilisation > 0.7  # 0.95 on a quiet machine
        unqueued = statistics.median(rtts_ms) < 1.5 * RTT_S * 1e3  # a queue would double it
        if used and unqueued or not tries_left:
            break
    assert used and unqueued
    assert sent_gbps < 1.05 * limit_gbps
    assert after.capacity_gbps == limit_gbps
    assert after.loss_rate < 0.001
