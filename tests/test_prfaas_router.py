"""The router: the published rule in both regimes, the priced rule, faults, codecs, concurrency."""

import math
import threading
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwire.errors import UsageError
from kvwire.prfaas import codecs
from kvwire.prfaas.codecs import RAW, TIERED, CodecOption
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.router import (
    LINK_FULL, SOONER, Router, RouteRequest, Rule, Target,
)
from kvwire.prfaas.view import ClusterView, NodeView

BLOCK_TOKENS = 100
REMOTE = ModelProfile("remote", 17_280, 182_353_920,
                      ((1024, 0.44), (8192, 0.72), (32768, 1.84), (131072, 7.40)))
LOCAL = REMOTE.slower("local", 2.9, 1.6)
HASHES = (b"some prompt",)


class Held(NamedTuple):
    kv_blocks: int
    usable_blocks: int


class Index(dict):
    """Holds the same for every prompt of the tenant b"a"."""

    def match(self, tenant_key, hashes):
        assert hashes == HASHES
        return self if tenant_key == b"a" else {}


def router(rule=Rule.PUBLISHED, held=None, **options):
    index = Index({node: Held(*pair) for node, pair in (held or {}).items()})
    return Router(index, BLOCK_TOKENS, REMOTE, LOCAL, rule=rule, **options)


def view(**changes):
    nodes = {side: tuple(NodeView(f"{side}/{number}") for number in range(3))
             for side in ("remote", "local")}
    return ClusterView(**{**nodes, "threshold_tokens": 10_000, "link_gbps": 100.0} | changes)


def request(tokens, **changes):
    return RouteRequest(tokens, HASHES, b"a", **changes)


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("abundant", [True, False])
def test_without_prefixes_the_length_decides(rule, abundant):
    route = router(rule).route
    assert route(request(10_000), view(abundant=abundant)).target is Target.LOCAL
    decision = route(request(10_001), view(abundant=abundant))
    assert decision.target is Target.REMOTE and decision.reason == "threshold"
    assert route(request(1), view(threshold_tokens=0)).target is Target.REMOTE
    assert route(request(10**6), view(threshold_tokens=math.inf)).target is Target.LOCAL


@pytest.mark.parametrize("here, there, scarce, abundant", [
    (0, 0, Target.REMOTE, Target.REMOTE),
    (60, 0, Target.LOCAL, Target.LOCAL),       # 9,000 are left here
    (0, 60, Target.REMOTE, Target.LOCAL),      # scarce: here all 15,000 are left
    (40, 60, Target.REMOTE, Target.LOCAL),
    (60, 40, Target.LOCAL, Target.LOCAL),
    (40, 40, Target.REMOTE, Target.REMOTE),
], ids=lambda value: getattr(value, "value", value))
def test_the_published_rule_in_both_regimes(here, there, scarce, abundant):
    """Scarce: caches are judged each for itself; abundant: the longest one counts."""
    held = {"local/1": (here, here), "remote/2": (there, there)}
    held = {node: pair for node, pair in held.items() if pair[0]}
    route = router(held=held).route
    decision = route(request(15_000), view(abundant=False))
    assert decision.target is scarce and not decision.transfer_prefix
    assert (decision.cached_tokens_local, decision.cached_tokens_remote) == (here * 100,
                                                                             there * 100)
    decision = route(request(15_000), view(abundant=True))
    assert decision.target is abundant
    own, other = (here, there) if abundant is Target.LOCAL else (there, here)
    assert decision.fetch_tokens == max(0, other - own) * 100
    assert decision.cached_tokens == max(own, other) * 100
    if decision.transfer_prefix:
        assert decision.fetch_from == ("remote/2" if abundant is Target.LOCAL else "local/1")


def test_the_node_that_holds_the_prefix_is_taken_unless_its_queue_is_too_long():
    held = {"local/2": (90, 90), "local/1": (30, 30)}
    queues = (NodeView("local/0", 0.0), NodeView("local/1", 0.1), NodeView("local/2", 0.2))
    decision = router(held=held).route(request(10_000), view(local=queues))
    assert (decision.node, decision.cached_tokens) == ("local/2", 9000)
    assert decision.prefill_s == LOCAL.prefill_s(1000, 9000)
    queues = (*queues[:2], NodeView("local/2", 60.0))
    decision = router(held=held).route(request(10_000), view(local=queues))
    assert (decision.node, decision.cached_tokens) == ("local/1", 3000)
    decision = router().route(request(10_000), view(local=queues))
    assert decision.node == "local/0" and decision.queue_s == 0


def test_the_last_token_of_a_prompt_is_always_computed():
    decision = router(held={"local/1": (100, 100)}).route(request(10_000), view())
    assert decision.cached_tokens == 9_999 and decision.uncached_tokens == 1


