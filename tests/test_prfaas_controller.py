"""The short-term scheduler: its loop by its roots, and in a small world of bursts and bad links."""

import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from prfaas_plant import LENGTHS, Plant, case, up  # noqa: E402

from kvwire.errors import UsageError  # noqa: E402
from kvwire.link import CongestionThresholds, LaneStats, LinkStats  # noqa: E402
from kvwire.prfaas.controller import (  # noqa: E402
    Controller, ControllerSettings, LinkSignals, QueueSignals, critical_gain, loop_radius,
)
from kvwire.prfaas.health import Breaker, BreakerSettings, Health  # noqa: E402
from kvwire.prfaas.lengths import Empirical  # noqa: E402
from kvwire.prfaas.profiles import GBPS  # noqa: E402
from kvwire.prfaas.router import Target  # noqa: E402
from kvwire.prfaas.throughput import solve  # noqa: E402


# ---- the argument, in numbers

@pytest.mark.parametrize("smoothing", [0.02, 0.1, 0.3, 1.0])
def test_the_load_loop_is_stable_and_does_not_swing(smoothing):
    gain = ControllerSettings(smoothing=smoothing).load_gain
    assert loop_radius(gain, smoothing) < 1
    discriminant = smoothing**2 - 4 * gain * smoothing
    assert discriminant >= -1e-12  # real roots: no overshoot
    assert loop_radius(1.01, smoothing) > 1 > loop_radius(0.99, smoothing)  # Jury's bound: 1


@pytest.mark.parametrize("delay, wrong_by", [(0, 30), (1, 20), (3, 10), (5, 6), (10, 3)])
def test_the_loop_bears_delays_and_a_wrong_distribution(delay, wrong_by):
    """The byte share answers `wrong_by` times as much as the controller believes, and signals are
    late by `delay` periods (offered load is counted at the decision, so 0 is the rule)."""
    assert loop_radius(wrong_by * ControllerSettings().load_gain, 0.1, delay) < 1


@pytest.mark.parametrize("delay", [0, 1, 2, 5, 9])
def test_the_critical_gain_is_where_swinging_begins(delay):
    def swings(gain):
        roots = np.roots([1.0, -1.0, *np.zeros(delay - 1), gain] if delay else [1.0, gain - 1])
        dominant = roots[np.argmax(np.abs(roots))]
        return abs(dominant.imag) > 1e-3 * abs(dominant) or dominant.real < -1e-9

    assert not swings(0.99 * critical_gain(delay))
    assert swings(1.02 * critical_gain(delay))


# ---- in its world

def crossings(values, middle, margin):
    """How often values go from above middle + margin to below middle - margin, or back."""
    sides = [1 if value > middle + margin else -1 for value in values
             if abs(value - middle) > margin]
    return sum(a != b for a, b in zip(sides, sides[1:]))


def thresholds(steps):
    return np.array([step.state.threshold_tokens for step in steps])


def test_an_idle_link_leaves_the_plan_alone():
    plant = Plant(100, gbps=lambda t: 100, rate=lambda t: 2.5, even=True)
    steps = plant.run(200)
    assert thresholds(steps) == pytest.approx(plant.plan.threshold_tokens, rel=0.15)
    assert all(step.state.retreat == 0 and step.state.abundant for step in steps)


def test_an_overloaded_link_settles_at_its_goal_without_swinging():
    """Demand for the link at the plan's threshold is 1.5 times what it carries."""
    plant = Plant(10, gbps=lambda t: 5, rate=lambda t: 2.4, even=True)
    steps = plant.run(900)
    settled = steps[450:]
    loads = [step.state.load / step.state.goal for step in settled]
    assert np.mean(loads) == pytest.approx(1, abs=0.15)
    retreats = np.array([step.state.retreat for step in settled])
    assert crossings(retreats, retreats.mean(), 0.25) <= 2
    one_s = plant.deployment.prfaas.profile.wire_bytes(131_072) * GBPS / 5
    worst_s = max(step.backlog_bytes for step in settled) * GBPS / 5
    assert worst_s <= 2 * ControllerSettings().backlog_max_s + one_s
    assert sum(step.delivered_bytes for step in settled) * GBPS / 450 > 0.7 * 5


