"""What a cache looks like: `CacheSpec` and its parts.

A spec says what one machine holds of a model's cache, in which order and type. Two machines may
hold it in different shapes; what they must agree about are the *leaves*: the smallest named
tensors, known everywhere as (group kind, layer, leaf name). FORMAT.md carries the same model.

    spec = CacheSpec("my-hybrid", (
        attention(range(3, 48, 4), kv_heads=2, head_dim=256, block_tokens=16),
        recurrent(linear, heads=32, key_dim=128, value_dim=128),
        convolution(linear, {"q": 2048, "k": 2048, "v": 4096}, columns=3),
    ))
    print(spec)                      # a table
    spec.bytes(32768)                # cache bytes of one request of 32,768 tokens
    spec.shard(rank=1, count=4)      # what tensor-parallel rank 1 of 4 holds
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from kvwire.errors import UsageError
from kvwire.limits import GROUP_COUNT_MAX, LAYER_COUNT_MAX, LEAF_COUNT_MAX, TENSOR_COUNT_MAX
from kvwire.tensor_spec import (
    Axis, AxisSpec, DType, GroupKind, Leaf, Slice, TensorSpec, check_integer, check_member,
    check_members, check_text,
)

__all__ = [
    "Axis", "AxisSpec", "CacheSpec", "DType", "GroupKind", "LayerGroup", "Leaf", "REQUEST_LAYER",
    "Slice", "TensorSpec", "attention", "auxiliary", "convolution", "latent", "recurrent",
    "request_tensor", "sliding_window",
]

REQUEST_LAYER = 0xFFFFFFFF
"""The layer number of request tensors, which belong to no layer."""

_PER_TOKEN_KINDS = (GroupKind.FULL_ATTENTION, GroupKind.LATENT, GroupKind.SLIDING_WINDOW)
_FIXED_KINDS = (GroupKind.RECURRENT, GroupKind.CONVOLUTION, GroupKind.REQUEST)


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose caches have the same kind and shape, and share one block table.

    A layer may appear in several groups (Falcon-H1: attention, recurrent and convolution).
    `layers` rise; `window_tokens` is the model's window, for SLIDING_WINDOW only.
    """

    kind: GroupKind
    layers: tuple[int, ...]
    tensors: tuple[TensorSpec, ...]
    window_tokens: int = 0

    def __post_init__(self):
        check_member("group kind", self.kind, GroupKind)
        where = f"group {self.label}: "
        check_members(self, "layers", int, LAYER_COUNT_MAX, where)
        check_members(self, "tensors", TensorSpec, TENSOR_COUNT_MAX, where)
        self._check_layers(where)
        if not self.tensors:
            raise UsageError(f"{where}tensors are empty; at least one is needed")
        if self.kind == GroupKind.SLIDING_WINDOW:
            check_integer(f"{where}window_tokens", self.window_tokens, 1)
        else:
            check_integer(f"{where}window_tokens", self.window_tokens, 0, 0)
        for tensor in self.tensors:
            self._check_tensor(f"{where}tensor {tensor.name!r}", tensor)
        blocks = sorted({tensor.block_tokens for tensor in self.tensors if tensor.has_tokens})
        if len(blocks) > 1:
            raise UsageError(f"{where}block_tokens are {blocks}; they must be equal in a group")
        names = [leaf.name for tensor in self.tensors for leaf in tensor.leaves]
        if len(set(names)) < len(names):
            raise UsageError(f"{where}leaf names are {names}; they must be distinct")

    def _check_layers(self, where: str) -> None:
        if self.kind == GroupKind.REQUEST:
            if self.layers != (REQUEST_LAYER,):
                raise UsageError(f"{where}layers are {self.layers}; they must be (REQUEST_LAYER,)")
            return
        for layer in self.layers:
            check_integer(f"{where}layer", layer, 0, REQUEST_LAYER - 1)
        if not self.layers or any(a >= b for a, b in zip(self.layers, self.layers[1:])):
            raise UsageError(f"{where}layers are {self.layers}; they must rise and not be empty")

    def _check_tensor(self, where: str, tensor: TensorSpec) -> None:
        kinds = {spec.axis for spec in tensor.axes}
        if self.kind in _PER_TOKEN_KINDS and Axis.TOKEN not in kinds:
            raise UsageError(f"{where} has no token axis; {self.label} needs one")
        if self.kind in _FIXED_KINDS and Axis.TOKEN in kinds:
            raise UsageError(f"{where} has a token axis; {self.label} has none")
        if self.kind == GroupKind.CONVOLUTION and not {Axis.CHANNEL, Axis.COLUMN} <= kinds:
            raise UsageError(f"{where} needs the axes channel and column")
        if self.kind != GroupKind.CONVOLUTION and Axis.COLUMN in kinds:
            raise UsageError(f"{where} has a column axis; only convolution has one")

    @property
    def label(self) -> str:
        return self.kind.name.lower()

    @property
    def block_tokens(self) -> int:
        """Tokens per page of the group's paged tensors, 0 when contiguous or without tokens."""
        return max(tensor.block_tokens for tensor in self.tensors)

    @property
    def row_bytes(self) -> int:
        """Held bytes per token in one layer."""
        return sum(tensor.row_bytes for tensor in self.tensors if tensor.has_tokens)

    @property
    def state_bytes(self) -> int:
        """Held bytes in one layer that do not depend on tokens."""
        return sum(tensor.row_bytes for tensor in self.tensors if not tensor.has_tokens)

    def bytes(self, tokens: int) -> int:
        """Held bytes in all layers for a request of `tokens` tokens; a window holds the newest."""
        rows = min(tokens, self.window_tokens) if self.window_tokens else tokens
        return len(self.layers) * (rows * self.row_bytes + self.state_bytes)


