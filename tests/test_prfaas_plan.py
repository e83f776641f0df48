"""`kvwire plan`: deployment files, what it prints and writes, and its complaints."""

import json
import re
from pathlib import Path

import pytest

from kvwire import cli
from kvwire.errors import UsageError
from kvwire.prfaas import deployment as deployments
from kvwire.prfaas.lengths import Empirical, TruncatedLognormal, WithPrefixHits
from kvwire.prfaas.throughput import solve

EXAMPLE = Path(__file__).parent.parent / "examples" / "prfaas-case-study.toml"
TRACE = "".join(json.dumps({"timestamp": 0, "input_length": tokens, "output_length": 5,
                            "hash_ids": hashes}) + "\n"
                for tokens, hashes in ((1500, [1, 2, 3]), (1600, [1, 2, 4]), (1024, [1, 2])))


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(tmp_path, text):
    path = tmp_path / "deployment.toml"
    path.write_text(text)
    return path


def changed(tmp_path, old, new):
    text = EXAMPLE.read_text()
    assert len(re.findall(f"^{re.escape(old)}", text, re.M)) >= 1, old
    return write(tmp_path, re.sub(f"^{re.escape(old)}", lambda _: new, text, count=1,
                                  flags=re.M))


def test_the_example_is_the_papers_case_study(capsys):
    code, out, err = run(capsys, "plan", EXAMPLE)
    assert (code, err) == (0, "")
    assert "4 remote prefill, 3 local prefill, 5 decode" in out
    plan = solve(deployments.load(EXAMPLE))
    assert plan.lambda_max_rps == pytest.approx(3.24, rel=0.03)
    assert plan.threshold_tokens == pytest.approx(19_400, rel=0.03)
    assert f"{plan.threshold_tokens:,.0f} uncached tokens" in out


def test_the_plan_as_json(capsys, tmp_path):
    code, _, _ = run(capsys, "plan", EXAMPLE, "--json", tmp_path / "plan.json")
    held = json.loads((tmp_path / "plan.json").read_text())
    plan = solve(deployments.load(EXAMPLE))
    assert code == 0 and held["plan"]["lambda_max_rps"] == plan.lambda_max_rps
    assert held["plan"]["bound_by"] == list(plan.bound_by)
    assert held["all_local"]["threshold_tokens"] is None  # infinite
    assert held["all_local"]["lambda_max_rps"] < plan.lambda_max_rps


