"""What a pool holds: blocks of KV in a tree of prefixes, and state checkpoints at their ends.

Attention KV is kept per block and matches in part; the recurrent states (and sliding windows) of a
prefix are kept per checkpoint and match at exactly their length. Both lie in blocks of one size,
the pool's unit: a block of KV takes one, a checkpoint `BlockGeometry.state_blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kvwire.errors import UsageError

__all__ = ["Block", "BlockGeometry", "Chain", "Checkpoint", "Match"]


@dataclass(frozen=True)
class BlockGeometry:
    """The sizes of a pool.

    Attributes:
        block_tokens: tokens of one block of KV.
        block_bytes: bytes of one block of KV in all layers, the unit of the pool.
        state_blocks: units that a checkpoint takes; 0: the model has no states, and any number of
            its KV blocks can be used.
    """

    block_tokens: int
    block_bytes: int
    state_blocks: int = 0

    def __post_init__(self):
        for field, least in (("block_tokens", 1), ("block_bytes", 1), ("state_blocks", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{field} is {value!r}; it must be an integer of at least {least}")

    @classmethod
    def of_sizes(cls, block_tokens: int, kv_bytes_per_token: int, state_bytes: int
                 ) -> BlockGeometry:
        """Return the geometry of a model that is known by its sizes only."""
        block_bytes = block_tokens * kv_bytes_per_token
        if block_bytes < 1:
            raise UsageError(f"blocks of {block_tokens} tokens of {kv_bytes_per_token} bytes hold "
                             "nothing; a model without attention KV has no prefix blocks")
        return cls(block_tokens, block_bytes, -(-state_bytes // block_bytes))


class Match(NamedTuple):
    """What a pool holds of a prompt.

    Attributes:
        kv_blocks: how many of its first blocks.
        state_length: tokens up to the longest checkpoint within them; of a model without states
            all their tokens.
        usable_tokens: tokens that need no prefill. States bind: it equals `state_length`.
    """

    kv_blocks: int
    state_length: int
    usable_tokens: int


class Chain(NamedTuple):
    """Whose prefix it is, and the hash of its first block."""

    tenant_key: bytes
    head: bytes


class Entry:
    """What can be evicted by itself; a policy stamps it, the pool counts references.

    Attributes:
        references: of leases and reservations; an entry with any stays.
        used, uses: the policy's: a stamp of the last use, and how often.
        queued: number of the entry's newest place in the eviction queue, 0 for none.
    """

    __slots__ = ("references", "used", "uses", "queued")

    def __init__(self):
        self.references, self.used, self.uses, self.queued = 0, 0.0, 0, 0

    @property
    def evictable(self) -> bool:
        """Nothing needs it now."""
        raise NotImplementedError

    def worth(self, geometry: BlockGeometry) -> tuple[int, int, int] | None:
        """Return whose prefill it saves, from block to block, and the blocks of memory that go
        with it; None: without what is gone it saves nothing."""
        raise NotImplementedError


class Block(Entry):
    """One full block of KV. Its ancestors outlive it, so that what is held is always a prefix.

    Attributes:
        depth: blocks of the prefix that ends with it.
        children: blocks that follow it in the pool.
        state: the checkpoint at its end, or None.
        slot: where the bytes lie in the pool's memory.
    """

    __slots__ = ("hash", "parent", "depth", "chain", "children", "state", "slot")

    def __init__(self, name: bytes, parent: Block | None, depth: int, chain: Chain, slot: int):
        super().__init__()
        self.hash, self.parent, self.depth, self.chain = name, parent, depth, chain
        self.children, self.state, self.slot = 0, None, slot

    @property
    def evictable(self) -> bool:
        return not (self.references or self.children or self.state)

    def worth(self, geometry: BlockGeometry) -> tuple[int, int, int] | None:
        return None if geometry.state_blocks else (self.depth - 1, self.depth, 1)


class Checkpoint(Entry):
    """The states after the last token of a block."""

    __slots__ = ("block", "slots")

    def __init__(self, block: Block, slots: tuple[int, ...]):
        super().__init__()
        self.block, self.slots = block, slots

    @property
    def evictable(self) -> bool:
        return not self.references

    def worth(self, geometry: BlockGeometry) -> tuple[int, int, int] | None:
        start, run = self._back_to_checkpoint()
        return start, self.block.depth, geometry.state_blocks + run

    def _back_to_checkpoint(self) -> tuple[int, int]:
        """Return the depth of the nearest checkpoint before this one, and the blocks of KV that
        would be worth nothing without this one."""
        run, block = 0, self.block
        alone = not (block.children or block.references)
        at: Block | None = block
        while at is not None:
            run += alone
            at = at.parent
            if at is None or at.state is not None:
                break
            alone = alone and at.children == 1 and not at.references
        return (0 if at is None else at.depth), run
