"""Copies of prefixes that are hot where they are not: which to make, and when it has paid.

arXiv 2604.15039 section 3.2 has its cache manager rebalance hotspots and says no more. The rule
here is that of renting and buying: each time a request is prefilled on a node that lacks what
another node has, the seconds that this cost count for a copy to that node, and once they reach what
the copy takes on the network, it is made. So copies never take longer than what was lost without
them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from kvwire.errors import UsageError
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.router import RouteDecision, RouteRequest, Target
from kvwire.prfaas.view import PrefixIndex

__all__ = ["PrefixCopy", "Rebalancer"]


class PrefixCopy(NamedTuple):
    """A prefix to bring to a node, with `pool.remote_fetch`.

    Attributes:
        block_hashes: of the prefix, from its first block.
        source, target: nodes.
        lost_s: prefill seconds that its absence has cost.
        copy_s: what the copy costs.
    """

    tenant_key: bytes
    block_hashes: Sequence[bytes]
    source: str
    target: str
    lost_s: float
    copy_s: float


class Rebalancer:
    """Says which prefixes to copy. Not locked: one thread calls it, behind the requests.

    Every copy that it returns must end in `done`; until then no other of the same prefix to the
    same node is asked for.

    Args:
        index: which node holds which prefix.
        block_tokens: of one of its blocks.
        profiles: of the model in each cluster.
        copy_gbps: what a copy gets of the network, between nodes of one cluster and from the other.
        half_life_s: after so long a loss counts half: what was hot once is not copied for it.
        entries_max: pairs of node and prefix that are remembered, the latest ones.
    """

    def __init__(self, index: PrefixIndex, block_tokens: int,
                 profiles: dict[Target, ModelProfile], copy_gbps: float, *,
                 half_life_s: float = 600.0, entries_max: int = 65_536):
        if not copy_gbps > 0 or not half_life_s > 0 or entries_max < 1:
            raise UsageError(f"copy_gbps is {copy_gbps}, half_life_s {half_life_s}, entries_max "
                             f"{entries_max}; all must be above 0")
        self._index, self._block_tokens, self._profiles = index, block_tokens, profiles
        self._copy_gbps, self._half_life_s = copy_gbps, half_life_s
        self._entries_max = entries_max
        self._lost: OrderedDict[tuple[str, bytes], tuple[float, float]] = OrderedDict()
        self._copying: set[tuple[str, bytes]] = set()

    def note(self, now_s: float, request: RouteRequest, decision: RouteDecision
             ) -> PrefixCopy | None:
        """Learn of a decision; return the copy that has now paid for itself.

        Over the link between the clusters nothing is copied while its bandwidth is scarce.
        """
        cached = decision.cached_tokens
        own = (decision.cached_tokens_remote if decision.target is Target.REMOTE
               else decision.cached_tokens_local)
        known = own
        if decision.abundant:
            known = max(decision.cached_tokens_local, decision.cached_tokens_remote)
        blocks = min(known // self._block_tokens, len(request.block_hashes))
        if known <= cached or not blocks:
            return None
        profile, tokens = self._profiles[decision.target], request.tokens
        key = decision.node, request.block_hashes[blocks - 1]
        if key in self._copying:
            return None
        lost_s = self._so_far(now_s, key) + max(0.0, (
            profile.prefill_s(tokens - cached, cached)
            - profile.prefill_s(tokens - known, known)))
        copy_s = profile.wire_bytes(known, cached) * GBPS / self._copy_gbps
        if lost_s >= copy_s:
            source = self._source(request, decision.node, blocks)
            if source:
                self._copying.add(key)
                return PrefixCopy(request.tenant_key, request.block_hashes[:blocks], source,
                                  decision.node, lost_s, copy_s)
        self._remember(now_s, key, lost_s)
        return None

    def done(self, copy: PrefixCopy) -> None:
        """The copy was made, or failed: the next one must pay for itself from the beginning."""
        self._copying.discard((copy.target, copy.block_hashes[-1]))

    def _so_far(self, now_s: float, key: tuple[str, bytes]) -> float:
        lost_s, then_s = self._lost.pop(key, (0.0, now_s))
        return lost_s * 0.5 ** ((now_s - then_s) / self._half_life_s)

    def _remember(self, now_s: float, key: tuple[str, bytes], lost_s: float) -> None:
        self._lost[key] = lost_s, now_s
        if len(self._lost) > self._entries_max:
            self._lost.popitem(last=False)

    def _source(self, request: RouteRequest, target: str, blocks: int) -> str:
        """Return a node that holds all of it, "" where that has gone meanwhile."""
        held = self._index.match(request.tenant_key, request.block_hashes)
        return next((name for name, found in sorted(held.items())
                     if name != target and found.usable_blocks >= blocks), "")