def leaf_count(groups: Iterable[LayerGroup]) -> int:
    """Return the number of leaves of all layers together."""
    return sum(len(group.layers) * len(tensor.leaves)
               for group in groups for tensor in group.tensors)


@dataclass(frozen=True)
class CacheSpec:
    """What one machine holds of a model's cache: all its layer groups."""

    model: str
    groups: tuple[LayerGroup, ...]

    def __post_init__(self):
        check_text("model", self.model, 0)
        check_members(self, "groups", LayerGroup, GROUP_COUNT_MAX)
        if (count := leaf_count(self.groups)) > LEAF_COUNT_MAX:
            raise UsageError(f"the spec has {count} leaves in all its layers; it must have at most "
                             f"{LEAF_COUNT_MAX}")
        seen = set()
        for group, layer, _, leaf in self.leaves():
            if (group.kind, layer, leaf.name) in seen:
                raise UsageError(f"{_leaf_words(group.kind, layer, leaf.name)} appears twice; "
                                 "kind, layer and leaf name must identify it")
            seen.add((group.kind, layer, leaf.name))

    @classmethod
    def preset(cls, model: str, **options) -> CacheSpec:
        """Return the spec of a known model; see `kvwire.presets.preset` for names and options."""
        from kvwire.presets import preset
        return preset(model, **options)

    @classmethod
    def from_hf_config(cls, config: object, dtype: object = None, **options) -> CacheSpec:
        """Return the spec of a transformers configuration; see `kvwire.hf_config`."""
        from kvwire.hf_config import spec_from_config
        return spec_from_config(config, dtype, **options)

    def leaves(self) -> Iterator[tuple[LayerGroup, int, TensorSpec, Leaf]]:
        """Yield every leaf of every layer, with the group and tensor that hold it."""
        for group in self.groups:
            leaves = [(tensor, leaf) for tensor in group.tensors for leaf in tensor.leaves]
            for layer in group.layers:
                for tensor, leaf in leaves:
                    yield group, layer, tensor, leaf

    @property
    def row_bytes(self) -> int:
        """Bytes that one more token adds for ever: windows do not count."""
        return sum(len(group.layers) * group.row_bytes
                   for group in self.groups if not group.window_tokens)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that do not grow with the request: states and full windows."""
        return sum(group.bytes(group.window_tokens) for group in self.groups)

    def shard(self, rank: int, count: int) -> CacheSpec:
        """Return what tensor-parallel `rank` of `count` holds of this whole spec.

        Heads are divided; fewer heads than ranks are copied, and then marked ``replicated``, as
        are tensors without heads (MLA latents). Sub-blocks of a convolution state are divided
        each by itself. Raises UsageError where heads do not divide.
        """
        from kvwire.tensor_parallel import shard
        return shard(self, rank, count)

    def select(self, layers: Iterable[int]) -> CacheSpec:
        """Return the part that holds `layers`, e.g. a pipeline stage's.

        Layers without a cache are passed over. Request tensors go where REQUEST_LAYER is named.
        """
        wanted = frozenset(layers)
        kept = [(group, tuple(layer for layer in group.layers if layer in wanted))
                for group in self.groups]
        groups = tuple(replace(group, layers=held) for group, held in kept if held)
        if not groups:
            raise UsageError(f"layers {sorted(wanted)} have no cache in {self.model!r}")
        return replace(self, groups=groups)

    def with_block_tokens(self, block_tokens: int) -> CacheSpec:
        """Return the same spec in pages of `block_tokens` tokens; 0 for contiguous."""
        def paged(tensor: TensorSpec) -> TensorSpec:
            return replace(tensor, block_tokens=block_tokens) if tensor.has_tokens else tensor
        return self.map_tensors(lambda group, tensor: paged(tensor))

    def map_tensors(self, change) -> CacheSpec:
        """Return the spec with every tensor replaced by ``change(group, tensor)``."""
        return replace(self, groups=tuple(
            replace(group, tensors=tuple(change(group, tensor) for tensor in group.tensors))
            for group in self.groups))

    def difference(self, other: CacheSpec, complete: bool = False) -> str | None:
        """Return in words the first field about which two specs disagree, or None.

        They agree when the models have one name (an empty one fits any) and every common leaf has
        the same dtype, the same axes and the same full extent along each (COLUMN excepted). Order
        of axes, blocks, windows, fusing and slices may differ. With `complete`, a leaf that only
        one side has is a difference too. Source: FORMAT.md section 7.3.
        """
        if self.model and other.model and self.model != other.model:
            return f"model: {self.model!r} here, {other.model!r} there"
        here, there = ({(group.kind, layer, leaf.name): leaf for group, layer, _, leaf in leaves}
                       for leaves in (self.leaves(), other.leaves()))
        for key in sorted(here.keys() | there.keys()):
            mine, yours = here.get(key), there.get(key)
            if mine is None or yours is None:
                if complete:
                    return f"{_leaf_words(*key)}: {'there' if mine is None else 'here'} only"
                continue
            field = _leaf_difference(mine, yours)
            if field is not None:
                return f"{_leaf_words(*key)}: {field}"
        return None

    def fingerprint(self) -> bytes:
        """Return 16 bytes that are equal for specs that agree completely.

        The first 16 bytes of SHA-256 over UTF-8 lines, each ended by a line feed: first
        ``kvwire spec 1``, then ``<length>:<model>``, then for each leaf of each layer, in rising
        order of (kind number, layer, leaf name as bytes):

            <kind> <layer> <length>:<leaf name> <dtype> <axis>:<full> <axis>:<full> ...

        with lengths in bytes, numbers in decimal, axes in rising order of their numbers, and
        ``*`` for the extent of TOKEN and COLUMN. For example ``1 3 1:k 3 1:* 2:8 3:128``.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> bytes:
        lines = [b"kvwire spec 1", _counted(self.model)]
        keyed = {(group.kind, layer, leaf.name.encode()): leaf
                 for group, layer, _, leaf in self.leaves()}
        for (kind, layer, _), leaf in sorted(keyed.items(), key=lambda item: item[0]):
            axes = "".join(f" {axis:d}:{full}" for axis, full in _agreed_extents(leaf).items())
            lines.append(b"%d %d %s %d%s" % (kind, layer, _counted(leaf.name), leaf.dtype,
                                              axes.encode()))
        return hashlib.sha256(b"".join(line + b"\n" for line in lines)).digest()[:16]

    def bytes(self, tokens: int) -> int:
        """Return the held bytes of one request of `tokens` tokens, not rounded up to blocks."""
        return sum(self.bytes_by_kind(tokens).values())

    def bytes_by_kind(self, tokens: int) -> dict[GroupKind, int]:
        """Return `bytes` by group kind: states count once, windows hold their newest tokens."""
        check_integer("tokens", tokens, 0, 2**63 - 1)
        totals: dict[GroupKind, int] = {}
        for group in self.groups:
            totals[group.kind] = totals.get(group.kind, 0) + group.bytes(tokens)
        return totals

    def __str__(self) -> str:
        from kvwire.spec_table import table
        return table(self)


