"""Where a request is prefilled: in the remote cluster or here, and on which node.

Source: arXiv 2604.15039 section 3.3 (length threshold, two bandwidth regimes). Rule.PRICED is
kvwire's own: states travel whole, so a short append behind a long cached prefix costs the link as
much as a long request of the published rule; it is judged by what it costs, not by its length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from kvwire.errors import UsageError
from kvwire.prfaas import codecs
from kvwire.prfaas.codecs import CodecOption
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.view import ClusterView, NodeView, PrefixIndex, PrefixMatch

__all__ = ["RouteDecision", "RouteRequest", "Router", "Rule", "Target"]

LINK_FULL = "link full"


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
        block_hashes: the chained hashes of its full blocks, as the engines compute them (keyed
            by tenant, model, spec and tokenizer, see `pool.hashes`).
        tenant: for people; the hashes are what keeps tenants apart.
        ttft_max_s: the goal for the first token.
        lossy: this tenant allows lossy codecs.
    """

    tokens: int
    block_hashes: Sequence[bytes] = ()
    tenant: str = ""
    ttft_max_s: float = math.inf
    lossy: bool = False


class RouteDecision(NamedTuple):
    """Where a request goes, and why.

    Attributes:
        target, node: who prefills.
        reason: "threshold" (the rule said so), "remote down", "no remote node", "no local node" or
            "link full" (the rule wanted the remote cluster, the link admits no such transfer now).
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
    """One cluster for one request: its longest prefixes and what its nodes hold."""

    cached_tokens: int
    cached_node: str
    kv_tokens: int
    matches: dict[str, PrefixMatch]


class Router:
    """Routes requests. Pure logic without I/O; any number of threads may call `route` at once.

    Args:
        index: which node holds which prefix.
        remote, local: the model's profile in each cluster.
        rule: how cached prefixes are judged.
        options: codecs that a transfer may use, least work first.
    """

    def __init__(self, index: PrefixIndex, remote: ModelProfile, local: ModelProfile, *,
                 rule: Rule = Rule.PRICED,
                 options: Sequence[CodecOption] = codecs.EXACT_OPTIONS):
        if not any(option.exact for option in options):
            raise UsageError("options hold no exact codec")
        self._index = index
        self._remote = remote
        self._local = local
        self._rule = Rule(rule)
        self._options = tuple(options)

    def route(self, request: RouteRequest, view: ClusterView) -> RouteDecision:
        """Decide for one request.

        Raises:
            UsageError: the request has no token, or neither cluster has a node.
        """
        tokens = request.tokens
        if tokens < 1:
            raise UsageError(f"the request has {tokens} tokens; at least 1 is needed")
        matches = self._index.match(request.block_hashes) if request.block_hashes else ()
        local = _side(view.local, matches, tokens)
        remote = _side(view.remote, matches, tokens) if view.remote_up else _NOTHING
        longest = max(local.cached_tokens, remote.cached_tokens)
        cached_here = longest if view.abundant else local.cached_tokens
        cached_there = longest if view.abundant else remote.cached_tokens
        target, reason = self._choose(view)
        codec, wire_bytes = None, 0.0
        if target is None or target is Target.REMOTE:
            prefill_s = self._remote.prefill_s(tokens - cached_there, cached_there)
            codec, wire_bytes = self._transfer(request, view, local.kv_tokens, prefill_s)
        if target is None:
            target, reason = self._judge(view, tokens, cached_here, cached_there, wire_bytes)
        return self._decide(request, view, target, reason, local, remote, tokens - cached_here,
                            codec, wire_bytes)

    def _choose(self, view: ClusterView) -> tuple[Target | None, str]:
        """What needs no rule: one of the clusters cannot be used."""
        if not view.remote_up or not view.remote:
            if not view.local:
                raise UsageError("neither cluster has a prefill node that can take a request")
            return Target.LOCAL, "no remote node" if view.remote_up else "remote down"
        return (None, "") if view.local else (Target.REMOTE, "no local node")

    def _judge(self, view: ClusterView, tokens: int, cached_local: int, cached_remote: int,
               wire_bytes: float) -> tuple[Target, str]:
        threshold = view.threshold_tokens
        cold = not (cached_local or cached_remote)
        if self._rule is Rule.PUBLISHED or cold or not 0 < threshold < math.inf:
            offload = tokens - cached_local > threshold
        else:
            saved_s = self._local.prefill_s(tokens - cached_local, cached_local)
            worth_s = self._local.prefill_s(threshold)
            if view.abundant:
                cost = self._remote.prefill_s(tokens - cached_remote, cached_remote)
                offload = saved_s * self._remote.prefill_s(threshold) > worth_s * cost
            else:
                # The ratios of the codec cancel but for their mix; raw bytes on both sides.
                cost = self._remote.wire_bytes(tokens, cached_local)
                offload = saved_s * self._remote.wire_bytes(threshold) > worth_s * cost
        if not offload:
            return Target.LOCAL, "threshold"
        if wire_bytes > view.admit_bytes:
            return Target.LOCAL, LINK_FULL
        return Target.REMOTE, "threshold"

    def _transfer(self, request: RouteRequest, view: ClusterView, held: int,
                  prefill_s: float) -> tuple[CodecOption, float]:
        """Return the codec of the transfer after a remote prefill, and its bytes on the wire."""
        profile = self._remote
        kv_bytes = profile.kv_bytes_per_token * (request.tokens - held)
        codec = codecs.choose(self._options, kv_bytes, profile.state_bytes, prefill_s,
                              view.link_gbps, late_s=view.backlog_s,
                              ttft_max_s=request.ttft_max_s, scarce=not view.abundant,
                              lossy=request.lossy)
        wire_bytes = kv_bytes / codec.kv_ratio + profile.state_bytes / codec.state_ratio
        return codec, wire_bytes

    def _decide(self, request: RouteRequest, view: ClusterView, target: Target, reason: str,
                local: _Side, remote: _Side, uncached: int, codec: CodecOption | None,
                wire_bytes: float) -> RouteDecision:
        is_remote = target is Target.REMOTE
        own, other = (remote, local) if is_remote else (local, remote)
        profile = self._remote if is_remote else self._local
        node, cached, prefill_s = _node(view.remote if is_remote else view.local, own, profile,
                                        request.tokens)
        fetch_tokens, fetch_from = 0, ""
        if view.abundant and other.cached_tokens > cached:
            fetched_s = profile.prefill_s(request.tokens - other.cached_tokens,
                                          other.cached_tokens)
            if self._rule is Rule.PUBLISHED or self._worth_fetching(
                    view, own, other, prefill_s - fetched_s):
                fetch_tokens, fetch_from = other.cached_tokens - cached, other.cached_node
                cached, prefill_s = other.cached_tokens, fetched_s
        return RouteDecision(
            target, node.name, reason, request.tokens, view.threshold_tokens, view.abundant,
            self._rule, uncached, local.cached_tokens, remote.cached_tokens, cached, fetch_tokens,
            fetch_from, local.kv_tokens,
            wire_bytes if is_remote or reason == LINK_FULL else 0.0,
            codec.name if is_remote else "", node.queue_s, prefill_s)

    def _worth_fetching(self, view: ClusterView, own: _Side, other: _Side,
                        saved_s: float) -> bool:
        """A fetch must take less than the prefill that it saves, and be admitted."""
        held = min(own.kv_tokens, other.cached_tokens)
        fetch_bytes = self._local.wire_bytes(other.cached_tokens, held)
        fetch_s = view.backlog_s + fetch_bytes * GBPS / view.link_gbps
        return fetch_s < saved_s and fetch_bytes <= view.admit_bytes


_NOTHING = _Side(0, "", 0, {})


def _side(nodes: Sequence[NodeView], matches: Sequence[PrefixMatch], tokens: int) -> _Side:
    """Return what a cluster holds. A prefill computes at least the last token of a prompt."""
    if not matches:
        return _NOTHING
    names = {node.name for node in nodes}
    here = {match.node: match for match in matches if match.node in names}
    if not here:
        return _NOTHING
    best = max(here.values(), key=lambda match: match.usable_tokens)
    return _Side(min(best.usable_tokens, tokens - 1), best.node,
                 min(max(match.kv_tokens for match in here.values()), tokens), here)


def _node(nodes: Sequence[NodeView], side: _Side, profile: ModelProfile,
          tokens: int) -> tuple[NodeView, int, float]:
    """Return the node that would finish first, its usable prefix and its prefill time."""
    matches = side.matches
    cold = min((node for node in nodes if node.name not in matches),
               key=lambda node: node.queue_s, default=None)
    best = None
    if cold is not None:
        prefill_s = profile.prefill_s(tokens)
        best = cold.queue_s + prefill_s, cold, 0, prefill_s
    if matches:
        for node in nodes:
            match = matches.get(node.name)
            if match is None:
                continue
            cached = min(match.usable_tokens, tokens - 1)
            prefill_s = profile.prefill_s(tokens - cached, cached)
            if best is None or node.queue_s + prefill_s < best[0]:
                best = node.queue_s + prefill_s, node, cached, prefill_s
    return best[1:]