def test_half_the_rate_is_noticed_and_so_is_the_return():
    plant = Plant(10, gbps=lambda t: 5 if 200 <= t < 700 else 10, rate=lambda t: 1.7, even=True)
    steps = plant.run(1400)
    assert steps[650].state.capacity_gbps == pytest.approx(5, rel=0.2)
    assert steps[650].state.retreat > steps[190].state.retreat
    assert steps[-1].state.capacity_gbps > 8.5
    assert steps[-1].state.retreat < steps[650].state.retreat / 2


@pytest.mark.parametrize("seed", [1, 2])
def test_a_burst_does_not_fill_the_link(seed):
    """Ten times the rate for 20 seconds: admission holds the backlog at once, long before the
    threshold has moved, and afterwards all is as before."""
    def rate(t):
        return 15.0 if 100 <= t < 120 else 1.5

    plant = Plant(10, gbps=lambda t: 10, rate=rate, seed=seed)
    steps = plant.run(900)
    settings = ControllerSettings()
    worst_s = max(step.backlog_bytes for step in steps) * GBPS / 10
    one_s = plant.deployment.prfaas.profile.wire_bytes(131_072) * GBPS / 10
    assert worst_s <= settings.backlog_max_s + settings.drain_s + one_s
    assert steps[-1].backlog_bytes * GBPS / 10 < settings.backlog_max_s
    assert thresholds(steps)[-1] == pytest.approx(plant.plan.threshold_tokens, rel=0.6)


def test_a_steady_random_load_does_not_swing():
    plant = Plant(10, gbps=lambda t: 10, rate=lambda t: 2.0, seed=3)
    steps = plant.run(1500)[300:]
    logs = np.log(thresholds(steps))
    # Random arrivals move it; a loop that swings would cross its middle with its own period.
    assert crossings(logs, np.median(logs), 0.5) <= 1500 / 60


def test_losses_that_hold_nothing_up_cost_nothing():
    lossy = Plant(100, gbps=lambda t: 100, rate=lambda t: 2.0, even=True, congested=lambda t: True)
    assert all(step.state.goal > 0.89 for step in lossy.run(100))


def test_losses_with_a_backlog_lower_the_goal():
    clean, lossy = (Plant(10, gbps=lambda t: 4, rate=lambda t: 2.5, even=True,
                          congested=lambda t, lossy=lossy: lossy) for lossy in (False, True))
    means = [np.mean([step.state.goal for step in plant.run(300)[100:]])
             for plant in (clean, lossy)]
    assert means[1] < means[0] - 0.05


def test_a_link_that_is_gone_is_left_at_once_and_taken_again():
    plant = Plant(10, gbps=lambda t: 0 if 100 <= t < 160 else 10, rate=lambda t: 2.0)
    steps = plant.run(500)
    assert all(step.sent == 0 for step in steps[101:160])
    assert sum(step.sent for step in steps[:100]) > 10
    back = next(t for t in range(160, 500) if up(steps[t]))
    assert back < 160 + 60
    # It starts with little and comes back to what it had.
    assert thresholds(steps)[back] > plant.plan.threshold_tokens
    assert sum(step.sent for step in steps[-200:]) > 20
    assert plant.controller._outstanding_bytes < 30e9


def test_a_blackhole_is_found_by_its_silence():
    plant = Plant(10, gbps=lambda t: 0 if t >= 100 else 10, rate=lambda t: 2.5, blackhole=True)
    steps = plant.run(260)
    lost = next(t for t in range(100, 260) if steps[t].state.health is Health.DOWN)
    assert lost <= 100 + ControllerSettings().stall_s + 20
    assert sum(step.sent for step in steps[lost + 1:]) <= 4  # probes
    assert plant.controller._outstanding_bytes == pytest.approx(
        sum(one[2].wire_bytes for one in plant.transfers))


def test_a_flapping_link_is_used_less_and_less():
    plant = Plant(10, gbps=lambda t: 0 if t % 40 >= 20 else 10, rate=lambda t: 2.0)
    steps = plant.run(2400)
    falls = [t for t in range(1, 2400)
             if steps[t].state.health is Health.DOWN and up(steps[t - 1])]
    settings = BreakerSettings()
    bound = math.log2(settings.hold_max_s / settings.hold_s) + 2400 / settings.hold_max_s + 2
    assert 2 <= len(falls) <= bound  # the link itself falls 60 times
    first, second = (sum(falls[i] < 1200 for i in range(len(falls))),
                     sum(falls[i] >= 1200 for i in range(len(falls))))
    assert second <= first


