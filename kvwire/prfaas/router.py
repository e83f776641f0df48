"""Where a request is prefilled: in the remote cluster or here, and on which node.

Source: arXiv 2604.15039 section 3.3 (length threshold, two bandwidth regimes). Rule.PRICED is
kvwire's own: a request with a cached prefix is judged by the prefill that it saves here and by what
it costs there and on the wire, where its states travel whole and KV that is here does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import Enum
from operator import attrgetter
from typing import NamedTuple

from kvwire.errors import UsageError
from kvwire.prfaas import codecs
from kvwire.prfaas.codecs import CodecOption
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.view import ClusterView, HeldBlocks, NodeView, PrefixIndex

__all__ = ["RouteDecision", "RouteRequest", "Router", "Rule", "Target"]

THRESHOLD = "threshold"
LINK_FULL = "link full"
SOONER = "sooner"


class Target(str, Enum):
    """The cluster that prefills."""

    REMOTE = "remote"
    LOCAL = "local"


class Rule(str, Enum):
    """How a request with a cached prefix is judged; without one the rules are the same.

    PUBLISHED: its uncached length against the threshold. PRICED: offload while the local prefill
    time saved is worth what it costs, at the price that a cold request of threshold length pays:
    remote prefill time where bandwidth is abundant, bytes on the wire where it is scarce.
    """

    PUBLISHED = "published"
    PRICED = "priced"


class RouteRequest(NamedTuple):
    """What a gateway knows of a request.

    Attributes:
        tokens: of the prompt, at least 1.
        block_hashes: the chained hashes of its full blocks, as the engines compute them.
        tenant_key: whose they are (`pool.hashes.CacheKey.digest`): tenant, model, spec, tokenizer.
        ttft_max_s: the goal for the first token.
        lossy: this tenant allows lossy codecs.
    """

    tokens: int
    block_hashes: Sequence[bytes] = ()
    tenant_key: bytes = b""
    ttft_max_s: float = math.inf
    lossy: bool = False


class RouteDecision(NamedTuple):
    """Where a request goes, and why.

    Attributes:
        target, node: who prefills.
        reason: "threshold" (the rule said so), "sooner" (the rule said otherwise, the queues so),
            "remote down", "no remote node", "no local node" or "link full" (the remote cluster was
            wanted, the link admits no such transfer now).
        tokens: of the prompt; threshold_tokens, abundant, rule: what was applied.
        uncached_tokens: the length that the rule looked at.
        cached_tokens_local, cached_tokens_remote: the longest usable prefix in each cluster.
        cached_tokens: the prefix that the chosen node will skip, fetched or its own.
        fetch_tokens: of these, how many come from the other cluster first; fetch_from: its node.
        held_tokens: KV that the local cluster has already, so that it does not travel.
        wire_bytes: expected on the link after prefill, or refused by it ("link full"); else 0.
        codec: for that transfer; "" for a local one.
        queue_s, prefill_s: expected at the node.
    """

    target: Target
    node: str
    reason: str
    tokens: int
    threshold_tokens: float
    abundant: bool
    rule: Rule
    uncached_tokens: int
    cached_tokens_local: int
    cached_tokens_remote: int
    cached_tokens: int
    fetch_tokens: int
    fetch_from: str
    held_tokens: int
    wire_bytes: float
    codec: str
    queue_s: float
    prefill_s: float

    @property
    def transfer_prefix(self) -> bool:
        """A cached prefix is brought from the other cluster first."""
        return self.fetch_tokens > 0

    def explain(self) -> str:
        """Return the decision as a sentence."""
        regime = "abundant" if self.abundant else "scarce"
        text = (f"{self.tokens:,} tokens, cached {self.cached_tokens_local:,} here and "
                f"{self.cached_tokens_remote:,} there: {self.uncached_tokens:,} uncached against "
                f"a threshold of {self.threshold_tokens:,.0f} ({self.rule.value} rule, bandwidth "
                f"{regime}): {self.target.value} by {self.reason}, node {self.node}, queue "
                f"{self.queue_s:.2f} s, prefill {self.prefill_s:.2f} s")
        if self.fetch_tokens:
            text += f", after fetching a prefix of {self.fetch_tokens:,} from {self.fetch_from}"
        if self.target is Target.REMOTE:
            text += f", {self.wire_bytes / 1e6:,.1f} MB on the wire as {self.codec}"
        return text


class _Side(NamedTuple):
    """One cluster for one request: the longest usable prefix and its node, the longest KV, and by
    usable blocks the node with the shortest queue."""

    cached_tokens: int
    cached_node: str
    kv_tokens: int
    first: dict[int, NodeView]


class _Offer(NamedTuple):
    """What one cluster would do for a request; `ready_s`: when its first token is expected."""

    target: Target
    node: NodeView
    cached_tokens: int
    prefill_s: float
    fetch_tokens: int
    fetch_from: str
    ready_s: float
    wire_bytes: float = 0.0
    codec: str = ""


class Router:
    """Routes requests. Pure logic without I/O; any number of threads may call `route` at once.

    Args:
        index: which node holds which prefix.
        block_tokens: tokens of one of its blocks.
        remote, local: the model's profile in each cluster.
        rule: how cached prefixes are judged.
        options: codecs that a transfer may use, least work first.
        sooner_s: a request goes against the rule when its first token is expected so much sooner
            in the other cluster, with the queues as they are; infinity: never.
    """

    def __init__(self, index: PrefixIndex, block_tokens: int, remote: ModelProfile,
                 local: ModelProfile, *, rule: Rule = Rule.PRICED,
                 options: Sequence[CodecOption] = codecs.EXACT_OPTIONS,
                 sooner_s: float = math.inf):
        if not any(option.exact for option in options):
            raise UsageError("options hold no exact codec")
        if block_tokens < 1:
            raise UsageError(f"block_tokens is {block_tokens}; it must be at least 1")
        self._index = index
        self._block_tokens = block_tokens
        self._remote = remote
        self._local = local
        self._rule = Rule(rule)
        self._options = tuple(options)
        self._sooner_s = sooner_s
        self._prices: tuple[float, tuple[float, float, float]] = math.nan, (0.0, 0.0, 0.0)

    def route(self, request: RouteRequest, view: ClusterView) -> RouteDecision:
        """Decide for one request.

        Raises:
            UsageError: the request has no token, or neither cluster has a node.
        """
        tokens = request.tokens
        if tokens < 1:
            raise UsageError(f"the request has {tokens} tokens; at least 1 is needed")
        matches = (self._index.match(request.tenant_key, request.block_hashes)
                   if request.block_hashes else _NO_MATCHES)
        local = self._side(view.local, matches, tokens)
        remote = self._side(view.remote, matches, tokens) if view.remote_up else _NO_NODES
        target, reason = self._choose(request, view, local, remote)
        longest = max(local.cached_tokens, remote.cached_tokens)
        offer = self._offer(request, view, target, local, remote)
        if reason == THRESHOLD and offer.ready_s > self._sooner_s:
            offer, reason = self._sooner(request, view, offer, local, remote, tokens - longest)
        wire_bytes = offer.wire_bytes
        if wire_bytes > view.admit_bytes and view.local:
            offer, reason = self._offer(request, view, Target.LOCAL, local, remote), LINK_FULL
        node = offer.node
        return RouteDecision(
            offer.target, node.name, reason, tokens, view.threshold_tokens, view.abundant,
            self._rule, tokens - (longest if view.abundant else local.cached_tokens),
            local.cached_tokens, remote.cached_tokens, offer.cached_tokens, offer.fetch_tokens,
            offer.fetch_from, local.kv_tokens, wire_bytes, offer.codec, node.queue_s,
            offer.prefill_s)

    def _choose(self, request: RouteRequest, view: ClusterView, local: _Side,
                remote: _Side) -> tuple[Target, str]:
        if not view.remote_up or not view.remote:
            if not view.local:
                raise UsageError("neither cluster has a prefill node that can take a request")
            return Target.LOCAL, "no remote node" if view.remote_up else "remote down"
        if not view.local:
            return Target.REMOTE, "no local node"
        offload = self._offloads(request.tokens, view, local, remote)
        return (Target.REMOTE if offload else Target.LOCAL), THRESHOLD

    def _offloads(self, tokens: int, view: ClusterView, local: _Side, remote: _Side) -> bool:
        here, there, threshold = local.cached_tokens, remote.cached_tokens, view.threshold_tokens
        if view.abundant:
            here = there = max(here, there)
        if self._rule is Rule.PUBLISHED or not (here or there) or not 0 < threshold < math.inf:
            return tokens - here > threshold
        saved_s = self._local.prefill_s(tokens - here, here)
        worth_s, remote_s, wire_bytes = self._at_threshold(threshold)
        if view.abundant:
            return saved_s * remote_s > worth_s * self._remote.prefill_s(tokens - there, there)
        return saved_s * wire_bytes > worth_s * self._remote.wire_bytes(tokens, local.kv_tokens)

    def _at_threshold(self, threshold: float) -> tuple[float, float, float]:
        """Return what a cold request of that length saves here, and costs there and in raw bytes
        on the wire. Kept for the next request: the threshold moves once in many."""
        known, prices = self._prices
        if known != threshold:
            prices = (self._local.prefill_s(threshold), self._remote.prefill_s(threshold),
                      self._remote.wire_bytes(threshold))
            self._prices = threshold, prices
        return prices

    def _sooner(self, request: RouteRequest, view: ClusterView, offer: _Offer, local: _Side,
                remote: _Side, uncached_tokens: int) -> tuple[_Offer, str]:
        """Go against the rule when that brings the first token `sooner_s` sooner.

        The rule shares work as the plan does, for any order of requests; queues and bursts are of
        this moment. `uncached_tokens` is the least that any node would prefill.
        """
        other, profile = ((Target.LOCAL, self._local) if offer.target is Target.REMOTE
                          else (Target.REMOTE, self._remote))
        soon_s = offer.ready_s - self._sooner_s
        if profile.prefill_s(uncached_tokens) < soon_s:  # else no node there can do it
            against = self._offer(request, view, other, local, remote)
            if against.ready_s < soon_s:
                return against, SOONER
        return offer, THRESHOLD

    def _offer(self, request: RouteRequest, view: ClusterView, target: Target, local: _Side,
               remote: _Side) -> _Offer:
        """Return the node of the cluster `target` that is done first, whether a longer prefix is
        brought to it from the other cluster, and what the transfer after a remote prefill is."""
        tokens = request.tokens
        own, other, profile = ((remote, local, self._remote) if target is Target.REMOTE
                               else (local, remote, self._local))
        node, cached, prefill_s = self._node(own, profile, tokens)
        fetch_tokens, fetch_from, fetch_s = 0, "", 0.0
        longer = other.cached_tokens
        if view.abundant and longer > cached:
            fetched_s = profile.prefill_s(tokens - longer, longer)
            fetch_bytes = profile.wire_bytes(longer, min(own.kv_tokens, longer))
            takes_s = view.backlog_s + fetch_bytes * GBPS / view.link_gbps
            # A fetch must be admitted and faster than what it saves; the paper always fetches.
            if self._rule is Rule.PUBLISHED or (fetch_bytes <= view.admit_bytes
                                                and takes_s < prefill_s - fetched_s):
                fetch_tokens, fetch_from, fetch_s = longer - cached, other.cached_node, takes_s
                cached, prefill_s = longer, fetched_s
        ready_s = node.queue_s + prefill_s + fetch_s
        if target is Target.LOCAL:
            return _Offer(target, node, cached, prefill_s, fetch_tokens, fetch_from, ready_s)
        kv_bytes = profile.kv_bytes_per_token * (tokens - local.kv_tokens)
        state_bytes = profile.state_bytes
        codec = codecs.choose(self._options, kv_bytes, state_bytes, prefill_s, view.link_gbps,
                              late_s=node.queue_s + view.backlog_s,
                              ttft_max_s=request.ttft_max_s, scarce=not view.abundant,
                              lossy=request.lossy)
        if self._sooner_s < math.inf:
            # What was promised to the link delays a transfer as far as it will not have gone by
            # the time that this request's prefill ends.
            ready_s = max(ready_s, view.promised_s + fetch_s) + codecs.exposed_s(
                codec, kv_bytes, state_bytes, prefill_s, view.link_gbps)
        return _Offer(target, node, cached, prefill_s, fetch_tokens, fetch_from, ready_s,
                      kv_bytes / codec.kv_ratio + state_bytes / codec.state_ratio, codec.name)

    def _side(self, nodes: Sequence[NodeView], matches: Mapping[str, HeldBlocks],
              tokens: int) -> _Side:
        """Return what a cluster holds. A prefill computes at least the last token of a prompt."""
        if not nodes:
            return _NO_NODES
        if not matches:
            return _Side(0, "", 0, {0: min(nodes, key=_queue_s)})
        first: dict[int, NodeView] = {}
        kv_blocks = 0
        for node in nodes:
            held = matches.get(node.name)
            usable_blocks = 0
            if held is not None:
                usable_blocks = held.usable_blocks
                if held.kv_blocks > kv_blocks:
                    kv_blocks = held.kv_blocks
            known = first.get(usable_blocks)
            if known is None or node.queue_s < known.queue_s:
                first[usable_blocks] = node
        longest = max(first)
        return _Side(min(longest * self._block_tokens, tokens - 1),
                     first[longest].name if longest else "",
                     min(kv_blocks * self._block_tokens, tokens), first)

    def _node(self, side: _Side, profile: ModelProfile,
              tokens: int) -> tuple[NodeView, int, float]:
        """Return the node that would be done first, its usable prefix and its prefill time."""
        if not side.cached_node:
            return side.first[0], 0, profile.prefill_s(tokens)
        best, best_s = None, math.inf
        for usable_blocks, node in side.first.items():
            cached = min(usable_blocks * self._block_tokens, tokens - 1)
            prefill_s = profile.prefill_s(tokens - cached, cached)
            if best is None or node.queue_s + prefill_s < best_s:
                best, best_s = (node, cached, prefill_s), node.queue_s + prefill_s
        return best


_NO_MATCHES: Mapping[str, HeldBlocks] = {}
_queue_s = attrgetter("queue_s")
_NO_NODES = _Side(0, "", 0, {})
