"""Caches whose contents compress as real ones do: every channel has a scale of its own."""

import numpy as np
from faults import Held

from kvwire.layout import Axis, DType
from kvwire.tiered import element_format


def elements(rng, dtype, shape, centre):
    """Random elements whose exponents crowd around `centre`, an array that fits `shape`."""
    form = element_format(dtype)
    count = int(np.prod(shape))
    spread = np.minimum(rng.geometric(0.5, count), 12).reshape(shape)
    top = (1 << form.exponent_bits) - 1
    exponent = np.clip(centre + 3 - spread, 0, top).astype(np.uint64).ravel()
    bits = form.exponent_bits + form.verbatim_bits
    mantissa = rng.integers(0, 1 << (form.verbatim_bits - 1), count, np.uint64)
    sign = rng.integers(0, 2, count, np.uint64)
    value = sign << np.uint64(bits - 1) | exponent << np.uint64(form.verbatim_bits - 1) | mantissa
    return value.astype(f"<u{form.item_bytes}").reshape(shape)


class Warm(Held):
    """A `Held` with such contents; integers stay noise."""

    def __init__(self, spec, tokens=0, seed=0, **options):
        super().__init__(spec, tokens, seed, **options)
        rng = np.random.default_rng(seed)
        for index, group in enumerate(spec.groups):
            for layer in group.layers:
                for tensor in group.tensors:
                    array = self.arrays[index, layer, tensor.name]
                    if element_format(tensor.dtype):
                        self._fill(rng, tensor, array)

    @staticmethod
    def _fill(rng, tensor, array):
        shape = [1 if axis.axis in (Axis.TOKEN, Axis.COLUMN) else axis.held
                 for axis in tensor.axes]
        middle = {DType.E4M3: 7, DType.E5M2: 15, DType.FP16: 15}.get(tensor.dtype, 120)
        channels = rng.integers(-3, 4, shape)
        made = elements(rng, tensor.dtype, array.shape, middle + channels)
        array[...] = made.view(array.dtype)
