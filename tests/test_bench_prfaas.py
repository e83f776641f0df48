"""bench.prfaas: the paper's tables, the kinds of their figures, the router's timing."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import prfaas, prfaas_tables  # noqa: E402
from bench.prfaas_tables import Row  # noqa: E402
from kvwire.prfaas.throughput import evaluate, solve  # noqa: E402


@pytest.fixture(scope="module")
def tables():
    return prfaas.tables()


def find(rows, table, row, column):
    (found,) = [one for one in rows if (one.table, one.row, one.column) == (table, row, column)]
    return found


def test_every_figure_of_the_tables_is_there(tables):
    rows, _ = tables
    phi = [row for row in rows if row.table == "3" and row.column.startswith("Phi_kv")]
    assert len(phi) == 24 + 1
    assert len([row for row in rows if row.table == "5"]) == 8
    for column, names in (("PrfaaS-PD", ("threshold t, tokens", "N_p", "N_d", "Theta_prfaas",
                                         "Theta_pd-p", "Theta_pd-d", "Lambda_max",
                                         "egress Gbit/s", "Lambda_max over homogeneous")),
                          ("homogeneous PD", ("N_p", "N_d", "Theta_pd-p", "Theta_pd-d",
                                              "Lambda_max")),
                          ("naive heterogeneous PD", ("Theta_prfaas", "Theta_pd-d", "Lambda_max",
                                                      "Lambda_max over homogeneous"))):
        for name in names:
            find(rows, "6", name, column)


def test_predicted_figures_are_within_three_percent_and_the_egress_within_eight(tables):
    rows, _ = tables
    assert prfaas.out_of_bound(rows) == []
    assert 0 < prfaas_tables.worst(rows) <= 0.03
    assert abs(find(rows, "6", "egress Gbit/s", "PrfaaS-PD").rel_error) <= 0.08


def test_table_3_is_fitted_and_says_so(tables):
    rows, inputs = tables
    phi = [row for row in rows if row.table == "3" and row.kind == "fitted"]
    assert len(phi) == 24 and max(abs(row.rel_error) for row in phi) < 0.06
    assert max(abs(row.rel_error) for row in phi) > 0.01  # three terms do not meet four figures
    assert sum(given.fitted_to.startswith("table 3") for given in inputs) == 18


def test_what_was_fitted_comes_out_as_it_was_put_in():
    case = prfaas_tables.fit_case_study()
    assert evaluate(case.remote_prefill, 19_400, 3).theta_prefill_rps == pytest.approx(
        1.64, rel=1e-3)
    assert solve(case.homogeneous).theta_prefill_rps == pytest.approx(2.11, rel=1e-3)


def test_predictions_do_not_depend_on_what_was_fitted():
    """Another H20 changes none of the figures that rest on table 5 alone."""
    case = prfaas_tables.fit_case_study().remote_prefill
    local = case.local
    other = SimpleNamespace(**vars(local)).profile.slower("other", 1.5)
    changed = case.__class__(**{**vars(case), "local": local.__class__(
        **{**vars(local), "profile": other})})
    for threshold in (0, 19_400):
        before, after = (evaluate(one, threshold, 3) for one in (case, changed))
        assert before.theta_prfaas_rps == after.theta_prfaas_rps
        assert before.wire_bytes == after.wire_bytes
        assert before.offloaded_share == after.offloaded_share


def test_a_wrong_prediction_is_an_error(monkeypatch, capsys):
    rows = [Row("6", "Theta", "x", "predicted", 1.0, 1.04), Row("6", "t", "x", "fitted", 1.0, 2.0),
            Row("6", "egress Gbit/s", "x", "rounded", 1.0, 1.09)]
    assert prfaas.out_of_bound(rows) == [rows[0], rows[2]]
    monkeypatch.setattr(prfaas, "tables", lambda simulate: (rows, []))
    assert prfaas.main([]) == 1
    assert "out of bound: Theta x, egress Gbit/s x" in capsys.readouterr().out


def test_the_result_file(tmp_path, capsys):
    path = tmp_path / "prfaas.json"
    assert prfaas.main(["--json", str(path)]) == 0
    head, *rows = json.loads(path.read_text())
    assert head["machine"]["kvwire_commit"] and len(head["inputs"]) == 23
    for row in rows:
        assert row.keys() == {"table", "row", "column", "kind", "paper", "ours", "rel_error",
                              "note"}
        assert row["kind"] in ("predicted", "fitted", "rounded")
        assert row["rel_error"] == pytest.approx(row["ours"] / row["paper"] - 1, abs=2e-3)
    assert "largest error of a predicted figure" in capsys.readouterr().out


def test_times_to_first_token_come_from_the_simulator(monkeypatch):
    found = [("PrfaaS-PD", "mean TTFT s", 2.22, 2.3, "why")]
    module = SimpleNamespace(table_6_ttft=lambda case: found)
    monkeypatch.setattr(prfaas.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(prfaas.importlib, "import_module", lambda name: module)
    rows, _ = prfaas.tables(simulate=True)
    assert rows[-1] == Row("6", "mean TTFT s", "PrfaaS-PD", "simulated", 2.22, 2.3, "why")


def test_the_router_is_timed(tmp_path, capsys):
    path = tmp_path / "router.json"
    assert prfaas.main(["--router", "--blocks", "3000", "--decisions", "50",
                        "--json", str(path)]) == 0
    _, *rows = json.loads(path.read_text())
    assert [(row["rule"], row["sooner"], row["regime"]) for row in rows] == [
        (rule, sooner, regime)
        for rule, sooner in (("published", False), ("priced", False), ("priced", True))
        for regime in ("abundant", "scarce")]
    assert all(row["blocks"] >= 3000 and 0 < row["us_median"] <= row["us_p99"] for row in rows)
    assert capsys.readouterr().out.count("median") == 6


def test_misuse_is_refused(capsys):
    with pytest.raises(SystemExit):
        prfaas.main(["--blocks", "0"])
    assert "at least 1" in capsys.readouterr().err
