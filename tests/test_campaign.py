"""The fault campaign finds nothing wrong with kvwire, and finds what is made wrong on purpose."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench.campaign.cargo import POISON, Cargo  # noqa: E402
from bench.campaign.plan import FAMILIES, make_plan  # noqa: E402
from bench.campaign.verdict import judge  # noqa: E402


def campaign(path, *arguments, timeout_s=100):
    done = subprocess.run([sys.executable, "-m", "bench.faults", *map(str, arguments),
                           "--json", str(path / "faults.json")], cwd=ROOT, capture_output=True,
                          text=True, timeout=timeout_s)
    assert (path / "faults.json").exists(), done.stderr
    return done, json.loads((path / "faults.json").read_text())


def check(done, report, count):
    assert done.returncode == 0 and report["violations"] == [], done.stderr
    assert report["runs"] == count == report["delivered"] + report["failed_typed"]
    assert 0 < report["repaired"] < report["delivered"] < count
    assert report["harmed"] > count // 2 and "LINK_LOST" in report["codes"]


def test_runs_side_by_side_keep_the_invariant(tmp_path):
    check(*campaign(tmp_path, "--seed", 21_600, "--count", 200), 200)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_five_hundred_runs_keep_the_invariant(tmp_path):
    check(*campaign(tmp_path, "--seed", 30_000, "--count", 500, timeout_s=200), 500)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_large_runs_keep_the_invariant(tmp_path):
    done, report = campaign(tmp_path, "--large", "--seed", 1, "--count", 20, timeout_s=200)
    assert done.returncode == 0 and report["violations"] == [], done.stderr
    assert report["runs"] == 20 and report["delivered"] > 0


@pytest.mark.long
@pytest.mark.timeout(300)
def test_ten_thousand_transfers_and_a_thousand_at_once_leave_nothing_behind(tmp_path):
    done, report = campaign(tmp_path, "--endurance", "--count", 10_000, timeout_s=280)
    assert done.returncode == 0 and report["violations"] == [], done.stderr
    assert len(report["census"]) == 11 and report["concurrent"] == 1000


@pytest.mark.parametrize("sabotage, complaint", [
    ("wrong byte", "bytes are wrong"),
    ("late write", "wrote to memory it had given back"),
    ("leak", "fds"),
])
def test_what_is_made_wrong_is_found(tmp_path, sabotage, complaint):
    done, report = campaign(tmp_path, "--seed", 1, "--count", 3, "--sabotage", sabotage)
    assert done.returncode == 1 and report["violations"]
    assert any(complaint in " ".join(each["complaints"]) for each in report["violations"])
    assert complaint in done.stderr


def test_a_seed_is_one_run_and_the_families_are_all_met():
    plans = [make_plan(seed) for seed in range(3000)]
    assert [make_plan(plan.seed) for plan in plans] == plans
    assert {plan.name for plan in plans} == {
        name for name, (weight, _) in FAMILIES.items()}
    assert {harm.kind for plan in plans for harm in plan.harms} == {
        "flip", "drop", "repeat", "invent", "stall", "blackhole", "cut", "cut_near", "cut_far",
        "finish", "half_close", "repeat_frame", "move_frame", "drop_frame"}
    assert {plan.misfortune.kind for plan in plans if plan.misfortune} == {
        "cancel", "close", "kill", "stop", "memory", "files", "full", "damage"}
    assert make_plan(5, large=True).cargoes[0].held(True).memory.bytes >= 64 << 20


@pytest.mark.parametrize("state", ["ready", "partly written", "unwritten"])
def test_every_byte_of_a_destination_is_accounted_for(state):
    cargo = Cargo(seed=3, layers=2, tokens=21, heads=2, head_dim=8)
    held = cargo.held(writable=True)
    reports = dict.fromkeys(cargo.all_layers, state)
    assert held.is_all(POISON) and (held.wrong(reports) is None) == (state != "ready")
    if state == "ready":
        for key, array in held._arrays.items():
            held._place(array, cargo.content(*key))
        assert held.wrong(reports) is None
    for array in held._arrays.values():
        unused = np.setdiff1d(np.arange(len(array)), held._blocks)[0] if array.ndim == 4 else 0
        if array.ndim == 4 or state != "partly written":
            array[unused].view(np.uint8).flat[0] ^= 1
            assert "1 of" in held.wrong(reports)
            array[unused].view(np.uint8).flat[0] ^= 1


GOOD = {"error": None, "code": "", "typed": False, "took_s": 0.1, "hangs": False, "wrong": None,
        "repaired": 0, "late_s": 0.0}
TYPED = GOOD | {"error": "LinkLost", "code": "LINK_LOST", "typed": True}
UNTYPED = GOOD | {"error": "ValueError", "code": "", "typed": False}


@pytest.mark.parametrize("sent, got, complaint", [
    (GOOD, GOOD, None),
    (TYPED, TYPED, None),
    (TYPED, GOOD, None),  # the last receipt was lost
    (GOOD, TYPED, "the sender believes"),
    (UNTYPED, TYPED, "an error that no run"),
    (TYPED, GOOD | {"hangs": True}, "has not ended"),
    (TYPED | {"took_s": 60}, TYPED, "ended after"),
    (TYPED | {"took_s": 60, "late_s": 40}, TYPED, None),  # the machine was busy
    (GOOD, GOOD | {"wrong": "byte 3"}, "byte 3"),
])
def test_the_verdict(sent, got, complaint):
    plan = make_plan(1)
    verdict = judge(plan, [sent], [got])
    if complaint is None:
        assert not verdict.complaints and verdict.delivered == (got is GOOD)
    else:
        assert len(verdict.complaints) == 1 and complaint in verdict.complaints[0]
    plan.must_deliver = True
    assert bool(judge(plan, [TYPED], [TYPED]).complaints)
