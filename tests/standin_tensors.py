"""Tensors of torch that lie in a stand-in device's memory, as far as connectors use them.

They say that they are on cuda:0. What a GPU's torch would enqueue on its current stream is enqueued
on the stand-in's engine stream; views touch nothing.
"""

import ctypes

import torch


class DeviceTensors:
    """Makes them: `empty`, and `of` an array or tensor in host memory."""

    def __init__(self, device):
        tensors = self

        class DeviceTensor(torch.Tensor):
            @property
            def device(self):
                return torch.device("cuda", 0)

            def __setitem__(self, key, value):
                target, source = plain(self)[key], plain(value)
                device.enqueue(device.engine, lambda: target.copy_(source))

            def __repr__(self):  # pytest shows what failed, and would touch it
                return f"DeviceTensor({list(self.shape)}, {self.dtype})"

            def new_empty(self, shape):
                return tensors.empty(shape, self.dtype)

        self.device, self.type = device, DeviceTensor

    def empty(self, shape, dtype):
        count = torch.Size(shape).numel() * dtype.itemsize
        room = (ctypes.c_uint8 * count).from_address(self.device.allocate(count))
        return torch.frombuffer(room, dtype=torch.uint8).view(dtype).view(shape).as_subclass(
            self.type)

    def of(self, held):
        """Return a copy of a numpy array, or of a tensor with its strides."""
        held = held if isinstance(held, torch.Tensor) else torch.from_numpy(held)
        count = held.untyped_storage().nbytes() // held.element_size()
        made = self.empty((count,), held.dtype)
        with self.device.access():
            plain(made).copy_(held.as_strided((count,), (1,), 0))
        return made.as_strided(held.shape, held.stride(), held.storage_offset())


def plain(tensor):
    """Return the same memory as a tensor of the CPU: to be touched in device.access() only."""
    return tensor.as_subclass(torch.Tensor)