def test_queues_move_the_threshold_towards_the_idle_side():
    deployment = case(100)
    controller = Controller(deployment, solve(deployment))
    planned = controller.observe(1, LinkSignals(1), QueueSignals()).threshold_tokens
    behind_there = controller.observe(2, LinkSignals(1), QueueSignals(remote_s=20))
    behind_here = controller.observe(3, LinkSignals(1), QueueSignals(local_s=20))
    assert behind_here.threshold_tokens < planned < behind_there.threshold_tokens
    assert behind_here.balance == -behind_there.balance
    far = controller.observe(4, LinkSignals(1), QueueSignals(local_s=1e6))
    assert far.balance == -1 and far.threshold_tokens >= planned / 4
    even = controller.observe(5, LinkSignals(1), QueueSignals(30.5, 30))
    assert even.threshold_tokens == planned


@pytest.mark.parametrize("lengths", [[700], [700, 700], [50_000, 50_000, 90_000]])
def test_few_or_equal_lengths_leave_the_plan_as_it_is(lengths):
    """A threshold at the longest of them offloads none, one below them all."""
    deployment = case(10, Empirical(np.array(lengths)))
    for threshold, offloads in ((math.inf, False), (float(max(lengths)), False), (0.0, True)):
        plan = replace(solve(deployment), threshold_tokens=threshold)
        state = Controller(deployment, plan).observe(1, LinkSignals(1), QueueSignals())
        assert (state.threshold_tokens < max(lengths)) == offloads


def test_admission_counts_what_is_promised():
    deployment = case(10)
    controller = Controller(deployment, solve(deployment))
    decision = SimpleNamespace(target=Target.REMOTE, wire_bytes=2e9, queue_s=1.0, prefill_s=5.0)
    promised = 0
    while controller.view(0, (), ()).admit_bytes:
        controller.note(0, decision)
        promised += 1
        assert promised < 100
    # 10 Gbit/s for the 6 s until its bytes are there and 5 s of backlog: 13.75 GB.
    assert promised == 7
    controller.done(1, decision)
    assert controller.view(1, (), ()).admit_bytes
    for _ in range(6):
        controller.done(1, decision, ok=True)
    assert controller._outstanding_bytes == 0


def test_a_new_plan_keeps_what_was_learned_of_the_link():
    plant = Plant(10, gbps=lambda t: 5, rate=lambda t: 2.4, even=True)
    before = plant.run(300)[-1].state
    seen = case(10, Empirical(LENGTHS.sample(np.random.default_rng(1), 2000)))
    plant.controller.replan(seen, solve(seen))
    after = plant.step(300).state
    assert after.capacity_gbps == pytest.approx(before.capacity_gbps, rel=0.1)
    assert after.retreat == pytest.approx(before.retreat, abs=0.1)


# Shrinking forty periods of ten numbers takes minutes and says no more.
@settings(deadline=None, max_examples=30, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.tuples(
    st.floats(0, 200), st.floats(0, 1e12), st.booleans(), st.booleans(), st.floats(0, 1e4),
    st.floats(0, 1e4), st.lists(st.floats(0, 3e9), max_size=4), st.integers(0, 3), st.booleans(),
    st.floats(0.01, 500)), max_size=40))
def test_no_signals_bring_it_out_of_bounds(periods):
    """Whatever the link and the queues say, the threshold stays between a quarter of the plan's
    and the longest length, promises are never negative, and a link that is down takes none."""
    deployment = case(10)
    plan = solve(deployment)
    controller = Controller(deployment, plan)
    now, sent = 0.0, []
    for gbps, backlog, lossy, lanes, remote_s, local_s, sizes, finished, ok, passed_s in periods:
        for size in sizes:
            decision = SimpleNamespace(target=Target.REMOTE, wire_bytes=size, queue_s=remote_s,
                                       prefill_s=2.0)
            controller.note(now, decision)
            sent.append(decision)
        for _ in range(min(finished, len(sent))):
            controller.done(now, sent.pop(0), ok)
        now += passed_s
        state = controller.observe(now, LinkSignals(gbps, backlog, lossy, lanes),
                                   QueueSignals(remote_s, local_s))
        view = controller.view(now, (), ())
        assert plan.threshold_tokens / 4 <= view.threshold_tokens <= 131_072
        assert 0 < state.goal <= 0.9 and 0 < state.capacity_gbps <= 200
        assert abs(state.balance) <= 1 and state.retreat >= 0
        assert view.promised_s >= 0 and math.isfinite(view.backlog_s)
        assert lanes or not view.remote_up


