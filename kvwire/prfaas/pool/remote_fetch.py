"""Prefixes between pools, by kvwire transfer: what the other side lacks of the KV, states whole.

    source side                                     destination side
    -----------                                     ----------------
    with PrefixSource(store, sender) as source:
        offer = source.offer(hashes, tenant_key) -- offer.to_json() by any router →
                                                    lease = fetch_prefix(store, receiver, hashes,
                                                                         tenant_key, offer)

`sender` is a listening `kvwire.Sender`. The destination asks for blocks that it lacks; nothing that
arrives matches before all of it is verified, and is what was asked for.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvwire.errors import ErrorCode, RefusedError, UsageError, error_from_code
from kvwire.prfaas.pool.leases import Lease
from kvwire.prfaas.pool.store import PrefixStore
from kvwire.receiver import Receiver, Ticket
from kvwire.sender import Offer, Sender

__all__ = ["PrefixOffer", "PrefixSource", "fetch_prefix"]

_FIELDS = {"address": str, "kv_offer": str, "state_offer": str, "tenant_key": str,
           "end_hash": str, "blocks": int, "block_tokens": int}


@dataclass(frozen=True)
class PrefixOffer:
    """What a source holds ready, for a router to carry. Ids and hashes are hexadecimal.

    Attributes:
        address: where the source's `Sender` listens.
        kv_offer, state_offer: to pull; the latter is empty for a model without states.
        tenant_key, end_hash: whose prefix, and the hash of its last block, which names it.
        blocks: how many, of `block_tokens`.
    """

    address: str
    kv_offer: str
    state_offer: str
    tenant_key: str
    end_hash: str
    blocks: int
    block_tokens: int

    def to_json(self) -> str:
        return json.dumps(vars(self))

    @classmethod
    def from_json(cls, text: str) -> PrefixOffer:
        """Raises UsageError, naming the field that is wrong."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"a prefix offer is no JSON: {error}") from None
        if not isinstance(fields, dict) or fields.keys() != _FIELDS.keys():
            raise UsageError(f"a prefix offer must be an object of {', '.join(_FIELDS)}")
        for name, kind in _FIELDS.items():
            if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
                raise UsageError(f"a prefix offer's {name} is {fields[name]!r}; it must be "
                                 f"{kind.__name__}")
        return cls(**fields)


