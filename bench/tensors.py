"""What the codec benchmark codes: tensors from .npy files, views of them in other element types,
and values that no cache would have."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvwire.tensor_spec import DType

__all__ = ["Tensor", "load", "tabled_by_first_tokens", "tabled_by_others", "views",
           "worst_cases"]

_DTYPES = (DType.FP32, DType.FP16, DType.BF16, DType.E4M3, DType.E5M2)
_NAMED = {DType.FP32: "float32", DType.FP16: "float16", DType.BF16: "bfloat16",
          DType.E4M3: "float8_e4m3fn", DType.E5M2: "float8_e5m2"}  # in torch
_EXPONENT = {DType.FP32: (23, 8), DType.FP16: (10, 5), DType.BF16: (7, 8), DType.E4M3: (3, 4),
             DType.E5M2: (2, 5)}  # lowest bit and width of the field
_WORST_SHAPE = (1024, 4, 64)
_FIRST_TOKENS = slice(64, 320)  # without the attention sinks, as a sender takes its samples


@dataclass(frozen=True)
class Tensor:
    """A named array.

    Attributes:
        bits: the elements, as unsigned integers of their size. With four axes or more the first
            numbers layers, which are coded apart.
        calibrated_on: for each layer, elements that its code table is made from; None: its own.
    """

    name: str
    dtype: DType
    bits: np.ndarray
    calibrated_on: Sequence[np.ndarray] | None = None
    is_worst_case: bool = False

    @property
    def kind(self) -> str:
        """KV or, with fewer than four axes, states."""
        return "KV" if self.bits.ndim >= 4 else "states"

    def layers(self) -> Iterator[np.ndarray]:
        yield from self.bits if self.bits.ndim >= 4 else [self.bits]


def load(folder: Path) -> list[Tensor]:
    """Return the tensors of all .npy files of `folder`; says on stderr which it cannot use."""
    found = []
    for path in sorted(folder.glob("*.npy")):
        array = np.load(path)
        dtype = _dtype(path.stem, array.dtype)
        if dtype is None or array.size == 0:
            print(f"{path.name}: left out: {array.dtype} {array.shape} is no tensor of floating "
                  "point numbers that its name tells (bf16, fp16, fp32, e4m3, e5m2)",
                  file=sys.stderr)
            continue
        bits = np.ascontiguousarray(array).view(f"u{dtype.item_bytes}").reshape(array.shape)
        found.append(Tensor(path.stem, dtype, bits))
    return found


def _dtype(name: str, stored: np.dtype) -> DType | None:
    """Return the element type: what the array says, else what the name says of integers."""
    if stored.kind == "f" and stored.itemsize in (2, 4):
        return DType.FP32 if stored.itemsize == 4 else DType.FP16
    said = [dtype for dtype in _DTYPES if dtype.name.lower() in name.lower()]
    fits = len(said) == 1 and stored.kind in "uiV" and stored.itemsize == said[0].item_bytes
    return said[0] if fits else None


def views(tensor: Tensor) -> list[Tensor]:
    """Return the tensor rounded to narrower types: bf16 to fp16 and fp8, fp32 to bf16."""
    wanted = {DType.BF16: (DType.FP16, DType.E4M3, DType.E5M2), DType.FP32: (DType.BF16,)}
    return [_view(tensor, dtype) for dtype in wanted.get(tensor.dtype, ())]


def _view(tensor: Tensor, dtype: DType) -> Tensor:
    was, now = tensor.dtype.name.lower(), dtype.name.lower()
    name = tensor.name.replace(was, now) if was in tensor.name else f"{tensor.name}_{now}"
    return Tensor(name, dtype, _rounded(_values(tensor), dtype))


def _values(tensor: Tensor) -> np.ndarray:
    """Return fp32 or bf16 as fp32."""
    if tensor.dtype == DType.FP32:
        return tensor.bits.view(np.float32)
    return (tensor.bits.astype(np.uint32) << 16).view(np.float32)


def _rounded(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Return fp32 values as the bits of `dtype`; what is too large becomes its largest value."""
    import torch
    narrow = getattr(torch, _NAMED[dtype])
    largest = torch.finfo(narrow).max
    rounded = torch.from_numpy(values).clamp(-largest, largest).to(narrow)
    return rounded.view(getattr(torch, f"uint{8 * dtype.item_bytes}")).numpy()


def tabled_by_first_tokens(tensor: Tensor) -> Tensor:
    """Return the tensor, KV to be coded with tables made of its first tokens."""
    if tensor.kind != "KV":
        return tensor
    return replace(tensor, calibrated_on=[layer[_FIRST_TOKENS] for layer in tensor.layers()])


def tabled_by_others(tensor: Tensor, others: Sequence[Tensor]) -> Tensor | None:
    """Return the tensor to be coded with tables made of another model's, whose layers take turns;
    None where `others` have none of which the name ends alike: in k_bf16, say."""
    ending = tensor.name.rsplit("_", 2)[-2:]
    found = next((list(other.layers()) for other in others
                  if other.name.rsplit("_", 2)[-2:] == ending), None)
    if found is None:
        return None
    count = sum(1 for _ in tensor.layers())
    return replace(tensor, calibrated_on=[found[i * len(found) // count] for i in range(count)])


def worst_cases() -> list[Tensor]:
    """Return, of each element type, random bits, NaNs, denormals and a constant; to be coded with
    tables made for Gaussian values."""
    values = np.random.default_rng(4).standard_normal(_WORST_SHAPE, np.float32)
    return [Tensor(f"worst_{case}_{dtype.name.lower()}", dtype, bits, [ordinary], True)
            for dtype in _DTYPES for ordinary in [_rounded(values, dtype)]
            for case, bits in _worst(dtype)]


def _worst(dtype: DType) -> Iterator[tuple[str, np.ndarray]]:
    unsigned = np.dtype(f"u{dtype.item_bytes}").type
    random = np.random.default_rng(5).integers(0, np.iinfo(unsigned).max, _WORST_SHAPE, unsigned,
                                               endpoint=True)
    low, width = _EXPONENT[dtype]
    field = unsigned(((1 << width) - 1) << low)
    yield "random_bits", random
    yield "nans", random | field | unsigned(1)
    yield "denormals", random & ~field
    yield "constant", np.full(_WORST_SHAPE, unsigned(((1 << width - 1) - 1) << low))
