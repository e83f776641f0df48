"""What holds blocks of a pool for a while: leases, reservations and transfer blocks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from kvwire.errors import UsageError
from kvwire.prfaas.pool.blocks import Block, Chain, Checkpoint

if TYPE_CHECKING:
    from kvwire.prfaas.pool.pool import PrefixPool

__all__ = ["Lease", "Reservation", "TransferBlocks"]


class Hold:
    """Base of all three: held until ended, by its owner or, after its deadline, by the pool.

    Attributes:
        deadline_s: on the pool's clock; infinity: until released.
    """

    def __init__(self, pool: PrefixPool, deadline_s: float = math.inf):
        self._pool = pool
        self.deadline_s = deadline_s
        self.held = True

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.end(self)


class Lease(Hold):
    """A prefix that stays in the pool while it is held.

    What was read under a lease counts only if the lease is still `held` after reading: the pool
    takes an overdue lease back when it needs room.

    Attributes:
        blocks: of KV, from the first of the prompt.
        tokens: of these blocks; there is a checkpoint at exactly this length, if the model has
            states and this is not 0.
    """

    def __init__(self, pool: PrefixPool, tail: Block | None, state: Checkpoint | None,
                 deadline_s: float):
        super().__init__(pool, deadline_s)
        self.tail, self.state = tail, state
        self.blocks = tail.depth if tail else 0
        self.tokens = self.blocks * pool.geometry.block_tokens
        self.state_slots = state.slots if state else ()

    def release(self) -> None:
        """Give the prefix back. Idempotent."""
        self._pool.end(self)

    def chain(self) -> list[Block]:
        """Return the blocks, from the first: where they lie, and what they are."""
        self.check()
        found, block = [], self.tail
        while block is not None:
            found.append(block)
            block = block.parent
        return found[::-1]

    def check(self) -> None:
        """Raise UsageError unless the lease is held."""
        if not self.held:
            raise UsageError("the lease was released, or its deadline passed and the pool took "
                             "its blocks back: ask for the prefix again")


class Reservation(Hold):
    """Room for the new blocks of a prefix, which nobody can match until it is committed.

    Attributes:
        start: blocks that the pool has already; of these only missing checkpoints are reserved.
        slots: of the blocks from `start` on.
        checkpoints: {depth in blocks: slots} of the checkpoints that are to be filled.
    """

    def __init__(self, pool: PrefixPool, hashes: list[bytes], chain: Chain, tail: Block | None,
                 slots: list[int], checkpoints: dict[int, tuple[int, ...]]):
        super().__init__(pool)
        self.hashes, self.owner, self.tail = hashes, chain, tail
        self.start = tail.depth if tail else 0
        self.slots, self.checkpoints = slots, checkpoints

    def commit(self, lease_s: float | None = None) -> Lease:
        """Make it match: call it when all bytes are in place.

        What another reservation has committed meanwhile is kept, and the room for it given back.

        Returns: a lease on the longest usable part of the prefix.
        """
        return self._pool.commit(self, lease_s)

    def abort(self) -> None:
        """Give the room back; nothing of it was ever matched. Idempotent."""
        self._pool.end(self)


class TransferBlocks(Hold):
    """Room for the cache of a request on its way: any length, never matched, then dropped.

    Attributes:
        tokens: of the KV, rounded up to blocks in `slots`.
    """

    def __init__(self, pool: PrefixPool, tokens: int, slots: list[int],
                 state_slots: tuple[int, ...], deadline_s: float):
        super().__init__(pool, deadline_s)
        self.tokens, self.slots, self.state_slots = tokens, slots, state_slots

    def drop(self) -> None:
        """Give the room back. Idempotent."""
        self._pool.end(self)
