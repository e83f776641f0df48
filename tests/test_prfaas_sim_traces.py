"""Traces: what a file may hold, what is said of a bad one, and those that are made by rule."""

import json

import numpy as np
import pytest

from kvwire.errors import UsageError
from kvwire.prfaas.lengths import TruncatedLognormal
from kvwire.prfaas.simulator import generator
from kvwire.prfaas.simulator.traces import BLOCK_TOKENS, Trace, read_trace, write_trace

GOOD = {"timestamp": 1500, "input_length": 1100, "output_length": 7, "hash_ids": [0, 1, 5]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows))
    return path


def test_a_trace_reads_as_it_is_written(tmp_path):
    path = write(tmp_path / "trace.jsonl", GOOD, "", GOOD | {"timestamp": 2500.5, "more": 1})
    trace = read_trace(path)
    assert len(trace) == 2 and trace.arrival_s.tolist() == [1.5, 2.5005]
    assert trace.hashes(1) == [0, 1, 5] and trace.input_tokens.tolist() == [1100, 1100]
    assert len(trace.keys(0)) == 2, "the last block is not full"
    made = generator.session_trace(generator.CONVERSATION, 200, 3.0, 1)
    write_trace(made, path)
    again = read_trace(path)
    for name in ("arrival_s", "input_tokens", "output_tokens", "hash_ids", "hash_starts"):
        assert np.array_equal(getattr(again, name), getattr(made, name)), name


@pytest.mark.parametrize("change, field, shown", [
    ({"timestamp": None}, "timestamp", "None"), ({"timestamp": -1}, "timestamp", "-1"),
    ({"timestamp": True}, "timestamp", "True"), ({"timestamp": 1e300}, "timestamp", "1e"),
    ({"timestamp": 1499}, "timestamp", "1500"), ({"input_length": 0}, "input_length", "0"),
    ({"input_length": 1.5}, "input_length", "1.5"), ({"input_length": "9"}, "input_length", "'9'"),
    ({"input_length": 1 << 40}, "input_length", "1099"),
    ({"output_length": 0}, "output_length", "0"), ({"output_length": []}, "output_length", "[]"),
    ({"hash_ids": None}, "hash_ids", "None"), ({"hash_ids": [0, 1]}, "hash_ids", "expected 3"),
    ({"hash_ids": [0, 1, -2]}, "hash_ids[2]", "-2"),
    ({"hash_ids": [0, "a", 2]}, "hash_ids[1]", "a"),
    ({"hash_ids": [1, 0, 5]}, "hash_ids[0]", "1"), ({"hash_ids": [0, 5, 6]}, "hash_ids[1]", "5"),
])
def test_a_bad_field_is_named_with_its_line(tmp_path, change, field, shown):
    path = write(tmp_path / "bad.jsonl", GOOD, GOOD | change)
    with pytest.raises(UsageError) as caught:
        read_trace(path)
    text = str(caught.value)
    assert "bad.jsonl: line 2" in text and field in text and shown in text


@pytest.mark.parametrize("field", GOOD)
def test_a_missing_field_is_named(tmp_path, field):
    bad = {name: value for name, value in GOOD.items() if name != field}
    with pytest.raises(UsageError, match=f"line 1: the field {field} is missing"):
        read_trace(write(tmp_path / "bad.jsonl", bad))


@pytest.mark.parametrize("line", ["{", "[1, 2]", "7", "nonsense", '{"timestamp": NaN}',
                                  "[" * 100_000])
def test_a_line_that_is_no_request_is_refused(tmp_path, line):
    with pytest.raises(UsageError, match="line 2"):
        read_trace(write(tmp_path / "bad.jsonl", GOOD, line))


def test_bytes_that_are_no_text_and_an_empty_file_are_refused(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match="line 1: no JSON"):
        read_trace(path)
    path.write_bytes(b"\n\n")
    with pytest.raises(UsageError, match="no request"):
        read_trace(path)
    with pytest.raises(OSError):
        read_trace(tmp_path / "absent")


def test_a_trace_changes_its_rate_its_length_and_its_blocks():
    trace = generator.session_trace(generator.CONVERSATION, 300, 3.0, 1)
    faster = trace.at_rate(9.0)
    assert (len(faster) - 1) / faster.duration_s == pytest.approx(9.0)
    head = trace.head(50)
    assert len(head) == 50 and head.hashes(49) == trace.hashes(49)
    coarse = trace.coarser(4)
    assert coarse.block_tokens == 4 * BLOCK_TOKENS
    for index in (0, 17, 123):
        full = int(trace.input_tokens[index]) // BLOCK_TOKENS
        assert coarse.hashes(index) == trace.hashes(index)[:full][3::4]
        assert len(coarse.keys(index)) == full // 4
    with pytest.raises(UsageError, match="one instant"):
        Trace(np.zeros(3), np.ones(3, int), np.ones(3, int)).at_rate(1.0)


