"""The settings of a connector, as an engine's configuration carries them: plain JSON."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kvwire.connectors.pool import CachePool
from kvwire.errors import UsageError
from kvwire.handles import join_address, split_address
from kvwire.kernels.staging import Staging, check_fits
from kvwire.receiver import Receiver
from kvwire.security import HmacAdmission, Security, Tls, TlsPsk
from kvwire.sender import Sender

__all__ = ["Options"]

_KINDS = ("tls", "psk", "hmac")


@dataclass(frozen=True)
class Options:
    """What `kv_connector_extra_config` may say.

    Attributes:
        decode_listen: "host:port" where a decode engine takes pushes; its rank r listens on
            port + r. None: it only pulls.
        prefill_listen: "host:port" where a prefill engine is asked for its offers; its rank r
            listens on port + r. None: it only pushes.
        prefill_address: "host:port" under which decode engines reach `prefill_listen`, where that
            is not what it listens on.
        model: the name that both sides must agree on; None: the last part of the model's path.
        lanes, codec, io_threads: as of `Sender`.
        lease_s: how long a hand-off without progress keeps its blocks, on either side.
        security: {"kind": "tls", "ca", "certificate", "key"[, "peer_name"]}, {"kind": "psk",
            "identity", "key"} or {"kind": "hmac", "key"}; of the latter two the key is base64.
        allow_unauthenticated: listen beyond loopback without any security.
        staging: {"ring_bytes", "slice_bytes", "sm_share", "maps_ring"}, each if wanted, as of
            `Staging`: how caches on a GPU are brought to the wire and from it. A prefill engine has
            a ring for each decode rank that it pushes to, and one for its offers.
    """

    decode_listen: str | None = None
    prefill_listen: str | None = None
    prefill_address: str | None = None
    model: str | None = None
    lanes: int | str = "auto"
    codec: str = "raw"
    io_threads: int = 0
    lease_s: float = 120.0
    security: Security | None = None
    allow_unauthenticated: bool = False
    staging: Staging | None = None

    @classmethod
    def of(cls, config: Mapping[str, object]) -> Options:
        """Take the settings apart. Raises UsageError naming what is wrong."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(config) - set(known)):
            raise UsageError(f"kv_connector_extra_config has {', '.join(unknown)}; it may have "
                             f"{', '.join(known)}")
        values = dict(config)
        for name in ("decode_listen", "prefill_listen", "prefill_address"):
            if values.get(name) is not None:
                split_address(str(values[name]), name)
        lease_s = values.get("lease_s", cls.lease_s)
        if not isinstance(lease_s, (int, float)) or lease_s <= 0:
            raise UsageError(f"lease_s is {lease_s!r}; it must be seconds, above 0")
        if values.get("security") is not None:
            values["security"] = _security(values["security"])
        if values.get("staging") is not None:
            values["staging"] = _staging(values["staging"])
        return cls(**values)

    def receiver(self, rank: int) -> Receiver:
        """Return the receiver of a decode rank."""
        listen = None if self.decode_listen is None else _of_rank(self.decode_listen, rank)
        return Receiver(listen, patience_s=self.lease_s, io_threads=self.io_threads,
                        security=self.security, staging=self.staging,
                        allow_unauthenticated=self.allow_unauthenticated)

    def offers(self, rank: int) -> Sender | None:
        """Return the listening sender of a prefill rank, None if it does not offer."""
        if self.prefill_listen is None:
            return None
        return Sender(listen=_of_rank(self.prefill_listen, rank), codec=self.codec,
                      io_threads=self.io_threads, security=self.security, staging=self.staging,
                      allow_unauthenticated=self.allow_unauthenticated)

    def sender(self, address: str) -> Sender:
        """Return a sender to one decode rank."""
        return Sender(address, lanes=self.lanes, codec=self.codec, io_threads=self.io_threads,
                      security=self.security, staging=self.staging)

    def check_pool(self, pool: CachePool) -> None:
        """Raise now what would fail every hand-off out of a pool, or into it.

        Raises:
            UnsupportedError: it is on a GPU that kvwire's kernels cannot run on, and why.
            LimitError: it has a state that is larger than a slice.
        """
        if pool.device is None:
            return
        staging = self.staging or Staging()
        staging.open(pool.device)
        for group in pool.spec.groups:
            check_fits(f"a token of group {group.label}", group.row_bytes, staging.slice_bytes)
            for tensor in group.tensors:
                if not tensor.has_tokens:
                    check_fits(f"group {group.label}: state {tensor.name}", tensor.row_bytes,
                               staging.slice_bytes)

    def prefill_addresses(self, ranks: int) -> list[str]:
        """Return where decode engines find the offers of each prefill rank; none: there are none.
        """
        base = self.prefill_address or self.prefill_listen
        return [] if self.prefill_listen is None else [
            _of_rank(base, rank) for rank in range(ranks)]


def _of_rank(address: str, rank: int) -> str:
    host, port = split_address(address)
    return join_address(host, port + rank if port else 0)


def _staging(config: object) -> Staging:
    known = ("ring_bytes", "slice_bytes", "sm_share", "maps_ring")
    if not isinstance(config, Mapping) or not set(config) <= set(known) or not all(
            isinstance(value, (int, float)) for value in config.values()):
        raise UsageError(f"staging is {config!r}; it may have {', '.join(known)}, numbers each")
    return Staging(**config)


def _security(config: object) -> Security:
    kind = config.get("kind") if isinstance(config, Mapping) else None
    if kind not in _KINDS:
        raise UsageError(f"security is {config!r}; it must have a kind: {', '.join(_KINDS)}")
    given = {key: value for key, value in config.items() if key != "kind"}
    try:
        if kind == "tls":
            return Tls(**given)
        given["key"] = base64.b64decode(given.get("key", ""), validate=True)
        return TlsPsk(**given) if kind == "psk" else HmacAdmission(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"security of kind {kind}: {error}") from None
