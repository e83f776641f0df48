"""Chained block hashes: the name of a prefix, bound to whose it is and what made it.

    tenant_key = SHA-256("kvwire prefix key 1\\n" and the counted fields of CacheKey)[:16]
    seed       = SHA-256("kvwire prefix chain 1\\n", tenant_key, block_tokens as u32)[:16]
    hash[0]    = SHA-256(seed, tokens of block 0 as u32)[:16]
    hash[i]    = SHA-256(hash[i - 1], tokens of block i as u32)[:16]

All integers are little-endian. A hash thus says everything that the cache of its block depends on:
all tokens up to the block's end, the model, the layout and the tokenizer; and whose it is, so that
two tenants never have a hash in common, whatever they ask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvwire.errors import UsageError

__all__ = ["HASH_BYTES", "CacheKey", "chain_hashes"]

HASH_BYTES = 16
"""Kept of SHA-256: 128 bits, so that a second preimage takes 2^128 tries."""

_TOKEN_MAX = (1 << 32) - 1


@dataclass(frozen=True)
class CacheKey:
    """Whose cache it is and what made it; equal keys may share prefixes, others never do.

    Args:
        tenant: who may see it. An unguessable part, in `salt`, keeps those who can read the
            metadata from testing whether a text is cached.
        model: the model's name and revision.
        spec_fingerprint: `CacheSpec.fingerprint()` of the whole model.
        tokenizer_fingerprint: any digest of the tokenizer's files; equal ids mean equal text.
        salt: whatever else decides what a token's cache is: an adapter, an image, a secret.
    """

    tenant: str
    model: str
    spec_fingerprint: bytes
    tokenizer_fingerprint: bytes
    salt: bytes = b""

    def __post_init__(self):
        for field, kind in (("tenant", str), ("model", str), ("spec_fingerprint", bytes),
                            ("tokenizer_fingerprint", bytes), ("salt", bytes)):
            value = getattr(self, field)
            if not isinstance(value, kind):
                raise UsageError(f"CacheKey: {field} is {value!r}; it must be {kind.__name__}")
            if not value and field != "salt":
                raise UsageError(f"CacheKey: {field} is empty; without it caches of different "
                                 "owners or models would be taken for the same")
        fields = (self.tenant.encode(), self.model.encode(), self.spec_fingerprint,
                  self.tokenizer_fingerprint, self.salt)
        counted = b"".join(len(field).to_bytes(8, "little") + field for field in fields)
        object.__setattr__(self, "_digest", _digest(b"kvwire prefix key 1\n" + counted))

    def digest(self) -> bytes:
        """Return the tenant key: 16 bytes that stand for all fields."""
        return self._digest

    def seed(self, block_tokens: int) -> bytes:
        """Return what the first block is chained to."""
        return _digest(b"kvwire prefix chain 1\n" + self._digest
                       + block_tokens.to_bytes(4, "little"))


def chain_hashes(token_ids: Sequence[int] | np.ndarray, block_tokens: int, key: CacheKey, *,
                 after: bytes | None = None) -> list[bytes]:
    """Return the hash of every full block of `token_ids`; a rest shorter than a block has none.

    Args:
        token_ids: integers from 0 to 2^32 - 1.
        block_tokens: tokens of a block.
        after: the hash of the block before the first of these tokens, to continue a chain; None:
            the first token is the prompt's first.

    Raises: UsageError.
    """
    if isinstance(block_tokens, bool) or not isinstance(block_tokens, int) or not (
            1 <= block_tokens < 1 << 32):
        raise UsageError(f"block_tokens is {block_tokens!r}; it must be an integer of at least 1")
    if after is not None and (not isinstance(after, bytes) or len(after) != HASH_BYTES):
        raise UsageError(f"after is {after!r}; it must be a hash of {HASH_BYTES} bytes")
    data, step = _token_bytes(token_ids), 4 * block_tokens
    last, hashes, sha256 = key.seed(block_tokens) if after is None else after, [], hashlib.sha256
    for start in range(0, len(data) - step + 1, step):
        state = sha256(last)
        state.update(data[start:start + step])
        last = state.digest()[:HASH_BYTES]
        hashes.append(last)
    return hashes


def _token_bytes(token_ids: Sequence[int] | np.ndarray) -> memoryview:
    tokens = np.asarray(token_ids)
    if tokens.size == 0:
        return memoryview(b"")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UsageError(f"token_ids have shape {list(tokens.shape)} and dtype {tokens.dtype}; "
                         "they must be a sequence of integers")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high > _TOKEN_MAX:
        raise UsageError(f"token_ids hold {low if low < 0 else high}; they must be from 0 to "
                         f"{_TOKEN_MAX}")
    return memoryview(np.ascontiguousarray(tokens, "<u4")).cast("B")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:HASH_BYTES]
