"""Tensors of a cache: axes, slices, element types, and the leaves that two machines agree about."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

from kvwire.errors import UsageError
from kvwire.limits import AXIS_COUNT_MAX, EXTENT_MAX, NAME_BYTES_MAX, SLICE_COUNT_MAX

__all__ = ["Axis", "AxisSpec", "DType", "GroupKind", "Leaf", "Slice", "TensorSpec"]

_UINT32_MAX = 0xFFFFFFFF


class Axis(IntEnum):
    """What one axis of a tensor counts. The numbers are pinned by FORMAT.md."""

    TOKEN = 1
    HEAD = 2
    DIM = 3
    CHANNEL = 4
    COLUMN = 5   # of a convolution state; the last column is the newest token
    KEY = 6
    VALUE = 7
    ROW = 8      # 8 to 10: of request tensors
    PLANE = 9
    ITEM = 10


class DType(IntEnum):
    """Element type. The numbers are pinned by FORMAT.md."""

    FP32 = 1
    FP16 = 2
    BF16 = 3
    E4M3 = 4
    E5M2 = 5
    INT8 = 6
    BYTES = 7
    INT32 = 8
    INT64 = 9

    @property
    def item_bytes(self) -> int:
        return _ITEM_BYTES[self]

    @classmethod
    def of(cls, dtype: object) -> DType:
        """Return the `DType` of a `DType`, a name ("bf16", "float32"), a numpy or torch dtype."""
        if isinstance(dtype, DType):
            return dtype
        name = dtype.__name__ if isinstance(dtype, type) else str(dtype)
        name = name.removeprefix("torch.").lower()
        found = cls.__members__.get(name.upper()) or _DTYPE_ALIASES.get(name)
        if found is None:
            known = ", ".join(member.name.lower() for member in cls)
            raise UsageError(f"dtype {dtype!r} is not one that kvwire moves: {known}; "
                             "view anything else as bytes")
        return found


_ITEM_BYTES = {DType.FP32: 4, DType.FP16: 2, DType.BF16: 2, DType.E4M3: 1, DType.E5M2: 1,
               DType.INT8: 1, DType.BYTES: 1, DType.INT32: 4, DType.INT64: 8}
_DTYPE_ALIASES = {"float32": DType.FP32, "float16": DType.FP16, "bfloat16": DType.BF16,
                  "float8_e4m3fn": DType.E4M3, "float8_e5m2": DType.E5M2, "uint8": DType.BYTES}


class GroupKind(IntEnum):
    """What a layer group holds. The numbers are pinned by FORMAT.md."""

    FULL_ATTENTION = 1
    LATENT = 2
    SLIDING_WINDOW = 3
    RECURRENT = 4
    CONVOLUTION = 5
    AUXILIARY = 6
    REQUEST = 7


def check_integer(what: str, value: object, low: int, high: int = _UINT32_MAX) -> None:
    """Raise UsageError, naming `what`, unless `value` is an integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{what} is {value!r}; it must be an integer from {low} to {high}")


def check_text(what: str, value: object, bytes_min: int = 1) -> None:
    """Raise UsageError, naming `what`, unless `value` is a string of a length the format takes."""
    try:
        length = len(value.encode())
    except (AttributeError, UnicodeEncodeError):
        length = -1
    if not bytes_min <= length <= NAME_BYTES_MAX:
        raise UsageError(f"{what} is {value!r}; it must be a string of {bytes_min} to "
                         f"{NAME_BYTES_MAX} bytes in UTF-8")


def check_member(what: str, value: object, kind: type) -> None:
    """Raise UsageError, naming `what`, unless `value` is one of `kind`'s."""
    if not isinstance(value, kind):
        raise UsageError(f"{what} is {value!r}; it must be of type {kind.__name__}")


def check_members(owner: object, field: str, kind: type, count_max: int, where: str = "") -> None:
    """Turn any iterable of `kind` into a tuple, in place of the frozen field."""
    try:
        values = tuple(getattr(owner, field))
    except TypeError:
        raise UsageError(f"{where}{field} is {getattr(owner, field)!r}; it must be a sequence of "
                         f"{kind.__name__}") from None
    if len(values) > count_max:
        raise UsageError(f"{where}{field} are {len(values)}; they must be at most {count_max}")
    for value in values:
        check_member(f"{where}a member of {field}", value, kind)
    object.__setattr__(owner, field, values)


