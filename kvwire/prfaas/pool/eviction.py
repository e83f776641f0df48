"""Which entry of a full pool goes first.

The pool keeps what can go in a queue of rising priority, and takes the lowest. Only the ends of the
tree can go: checkpoints, and blocks of KV that have neither a follower nor a checkpoint. A parent
that becomes an end takes over the newer stamp and the uses of the child that made way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from kvwire.prfaas.pool.blocks import Block, BlockGeometry, Checkpoint, Entry

__all__ = ["CostAware", "EvictionPolicy", "Lru"]


class EvictionPolicy(Protocol):
    """One object serves one pool."""

    def used(self, entry: Entry) -> None:
        """Stamp an entry that was inserted or hit."""

    def added(self, checkpoint: Checkpoint) -> Iterable[Entry]:
        """Return the entries whose priority a new checkpoint has changed."""

    def priority(self, entry: Entry, geometry: BlockGeometry) -> float:
        """Return the priority to stay: it may rise as long as the entry is not used, not fall."""

    def evicted(self, priority: float) -> None:
        """Learn what the entry was worth that has just been evicted."""


class Lru:
    """The least recently used entry goes first, whatever it is."""

    def __init__(self):
        self._now = 0

    def used(self, entry: Entry) -> None:
        self._now += 1
        entry.used = self._now

    def added(self, checkpoint: Checkpoint) -> Iterable[Entry]:
        return ()

    def priority(self, entry: Entry, geometry: BlockGeometry) -> float:
        return entry.used

    def evicted(self, priority: float) -> None:
        pass


class CostAware:
    """Keeps what saves most prefill seconds per byte; GreedyDual-Size-Frequency on a prefix tree.

    An entry's priority is ``age + uses * seconds / bytes`` (Cherkasova, HPL-98-69), where `age` is
    the priority of the last evicted entry when this one was used, so that worth fades with time.

    - A checkpoint is worth the prefill from the nearest checkpoint before it. Its bytes are its
      own and those of the KV that goes with it: the run of blocks that nothing else needs.
    - KV without a checkpoint at or after it is worth nothing and goes at once (in a model with
      states), as a checkpoint without its KV would be; the tree never holds one.
    - A checkpoint on the way to a newer one, with no branch between, has been overtaken: the
      next turn of that conversation will ask for the newer one.
    - Without states, a block is worth its own prefill at its depth.

    Args:
        recompute_s: (cached tokens, total tokens) -> seconds of prefill for the difference.
    """

    def __init__(self, recompute_s: Callable[[int, int], float]):
        self._recompute_s = recompute_s
        self._age = 0.0

    def used(self, entry: Entry) -> None:
        entry.used = self._age
        entry.uses += 1

    def added(self, checkpoint: Checkpoint) -> Iterable[Entry]:
        at = checkpoint.block.parent
        while at is not None and at.state is None and at.children == 1:
            at = at.parent
        if at is None or at.state is None or at.children != 1:
            return ()
        at.state.uses = 0
        return (at.state,)

    def priority(self, entry: Entry, geometry: BlockGeometry) -> float:
        tokens = geometry.block_tokens
        if isinstance(entry, Block):
            if geometry.state_blocks:
                return -1.0
            stop, start, blocks = entry.depth, entry.depth - 1, 1
        else:
            stop = entry.block.depth
            start, run = _back_to_checkpoint(entry.block)
            blocks = geometry.state_blocks + run
        seconds = self._recompute_s(start * tokens, stop * tokens)
        return entry.used + entry.uses * seconds / (blocks * geometry.block_bytes)

    def evicted(self, priority: float) -> None:
        self._age = max(self._age, priority)


def _back_to_checkpoint(block: Block) -> tuple[int, int]:
    """Return the depth of the nearest checkpoint before that of `block`, and the blocks of KV
    that would be worth nothing without it."""
    run = 0
    alone = not (block.children or block.references)
    at: Block | None = block
    while at is not None:
        run += alone
        at = at.parent
        if at is None or at.state is not None:
            break
        alone = alone and at.children == 1 and not at.references
    return (0 if at is None else at.depth), run
