"""The benchmark of the prefix-cache pool makes its rows, small."""

import json

import pytest

from bench import prefix_pool


def test_rows_of_all_cases(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"timestamp": n, "input_length": 1600, "output_length": 1,
                                         "hash_ids": [0, 1 + n % 3, 7 + n]}) + "\n"
                             for n in range(9)))
    out = tmp_path / "rows.json"
    assert prefix_pool.main(["--json", str(out), "--trace", str(trace), "--blocks", "2000",
                             "--samples", "5", "--rounds", "1", "--run-blocks", "2",
                             "--folder", str(tmp_path)]) == 0
    rows = json.loads(out.read_text())["rows"]
    cases = [row["case"] for row in rows]
    assert cases.count("pool") == 17 and cases.count("trace") == 18 and cases.count("ssd") == 2
    saved = {row["policy"]: row["prefill_s_saved"] for row in rows if row["case"] == "trace"}
    assert saved["lru"] > 0 and all(row["us_per_block_median"] > 0 for row in rows
                                    if row["case"] == "pool")
    assert not list(tmp_path.rglob("*.kvc")), "the disk is left as it was"


def test_a_malformed_trace_is_named_with_its_line(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 512, "hash_ids": [1]}\n{"input_length": 512}\n')
    with pytest.raises(SystemExit, match="line 2: KeyError: 'hash_ids'"):
        prefix_pool.main(["--cases", "trace", "--trace", str(trace)])
