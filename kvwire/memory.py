"""`CacheMemory`: the arrays that hold one request's cache here, checked and described."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from numbers import Integral

import numpy as np

from kvwire.buffers import Buffer
from kvwire.control import Item
from kvwire.errors import UnsupportedError, UsageError
from kvwire.layout import (
    REQUEST_LAYER, Axis, CacheSpec, GroupKind, LayerGroup, Leaf, TensorSpec,
)
from kvwire.overlap import check_distinct
from kvwire.plan import AxisStride, LeafMemory, TokenLayout

__all__ = ["CacheMemory"]

TokenRange = tuple[int, int]
_TOKENS_MAX = 1 << 32


class CacheMemory:
    """Where one request's cache lies in arrays that the caller owns. Copies no cache bytes.

    Shapes, with axes in the order of their `TensorSpec` and any strides (leading axes of extent 1
    are allowed everywhere, as transformers' batch axis is):

    - paged (``block_tokens`` > 0): [block_count, *axes], the TOKEN axis of extent block_tokens;
    - contiguous: [*axes], the TOKEN axis of extent at least the number of tokens;
    - ring: [*axes], position p at index p % (extent of the TOKEN axis);
    - states and request tensors: [*axes].

    Args:
        spec: what the arrays hold.
        arrays: {(layer, tensor name): array}, {layer: {tensor name: array}}, or a callable
            (group index, layer, tensor name) -> array. A name that two groups of one layer share
            needs (group index, layer, tensor name). Request tensors: layer REQUEST_LAYER.
            What is an array: see `Buffer.of`.
        tokens: absolute positions (start, stop), or the stop alone.
        block_ids: of paged groups: one sequence for all, or {group index: sequence}. Its entry 0
            is the block that contains token `start`.
        group_tokens: {group index: (start, stop)} of groups that hold another range than
            `tokens`, e.g. a transformers sliding window, whose array begins at its own first
            token.
        ring: contiguous sliding-window groups are rings.
        growing: the block tables are those of the tokens so far; `extend_blocks` adds to them. For
            a source whose engine allocates blocks while prefill goes on.
        writable: the arrays are a destination: they may be written, and no block is used twice.

    A sliding-window group takes part with its newest `window_tokens` tokens only.

    Raises:
        UsageError: an array is missing, has a wrong shape or dtype, or is read-only where
            `writable`; a block id is out of range, or used twice where `writable`.
        UnsupportedError: see `Buffer.of`.
    """

    def __init__(self, spec: CacheSpec, arrays: Mapping | Callable[[int, int, str], object], *,
                 tokens: int | TokenRange = 0,
                 block_ids: Sequence[int] | Mapping[int, Sequence[int]] | None = None,
                 group_tokens: Mapping[int, TokenRange] | None = None, ring: bool = False,
                 growing: bool = False, writable: bool = False):
        if growing and writable:
            raise UsageError("growing is for a source; a destination binds all its blocks at once")
        self.spec = spec
        self.tokens = _token_range("tokens", tokens)
        self.writable = writable
        self.leaves: dict[tuple[GroupKind, int, str], LeafMemory] = {}
        self._buffers: list[Buffer] = []
        self._destinations: list[tuple[str, Buffer, object]] = []
        self._ranges: list[TokenRange] = []
        self._tables: dict[int, np.ndarray] = {}
        self._native_tables: dict[int, object] = {}
        self._blocks_known: dict[int, int] | None = {} if growing else None
        self._block_counts: dict[int, int] = {}
        self._held_starts: dict[int, int] = {}
        find = arrays if callable(arrays) else _finder(spec, arrays)
        for index, group in enumerate(spec.groups):
            held = _token_range(f"group_tokens[{index}]",
                                (group_tokens or {}).get(index, self.tokens))
            if group.block_tokens:
                self._tables[index] = _block_table(index, block_ids)
            self._add_group(index, group, held, ring, find)
        if writable:
            check_distinct(self._destinations)

    @property
    def bytes(self) -> int:
        """Bytes of this request that the arrays hold."""
        return sum(len(group.layers) * (group.state_bytes + (stop - start) * group.row_bytes)
                   for group, (start, stop) in zip(self.spec.groups, self._ranges))

    @property
    def device(self) -> str | None:
        """The GPU that all arrays lie on, e.g. "cuda:1"; None: they lie in memory of this machine.

        Raises UsageError when they do not lie all in one place.
        """
        devices = {buffer.device for buffer in self._buffers}
        if len(devices) > 1:
            raise UsageError("the arrays lie on " + " and ".join(sorted(map(str, devices)))
                             + " (None: host memory): one CacheMemory is in one place")
        return devices.pop() if devices else None

    def check_on_host(self, what: str) -> None:
        """Raise UnsupportedError where the arrays lie on a device."""
        if self.device is not None:
            raise UnsupportedError(f"{what} takes host memory, and the arrays lie on "
                                   f"{self.device}: copy them with .cpu() first")

    @property
    def block_counts(self) -> dict[int, int]:
        """How many blocks the arrays of each paged group have, by group index."""
        return dict(self._block_counts)

    def token_range(self, group_index: int) -> TokenRange:
        """Return the absolute positions [start, stop) that a group takes part with."""
        return self._ranges[group_index]

    def items(self, layer: int, tokens: TokenRange | None = None, states: bool = True
              ) -> list[Item]:
        """Return what a segment of `layer` consists of.

        Args:
            tokens: absolute positions, cut to what each group holds; all by default.
            states: also the tensors without tokens, whole.
        """
        low, high = (0, _TOKENS_MAX) if tokens is None else tokens
        found = []
        for group_index, group in enumerate(self.spec.groups):
            if layer not in group.layers:
                continue
            start, stop = self._ranges[group_index]
            start, stop = max(start, low), min(stop, high)
            for tensor_index, tensor in enumerate(group.tensors):
                if tensor.has_tokens and start < stop:
                    found.append(Item(group_index, tensor_index, layer, start, stop))
                elif not tensor.has_tokens and states:
                    found.append(Item(group_index, tensor_index, layer))
        return found

    def extend_blocks(self, group_index: int, block_ids: Sequence[int]) -> None:
        """Add blocks to a group's table: those after the ones that it has. Needs ``growing=True``.

        Ids beyond the last token of `tokens` are passed over. Transfers that have this memory may
        push the new blocks' tokens when this returns.
        """
        if self._blocks_known is None or group_index not in self._blocks_known:
            raise UsageError(f"group {group_index} has no growing block table: make the memory "
                             "with growing=True")
        table, known = self._tables[group_index], self._blocks_known[group_index]
        added = _block_table(group_index, block_ids)[:len(table) - known]
        group, (start, _) = self.spec.groups[group_index], self._ranges[group_index]
        first = start // group.block_tokens - self._held_starts[group_index] // group.block_tokens
        added[:max(first - known, 0)] = 0
        bad = np.flatnonzero((added < 0) | (added >= self._block_counts[group_index]))
        if len(bad):
            raise UsageError(f"group {group_index} ({group.label}): block_ids[{known + bad[0]}] is "
                             f"{added[bad[0]]}, but the arrays have "
                             f"{self._block_counts[group_index]} blocks")
        table[known:known + len(added)] = added
        if (native := self._native_tables.get(id(table))) is not None:
            native.fill(known, added)
        self._blocks_known[group_index] = known + len(added)

    def blocks_known(self, group_index: int) -> int:
        """Return how many blocks a group's growing table has so far."""
        return (self._blocks_known or {})[group_index]

    def forget_blocks(self) -> None:
        """Empty the growing block tables: the request has lost its blocks; `extend_blocks` begins
        again. Every push that named them must have completed."""
        for index in self._blocks_known or ():
            self._blocks_known[index] = 0

    def check_known(self, items: Iterable[Item]) -> None:
        """Raise UsageError if an item has tokens whose blocks are not known yet."""
        for item in items if self._blocks_known else ():
            known = self._blocks_known.get(item.group_index)
            if known is None:
                continue
            size = self.spec.groups[item.group_index].block_tokens
            held_start = self._held_starts[item.group_index]
            if item.token_stop > held_start - held_start % size + known * size:
                raise UsageError(f"group {item.group_index}: token {item.token_stop - 1} lies in a "
                                 f"block that is not known yet; extend_blocks() comes first")

    @cached_property
    def native(self) -> object:
        """The native MemoryMap. It borrows the arrays: keep this object as long as it is used."""
        from kvwire import _native
        native, tables = _native.MemoryMap(), self._native_tables
        for (kind, layer, name), leaf in self.leaves.items():
            axes = [(int(held.axis), held.full, held.start, held.stop, held.stride)
                    for held in leaf.axes]
            native.add_leaf(int(kind), layer, name, leaf.address, int(leaf.dtype), axes)
            if (lie := leaf.tokens) is None:
                continue
            table = None
            if lie.block_ids is not None:
                if id(lie.block_ids) not in tables:
                    tables[id(lie.block_ids)] = _native.BlockTable(lie.block_ids)
                table = tables[id(lie.block_ids)]
            native.set_tokens(
                int(kind), layer, name, origin=lie.origin, count=lie.count, start=lie.start,
                stride=lie.stride, block_tokens=lie.block_tokens, block_stride=lie.block_stride,
                table=table, ring_tokens=lie.ring_tokens)
        return native

    def _add_group(self, index: int, group: LayerGroup, held: TokenRange, ring: bool,
                   find: Callable[[int, int, str], object]) -> None:
        ring = ring and group.kind == GroupKind.SLIDING_WINDOW and not group.block_tokens
        start, stop = held
        if group.window_tokens:
            start = max(start, stop - group.window_tokens)
        found = []
        for layer in group.layers:
            for tensor in group.tensors:
                what = _words(index, group, layer, tensor.name)
                buffer = _checked(what, tensor, Buffer.of(find(index, layer, tensor.name)),
                                  self.writable)
                found.append((what, layer, tensor, buffer))
                if ring:
                    extent = buffer.shape[_axis_index(tensor, Axis.TOKEN)]
                    start = max(start, stop - extent)
        self._ranges.append((start, stop))
        if index in self._tables:
            self._check_blocks(index, group, held[0], [(w, b) for w, _, t, b in found
                                                       if t.has_tokens])
        for what, layer, tensor, buffer in found:
            layout = None
            if tensor.has_tokens:
                layout = self._token_layout(what, index, tensor, buffer, held, ring)
            for leaf in tensor.leaves:
                memory = _leaf_memory(tensor, leaf, buffer, layout)
                self.leaves[group.kind, layer, leaf.name] = memory
            self._buffers.append(buffer)
            self._destinations.append((what, buffer, self._tables.get(index)))

    def _token_layout(self, what: str, index: int, tensor: TensorSpec, buffer: Buffer,
                      held: TokenRange, ring: bool) -> TokenLayout:
        start, stop = self._ranges[index]
        axis = _axis_index(tensor, Axis.TOKEN)
        extent, stride = buffer.shape[axis], buffer.strides[axis]
        if tensor.block_tokens:
            origin = held[0] - held[0] % tensor.block_tokens
            return TokenLayout(origin, stop - origin, start, stride, tensor.block_tokens,
                               buffer.strides[0], self._tables[index])
        if ring:
            return TokenLayout(start, stop - start, start, stride, ring_tokens=extent)
        if extent < stop - held[0]:
            raise UsageError(f"{what}: the token axis has extent {extent}, but tokens "
                             f"[{held[0]}, {stop}) are {stop - held[0]}")
        return TokenLayout(held[0], stop - held[0], start, stride)

    def _check_blocks(self, index: int, group: LayerGroup, held_start: int,
                      arrays: list[tuple[str, Buffer]]) -> None:
        """Check the ids of those blocks that hold tokens of the group's range."""
        start, stop = self._ranges[index]
        size, table = group.block_tokens, self._tables[index]
        first = start // size - held_start // size
        count = -(-stop // size) - held_start // size if stop > start else 0
        self._held_starts[index] = held_start
        self._block_counts[index] = min((buffer.shape[0] for _, buffer in arrays), default=0)
        if self._blocks_known is not None:
            self._blocks_known[index] = min(len(table), count)
            table = np.concatenate([table, np.zeros(max(count - len(table), 0), np.int64)])
        if count > len(table):
            raise UsageError(f"group {index} ({group.label}): tokens [{held_start}, {stop}) need "
                             f"{count} blocks of {size} tokens, but block_ids has {len(table)}")
        used = table[first:count]
        for what, buffer in arrays:
            bad = np.flatnonzero((used < 0) | (used >= buffer.shape[0]))
            if len(bad):
                where = first + int(bad[0])
                raise UsageError(f"{what}: block_ids[{where}] is {table[where]}, but the array "
                                 f"has {buffer.shape[0]} blocks")
        if self.writable and len(np.unique(used)) < len(used):
            order = np.argsort(used, kind="stable")
            twin = int(np.flatnonzero(np.diff(used[order]) == 0)[0])
            a, b = (first + int(where) for where in order[twin:twin + 2])
            raise UsageError(f"group {index} ({group.label}): block_ids[{a}] and block_ids[{b}] "
                             f"are both {table[a]}; a destination's blocks must be distinct")
        table[:first] = 0  # left behind by the window: engines put any placeholder there
        self._tables[index] = table[:count]


def _token_range(what: str, value: int | TokenRange) -> TokenRange:
    start, stop = (0, value) if isinstance(value, Integral) else value
    if not 0 <= start <= stop <= _TOKENS_MAX:
        raise UsageError(f"{what} is {value!r}; it must be (start, stop) with 0 <= start <= stop "
                         f"<= {_TOKENS_MAX}, or the stop alone")
    return int(start), int(stop)


def _block_table(index: int, block_ids) -> np.ndarray:
    """Return the group's ids as int64 [blocks], copied: the caller's list may change later."""
    ids = block_ids.get(index) if isinstance(block_ids, Mapping) else block_ids
    if ids is None:
        raise UsageError(f"group {index} is paged but has no block_ids")
    table = np.array(ids if len(ids) else np.empty(0, np.int64))
    if table.ndim != 1 or table.dtype.kind not in "iu":
        raise UsageError(f"block_ids of group {index} have shape {list(table.shape)} and dtype "
                         f"{table.dtype}; they must be a sequence of integers")
    return table.astype(np.int64)


def _finder(spec: CacheSpec, arrays: Mapping) -> Callable[[int, int, str], object]:
    groups_of: dict[tuple[int, str], int] = {}
    for group in spec.groups:
        for layer in group.layers:
            for tensor in group.tensors:
                key = layer, tensor.name
                groups_of[key] = groups_of.get(key, 0) + 1

    def find(index: int, layer: int, name: str) -> object:
        if (index, layer, name) in arrays:
            return arrays[index, layer, name]
        if groups_of[layer, name] > 1:
            raise UsageError(f"several groups have a tensor {name!r} in {_layer_words(layer)}: "
                             f"give arrays[{index}, {layer}, {name!r}]")
        nested = arrays.get(layer)
        if isinstance(nested, Mapping) and name in nested:
            return nested[name]
        if (layer, name) not in arrays:
            raise UsageError(f"arrays has no ({layer}, {name!r}), which group {index} needs")
        return arrays[layer, name]

    return find


def _layer_words(layer: int) -> str:
    return "the request" if layer == REQUEST_LAYER else f"layer {layer}"


def _words(index: int, group: LayerGroup, layer: int, name: str) -> str:
    return f"group {index} ({group.label}), {_layer_words(layer)}, tensor {name}"


def _axis_index(tensor: TensorSpec, axis: Axis) -> int:
    """Return where `axis` lies in the array's shape: pages come first."""
    return [spec.axis for spec in tensor.axes].index(axis) + (tensor.block_tokens > 0)


def _checked(what: str, tensor: TensorSpec, buffer: Buffer, writable: bool) -> Buffer:
    """Return the buffer without leading axes of extent 1, its shape and dtype checked."""
    buffer.check_dtype(tensor.dtype, what)
    wanted: list[int | str] = ["block_count"] if tensor.block_tokens else []
    for spec in tensor.axes:
        tokens = tensor.block_tokens or "tokens"
        wanted.append(tokens if spec.axis == Axis.TOKEN else spec.held)
    extra = len(buffer.shape) - len(wanted)
    shape, strides = buffer.shape[max(extra, 0):], buffer.strides[max(extra, 0):]
    fits = extra >= 0 and all(extent == 1 for extent in buffer.shape[:extra]) and all(
        isinstance(want, str) or want == extent for want, extent in zip(wanted, shape))
    if not fits:
        names = ", ".join(str(want) for want in wanted)
        raise UsageError(f"{what}: the array has shape {list(buffer.shape)}, the spec says "
                         f"[{names}]")
    if writable and buffer.read_only:
        raise UsageError(f"{what}: the array is read-only; a destination must be writable")
    if writable and 0 not in shape and any(
            step == 0 and extent > 1 for step, extent in zip(strides, shape)):
        raise UsageError(f"{what}: the array has stride 0 along an axis; a destination's elements "
                         "must be distinct")
    return Buffer(buffer.address, shape, strides, buffer.item_bytes, buffer.dtype_name,
                  buffer.read_only, buffer.owner, buffer.device)


def _leaf_memory(tensor: TensorSpec, leaf: Leaf, buffer: Buffer, layout: TokenLayout | None
                 ) -> LeafMemory:
    address, axes = buffer.address, []
    for spec in leaf.axes:
        if spec.axis == Axis.TOKEN:
            continue
        stride = buffer.strides[_axis_index(tensor, spec.axis)]
        part = spec.slices[0]
        if spec.axis == tensor.fused_axis:
            address += leaf.offset * stride
        axes.append(AxisStride(spec.axis, part.full, part.start, part.stop, stride))
    return LeafMemory(address, leaf.dtype, tuple(axes), layout)
