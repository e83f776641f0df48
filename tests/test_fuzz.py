"""Fuzzing: a short run of every target finds nothing, what was found once stays fixed, and the
machinery counts what it says."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from test_sanitized import missing_tool

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import fuzz, fuzz_files  # noqa: E402
from kvwire.errors import KvwireError  # noqa: E402
from kvwire.manifest import Manifest  # noqa: E402

BUILD_SECONDS_MAX = 900
RUN_SECONDS = 18


@pytest.mark.long
@pytest.mark.timeout(2 * BUILD_SECONDS_MAX)
def test_a_short_run_finds_nothing(tmp_path):
    compiler = os.environ.get("FUZZ_CXX", "clang++")
    if missing := missing_tool(tmp_path, "fuzzer-no-link,address,undefined", compiler):
        pytest.skip(f"needs {missing}")
    built = subprocess.run(["make", "--no-print-directory", "fuzz-targets"], cwd=ROOT,
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    totals = tmp_path / "totals.json"
    done = subprocess.run([sys.executable, "-m", "bench.fuzz", "--seconds", str(RUN_SECONDS),
                           "--json", str(totals)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(totals.read_text())["targets"]
    assert set(rows) == {*fuzz.TARGETS, fuzz.FILES}
    assert all(row["executions"] > 0 and row["findings"] == [] for row in rows.values())


def test_every_target_has_its_source():
    assert {path.name for path in (ROOT / "csrc" / "fuzz").glob("*_fuzz.cpp")} == {
        f"{name}_fuzz.cpp" for name in fuzz.TARGETS}


def test_the_golden_vectors_seed_every_parser():
    vector = (ROOT / "tests" / "vectors" / "valid" / "lz4.bin").read_bytes()
    inputs = {}
    for target, data in fuzz.seeds(vector):
        inputs.setdefault(target, []).append(data)
    assert set(inputs) == {"greeting", "frames", "control", "manifest", "codec"}
    assert Manifest.decode(inputs["manifest"][0][1:]).spec.groups
    assert [data[0] for data in inputs["control"]][:2] == [1, 3]  # MANIFEST, SEGMENT


def test_damaged_files_are_read_or_refused():
    executions, findings = fuzz_files.run(seconds=3, seed=random.randrange(1 << 32))
    assert executions > 0 and findings == []


def test_damage_gets_past_the_checksums(tmp_path):
    choose, codes = random.Random(7), set()
    for number in range(400):
        path = tmp_path / "cache"
        path.write_bytes(fuzz_files.damaged(fuzz_files.sources()[0], choose))
        try:
            fuzz_files.load(path)
        except KvwireError as error:
            codes.add(error.code.name)
    assert {"FILE_NOT_COMMITTED", "FILE_INDEX_CORRUPT", "SEGMENT_INVALID"} <= codes
    assert len(codes) >= 8


def test_a_reader_that_breaks_is_a_finding(monkeypatch, tmp_path):
    def broken(path):
        raise IndexError("out of range")

    monkeypatch.setattr(fuzz_files, "load", broken)
    monkeypatch.setattr(fuzz_files, "FINDINGS", tmp_path)
    executions, (finding,) = fuzz_files.run(seconds=5, seed=1)
    assert executions == 1 and "IndexError: out of range" in finding
    assert (tmp_path / finding.split()[0]).stat().st_size > 0


def test_totals_add_up_from_run_to_run(tmp_path):
    path = tmp_path / "totals.json"
    fuzz.Totals(path).add("send", fuzz.Turn(100, 2.0, []))
    fuzz.Totals(path).add("send", fuzz.Turn(11, 1.0, ["send-crash-1"]))
    fuzz.Totals(path).add("file", fuzz.Turn(5, 1.0, []))
    totals = json.loads(path.read_text())
    assert totals["executions"] == 116 and totals["commit"]
    assert totals["targets"]["send"] == {
        "executions": 111, "seconds": 3.0, "findings": ["send-crash-1"]}
