"""`kvwire simulate`: requests through a deployment, policies side by side."""

import json
from pathlib import Path

import pytest

from kvwire.cli import main
from kvwire.prfaas.simulator import comparison, generator
from kvwire.prfaas.simulator.traces import write_trace

EXAMPLE = Path(__file__).parent.parent / "examples" / "prfaas-case-study.toml"


def run(capsys, *arguments):
    code = main(["simulate", *map(str, arguments)])
    return code, *capsys.readouterr()


def local_only(tmp_path):
    text = EXAMPLE.read_text("utf-8")
    start, stop = text.index("[remote]"), text.index("[local]")
    path = tmp_path / "local.toml"
    path.write_text(text[:start] + text[stop:], "utf-8")
    return path


def test_prompts_of_the_files_lengths_meet_every_policy(capsys, tmp_path):
    out = tmp_path / "figures.json"
    code, text, errors = run(capsys, EXAMPLE, "--requests", 600, "--json", out)
    assert code == 0 and not errors and "600 requests" in text
    rows = json.loads(out.read_text())
    assert list(rows) == ["all local", "published", "kvwire"]
    assert all(name in text for name in rows)
    assert rows["all local"]["remote_share"] == 0 < rows["published"]["remote_share"]
    assert rows["kvwire"]["ttft_p90_s"] < rows["all local"]["ttft_p90_s"]
    assert run(capsys, EXAMPLE, "--requests", 600)[1] == text, "a run is a function of its inputs"
    assert run(capsys, EXAMPLE, "--requests", 600, "--seed", 2)[1] != text


def test_a_trace_with_pools_finds_its_prefixes(capsys, tmp_path):
    path, out = tmp_path / "trace.jsonl", tmp_path / "figures.json"
    write_trace(generator.session_trace(generator.CONVERSATION, 500, 2.0, 1), path)
    code, text, _ = run(capsys, EXAMPLE, "--trace", path, "--pool-gb", 2000, "--json", out)
    rows = json.loads(out.read_text())
    assert code == 0 and all(row["cached_share"] > 0.05 for row in rows.values())
    assert run(capsys, EXAMPLE, "--trace", path, "--rate", 1, "--json", out)[0] == 0
    slow = json.loads(out.read_text())
    assert slow["kvwire"]["offered_rps"] < 1.5 and slow["kvwire"]["cached_share"] == 0


def test_a_local_cluster_alone_has_one_policy(capsys, tmp_path):
    code, text, _ = run(capsys, local_only(tmp_path), "--requests", 200)
    assert code == 0 and "all local" in text and "kvwire" not in text


def test_conversions_are_told(capsys, tmp_path):
    """A split that is wrong for the requests is put right, and the table says when."""
    split = tmp_path / "split.toml"
    text = EXAMPLE.read_text("utf-8").replace("# prefill_nodes = 3", "prefill_nodes = 6")
    split.write_text(text.replace("mu = 9.90", "mu = 8.50"), "utf-8")
    code, text, _ = run(capsys, split, "--requests", 12_000, "--rate", 2.2, "--conversion-s", 30)
    assert code == 0 and "a node from prefill to decode" in text


@pytest.mark.parametrize(("arguments", "says"), [
    (["--requests", "99"], "99 requests are asked for; wanted are 100"),
    (["--requests", "-5"], "-5 requests are asked for"),
    (["--requests", "1000000000000"], "wanted are 100 to 10,000,000"),
    (["--rate", "0"], "rate is 0 requests/s"),
    (["--rate", "1e300"], "at most 1e+06"),
    (["--rate", "1e-9"], "at most 1e+07 s of both"),
    (["--pool-gb", "1e300"], "--pool-gb is 1e+300"),
    (["--seed", "-1"], "--seed is -1"),
    (["--rate", "nan"], "rate is nan"),
    (["--pool-gb", "-1"], "--pool-gb is -1"),
    (["--conversion-s", "inf"], "--conversion-s is inf"),
    (["--trace", "nowhere.jsonl"], "nowhere.jsonl"),
])
def test_what_cannot_be_simulated_is_said(capsys, arguments, says):
    code, _, errors = run(capsys, EXAMPLE, *arguments)
    assert code in (1, 2) and says in errors and errors.count("\n") == 1


@pytest.mark.parametrize("change", [("7.40]]", "1e14]]"), ("gbps = 100", "gbps = 1e-9")])
def test_a_request_that_would_take_years_is_refused(capsys, tmp_path, change):
    path = tmp_path / "slow.toml"
    path.write_text(EXAMPLE.read_text("utf-8").replace(*change), "utf-8")
    code, _, errors = run(capsys, path, "--requests", 200)
    assert code == 2 and "one alone may take" in errors


def test_a_negative_count_is_not_counted_from_the_end_of_a_trace(capsys, tmp_path):
    path = tmp_path / "trace.jsonl"
    write_trace(generator.session_trace(generator.CONVERSATION, 200, 3.4, 4), path)
    code, _, errors = run(capsys, EXAMPLE, "--trace", path, "--requests", -5)
    assert code == 2 and "-5 requests are asked for" in errors


def test_a_malformed_trace_names_line_and_field(capsys, tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 1, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n'
                    '{"timestamp": 2, "input_length": "x", "output_length": 1, "hash_ids": []}\n')
    code, _, errors = run(capsys, EXAMPLE, "--trace", path)
    assert code == 2 and f"{path}: line 2: input_length" in errors
