"""`PrefixStore`: one node's prefixes with their bytes, in host memory and on SSD.

    store = PrefixStore(spec, block_tokens=512, capacity_blocks=4096, ssd_folder="/nvme/prefixes")
    with store.lease(hashes, tenant_key) as lease:          # from memory, or from SSD into memory
        engine_copies(store.memory(lease), ...)             # a CacheMemory; lease.tokens of it
    with store.write(hashes, tenant_key) as new:            # after prefill
        engine_fills(new.kv, new.states)
        new.commit()

What is committed matches from then on, and is written to SSD in the background; what memory loses
is still there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvwire.errors import KvwireError
from kvwire.layout import CacheSpec
from kvwire.memory import CacheMemory
from kvwire.prfaas.pool.admission import AdmissionPolicy
from kvwire.prfaas.pool.blocks import Chain, Match
from kvwire.prfaas.pool.eviction import EvictionPolicy
from kvwire.prfaas.pool.host_tier import HostTier
from kvwire.prfaas.pool.leases import Lease, Reservation, TransferBlocks
from kvwire.prfaas.pool.pool import PoolObserver, PoolStats, PrefixPool
from kvwire.prfaas.pool.ssd_tier import SsdStats, SsdTier

__all__ = ["NewPrefix", "PrefixStore", "StoreStats"]

_SPILLS_MAX = 64  # prefixes that wait to be written, and are kept in memory until then


@dataclass(frozen=True)
class StoreStats:
    """What the tiers say; and of the prefixes on their way to SSD: how many wait, and how many
    were passed over because too many did, or the disk failed."""

    pool: PoolStats
    ssd: SsdStats | None
    spills_waiting: int
    spills_skipped: int
    spills_failed: int


class NewPrefix:
    """Room for what the store lacks of a prefix; leaving its context without `commit` frees it.

    Attributes:
        start: tokens that the store has already.
        tokens: of the whole prefix.
        kv: where the KV of the tokens [start, tokens) goes; None: nothing is missing.
        states: {length in tokens: where the states at that length go}.
    """

    def __init__(self, store: PrefixStore, reservation: Reservation):
        block_tokens, tier = store.tier.geometry.block_tokens, store.tier
        self._store, self.reservation = store, reservation
        self.start = reservation.start * block_tokens
        self.tokens = len(reservation.hashes) * block_tokens
        self.kv: CacheMemory | None = None
        if reservation.slots:
            self.kv = tier.memory(reservation.slots, (self.start, self.tokens), writable=True)
        self.states: dict[int, CacheMemory] = {
            depth * block_tokens: tier.memory((), (depth * block_tokens,) * 2, slots,
                                              writable=True)
            for depth, slots in reservation.checkpoints.items()}

    def commit(self, lease_s: float | None = None) -> Lease:
        """Make it match; all of `kv` and `states` must be in place. See `Reservation.commit`."""
        lease = self.reservation.commit(lease_s)
        self._store.spill(self.reservation)
        return lease

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.reservation.abort()  # nothing, if it was committed


class PrefixStore:
    """A `PrefixPool` over a `HostTier`, and an `SsdTier` under it.

    Args:
        spec: what one machine holds of the model's cache.
        block_tokens, capacity_blocks: of the host memory.
        ssd_folder, ssd_bytes: where prefixes are kept beyond it, and how many bytes; None: not.
        policy, observer: see `PrefixPool`.
        ssd_policy: the same for the files; an object of its own.
        ssd_admission: what is worth a file; None: all. See `CostPerByte`.
        codec: of the files.

    `close` ends the writing thread; what waits is still written.
    """

    def __init__(self, spec: CacheSpec, *, block_tokens: int, capacity_blocks: int,
                 ssd_folder: str | None = None, ssd_bytes: int = 0, codec: str = "raw",
                 policy: EvictionPolicy | None = None, ssd_policy: EvictionPolicy | None = None,
                 ssd_admission: AdmissionPolicy | None = None,
                 observer: PoolObserver | None = None):
        self.tier = HostTier(spec, block_tokens, capacity_blocks)
        self.ssd: SsdTier | None = None
        self._observer = observer
        self.pool = PrefixPool(self.tier.geometry, capacity_blocks, policy=policy,
                               observer=self if observer is not None else None)
        self._spills: queue.Queue = queue.Queue(_SPILLS_MAX)
        self._skipped = self._failed = 0
        self._writer: threading.Thread | None = None
        if ssd_folder is not None:
            self.ssd = SsdTier(ssd_folder, spec.fingerprint(), self.tier.geometry, ssd_bytes,
                               codec=codec, policy=ssd_policy, admission=ssd_admission,
                               on_gone=self._gone_from_ssd)
            self._writer = threading.Thread(target=self._write_spills, daemon=True,
                                            name="kvwire prefix writer")
            self._writer.start()

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what waits, and end. Idempotent."""
        if self._writer is not None:
            self._spills.put(None)
            self._writer.join()
            self._writer = None
            self.ssd.close()

    def match(self, hashes: Sequence[bytes], tenant_key: bytes) -> Match:
        """Return what can be had here, from memory or SSD: whichever has more that is usable."""
        held = self.pool.match(hashes, tenant_key)
        if self.ssd is not None:
            held = max(held, self.ssd.match(hashes, tenant_key),
                       key=lambda match: (match.usable_tokens, match.kv_blocks))
        return held

    def lease(self, hashes: Sequence[bytes], tenant_key: bytes, lease_s: float | None = None
              ) -> Lease:
        """Hold the longest usable prefix in memory, read from SSD where that has more.

        A damaged file costs what it held, not the request: the lease is then shorter.
        """
        hashes = list(hashes)
        usable, before = self._usable_on_ssd(hashes, tenant_key), len(hashes) + 1
        while usable and usable < before:
            try:
                promoted = self._promote(hashes[:usable], tenant_key, lease_s)
                if promoted is not None:
                    return promoted
                break
            except (KvwireError, OSError):  # damaged, or evicted meanwhile: there is less now
                before, usable = usable, self._usable_on_ssd(hashes, tenant_key)
        return self.pool.lease(hashes, tenant_key, lease_s)

    def _usable_on_ssd(self, hashes: list[bytes], tenant_key: bytes) -> int:
        """Return how many blocks can be had from SSD, 0 unless it is more than memory has."""
        if self.ssd is None:
            return 0
        tokens = self.ssd.match(hashes, tenant_key).usable_tokens
        more = tokens > self.pool.match(hashes, tenant_key).usable_tokens
        return tokens // self.tier.geometry.block_tokens if more else 0

    def _promote(self, hashes: list[bytes], tenant_key: bytes, lease_s: float | None
                 ) -> Lease | None:
        reservation = self.pool.reserve(hashes, tenant_key)
        if reservation is None:
            return None
        with reservation:
            self.ssd.read(hashes, tenant_key, reservation.start,
                          lambda low, high, state: self._reserved(reservation, low, high, state),
                          state=bool(reservation.checkpoints))
            return reservation.commit(lease_s)

    def _reserved(self, reservation: Reservation, low: int, high: int, state: bool) -> CacheMemory:
        block_tokens = self.tier.geometry.block_tokens
        slots = reservation.slots[low - reservation.start:high - reservation.start]
        states = reservation.checkpoints[high] if state else ()
        return self.tier.memory(slots, (low * block_tokens, high * block_tokens), states,
                                writable=True)

    def memory(self, hold: Lease | TransferBlocks, start: int = 0) -> CacheMemory:
        """Describe what a lease holds, from token `start` (a multiple of `block_tokens`) on, or
        the room of transfer blocks, as a destination.

        What was read under a lease with a deadline counts only if it is still `held` afterwards.
        """
        if isinstance(hold, TransferBlocks):
            return self.tier.memory(hold.slots, (0, hold.tokens), hold.state_slots, writable=True)
        slots = [block.slot for block in hold.chain()]
        return self.tier.memory(slots[start // self.tier.geometry.block_tokens:],
                                (start, hold.tokens), hold.state_slots)

    def write(self, hashes: Sequence[bytes], tenant_key: bytes,
              checkpoints: Iterable[int] | None = None) -> NewPrefix | None:
        """Make room for what memory lacks of a prefix; None when nothing can be evicted for it.

        Args:
            checkpoints: lengths in blocks; see `PrefixPool.reserve`.
        """
        reservation = self.pool.reserve(hashes, tenant_key, checkpoints=checkpoints)
        return None if reservation is None else NewPrefix(self, reservation)

    # ---- to SSD

    def spill(self, reservation: Reservation) -> None:
        """Have what was committed written in the background, or pass it over if too much waits."""
        if self._writer is None:
            return
        hashes, key = reservation.hashes, reservation.owner.tenant_key
        leases = [(depth, self.pool.lease(hashes[:depth], key, use=False))
                  for depth in sorted({*reservation.checkpoints, len(hashes)})]
        leases = [(depth, lease) for depth, lease in leases if lease.blocks == depth]
        try:
            self._spills.put_nowait((hashes, key, leases))
        except queue.Full:
            self._skipped += 1
            for _, lease in leases:
                lease.release()

    def drain(self) -> None:
        """Wait until all that waits has been written."""
        self._spills.join()

    def _write_spills(self) -> None:
        while (job := self._spills.get()) is not None:
            hashes, key, leases = job
            try:
                for depth, lease in leases:
                    states = (depth,) if self.tier.geometry.state_blocks else ()
                    self.ssd.write(hashes[:depth], key, states,
                                   lambda low, high, state: self._leased(lease, low, high, state))
            except (KvwireError, OSError, RuntimeError):
                self._failed += 1  # the disk is full or broken, no thread is left: memory serves on
            finally:
                for _, lease in leases:
                    lease.release()
                self._spills.task_done()
        self._spills.task_done()

    def _leased(self, lease: Lease, low: int, high: int, state: bool) -> CacheMemory:
        block_tokens = self.tier.geometry.block_tokens
        slots = [block.slot for block in lease.chain()[low:high]]
        return self.tier.memory(slots, (low * block_tokens, high * block_tokens),
                                lease.state_slots if state else ())

    # ---- what the metadata are told: what is in memory or on SSD

    def published(self, chain: Chain, hashes: list[bytes], states: list[bytes]) -> None:
        self._observer.published(chain, hashes, states)

    def withdrawn(self, chain: Chain, name: bytes, state: bool) -> None:
        if self.ssd is None or not self.ssd.holds(name, state):
            self._observer.withdrawn(chain, name, state)

    def _gone_from_ssd(self, chain: Chain, hashes: Sequence[bytes], state: bytes | None) -> None:
        if self._observer is None:
            return
        if state is not None and not self.pool.holds(state, True):
            self._observer.withdrawn(chain, state, True)
        for name in reversed(hashes):
            if not self.pool.holds(name, False):
                self._observer.withdrawn(chain, name, False)

    def snapshot(self) -> Iterator[tuple[Chain, list[bytes], list[bytes]]]:
        """Yield (chain, hashes, hashes of the checkpoints) of all that can be had here."""
        yield from self.pool.snapshot()
        if self.ssd is not None:
            yield from self.ssd.snapshot()

    def stats(self) -> StoreStats:
        return StoreStats(self.pool.stats(), self.ssd.stats() if self.ssd else None,
                          self._spills.qsize(), self._skipped, self._failed)
