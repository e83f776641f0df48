"""The benchmark of the prefix-cache pool makes its rows, small."""

import json

import pytest

from bench import prefix_pool
from kvwire.prfaas.pool.blocks import BlockGeometry


def test_rows_of_all_cases(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps({"timestamp": n, "input_length": 1600, "output_length": 1,
                                         "hash_ids": [0, 1 + n % 3, 7 + n]}) + "\n"
                             for n in range(9)))
    out = tmp_path / "rows.json"
    assert prefix_pool.main(["--json", str(out), "--trace", str(trace), "--blocks", "2000",
                             "--samples", "5", "--rounds", "1", "--run-blocks", "2",
                             "--requests", "60", "--folder", str(tmp_path)]) == 0
    rows = json.loads(out.read_text())["rows"]
    cases = [row["case"] for row in rows]
    assert cases.count("pool") == 17 and cases.count("trace") == 18 and cases.count("ssd") == 2
    assert cases.count("ssd trace") == 18 and cases.count("admission") == 24
    written = {row["rule"]: row["written_gb"] for row in rows
               if row["case"] == "admission" and row["model"] == "prfaas-1t"}
    assert written["all"] >= written["0.25 s/GB"] >= written["2 s/GB"] and written["all"] > 0
    assert written["none"] == 0
    saved = {row["policy"]: row["prefill_s_saved"] for row in rows if row["case"] == "trace"}
    assert saved["lru"] > 0 and all(row["us_per_block_median"] > 0 for row in rows
                                    if row["case"] == "pool")
    assert not list(tmp_path.rglob("*.kvc")), "the disk is left as it was"


def test_a_malformed_trace_is_named_with_its_line(tmp_path):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"input_length": 512, "hash_ids": [1]}\n{"input_length": 512}\n')
    with pytest.raises(SystemExit, match="line 2: KeyError: 'hash_ids'"):
        prefix_pool.main(["--cases", "trace", "--trace", str(trace)])


@pytest.mark.parametrize("state_bytes", [0, 1 << 20])
def test_files_that_save_much_stay_on_ssd_under_the_cost_aware_policy(tmp_path, state_bytes):
    """A prompt that was asked for often stays when it comes less often than files last."""
    often = [(number % 5 and number).to_bytes(16, "little") for number in range(1, 200)]
    rarely = [(number % 15 and number).to_bytes(16, "little") for number in range(200, 2000)]
    saved = {}
    for name, policy in prefix_pool.policies().items():
        geometry = BlockGeometry.of_sizes(prefix_pool.TRACE_TOKENS, 2048, state_bytes)
        capacity = 10 * geometry.block_bytes * (1 + geometry.state_blocks)
        tier = prefix_pool._SsdAccounts(tmp_path / name, bytes(8), geometry, capacity,
                                        policy=policy)
        prefix_pool._replay_ssd(tier, [([prompt], 0) for prompt in often])
        saved[name], _ = prefix_pool._replay_ssd(tier, [([prompt], 0) for prompt in rarely])
        assert tier.stats().file_bytes <= capacity and tier.stats().evicted_runs > 1000
        tier.close()
    assert saved["lru"] <= prefix_pool.TRACE_TOKENS
    assert saved["cost-aware"] > 100 * prefix_pool.TRACE_TOKENS