def _leaf_words(kind: GroupKind, layer: int, name: str) -> str:
    where = "" if kind == GroupKind.REQUEST else f"layer {layer}, "
    return f"group {kind.name.lower()}, {where}leaf {name}"


def _leaf_difference(here: Leaf, there: Leaf) -> str | None:
    if here.dtype != there.dtype:
        return f"dtype {here.dtype.name.lower()} here, {there.dtype.name.lower()} there"
    mine, yours = _agreed_extents(here), _agreed_extents(there)
    if mine.keys() != yours.keys():
        names = [", ".join(axis.name.lower() for axis in axes) for axes in (mine, yours)]
        return f"axes {names[0]} here, {names[1]} there"
    return next((f"{axis.name.lower()} extent {mine[axis]} here, {yours[axis]} there"
                 for axis in mine if mine[axis] != yours[axis]), None)


def _agreed_extents(leaf: Leaf) -> dict[Axis, int | str]:
    """Return the full extent by axis, in rising order; "*" where sides may differ."""
    free = (Axis.TOKEN, Axis.COLUMN)
    return {spec.axis: "*" if spec.axis in free else spec.slices[0].full
            for spec in sorted(leaf.axes, key=lambda spec: spec.axis)}


def _counted(text: str) -> bytes:
    return b"%d:%s" % (len(text.encode()), text.encode())


