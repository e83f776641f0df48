"""Prefill as a service: profiles, length distributions, equations 1 to 8."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvwire
from kvwire.errors import UsageError
from kvwire.prfaas import throughput
from kvwire.prfaas.lengths import Empirical, TruncatedLognormal, WithPrefixHits
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.throughput import (
    Deployment, Link, LocalCluster, PrefillCluster, Stages, Wire, evaluate, solve,
)

POINTS = ((1024, 0.44), (8192, 0.72), (32768, 1.84), (131072, 7.40))
FAST = ModelProfile("fast", 17_280, 182_353_920, POINTS)
SLOW = FAST.slower("slow", 2.9, 1.6)
LENGTHS = TruncatedLognormal(9.90, 1.00, 128, 131_072)
LOCAL = LocalCluster(8, SLOW, batch_max=20, decode_step_s=0.025)


def deployment(**changes):
    return Deployment(**{"name": "d", "lengths": LENGTHS, "output_tokens": 1024, "local": LOCAL,
                         "prfaas": PrefillCluster(4, FAST), "link": Link(100)} | changes)


# ---- profiles

def test_a_profile_takes_its_sizes_from_a_spec():
    spec = kvwire.CacheSpec.preset("prfaas-1t")
    profile = ModelProfile.of_spec("1t", spec, POINTS)
    assert profile.cache_bytes(32_000) == spec.bytes(32_000)
    assert profile.kv_throughput_gbps(8192) == pytest.approx(spec.bytes(8192) * GBPS / 0.72)


def test_prefill_time_meets_the_points_and_never_turns_back():
    times = FAST.prefill_times(np.arange(0, 300_000, 97))
    assert (np.diff(times) >= 0).all() and times[0] == FAST.floor_s > 0
    for tokens, seconds in POINTS:
        assert FAST.prefill_s(tokens) == pytest.approx(seconds)
    # Beyond the points it goes on as attention does: faster than linearly.
    assert FAST.prefill_s(262_144) > 2 * FAST.prefill_s(131_072)


def test_one_and_many_prefill_times_agree():
    rng = np.random.default_rng(1)
    tokens, cached = rng.uniform(1, 2e5, 300), rng.uniform(0, 1e5, 300) * rng.integers(0, 2, 300)
    many = FAST.prefill_times(tokens, cached)
    assert many == pytest.approx([FAST.prefill_s(*pair) for pair in zip(tokens, cached)])


points = st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 5)), min_size=2, max_size=6).map(
    lambda steps: tuple(zip(np.cumsum([tokens for tokens, _ in steps]),
                            0.01 + np.cumsum([seconds for _, seconds in steps]))))


@given(points, st.floats(0, 1e5), st.floats(0, 1e5), st.floats(0, 1e5))
def test_prefill_time_is_monotone_whatever_the_points(measured, tokens, more, cached):
    profile = ModelProfile("p", 1, 1, measured)
    slack = 1e-9 * profile.prefill_s(2e5)
    assert profile.prefill_s(tokens) <= profile.prefill_s(tokens + more) + slack
    behind = profile.prefill_s(tokens, cached)
    assert profile.prefill_s(tokens) <= behind + slack  # to attend to a prefix costs something
    assert behind <= profile.prefill_s(tokens + cached) + profile.floor_s + slack


def test_a_cached_prefix_saves_what_it_took_but_for_the_floor():
    assert FAST.prefill_s(1000, 100_000) == pytest.approx(
        FAST.floor_s + FAST.prefill_s(101_000) - FAST.prefill_s(100_000))
    assert FAST.prefill_s(1000) < FAST.prefill_s(1000, 100_000) < FAST.prefill_s(101_000)


def test_states_travel_whole_and_kv_from_where_it_is_held():
    assert FAST.wire_bytes(1000, 900) == 100 * 17_280 + 182_353_920
    assert FAST.wire_bytes(1000, 0, kv_ratio=2, state_ratio=4) == (
        1000 * 17_280 / 2 + 182_353_920 / 4)


@pytest.mark.parametrize("given_points, words", [
    (((1024, 0.4),), "at least 2"),
    (((1024, 0.4), (1024, 0.5)), "must rise"),
    (((1024, 0.4), (2048, 0.3)), "must not fall"),
    (((0, 0.4), (2048, 0.5)), "positive"),
    (((1, math.nan), (2048, 0.5)), "positive"),
])
def test_bad_points_are_refused(given_points, words):
    with pytest.raises(UsageError, match=words):
        ModelProfile("p", 1, 1, given_points)


def test_a_profile_without_any_cache_is_refused():
    with pytest.raises(UsageError, match="both 0"):
        ModelProfile("p", 0, 0, POINTS)


# ---- lengths

def empirical(distribution, count=200_000):
    return Empirical(distribution.sample(np.random.default_rng(7), count))


@pytest.mark.parametrize("distribution", [
    LENGTHS, TruncatedLognormal(5, 2, 1, 1000),
    WithPrefixHits(LENGTHS, 0.6, 0.9), WithPrefixHits(LENGTHS, 1.0, 0.5),
], ids=["lognormal", "cut", "hits", "all-hit"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_closed_forms_agree_with_samples(distribution, share):
    seen, tokens = empirical(distribution), distribution.quantile(share)
    assert distribution.share_above(tokens) == pytest.approx(1 - share, abs=1e-6)
    assert seen.share_above(tokens) == pytest.approx(1 - share, abs=0.006)
    assert seen.mean() == pytest.approx(distribution.mean(), rel=0.02)
    assert seen.mean_above(tokens) == pytest.approx(distribution.mean_above(tokens), rel=0.04)
    assert seen.mean_below(tokens) == pytest.approx(distribution.mean_below(tokens), rel=0.04)
    assert distribution.share_above(math.inf) == 0
    cuts = np.array([0, tokens, math.inf])
    for one in (seen, distribution):
        assert one.shares_above(cuts) == pytest.approx([one.share_above(cut) for cut in cuts])
    lengths, cached = distribution.grid()
    assert (np.diff(lengths) >= 0).all() and (cached >= 0).all()
    assert lengths.mean() == pytest.approx(distribution.mean(), rel=0.005)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=50), st.integers(0, 10**6))
def test_an_empirical_distribution_is_its_requests(lengths, tokens):
    distribution = Empirical(np.array(lengths))
    above = [length for length in lengths if length > tokens]
    below = [length for length in lengths if length <= tokens]
    assert distribution.share_above(tokens) == pytest.approx(len(above) / len(lengths))
    assert distribution.mean_above(tokens) == pytest.approx(np.mean(above) if above else 0)
    assert distribution.mean_below(tokens) == pytest.approx(np.mean(below) if below else 0)
    assert distribution.quantile(1.0) == max(lengths)


@pytest.mark.parametrize("prompts", [LENGTHS, Empirical(np.array([700, 8_000, 90_000]))],
                         ids=["lognormal", "trace"])
def test_prefix_hits_leave_the_rest_of_a_prompt(prompts):
    lengths, cached = WithPrefixHits(prompts, 0.25, 0.8).grid(1000)
    assert len(lengths) == 1000 and (lengths + cached).mean() == pytest.approx(
        prompts.mean(), rel=0.01)
    assert (cached > 0).sum() == 250
    assert cached[cached > 0] == pytest.approx(4 * lengths[cached > 0])


@pytest.mark.parametrize("build, words", [
    (lambda: TruncatedLognormal(9, 0, 1, 10), "sigma is 0"),
    (lambda: TruncatedLognormal(9, 1, 10, 10), "low < high"),
    (lambda: TruncatedLognormal(90, 1, 1, 10), "next to nothing"),
    (lambda: Empirical(np.array([])), "at least one"),
    (lambda: Empirical(np.array([-1.0])), "not negative"),
    (lambda: Empirical(np.array([math.inf])), "finite"),
    (lambda: Empirical(np.array([1, 2]), np.array([1])), "as many"),
    (lambda: WithPrefixHits(LENGTHS, 0.5, 1.0), "below 1"),
])
def test_bad_distributions_are_refused(build, words):
    with pytest.raises(UsageError, match=words):
        build()


# ---- throughput

def test_equations_by_hand():
    assert throughput.kv_throughput_gbps(1e9, 2) == pytest.approx(4)
    assert throughput.theta_prefill(6, 2) == 3
    assert throughput.theta_decode(5, 20, 0.025, 1024) == pytest.approx(3.90625)
    assert throughput.theta_prfaas(4, 2, link_gbps=100, wire_bytes=1e9) == 2       # compute binds
    assert throughput.theta_prfaas(4, 2, link_gbps=8, wire_bytes=1e9) == 1         # the link binds
    assert throughput.lambda_max(1.5, 2, 9, 0.5) == 3
    assert throughput.lambda_max(1.5, 0.1, 9, 1.0) == 1.5
    assert throughput.lambda_max(0, 3, 9, 0.0) == 3


@pytest.mark.parametrize("given_deployment", [
    deployment(), deployment(link=Link(10)), deployment(link=Link(2, share=0.5)),
    deployment(lengths=WithPrefixHits(LENGTHS, 0.7, 0.9)),
    deployment(local=replace(LOCAL, batch_max=5)), deployment(local=replace(LOCAL, nodes=3)),
    deployment(lengths=Empirical(np.array([500, 900, 900, 40_000, 90_000]))),
], ids=["paper", "10G", "1G", "hits", "decode-bound", "few-nodes", "five-requests"])
def test_no_other_threshold_and_split_is_better(given_deployment):
    best = solve(given_deployment)
    lengths = given_deployment.lengths
    for prefill_nodes in range(given_deployment.local.nodes):
        for threshold in (0, *(lengths.quantile(share) for share in np.linspace(0, 1, 6)),
                          math.inf):
            other = evaluate(given_deployment, threshold, prefill_nodes)
            assert other.lambda_max_rps <= best.lambda_max_rps * 1.001


def test_a_plan_is_what_its_equations_say():
    plan = solve(deployment(link=Link(10)))
    share = plan.offloaded_share
    assert plan.lambda_max_rps == pytest.approx(throughput.lambda_max(
        plan.theta_prfaas_rps, plan.theta_prefill_rps, plan.theta_decode_rps, share))
    assert plan.theta_prfaas_rps == pytest.approx(throughput.theta_prfaas(
        4, plan.remote_prefill_s, 10, plan.wire_bytes))
    assert plan.prefill_nodes + plan.decode_nodes == 8
    assert plan.egress_gbps == pytest.approx(
        plan.lambda_max_rps * share * plan.wire_bytes * GBPS)
    assert plan.wire_bytes == pytest.approx(FAST.wire_bytes(plan.long_tokens), rel=1e-3)
    assert "link" in plan.bound_by and plan.link_utilisation == pytest.approx(1, abs=0.01)
    assert share * plan.long_tokens + (1 - share) * plan.short_tokens == pytest.approx(
        LENGTHS.mean(), rel=1e-6)


def test_long_and_short_prefill_times_are_means_over_requests():
    plan = evaluate(deployment(), 19_400, 3)
    lengths = LENGTHS.sample(np.random.default_rng(3), 400_000)
    times = FAST.prefill_times(lengths)
    assert plan.remote_prefill_s == pytest.approx(times[lengths > 19_400].mean(), rel=0.01)
    assert plan.remote_prefill_s > FAST.prefill_s(plan.long_tokens)  # convex


def test_a_narrower_link_moves_the_threshold_up_and_a_codec_moves_it_back():
    thresholds = [solve(deployment(link=Link(gbps))).threshold_tokens for gbps in (100, 10, 5)]
    assert thresholds == sorted(thresholds) and thresholds[0] < thresholds[1] < thresholds[2]
    coded = solve(deployment(link=Link(5), wire=Wire(1.5, 1.2)))
    raw = solve(deployment(link=Link(5)))
    assert coded.lambda_max_rps > 1.05 * raw.lambda_max_rps
    assert coded.threshold_tokens < raw.threshold_tokens


def test_states_weigh_more_where_prefixes_are_cached():
    """The published "only the increment travels" holds for KV; states travel whole."""
    hits = deployment(lengths=WithPrefixHits(LENGTHS, 1.0, 0.95), link=Link(5))
    stateless = replace(FAST, state_bytes=0), replace(SLOW, state_bytes=0)
    light = replace(hits, prfaas=PrefillCluster(4, stateless[0]),
                    local=replace(LOCAL, profile=stateless[1]))
    assert solve(light).lambda_max_rps > 1.2 * solve(hits).lambda_max_rps


def test_the_link_is_capped_by_its_share_and_by_what_is_in_flight():
    assert Link(100, share=0.3).goodput_gbps == 30
    assert Link(100, rtt_s=0.04, in_flight_bytes_max=64e6).goodput_gbps == pytest.approx(12.8)
    assert Link(1, rtt_s=0.04, in_flight_bytes_max=64e6).goodput_gbps == 1


def test_first_token_waits_for_the_round_trip_and_for_what_prefill_does_not_hide():
    near, far = (evaluate(deployment(link=Link(100, rtt_s=rtt)), 19_400, 3) for rtt in (0, 0.05))
    assert far.remote_ttft_s - near.remote_ttft_s == pytest.approx(0.05)
    states_s = 182_353_920 * GBPS / 100
    assert near.remote_ttft_s == pytest.approx(near.remote_prefill_s + states_s)
    thin = evaluate(deployment(link=Link(1)), 19_400, 3)
    assert thin.remote_ttft_s == pytest.approx(thin.wire_bytes * GBPS)


def test_without_a_remote_cluster_all_is_local():
    plan = solve(deployment(prfaas=None, link=None, local=replace(LOCAL, nodes=12)))
    assert plan.threshold_tokens == math.inf and plan.offloaded_share == 0
    assert plan.theta_prfaas_rps == plan.egress_gbps == 0
    assert plan.prefill_nodes == 9


def test_what_is_fixed_stays():
    plan = solve(deployment(local=replace(LOCAL, prefill_nodes=2), threshold_tokens=30_000))
    assert (plan.prefill_nodes, plan.threshold_tokens) == (2, 30_000)


def test_many_thresholds_are_candidates_but_not_too_many():
    lengths = Empirical(np.random.default_rng(1).integers(1, 10**6, 50_000))
    stages = Stages(deployment(lengths=lengths))
    assert len(stages.thresholds) <= throughput.CANDIDATE_COUNT_MAX + 2
    assert stages.thresholds[0] == 0 and stages.thresholds[-1] == math.inf


@pytest.mark.parametrize("build, words", [
    (lambda: deployment(link=None), "belong together"),
    (lambda: deployment(output_tokens=0), "output_tokens"),
    (lambda: deployment(threshold_tokens=-1), "threshold_tokens"),
    (lambda: deployment(prfaas=PrefillCluster(1, replace(FAST, state_bytes=1))), "sizes"),
    (lambda: Link(0), "gbps"), (lambda: Link(1, share=1.5), "share"),
    (lambda: Link(1, rtt_s=-1), "rtt_s"), (lambda: Link(1, in_flight_bytes_max=0), "in_flight"),
    (lambda: Wire(0.5), "kv_ratio"), (lambda: PrefillCluster(0, FAST), "nodes"),
    (lambda: replace(LOCAL, prefill_nodes=8), "left to decode"),
    (lambda: replace(LOCAL, batch_max=0), "batch_max"),
    (lambda: replace(LOCAL, decode_step_s=0), "decode_step_s"),
    (lambda: solve(deployment(local=replace(LOCAL, prefill_nodes=0), prfaas=None, link=None)),
     "no request can be served"),
])
def test_bad_deployments_are_refused(build, words):
    with pytest.raises(UsageError, match=words):
        build()
