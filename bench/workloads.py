"""What travels in each case: a cache spec, a pool of bytes on each side, and which bytes go where.

Source and destination are flat pools of bytes; the arrays that kvwire is given are views of them.
The same moves, as (source offset, destination offset, length), drive the ceilings and the check.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench import kv_sample
from kvwire.layout import Axis, CacheSpec, DType, attention, auxiliary, request_tensor
from kvwire.memory import CacheMemory

__all__ = ["CASES", "KV", "PAGE_BYTES", "POISON", "Workload", "cut", "expect",
           "first_difference", "make", "random_pool", "source_pool", "stamp"]

PAGE_BYTES = 4096
BLOCK_TOKENS = 16
POOL_BLOCKS_PER_BLOCK = 2  # pages lie scattered in a pool of twice their size, as in an engine
POISON = 0xA5
KV = "smollm2-kv"  # real keys and values; all other cases carry random bytes
_COMPARED_WORDS = 1 << 21


@dataclass(frozen=True)
class Workload:
    """One case.

    Attributes:
        spec, tokens: what kvwire is told.
        source_blocks, destination_blocks: block ids of all paged groups.
        pool_bytes: size of either side's pool, a multiple of 4096.
        moves: int64 [count, 3]: source offset, destination offset, bytes; in stream order.
    """

    spec: CacheSpec
    tokens: int
    source_blocks: np.ndarray
    destination_blocks: np.ndarray
    pool_bytes: int
    moves: np.ndarray

    @property
    def payload_bytes(self) -> int:
        return int(self.moves[:, 2].sum())

    def memory(self, pool: np.ndarray, writable: bool) -> CacheMemory:
        """Describe `pool` (uint8 [pool_bytes]) as the cache of this case; borrows it."""
        blocks = self.destination_blocks if writable else self.source_blocks
        arrays = {(layer, tensor.name): _view(pool, offset, shape, tensor.dtype)
                  for offset, layer, tensor, shape in _arrays(self.spec, self.tokens)[0]}
        paged = any(group.block_tokens for group in self.spec.groups)
        return CacheMemory(self.spec, arrays, tokens=self.tokens, writable=writable,
                           block_ids=blocks if paged else None)


def _contiguous(shrink: int) -> tuple[CacheSpec, int]:
    return CacheSpec("contiguous", (request_tensor("data", (4096 // shrink, 65536), "bytes"),)), 0


def _blocks(block_bytes: int) -> Callable[[int], tuple[CacheSpec, int]]:
    def build(shrink: int) -> tuple[CacheSpec, int]:
        group = auxiliary([0], "page", dim=block_bytes // BLOCK_TOKENS, dtype="bytes",
                          block_tokens=BLOCK_TOKENS)
        return CacheSpec("blocks", (group,)), (256 << 20) // block_bytes // shrink * BLOCK_TOKENS
    return build


def _kv(shrink: int) -> tuple[CacheSpec, int]:
    group = attention(range(30), kv_heads=3, head_dim=64, block_tokens=BLOCK_TOKENS)
    tokens = (256 << 20) // (30 * 2 * 3 * 64 * 2) // shrink
    return CacheSpec("smollm2-135m", (group,)), tokens // BLOCK_TOKENS * BLOCK_TOKENS


def _single_pages(shrink: int) -> tuple[CacheSpec, int]:
    group = auxiliary([0], "page", dim=PAGE_BYTES, dtype="bytes")
    return CacheSpec("pages", (group,)), 2200 // shrink


def _kimi_linear(shrink: int) -> tuple[CacheSpec, int]:
    spec = CacheSpec.preset("kimi-linear-48b", block_tokens=BLOCK_TOKENS)
    return spec, (32 << 10) // shrink


CASES: dict[str, Callable[[int], tuple[CacheSpec, int]]] = {
    "contiguous-256m": _contiguous,
    "blocks-64k": _blocks(64 << 10),
    "blocks-4k": _blocks(4 << 10),
    "kimi-linear-32k": _kimi_linear,
    "roundtrip-4k": _single_pages,
    KV: _kv,
}


def make(case: str, shrink: int = 1) -> Workload:
    """Return the workload named `case`; the same in every process. `shrink` divides its size."""
    spec, tokens = CASES[case](shrink)
    blocks = tokens // BLOCK_TOKENS
    rng = np.random.default_rng(20261121)
    source, destination = (rng.permutation(POOL_BLOCKS_PER_BLOCK * blocks)[:blocks]
                           for _ in range(2))
    arrays, pool_bytes = _arrays(spec, tokens)
    moves = []
    for offset, _, tensor, shape in sorted(arrays, key=lambda array: array[1]):
        if tensor.block_tokens:
            page = tensor.row_bytes * tensor.block_tokens
            moves.append(np.stack([offset + source * page, offset + destination * page,
                                   np.full(blocks, page)], axis=1))
        else:
            held = int(np.prod(shape)) * tensor.dtype.item_bytes
            moves.append(np.array([[offset, offset, held]]))
    return Workload(spec, tokens, source, destination, pool_bytes,
                    np.ascontiguousarray(np.concatenate(moves), np.int64))


def cut(moves: np.ndarray, piece_bytes: int) -> np.ndarray:
    """Return the moves in pieces of `piece_bytes`, of which each must be a multiple."""
    counts = moves[:, 2] // piece_bytes
    pieces = np.repeat(moves, counts, axis=0)
    within = np.arange(len(pieces)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces[:, :2] += within[:, None] * piece_bytes
    pieces[:, 2] = piece_bytes
    return pieces


def source_pool(case: str, workload: Workload) -> np.ndarray:
    """Return uint8 [pool_bytes] to be sent, the same in every process."""
    pool = random_pool(workload.pool_bytes)
    if case == KV:
        _fill(pool, workload)
    return pool


def _fill(pool: np.ndarray, workload: Workload) -> None:
    """Write the keys and values of the sample into the blocks, its layers and tokens in turn."""
    folder = kv_sample.make()
    samples = {"k": np.load(folder / kv_sample.KEYS), "v": np.load(folder / kv_sample.VALUES)}
    tokens = np.arange(workload.tokens).reshape(-1, BLOCK_TOKENS)
    for offset, layer, tensor, shape in _arrays(workload.spec, workload.tokens)[0]:
        sample = samples[tensor.name]
        blocks = sample[layer % len(sample)][tokens % sample.shape[1]]
        _view(pool, offset, shape, tensor.dtype)[workload.source_blocks] = blocks


def random_pool(pool_bytes: int) -> np.ndarray:
    """Return uint8 [pool_bytes] of random bytes, the same in every process."""
    return np.random.default_rng(1).integers(
        0, 1 << 64, pool_bytes // 8, dtype=np.uint64).view(np.uint8)


def stamp(pool: np.ndarray, run: int) -> None:
    """Make every page of `pool` this run's own, whatever runs came before."""
    words = pool.view(np.uint64).reshape(-1, PAGE_BYTES // 8)
    words[:, 0] = np.arange(len(words), dtype=np.uint64) + np.uint64(run << 32)


def expect(expected: np.ndarray, source: np.ndarray, moves: np.ndarray) -> None:
    """Write into `expected` what the destination must be: the moved bytes, else poison."""
    expected.fill(POISON)
    for start, place, count in moves.tolist():
        expected[place:place + count] = source[start:start + count]


def first_difference(expected: np.ndarray, actual: np.ndarray) -> int | None:
    """Return the offset of the first differing byte of two uint8 pools, or None."""
    words, others = expected.view(np.uint64), actual.view(np.uint64)
    for at in range(0, len(words), _COMPARED_WORDS):
        unlike = words[at:at + _COMPARED_WORDS] != others[at:at + _COMPARED_WORDS]
        if unlike.any():
            word = at + int(unlike.argmax())
            here = expected[8 * word:8 * word + 8] != actual[8 * word:8 * word + 8]
            return 8 * word + int(here.argmax())
    return None


def _arrays(spec: CacheSpec, tokens: int) -> tuple[list, int]:
    """Return [(pool offset, layer, tensor, shape)] of all arrays and the bytes they take."""
    arrays, offset = [], 0
    for group in spec.groups:
        for layer in group.layers:
            for tensor in group.tensors:
                shape = [axis.held if axis.axis != Axis.TOKEN else tensor.block_tokens or tokens
                         for axis in tensor.axes]
                if tensor.block_tokens:
                    shape.insert(0, POOL_BLOCKS_PER_BLOCK * tokens // tensor.block_tokens)
                arrays.append((offset, layer, tensor, shape))
                held = int(np.prod(shape)) * tensor.dtype.item_bytes
                offset += -(-held // PAGE_BYTES) * PAGE_BYTES
    return arrays, offset


def _view(pool: np.ndarray, offset: int, shape: list[int], dtype: DType) -> np.ndarray:
    count = int(np.prod(shape)) * dtype.item_bytes
    element = {DType.FP32: np.float32, DType.BF16: np.uint16, DType.BYTES: np.uint8}[dtype]
    return pool[offset:offset + count].view(element).reshape(shape)
