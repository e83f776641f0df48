"""The short form: a dict of named tensors, without a cache spec."""

from __future__ import annotations

from collections.abc import Mapping

from kvwire.buffers import Buffer
from kvwire.errors import UsageError
from kvwire.layout import REQUEST_LAYER, Axis, AxisSpec, CacheSpec, GroupKind, LayerGroup
from kvwire.limits import EXTENT_MAX, TENSOR_COUNT_MAX
from kvwire.memory import CacheMemory
from kvwire.receiver import Receiver, Ticket
from kvwire.sender import Sender
from kvwire.tensor_spec import DType, TensorSpec

__all__ = ["receive", "send", "tensor_memory"]

_AXES = (Axis.HEAD, Axis.KEY, Axis.PLANE, Axis.ROW, Axis.ITEM)
_DTYPES = {"float32": DType.FP32, "float16": DType.FP16, "bfloat16": DType.BF16,
           "float8_e4m3fn": DType.E4M3, "float8_e5m2": DType.E5M2, "int8": DType.INT8,
           "uint8": DType.BYTES, "int32": DType.INT32, "int64": DType.INT64}


def tensor_memory(tensors: Mapping[str, object], *, writable: bool = False) -> CacheMemory:
    """Describe named arrays as request tensors.

    Args:
        tensors: name -> array, any strides (see `Buffer.of`). Both sides name the same tensors
            with the same shapes and dtypes; dtypes that the format lacks travel as bytes.
        writable: the arrays are a destination.
    """
    specs, arrays = [], {}
    for name, array in sorted(tensors.items()):
        buffer = Buffer.of(array)
        dtype = _DTYPES.get(buffer.dtype_name)
        if dtype is None:
            buffer, dtype = _as_bytes(buffer), DType.BYTES
        buffer = _squeezed(name, buffer)
        axes = _AXES[len(_AXES) - len(buffer.shape):]
        specs.append(TensorSpec(name, dtype, tuple(
            AxisSpec.of(axis, extent) for axis, extent in zip(axes, buffer.shape))))
        arrays[len(specs) - 1] = buffer
    groups, by_place = [], {}
    for first in range(0, len(specs), TENSOR_COUNT_MAX):
        some = tuple(specs[first:first + TENSOR_COUNT_MAX])
        for index, spec in enumerate(some):
            by_place[len(groups), REQUEST_LAYER, spec.name] = arrays[first + index]
        groups.append(LayerGroup(GroupKind.REQUEST, (REQUEST_LAYER,), some))
    return CacheMemory(CacheSpec("", tuple(groups)), by_place, writable=writable)


def send(address: str, ticket: str | bytes, tensors: Mapping[str, object], *,
         timeout_s: float | None = 60.0, **options: object) -> None:
    """Send named tensors to the `Receiver` at `address`; returns when they are verified there.

    Options: those of `Sender`.
    """
    with Sender(address, **options) as sender:
        sender.send(ticket, tensor_memory(tensors), deadline_s=timeout_s).result()


def receive(receiver: Receiver, tensors: Mapping[str, object], **options: object) -> Ticket:
    """Expect named tensors, to be written into `tensors`; options as for `Receiver.expect`."""
    return receiver.expect(tensor_memory(tensors, writable=True), **options)


def _squeezed(name: str, buffer: Buffer) -> Buffer:
    """Bring an array to 1 to 5 axes that fit the format, by its shape alone: the other side must
    come to the same ones, whatever its strides."""
    shape, strides = [], []
    for extent, stride in zip(buffer.shape, buffer.strides):
        if extent == 1:
            continue
        inner = _inner_factor(name, extent)
        if inner < extent:
            shape.append(extent // inner)
            strides.append(inner * stride)
        shape.append(inner)
        strides.append(stride)
    while len(shape) > len(_AXES):
        if strides[0] != shape[1] * strides[1] or shape[0] * shape[1] > EXTENT_MAX:
            raise UsageError(f"tensor {name!r} has too many axes, and its outer ones cannot be "
                             f"merged: reshape it to {len(_AXES)}")
        shape[:2], strides[:1] = [shape[0] * shape[1]], []
    return _reshaped(buffer, shape or [1], strides or [buffer.item_bytes], buffer.item_bytes,
                     buffer.dtype_name)


def _inner_factor(name: str, extent: int) -> int:
    if extent == 0:
        raise UsageError(f"tensor {name!r} has an empty axis; leave it out")
    for inner in range(min(extent, EXTENT_MAX), 0, -1):
        if extent % inner == 0 and extent // inner <= EXTENT_MAX:
            return inner
    raise UsageError(f"tensor {name!r}: an axis of {extent} items is too long; reshape it")


def _as_bytes(buffer: Buffer) -> Buffer:
    return _reshaped(buffer, (*buffer.shape, buffer.item_bytes), (*buffer.strides, 1), 1, "uint8")


def _reshaped(buffer: Buffer, shape, strides, item_bytes: int, dtype_name: str) -> Buffer:
    return Buffer(address=buffer.address, shape=tuple(shape), strides=tuple(strides),
                  item_bytes=item_bytes, dtype_name=dtype_name, read_only=buffer.read_only,
                  owner=buffer.owner)
