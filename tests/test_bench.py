"""The benchmark measures what it says: tiny runs of it, and the check it stands on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import loopback, measure, workloads  # noqa: E402

TINY = ["--quick", "--shrink", "64"]
THROUGHPUT_KEYS = ["case", "system", "gbps_median", "gbps_min", "gbps_max", "runs",
                   "cpu_s_per_gib", "verified"]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")


def run_loopback(*arguments):
    return subprocess.run([sys.executable, "-m", "bench.loopback", *TINY, *arguments], cwd=ROOT,
                          capture_output=True, text=True, timeout=300)


@needs_compiler
def test_rows_have_the_agreed_shape_and_are_verified(tmp_path):
    cases = ["blocks-4k", "kimi-linear-32k"]
    done = run_loopback("--cases", ",".join(cases), "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    first, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert first["machine"]["cores"] >= 1 and first["machine"]["versions"]["kvwire"]
    speeds = [row for row in rows if "gbps_median" in row]
    memory = [row for row in rows if "rss_mib_per_connection" in row]
    assert [row["case"] for row in memory] == cases and len(speeds) + len(memory) == len(rows)
    for case in cases:
        systems = {row["system"]: row for row in speeds if row["case"] == case}
        assert {"memcpy", "bare-p1", "bare-p2", "kvwire", "kvwire-p1"} <= set(systems)
        assert ("iperf3-p1" in systems) == (shutil.which("iperf3") is not None)
    for row in speeds:
        assert list(row) == THROUGHPUT_KEYS and row["runs"] == loopback.QUICK_ROUNDS
        assert 0 < row["gbps_min"] <= row["gbps_median"] <= row["gbps_max"]
        assert row["verified"] is (None if row["system"].startswith("iperf3") else True)
        assert row["case"] in done.stdout and row["system"] in done.stdout


@needs_compiler
@pytest.mark.long
def test_round_trips_are_measured_from_python_and_from_cpp(tmp_path):
    done = run_loopback("--cases", "roundtrip-4k", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stderr
    _, *rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["system"] for row in rows] == ["kvwire", "kvwire-cpp", "bare-p1"]
    assert all(0 < row["p50_us"] <= row["p99_us"] for row in rows)


@needs_compiler
@pytest.mark.parametrize("system", ["kvwire", "bare-p2"])
def test_a_wrong_byte_fails_the_run_and_its_system_gets_no_figure(tmp_path, system):
    done = run_loopback("--cases", "blocks-64k", "--corrupt", system,
                        "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 1
    _, *rows = json.loads((tmp_path / "rows.json").read_text())
    speeds = {row["system"]: row for row in rows if "gbps_median" in row}
    assert speeds[system]["verified"] is False and speeds[system]["gbps_median"] is None
    assert speeds["memcpy"]["verified"] is True
    assert "is wrong" in done.stderr and "WRONG BYTES" in done.stdout


@pytest.mark.parametrize("case", workloads.CASES)
def test_moves_cover_the_payload_that_kvwire_is_given(case):
    workload = workloads.make(case, shrink=64)
    pools = [workloads.random_pool(workload.pool_bytes) for _ in range(2)]
    assert workload.memory(pools[0], writable=False).bytes == workload.payload_bytes
    assert workload.memory(pools[1], writable=True).bytes == workload.payload_bytes
    ends = workload.moves[:, :2] + workload.moves[:, 2:]
    assert workload.moves.min() >= 0 and ends.max() <= workload.pool_bytes
    places = workload.moves[np.argsort(workload.moves[:, 1])]
    assert (places[:-1, 1] + places[:-1, 2] <= places[1:, 1]).all()  # no byte is written twice


def test_full_sizes_are_those_of_the_case_names():
    for case in ("contiguous-256m", "blocks-64k", "blocks-4k"):
        assert workloads.make(case).payload_bytes == 256 << 20
    assert len(workloads.make("blocks-64k").moves) == 4096
    assert len(workloads.make("blocks-4k").moves) == 65536


def delivered(workload):
    source, destination, expected = (workloads.random_pool(workload.pool_bytes) for _ in range(3))
    workloads.stamp(source, run=7)
    destination.fill(workloads.POISON)
    for start, place, count in workload.moves.tolist():
        destination[place:place + count] = source[start:start + count]
    workloads.expect(expected, source, workload.moves)
    return expected, destination


def test_verification_accepts_what_was_delivered():
    assert workloads.first_difference(*delivered(workloads.make("kimi-linear-32k", 64))) is None


@pytest.mark.parametrize("bit", range(8))
def test_verification_finds_a_flipped_bit_wherever_it_is(bit):
    workload = workloads.make("blocks-4k", shrink=64)
    expected, destination = delivered(workload)
    for offset in (0, 4095 + bit, workload.pool_bytes // 2 + 3, workload.pool_bytes - 1):
        destination[offset] ^= 1 << bit
        assert workloads.first_difference(expected, destination) == offset
        destination[offset] ^= 1 << bit


def test_every_run_changes_every_page_of_the_source():
    pool = workloads.random_pool(1 << 20)
    workloads.stamp(pool, 1)
    before = pool.copy()
    workloads.stamp(pool, 2)
    changed = (pool != before).reshape(-1, workloads.PAGE_BYTES).any(axis=1)
    assert changed.all()


def test_rounds_alternate_and_the_warm_up_is_not_counted():
    called = []

    def system(name):
        def run(number):
            called.append((name, number))
            return measure.Sample(1.0, 0.5, 10**9, True)
        return run

    series = measure.alternate("case", {name: system(name) for name in "ab"}, rounds=2)
    assert [name for name, _ in called] == list("ababab")
    assert len({number for _, number in called}) == 6
    assert [one.row()["runs"] for one in series] == [2, 2]
    assert series[0].row()["gbps_median"] == 1.0


def test_percentile_is_the_value_that_so_many_do_not_exceed():
    assert measure.percentile(range(1, 101), 50) == 50
    assert measure.percentile(range(1, 101), 99) == 99
    assert measure.percentile([5], 99) == 5