@dataclass(frozen=True)
class Slice:
    """The part [start, stop) of `full` that is held here; `name` tells fused sub-blocks apart."""

    name: str
    full: int
    start: int
    stop: int

    def __post_init__(self):
        if self.name != "":
            check_text("slice name", self.name)
        check_integer(f"slice {self.name!r}: full", self.full, 1, EXTENT_MAX)
        check_integer(f"slice {self.name!r}: start", self.start, 0, self.full - 1)
        check_integer(f"slice {self.name!r}: stop", self.stop, self.start + 1, self.full)

    @property
    def extent(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.extent == self.full


@dataclass(frozen=True)
class AxisSpec:
    """One axis and what is held along it, outer to inner.

    TOKEN has no slices (the token range belongs to the request). Any other axis has one unnamed
    slice, or several named ones where an engine fuses sub-blocks, e.g. K and V along DIM.
    """

    axis: Axis
    slices: tuple[Slice, ...] = ()

    def __post_init__(self):
        check_member("axis", self.axis, Axis)
        label = self.axis.name.lower()
        check_members(self, "slices", Slice, SLICE_COUNT_MAX, f"axis {label}: ")
        names = [part.name for part in self.slices]
        if self.axis == Axis.TOKEN:
            if names:
                raise UsageError(f"axis token has slices {names}; it must have none")
        elif not names:
            raise UsageError(f"axis {label} has no slices; it must have at least one")
        elif len(names) == 1 and names[0]:
            raise UsageError(f"axis {label} has the single slice {names[0]!r}; a single slice is "
                             "unnamed, name the tensor instead")
        elif len(names) > 1 and ("" in names or len(set(names)) < len(names)):
            raise UsageError(f"axis {label} has slices {names}; fused slices need distinct, "
                             "non-empty names")
        if self.axis == Axis.COLUMN and not (len(names) == 1 and self.slices[0].whole):
            raise UsageError("axis column must have one whole slice: columns are aligned at the "
                             "newest one and never cut")

    @classmethod
    def of(cls, axis: Axis, extent: int | Mapping[str, int]) -> AxisSpec:
        """Return a whole axis: of one extent, or fused from {name: extent} in this order."""
        if not isinstance(extent, Mapping):
            return cls(axis, (Slice("", extent, 0, extent),))
        return cls(axis, tuple(Slice(name, full, 0, full) for name, full in extent.items()))

    @property
    def held(self) -> int:
        return sum(part.extent for part in self.slices)


@dataclass(frozen=True)
class Leaf:
    """One named part of a tensor: the unit about which two machines agree.

    `axes` are the tensor's, in memory order, each with this leaf's slice only. `offset` is the
    leaf's first index along the tensor's fused axis, 0 when the tensor is a single leaf.
    """

    name: str
    dtype: DType
    axes: tuple[AxisSpec, ...]
    offset: int

    @property
    def full(self) -> dict[Axis, int]:
        """Full extent by axis, TOKEN left out."""
        return {spec.axis: spec.slices[0].full for spec in self.axes if spec.slices}

    @property
    def row_bytes(self) -> int:
        """Held bytes per token, or in all when the leaf has no TOKEN axis."""
        return self.dtype.item_bytes * math.prod(spec.held for spec in self.axes if spec.slices)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of every layer of a group.

    Args:
        name: its name; that of its only leaf unless an axis is fused.
        axes: outer to inner, as in memory and on the wire. (TOKEN, HEAD, DIM) is NHD.
        block_tokens: tokens per page of a paged tensor; 0 when contiguous over the token range.
        replicated: other ranks hold some of the same elements (copied GQA heads, MLA latents).
    """

    name: str
    dtype: DType
    axes: tuple[AxisSpec, ...]
    block_tokens: int = 0
    replicated: bool = False

    def __post_init__(self):
        check_text("tensor name", self.name)
        where = f"tensor {self.name!r}: "
        check_member(f"{where}dtype", self.dtype, DType)
        check_members(self, "axes", AxisSpec, AXIS_COUNT_MAX, where)
        check_integer(f"{where}block_tokens", self.block_tokens, 0)
        check_member(f"{where}replicated", self.replicated, bool)
        kinds = [spec.axis for spec in self.axes]
        names = ", ".join(axis.name.lower() for axis in kinds) or "none"
        if not kinds or kinds == [Axis.TOKEN]:
            raise UsageError(f"{where}axes are {names}; at least one besides token is needed")
        if len(set(kinds)) < len(kinds):
            raise UsageError(f"{where}axes are {names}; an axis may appear once")
        if sum(len(spec.slices) > 1 for spec in self.axes) > 1:
            raise UsageError(f"{where}more than one axis is fused from several slices")
        if self.block_tokens and not self.has_tokens:
            raise UsageError(f"{where}block_tokens is {self.block_tokens} but there is no token "
                             "axis; it must be 0")

    @cached_property
    def has_tokens(self) -> bool:
        """Whether there is a TOKEN axis; without one the tensor is a state."""
        return any(spec.axis == Axis.TOKEN for spec in self.axes)

    @property
    def fused_axis(self) -> Axis | None:
        """The axis along which several leaves lie one after another."""
        return next((spec.axis for spec in self.axes if len(spec.slices) > 1), None)

    @property
    def row_bytes(self) -> int:
        """Held bytes per token, or in all when the tensor has no TOKEN axis."""
        return self.dtype.item_bytes * math.prod(spec.held for spec in self.axes if spec.slices)

    @property
    def page_bytes(self) -> int:
        """Held bytes of one block in one layer; 0 when the tensor is not paged."""
        return self.block_tokens * self.row_bytes

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves that it holds: one, or one per slice of the fused axis."""
        fused = next((spec for spec in self.axes if len(spec.slices) > 1), None)
        if fused is None:
            return (Leaf(self.name, self.dtype, self.axes, 0),)
        leaves, offset = [], 0
        for part in fused.slices:
            own = AxisSpec(fused.axis, (replace(part, name=""),))
            axes = tuple(own if spec is fused else spec for spec in self.axes)
            leaves.append(Leaf(part.name, self.dtype, axes, offset))
            offset += part.extent
        return tuple(leaves)

    def held_extent(self, axis: Axis) -> int:
        """Extent of `axis` in memory here; not defined for TOKEN."""
        return sum(part.extent for part in self._slices(axis))

    def full_extent(self, axis: Axis) -> int:
        """Extent of `axis` over all ranks; not defined for TOKEN."""
        return sum(part.full for part in self._slices(axis))

    def _slices(self, axis: Axis) -> tuple[Slice, ...]:
        for spec in self.axes:
            if spec.axis == axis and spec.slices:
                return spec.slices
        raise UsageError(f"tensor {self.name!r} has no extent along {Axis(axis).name.lower()}")
