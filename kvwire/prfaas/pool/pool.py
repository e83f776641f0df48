"""`PrefixPool`: one pool of aligned blocks for prefixes and transfers; no bytes, no I/O.

    pool = PrefixPool(BlockGeometry.of_sizes(512, kv_bytes_per_token, state_bytes), 100_000)
    hashes = chain_hashes(token_ids, 512, key)
    with pool.lease(hashes, key.digest()) as lease:      # what need not be prefilled
        prefill(token_ids[lease.tokens:])
        pool.insert(hashes, key.digest(), checkpoints=pool.boundaries(hashes, key.digest()))

The pool says where bytes lie (`slots`), a `HostTier` is that memory. The simulator uses the pool
alone.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Protocol

from kvwire.errors import InternalError, UsageError
from kvwire.prfaas.pool.blocks import Block, BlockGeometry, Chain, Checkpoint, Entry, Match
from kvwire.prfaas.pool.eviction import EvictionPolicy, EvictionQueue, Lru
from kvwire.prfaas.pool.leases import Hold, Lease, Reservation, TransferBlocks

__all__ = ["PoolObserver", "PoolStats", "PrefixPool"]


class PoolObserver(Protocol):
    """Told of changes while the pool is locked: be quick, and do not call the pool."""

    def published(self, chain: Chain, hashes: list[bytes], states: list[bytes]) -> None:
        """New blocks, and the blocks at whose end there is a new checkpoint."""

    def withdrawn(self, chain: Chain, name: bytes, state: bool) -> None:
        """A block has gone, or with `state` the checkpoint at its end."""


@dataclass(frozen=True)
class PoolStats:
    """What a pool holds, in blocks, and what it has done so far.

    Attributes:
        free_blocks: of `capacity_blocks`; the others are those of KV, of checkpoints (in units),
            of transfers, and those that are reserved and not yet committed.
        holds: leases, reservations and transfer blocks that have not ended.
        evicted_kv_blocks, evicted_checkpoints, expired_holds: since the start.
    """

    capacity_blocks: int
    free_blocks: int
    kv_blocks: int
    checkpoints: int
    reserved_blocks: int
    transfer_blocks: int
    holds: int
    evicted_kv_blocks: int
    evicted_checkpoints: int
    expired_holds: int


class PrefixPool:
    """Finds, keeps and evicts prefixes.

    Args:
        geometry: sizes of blocks and checkpoints.
        capacity_blocks: blocks of `geometry.block_bytes` in all.
        policy: what to evict; `Lru` by default.
        clock: seconds, for deadlines of leases; the simulator gives its own.
        observer: told of every change, for the metadata.

    Hashes are those of `chain_hashes`, from the first block of the prompt on. `tenant_key` is
    `CacheKey.digest`; it is in the hashes already, and checked once more.

    Threads: every method may be called from any thread. Cost: a match takes the logarithm of the
    number of hashes, all else is constant per block.
    """

    def __init__(self, geometry: BlockGeometry, capacity_blocks: int, *,
                 policy: EvictionPolicy | None = None,
                 clock: Callable[[], float] = time.monotonic,
                 observer: PoolObserver | None = None):
        if isinstance(capacity_blocks, bool) or not isinstance(capacity_blocks, int) or (
                capacity_blocks < 1):
            raise UsageError(f"capacity_blocks is {capacity_blocks!r}; it must be an integer of "
                             "at least 1")
        self.geometry, self.capacity_blocks = geometry, capacity_blocks
        self._policy = policy if policy is not None else Lru()
        self._clock, self._observer = clock, observer
        self._lock = threading.RLock()
        self._index: dict[bytes, Block] = {}
        self._slots: list[int] = []       # given back
        self._slots_used = 0              # of those below, some are given back
        self._free = capacity_blocks
        self._queue = EvictionQueue(self._policy, geometry)
        self._sequence = 0  # of holds with a deadline
        self._overdue: list[tuple[float, int, Hold]] = []
        self._holds = self._checkpoints = self._reserved = self._transferring = 0
        self._evicted_kv = self._evicted_checkpoints = self._expired = 0

    # ---- find

    def match(self, hashes: Sequence[bytes], tenant_key: bytes = b"") -> Match:
        """Return what the pool holds of a prompt; it is no use of it, and holds nothing."""
        with self._lock:
            tail = self._deepest(hashes, tenant_key)
            usable = self._usable(tail)
        tokens = (usable.depth if usable else 0) * self.geometry.block_tokens
        return Match(tail.depth if tail else 0, tokens, tokens)

    def lease(self, hashes: Sequence[bytes], tenant_key: bytes = b"",
              lease_s: float | None = None, *, use: bool = True) -> Lease:
        """Hold the longest usable prefix.

        Args:
            lease_s: after so long the pool may take it back; None: never.
            use: it counts as a use; False for what is done behind the requests.

        Returns: a lease, of 0 tokens where nothing is usable.
        """
        with self._lock:
            return self._lease(self._usable(self._deepest(hashes, tenant_key)), lease_s, use)

    def boundaries(self, hashes: Sequence[bytes], tenant_key: bytes = b"") -> tuple[int, ...]:
        """Return the lengths in blocks at which checkpoints of a prompt pay: its end, and where
        it leaves prompts that were there before, since others may leave them there, too."""
        if not self.geometry.state_blocks or not hashes:
            return ()
        with self._lock:
            tail = self._deepest(hashes, tenant_key)
            if tail is None or tail.state is not None or tail.depth == len(hashes):
                return (len(hashes),)
            return (tail.depth, len(hashes)) if tail.children else (len(hashes),)

    def _deepest(self, hashes: Sequence[bytes], tenant_key: bytes) -> Block | None:
        """What is held is always a prefix, so its end is found by halving."""
        index, found, low, high = self._index, None, 0, len(hashes)
        middle = 0  # most prompts that match nothing show it at once
        while low < high:
            block = index.get(hashes[middle])
            if block is not None and block.depth == middle + 1:
                found, low = block, middle + 1
            else:
                high = middle
            middle = (low + high) // 2
        if found is not None and found.chain.tenant_key != tenant_key:
            return None
        return found

    def _usable(self, block: Block | None) -> Block | None:
        if self.geometry.state_blocks:
            while block is not None and block.state is None:
                block = block.parent
        return block

    def _lease(self, block: Block | None, lease_s: float | None, use: bool = True) -> Lease:
        lease = Lease(self, block, block.state if block else None, self._deadline(lease_s))
        for entry in (lease.tail, lease.state):
            if entry is not None:
                entry.references += 1
                if use:
                    self._policy.used(entry)
        return self._held(lease)

    # ---- insert

    def insert(self, hashes: Sequence[bytes], tenant_key: bytes = b"", *,
               checkpoints: Iterable[int] | None = None) -> bool:
        """Reserve and commit at once, for a pool without bytes.

        Returns: False when there was no room, and nothing has changed but what was evicted.
        """
        reservation = self.reserve(hashes, tenant_key, checkpoints=checkpoints)
        if reservation is None:
            return False
        reservation.commit().release()
        return True

    def reserve(self, hashes: Sequence[bytes], tenant_key: bytes = b"", *,
                checkpoints: Iterable[int] | None = None) -> Reservation | None:
        """Make room for what the pool lacks of a prefix.

        Args:
            checkpoints: lengths in blocks at which states will be kept; None: at the end, if the
                model has states. See `boundaries`.

        Returns: the room, to be filled and committed; None when it is more than can be evicted.
        """
        hashes = list(hashes)
        wanted = self._checkpoint_depths(hashes, checkpoints)
        with self._lock:
            tail = self._deepest(hashes, tenant_key)
            start = tail.depth if tail else 0
            chain = tail.chain if tail else Chain(tenant_key, hashes[0] if hashes else b"")
            new = hashes[start:]
            if len(set(new)) < len(new) or not self._index.keys().isdisjoint(new):
                raise UsageError("one of the hashes is known in another place, or twice among "
                                 "them, or another tenant's: they are no chain of chain_hashes")
            missing = [depth for depth in wanted
                       if depth > start or self._index[hashes[depth - 1]].state is None]
            units = len(new) + len(missing) * self.geometry.state_blocks
            if tail is not None:
                tail.references += 1
            if not self._make_room(units):
                self._unreference(tail)
                return None
            slots = self._take(len(new))
            states = {depth: tuple(self._take(self.geometry.state_blocks)) for depth in missing}
            self._reserved += units
            return self._held(Reservation(self, hashes, chain, tail, slots, states))

    def commit(self, reservation: Reservation, lease_s: float | None = None) -> Lease:
        """See `Reservation.commit`."""
        with self._lock:
            if not reservation.held:
                raise UsageError("the reservation was committed or aborted before")
            self._check_chain(reservation)
            states = reservation.checkpoints
            self._end_hold(reservation, len(reservation.slots)
                           + len(states) * self.geometry.state_blocks)
            tail, new = reservation.tail, []
            if tail is not None:
                tail.references -= 1
            for name, slot in zip(reservation.hashes[reservation.start:], reservation.slots):
                held = self._index.get(name)
                if held is None:
                    held = self._new_block(name, tail, reservation.owner, slot)
                    new.append(name)
                else:
                    self._give((slot,))
                tail = held
            new_states = [state for state in (
                self._new_checkpoint(self._index[reservation.hashes[depth - 1]], slots)
                for depth, slots in states.items()) if state is not None]
            if self._observer is not None and (new or new_states):
                self._observer.published(reservation.owner, new,
                                         [state.block.hash for state in new_states])
            lease = self._lease(self._usable(tail), lease_s)
            for entry in (*new_states, tail):
                if entry is not None and entry is not lease.state and entry is not lease.tail:
                    self._policy.used(entry)
                    self._queue.offer(entry)
            return lease

    def _check_chain(self, reservation: Reservation) -> None:
        """Refuse hashes that the pool has in another place: they are no chain."""
        parent = reservation.tail.hash if reservation.tail else None
        for name in reservation.hashes[reservation.start:]:
            held = self._index.get(name)
            if held is not None and parent != (held.parent.hash if held.parent else None):
                self.end(reservation)
                raise UsageError(f"hash {name.hex()} is known as block {held.depth - 1} of another "
                                 "prefix: these hashes are no chain of chain_hashes")
            parent = name

    def _checkpoint_depths(self, hashes: list[bytes], checkpoints: Iterable[int] | None
                           ) -> list[int]:
        if checkpoints is None:
            checkpoints = (len(hashes),) if self.geometry.state_blocks and hashes else ()
        wanted = sorted(set(checkpoints))
        if wanted and not self.geometry.state_blocks:
            raise UsageError(f"checkpoints are {wanted}, but the model has no states")
        if wanted and not 1 <= wanted[0] <= wanted[-1] <= len(hashes):
            raise UsageError(f"checkpoints are {wanted}; they must be lengths from 1 to "
                             f"{len(hashes)} blocks")
        return wanted

    def _new_block(self, name: bytes, parent: Block | None, chain: Chain, slot: int) -> Block:
        block = Block(name, parent, parent.depth + 1 if parent else 1, chain, slot)
        self._index[name] = block
        if parent is not None:
            parent.children += 1
        return block

    def _new_checkpoint(self, block: Block, slots: tuple[int, ...]) -> Checkpoint | None:
        """Return it, or None when another reservation has brought its states first."""
        if block.state is not None:
            self._give(slots)
            return None
        block.state = Checkpoint(block, slots)
        self._checkpoints += 1
        return block.state

    # ---- transfers

    def reserve_transfer(self, tokens: int, *, states: bool = True,
                         lease_s: float | None = None) -> TransferBlocks | None:
        """Make room for the cache of a request on its way, of any length.

        Returns: None when it is more than can be evicted.
        """
        if tokens < 0:
            raise UsageError(f"tokens is {tokens}; it must not be negative")
        count = -(-tokens // self.geometry.block_tokens)
        state_blocks = self.geometry.state_blocks if states else 0
        with self._lock:
            if not self._make_room(count + state_blocks):
                return None
            self._transferring += count + state_blocks
            return self._held(TransferBlocks(
                self, tokens, self._take(count), tuple(self._take(state_blocks)),
                self._deadline(lease_s)))

    # ---- give back

    def end(self, hold: Hold) -> None:
        """Release, abort or drop a hold; nothing happens to one that has ended."""
        with self._lock:
            if not hold.held:
                return
            if isinstance(hold, Lease):
                self._end_hold(hold)
                self._unreference(hold.state)
                self._unreference(hold.tail)
            elif isinstance(hold, TransferBlocks):
                self._end_hold(hold)
                self._transferring -= len(hold.slots) + len(hold.state_slots)
                self._give(hold.slots)
                self._give(hold.state_slots)
            else:
                states = [slot for slots in hold.checkpoints.values() for slot in slots]
                self._end_hold(hold, len(hold.slots) + len(states))
                self._give(hold.slots)
                self._give(states)
                self._unreference(hold.tail)

    def evict(self, blocks: int) -> int:
        """Evict until so many more blocks are free, or nothing can go; returns how many are."""
        with self._lock:
            before = self._free
            self._make_room(min(before + blocks, self.capacity_blocks))
            return self._free - before

    def expire(self) -> int:
        """End the holds whose deadline has passed, as the pool does by itself when it needs room;
        returns how many."""
        with self._lock:
            ended, now = 0, self._clock()
            while self._overdue and self._overdue[0][0] <= now:
                hold = heappop(self._overdue)[2]
                if hold.held:
                    self.end(hold)
                    ended += 1
            self._expired += ended
            return ended

    def _held(self, hold):
        self._holds += 1
        if hold.deadline_s < math.inf:
            self._sequence += 1
            heappush(self._overdue, (hold.deadline_s, self._sequence, hold))
        return hold

    def _end_hold(self, hold: Hold, reserved: int = 0) -> None:
        hold.held = False
        self._holds -= 1
        self._reserved -= reserved

    def _deadline(self, lease_s: float | None) -> float:
        return math.inf if lease_s is None else self._clock() + lease_s

    def _unreference(self, entry: Entry | None) -> None:
        if entry is not None:
            entry.references -= 1
            self._queue.offer(entry)

    # ---- room

    def _take(self, count: int) -> list[int]:
        """Return slots that are free: `_make_room` has seen to it."""
        old = min(count, len(self._slots))
        slots = [self._slots.pop() for _ in range(old)]
        slots.extend(range(self._slots_used, self._slots_used + count - old))
        self._slots_used += count - old
        self._free -= count
        return slots

    def _give(self, slots: Sequence[int]) -> None:
        self._slots.extend(slots)
        self._free += len(slots)

    def _make_room(self, blocks: int) -> bool:
        if blocks > self.capacity_blocks:
            return False
        if self._free < blocks and self._overdue:
            self.expire()
        while self._free < blocks:
            entry = self._queue.pop()
            if entry is None:
                return False
            self._remove(entry)
        return True

    def _remove(self, entry: Entry) -> None:
        if isinstance(entry, Checkpoint):
            block = entry.block
            block.state = None
            self._checkpoints -= 1
            self._evicted_checkpoints += 1
            self._give(entry.slots)
            self._queue.offer(block)
        else:
            block, parent = entry, entry.parent
            if self._index.pop(block.hash, None) is not block:
                raise InternalError(f"block {block.hash.hex()} was evicted but not in the index")
            self._evicted_kv += 1
            self._give((block.slot,))
            if parent is not None:
                parent.children -= 1
                parent.used = max(parent.used, block.used)
                parent.uses += block.uses
                self._queue.offer(parent)
        if self._observer is not None:
            self._observer.withdrawn(block.chain, block.hash, isinstance(entry, Checkpoint))

    # ---- look

    def stats(self) -> PoolStats:
        with self._lock:
            return PoolStats(
                self.capacity_blocks, self._free, len(self._index), self._checkpoints,
                self._reserved, self._transferring, self._holds, self._evicted_kv,
                self._evicted_checkpoints, self._expired)

    def holds(self, name: bytes, state: bool) -> bool:
        """Say whether a block, or with `state` the checkpoint at its end, is here."""
        with self._lock:
            block = self._index.get(name)
            return block is not None and (not state or block.state is not None)

    def snapshot(self) -> Iterator[tuple[Chain, list[bytes], list[bytes]]]:
        """Yield all that is held, as `PoolObserver.published` would have been told of it."""
        with self._lock:
            blocks = list(self._index.values())  # parents were inserted before their children
        chains: dict[Chain, tuple[list[bytes], list[bytes]]] = {}
        for block in blocks:
            hashes, states = chains.setdefault(block.chain, ([], []))
            hashes.append(block.hash)
            if block.state is not None:
                states.append(block.hash)
        for chain, (hashes, states) in chains.items():
            yield chain, hashes, states