def test_kv_without_its_state_spares_the_wire_but_no_prefill():
    decision = router(held={"local/1": (140, 0)}, options=(RAW,)).route(request(15_000), view())
    assert decision.target is Target.REMOTE and decision.uncached_tokens == 15_000
    assert decision.held_tokens == 14_000
    assert decision.wire_bytes == REMOTE.wire_bytes(15_000, 14_000)


def test_another_tenants_prefix_is_not_seen():
    held = {"local/1": (90, 90), "remote/1": (90, 90)}
    decision = router(held=held).route(RouteRequest(10_000, HASHES, b"b"), view())
    assert decision.cached_tokens_local == decision.cached_tokens_remote == 0


# ---- the priced rule

def test_attention_to_a_long_prefix_is_worth_sparing():
    """8,000 tokens behind 100,000 put no more on the wire than 8,000 cold ones, and take longer
    here than the 10,000 cold ones of the threshold."""
    held = {"local/1": (1000, 1000), "remote/1": (1000, 1000)}
    scarce = view(abundant=False)
    assert LOCAL.prefill_s(8_000, 100_000) > LOCAL.prefill_s(10_000)
    assert router(Rule.PUBLISHED, held).route(request(108_000), scarce).target is Target.LOCAL
    assert router(Rule.PRICED, held).route(request(108_000), scarce).target is Target.REMOTE
    assert router(Rule.PRICED, held).route(request(101_000), scarce).target is Target.LOCAL


def test_kv_that_is_here_already_makes_a_transfer_cheaper():
    """Only states travel for it: the priced rule offloads what is below the length threshold."""
    held = {"local/1": (95, 0)}
    scarce = view(abundant=False)
    assert router(Rule.PUBLISHED, held).route(request(9_900), scarce).target is Target.LOCAL
    # A prefix that no state makes usable is no cached prefix, so ask with one usable block.
    held = {"local/1": (95, 1)}
    assert router(Rule.PRICED, held).route(request(9_900), scarce).target is Target.REMOTE


def test_a_fetch_must_be_faster_than_what_it_saves():
    held = {"remote/1": (90, 90)}
    slow, fast = view(link_gbps=0.2), view(link_gbps=100.0)
    assert router(Rule.PUBLISHED, held).route(request(10_000), slow).transfer_prefix
    assert not router(Rule.PRICED, held).route(request(10_000), slow).transfer_prefix
    assert router(Rule.PRICED, held).route(request(10_000), fast).transfer_prefix
    full = view(admit_bytes=1e6)
    assert not router(Rule.PRICED, held).route(request(10_000), full).transfer_prefix


# ---- against the rule

def test_a_long_queue_turns_a_request_round_when_that_is_sooner():
    eager = router(Rule.PRICED, sooner_s=1.0).route
    stuck_here = tuple(NodeView(f"local/{number}", 30.0) for number in range(3))
    stuck_there = tuple(NodeView(f"remote/{number}", 90.0) for number in range(3))
    for tokens, changes, target in ((5_000, {"local": stuck_here}, Target.REMOTE),
                                    (20_000, {"remote": stuck_there}, Target.LOCAL),
                                    (20_000, {"promised_s": 90.0}, Target.LOCAL)):
        decision = eager(request(tokens), view(**changes))
        assert (decision.target, decision.reason) == (target, SOONER)
        assert router(Rule.PRICED).route(request(tokens), view(**changes)).target is not target
    assert eager(request(5_000), view()).reason == "threshold"
    assert eager(request(20_000), view()).target is Target.REMOTE


def test_a_little_sooner_is_not_enough():
    nodes = view().local
    waits = (LOCAL.prefill_s(5_000) - REMOTE.prefill_s(5_000))
    late = tuple(NodeView(node.name, waits) for node in nodes)  # about 2 s later than there
    assert router(sooner_s=1.0).route(request(5_000), view(local=late)).reason == SOONER
    assert router(sooner_s=5.0).route(request(5_000), view(local=late)).target is Target.LOCAL


def test_what_is_sooner_must_be_admitted_too():
    late = tuple(NodeView(node.name, 60.0) for node in view().local)
    decision = router(sooner_s=1.0).route(request(5_000), view(local=late, admit_bytes=0))
    assert (decision.target, decision.reason) == (Target.LOCAL, LINK_FULL)


# ---- faults and limits

def test_without_the_remote_cluster_all_is_local():
    for gone in (view(remote_up=False), view(remote=())):
        decision = router(held={"remote/1": (50, 50)}).route(request(90_000), gone)
        assert decision.target is Target.LOCAL and decision.reason != "threshold"
        assert decision.cached_tokens == decision.wire_bytes == 0 and decision.codec == ""


def test_without_local_nodes_all_is_remote():
    decision = router().route(request(10), view(local=()))
    assert (decision.target, decision.reason) == (Target.REMOTE, "no local node")


def test_a_full_link_keeps_a_request_here_and_says_what_it_wanted():
    decision = router(options=(RAW,)).route(request(50_000), view(admit_bytes=1e6))
    assert (decision.target, decision.reason) == (Target.LOCAL, LINK_FULL)
    assert decision.wire_bytes == REMOTE.wire_bytes(50_000)


