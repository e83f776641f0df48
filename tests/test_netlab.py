"""The link laboratory gives the link that was asked for: against iperf3, a probe, and counters."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.build import BuildError  # noqa: E402
from bench.netlab import Link, LinkUnavailable, Settings, enter  # noqa: E402

WAIT_S = 20
SIGMAS = 5  # of a binomial count: one run in a million goes beyond by chance


@pytest.fixture
def make_link():
    made = []

    def make(**options):
        try:
            made.append(Link(**options))
        except (LinkUnavailable, BuildError) as error:
            pytest.skip(str(error))
        return made[-1]

    yield make
    for link in made:
        link.close()


def in_thread(*steps):
    """Run `steps` in a thread of their own; returns a future of what the last one returns."""
    pool = ThreadPoolExecutor(1)
    result = pool.submit(lambda: [step() for step in steps][-1])
    pool.shutdown(wait=False)
    return result


def within(link, side, *steps):
    """As `in_thread`, inside the namespace."""
    return in_thread(lambda: enter(link.namespace(side)), *steps)


def be_urgent():
    """Let the calling thread, and what it starts, wait for no core, as the link itself does: how
    busy the machine is is not what is measured. Without the permission it waits."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def listening(link):
    def listen():
        listener = socket.create_server((link.address["right"], 0))
        listener.settimeout(WAIT_S)
        return listener
    return within(link, "right", listen).result(WAIT_S)


def connected(link, count=1):
    """Return `count` (left socket, right socket)."""
    with listening(link) as listener:
        address = listener.getsockname()
        pairs = []
        for _ in range(count):
            left = within(link, "left", lambda: socket.create_connection(address, WAIT_S))
            right = listener.accept()[0]
            right.settimeout(WAIT_S)
            pairs.append((left.result(WAIT_S), right))
        return pairs


def read_all(each, size):
    taken = bytearray()
    while len(taken) < size:
        piece = each.recv(1 << 20)
        assert piece, f"the connection ended at {len(taken)} of {size}"
        taken += piece
    return bytes(taken)


def round_trips_ms(link, count):
    def bound():
        echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        echo.bind((link.address["right"], 0))
        echo.settimeout(WAIT_S)
        return echo

    def ask():
        times = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(WAIT_S)
            asking.connect(echo.getsockname())
            for _ in range(count):
                began = time.perf_counter()
                asking.send(b"?")
                asking.recv(1)
                times.append((time.perf_counter() - began) * 1e3)
        return times

    def answer():
        for _ in range(count):
            echo.sendto(*echo.recvfrom(1))

    with within(link, "right", bound).result(WAIT_S) as echo:
        answered = in_thread(be_urgent, answer)
        times = within(link, "left", be_urgent, ask).result(WAIT_S)
        answered.result(WAIT_S)
        return times


def iperf3(link, *arguments):
    """Return what `iperf3 -J` says at the sender's end."""
    if shutil.which("iperf3") is None:
        pytest.skip("iperf3 is missing")

    def run():
        serving = link.popen_in("right", ["iperf3", "-s", "-1", "--forceflush"],
                                stdout=subprocess.PIPE, text=True)
        for line in serving.stdout:
            if "listening" in line:
                break
        done = link.run_in("left", ["iperf3", "-c", link.address["right"], "-J", *arguments],
                           capture_output=True, text=True, timeout=WAIT_S)
        serving.communicate(timeout=WAIT_S)
        return json.loads(done.stdout)

    said = in_thread(be_urgent, run).result(2 * WAIT_S)
    assert "error" not in said, said["error"]
    return said


def goodput_gbit(said):
    return said["end"]["sum_received"]["bits_per_second"] / 1e9


@pytest.mark.parametrize("rate_gbit", [0.3, 1.0])
def test_rate_is_as_set_and_changes_while_running(make_link, rate_gbit):
    # No loss at all: the queue always has something to send, whatever TCP makes of the delay.
    link = make_link(rate_gbit=rate_gbit, rtt_ms=10, queue_bytes=64 << 20, congestion="reno")

    def has_its_rate():
        measured = goodput_gbit(iperf3(link, "-t", "1", "-O", "1", "-w", "2M"))
        return measured == pytest.approx(link.payload_rate_gbit, rel=0.05)

    assert any(has_its_rate() for _ in range(5))  # not while the machine stands still
    link.set(rate_gbit=rate_gbit / 2)
    assert any(has_its_rate() for _ in range(5))


@pytest.mark.long
def test_five_gigabits_over_forty_milliseconds_pass(make_link):
    link = make_link(rate_gbit=5, rtt_ms=40)
    before_s = link.cpu_s()
    said = iperf3(link, "-t", "6", "-O", "2")
    assert goodput_gbit(said) == pytest.approx(link.payload_rate_gbit, rel=0.05)
    assert link.cpu_s() - before_s < 8  # of the 8 seconds of one core


