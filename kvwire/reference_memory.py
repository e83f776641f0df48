"""FORMAT.md §7.2, §7.3 and the claims of §7.5, element by element: memory for the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvwire.control import End, Item
from kvwire.errors import ErrorCode, KvwireError
from kvwire.layout import Axis, CacheSpec, GroupKind, LayerGroup, Leaf, TensorSpec
from kvwire.manifest import Manifest
from kvwire.structure import fail

__all__ = ["ReferenceMemory", "ReferenceTicket", "check_item", "item_raw_bytes", "spec_mismatch"]

Key = tuple[GroupKind, int, str]


def check_item(spec: CacheSpec, item: Item, token_start: int, token_stop: int) -> TensorSpec:
    """Return an item's tensor; SEGMENT_INVALID when it contradicts the manifest."""
    def require(holds: bool, what: str) -> None:
        if not holds:
            fail(ErrorCode.SEGMENT_INVALID, f"SEGMENT: {what}, in {item}")
    require(item.group_index < len(spec.groups), "no such group")
    group = spec.groups[item.group_index]
    require(item.tensor_index < len(group.tensors), "no such tensor")
    tensor = group.tensors[item.tensor_index]
    require(item.layer in group.layers, "the layer is not the group's")
    if tensor.has_tokens:
        require(token_start <= item.token_start <= item.token_stop <= token_stop,
                f"the tokens are not within {token_start} to {token_stop}")
    else:
        require(item.token_start == item.token_stop == 0, "there are no tokens")
    return tensor


def item_raw_bytes(tensor: TensorSpec, item: Item) -> int:
    """Return the length of an item's bytes."""
    rows = item.token_stop - item.token_start if tensor.has_tokens else 1
    return rows * tensor.row_bytes


def spec_mismatch(theirs: CacheSpec, mine: CacheSpec) -> str | None:
    """Return in words the field in which the sender's spec does not fit the receiver's (§7.3)."""
    if theirs.model and mine.model and theirs.model != mine.model:
        return f"model: {theirs.model!r} at the sender, {mine.model!r} here"
    held = {(group.kind, layer, leaf.name): leaf for group, layer, _, leaf in mine.leaves()}
    for group, layer, _, leaf in theirs.leaves():
        here = held.get((group.kind, layer, leaf.name))
        problem = _leaf_mismatch(leaf, here) if here else "held at the sender only"
        if problem:
            return f"group {group.label}, layer {layer}, leaf {leaf.name}: {problem}"
    return None


def _leaf_mismatch(theirs: Leaf, mine: Leaf) -> str | None:
    if theirs.dtype != mine.dtype:
        return f"dtype {theirs.dtype.name} at the sender, {mine.dtype.name} here"
    there = {spec.axis: spec.slices for spec in theirs.axes}
    here = {spec.axis: spec.slices for spec in mine.axes}
    if set(there) != set(here):
        return f"axes {sorted(there)} at the sender, {sorted(here)} here"
    for axis in set(there) - {Axis.TOKEN, Axis.COLUMN}:
        (a,), (b,) = there[axis], here[axis]
        if a.full != b.full:
            return f"{axis.name} {a.full} at the sender, {b.full} here"
        if not b.start <= a.start <= a.stop <= b.stop:
            return (f"{axis.name} slice {a.start}:{a.stop} at the sender is not within "
                    f"{b.start}:{b.stop} here")
    return None


def wire_elements(tensor: TensorSpec, item: Item) -> Iterator[tuple[Leaf, np.ndarray, dict]]:
    """Yield the elements of an item in wire order (§7.2), leaf by leaf and piece by piece.

    Each time: the leaf, where its elements lie among the item's [n], and their coordinates on each
    axis [n], counted over all ranks.
    """
    order = [spec.axis for spec in tensor.axes]
    token_outermost = order[0] == Axis.TOKEN
    cuts = [item.token_start, item.token_stop]
    if tensor.block_tokens and not token_outermost:
        first = item.token_start // tensor.block_tokens + 1
        cuts[1:1] = range(first * tensor.block_tokens, item.token_stop, tensor.block_tokens)
    base = 0
    for start, stop in zip(cuts, cuts[1:]) if tensor.has_tokens else [(0, 0)]:
        shape = [stop - start if spec.axis == Axis.TOKEN else spec.held for spec in tensor.axes]
        grid = np.indices(shape).reshape(len(shape), -1)
        for leaf in tensor.leaves:
            mine = np.ones(grid.shape[1], bool)
            coordinates = {}
            for spec, along in zip(leaf.axes, grid):
                if spec.axis == Axis.TOKEN:
                    coordinates[spec.axis] = along + start
                    continue
                offset = leaf.offset if spec.axis == tensor.fused_axis else 0
                mine &= (along >= offset) & (along < offset + spec.held)
                coordinates[spec.axis] = along - offset + spec.slices[0].start
            yield (leaf, base + np.flatnonzero(mine),
                   {axis: along[mine] for axis, along in coordinates.items()})
        base += grid.shape[1]


