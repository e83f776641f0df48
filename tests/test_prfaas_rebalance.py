"""Copies of hot prefixes: made when they have paid, from who has them, and the router uses them."""

import random

import pytest

from kvwire.errors import UsageError
from kvwire.prfaas.pool.blocks import Chain
from kvwire.prfaas.pool.metadata import EmbeddedIndex
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.rebalance import Rebalancer
from kvwire.prfaas.router import Router, RouteRequest, Target
from kvwire.prfaas.view import ClusterView, NodeView

TOKENS, BLOCK = 16_384, 512
PROFILE = ModelProfile("m", 17_280, 182_000_000, ((1024, 0.44), (8192, 0.72), (32_768, 1.84),
                                                  (131_072, 7.4)))
HASHES = [number.to_bytes(16, "little") for number in range(1, TOKENS // BLOCK + 1)]
REQUEST = RouteRequest(TOKENS + 100, HASHES)


@pytest.fixture
def index():
    made = EmbeddedIndex()
    hold(made, "local/0")
    return made


def hold(index, node, hashes=HASHES):
    index.publish(node, Chain(b"", hashes[0]), hashes, hashes[-1:])


def rebalancer(index, gbps=1.0, **options):
    return Rebalancer(index, BLOCK, {Target.LOCAL: PROFILE, Target.REMOTE: PROFILE}, gbps,
                      **options)


def routed(index, busy_s=60.0, request=REQUEST, **view):
    """The node that has the prefix has a long queue, so another one prefills."""
    router = Router(index, BLOCK, PROFILE, PROFILE)
    nodes = {"remote": (), "local": (NodeView("local/0", busy_s), NodeView("local/1", 0.0))}
    return router.route(request, ClusterView(**nodes | {"threshold_tokens": 1e9} | view))


def test_a_copy_is_made_when_its_absence_has_cost_as_much(index):
    copies, chosen = rebalancer(index), None
    decision = routed(index)
    assert decision.node == "local/1" and decision.cached_tokens == 0
    copy_s = PROFILE.wire_bytes(TOKENS) * GBPS / 1.0
    each_s = PROFILE.prefill_s(TOKENS + 100) - PROFILE.prefill_s(100, TOKENS)
    count = 0
    while chosen is None:
        chosen, count = copies.note(0.0, REQUEST, decision), count + 1
    assert (chosen.source, chosen.target) == ("local/0", "local/1")
    assert list(chosen.block_hashes) == HASHES and chosen.copy_s == pytest.approx(copy_s)
    assert (count - 1) * each_s < copy_s <= count * each_s == pytest.approx(chosen.lost_s)
    copies.done(chosen)
    assert copies.note(0.0, REQUEST, decision) is None, "a copy is paid for from the beginning"


def test_a_copy_on_its_way_is_not_asked_for_again(index):
    copies, decision = rebalancer(index, gbps=1e6), routed(index)
    found = copies.note(0.0, REQUEST, decision)
    assert found and not any(copies.note(0.0, REQUEST, decision) for _ in range(100))
    other = copies.note(0.0, REQUEST, decision._replace(node="local/2"))
    assert other.target == "local/2", "another node's is another copy"
    copies.done(found)
    assert copies.note(0.0, REQUEST, decision) == found, "it failed: the next request asks again"


def test_the_router_uses_what_was_copied(index):
    copies = rebalancer(index, gbps=1e6)
    found = copies.note(0.0, REQUEST, routed(index))
    hold(index, found.target, list(found.block_hashes))
    after = routed(index)
    assert after.node == "local/1" and after.cached_tokens == TOKENS
    assert copies.note(1.0, REQUEST, after) is None


def test_nothing_is_lost_where_the_prefix_is(index):
    copies = rebalancer(index, gbps=1e9)
    assert copies.note(0.0, REQUEST, routed(index, busy_s=0.0)) is None
    unknown = RouteRequest(TOKENS, [random.Random(1).randbytes(16)])
    assert copies.note(0.0, unknown, routed(index, request=unknown)) is None


def test_what_was_hot_long_ago_does_not_count(index):
    copies, decision = rebalancer(index, half_life_s=10.0), routed(index)
    assert all(copies.note(100.0 * number, REQUEST, decision) is None for number in range(500))


def test_the_link_is_used_only_while_it_is_abundant(index):
    remote = (NodeView("remote/0", 0.0),)
    scarce = routed(index, threshold_tokens=1.0, remote=remote, local=(), abundant=False)
    assert scarce.target is Target.REMOTE
    assert rebalancer(index, gbps=1e9).note(0.0, REQUEST, scarce) is None
    free = routed(index, threshold_tokens=1.0, remote=remote, local=(), abundant=True,
                  link_gbps=1e-9)
    lacks = free._replace(cached_tokens_local=TOKENS, cached_tokens=0, fetch_tokens=0)
    found = rebalancer(index, gbps=1e9).note(0.0, REQUEST, lacks)
    assert (found.source, found.target) == ("local/0", "remote/0")


def test_a_prefix_that_has_gone_is_not_copied(index):
    decision = routed(index)
    assert rebalancer(EmbeddedIndex(), gbps=1e9).note(0.0, REQUEST, decision) is None


def test_what_is_remembered_is_bounded(index):
    copies, decision = rebalancer(index, gbps=1e-3, entries_max=10), routed(index)
    for number in range(100):
        copies.note(0.0, REQUEST, decision._replace(node=f"local/{number}"))
    assert len(copies._lost) == 10


@pytest.mark.parametrize("options", [{"gbps": 0}, {"half_life_s": 0}, {"entries_max": 0}])
def test_settings_that_cannot_be_are_refused(index, options):
    with pytest.raises(UsageError, match="above 0"):
        rebalancer(index, **options)
