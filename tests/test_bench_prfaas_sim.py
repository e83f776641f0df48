"""bench.prfaas_sim: rows of every part, table 6's times, and what is said of a bad call."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import prfaas_sim, prfaas_sim_cases  # noqa: E402
from bench.prfaas_tables import fit_case_study  # noqa: E402
from kvwire.errors import UsageError  # noqa: E402
from kvwire.prfaas.simulator import generator, plots  # noqa: E402
from kvwire.prfaas.simulator.traces import write_trace  # noqa: E402
from kvwire.prfaas.throughput import Link  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None,
                                      reason="matplotlib is missing")


def run(tmp_path, *arguments):
    path = tmp_path / "rows.json"
    code = prfaas_sim.main([*arguments, "--json", str(path)])
    rows = json.loads(path.read_text()) if path.exists() else []
    return code, rows


def test_every_part_has_rows_and_a_trace_is_compared_with_a_generated_one(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    write_trace(generator.session_trace(generator.CONVERSATION, 300, 3.4, 9), path)
    code, (head, *rows) = run(tmp_path, "--trace", str(path), "--requests", "200", "--parts",
                              "closed-form,table-6,policies,faults")
    assert code == 0 and head["machine"]["cores"] >= 1 and head["seed"] == 1
    parts = {row["part"] for row in rows}
    assert parts == {"closed form", "table 6", "trace", "policies", "faults"}
    assert [row["source"] for row in rows if row["part"] == "trace"] == ["given", "generated"]
    assert [row["policy"] for row in rows if row["part"] == "policies"] == [
        "homogeneous", "naive", "published", "published, static", "kvwire"]
    for row in rows:
        if row["part"] == "faults":
            assert row["leaks"] == []
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == len(rows)


def test_table_6s_times_are_within_fifteen_percent_of_the_paper():
    found = list(prfaas_sim.table_6_ttft(fit_case_study()))
    assert len(found) == 6 and {row for _, row, *_ in found} == {"mean TTFT s", "P90 TTFT s"}
    for column, row, paper, ours, _ in found:
        assert ours == pytest.approx(paper, rel=0.15), (column, row)
        assert ours != paper


def test_policies_are_compared_at_a_bandwidth():
    traffic = prfaas_sim_cases.cold(fit_case_study(), 400, 1)
    rows = {row["policy"]: row for row in prfaas_sim_cases.beyond(traffic, Link(7.0), steps=3)}
    assert set(rows) == {"published", "published, static", "published, the paper's t", "kvwire"}
    best = max(rows["published"]["bearable_rps"], rows["published, static"]["bearable_rps"])
    assert rows["kvwire"]["over_published"] == pytest.approx(rows["kvwire"]["bearable_rps"] / best,
                                                             rel=1e-3)
    assert "link" in rows["published"]["plan_bound_by"]


def test_rebalancing_is_compared_with_none_on_the_same_requests():
    traffic = prfaas_sim_cases.agentic(fit_case_study(), 400, 1)
    rows = list(prfaas_sim_cases.rebalance(traffic, Link(10.0), steps=1))
    assert [(row["pools"], row["rebalanced"]) for row in rows] == [
        ("one a cluster", False), ("one a node", False), ("one a node", True)]
    assert [row["copies"] > 0 for row in rows] == [False, False, True]
    assert all(row["leaks"] == [] and row["same_rps"] == rows[0]["same_rps"] for row in rows)


@needs_matplotlib
def test_plots_are_png(tmp_path):
    code = prfaas_sim.main(["--requests", "150", "--parts", "policies,faults", "--plots",
                            str(tmp_path / "plots")])
    found = sorted((tmp_path / "plots").iterdir())
    assert code == 0 and len(found) == 1 + len(prfaas_sim_cases.FAULTS)
    assert all(path.read_bytes().startswith(PNG) for path in found)
    plots.plot_rates("t", ["a", "b"], {"x": [1.0, 2.0], "y": [2.0, 0.0]}, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(PNG)
    with pytest.raises(UsageError, match="cannot write"):
        plots.plot_rates("t", ["a"], {"x": [1.0]}, tmp_path / "absent" / "bars.png")


def test_a_bad_trace_is_named_with_line_and_field(tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 0, "hash_ids": [1]}\n')
    code, rows = run(tmp_path, "--trace", str(path))
    assert code == 1 and not rows
    said = capsys.readouterr().err
    assert "bad.jsonl: line 1: output_length is 0" in said and "Traceback" not in said
    assert prfaas_sim.main(["--trace", str(tmp_path / "absent")]) == 1


@pytest.mark.parametrize("arguments", [["--parts", "nonsense"], ["--requests", "3"],
                                       ["--seed", "-1"]])
def test_a_bad_call_is_refused(arguments):
    with pytest.raises(SystemExit) as caught:
        prfaas_sim.main(arguments)
    assert caught.value.code == 2


def test_speed_is_measured_in_a_process_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(prfaas_sim, "SPEED", {"published, no pools": (300, 60),
                                              "kvwire, pools": (300, 120)})
    rows, good = prfaas_sim.speeds(300)
    assert good and [row["case"] for row in rows] == list(prfaas_sim.SPEED)
    for row in rows:
        assert 0 < row["cpu_s"] <= row["seconds_max"] and 0 < row["peak_gib"] < 4
        assert abs(row["requests"] - 300) < 60
