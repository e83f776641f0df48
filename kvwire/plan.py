"""Where each byte of a segment lies: the definition in numpy, and the way into the native planner.

The reference works out one address per element. The native planner makes the same bytes out of a
few regular patterns; tests hold the two together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvwire.control import Item
from kvwire.layout import Axis, CacheSpec, DType
from kvwire.reference_memory import item_raw_bytes, wire_elements

__all__ = ["AxisStride", "LeafMemory", "TokenLayout", "element_addresses", "gather",
           "native_items", "place", "scatter", "to_native", "zero_missing_columns"]


@dataclass(frozen=True)
class AxisStride:
    """Indices [start, stop) of `full` lie here, `stride` bytes apart."""

    axis: Axis
    full: int
    start: int
    stop: int
    stride: int


@dataclass(frozen=True)
class TokenLayout:
    """How the tokens [start, origin + count) lie, `stride` bytes apart within a block.

    Attributes:
        origin: absolute position of the first token at the address, or in ``block_ids[0]``.
        start: first position that may be touched; a block can begin before it.
        block_tokens, block_stride, block_ids: pages, `block_stride` bytes apart; int64 ids.
        ring_tokens: not 0: position p lies at index p % ring_tokens.
    """

    origin: int
    count: int
    start: int
    stride: int
    block_tokens: int = 0
    block_stride: int = 0
    block_ids: np.ndarray | None = None
    ring_tokens: int = 0

    def offsets(self, positions: np.ndarray) -> np.ndarray:
        """Return the byte offset from the address of each absolute position."""
        if self.ring_tokens:
            return positions % self.ring_tokens * self.stride
        index = positions - self.origin
        if not self.block_tokens:
            return index * self.stride
        blocks = self.block_ids[index // self.block_tokens]
        return blocks * self.block_stride + index % self.block_tokens * self.stride


@dataclass(frozen=True)
class LeafMemory:
    """One leaf as it lies in this side's memory; csrc/plan/geometry.hpp has the same."""

    address: int
    dtype: DType
    axes: tuple[AxisStride, ...]  # all but TOKEN
    tokens: TokenLayout | None = None

    def addresses(self, coordinates: Mapping[Axis, np.ndarray], columns: int) -> np.ndarray:
        """Return int64 addresses of elements at absolute coordinates, -1 where there is no place.

        `columns`: how many the wire has; both end with the newest one.
        """
        address, missing = np.int64(self.address), False
        if self.tokens is not None:
            address = address + self.tokens.offsets(coordinates[Axis.TOKEN])
        for held in self.axes:
            index = coordinates[held.axis] - held.start
            if held.axis == Axis.COLUMN:
                index = index + held.full - columns
                missing = missing | (index < 0)
            address = address + index * held.stride
        return np.where(missing, -1, address)


def element_addresses(spec: CacheSpec, item: Item, leaves: Mapping) -> np.ndarray:
    """Return the address of every element of `item` in wire order, -1 where it is skipped.

    Args:
        spec: the sender's: it sets the order.
        leaves: {(kind, layer, leaf name): LeafMemory} of one side.
    """
    group = spec.groups[item.group_index]
    tensor = group.tensors[item.tensor_index]
    found = np.empty(item_raw_bytes(tensor, item) // tensor.dtype.item_bytes, np.int64)
    for leaf, where, coordinates in wire_elements(tensor, item):
        memory = leaves[group.kind, item.layer, leaf.name]
        found[where] = memory.addresses(coordinates, leaf.full.get(Axis.COLUMN, 0))
    return found


def _byte_addresses(spec: CacheSpec, items: Sequence[Item], leaves: Mapping) -> np.ndarray:
    parts = [np.empty(0, np.int64)]
    for item in items:
        elements = element_addresses(spec, item, leaves)[:, None]
        width = spec.groups[item.group_index].tensors[item.tensor_index].dtype.item_bytes
        parts.append(np.where(elements < 0, -1, elements + np.arange(width)).ravel())
    return np.concatenate(parts)


def _view(addresses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return memory from the lowest to the highest address, and the indices of `addresses` in it.

    Only what the addresses name may be touched: what lies between belongs to others.
    """
    low = int(addresses.min())
    span = (ctypes.c_uint8 * (int(addresses.max()) - low + 1)).from_address(low)
    return np.frombuffer(span, np.uint8), addresses - low


def gather(spec: CacheSpec, items: Sequence[Item], leaves: Mapping) -> bytes:
    """Return the bytes of a segment in wire order; skipped ones are 0."""
    addresses = _byte_addresses(spec, items, leaves)
    out, held = np.zeros(len(addresses), np.uint8), addresses >= 0
    if held.any():
        memory, index = _view(addresses[held])
        out[held] = memory[index]
    return out.tobytes()


def scatter(spec: CacheSpec, items: Sequence[Item], leaves: Mapping, data: bytes) -> None:
    """Write the bytes of a segment in place; skipped ones go nowhere."""
    addresses = _byte_addresses(spec, items, leaves)
    held = addresses >= 0
    if held.any():
        memory, index = _view(addresses[held])
        memory[index] = np.frombuffer(data, np.uint8)[held]


def to_native(spec: CacheSpec) -> list[tuple]:
    """Return the groups of a spec as the plain tuples that the native planner takes."""
    return [(int(group.kind), group.window_tokens, list(group.layers), [
        (tensor.name, int(tensor.dtype), tensor.block_tokens, tensor.replicated, [
            (int(spec.axis), [(part.name, part.full, part.start, part.stop)
                              for part in spec.slices])
            for spec in tensor.axes])
        for tensor in group.tensors]) for group in spec.groups]


def native_items(items: Sequence[Item]) -> list[tuple]:
    """Return items as the plain tuples that the native planner takes."""
    return [(item.group_index, item.tensor_index, item.layer, item.token_start, item.token_stop)
            for item in items]


def place(spec: CacheSpec, items: Sequence[Item], memory) -> object:
    """Return the native placement of a segment in a `CacheMemory`, which it keeps alive.

    Raises:
        SpecMismatchError: a leaf, dtype, axis or slice of the sender's `spec` does not fit.
        RefusedError: the memory does not hold the tokens (TOKENS_MISMATCH).
        FormatError: an item contradicts `spec` (SEGMENT_INVALID).
    """
    from kvwire import _native
    placement = _native.place(to_native(spec), native_items(items), memory.native)
    placement.memory = memory
    return placement


def zero_missing_columns(spec: CacheSpec, items: Sequence[Item], memory) -> None:
    """Zero the older columns of convolution states that a sender with `spec` does not have."""
    from kvwire import _native
    _native.zero_missing_columns(to_native(spec), native_items(items), memory.native)
