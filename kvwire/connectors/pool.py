"""`CachePool`: the cache memory of a whole engine, out of which each request has blocks.

Engine-neutral. A connector says what lies where; here one request's part of it becomes a
`CacheMemory`. Groups may alias one storage: they are told apart by their block tables, never by
address.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np

from kvwire.buffers import Buffer
from kvwire.errors import ErrorCode, LimitError, UsageError
from kvwire.layout import CacheSpec, LayerGroup, TensorSpec
from kvwire.memory import CacheMemory
from kvwire.tensor_spec import DType

if TYPE_CHECKING:
    import torch

__all__ = ["Array", "CachePool", "Pages", "destination_ranks", "source_ranks"]

_CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_FLOATS = {DType.FP32: np.float32, DType.FP16: np.float16}

BlockIds = Sequence[Sequence[int]]
Array = Union[np.ndarray, "torch.Tensor"]
States = Mapping[tuple[int, int, str], Array]  # by group index, layer, tensor name


@dataclass(frozen=True)
class Pages:
    """How a group of the spec lies in the engine's blocks.

    Attributes:
        table: which of the engine's block tables it uses.
        arrays: {(layer, tensor name): array [block_count, *axes]}, of numpy in host memory, or of
            torch, all on one GPU. A tensor without tokens has one state per block.
        split: pages of the arrays in each block of the engine: an engine may hand out blocks that
            its kernels see as several.
    """

    table: int
    arrays: Mapping[tuple[int, str], Array]
    split: int = 1


class CachePool:
    """What one rank of an engine holds, for all requests. Owns no memory; copies states only.

    On a GPU what it copies is enqueued on torch's current stream: the engine's thread, which calls,
    waits for nothing.

    Args:
        whole: the cache of the model, over all ranks.
        rank, count: of tensor parallelism.
        pages: one for each group of `whole`, in order.

    Attributes:
        device: the GPU that all of it lies on, e.g. "cuda:1"; None: host memory.
    """

    def __init__(self, whole: CacheSpec, pages: Sequence[Pages], *, rank: int = 0, count: int = 1):
        if len(pages) != len(whole.groups):
            raise UsageError(f"{len(pages)} pages for {len(whole.groups)} groups")
        self.whole = whole
        self.rank, self.count = rank, count
        self.spec = whole.shard(rank, count) if count > 1 else whole
        self._pages = tuple(pages)
        self._buffers = {(index, *key): Buffer.of(array) for index, part in enumerate(pages)
                         for key, array in part.arrays.items()}
        devices = {buffer.device for buffer in self._buffers.values()}
        if len(devices) > 1:
            raise UsageError("the arrays lie on " + ", ".join(sorted(map(str, devices)))
                             + " (None: host memory): one pool is in one place")
        self.device: str | None = devices.pop() if devices else None
        self.layers = sorted({layer for group in whole.groups for layer in group.layers})
        self.table_count = 1 + max(part.table for part in pages)

    def token_bytes(self) -> dict[int, int]:
        """Return what a token takes in each layer, on this rank."""
        found = dict.fromkeys(self.layers, 0)
        for group in self.spec.groups:
            for layer in group.layers:
                found[layer] += sum(tensor.row_bytes for tensor in group.tensors
                                    if tensor.has_tokens)
        return found

    def memory(self, tokens: tuple[int, int], block_ids: BlockIds) -> CacheMemory:
        """Return a destination: one request's blocks, to be written in place.

        Args:
            tokens: positions [start, stop) that are to be filled.
            block_ids: by block table, from token 0 on, of which those before `start` may be
                anything; of a table of states, the block of the state alone.
        """
        return self._memory(tokens, block_ids, None)

    def source(self, tokens: tuple[int, int], block_ids: BlockIds,
               states: States) -> CacheMemory:
        """Return a source that grows: `extend` adds blocks. `states` come from `staged_states`."""
        return self._memory(tokens, block_ids, states)

    def extend(self, memory: CacheMemory, block_ids: BlockIds) -> None:
        """Add to a source what its block tables lack of `block_ids`."""
        for index, ids in self._page_ids(memory.tokens, block_ids).items():
            memory.extend_blocks(index, ids[memory.blocks_known(index):])

    def staged_states(self) -> States:
        """Return room for the states of one request, where they lie themselves.

        A source's states are copied here when they are final: a request that loses its blocks and
        gets others goes on in other memory.

        Raises: LimitError where a GPU has no room for it.
        """
        try:
            return {(index, layer, tensor.name): self._room(index, layer, tensor)
                    for index, group, layer, tensor in self._states()}
        except RuntimeError as error:  # torch's, when it is out of memory
            raise LimitError(f"there is no room on {self.device} for another request's states: "
                             "leave more free (--gpu-memory-utilization)",
                             code=ErrorCode.RESOURCES_EXHAUSTED) from error

    def stage(self, block_ids: BlockIds, states: States) -> None:
        """Copy one request's states out of their blocks; on a GPU, after what is enqueued."""
        for index, _, layer, tensor in self._states():
            states[index, layer, tensor.name][...] = self._state(index, layer, tensor, block_ids)

    def _memory(self, tokens: tuple[int, int], block_ids: BlockIds,
                states: States | None) -> CacheMemory:
        def find(index: int, layer: int, name: str) -> Buffer | Array:
            tensor = next(t for t in self.spec.groups[index].tensors if t.name == name)
            if tensor.has_tokens:
                return self._buffers[index, layer, name]
            if states is not None:
                return states[index, layer, name]
            return self._state(index, layer, tensor, block_ids)

        return CacheMemory(self.spec, find, tokens=tokens,
                           block_ids=self._page_ids(tokens, block_ids),
                           growing=states is not None, writable=states is None)

    def _page_ids(self, tokens: tuple[int, int], block_ids: BlockIds) -> dict[int, list[int]]:
        """Return the pages of each paged group, from the one that holds the first token on."""
        return {index: _split(block_ids[part.table], part.split)[tokens[0] // group.block_tokens:]
                for index, (group, part) in enumerate(zip(self.spec.groups, self._pages))
                if group.block_tokens}

    def _states(self):
        for index, group in enumerate(self.spec.groups):
            for layer in group.layers:
                for tensor in group.tensors:
                    if not tensor.has_tokens:
                        yield index, group, layer, tensor

    def _room(self, index: int, layer: int, tensor: TensorSpec) -> Array:
        if self.device is None:
            return np.empty(_shape(tensor), carrier(tensor.dtype))
        return self._pages[index].arrays[layer, tensor.name].new_empty(_shape(tensor))

    def _state(self, index: int, layer: int, tensor: TensorSpec, block_ids: BlockIds) -> Array:
        part, group = self._pages[index], self.spec.groups[index]
        ids = block_ids[part.table]
        if len(ids) != 1:
            raise UsageError(f"{_words(group, layer, tensor)}: {len(ids)} blocks were given, a "
                             "state has one")
        array = part.arrays[layer, tensor.name]
        if not 0 <= ids[0] < len(array):
            raise UsageError(f"{_words(group, layer, tensor)}: block {ids[0]} of {len(array)}")
        return array[ids[0]]


def carrier(dtype: DType) -> type:
    """Return a numpy type that holds elements of `dtype`; numpy has no bf16 and no fp8."""
    return _FLOATS.get(dtype) or _CARRIERS[dtype.item_bytes]


def source_ranks(rank: int, count: int, source_count: int) -> range:
    """Return which of `source_count` prefill ranks hold parts of what decode `rank` holds.

    Raises: UsageError unless one count divides the other.
    """
    _check_counts(count, source_count)
    if source_count <= count:
        return range(rank * source_count // count, rank * source_count // count + 1)
    return range(rank * source_count // count, (rank + 1) * source_count // count)


def destination_ranks(rank: int, count: int, destination_count: int) -> range:
    """Return which of `destination_count` decode ranks prefill `rank` sends to."""
    return source_ranks(rank, count, destination_count)


def _check_counts(here: int, there: int) -> None:
    if here < 1 or there < 1 or (here % there and there % here):
        raise UsageError(f"tensor parallelism is {here} here and {there} there; one must divide "
                         "the other")


def _split(block_ids: Sequence[int], split: int) -> list[int]:
    if split == 1:
        return list(block_ids)
    return [block * split + part for block in block_ids for part in range(split)]


def _shape(tensor: TensorSpec) -> tuple[int, ...]:
    return tuple(spec.held for spec in tensor.axes)


def _words(group: LayerGroup, layer: int, tensor: TensorSpec) -> str:
    return f"group {group.label}, layer {layer}, tensor {tensor.name}"