def test_round_trip_takes_what_was_set(make_link):
    link = make_link(rate_gbit=1, rtt_ms=40)
    assert min(round_trips_ms(link, 15)) == pytest.approx(40, abs=2)
    link.set(rtt_ms=10)
    assert min(round_trips_ms(link, 15)) == pytest.approx(10, abs=2)
    link.set(rtt_ms=0)
    assert min(round_trips_ms(link, 15)) < 2


def test_jitter_spreads_the_round_trips_and_no_more(make_link):
    link = make_link(rtt_ms=10, jitter_ms=10)  # each way 5 to 15 ms
    times = sorted(round_trips_ms(link, 50))
    assert times[0] > 9.9
    times = times[:40]  # the longest may be the machine's doing
    assert statistics.mean(times) == pytest.approx(18.5, abs=4)
    assert statistics.stdev(times) > 2


@pytest.mark.parametrize("loss", [0.001, 0.02])
def test_losses_are_as_frequent_as_set_and_are_what_is_sent_again(make_link, loss):
    link = make_link(rate_gbit=1, rtt_ms=1, loss=loss, queue_bytes=64 << 20, congestion="reno")
    said = iperf3(link, "-n", "24M")
    time.sleep(0.1)  # until the last acknowledgement has arrived
    count = link.stats()["left"]
    assert count["segments"] > 16_000 and count["queue_dropped"] == 0
    expected = count["segments"] * loss
    assert abs(count["lost"] - expected) < SIGMAS * math.sqrt(expected * (1 - loss))
    assert count["delivered"] == count["segments"] - count["lost"]
    assert said["end"]["sum_sent"]["retransmits"] == pytest.approx(count["retransmitted"], abs=3)
    # Nothing is sent again without a loss, but for a tail probe or a timeout now and then.
    assert count["lost"] - 3 <= count["retransmitted"] <= count["lost"] * 1.1 + 10


def test_queue_holds_what_was_set_and_drops_the_rest(make_link):
    held, datagram = 30, b"x" * 1472  # one full segment each
    link = make_link(rate_gbit=0.01, queue_bytes=held * 1538)
    within(link, "right", lambda: None).result(WAIT_S)

    def flood():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sending:
            for _ in range(10 * held):
                sending.sendto(datagram, (link.address["right"], 9))

    within(link, "left", flood).result(WAIT_S)
    time.sleep(held * 1538 * 8 / 10e6 + 0.1)
    count = link.stats()["left"]
    assert count["segments"] == 10 * held
    assert count["delivered"] + count["queue_dropped"] == count["segments"]
    assert held <= count["delivered"] and count["queue_dropped"] > 0  # it drains meanwhile


def captured(link, size):
    """Return the frames of one connection that arrive at the right, and the bytes it carried."""
    sent = random.Random(7).randbytes(size)

    def tap():
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        raw.setsockopt(socket.SOL_SOCKET, 33, 256 << 20)  # SO_RCVBUFFORCE
        raw.bind(("netlab", 0))
        return raw

    with within(link, "right", tap).result(WAIT_S) as raw:
        (left, right), = connected(link)
        with left, right:
            sending = threading.Thread(target=left.sendall, args=(sent,))
            sending.start()
            assert read_all(right, size) == sent
            sending.join()
            port = left.getsockname()[1]
        raw.setblocking(False)
        frames = []
        while True:
            try:
                data, origin = raw.recvfrom(1 << 17)
            except BlockingIOError:
                return frames, sent, port
            if origin[2] != socket.PACKET_OUTGOING and data[34:36] == port.to_bytes(2, "big"):
                frames.append(data)


