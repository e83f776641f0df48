"""kvwire inside TLS, and its ceiling: what one core does of the cipher by ``openssl speed``."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess

from bench.measure import Sample

__all__ = ["cipher", "missing", "security"]

RECORD_BYTES = 16384


def missing() -> str:
    """Return what these rows lack here, or ''."""
    import kvwire
    if kvwire.backends()["tls"] is None:
        return "kvwire was built without OpenSSL"
    return "" if shutil.which("openssl") else "there is no openssl command"


def security() -> object:
    """Return a TLS 1.3 security with a fresh key; the cipher is that of certificates too."""
    from kvwire.security import TlsPsk
    return TlsPsk("bench", secrets.token_bytes(32))


def cipher(payload_bytes: int) -> Sample:
    """Return the time in which one core encrypts so many bytes in records of TLS."""
    done = subprocess.run(
        ["openssl", "speed", "-seconds", "1", "-evp", "aes-128-gcm", "-bytes", str(RECORD_BYTES)],
        capture_output=True, text=True, check=True)
    kilobytes_per_s = float(re.search(r"^AES-128-GCM +([\d.]+)k", done.stdout, re.M)[1])
    seconds = payload_bytes / (kilobytes_per_s * 1000)
    return Sample(seconds, seconds, payload_bytes, None)
