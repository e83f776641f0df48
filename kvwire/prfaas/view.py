"""What the router is told: the prefix index, and the clusters as they are now.

All of it is what a gateway in front of real engines can know: block hashes as the engines compute
them, the engines' cache events, queue lengths, and the controller's reading of `link.stats()`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["ClusterView", "NodeView", "PrefixIndex", "PrefixMatch"]


class PrefixMatch(NamedTuple):
    """What one node holds of a request's prompt.

    `kv_tokens`: leading tokens whose KV is there. `usable_tokens`: of these, how many a prefill
    there can skip, for which the states of exactly that length must be there too. Equal for a
    model without states.
    """

    node: str
    kv_tokens: int
    usable_tokens: int


class PrefixIndex(Protocol):
    """Which node holds which prefix; `kvwire.prfaas.pool.metadata` has implementations."""

    def match(self, block_hashes: Sequence[bytes]) -> Sequence[PrefixMatch]:
        """Return the nodes that hold something of the chain, in any order; must not wait."""


@dataclass(frozen=True)
class NodeView:
    """A prefill node that is there. `queue_s`: seconds until it would start a new request."""

    name: str
    queue_s: float = 0.0


@dataclass(frozen=True)
class ClusterView:
    """Both clusters at one moment. The gateway makes a new one whenever it learns something.

    Attributes:
        remote, local: prefill nodes that can take a request.
        threshold_tokens: from the controller; longer uncached lengths are offloaded.
        abundant: the bandwidth regime: prefixes may be fetched from the other cluster.
        remote_up: the remote cluster and the link to it can be used.
        link_gbps: what a transfer may count on.
        backlog_s: seconds that the link needs for what is already promised to it.
        admit_bytes: the largest transfer that the link admits now.
    """

    remote: tuple[NodeView, ...]
    local: tuple[NodeView, ...]
    threshold_tokens: float
    abundant: bool = True
    remote_up: bool = True
    link_gbps: float = math.inf
    backlog_s: float = 0.0
    admit_bytes: float = math.inf