def test_the_plot_is_a_png(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, _ = run(capsys, "plan", EXAMPLE, "--plot", tmp_path / "plan.png")
    assert code == 0 and (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "plan", EXAMPLE, "--plot", tmp_path / "no" / "plan.png")
    assert code == 2 and "cannot write" in err


LOCAL_ONLY = """\
output_tokens = 512
[model]
kv_bytes_per_token = 1000
[lengths]
kind = "trace"
file = "trace.jsonl"
[local]
nodes = 2
prefill_points = [[1000, 0.1], [2000, 0.3]]
batch_max = 8
decode_step_ms = 20
"""


def test_a_local_cluster_alone_with_a_trace(capsys, tmp_path):
    (tmp_path / "trace.jsonl").write_text(TRACE)
    path = write(tmp_path, LOCAL_ONLY)
    code, out, err = run(capsys, "plan", path)
    assert (code, err) == (0, "")
    assert "nothing is offloaded" in out and "remote" not in out.partition("tokens")[2]
    loaded = deployments.load(path)
    assert loaded.name == "deployment" and loaded.lengths.mean() == pytest.approx(4124 / 3)
    code, _, err = run(capsys, "plan", path, "--plot", tmp_path / "plan.png")
    assert code == 2 and "no remote cluster" in err


def test_trace_lengths_after_an_unbounded_prefix_cache(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(TRACE + "\n")
    cold, warm = deployments.trace_lengths(path), deployments.trace_lengths(path, cached=True)
    assert cold.grid()[0].tolist() == [1024, 1500, 1600]
    lengths, cached = warm.grid()
    assert lengths.tolist() == [1, 1600 - 1024, 1500]  # the last one finds all but a token
    assert cached.tolist() == [1023, 1024, 0]


def test_options_reach_the_deployment(tmp_path):
    text = EXAMPLE.read_text().replace("gbps = 100", "gbps = 10\nshare = 0.5\nrtt_ms = 40\n"
                                       "in_flight_mib = 8")
    text = text.replace("nodes = 8", "nodes = 8\nprefill_nodes = 2").replace(
        "output_tokens = 1024", "output_tokens = 1024\nthreshold_tokens = 30_000")
    text += "[wire]\nkv_ratio = 1.5\n[prefix_hits]\nhit_share = 0.5\ncached_share = 0.8\n"
    loaded = deployments.load(write(tmp_path, text))
    assert loaded.link.goodput_gbps == pytest.approx(8 * 2**20 * 8e-9 / 0.04)
    assert (loaded.wire.kv_ratio, loaded.wire.state_ratio) == (1.5, 1.0)
    assert isinstance(loaded.lengths, WithPrefixHits)
    assert isinstance(loaded.lengths.prompts, TruncatedLognormal)
    plan = solve(loaded)
    assert (plan.prefill_nodes, plan.threshold_tokens) == (2, 30_000)


def test_a_preset_takes_other_dtypes(tmp_path):
    loaded = deployments.load(changed(tmp_path, 'preset = "prfaas-1t"',
                                      'preset = "prfaas-1t"\nstate_dtype = "bf16"'))
    usual = deployments.load(EXAMPLE)
    assert loaded.local.profile.state_bytes < 0.6 * usual.local.profile.state_bytes


# ---- complaints: file, line, field

@pytest.mark.parametrize("old, new, field, words", [
    ("gbps = 100", "gbps = ", None, "is no TOML"),
    ("gbps = 100", 'gbps = "fast"', "link.gbps", "wanted is a number"),
    ("gbps = 100", "gbps = nan", "link.gbps", "wanted is a number"),
    ("gbps = 100", "gbps = true", "link.gbps", "wanted is a number"),
    ("gbps = 100", "gbps = 1" + 400 * "0", "link.gbps", "wanted is a number up to 1e+15"),
    ("gbps = 100", "gbps = 1e-320", "link.gbps", "wanted is a number up to"),
    ("gbps = 100", "gbps = 0", "link", "gbps is 0"),
    ("gbps = 100", "gpbs = 100", "link", "gbps is missing"),
    ("gbps = 100", "gbps = 100\nlanes = 4", "link.lanes", "not known here"),
    ("nodes = 4", "nodes = 4.5", "remote.nodes", "wanted is an integer"),
    ("nodes = 4", "nodes = 0", "remote", "nodes are 0"),
    ("nodes = 4", "nodes = 10_001", "remote", "nodes are 10001; wanted are 1 to 10,000"),
    ("nodes = 4", "nodes = 1" + 400 * "0", "remote.nodes", "wanted is an integer up to"),
    ('preset = "prfaas-1t"', 'preset = "gpt-9"', "model.preset", "'gpt-9'; wanted is one of"),
    ('preset = "prfaas-1t"', 'preset = "prfaas-1t"\nkv_dtype = "x"', "model", "'x'"),
    ('kind = "lognormal"', 'kind = "uniform"', "lengths.kind", "lognormal, trace"),
    ("sigma = 1.00", "sigma = -1", "lengths", "sigma is -1"),
    ("sigma = 1.00", "sigma = 1_000", "lengths", "0 < sigma <= 20"),
    ("low = 128", "low = 1_000_000", "lengths", "low < high"),
    ("output_tokens = 1024", "output_tokens = 0", "the file", "output_tokens are 0"),
    ("output_tokens = 1024", "output_tokens = 1024\nspeed = 1", "speed", "not known here"),
    ("[link]", "[lnk]", "remote", "belong together"),
    ("[model]", "[models]", "the file", "model is missing"),
    ("batch_max = 20", "batch_max = -1", "local", "batch_max is -1"),
    ("prefill_points = [[1024, 0.44]", "prefill_points = [[1024]", "remote.prefill_points",
     "entry 1 is"),
    ("prefill_points = [[1024, 0.44]", 'prefill_points = [[1024, "x"]', "remote.prefill_points",
     "entry 1 is"),
    ("prefill_points = [[1024, 0.44], [8192, 0.72], [32768, 1.84], [131072, 7.40]]",
     "prefill_points = 3", "remote.prefill_points", "wanted is [[tokens, seconds]"),
    ("prefill_points = [[1024, 0.44]", "prefill_points = [[1024, nan]", "remote.prefill_points",
     "entry 1 is"),
    ("prefill_points = [[1024, 0.44]", "prefill_points = [[9024, 0.44]", "remote",
     "must rise"),
])
def test_complaints_name_line_and_field(capsys, tmp_path, old, new, field, words):
    path = changed(tmp_path, old, new)
    code, out, err = run(capsys, "plan", path)
    assert (code, out) == (2, "")
    line = re.match(rf"kvwire: {re.escape(str(path))}:(\d+): ", err)
    assert line and words in err, err
    if field is None:
        assert path.read_text().splitlines()[int(line[1]) - 1] == new
        return
    assert f": {field}: " in err
    shown = path.read_text().splitlines()[int(line[1]) - 1]
    if field not in ("the file", "link"):
        assert field.split(".")[-1] in shown, (shown, err)


@pytest.mark.parametrize("value", ["1" + 5000 * "0", 5000 * "["], ids=["digits", "nesting"])
def test_what_the_parser_cannot_bear_is_no_toml(capsys, tmp_path, value):
    path = changed(tmp_path, "output_tokens = 1024", f"output_tokens = {value}")
    code, _, err = run(capsys, "plan", path)
    assert code == 2 and err.startswith(f"kvwire: {path}:") and "is no TOML" in err


def test_a_missing_table_is_named(capsys, tmp_path):
    path = write(tmp_path, LOCAL_ONLY.partition("[local]")[0])
    code, _, err = run(capsys, "plan", path)
    assert code == 2 and "local is missing" in err
    path.write_text("model = 3\n")
    code, _, err = run(capsys, "plan", path)
    assert code == 2 and f"{path}:1: model: is 3; wanted is a table" in err


def test_files_that_cannot_be_read(capsys, tmp_path):
    code, _, err = run(capsys, "plan", tmp_path / "none.toml")
    assert code == 1 and "none.toml" in err
    (tmp_path / "bytes.toml").write_bytes(b"name = '\xff'")
    code, _, err = run(capsys, "plan", tmp_path / "bytes.toml")
    assert code == 2 and "is no UTF-8" in err
    code, _, err = run(capsys, "plan", write(tmp_path, LOCAL_ONLY))
    assert code == 1 and "trace.jsonl" in err


@pytest.mark.parametrize("line, words", [
    ("{", "is no JSON"), ("[1]", "is list"), ("{}", "input_length: is None"),
    ('{"input_length": true}', "input_length: is True"),
    ('{"input_length": -4}', "input_length: is -4"),
    ('{"input_length": 1' + 400 * "0" + "}", "input_length: is 1000"),
    ('{"input_length": 1' + 5000 * "0" + "}", "is no JSON"),
    ('{"input_length": 4, "hash_ids": "x"}', "hash_ids: is x"),
    ('{"input_length": 4, "hash_ids": [[]]}', "hash_ids: is"),
])
def test_a_malformed_trace_names_line_and_field(capsys, tmp_path, line, words):
    (tmp_path / "trace.jsonl").write_text(TRACE + line + "\n")
    path = write(tmp_path, LOCAL_ONLY.replace('file = "trace.jsonl"',
                                              'file = "trace.jsonl"\nprefix_cache = "unbounded"'))
    code, _, err = run(capsys, "plan", path)
    assert code == 2 and f"trace.jsonl:4: {words}" in err


def test_an_empty_trace_is_refused(tmp_path):
    (tmp_path / "trace.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no request"):
        deployments.load(write(tmp_path, LOCAL_ONLY))


def test_hits_are_either_assumed_or_the_traces_own(tmp_path):
    (tmp_path / "trace.jsonl").write_text(TRACE)
    text = LOCAL_ONLY.replace('"trace.jsonl"', '"trace.jsonl"\nprefix_cache = "unbounded"')
    assert isinstance(deployments.load(write(tmp_path, text)).lengths, Empirical)
    text += "[prefix_hits]\nhit_share = 1\ncached_share = 0.5\n"
    with pytest.raises(UsageError, match="not both"):
        deployments.load(write(tmp_path, text))


def test_an_infinite_threshold_is_printed_as_what_it_is(tmp_path, capsys):
    path = changed(tmp_path, "output_tokens = 1024",
                   "output_tokens = 1024\nthreshold_tokens = 10_000_000")
    code, out, _ = run(capsys, "plan", path)
    assert code == 0 and "nothing is offloaded" in out
    assert solve(deployments.load(path)).offloaded_share == 0


# ---- the package's README

README = EXAMPLE.parent.parent / "kvwire" / "prfaas" / "README.md"


def test_the_readmes_snippet_runs(monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(EXAMPLE.parent.parent)
    exec(compile(snippet, str(README), "exec"), {})


def test_the_readme_names_every_module():
    text = README.read_text()
    for path in README.parent.iterdir():
        name = path.name if path.is_dir() else path.stem
        if path.suffix == ".py" and not name.startswith("_"):
            assert f"`{name}`" in text, name
