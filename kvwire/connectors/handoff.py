"""What the two halves of a connector share: routes, outcomes, totals, options. Engine-neutral.

A router lets the two engines find each other, in parameters of the request. It may push:

    router → prefill  {"do_remote_decode": True, "ticket": "<32 hex digits>",
                       "decode_addresses": ["host:port", ...]}     one per decode rank
    router → decode   {"do_remote_prefill": True, "ticket": "<the same>", "prefill_ranks": 1}

in any order, or both at once; the ticket is a random number that the router makes up. Or pull:

    router → prefill  {"do_remote_decode": True}                   and, if its ranks differ from
                                                                   prefill's, "decode_ranks": 2
    prefill → router → decode                                      what prefill's answer says:
                      {"do_remote_prefill": True, "offer": "<32 hex digits>",
                       "prefill_addresses": ["host:port", ...]}    one per prefill rank
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

from kvwire.errors import ErrorCode, KvwireError, UsageError
from kvwire.handles import Progress, id_bytes, split_address

__all__ = ["Outcome", "Pull", "Push", "Route", "Totals", "decode_route", "offer_part",
           "prefill_route", "prompt_digest", "retries"]

_RETRIED = frozenset((ErrorCode.TICKET_UNKNOWN, ErrorCode.RESOURCES_EXHAUSTED,
                      ErrorCode.LIMIT_EXCEEDED))


@dataclass(frozen=True)
class Push:
    """Prefill sends to a ticket.

    Attributes:
        ticket: its id.
        addresses: of the decode ranks. Empty on the decode side, which listens.
        prefill_ranks: how many ranks send; known to the decode side.
    """

    ticket: str
    addresses: tuple[str, ...] = ()
    prefill_ranks: int = 1


@dataclass(frozen=True)
class Pull:
    """Decode fetches an offer.

    Attributes:
        offer: its id.
        addresses: of the prefill ranks. Empty on the prefill side, which listens.
        decode_ranks: how many ranks fetch; known to the prefill side.
    """

    offer: str
    addresses: tuple[str, ...] = ()
    decode_ranks: int = 1


Route = Push | Pull


class Outcome(NamedTuple):
    """A hand-off that has ended; error None: delivered and verified."""

    request_id: str
    error: KvwireError | None


@dataclass
class Totals:
    """Counters of one side of one rank.

    Attributes:
        handoffs, failures: that ended well, and otherwise.
        cache_bytes, wire_bytes: of these, verified; and sent or received as payload.
        repaired_chunks: that travelled again because they came spoilt.
        retries: hand-offs begun again because the receiver did not know of them yet.
        overlapped_bytes: that had their receipt when the last push was made. Prefill side only.
        seconds: from the beginning of each hand-off to its end, summed.
    """

    handoffs: int = 0
    failures: int = 0
    cache_bytes: int = 0
    wire_bytes: int = 0
    repaired_chunks: int = 0
    retries: int = 0
    overlapped_bytes: int = 0
    seconds: float = 0.0

    def add(self, progress: Progress) -> None:
        """Count what a transfer or ticket came to."""
        self.cache_bytes += progress.verified_bytes
        self.wire_bytes += progress.wire_bytes
        self.repaired_chunks += progress.repaired_chunks

    def count(self, error: KvwireError | None, seconds: float) -> None:
        """Count a hand-off that has ended."""
        self.handoffs += error is None
        self.failures += error is not None
        self.seconds += seconds

    def take(self) -> dict[str, float]:
        """Return the counters, and begin again at 0."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        self.__init__()
        return values


def retries(error: KvwireError) -> bool:
    """Say whether the receiver refused only because it did not know of the hand-off yet."""
    return error.remote and error.code in _RETRIED


def offer_part(offer: str, decode_rank: int) -> str:
    """Return the id of the part of an offer that one decode rank fetches."""
    return hashlib.sha256(f"{offer} {decode_rank}".encode()).hexdigest()[:32]


def prompt_digest(token_ids: Sequence[int], variant: str = "") -> bytes:
    """Return 16 bytes that differ when the tokens do, or the `variant` (a LoRA adapter's name):
    a cache is good for its own prompt only."""
    digest = hashlib.sha256(variant.encode() + b"\0")
    digest.update(b"".join(int(token).to_bytes(8, "little", signed=True) for token in token_ids))
    return digest.digest()[:16]


def prefill_route(parameters: Mapping[str, object], ranks: int) -> Route:
    """Return where prefill hands its cache, by the parameters of a request.

    Args:
        ranks: of this engine; the decode engine has as many unless it is said.

    Raises: UsageError naming the parameter.
    """
    if "ticket" not in parameters:
        return Pull(secrets.token_hex(16), decode_ranks=_count(parameters, "decode_ranks", ranks))
    return Push(_id(parameters, "ticket"), _addresses(parameters, "decode_addresses"))


def decode_route(parameters: Mapping[str, object], ranks: int) -> Route:
    """Return where decode gets its cache from; as `prefill_route`."""
    if "ticket" in parameters:
        return Push(_id(parameters, "ticket"),
                    prefill_ranks=_count(parameters, "prefill_ranks", ranks))
    if "offer" not in parameters:
        raise UsageError("kv_transfer_params has neither a ticket (push) nor an offer (pull); pass "
                         "on what the prefill engine answered")
    return Pull(_id(parameters, "offer"), _addresses(parameters, "prefill_addresses"))


def _id(parameters: Mapping[str, object], name: str) -> str:
    return id_bytes(parameters[name], f"kv_transfer_params[{name!r}]").hex()


def _addresses(parameters: Mapping[str, object], name: str) -> tuple[str, ...]:
    found = parameters.get(name)
    if not isinstance(found, (list, tuple)) or not found:
        raise UsageError(f"kv_transfer_params[{name!r}] is {found!r}; it must list the address "
                         "of each rank, 'host:port'")
    for address in found:
        split_address(str(address), f"kv_transfer_params[{name!r}]")
    return tuple(str(address) for address in found)


def _count(parameters: Mapping[str, object], name: str, default: int) -> int:
    value = parameters.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"kv_transfer_params[{name!r}] is {value!r}; it must be a number of ranks")
    return value
