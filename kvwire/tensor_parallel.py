"""How tensor parallelism divides a cache: by heads, each fused sub-block by itself."""

from __future__ import annotations

from dataclasses import replace

from kvwire.errors import UsageError
from kvwire.layout import CacheSpec, LayerGroup
from kvwire.tensor_spec import Axis, AxisSpec, GroupKind, Slice, TensorSpec, check_integer

__all__ = ["shard"]

# A sub-block of a convolution state is heads x (key or value size); these run along keys.
_KEY_BLOCKS = frozenset(("q", "k", "b", "c"))


def shard(spec: CacheSpec, rank: int, count: int) -> CacheSpec:
    """See `CacheSpec.shard`."""
    check_integer("count", count, 1)
    check_integer("rank", rank, 0, count - 1)
    states = {layer: tensor for group in spec.groups if group.kind == GroupKind.RECURRENT
              for layer in group.layers for tensor in group.tensors}

    def part(group: LayerGroup, tensor: TensorSpec) -> TensorSpec:
        if not all(piece.whole for axis in tensor.axes for piece in axis.slices):
            raise UsageError(f"group {group.label}, tensor {tensor.name}: shard() divides whole "
                             "tensors, but this one is a part already")
        state = states.get(group.layers[0])
        axes = tuple(_divide(group, tensor, axis, state, rank, count) for axis in tensor.axes)
        shares = [(mine.extent, all_.full) for axis, whole in zip(axes, tensor.axes)
                  for mine, all_ in zip(axis.slices, whole.slices) if _divided(axis.axis)]
        copied = not shares or any(extent * count > full for extent, full in shares)
        return replace(tensor, axes=axes, replicated=count > 1 and copied)

    return spec.map_tensors(part)


def _divided(axis: Axis) -> bool:
    return axis in (Axis.HEAD, Axis.CHANNEL)


def _divide(group: LayerGroup, tensor: TensorSpec, axis: AxisSpec, state: TensorSpec | None,
            rank: int, count: int) -> AxisSpec:
    if not _divided(axis.axis):
        return axis
    slices = []
    for piece in axis.slices:
        name = piece.name or tensor.name
        unit = _head_channels(name, state) if axis.axis == Axis.CHANNEL else 1
        unit = unit if piece.full % unit == 0 else 1
        heads = piece.full // unit
        if heads % count == 0:
            start, extent = rank * heads // count, heads // count
        elif count % heads == 0:
            start, extent = rank * heads // count, 1
        else:
            raise UsageError(f"group {group.label}, leaf {name}: {heads} heads or groups cannot be "
                             f"divided by count {count}, nor copied evenly")
        slices.append(Slice(piece.name, piece.full, start * unit, (start + extent) * unit))
    return AxisSpec(axis.axis, tuple(slices))


def _head_channels(name: str, state: TensorSpec | None) -> int:
    """Return the channels of one head (or Mamba-2 group) of a convolution sub-block."""
    axis = Axis.KEY if name in _KEY_BLOCKS else Axis.VALUE
    present = state is not None and {Axis.HEAD, axis} <= {spec.axis for spec in state.axes}
    return state.full_extent(axis) if present else 1