def link_stats(**changes):
    lane = dict.fromkeys((field.name for field in fields(LaneStats)), 0)
    lane |= {"congestion_state": "open", "rtt_ms": 60.0, "rtt_min_ms": 20.0}
    values = dict.fromkeys((field.name for field in fields(LinkStats)), 0)
    values |= {"link": "a", "lanes": (LaneStats(**lane),), "codecs": (), "window_s": 1.0}
    return LinkStats(**values | changes)


def test_link_stats_become_signals():
    """Of two senders on one line, one without lanes; what is waiting shrinks as the codec did."""
    one = link_stats(goodput_gbps=4.0, effective_gbps=6.0, backlog_bytes=3 * 10**9)
    gone = link_stats(lanes=())
    signs = CongestionThresholds().signs(one)
    assert "rtt" in signs
    signals = LinkSignals.of_stats([one, gone], signs)
    assert signals == LinkSignals(4.0, pytest.approx(2e9), True, True)
    assert not LinkSignals.of_stats([gone], CongestionThresholds().signs(gone)).congested
    assert not LinkSignals.of_stats([gone]).up


def test_misuse_is_refused():
    local = case(10)
    controller = Controller(local, solve(local))
    controller.observe(5, LinkSignals(1), QueueSignals())
    with pytest.raises(UsageError, match="time must rise"):
        controller.observe(5, LinkSignals(1), QueueSignals())
    alone = case(10).__class__("alone", LENGTHS, 1024, local.local)
    with pytest.raises(UsageError, match="no link to control"):
        Controller(alone, solve(alone))
    for wrong in ({"smoothing": 0}, {"period_s": -1}, {"abundant_below": 0.9}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            ControllerSettings(**wrong)
    with pytest.raises(UsageError, match="hold_s"):
        BreakerSettings(hold_s=10, hold_max_s=5)


# ---- the breaker

def test_the_breaker_goes_down_on_failures_and_comes_back_by_probes():
    breaker = Breaker(BreakerSettings(failures_max=2, hold_s=5, probes=2))
    breaker.failed(0)
    assert breaker.permits(0)
    breaker.failed(1)
    assert not breaker.permits(1) and not breaker.permits(5.9)
    assert breaker.permits(6) and breaker.health(6) is Health.PROBING
    breaker.sent(6)
    assert not breaker.permits(6)          # one at a time
    breaker.succeeded(7)
    assert breaker.permits(7) and breaker.health(7) is Health.PROBING
    breaker.sent(7)
    breaker.succeeded(8)
    assert breaker.health(8) is Health.UP


def test_a_failed_probe_doubles_the_hold():
    breaker = Breaker(BreakerSettings(hold_s=5, hold_max_s=12))
    breaker.lost(0)
    breaker.found()
    now, holds = 0.0, []
    for _ in range(4):
        began = now
        while not breaker.permits(now):
            now += 0.5
        holds.append(now - began)
        breaker.sent(now)
        breaker.failed(now)
    assert holds == [5, 10, 12, 12]


def test_old_failures_and_old_successes_do_not_count():
    breaker = Breaker(BreakerSettings(failures_max=2, window_s=10))
    breaker.failed(0)
    breaker.failed(11)
    assert breaker.permits(11)
    breaker.lost(12)
    breaker.succeeded(13)                  # sent before the fall
    assert breaker.health(13) is Health.DOWN
    breaker.found()
    breaker.succeeded(18)                  # probing, but none was sent since
    breaker.failed(18)
    assert breaker.health(18) is Health.PROBING
    breaker.sent(18)
    breaker.failed(19)
    assert breaker.health(19) is Health.DOWN


def test_a_lost_link_stays_down_beyond_its_hold():
    breaker = Breaker(BreakerSettings(hold_s=5))
    breaker.lost(0)
    assert not breaker.permits(100)
    breaker.found()
    assert breaker.permits(100)


def test_the_hold_is_forgotten_after_a_calm_time():
    breaker = Breaker(BreakerSettings(hold_s=5, memory_s=100))
    for start in (0, 10, 300):
        breaker.lost(start)
        breaker.found()
        assert not breaker.permits(start + 4.9)
    assert breaker.permits(305) and breaker.falls == 3