def test_bad_requests_are_refused():
    with pytest.raises(UsageError, match="0 tokens"):
        router().route(request(0), view())
    for nobody in (view(local=(), remote=()), view(local=(), remote_up=False)):
        with pytest.raises(UsageError, match="neither cluster"):
            router().route(request(5), nobody)
    with pytest.raises(UsageError, match="exact"):
        router(options=(TIERED._replace(exact=False),))
    with pytest.raises(UsageError, match="block_tokens"):
        Router(Index(), 0, REMOTE, LOCAL)


blocks = st.integers(0, 400).flatmap(lambda kv: st.tuples(st.just(kv), st.integers(0, kv)))


@given(st.sampled_from(Rule), st.integers(1, 200_000), st.booleans(), st.booleans(),
       st.dictionaries(st.sampled_from(["local/0", "local/1", "remote/0", "remote/2", "else"]),
                       blocks), st.floats(0, 1e5), st.floats(0, 1e10),
       st.sampled_from([math.inf, 0.0, 1.0]))
def test_every_decision_is_sound(rule, tokens, abundant, up, held, threshold, admit_bytes,
                                 sooner_s):
    """Whatever is cached wherever: the node is the target's, prefixes are real and in bounds,
    nothing is fetched in the scarce regime or from a cluster that is gone."""
    now = view(abundant=abundant, remote_up=up, threshold_tokens=threshold,
               admit_bytes=admit_bytes)
    decision = router(rule, held, sooner_s=sooner_s).route(request(tokens), now)
    assert decision.node.startswith(f"{decision.target.value}/")
    assert 0 <= decision.cached_tokens < tokens and 0 <= decision.held_tokens <= tokens
    assert 1 <= decision.uncached_tokens <= tokens
    longest = max(decision.cached_tokens_local, decision.cached_tokens_remote)
    assert decision.cached_tokens <= longest
    if decision.transfer_prefix:
        assert abundant and up and decision.fetch_from in held
        assert not decision.fetch_from.startswith(decision.target.value)
    if decision.target is Target.REMOTE:
        assert up and decision.wire_bytes <= admit_bytes and decision.codec
    assert decision.node in decision.explain()


def test_threads_agree():
    """One router, many threads, thresholds that differ: no decision mixes two of them."""
    shared = router(Rule.PRICED, {"local/1": (20, 20), "remote/1": (10, 10)})
    views = [view(threshold_tokens=threshold, abundant=False) for threshold in (4_000, 40_000)]
    expected = [router(Rule.PRICED, {"local/1": (20, 20), "remote/1": (10, 10)}).route(
        request(20_000), one).target for one in views]
    assert expected[0] is not expected[1]
    wrong = []

    def work(number):
        for _ in range(2_000):
            if shared.route(request(20_000), views[number]).target is not expected[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- codecs

INT6 = CodecOption("int6", kv_ratio=2.3, state_ratio=3.8, gbps=100, exact=False)
LADDER = (RAW, TIERED, INT6)
KV, STATE = 700e6, 180e6


def chosen(link_gbps, **options):
    return codecs.choose(LADDER, KV, STATE, 2.0, link_gbps, **options).name


def test_what_hides_behind_prefill_is_left_raw():
    assert chosen(1e4) == "raw"
    assert codecs.exposed_s(RAW, KV, STATE, 2.0, 100) == pytest.approx(STATE * GBPS / 100)


def test_a_slow_or_scarce_link_takes_the_exact_code():
    assert chosen(1.0) == "tiered"
    assert chosen(1e3, scarce=True) == "tiered"


def test_a_code_that_is_slower_than_the_link_is_left_out():
    slow = CodecOption("slow", 1.5, 1.5, gbps=1.0)
    assert codecs.choose((RAW, slow), KV, STATE, 2.0, 10.0) == RAW


def test_lossy_only_by_permission_and_only_to_meet_the_goal():
    assert chosen(1.0, lossy=True) == "tiered"                    # no goal
    goal_s = 2.0 + codecs.exposed_s(INT6, KV, STATE, 2.0, 1.0) + 0.01
    assert chosen(1.0, ttft_max_s=goal_s) == "tiered"             # not allowed: the nearest
    assert chosen(1.0, ttft_max_s=goal_s, lossy=True) == "int6"
    assert chosen(1.0, ttft_max_s=goal_s, lossy=True, late_s=60) == "int6"  # none: the nearest
    assert chosen(100, ttft_max_s=5, lossy=True) == "raw"


def test_a_request_carries_its_goal_to_the_codec():
    options = router(options=LADDER)
    thin = view(link_gbps=1.0)
    decision = options.route(request(50_000, ttft_max_s=5.5, lossy=True), thin)
    assert decision.codec == "int6"
    assert options.route(request(50_000, ttft_max_s=5.5), thin).codec == "tiered"
