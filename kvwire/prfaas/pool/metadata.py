"""Which node holds which prefix: `GlobalIndex`, and `EmbeddedIndex`, which needs no server.

The index is a hint: it may lag behind the pools. What it says decides where a request goes, never
what is served; a pool that no longer has a prefix says so, and the request is prefilled.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from kvwire.errors import UsageError
from kvwire.prfaas.pool.blocks import Chain

__all__ = ["EmbeddedIndex", "GlobalIndex", "NodeMatch"]


class NodeMatch(NamedTuple):
    """What one node holds of a prompt, in blocks from the first.

    Attributes:
        kv_blocks: blocks of KV.
        usable_blocks: up to the longest checkpoint within them; all, if the index was told that
            the model has no states.
    """

    kv_blocks: int
    usable_blocks: int


class GlobalIndex(Protocol):
    """The metadata of all pools. A node is named "cluster/node"; its cluster is what comes first.

    Every method may be called from any thread.
    """

    def publish(self, node: str, chain: Chain, hashes: Sequence[bytes],
                states: Sequence[bytes] = ()) -> None:
        """Say that `node` holds blocks of KV, and checkpoints at the ends of `states`."""

    def withdraw(self, node: str, chain: Chain, hashes: Sequence[bytes], *,
                 states_only: bool = False) -> None:
        """Say that `node` has lost blocks, or with `states_only` the checkpoints at their ends."""

    def announce(self, node: str) -> bool:
        """Say that `node` lives; False when all that it has said may be lost."""

    def forget(self, node: str) -> None:
        """Drop all that `node` has said: it is gone, or begins anew."""

    def match(self, tenant_key: bytes, hashes: Sequence[bytes]) -> dict[str, NodeMatch]:
        """Return what each node holds of a prompt; nodes that hold nothing are left out."""


class _Tenant:
    """The nodes that hold each block, and its checkpoint, as sets of bits."""

    __slots__ = ("blocks", "states")

    def __init__(self):
        self.blocks: dict[bytes, int] = {}
        self.states: dict[bytes, int] = {}


class EmbeddedIndex:
    """The global index in this process's memory.

    Args:
        states: the models have states; False: every block that is held can be used.

    Cost: a match halves the prompt for each depth at which a node's holding ends, since what a pool
    holds is always a prefix; then it looks back for the checkpoint. Reads take no lock.
    """

    def __init__(self, *, states: bool = True):
        self._with_states = states
        self._tenants: dict[bytes, _Tenant] = {}
        self._bits: dict[str, int] = {}
        self._names: dict[int, str] = {}   # replaced, not changed: matches read it
        self._lock = threading.Lock()

    def publish(self, node: str, chain: Chain, hashes: Sequence[bytes],
                states: Sequence[bytes] = ()) -> None:
        with self._lock:
            tenant = self._tenants.setdefault(chain.tenant_key, _Tenant())
            bit = self._bit(node)
            _add(tenant.blocks, hashes, bit)
            _add(tenant.states, states, bit)

    def withdraw(self, node: str, chain: Chain, hashes: Sequence[bytes], *,
                 states_only: bool = False) -> None:
        with self._lock:
            tenant, bit = self._tenants.get(chain.tenant_key), self._bits.get(node)
            if tenant is None or bit is None:
                return
            _remove(tenant.states, hashes, bit)
            if not states_only:
                _remove(tenant.blocks, hashes, bit)
            if not tenant.blocks and not tenant.states:
                del self._tenants[chain.tenant_key]

    def announce(self, node: str) -> bool:
        return True  # it lives as long as its nodes do

    def forget(self, node: str) -> None:
        with self._lock:
            bit = self._bits.pop(node, None)
            if bit is None:
                return
            self._names = {bit: name for name, bit in self._bits.items()}
            for key, tenant in list(self._tenants.items()):
                for table in (tenant.blocks, tenant.states):
                    _remove(table, [name for name, held in table.items() if held & bit], bit)
                if not tenant.blocks and not tenant.states:
                    del self._tenants[key]

    def nodes(self) -> list[str]:
        """Return the nodes that have published."""
        return sorted(self._bits)

    def block_count(self) -> int:
        """Return how many different blocks are known."""
        with self._lock:
            return sum(len(tenant.blocks) for tenant in self._tenants.values())

    def match(self, tenant_key: bytes, hashes: Sequence[bytes]) -> dict[str, NodeMatch]:
        tenant, names = self._tenants.get(tenant_key), self._names
        if tenant is None or not hashes:
            return {}
        found = {}
        known = tenant.blocks.get
        holders, low = known(hashes[0], 0), 1
        while holders:
            # The longest stretch from `low` on that all these nodes hold, by halving.
            middle, high = len(hashes) - 1, len(hashes)
            while low < high:
                if known(hashes[middle], 0) & holders == holders:
                    low = middle + 1
                else:
                    high = middle
                middle = (low + high) // 2
            ended = holders & ~known(hashes[low], 0) if low < len(hashes) else holders
            for bit in _bits_of(ended):
                if bit in names:
                    found[names[bit]] = NodeMatch(low, self._usable(tenant, hashes, low, bit))
            holders &= ~ended
        return found

    def _usable(self, tenant: _Tenant, hashes: Sequence[bytes], blocks: int, bit: int) -> int:
        if not self._with_states:
            return blocks
        known = tenant.states.get
        while blocks and not known(hashes[blocks - 1], 0) & bit:
            blocks -= 1
        return blocks

    def _bit(self, node: str) -> int:
        bit = self._bits.get(node)
        if bit is None:
            if not isinstance(node, str) or not node:
                raise UsageError(f"node is {node!r}; it must be a name, as 'cluster/node'")
            taken = set(self._bits.values())
            bit = next(1 << number for number in range(len(taken) + 1)
                       if 1 << number not in taken)
            self._bits[node] = bit
            self._names = {bit: name for name, bit in self._bits.items()}
        return bit


def _add(table: dict[bytes, int], names: Iterable[bytes], bit: int) -> None:
    for name in names:
        table[name] = table.get(name, 0) | bit


def _remove(table: dict[bytes, int], names: Iterable[bytes], bit: int) -> None:
    for name in names:
        left = table.get(name, 0) & ~bit
        if left:
            table[name] = left
        else:
            table.pop(name, None)


def _bits_of(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low
        mask ^= low
