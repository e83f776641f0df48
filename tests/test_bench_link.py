"""The link benchmark measures what it says, and fails when a byte or a run is wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import link as bench_link  # noqa: E402
from bench.build import BuildError  # noqa: E402
from bench.netlab import Link, LinkUnavailable  # noqa: E402

KEYS = ["case", "system", "codec", "rate_gbit", "rtt_ms", "loss", "goodput_gbit",
        "effective_gbit", "share_of_link", "cache_share_of_link", "verified"]


@pytest.fixture(scope="module")
def laboratory():
    try:
        Link().close()
    except (LinkUnavailable, BuildError) as error:
        pytest.skip(str(error))


def run_link(file, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "bench.link", "--json", str(file), *arguments], cwd=ROOT,
        capture_output=True, text=True, timeout=110)
    return done, json.loads(file.read_text()) if file.exists() else None


def test_rows_have_the_agreed_shape_and_are_verified(laboratory, tmp_path):
    systems = ["kvwire", "bare-p2", *(["iperf3-p1"] if shutil.which("iperf3") else [])]
    done, records = run_link(tmp_path / "rows.json", "--rate", "500mbit", "--rtt", "10ms", "--loss",
                             "0.0001", "--bytes", "16MiB", "--rounds", "2", "--systems",
                             ",".join(systems))
    assert done.returncode == 0, done.stderr
    first, *rows = records
    assert first["machine"]["cores"] >= 1 and first["machine"]["versions"]["kvwire"]
    assert first["link"]["rate_gbit"] == 0.5 and first["link"]["rtt_ms"] == 10
    assert first["link"]["tcp_memory_bytes"] == 64 << 20 and first["link"]["congestion"]
    assert [row["system"] for row in rows] == systems
    for row in rows:
        assert list(row) == KEYS
        assert (row["rate_gbit"], row["rtt_ms"], row["loss"]) == (0.5, 10, 0.0001)
        assert row["verified"] is (None if row["system"].startswith("iperf3") else True)
        assert 0 < row["share_of_link"] <= 1 and row["effective_gbit"] == row["goodput_gbit"]
        assert row["goodput_gbit"] == pytest.approx(row["share_of_link"] * 0.5 * 1448 / 1538, 0.02)
        assert row["system"] in done.stdout


def test_systems_run_in_turn_and_one_that_fails_stops_alone(monkeypatch, capsys):
    ran = []

    class Subject:
        def __init__(self, link, options, system, codec):
            self.codec = codec

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            ran.append(f"{self.codec} closed")

        def run(self, number):
            ran.append(self.codec)
            if self.codec == "broken" and number == 2:
                raise RuntimeError("no more")
            return bench_link.Run(1.0, 2 * 10**9, 10**9, True)

    class Unlimited:
        payload_rate_gbit = None

    monkeypatch.setattr(bench_link, "Bench", Subject)
    options = bench_link.arguments(["--rounds", "3"])
    rows = bench_link.measured(Unlimited(), options, [("kvwire", "a"), ("kvwire", "broken")])
    assert ran == ["a", "broken", "a", "broken", "a", "broken closed", "a closed"]
    assert [(row["effective_gbit"], row["verified"]) for row in rows] == [(16, True), (None, False)]
    assert "no more" in capsys.readouterr().err


def test_effective_rate_counts_cache_bytes_and_goodput_those_on_the_wire():
    class OneGigabit:
        payload_rate_gbit = 0.8

    runs = [bench_link.Run(seconds, 1_000_000_000, 500_000_000, True) for seconds in (9, 10, 20)]
    row = bench_link.row(OneGigabit, bench_link.arguments([]), "kvwire", "lz4", runs)
    assert (row["effective_gbit"], row["goodput_gbit"]) == (0.8, 0.4)
    assert (row["share_of_link"], row["cache_share_of_link"]) == (0.5, 1.0)
    assert row["codec"] == "lz4" and row["verified"] is True


def test_kvwire_runs_once_with_each_codec(laboratory, tmp_path):
    done, (_, *rows) = run_link(tmp_path / "rows.json", "--rtt", "1ms", "--bytes", "4MiB",
                                "--rounds", "1", "--systems", "kvwire,bare-p1", "--codec",
                                "raw,tiered")
    assert done.returncode == 0, done.stderr
    assert [(row["system"], row["codec"]) for row in rows] == [
        ("kvwire", "raw"), ("kvwire", "tiered"), ("bare-p1", "raw")]
    assert all(row["codec"] in done.stdout and row["verified"] is True for row in rows)


@pytest.mark.parametrize("system", ["kvwire", "bare-p1"])
def test_a_wrong_byte_fails_the_run_and_its_system_gets_no_figure(laboratory, tmp_path, system):
    done, (_, row) = run_link(tmp_path / "rows.json", "--rtt", "1ms", "--bytes", "4MiB",
                              "--systems", system, "--corrupt", system)
    assert done.returncode == 1
    assert row["verified"] is False and row["goodput_gbit"] is row["share_of_link"] is None
    assert "is wrong" in done.stderr and "WRONG BYTES" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="drops a capability of root's")
def test_without_namespaces_it_says_what_is_missing(tmp_path):
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-m",
         "bench.link", "--systems", "kvwire"], cwd=ROOT, capture_output=True, text=True,
        timeout=60)
    assert done.returncode == 2 and "CAP_SYS_ADMIN" in done.stderr


@pytest.mark.long
def test_a_blackholed_lane_is_reported_with_the_time_to_recover(laboratory, tmp_path):
    done, (_, row) = run_link(tmp_path / "rows.json", "--case", "blackhole", "--rate", "200mbit",
                              "--rtt", "10ms", "--bytes", "192MiB")
    assert done.returncode == 0, done.stderr
    assert list(row) == [*KEYS, "recovered_s"]
    assert row["case"] == "blackhole" and row["verified"] is True
    assert "back after" in done.stdout


@pytest.mark.parametrize("wrong", [["--rate", "1"], ["--rtt", "40"], ["--bytes", "1GB"],
                                   ["--systems", "carrier-pigeon"], ["--systems", "bare-p0"]])
def test_what_is_not_understood_is_refused(wrong):
    with pytest.raises(SystemExit) as refused:
        bench_link.arguments(wrong)
    assert refused.value.code == 2


def test_quantities_are_read_in_their_units():
    given = bench_link.arguments(["--rate", "1.5gbit", "--rtt", "250us", "--bytes", "64MiB"])
    assert (given.rate, given.rtt, given.bytes) == (1.5, 0.25, 64 << 20)
    assert bench_link.arguments([]).bytes == 1 << 30


def samples(*rates, interval_s=0.1):
    """Return (seconds, bytes so far) of a transfer at these rates, one an interval."""
    taken, moved = [(0.0, 0)], 0
    for number, rate in enumerate(rates, 1):
        moved += round(rate * interval_s)
        taken.append((number * interval_s, moved))
    return taken


@pytest.mark.parametrize("dip, expected", [([], 0.0), ([0] * 7, 0.7), ([950] * 5, 0.0),
                                           ([0] * 3 + [1000] * 2 + [0] * 4, 0.9)])
def test_recovery_is_when_the_rate_is_back_for_good(dip, expected):
    taken = samples(*[1000] * 20, *dip, *[1000] * 20)
    assert bench_link.recovery_s(taken, 2.0) == pytest.approx(expected, abs=0.05)


def test_recovery_without_an_end_is_none():
    assert bench_link.recovery_s(samples(*[1000] * 20, *[500] * 30), 2.0) is None