class ReferenceMemory:
    """One numpy array for each leaf that one side holds, in its own order, contiguous.

    Args:
        spec: what this side holds.
        token_start, token_stop: the tokens that the arrays of TOKEN leaves cover.
        arrays: {(kind, layer, leaf): uint8 [bytes of the leaf]}; poisoned memory without it.
    """

    def __init__(self, spec: CacheSpec, token_start: int, token_stop: int,
                 arrays: Mapping[Key, np.ndarray] | None = None):
        self.spec, self.token_start, self.token_stop = spec, token_start, token_stop
        self.leaves: dict[Key, Leaf] = {}
        self.arrays: dict[Key, np.ndarray] = dict(arrays or {})
        self._owners: dict[Key, np.ndarray] = {}  # number of the slice that claims; 0: none
        self._slices: dict[tuple[Key, frozenset], int] = {}
        self._replicated: dict[Key, np.ndarray] = {}
        self.verified: dict[Key, np.ndarray] = {}
        self._window_tokens: dict[Key, int] = {}
        for group, layer, _, leaf in spec.leaves():
            key = group.kind, layer, leaf.name
            count = int(np.prod(self._shape(leaf)))
            self.leaves[key] = leaf
            self._window_tokens[key] = group.window_tokens
            self.arrays.setdefault(key, np.full(count * leaf.dtype.item_bytes, 0xA5, np.uint8))
            self._owners[key] = np.zeros(count, int)
            self._replicated[key], self.verified[key] = np.zeros((2, count), bool)

    def _shape(self, leaf: Leaf) -> list[int]:
        tokens = self.token_stop - self.token_start
        return [tokens if spec.axis == Axis.TOKEN else spec.held for spec in leaf.axes]

    def _cells(self, key: Key, source: Leaf, coordinates: dict) -> np.ndarray:
        """Return the element index in the leaf's array of each coordinate, -1 for nowhere."""
        leaf = self.leaves[key]
        cells, outside = 0, False
        for spec, extent in zip(leaf.axes, self._shape(leaf)):
            along = coordinates[spec.axis]
            if spec.axis == Axis.TOKEN:
                along = along - self.token_start
            elif spec.axis == Axis.COLUMN:
                columns = next(s.held for s in source.axes if s.axis == Axis.COLUMN)
                along = along + extent - columns
            else:
                along = along - spec.slices[0].start
            outside = outside | (along < 0) | (along >= extent)
            cells = cells * extent + along
        return np.where(outside, -1, cells)

    def _places(self, group: LayerGroup, tensor: TensorSpec, item: Item
                ) -> Iterator[tuple[Key, Leaf, np.ndarray, np.ndarray]]:
        for leaf, where, coordinates in wire_elements(tensor, item):
            key = group.kind, item.layer, leaf.name
            yield key, leaf, where, self._cells(key, leaf, coordinates)

    def claim(self, spec: CacheSpec, items: Sequence[Item]) -> frozenset[Item]:
        """Reserve what `items` of the sender's `spec` fill, and return those that are replicas.

        Raises OVERLAP when something is taken, unless it is a replica (§7.5).
        """
        replicas = []
        for item in items:
            group = spec.groups[item.group_index]
            tensor = group.tensors[item.tensor_index]
            taken = [self._claim_leaf(key, cells[cells >= 0], leaf, tensor.replicated)
                     for key, leaf, _, cells in self._places(group, tensor, item)]
            replicas += [item] if taken and all(taken) else []
        return frozenset(replicas)

    def _claim_leaf(self, key: Key, cells: np.ndarray, leaf: Leaf, replicated: bool) -> bool:
        """Claim elements, and return whether they are claimed already, as a replica's may be."""
        slices = frozenset((spec.axis, spec.slices) for spec in leaf.axes
                           if spec.axis not in (Axis.TOKEN, Axis.COLUMN))
        number = self._slices.setdefault((key, slices), len(self._slices) + 1)
        owners = self._owners[key][cells]
        if not owners.any():
            self._owners[key][cells] = number
            self._replicated[key][cells] = replicated
            return False
        if not (replicated and self._replicated[key][cells].all() and (owners == number).all()):
            fail(ErrorCode.OVERLAP, f"group {key[0].name.lower()}, layer {key[1]}, leaf {key[2]}: "
                 "another part claims some of these elements")
        return True

    def scatter(self, spec: CacheSpec, items: Sequence[Item], replicas: frozenset[Item],
                offset: int, data: bytes) -> None:
        """Write the bytes [offset, offset + len(data)) of a segment, but for its replicas."""
        for item, key, where, places in self._segment_bytes(spec, items):
            if item in replicas:
                continue
            mine = (where >= offset) & (where < offset + len(data)) & (places >= 0)
            self.arrays[key][places[mine]] = np.frombuffer(data, np.uint8)[where[mine] - offset]
            self.verified[key][places[mine] // self.leaves[key].dtype.item_bytes] = True

    def gather(self, spec: CacheSpec, items: Sequence[Item]) -> bytes:
        """Return all bytes of the segment; `spec` is this side's own."""
        parts = list(self._segment_bytes(spec, items))
        out = np.zeros(sum(len(where) for _, _, where, _ in parts), np.uint8)
        for _, key, where, places in parts:
            out[where] = self.arrays[key][places]
        return out.tobytes()

    def _segment_bytes(self, spec: CacheSpec, items: Sequence[Item]
                       ) -> Iterator[tuple[Item, Key, np.ndarray, np.ndarray]]:
        """Yield for parts of the segment: item, key, offsets in it [n], places in the array [n]."""
        base = 0
        for item in items:
            group = spec.groups[item.group_index]
            tensor = group.tensors[item.tensor_index]
            width = tensor.dtype.item_bytes
            for key, _, where, cells in self._places(group, tensor, item):
                inner = np.arange(width)
                places = np.where(cells[:, None] < 0, -1, cells[:, None] * width + inner)
                yield item, key, (base + where[:, None] * width + inner).ravel(), places.ravel()
            base += item_raw_bytes(tensor, item)

    def zero_missing_columns(self, spec: CacheSpec, items: Sequence[Item]) -> None:
        """Zero the older columns of convolution states that the sender does not have (§7.3)."""
        for item in items:
            group = spec.groups[item.group_index]
            for leaf in group.tensors[item.tensor_index].leaves:
                columns = next((s.held for s in leaf.axes if s.axis == Axis.COLUMN), None)
                key = group.kind, item.layer, leaf.name
                if columns is None:
                    continue
                mine = self.leaves[key]
                axis = [spec.axis for spec in mine.axes].index(Axis.COLUMN)
                shape = self._shape(mine)
                older = (slice(None),) * axis + (slice(0, max(0, shape[axis] - columns)),)
                bytes_ = self.arrays[key].reshape(*shape, mine.dtype.item_bytes)
                bytes_[older] = 0
                self.verified[key].reshape(shape)[older] = True

    def layer_ready(self, layer: int) -> bool:
        """True when every element that this side needs of a layer is verified."""
        return all(self._ready(key) for key in self.leaves if key[1] == layer)

    @property
    def ready(self) -> bool:
        return all(self._ready(key) for key in self.leaves)

    def _ready(self, key: Key) -> bool:
        """True when a leaf is verified; of a window only the newest tokens are needed."""
        leaf, window = self.leaves[key], self._window_tokens[key]
        cells = self.verified[key].reshape(self._shape(leaf))
        if window:
            axis = [spec.axis for spec in leaf.axes].index(Axis.TOKEN)
            cells = np.moveaxis(cells, axis, 0)[-window:]
        return bool(cells.all())


@dataclass
class ReferenceTicket:
    """The memory bound for one hand-off, and the ranks that it expects."""

    memory: ReferenceMemory
    source_rank_count: int = 1
    destination_rank: int = 0
    destination_rank_count: int = 1
    ranks_joined: set[int] = field(default_factory=set)
    ranks_done: set[int] = field(default_factory=set)
    metadata: dict[str, object] = field(default_factory=dict)
    complete: bool = False
    error: KvwireError | None = None

    def join(self, manifest: Manifest) -> None:
        """Take in the transfer of one rank, or raise why not."""
        memory, rank = self.memory, manifest.source_rank
        if self.complete or self.error:
            fail(ErrorCode.TICKET_EXPIRED, "the ticket is closed")
        mismatch = spec_mismatch(manifest.spec, memory.spec)
        if mismatch:
            fail(ErrorCode.SPEC_MISMATCH, mismatch)
        here, there = ((side.token_start, side.token_stop) for side in (memory, manifest))
        if here != there:
            fail(ErrorCode.TOKENS_MISMATCH, f"tokens {there} at the sender, {here} here",
                 expected=here[1] - here[0], actual=there[1] - there[0])
        for name in ("source_rank_count", "destination_rank", "destination_rank_count"):
            a, b = getattr(manifest, name), getattr(self, name)
            if a != b:
                fail(ErrorCode.RANK_UNEXPECTED, f"{name} {a} at the sender, {b} here",
                     expected=b, actual=a)
        if rank in self.ranks_joined:
            fail(ErrorCode.RANK_UNEXPECTED, f"source rank {rank} has come already", actual=rank)
        self.ranks_joined.add(rank)
        self.metadata.update(manifest.metadata)

    def rank_done(self, manifest: Manifest, end: End) -> None:
        """Count a whole transfer; INCOMPLETE when it was the last one and parts never came."""
        self.ranks_done.add(manifest.source_rank)
        self.metadata.update(end.metadata)
        if len(self.ranks_done) == self.source_rank_count:
            if not self.memory.ready:
                fail(ErrorCode.INCOMPLETE, "all ranks are done, but parts of the ticket never came")
            self.complete = True