def attention(layers: Iterable[int], *, kv_heads: int, head_dim: int, value_dim: int | None = None,
              dtype: object = "bf16", block_tokens: int = 0, order: str = "NHD",
              fused: bool = False) -> LayerGroup:
    """Return full attention with the leaves k and v, [token, head, dim] (NHD) or HND.

    `value_dim` is V's head size where it is not K's. `fused`: K and V side by side along the last
    axis of one tensor, as vLLM holds them.
    """
    tensors = _keys_and_values(kv_heads, head_dim, value_dim, dtype, block_tokens, order, fused)
    return LayerGroup(GroupKind.FULL_ATTENTION, layers, tensors)


def sliding_window(layers: Iterable[int], window_tokens: int, *, kv_heads: int, head_dim: int,
                   value_dim: int | None = None, dtype: object = "bf16", block_tokens: int = 0,
                   order: str = "NHD", fused: bool = False) -> LayerGroup:
    """Return attention over the newest `window_tokens` tokens; the rest as for `attention`."""
    tensors = _keys_and_values(kv_heads, head_dim, value_dim, dtype, block_tokens, order, fused)
    return LayerGroup(GroupKind.SLIDING_WINDOW, layers, tensors, window_tokens)


def latent(layers: Iterable[int], *, latent_dim: int = 512, rope_dim: int = 64,
           dtype: object = "bf16", block_tokens: int = 0, fused: bool = True) -> LayerGroup:
    """Return MLA with the leaves latent and rope, [token, dim], in one tensor or in two."""
    dtype = DType.of(dtype)
    parts = {"latent": latent_dim, "rope": rope_dim}
    named = {"mla": parts} if fused else parts
    return LayerGroup(GroupKind.LATENT, layers, tuple(
        TensorSpec(name, dtype, (AxisSpec(Axis.TOKEN), AxisSpec.of(Axis.DIM, extent)),
                   block_tokens) for name, extent in named.items()))


