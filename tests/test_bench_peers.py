"""The peers of the benchmark deliver what they are given, and one that cannot is left out."""

import json
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import loopback, measure, peers, sides, workloads  # noqa: E402
from bench.build import BuildError  # noqa: E402
from bench.netlab import Link, LinkUnavailable  # noqa: E402

SHRINK = 64
INSTALLED = [name for name in peers.PEERS if peers.absent(name) is None]


@pytest.fixture(params=peers.PEERS)
def peer(request):
    if reason := peers.absent(request.param):
        pytest.skip(reason)
    return request.param


def run_loopback(*arguments):
    return subprocess.run([sys.executable, "-m", "bench.loopback", "--quick", "--rounds", "1",
                           "--shrink", str(SHRINK), *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=300)


def test_sockets_and_gloo_are_always_there():
    pytest.importorskip("torch")
    assert {"sockets", "gloo"} <= set(INSTALLED)


@pytest.mark.parametrize("case", ["blocks-4k", "kimi-linear-32k"])
def test_every_run_delivers_every_byte_and_no_other(peer, case):
    with sides.PeerPair(peer, case, SHRINK) as pair:
        for run in (1, 2):
            received, sent = pair.together("receive_peer", "send_peer", run)
            assert pair.receiving.call("verify") is None
            assert received[0] > sent[0] and received[1] > 0 and sent[1] > 0


def test_a_trip_has_delivered_its_page_when_it_returns(peer):
    page = workloads.PAGE_BYTES
    with sides.PeerPair(peer, "roundtrip-4k", SHRINK, page) as pair:
        _, times = pair.together("answer_peer", "trip_peer", 1)
        assert len(times) == workloads.make("roundtrip-4k", SHRINK).tokens and min(times) > 0
        assert pair.receiving.call("verify") is None


def test_rows_stand_beside_the_others(tmp_path):
    done = run_loopback("--cases", "blocks-64k", "--peers", "sockets,gloo",
                        "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    first, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert "torch" in first["machine"]["versions"]
    by_system = {row["system"]: row for row in rows if "gbps_median" in row}
    for name in ("sockets", "gloo"):
        assert list(by_system[name]) == list(by_system["kvwire"])
        assert by_system[name]["verified"] is True and by_system[name]["gbps_median"] > 0


def test_peers_run_over_a_link_between_two_namespaces(tmp_path):
    try:
        Link().close()
    except (LinkUnavailable, BuildError) as error:
        pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, "-m", "bench.link", "--rate", "500mbit", "--rtt", "10ms", "--bytes",
         "16MiB", "--systems", ",".join(INSTALLED), "--json", str(tmp_path / "rows.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["system"] for row in rows] == INSTALLED
    for row in rows:
        assert row["verified"] is True and 0 < row["share_of_link"] <= 1


def test_a_wrong_byte_of_a_peer_is_found(tmp_path):
    done = run_loopback("--cases", "blocks-64k", "--peers", "sockets", "--corrupt", "sockets")
    assert done.returncode == 1
    assert "sockets: destination byte" in done.stderr and "WRONG BYTES" in done.stdout


def test_names_are_checked():
    done = run_loopback("--peers", "sockets,carrier-pigeon")
    assert done.returncode == 2 and "unknown peers: carrier-pigeon" in done.stderr


def test_without_the_option_no_peer_runs():
    assert loopback.arguments([]).peers == []
    assert loopback.arguments(["--peers"]).peers == list(peers.PEERS)
    assert loopback.arguments(["--peers", "zmq,gloo"]).peers == ["zmq", "gloo"]


def test_a_missing_peer_is_named_and_left_out(monkeypatch, capsys):
    nowhere = peers.Peer("no_such_module", None, object, object)
    monkeypatch.setitem(peers.PEERS, "zmq", nowhere)
    assert peers.installed(["zmq", "sockets"]) == ["sockets"]
    assert "zmq is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("side", ["sending", "receiving"])
def test_a_peer_whose_process_dies_is_unable_and_says_so(side):
    with sides.PeerPair("sockets", "blocks-64k", SHRINK) as pair:
        getattr(pair, side).kill()
        with pytest.raises(measure.Unable, match="exit code -9"):
            pair.together("receive_peer", "send_peer", 1)


def test_who_is_unable_has_no_row_and_the_others_go_on(capsys):
    def unable(run):
        raise measure.Unable("the queue is full")

    def able(run):
        return measure.Sample(1.0, 0.5, 10**9, True)

    series = measure.alternate("case", {"a": able, "b": unable, "c": able}, rounds=2)
    assert [(one.system, len(one.samples)) for one in series] == [("a", 2), ("c", 2)]
    assert capsys.readouterr().err.count("b: no row in case: the queue is full") == 1


def test_a_call_that_does_less_than_asked_is_continued():
    rng = np.random.default_rng(5)
    sizes = rng.integers(1, 3000, 2500)
    data = rng.integers(0, 256, sizes.sum(), np.uint8)
    got = np.zeros_like(data)
    ranges = [[memoryview(each) for each in np.split(array, sizes.cumsum()[:-1])]
              for array in (data, got)]
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(10)  # makes sendmsg return when the buffer is full
        sender = threading.Thread(target=peers._move, args=(ranges[0], here.sendmsg))
        sender.start()
        peers._move(ranges[1], lambda batch: there.recvmsg_into(batch)[0])
        sender.join()
        assert (got == data).all()
        here.close()
        with pytest.raises(ConnectionError, match="bytes before the end"):
            peers._move(ranges[1], lambda batch: there.recvmsg_into(batch)[0])


def test_moves_are_cut_into_pieces_that_cover_the_same_bytes():
    moves = np.array([[100, 5000, 24], [0, 9000, 8], [40, 7000, 16]])
    pieces = workloads.cut(moves, 8)
    assert pieces.tolist() == [[100, 5000, 8], [108, 5008, 8], [116, 5016, 8], [0, 9000, 8],
                               [40, 7000, 8], [48, 7008, 8]]


def test_an_interface_is_found_by_its_address():
    assert peers._interface("127.0.0.1") == "lo"
    with pytest.raises(RuntimeError, match=re.escape("192.0.2.1")):
        peers._interface("192.0.2.1")


def test_what_is_installed_is_what_the_requirements_pin():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "bench" / "requirements-peers.txt")
                           .read_text(), re.MULTILINE))
    packages = {peer.package for peer in peers.PEERS.values()}
    assert set(pins) - packages == {"nixl-cu12"}
    pinned = {name: peer for name, peer in peers.PEERS.items()
              if peer.package in pins and name in INSTALLED}
    if not pinned:
        pytest.skip("no pinned peer is installed: make peers")
    for package, version in peers.versions(list(pinned)).items():
        assert version == pins[package]
