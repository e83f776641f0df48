"""A cluster's prefix pool as a simulation sees it: one pool, that all nodes of a cluster reach.

It is `kvwire.prfaas.pool.PrefixPool` itself, without bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvwire.prfaas.pool.blocks import BlockGeometry, Match
from kvwire.prfaas.pool.eviction import CostAware, Lru
from kvwire.prfaas.pool.metadata import NodeMatch
from kvwire.prfaas.pool.pool import PrefixPool
from kvwire.prfaas.profiles import ModelProfile

__all__ = ["CacheHold", "ClusterCache", "ClusterIndex"]


class CacheHold:
    """What one request uses and will add in a pool; its end gives all of it back.

    Attributes:
        usable_tokens: need no prefill: their KV and the states of exactly this length are there.
        kv_tokens: leading tokens whose KV is there.
    """

    def __init__(self, cache: ClusterCache, hashes: Sequence[bytes], tail_tokens: int):
        pool = cache.pool
        checkpoints = pool.boundaries(hashes) if cache.branch_checkpoints else None
        self.hashes = hashes
        self._cache = cache
        self._lease = pool.lease(hashes)
        self._room = pool.reserve(hashes, checkpoints=checkpoints)
        self._tail = pool.reserve_transfer(tail_tokens) if tail_tokens else None
        self.usable_tokens = self._lease.tokens
        start = self._room.start if self._room is not None else self._lease.blocks
        self.kv_tokens = start * pool.geometry.block_tokens

    def commit(self) -> None:
        """The request's blocks are all there: others may use them from now on."""
        if self._room is not None and self._room.held:
            self._room.commit().release()

    def release(self) -> None:
        """Give back what is still held; nothing uncommitted was ever matched. Idempotent."""
        self._lease.release()
        if self._room is not None:
            self._room.abort()
        if self._tail is not None:
            self._tail.drop()


@dataclass
class ClusterCache:
    """The pool of one cluster.

    Attributes:
        branch_checkpoints: keep states also where a prompt leaves an earlier one, not only at
            its end.
    """

    pool: PrefixPool
    branch_checkpoints: bool

    @classmethod
    def of_bytes(cls, profile: ModelProfile, capacity_bytes: float, block_tokens: int, *,
                 cost_aware: bool) -> ClusterCache:
        """Return an empty cache; `cost_aware` is kvwire's way, else LRU as published."""
        geometry = BlockGeometry.of_sizes(block_tokens, profile.kv_bytes_per_token,
                                          profile.state_bytes)
        policy = CostAware(lambda cached, total: profile.prefill_s(total - cached, cached))
        capacity_blocks = max(1, int(capacity_bytes / geometry.block_bytes))
        return cls(PrefixPool(geometry, capacity_blocks, policy=policy if cost_aware else Lru(),
                              clock=lambda: 0.0), cost_aware)

    @property
    def hold_count(self) -> int:
        """Leases, reservations and transfer blocks that have not ended."""
        return self.pool.stats().holds

    def match(self, hashes: Sequence[bytes]) -> Match:
        """Return what is there of a prompt."""
        return self.pool.match(hashes)

    def hold(self, hashes: Sequence[bytes], tail_tokens: int = 0) -> CacheHold:
        """Hold what is there of a prompt, and room for what is not.

        Args:
            tail_tokens: after the last full block, to be kept until they were transferred.
        """
        return CacheHold(self, hashes, tail_tokens)

    def lose(self) -> int:
        """Forget everything that nobody holds, as a restarted store does; returns the blocks."""
        return self.pool.evict(self.pool.capacity_blocks)


class ClusterIndex:
    """The router's `PrefixIndex` over both pools: what a cluster holds, all its nodes hold."""

    def __init__(self, nodes: dict[str, list[str]], caches: dict[str, ClusterCache]):
        self._clusters = [(nodes[name], cache) for name, cache in caches.items()]

    def match(self, tenant_key: bytes, hashes: Sequence[bytes]) -> dict[str, NodeMatch]:
        """See `PrefixIndex.match`."""
        found = {}
        for names, cache in self._clusters:
            kv_blocks, _, usable_tokens = cache.match(hashes)
            if kv_blocks:
                held = NodeMatch(kv_blocks, usable_tokens // cache.pool.geometry.block_tokens)
                for name in names:
                    found[name] = held
        return found