def recurrent(layers: Iterable[int], *, heads: int | None = None, channels: int | None = None,
              key_dim: int, value_dim: int | None = None, dtype: object = "fp32",
              order: str = "VK") -> LayerGroup:
    """Return a matrix state, leaf state: [head, value, key] (VK) or [head, key, value] (KV).

    Mamba-2's [head, head size, state size] is VK with value_dim = head size, key_dim = state size.
    Mamba-1 has `channels` in place of heads and values: [channel, key].
    """
    axes = {"K": AxisSpec.of(Axis.KEY, key_dim)}
    if (heads is None) == (channels is None) or (heads is None) != (value_dim is None):
        raise UsageError("a recurrent state needs heads and value_dim, or channels alone")
    if channels is not None:
        memory = (AxisSpec.of(Axis.CHANNEL, channels), axes["K"])
    else:
        axes["V"] = AxisSpec.of(Axis.VALUE, value_dim)
        memory = (AxisSpec.of(Axis.HEAD, heads), *_ordered(order, axes))
    return LayerGroup(GroupKind.RECURRENT, layers, (TensorSpec("state", DType.of(dtype), memory),))


def convolution(layers: Iterable[int], sub_blocks: int | Mapping[str, int], *, columns: int,
                dtype: object = "bf16", order: str = "SD", fused: bool = True) -> LayerGroup:
    """Return a convolution state: [column, channel] (SD, as vLLM names it) or [channel, column].

    Args:
        sub_blocks: channels by leaf name in memory order, or a number for one leaf, conv.
        columns: kept newest inputs: kernel size less one (transformers keeps one more).
        fused: all sub-blocks in one tensor, conv; otherwise one tensor each.
    """
    dtype = DType.of(dtype)
    apart = isinstance(sub_blocks, Mapping) and not fused
    named = sub_blocks if apart else {"conv": sub_blocks}
    tensors = tuple(TensorSpec(name, dtype, _ordered(order, {
        "S": AxisSpec.of(Axis.COLUMN, columns), "D": AxisSpec.of(Axis.CHANNEL, channels),
    })) for name, channels in named.items())
    return LayerGroup(GroupKind.CONVOLUTION, layers, tensors)


def auxiliary(layers: Iterable[int], name: str, *, heads: int | None = None,
              dim: int | None = None, dtype: object = "bf16", block_tokens: int = 0,
              order: str = "NHD") -> LayerGroup:
    """Return a small per-token tensor: indexer keys (`dim`), quantisation scales (`heads`)."""
    axes = {"N": AxisSpec(Axis.TOKEN)}
    axes |= {"H": AxisSpec.of(Axis.HEAD, heads)} if heads is not None else {}
    axes |= {"D": AxisSpec.of(Axis.DIM, dim)} if dim is not None else {}
    letters = "".join(letter for letter in order if letter in axes or letter not in "NHD")
    tensor = TensorSpec(name, DType.of(dtype), _ordered(letters, axes), block_tokens)
    return LayerGroup(GroupKind.AUXILIARY, layers, (tensor,))


def request_tensor(name: str, shape: Sequence[int], dtype: object) -> LayerGroup:
    """Return a tensor of fixed `shape` (1 to 3 axes) that belongs to the request, not a layer."""
    axes = (Axis.PLANE, Axis.ROW, Axis.ITEM)
    if not 1 <= len(shape) <= len(axes):
        raise UsageError(f"request tensor {name!r} has shape {tuple(shape)}; it must have 1 to "
                         f"{len(axes)} axes, reshape it")
    memory = tuple(AxisSpec.of(axis, full) for axis, full in zip(axes[-len(shape):], shape))
    return LayerGroup(GroupKind.REQUEST, (REQUEST_LAYER,),
                      (TensorSpec(name, DType.of(dtype), memory),))


def _ordered(order: str, axes: Mapping[str, AxisSpec]) -> tuple[AxisSpec, ...]:
    if sorted(order) != sorted(axes):
        raise UsageError(f"order is {order!r}; it must name each of {', '.join(axes)} once")
    return tuple(axes[letter] for letter in order)


def _keys_and_values(kv_heads: int, head_dim: int, value_dim: int | None, dtype: object,
                     block_tokens: int, order: str, fused: bool) -> tuple[TensorSpec, ...]:
    dtype = DType.of(dtype)
    dims = {"k": head_dim, "v": head_dim if value_dim is None else value_dim}
    return tuple(TensorSpec(name, dtype, _ordered(order, {
        "N": AxisSpec(Axis.TOKEN), "H": AxisSpec.of(Axis.HEAD, kv_heads),
        "D": AxisSpec.of(Axis.DIM, extent),
    }), block_tokens) for name, extent in ({"kv": dims} if fused else dims).items())
