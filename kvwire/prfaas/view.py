"""What the router is told: the prefix index, and the clusters as they are now.

All of it is what a gateway in front of real engines can know: block hashes as the engines compute
them, the engines' cache events, queue lengths, and the controller's reading of `link.stats()`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["ClusterView", "HeldBlocks", "NodeView", "PrefixIndex"]


class HeldBlocks(Protocol):
    """What one node holds of a prompt, in blocks from its first.

    `kv_blocks`: blocks of KV. `usable_blocks`: of these, how many a prefill there can skip, for
    which the states of exactly that length must be there too; equal for a model without states.
    """

    @property
    def kv_blocks(self) -> int: ...

    @property
    def usable_blocks(self) -> int: ...


class PrefixIndex(Protocol):
    """Which node holds which prefix; `kvwire.prfaas.pool.metadata` has implementations."""

    def match(self, tenant_key: bytes, hashes: Sequence[bytes]) -> Mapping[str, HeldBlocks]:
        """Return what each node holds of a prompt, by its name; must not wait."""


@dataclass(frozen=True)
class NodeView:
    """A prefill node that is there.

    `name`: unique over both clusters, as the index knows it ("cluster/node"). `queue_s`: seconds
    until it would start a new request.
    """

    name: str
    queue_s: float = 0.0


class ClusterView(NamedTuple):
    """Both clusters at one moment. The gateway makes a new one whenever it learns something.

    Attributes:
        remote, local: prefill nodes that can take a request.
        threshold_tokens: from the controller; longer uncached lengths are offloaded.
        abundant: the bandwidth regime: prefixes may be fetched from the other cluster.
        remote_up: the remote cluster and the link to it can be used.
        link_gbps: what a transfer may count on.
        backlog_s: seconds that the link needs for what is already promised to it.
        admit_bytes: the largest transfer that the link admits now.
        promised_s: seconds that the link needs for all that offloaded requests will still send.
    """

    remote: tuple[NodeView, ...]
    local: tuple[NodeView, ...]
    threshold_tokens: float
    abundant: bool = True
    remote_up: bool = True
    link_gbps: float = math.inf
    backlog_s: float = 0.0
    admit_bytes: float = math.inf
    promised_s: float = 0.0
