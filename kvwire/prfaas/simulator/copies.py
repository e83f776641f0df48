"""Copies of hot prefixes between the pools of nodes, beside the requests.

Within a cluster they share its network, between the clusters the link with what else crosses it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from kvwire.prfaas.profiles import ModelProfile
from kvwire.prfaas.simulator.caches import CacheHold, ClusterCache
from kvwire.prfaas.simulator.links import FluidLink, Transfer

__all__ = ["Place", "PrefixCopies"]


class Place(NamedTuple):
    """A prefill node of one of the clusters."""

    remote: bool
    node: int


class _Copy(NamedTuple):
    source: Place
    target: Place
    kept: CacheHold
    room: CacheHold
    ended: Callable[[], object]


class PrefixCopies:
    """Makes copies, and knows those that are on their way.

    Args:
        caches: of the clusters, by `Place.remote`.
        links: what is between them and in them, by `Place.remote` of source and of target.

    Attributes:
        count, sent_bytes: of all copies so far.
        remote_up: False while the remote cluster is dead, noticed or not: no copy touches it.
    """

    def __init__(self, profile: ModelProfile, caches: Mapping[bool, ClusterCache],
                 links: Mapping[tuple[bool, bool], FluidLink]):
        self.count, self.sent_bytes = 0, 0.0
        self.remote_up = True
        self._profile, self._caches, self._links = profile, caches, links
        self._active: dict[_Copy, Transfer] = {}

    def __len__(self) -> int:
        """Copies on their way."""
        return len(self._active)

    def start(self, hashes: Sequence[bytes], source: Place, target: Place,
              ended: Callable[[], object]) -> None:
        """Bring a prefix from one node's pool into another's, if that has room.

        Args:
            ended: called when the copy is there, or will not come.
        """
        if not self.remote_up and (source.remote or target.remote):
            ended()
            return
        kept, room = (CacheHold(self._caches[place.remote].pool_of(place.node), hashes)
                      for place in (source, target))
        if not room.fits:
            kept.release()
            room.release()
            ended()
            return
        copy = _Copy(source, target, kept, room, ended)
        link = self._links[source.remote, target.remote]
        self._active[copy] = transfer = Transfer(link, copy, self._arrived)
        wire_bytes = self._profile.wire_bytes(kept.usable_tokens, room.kv_tokens)
        self.count += 1
        self.sent_bytes += wire_bytes
        link.send(transfer, wire_bytes, last=True)

    def drop(self, touched: Callable[[Place, Place], bool]) -> None:
        """Give up the copies from and to such places: they, or what is between them, are gone."""
        for copy in [copy for copy in self._active if touched(copy.source, copy.target)]:
            transfer = self._active[copy]
            transfer.link.cancel(transfer)
            self._end(copy)

    def _arrived(self, copy: _Copy) -> None:
        copy.room.commit()
        self._end(copy)

    def _end(self, copy: _Copy) -> None:
        del self._active[copy]
        copy.kept.release()
        copy.room.release()
        copy.ended()
