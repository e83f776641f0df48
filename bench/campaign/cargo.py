"""What travels in a run: caches whose every byte, poison included, both processes know."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from kvwire.layout import CacheSpec, attention, recurrent
from kvwire.memory import CacheMemory

__all__ = ["Cargo", "Held", "POISON", "SPENT"]

POISON = 0xA5  # destinations before the run
SPENT = 0x5A  # memory that has been given back: nobody may write it any more
_BLOCK_TOKENS = 16
_SPARE_BLOCKS = 2


@dataclass(frozen=True)
class Cargo:
    """The cache of one transfer: paged attention layers and one recurrent layer after them."""

    seed: int
    layers: int
    tokens: int
    heads: int
    head_dim: int

    @property
    def spec(self) -> CacheSpec:
        return CacheSpec("campaign", (
            attention(range(self.layers), kv_heads=self.heads, head_dim=self.head_dim,
                      block_tokens=_BLOCK_TOKENS),
            recurrent((self.layers,), heads=self.heads, key_dim=8, value_dim=self.head_dim)))

    @property
    def all_layers(self) -> range:
        return range(self.layers + 1)

    @property
    def block_count(self) -> int:
        return -(-self.tokens // _BLOCK_TOKENS)

    def blocks(self, writable: bool) -> np.ndarray:
        """Return the block ids of one side: scattered, and other ones on the other side."""
        rng = np.random.default_rng((self.seed, writable))
        return rng.permutation(self.block_count + _SPARE_BLOCKS)[:self.block_count]

    def content(self, layer: int, name: str) -> np.ndarray:
        """Return what a tensor holds, as bytes in token order; a view that must not be written.

        Exponents are few, so that codecs have something to do.
        """
        if layer == self.layers:
            count = self.heads * 8 * self.head_dim * 4
        else:
            count = self.tokens * self.heads * self.head_dim * 2
        start = (self.seed * 7919 + layer * 104729 + (name == "v") * 1299709) % (1 << 18) * 4
        return _random_bytes(-(-(count + (1 << 20)) >> 22) + 1)[start:start + count]

    def held(self, writable: bool) -> Held:
        """Make one side's arrays: filled with the content, or with poison where `writable`."""
        return Held(self, writable)


@cache
def _random_bytes(quarters_mib: int) -> np.ndarray:
    words = np.random.default_rng(1).integers(0, 1 << 64, quarters_mib << 19, dtype=np.uint64)
    content = words.view(np.uint8)
    content[1::2] = content[1::2] & 0x81 | 0x3E  # the tops of bf16, and of fp32
    return content


class Held:
    """One side's arrays of a cargo.

    Attributes:
        memory: the `CacheMemory` over them.
    """

    def __init__(self, cargo: Cargo, writable: bool):
        self.cargo = cargo
        self._blocks = cargo.blocks(writable)
        pages = (cargo.block_count + _SPARE_BLOCKS, _BLOCK_TOKENS, cargo.heads, cargo.head_dim)
        self._arrays = {(layer, name): np.empty(pages, np.uint16)
                        for layer in range(cargo.layers) for name in ("k", "v")}
        self._arrays[cargo.layers, "state"] = np.empty(
            (cargo.heads, cargo.head_dim, 8), np.float32)
        self.fill(POISON)
        if not writable:
            for key, array in self._arrays.items():
                self._place(array, cargo.content(*key))
        self.memory = CacheMemory(cargo.spec, self._arrays, tokens=cargo.tokens,
                                  block_ids=self._blocks, writable=writable)

    def fill(self, value: int, layer: int | None = None) -> None:
        """Overwrite every byte (of one layer)."""
        for (of, _), array in self._arrays.items():
            if layer in (None, of):
                array.view(np.uint8)[...] = value

    def is_all(self, value: int) -> bool:
        return all((array.view(np.uint8) == value).all() for array in self._arrays.values())

    def wrong(self, report: dict[int, str]) -> str | None:
        """Say what contradicts `Ticket.report()`, or None.

        Ready layers must hold the content, unwritten ones poison; around any, only poison.
        """
        for (layer, name), array in self._arrays.items():
            state = report[layer]
            expected = np.full(array.nbytes, POISON, np.uint8).view(array.dtype)
            expected = expected.reshape(array.shape)
            if state != "unwritten":
                self._place(expected, self.cargo.content(layer, name))
            actual = array.view(np.uint8)
            if state == "partly written":
                actual = array.copy()
                self._place(actual, self.cargo.content(layer, name))
                actual = actual.view(np.uint8)
            unlike = (actual != expected.view(np.uint8)).reshape(-1)
            if unlike.any():
                return (f"layer {layer} {name} is said to be {state}, but {int(unlike.sum())} of "
                        f"{unlike.size} bytes are wrong, the first at {int(unlike.argmax())}")
        return None

    def _place(self, array: np.ndarray, content: np.ndarray) -> None:
        if array.ndim == 3:
            array.view(np.uint8).reshape(-1)[:] = content
            return
        row_bytes = self.cargo.heads * self.cargo.head_dim * 2
        rows = content.reshape(-1, row_bytes)
        pages = array.view(np.uint8).reshape(-1, _BLOCK_TOKENS, row_bytes)
        whole = self.cargo.tokens // _BLOCK_TOKENS
        cut = whole * _BLOCK_TOKENS
        pages[self._blocks[:whole]] = rows[:cut].reshape(-1, _BLOCK_TOKENS, row_bytes)
        if cut < len(rows):
            pages[self._blocks[whole], :len(rows) - cut] = rows[cut:]
