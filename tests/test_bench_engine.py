"""bench.engine: rows and table from what engines answer. It runs in test_vllm_serving.py."""

import json
import sys

import pytest

from bench import engine
from bench.engine_pair import SYSTEMS, EngineFailed

MS = 1_000_000
TOKENS = [5, 6, 7, 8, 9]


def answers(tokens=TOKENS, finish="length"):
    """What two engines say of a hand-off of 1,000 bytes of attention and 200 of states."""
    sent = {"marks": {"saved_ns": 50 * MS, "arrived_bytes": 800, "state_bytes": 200}}
    got = {"tokens": tokens, "finish": finish, "first_ns": 60 * MS, "last_ns": 100 * MS,
           "marks": {"received_ns": 53 * MS},
           "totals": {"decode_cache_bytes": 1200, "decode_wire_bytes": 900}}
    return 10 * MS, sent, got


def test_a_run_is_what_the_two_engines_say():
    run = engine.split_run(*answers())
    assert run.ttft_ms == 50 and run.decode_tokens_per_s == 100 and run.handoff_ms == 3
    assert (run.cache_bytes, run.wire_bytes) == (1200, 900)
    assert run.rest_bytes == 300  # 400 of the cache, as they travel
    assert run.left_share == 0.8
    alone = engine.unsplit_run({"tokens": TOKENS, "began_ns": 20 * MS, "first_ns": 60 * MS,
                                "last_ns": 100 * MS})
    assert alone.ttft_ms == 40 and alone.handoff_ms is None and alone.cache_bytes is None


def test_a_request_that_ended_otherwise_is_no_run():
    with pytest.raises(EngineFailed, match="'error'"):
        engine.split_run(*answers(finish="error"))


def test_other_connectors_say_less():
    asked, sent, got = answers()
    run = engine.split_run(asked, sent | {"marks": {}}, got | {"marks": {}, "totals": {}})
    assert run.ttft_ms == 50 and run.wire_bytes is None and run.left_share is None


def test_the_row_has_medians_and_a_goal():
    runs = [engine.Run(tuple(TOKENS), ttft, 10.0, 4_000_000, 3_000_000, 7.0, 1_250_000.0, 0.9)
            for ttft in (50.0, 40.0, 90.0)]
    row = engine.row("llama", "kvwire", "loopback", 257, 1, runs, TOKENS, goodput_gbit=1.0)
    assert row["identical"] and row["ttft_ms"] == 50 and row["rounds"] == 3
    assert row["handoff_goal_ms"] == 13  # 1.3 times 10 Mbit at 1 Gbit/s
    few = engine.row("llama", "kvwire", "far", 257, 1, [engine.split_run(*answers())], TOKENS,
                     goodput_gbit=1.0, rtt_ms=20.0)
    assert few["handoff_goal_ms"] == 25
    fields = {"model", "system", "prompt_tokens", "link", "ttft_ms", "decode_tokens_per_s",
              "wire_bytes", "cache_bytes", "identical"}
    assert fields <= set(row)
    assert engine.exit_status([row, few]) == 0


@pytest.mark.parametrize("runs", [
    [engine.split_run(*answers()), engine.split_run(*answers([5, 6, 7, 8, 0]))], []])
def test_other_tokens_or_none_give_no_figure(runs):
    row = engine.row("llama", "kvwire", "loopback", 257, 1, runs, TOKENS, goodput_gbit=1.0)
    assert row["identical"] is False
    assert all(row[name] is None for name in ("ttft_ms", "decode_tokens_per_s", "wire_bytes",
                                              "cache_bytes", "handoff_ms", "handoff_goal_ms",
                                              "left_share"))
    assert engine.exit_status([row]) == 1
    assert "OTHER TOKENS" in engine.table([row]) and engine.exit_status([]) == 1


def test_overhead_is_of_rounds_that_stood_beside_each_other(tmp_path):
    """A machine that slows down between rounds does not count."""
    rounds = {"none": [{"step_ms": ms, "connector_ms": 0.0} for ms in (100.0, 200.0, 400.0)],
              "idle": [{"step_ms": ms, "connector_ms": 0.1} for ms in (101.0, 202.0, 404.0)]}
    rows = engine.overhead_rows("llama", "prefill", rounds)
    assert [row["overhead"] for row in rows] == [0.0, 0.01] and rows[1]["step_ms"] == 202
    row = engine.row("llama", "unsplit", None, 257, 1, [engine.split_run(*answers())], TOKENS)
    lines = engine.table([row, *rows]).splitlines()
    assert "1.00 %" in lines[-1] and "50.0" in lines[1]
    engine.write(tmp_path / "new" / "rows.json", {"machine": {}}, [row, *rows])
    assert json.loads((tmp_path / "new" / "rows.json").read_text())[1:] == [row, *rows]


def test_every_system_has_both_sides():
    addresses = {"prefill": "10.0.0.1", "decode": "10.0.0.2"}
    for system in SYSTEMS.values():
        for side in addresses:
            assert system.transfer(side, addresses)["kv_connector"]
            assert all(isinstance(value, str)
                       for value in system.environment(side, addresses).values())


@pytest.mark.parametrize("wrong", [
    ["--prompts", "256"], ["--models", "gpt"], ["--links", "moon"], ["--rounds", "0"],
    ["--engine-python", "/no/such/python"]])
def test_wrong_calls_say_what_is_wrong(wrong, capsys):
    given = ["--engine-python", sys.executable, *wrong]
    with pytest.raises(SystemExit) as caught:
        engine.main(given)
    assert caught.value.code == 2 and "error:" in capsys.readouterr().err