class PrefixSource:
    """Offers a store's prefixes to other pools.

    Args:
        sender: that listens. It stays the caller's.
        deadline_s: how long an offer stands, and its prefix stays in memory for it.
    """

    def __init__(self, store: PrefixStore, sender: Sender, *, deadline_s: float = 30.0):
        self._store, self._sender, self._deadline_s = store, sender, deadline_s
        self._open: list[tuple[Lease, list[Offer]]] = []
        self._lock = threading.Lock()

    def offer(self, hashes: Sequence[bytes], tenant_key: bytes) -> PrefixOffer | None:
        """Offer the longest usable prefix, as one push each of KV and of states.

        Returns: None when there is none.
        """
        self.reap()
        # The transfers end at their deadline, so a lease that ends later outlives every read.
        lease = self._store.lease(hashes, tenant_key, self._deadline_s + 1.0)
        if not lease.tokens:
            lease.release()
            return None
        tier, offers = self._store.tier, []
        name = {"prefix.tenant_key": tenant_key, "prefix.end_hash": lease.tail.hash}
        slots = [block.slot for block in lease.chain()]
        memories = [tier.memory(slots, (0, lease.tokens))]
        if lease.state_slots:
            memories.append(tier.memory((), (lease.tokens,) * 2, lease.state_slots))
        try:
            for memory in memories:
                offers.append(self._sender.offer(memory, metadata=name,
                                                 deadline_s=self._deadline_s))
                offers[-1].push_all().finish()
        except BaseException:
            for offer in offers:
                offer.cancel()
            lease.release()
            raise
        with self._lock:
            self._open.append((lease, offers))
        ids = [offer.offer_id for offer in offers]
        return PrefixOffer(self._sender.address, ids[0], ids[1] if len(ids) > 1 else "",
                           tenant_key.hex(), lease.tail.hash.hex(), lease.blocks,
                           tier.geometry.block_tokens)

    def reap(self) -> int:
        """Give back the prefixes of offers that have ended; returns how many are still open."""
        with self._lock:
            for lease, offers in list(self._open):
                if all(offer.done() for offer in offers):
                    lease.release()
                    self._open.remove((lease, offers))
            return len(self._open)

    def close(self) -> None:
        """Cancel what is open; afterwards nothing of the store is read. Idempotent."""
        with self._lock:
            for lease, offers in self._open:
                for offer in offers:
                    offer.cancel()
                lease.release()
            self._open.clear()

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def fetch_prefix(store: PrefixStore, receiver: Receiver, hashes: Sequence[bytes],
                 tenant_key: bytes, offer: PrefixOffer, *, deadline_s: float = 30.0) -> Lease:
    """Bring an offered prefix into `store`: only the blocks that it lacks, and the states.

    Args:
        hashes: of the request, as computed here; they decide what is accepted, the offer does not.
        deadline_s: for all of it, but for making a link where there is none: that takes at most the
            receiver's `connect_timeout_s`.

    Returns: a lease on the prefix, or on less if `store` has no room for it.

    Raises:
        RefusedError: the offer is not for this prefix, tenant or block size.
        KvwireError: the transfer failed; the room is given back and nothing new matches.
    """
    blocks = _checked_blocks(store, hashes, tenant_key, offer)
    new = store.write(hashes[:blocks], tenant_key)
    if new is None:
        return store.lease(hashes, tenant_key)
    with new:
        wanted = [(offer.kv_offer, new.kv)] + [(offer.state_offer, memory)
                                               for memory in new.states.values()]
        end_s, tickets = time.monotonic() + deadline_s, []
        try:
            for offered, memory in wanted:
                if memory is not None:
                    left_s = max(end_s - time.monotonic(), 0.0)
                    tickets.append(receiver.pull(offer.address, offered, memory,
                                                 deadline_s=left_s))
            for ticket in tickets:
                ticket.result()
                _check_name(ticket, tenant_key, hashes[blocks - 1])
            return new.commit()
        finally:
            for ticket in tickets:
                ticket.cancel()  # before its room is given back; nothing, when it has ended


def _checked_blocks(store: PrefixStore, hashes: Sequence[bytes], tenant_key: bytes,
                    offer: PrefixOffer) -> int:
    geometry = store.tier.geometry
    if offer.block_tokens != geometry.block_tokens:
        raise RefusedError(f"the offer is in blocks of {offer.block_tokens} tokens, this pool's "
                           f"have {geometry.block_tokens}", expected=geometry.block_tokens,
                           actual=offer.block_tokens)
    if offer.tenant_key != tenant_key.hex():
        raise RefusedError("the offer is of another tenant, model, spec or tokenizer",
                           expected=tenant_key.hex(), actual=offer.tenant_key)
    if not 1 <= offer.blocks <= len(hashes) or hashes[offer.blocks - 1].hex() != offer.end_hash:
        raise RefusedError(f"the offer of {offer.blocks} blocks is not a prefix of this request",
                           actual=offer.end_hash)
    if bool(offer.state_offer) != bool(geometry.state_blocks):
        raise RefusedError("one of the two sides has states, the other has none")
    return offer.blocks


def _check_name(ticket: Ticket, tenant_key: bytes, end_hash: bytes) -> None:
    """Refuse what came, if the sender itself does not say that it is what was asked for."""
    for name, value in (("prefix.tenant_key", tenant_key), ("prefix.end_hash", end_hash)):
        if ticket.metadata.get(name) != value:
            raise error_from_code(ErrorCode.OFFER_UNKNOWN, f"what came is another prefix: its "
                                  f"{name} differs", expected=value,
                                  actual=ticket.metadata.get(name))
