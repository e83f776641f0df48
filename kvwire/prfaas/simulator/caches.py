"""A cluster's prefix pools as a simulation sees them: one that all its nodes reach, or one on each.

They are `kvwire.prfaas.pool.PrefixPool` itself, without bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvwire.prfaas.pool.blocks import BlockGeometry
from kvwire.prfaas.pool.eviction import CostAware, EvictionPolicy, Lru
from kvwire.prfaas.pool.metadata import NodeMatch
from kvwire.prfaas.pool.pool import PrefixPool
from kvwire.prfaas.profiles import ModelProfile

__all__ = ["CacheHold", "ClusterCache", "ClusterIndex"]


class CacheHold:
    """What one request, or copy, uses and will add in a pool; its end gives all of it back.

    Attributes:
        fits: there is room for all that the pool lacks.
        usable_tokens: need no prefill: their KV and the states of exactly this length are there.
        kv_tokens: leading tokens whose KV is there.
    """

    def __init__(self, pool: PrefixPool, hashes: Sequence[bytes], tail_tokens: int = 0,
                 branch_checkpoints: bool = False):
        checkpoints = pool.boundaries(hashes) if branch_checkpoints else None
        self._lease = pool.lease(hashes)
        self._room = pool.reserve(hashes, checkpoints=checkpoints)
        self._tail = pool.reserve_transfer(tail_tokens) if tail_tokens else None
        self.fits = self._room is not None
        self.usable_tokens = self._lease.tokens
        start = self._room.start if self.fits else self._lease.blocks
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
    """The pools of one cluster.

    Attributes:
        pools: one for all nodes, or one for each prefill node.
        branch_checkpoints: keep states also where a prompt leaves an earlier one, not only at
            its end.
    """

    pools: Sequence[PrefixPool]
    branch_checkpoints: bool

    @classmethod
    def of_bytes(cls, profile: ModelProfile, capacity_bytes: float, block_tokens: int, *,
                 cost_aware: bool, pool_count: int = 1) -> ClusterCache:
        """Return an empty cache; `cost_aware` is kvwire's way, else LRU as published.

        Args:
            pool_count: 1, or as many as prefill nodes, among which the capacity is shared out.
        """
        geometry = BlockGeometry.of_sizes(block_tokens, profile.kv_bytes_per_token,
                                          profile.state_bytes)
        capacity_blocks = max(1, int(capacity_bytes / pool_count / geometry.block_bytes))

        def policy() -> EvictionPolicy:
            if not cost_aware:
                return Lru()
            return CostAware(lambda cached, total: profile.prefill_s(total - cached, cached))

        return cls([PrefixPool(geometry, capacity_blocks, policy=policy(), clock=lambda: 0.0)
                    for _ in range(pool_count)], cost_aware)

    @property
    def hold_count(self) -> int:
        """Leases, reservations and transfer blocks that have not ended."""
        return sum(pool.stats().holds for pool in self.pools)

    def pool_of(self, node: int) -> PrefixPool:
        """Return the pool that a node reaches."""
        return self.pools[node % len(self.pools)]

    def hold(self, hashes: Sequence[bytes], node: int, tail_tokens: int = 0) -> CacheHold:
        """Hold what a node has of a prompt, and room for what it has not.

        Args:
            tail_tokens: after the last full block, to be kept until they were transferred.
        """
        return CacheHold(self.pool_of(node), hashes, tail_tokens, self.branch_checkpoints)

    def home(self, hashes: Sequence[bytes]) -> int:
        """Return the node that has most of a prompt, any of them where several have: where a cache
        belongs that comes from the other cluster."""
        if len(self.pools) == 1 or not hashes:
            return 0
        held = [pool.match(hashes).kv_blocks for pool in self.pools]
        most = [node for node, blocks in enumerate(held) if blocks == max(held)]
        return most[int.from_bytes(hashes[-1], "little") % len(most)]

    def lose(self) -> int:
        """Forget everything that nobody holds, as a restarted store does; returns the blocks."""
        return sum(pool.evict(pool.capacity_blocks) for pool in self.pools)


class ClusterIndex:
    """The router's `PrefixIndex` over all pools: nodes hold what the pool holds that they reach."""

    def __init__(self, nodes: dict[str, list[str]], caches: dict[str, ClusterCache]):
        self._pools = [(nodes[name][number::len(cache.pools)], pool)
                       for name, cache in caches.items()
                       for number, pool in enumerate(cache.pools)]

    def match(self, tenant_key: bytes, hashes: Sequence[bytes]) -> dict[str, NodeMatch]:
        """See `PrefixIndex.match`."""
        found = {}
        for names, pool in self._pools:
            kv_blocks, _, usable_tokens = pool.match(hashes)
            if kv_blocks:
                held = NodeMatch(kv_blocks, usable_tokens // pool.geometry.block_tokens)
                for name in names:
                    found[name] = held
        return found
