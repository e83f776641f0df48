"""Who may speak to an endpoint, and who may listen on the way. FORMAT.md §15 says what each mode
protects against, and what it does not."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field

from kvwire.errors import UsageError
from kvwire.limits import ADMISSION_KEY_BYTES_MIN

__all__ = ["HmacAdmission", "Tls", "TlsPsk"]


@dataclass(frozen=True)
class HmacAdmission:
    """Cleartext; lanes are admitted by HMAC-SHA-256 with a shared key.

    Keeps strangers out. Protects nothing on the path: whoever can read it sees everything, whoever
    can write on it can forge frames. For networks that are trusted but shared.

    Args:
        key: at least 16 random bytes (``secrets.token_bytes(32)``), the same on both sides.
    """

    key: bytes = field(repr=False)

    def __post_init__(self):
        _check_key(self.key)

    def options(self) -> dict[str, object]:
        """The native endpoint's options."""
        return {"admission_key": self.key}


@dataclass(frozen=True)
class Tls:
    """TLS 1.3 with certificates on both sides.

    Args:
        ca: PEM file of the authorities that the peer's certificate must come from.
        certificate: PEM file of this side's certificate, and the chain behind it.
        key: PEM file of its private key, without a passphrase.
        peer_name: DNS name or IP address that the peer's certificate must carry; None takes any
            certificate of the authorities.

    The files are read when the endpoint is made.
    """

    ca: str | os.PathLike
    certificate: str | os.PathLike
    key: str | os.PathLike
    peer_name: str | None = None

    def options(self) -> dict[str, object]:
        """The native endpoint's options."""
        return {"ca": os.fspath(self.ca), "certificate": os.fspath(self.certificate),
                "key": os.fspath(self.key), "peer_name": self.peer_name or ""}


@dataclass(frozen=True)
class TlsPsk:
    """TLS 1.3 with a key that both sides hold instead of certificates, and (EC)DHE.

    Args:
        identity: the key's name; travels in clear.
        key: at least 16 random bytes, the same on both sides.
    """

    identity: str
    key: bytes = field(repr=False)

    def __post_init__(self):
        _check_key(self.key)
        if not 1 <= len(self.identity.encode()) <= 128:
            raise UsageError("identity must be 1 to 128 bytes")

    def options(self) -> dict[str, object]:
        """The native endpoint's options."""
        return {"psk_identity": self.identity, "psk": self.key}


Security = HmacAdmission | Tls | TlsPsk


def options_of(security: Security | None) -> dict[str, object]:
    """Return what the native endpoint is told; None is cleartext, open to all."""
    if security is None:
        return {}
    if not isinstance(security, Security):
        raise UsageError(f"security is a {type(security).__name__}; it must be one of "
                         "kvwire.Tls, kvwire.TlsPsk, kvwire.HmacAdmission, or None")
    return {"security": security.options()}


def check_listening(host: str, security: Security | None, allow_unauthenticated: bool) -> None:
    """Raise unless `host` is loopback, lanes must prove something, or the caller insists."""
    if security is None and not allow_unauthenticated and not _is_loopback(host):
        raise UsageError(
            f"listening on {host} without security lets everybody who reaches the port read and "
            "write caches: pass security=kvwire.Tls(...), TlsPsk(...) or HmacAdmission(...), or, "
            "where the network keeps strangers out, allow_unauthenticated=True")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False  # a name: wherever it points to now


def _check_key(key: object) -> None:
    if not isinstance(key, bytes) or len(key) < ADMISSION_KEY_BYTES_MIN:
        raise UsageError(f"the key must be at least {ADMISSION_KEY_BYTES_MIN} random bytes, such "
                         "as secrets.token_bytes(32)")