def ones_sum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_split_super_frames_are_sound(make_link):
    link = make_link(rate_gbit=1, rtt_ms=4, loss=0.02)
    frames, sent, port = captured(link, 4 << 20)
    first_seq = struct.unpack(">I", frames[0][38:42])[0] + 1  # after the SYN
    sizes, ids = set(), {}
    for frame in frames:
        head = 14 + 20 + (frame[46] >> 4) * 4
        total, ident = struct.unpack(">HH", frame[16:20])
        payload = frame[head:14 + total]
        assert 14 + total == len(frame) and ones_sum(frame[14:34]) == 0xFFFF
        pseudo = frame[26:34] + struct.pack(">HH", socket.IPPROTO_TCP, total - 20)
        seq = struct.unpack(">I", frame[38:42])[0]
        if payload:
            at = (seq - first_seq) % (1 << 32)
            assert payload == sent[at:at + len(payload)]
            assert struct.unpack(">H", frame[50:52])[0] == ones_sum(pseudo)  # left to offload
            sizes.add(len(payload))
            for segment in range(-(-len(payload) // 1448)):
                ids.setdefault((ident + segment) % (1 << 16), 0)
                ids[(ident + segment) % (1 << 16)] += 1
    assert max(sizes) > 20_000 and 1448 in sizes and len(sizes) > 5
    assert max(ids.values()) == 1  # each segment keeps the id that it had in its super-frame
    assert link.stats()["left"]["lost"] > 20


def test_blackhole_swallows_all_and_ends(make_link):
    link = make_link(rate_gbit=0.2, rtt_ms=10)
    (left, right), = connected(link)
    size = 8 << 20
    with left, right:
        sending = threading.Thread(target=left.sendall, args=(bytes(size),))
        sending.start()
        right.recv(1)
        link.set(blackhole=True)
        time.sleep(0.1)
        before = link.stats()
        time.sleep(0.5)
        after = link.stats()
        assert after["left"]["delivered"] == before["left"]["delivered"]
        assert after["left"]["blackholed"] > 0
        link.set(blackhole=False)
        read_all(right, size - 1)
        sending.join()


def test_blackhole_of_one_port_stalls_that_connection_alone(make_link):
    link = make_link(rate_gbit=1, rtt_ms=4)
    pairs = connected(link, 4)
    ports = [left.getsockname()[1] for left, _ in pairs]
    assert {left for left, _ in link.connections()} == set(ports)
    link.set(blackhole=[ports[2]])
    for number, (left, right) in enumerate(pairs):
        left.sendall(b"?")
        right.settimeout(0.5 if number == 2 else WAIT_S)
        if number == 2:
            with pytest.raises(TimeoutError):
                right.recv(1)
        else:
            assert right.recv(1) == b"?"
    right_port = pairs[2][1].getsockname()[1]
    assert link.stats((ports[2], right_port))["left"]["blackholed"] > 0
    assert link.stats((ports[1], right_port))["left"]["blackholed"] == 0
    link.set(blackhole=False)
    pairs[2][1].settimeout(WAIT_S)
    assert pairs[2][1].recv(1) == b"?"  # TCP sends it again
    for left, right in pairs:
        left.close()
        right.close()


def test_cut_resets_both_ends_of_the_connections_named(make_link):
    link = make_link(rate_gbit=1, rtt_ms=4)
    (left, right), (other_left, other_right) = connected(link, 2)
    left.settimeout(WAIT_S)
    link.cut(left.getsockname()[1])
    for end in (left, right):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    other_left.sendall(b"?")
    assert other_right.recv(1) == b"?"
    link.cut()
    for end in (other_left, other_right):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    (left, right), = connected(link)  # the next connection is not cut
    left.sendall(b"?")
    assert right.recv(1) == b"?"


def test_cut_ends_a_connection_in_full_flow_at_both_ends(make_link):
    link = make_link(rate_gbit=0.5, rtt_ms=10, loss=0.001)
    (left, right), = connected(link)

    def send():
        while True:
            left.sendall(bytes(1 << 20))

    sending = within(link, "left", send)
    read_all(right, 4 << 20)
    link.cut()
    with pytest.raises(ConnectionResetError):
        while right.recv(1 << 20):
            pass
    assert isinstance(sending.exception(WAIT_S), (ConnectionResetError, BrokenPipeError))


KILLED = """
import os, subprocess, sys
sys.path.insert(0, {root!r})
from bench.netlab import Link
link = Link()
inside = link.popen_in("right", ["sleep", "60"])
print(link._process.pid, inside.pid, flush=True)
sys.stdin.read()
"""


def test_nothing_is_left_when_the_parent_is_killed(make_link):
    make_link()  # skips where there can be none
    parent = subprocess.Popen([sys.executable, "-c", KILLED.format(root=str(ROOT))],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children = [int(word) for word in parent.stdout.readline().split()]
    assert all(alive(pid) for pid in children)
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=WAIT_S)
    end = time.monotonic() + WAIT_S
    while any(alive(pid) for pid in children):
        assert time.monotonic() < end, "the link or a process in it outlives its parent"
        time.sleep(0.02)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(os.geteuid() != 0, reason="drops a capability of root's")
def test_a_machine_that_forbids_namespaces_says_so():
    script = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import bench.netlab as n; n.Link()"
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c",
         script], capture_output=True, text=True, timeout=60)
    assert "LinkUnavailable" in done.stderr and "CLONE_NEWNET" in done.stderr
    assert "CAP_SYS_ADMIN" in done.stderr


def test_a_setting_that_does_not_exist_is_refused(make_link):
    link = make_link(rate_gbit=1)
    with pytest.raises(TypeError, match="bandwidth"):
        link.set(bandwidth=2)
    assert link.settings == Settings(rate_gbit=1)
