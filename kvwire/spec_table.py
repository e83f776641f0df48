"""`CacheSpec` as text: a row per tensor of each group."""

from __future__ import annotations

from collections.abc import Sequence

from kvwire.layout import CacheSpec, LayerGroup
from kvwire.tensor_spec import Axis, AxisSpec, GroupKind, TensorSpec

__all__ = ["table"]

_HEADINGS = ("kind", "layers", "tensor", "dtype", "axes", "page bytes", "bytes")
_RIGHT = frozenset((5, 6))
_EXAMPLE_TOKENS = 32768


def table(spec: CacheSpec) -> str:
    """Return a plain ASCII table of `spec`; bytes are those of one layer."""
    rows = [_HEADINGS]
    for group in spec.groups:
        for index, tensor in enumerate(group.tensors):
            first = (_kind(group), _layers(group)) if index == 0 else ("", "")
            rows.append(first + _columns(tensor))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    rows.insert(1, tuple("-" * width for width in widths))
    lines = ["  ".join(cell.rjust(width) if column in _RIGHT else cell.ljust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))).rstrip()
             for row in rows]
    footer = (f"{spec.row_bytes:,} bytes/token, {spec.fixed_bytes / 2**20:,.1f} MiB fixed, "
              f"{spec.bytes(_EXAMPLE_TOKENS) / 2**20:,.1f} MiB at 32K tokens")
    return "\n".join([f"{spec.model or '(no model)'}", *lines, footer])


def _kind(group: LayerGroup) -> str:
    return f"{group.label} {group.window_tokens}" if group.window_tokens else group.label


def _layers(group: LayerGroup) -> str:
    return "request" if group.kind == GroupKind.REQUEST else compress(group.layers)


def _columns(tensor: TensorSpec) -> tuple[str, ...]:
    per = "/token" if tensor.has_tokens else "fixed"
    page = f"{tensor.page_bytes:,}" if tensor.page_bytes else "-"
    axes = ", ".join(_axis(axis) for axis in tensor.axes)
    copied = " copied" if tensor.replicated else ""
    return (tensor.name, tensor.dtype.name.lower(), f"[{axes}]{copied}", page,
            f"{tensor.row_bytes:,} {per:6}")


def _axis(axis: AxisSpec) -> str:
    name = axis.axis.name.lower()
    if axis.axis == Axis.TOKEN:
        return name
    return f"{name} " + "+".join(
        (f"{piece.name} " if piece.name else "")
        + (f"{piece.full}" if piece.whole else f"{piece.start}:{piece.stop}/{piece.full}")
        for piece in axis.slices)


def compress(layers: Sequence[int]) -> str:
    """Return rising numbers in few characters: "0-47", "3,7,11..47", "0-26 but 3,7,11..23,26"."""
    plain = _runs(layers)
    absent = sorted(set(range(layers[0], layers[-1])) - set(layers))
    if not absent:
        return plain
    inverse = f"{layers[0]}-{layers[-1]} but {_runs(absent)}"
    return min(plain, inverse, key=len)


def _runs(numbers: Sequence[int]) -> str:
    words, index = [], 0
    while index < len(numbers):
        step = numbers[index + 1] - numbers[index] if index + 1 < len(numbers) else 0
        end = index
        while end + 1 < len(numbers) and numbers[end + 1] - numbers[end] == step:
            end += 1
        if step == 1 and end > index:
            words.append(f"{numbers[index]}-{numbers[end]}")
        elif end - index >= 4:
            words += [str(number) for number in numbers[index:index + 3]]
            words[-1] += f"..{numbers[end]}"
        else:
            words.append(str(numbers[index]))
            end = index
        index = end + 1
    return ",".join(words)
