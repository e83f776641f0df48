"""`Lossy`: what a sender may round before it travels."""

from __future__ import annotations

from dataclasses import dataclass

from kvwire.errors import UsageError
from kvwire.layout import CacheSpec
from kvwire.quantised import FLOATS, Rung
from kvwire.tensor_spec import DType, GroupKind, TensorSpec

__all__ = ["Lossy"]

_KEY_VALUE = {"int8": Rung.INT8, "int6": Rung.INT6, "int4": Rung.INT4, "fp8": Rung.E4M3}
_STATE = {"bf16": Rung.BF16, "int8": Rung.INT8_GRID, "fp8": Rung.E4M3}
_RUNGS = {"keys": _KEY_VALUE, "values": _KEY_VALUE, "states": _STATE, "latents": _KEY_VALUE}
_LEAVES = {"k": "keys", "v": "values"}


@dataclass(frozen=True)
class Lossy:
    """What may be rounded, once, at the source; None: bit for bit, as everything else.

    A transfer that is lossy is verified like any other: what arrives is exactly what the rung
    makes of the source (FORMAT.md §9.3). The request's first 4 tokens and the transfer's
    last 128 stay exact (whole blocks of them, where heads lie outside the tokens), and so does what
    is NaN or infinite. It is a permission: where the receiver was not made with
    ``allow_lossy=True``, nothing is rounded.

    Args:
        keys: "int8", "int6", "int4" (64 tokens of a channel share a scale) or "fp8" (e4m3, a scale
            per head and chunk).
        values: the same; with integers 64 channels of a token share a scale. A tensor in which
            keys and values are fused follows `keys`, and `values` must be the same.
        states: of recurrences: "bf16" (of fp32), "int8" (a scale per row and per column) or "fp8"
            (per head). With codec="tiered", what "bf16" and "fp8" leave is coded once more.
        latents: of MLA, with the rotary keys beside them: as `values`; "fp8" has one scale for a
            chunk.
    """

    keys: str | None = None
    values: str | None = None
    states: str | None = None
    latents: str | None = None

    def __post_init__(self):
        for field, rungs in _RUNGS.items():
            name = getattr(self, field)
            if name is not None and name not in rungs:
                raise UsageError(f"{field} is {name!r}; it must be None or one of "
                                 f"{', '.join(rungs)}")

    def roundings(self, spec: CacheSpec) -> list[tuple[int, int, int, bool]]:
        """Return (group, tensor, rung, whether scales follow channels) of all that is rounded.

        Raises: UsageError when a field is set and `spec` has nothing of that kind, or nothing that
        can be rounded so.
        """
        found, seen = [], set()
        for number, group in enumerate(spec.groups):
            for index, tensor in enumerate(group.tensors):
                fields = _fields(group.kind, tensor)
                seen |= fields
                names = {getattr(self, field) for field in fields}
                if len(names) > 1:
                    raise UsageError(f"tensor {tensor.name!r} has keys and values fused; both "
                                     f"must be rounded alike, not {self.keys} and {self.values}")
                if name := next(iter(names), None):
                    field = "keys" if "keys" in fields else next(iter(fields))
                    found.append((number, index, _rung(field, name, tensor), field == "keys"))
        for field in _RUNGS:
            if getattr(self, field) is not None and field not in seen:
                raise UsageError(f"the spec has no {field} to round")
        return found


def _fields(kind: GroupKind, tensor: TensorSpec) -> set[str]:
    """Return which fields of `Lossy` are about the tensor."""
    if kind == GroupKind.RECURRENT:
        return {"states"}
    if kind == GroupKind.LATENT:
        return {"latents"}
    if kind in (GroupKind.FULL_ATTENTION, GroupKind.SLIDING_WINDOW):
        return {_LEAVES[leaf.name] for leaf in tensor.leaves if leaf.name in _LEAVES}
    return set()


def _rung(field: str, name: str, tensor: TensorSpec) -> Rung:
    rung = _RUNGS[field][name]
    known = (DType.FP32,) if rung == Rung.BF16 else FLOATS
    if tensor.dtype not in known:
        raise UsageError(f"tensor {tensor.name!r} is {tensor.dtype.name.lower()} and cannot be "
                         f"rounded to {name}")
    return rung
