"""`Buffer`: where the elements of a caller's array lie, whatever library made it.

torch is never imported: an object of torch is asked about itself by its own methods.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from kvwire.errors import UnsupportedError, UsageError
from kvwire.tensor_spec import DType

__all__ = ["Buffer"]

# Integers that libraries without a dtype for bf16 or fp8 keep it in; matched by size alone.
_CARRIERS = frozenset(("uint8", "uint16", "int16", "uint32", "uint64"))


@dataclass(frozen=True)
class Buffer:
    """A strided view of memory on this machine, or on a GPU of it, that somebody else owns.

    Attributes:
        address: of the element at index 0 on every axis.
        shape: extents, outer to inner.
        strides: bytes; may be negative or 0.
        item_bytes: bytes per element.
        dtype_name: as its library calls it, e.g. "bfloat16", "uint16", "void".
        read_only: its owner does not allow writing.
        owner: keeps the memory alive, and its export open, as long as the Buffer lives.
        device: None: memory of this machine; else the GPU that it lies on, e.g. "cuda:1".
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    dtype_name: str
    read_only: bool
    owner: object
    device: str | None = None

    @classmethod
    def of(cls, array: object) -> Buffer:
        """Return a Buffer of a torch tensor, a numpy array, or anything that has the buffer
        protocol or DLPack. Copies nothing.

        Raises:
            UnsupportedError: memory of a device other than CPU and CUDA, sparse tensors, foreign
                byte order.
            UsageError: not an array at all.
        """
        if isinstance(array, Buffer):
            return array
        if any(kind.__module__ == "torch" and kind.__name__ == "Tensor"
               for kind in type(array).__mro__):
            return _of_torch(array)
        if isinstance(array, np.ndarray):
            return _of_numpy(array)
        try:
            view = memoryview(array)
        except (TypeError, BufferError):
            view = None
        if view is not None:
            return _of_numpy(np.asarray(view))
        if hasattr(array, "__dlpack__"):
            return _of_dlpack(array)
        raise UsageError(f"{type(array).__name__} is not an array: pass a torch CPU tensor, a "
                         "numpy array, or an object with the buffer protocol or DLPack")

    def check_dtype(self, dtype: DType, what: str) -> None:
        """Raise UsageError unless elements of `dtype` can lie here.

        A dtype that kvwire knows must be the same; integers without a meaning of their own
        (uint8, uint16, int16 ...) and raw void carry anything of their size, and anything of one
        byte carries BYTES.
        """
        if self.item_bytes == dtype.item_bytes:
            if dtype == DType.BYTES or self.dtype_name in _CARRIERS or self.dtype_name == "void":
                return
            try:
                if DType.of(self.dtype_name) == dtype:
                    return
            except UsageError:
                pass
        raise UsageError(f"{what}: the array holds {self.dtype_name} ({self.item_bytes} bytes), "
                         f"the spec says {dtype.name.lower()} ({dtype.item_bytes} bytes)")


def _of_torch(tensor) -> Buffer:
    if tensor.device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"the tensor is on device {tensor.device}; kvwire moves memory of "
                               "CPUs and of CUDA devices: copy it with .cpu() first")
    if str(tensor.layout) != "torch.strided" or tensor.is_quantized:
        raise UnsupportedError(f"the tensor is {tensor.layout}, quantized or sparse; kvwire moves "
                               "plain strided tensors only")
    size = tensor.element_size()
    return Buffer(tensor.data_ptr(), tuple(tensor.shape),
                  tuple(step * size for step in tensor.stride()), size,
                  str(tensor.dtype).removeprefix("torch."), False, tensor,
                  None if tensor.device.type == "cpu" else f"cuda:{tensor.device.index or 0}")


def _of_numpy(array: np.ndarray) -> Buffer:
    dtype = array.dtype
    if dtype.hasobject or not dtype.isnative:
        raise UnsupportedError(f"dtype {dtype} holds objects or foreign byte order; kvwire moves "
                               "plain little-endian elements")
    name = "void" if dtype.type is np.void else dtype.name
    return Buffer(array.__array_interface__["data"][0], array.shape, array.strides, dtype.itemsize,
                  name, not array.flags.writeable, array)


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16), ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)), ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p), ("flags", ctypes.c_uint64), ("tensor", _DLTensor),
    ]


# Prototypes of our own: those of ctypes.pythonapi belong to the whole process.
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi))
_capsule_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi))

_DLPACK_CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost (pinned)
_DLPACK_CUDA_DEVICES = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DLPACK_READ_ONLY = 1
_DLPACK_NAMES = {0: "int{}", 1: "uint{}", 2: "float{}", 4: "bfloat16", 6: "bool",
                 10: "float8_e4m3fn", 12: "float8_e5m2"}


def _of_dlpack(array) -> Buffer:
    """Read the capsule in place: numpy knows no bf16 or fp8. Unconsumed, it frees itself."""
    device_type, device_id = array.__dlpack_device__()
    if device_type not in _DLPACK_CPU_DEVICES + _DLPACK_CUDA_DEVICES:
        raise UnsupportedError(f"the DLPack object is on device type {int(device_type)}, id "
                               f"{device_id}; kvwire moves memory of CPUs and of CUDA devices")
    try:
        capsule = array.__dlpack__(max_version=(1, 0))
    except TypeError:
        capsule = array.__dlpack__()
    if _capsule_is_valid(capsule, b"dltensor_versioned"):
        managed = _DLManagedTensorVersioned.from_address(
            _capsule_pointer(capsule, b"dltensor_versioned"))
        tensor, read_only = managed.tensor, bool(managed.flags & _DLPACK_READ_ONLY)
    else:
        tensor, read_only = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor")), False
    if tensor.bits % 8 or tensor.lanes != 1:
        raise UnsupportedError(f"DLPack elements of {tensor.bits} bits in {tensor.lanes} lanes; "
                               "kvwire moves whole bytes")
    size = tensor.bits // 8
    shape = tuple(tensor.shape[:tensor.ndim])
    if tensor.strides:
        strides = tuple(step * size for step in tensor.strides[:tensor.ndim])
    else:
        strides = tuple(size * int(np.prod(shape[axis + 1:], dtype=np.int64))
                        for axis in range(len(shape)))
    name = _DLPACK_NAMES.get(tensor.code, f"dlpack type {tensor.code}").format(tensor.bits)
    return Buffer((tensor.data or 0) + tensor.byte_offset, shape, strides, size, name, read_only,
                  (array, capsule),
                  None if device_type in _DLPACK_CPU_DEVICES else f"cuda:{device_id}")
