"""The long-term scheduler: re-solved thresholds, conversions with hysteresis."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from kvwire.errors import UsageError
from kvwire.prfaas.conversion import ConversionSettings, LengthWindow, Planner, StageSignals
from kvwire.prfaas.lengths import TruncatedLognormal, WithPrefixHits
from kvwire.prfaas.profiles import ModelProfile
from kvwire.prfaas.throughput import Deployment, Link, LocalCluster, PrefillCluster, solve

FAST = ModelProfile("fast", 17_280, 182_353_920,
                    ((1024, 0.44), (8192, 0.72), (32768, 1.84), (131072, 7.40)))
LOCAL = LocalCluster(8, FAST.slower("slow", 2.9, 1.6), batch_max=20, decode_step_s=0.025)
LENGTHS = TruncatedLognormal(9.90, 1.00, 128, 131_072)
SHORT = TruncatedLognormal(8.0, 1.00, 128, 131_072)
PREFILL_BOUND, DECODE_BOUND = StageSignals(0.98, 0.5), StageSignals(0.4, 0.98)
IDLE = StageSignals(0.3, 0.3)


def deployment(lengths=LENGTHS, **local):
    return Deployment("d", lengths, 1024, replace(LOCAL, **local), PrefillCluster(4, FAST),
                      Link(100))


def planner(planned_for, seen, settings=ConversionSettings(), count=2000):
    planned = deployment(planned_for)
    made = Planner(planned, solve(planned), settings)
    lengths, cached = seen.grid(count)
    for pair in zip(lengths, cached):
        made.note(*pair)
    return made


def revise(made, signals, windows, start_s=0.0, window_s=300.0):
    """The revisions of some windows in a row."""
    found = (made.revise(start_s + number * window_s, signals) for number in range(windows))
    return [revision for revision in found if revision is not None]


def test_what_was_planned_for_needs_no_revision():
    assert revise(planner(LENGTHS, LENGTHS), PREFILL_BOUND, 20) == []


def test_a_few_requests_change_nothing():
    assert revise(planner(LENGTHS, SHORT, count=50), DECODE_BOUND, 20) == []


def test_short_requests_turn_prefill_nodes_into_decode_nodes_one_at_a_time():
    made = planner(LENGTHS, SHORT)
    goal = solve(deployment(SHORT)).prefill_nodes
    assert made.plan.prefill_nodes > goal
    revisions = revise(made, DECODE_BOUND, 100)
    steps = [revision.convert for revision in revisions if revision.convert]
    assert steps and set(steps) == {-1} and made.plan.prefill_nodes >= goal
    assert all("prefill to decode" in revision.why for revision in revisions if revision.convert)
    rates = [revision.plan.lambda_max_rps for revision in revisions if revision.convert]
    assert rates == sorted(rates)


def test_a_conversion_waits_for_agreeing_windows_and_for_the_one_before():
    settings = ConversionSettings(windows=3, cooldown_s=1800)
    made = planner(SHORT, LENGTHS, settings)
    at = [number * 300.0 for number in range(40)
          if (revision := made.revise(number * 300.0, PREFILL_BOUND)) and revision.convert]
    assert at[0] == 600.0
    assert all(later - earlier >= 1800 for earlier, later in zip(at, at[1:]))


def test_one_disagreeing_window_begins_the_count_anew():
    made = planner(SHORT, LENGTHS, ConversionSettings(windows=3))
    converted = [made.revise(300.0 * number, signals) for number, signals in enumerate(
        [PREFILL_BOUND, PREFILL_BOUND, IDLE, PREFILL_BOUND, PREFILL_BOUND])]
    assert not any(revision and revision.convert for revision in converted)
    assert made.revise(1500.0, PREFILL_BOUND).convert == 1


@pytest.mark.parametrize("signals", [IDLE, DECODE_BOUND], ids=["idle", "other-stage"])
def test_the_model_alone_converts_nothing(signals):
    """It says that prefill wants a node; the stages' own load does not."""
    assert not any(revision.convert for revision in revise(planner(SHORT, LENGTHS), signals, 20))


def test_a_load_that_changes_sides_does_not_make_nodes_thrash():
    """Every half hour the other kind of request: each conversion is worth it when it is made, and
    there are no more than the cooldown lets through."""
    planned = deployment(LENGTHS)
    made = Planner(planned, solve(planned), window=LengthWindow(500))
    converted = 0
    for number in range(96):                     # eight hours of five minutes
        lengths = SHORT if number // 6 % 2 else LENGTHS
        for tokens in lengths.grid(500)[0]:
            made.note(tokens)
        revision = made.revise(300.0 * number, DECODE_BOUND if number // 6 % 2 else PREFILL_BOUND)
        converted += bool(revision and revision.convert)
    assert converted <= 8 * 3600 / 1800


def test_the_threshold_follows_the_lengths_after_prefix_hits():
    hits = WithPrefixHits(LENGTHS, 0.8, 0.9)
    made = planner(LENGTHS, hits)
    before = made.plan.threshold_tokens
    (revision,) = revise(made, IDLE, 5)
    assert revision.convert == 0 and "threshold" in revision.why
    assert revision.plan.threshold_tokens < before / 1.5
    expected = solve(replace(deployment(hits), local=replace(
        LOCAL, prefill_nodes=made.plan.prefill_nodes)))
    assert revision.plan.threshold_tokens == pytest.approx(expected.threshold_tokens, rel=0.05)


def test_a_small_change_of_threshold_is_not_announced():
    close = TruncatedLognormal(9.90, 1.01, 128, 131_072)
    assert revise(planner(LENGTHS, close), IDLE, 5) == []


def test_what_the_operator_fixed_stays():
    fixed = deployment(SHORT, prefill_nodes=4)
    made = Planner(fixed, solve(fixed))
    for tokens in LENGTHS.grid(1000)[0]:
        made.note(tokens)
    assert all(revision.convert == 0 and revision.plan.prefill_nodes == 4
               for revision in revise(made, PREFILL_BOUND, 20))


def test_the_window_forgets_the_oldest():
    window = LengthWindow(100)
    for tokens in range(1, 251):
        window.add(tokens, 2 * tokens)
    lengths, cached = window.distribution().grid()
    assert lengths.tolist() == list(range(151, 251)) and (cached == 2 * lengths).all()
    with pytest.raises(UsageError, match="count_max"):
        LengthWindow(0)
    with pytest.raises(UsageError, match="at least one"):
        LengthWindow().distribution()


def test_threads_may_fill_the_window():
    window = LengthWindow(10_000)
    threads = [threading.Thread(target=lambda: [window.add(1) for _ in range(2_000)])
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(window) == 8_000 and np.all(window.distribution().grid()[0] == 1)