def test_batches_that_a_recorder_made_are_spread_within_their_instant():
    trace = generator.session_trace(generator.CONVERSATION, 500, 3.4, 1)
    spread = trace.spread(7)
    step_s = generator.CONVERSATION.instant_s
    assert trace.statistics().arrivals_per_instant > 3
    assert spread.statistics().arrivals_per_instant == 1
    assert np.all(np.diff(spread.arrival_s) >= 0)
    assert np.array_equal(np.floor(spread.arrival_s / step_s) * step_s, trace.arrival_s)


# ---- made by rule

MOONCAKE = {"rate_rps": 3.40, "arrivals_per_instant": 10.2, "input_tokens_mean": 12_035,
            "input_tokens_p50": 6909, "input_tokens_p90": 27_367, "output_tokens_mean": 343,
            "reused_block_share": 0.366, "reused_request_share": 0.387}
"""Statistics of the Mooncake conversation trace (FAST'25)."""


def test_conversations_have_the_statistics_of_the_trace_they_were_fitted_to():
    found = [generator.session_trace(generator.CONVERSATION, 12_000, 3.4, seed).statistics()
             for seed in (1, 2, 3)]
    for name, expected in MOONCAKE.items():
        mean = np.mean([getattr(statistics, name) for statistics in found])
        assert mean == pytest.approx(expected, rel=0.12), name
    assert all(100_000 < statistics.input_tokens_max <= 1 << 17 for statistics in found)


def test_agents_append_little_to_long_prefixes():
    trace = generator.session_trace(generator.AGENTIC, 3000, 3.0, 1)
    found = trace.statistics()
    assert found.reused_block_share > 0.9 and found.input_tokens_p50 > 60_000
    assert found.input_tokens_max <= generator.AGENTIC.tokens_max


@pytest.mark.parametrize("model", [generator.CONVERSATION, generator.AGENTIC])
def test_equal_hash_ids_stand_for_equal_prefixes(model):
    trace = generator.session_trace(model, 300, 3.0, 4)
    before: dict[int, tuple[int, int]] = {}
    for index in range(len(trace)):
        hashes = trace.hashes(index)
        assert len(hashes) == -(-int(trace.input_tokens[index]) // BLOCK_TOKENS)
        for depth, pair in enumerate(zip(hashes, [-1, *hashes])):
            assert before.setdefault(pair[0], (depth, pair[1])) == (depth, pair[1])


def test_generators_depend_on_the_seed_alone():
    def made(seed):
        cold = generator.cold_trace(TruncatedLognormal(9.9, 1, 128, 131_072), 200, 2.0, seed)
        session = generator.session_trace(generator.CONVERSATION, 200, 2.0, seed)
        return [cold.arrival_s.tolist(), cold.input_tokens.tolist(), session.arrival_s.tolist(),
                session.hash_ids.tolist()]

    assert made(3) == made(3) and made(3) != made(4)


def test_cold_requests_have_the_lengths_and_the_rate_asked_for():
    lengths = TruncatedLognormal(9.9, 1, 128, 131_072)
    trace = generator.cold_trace(lengths, 20_000, 2.5, 1, output_tokens=64)
    assert trace.input_tokens.mean() == pytest.approx(lengths.mean(), rel=0.03)
    assert len(trace) / trace.arrival_s[-1] == pytest.approx(2.5, rel=0.03)
    assert set(trace.output_tokens) == {64} and trace.hashes(5) == trace.keys(5) == []


def test_bursts_keep_the_mean_and_have_the_rate_asked_for():
    trace = generator.cold_trace(TruncatedLognormal(9.9, 1, 128, 131_072), 20_000, 2.0, 1)
    burst = generator.with_bursts(trace, every_s=100, burst_s=10, factor=5)
    assert burst.arrival_s[-1] == pytest.approx(trace.arrival_s[-1], rel=0.02)
    inside = np.mean(burst.arrival_s % 100 >= 90)
    assert inside == pytest.approx(0.5, abs=0.03)
    for bad in ((100, 10, 11), (100, 0, 2), (100, 100, 0.5)):
        with pytest.raises(UsageError, match="bursts"):
            generator.with_bursts(trace, *bad)


def test_a_slow_start_slows_the_first_requests_alone():
    trace = generator.cold_trace(TruncatedLognormal(9.9, 1, 128, 131_072), 1000, 2.0, 1)
    slow = generator.with_slow_start(trace, 0.5, 3.0)
    steps, slower = np.diff(trace.arrival_s), np.diff(slow.arrival_s)
    assert slower[:400] == pytest.approx(3 * steps[:400])
    assert slower[600:] == pytest.approx(steps[600:])
    with pytest.raises(UsageError):
        generator.with_slow_start(trace, 1.0, 2.0)


def test_what_cannot_be_made_or_written_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be made"):
        generator.session_trace(generator.AGENTIC, 0, 3.0, 1)
    with pytest.raises(UsageError, match="blocks of 512"):
        write_trace(generator.session_trace(generator.CONVERSATION, 20, 3.0, 1).coarser(2),
                    tmp_path / "trace.jsonl")
