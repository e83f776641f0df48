"""`HostTier`: the host memory of a pool, in blocks, seen by kvwire as `CacheMemory`.

All KV pages of a block lie in one slot, layer after layer; the tensors of a checkpoint are packed
into as many slots as they need, which may lie anywhere. So any free slot serves both, and memory
cannot become fragmented. No tensor of a checkpoint may be larger than a block: engines align
their blocks likewise.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kvwire.errors import UnsupportedError, UsageError
from kvwire.layout import Axis, CacheSpec, LayerGroup, TensorSpec
from kvwire.memory import CacheMemory
from kvwire.prfaas.pool.blocks import BlockGeometry

__all__ = ["HostTier"]

_ALIGNMENT_BYTES = 64  # a cache line

TokenRange = tuple[int, int]
_Key = tuple[int, int, str]  # group index, layer, tensor name


class _Place(NamedTuple):
    """Where a tensor of a checkpoint lies: in which of its slots, and at which byte."""

    slot_index: int
    offset: int


class HostTier:
    """Blocks of host memory for the caches of one model.

    Args:
        spec: what one machine holds of the model's cache.
        block_tokens: tokens of a block; a multiple of what engines page by.
        capacity_blocks: how many slots. The memory is used as slots are written.

    Attributes:
        geometry: for the `PrefixPool` that says what lies in which slot.

    Raises:
        UsageError: a tensor of a checkpoint is larger than a block; says how many tokens a block
            must have.
        UnsupportedError: the model has no attention KV, or tensors with and without tokens in
            one group.
    """

    def __init__(self, spec: CacheSpec, block_tokens: int, capacity_blocks: int):
        self._is_kv = [_is_kv(group) for group in spec.groups]
        if not any(self._is_kv):
            raise UnsupportedError(f"{spec.model!r} has no attention KV; a pool of prefix blocks "
                                   "needs some")
        self.spec = replace(spec, groups=tuple(
            _paged(group, block_tokens if kv else 0)
            for group, kv in zip(spec.groups, self._is_kv)))
        self._parts = {(True, False): self._part(True, False)}
        if not all(self._is_kv):
            self._parts |= {(kv, True): self._part(kv, True) for kv in (True, False)}
        self._pages, block_bytes = self._place_pages()
        self._states, state_blocks = self._place_states(block_bytes, block_tokens)
        self.geometry = BlockGeometry(block_tokens, block_bytes, state_blocks)
        self.capacity_blocks = capacity_blocks
        self._memory = mmap.mmap(-1, capacity_blocks * block_bytes,
                                 flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._arrays = {key: self._page_array(key, offset) for key, offset in self._pages.items()}

    def memory(self, slots: Sequence[int], tokens: TokenRange, state_slots: Sequence[int] = (), *,
               writable: bool = False) -> CacheMemory:
        """Describe blocks and a checkpoint as the cache of the tokens [start, stop).

        Args:
            slots: of KV, the first holding token `start`, which is a multiple of `block_tokens`;
                empty: the checkpoint alone.
            tokens: [start, stop) of the KV; a checkpoint is that of `stop` tokens.
            state_slots: of the checkpoint; empty: KV alone.
        """
        start, stop = tokens
        geometry = self.geometry
        needed = -(-stop // geometry.block_tokens) - start // geometry.block_tokens
        if start % geometry.block_tokens or (slots and len(slots) != needed) or (
                len(state_slots) not in (0, geometry.state_blocks)):
            raise UsageError(f"{len(slots)} slots and {len(state_slots)} of a checkpoint cannot "
                             f"hold tokens [{start}, {stop}) in blocks of "
                             f"{geometry.block_tokens}, with checkpoints of "
                             f"{geometry.state_blocks}")
        if not slots and not state_slots:
            raise UsageError("neither blocks nor a checkpoint are named: there is no memory")
        spec, groups = self._parts[bool(slots), bool(state_slots)]
        ranges = {number: tokens if self._is_kv[index] else _fixed_range(spec.groups[number], stop)
                  for number, index in enumerate(groups)}

        def find(number: int, layer: int, name: str) -> np.ndarray:
            key = groups[number], layer, name
            page = self._arrays.get(key)
            return self._state_array(key, state_slots) if page is None else page

        first = min(low for low, _ in ranges.values())
        return CacheMemory(spec, find, tokens=(first, stop), group_tokens=ranges,
                           block_ids=list(slots), writable=writable)

    def _part(self, kv: bool, states: bool) -> tuple[CacheSpec, list[int]]:
        kept = [index for index, is_kv in enumerate(self._is_kv) if (kv if is_kv else states)]
        return replace(self.spec, groups=tuple(self.spec.groups[i] for i in kept)), kept

    def _tensors(self, kv: bool) -> list[tuple[_Key, LayerGroup, TensorSpec]]:
        return [((index, layer, tensor.name), group, tensor)
                for index, group in enumerate(self.spec.groups) if self._is_kv[index] == kv
                for layer in group.layers for tensor in group.tensors]

    def _place_pages(self) -> tuple[dict[_Key, int], int]:
        places, offset = {}, 0
        for key, _, tensor in self._tensors(kv=True):
            places[key] = offset
            offset += _aligned(tensor.page_bytes)
        return places, offset

    def _place_states(self, block_bytes: int, block_tokens: int) -> tuple[dict[_Key, _Place], int]:
        """Pack the largest tensors first, each into the first slot with room."""
        sized = sorted(((_fixed_bytes(group, tensor), key) for key, group, tensor
                        in self._tensors(kv=False)), key=lambda item: -item[0])
        places: dict[_Key, _Place] = {}
        used: list[int] = []
        for count, key in sized:
            if count > block_bytes:
                needed = -(-count * block_tokens // block_bytes)
                raise UsageError(f"tensor {key[2]!r} of layer {key[1]} has {count} bytes, a block "
                                 f"of {block_tokens} tokens has {block_bytes}: blocks must have "
                                 f"at least {needed} tokens")
            slot = next((i for i, filled in enumerate(used) if filled + count <= block_bytes),
                        len(used))
            if slot == len(used):
                used.append(0)
            places[key] = _Place(slot, used[slot])
            used[slot] += _aligned(count)
        return places, len(used)

    def _page_array(self, key: _Key, offset: int) -> np.ndarray:
        tensor = self._tensor(key)
        shape = [self.geometry.block_tokens if spec.axis == Axis.TOKEN else spec.held
                 for spec in tensor.axes]
        strides = _strides(shape, tensor.dtype.item_bytes)
        return np.ndarray([self.capacity_blocks, *shape], f"u{tensor.dtype.item_bytes}",
                          self._memory, offset, [self.geometry.block_bytes, *strides])

    def _state_array(self, key: _Key, slots: Sequence[int]) -> np.ndarray:
        tensor, place = self._tensor(key), self._states[key]
        window = self.spec.groups[key[0]].window_tokens
        shape = [window if spec.axis == Axis.TOKEN else spec.held for spec in tensor.axes]
        return np.ndarray(shape, f"u{tensor.dtype.item_bytes}", self._memory,
                          slots[place.slot_index] * self.geometry.block_bytes + place.offset)

    def _tensor(self, key: _Key) -> TensorSpec:
        return next(t for t in self.spec.groups[key[0]].tensors if t.name == key[2])


def _is_kv(group: LayerGroup) -> bool:
    """True for a group whose cache grows with the prompt; False for states and windows."""
    if group.row_bytes and group.state_bytes:
        raise UnsupportedError(f"group {group.label} has tensors with and without tokens; give "
                               "them groups of their own")
    return bool(group.row_bytes) and not group.window_tokens


def _paged(group: LayerGroup, block_tokens: int) -> LayerGroup:
    return replace(group, tensors=tuple(
        replace(tensor, block_tokens=block_tokens if tensor.has_tokens else 0)
        for tensor in group.tensors))


def _fixed_bytes(group: LayerGroup, tensor: TensorSpec) -> int:
    return tensor.row_bytes * (group.window_tokens if tensor.has_tokens else 1)


def _fixed_range(group: LayerGroup, stop: int) -> TokenRange:
    """Return the tokens that a group without blocks holds at the length `stop`."""
    return max(0, stop - group.window_tokens) if group.window_tokens else stop, stop


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _strides(shape: Sequence[int], item_bytes: int) -> list[int]:
    strides, step = [], item_bytes
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return strides[::-1]
