"""Hypothesis strategies for cache specs: every kind, order, fusing and dtype, in small sizes."""

from hypothesis import strategies as st

from kvwire.layout import (
    REQUEST_LAYER, Axis, AxisSpec, CacheSpec, DType, GroupKind, LayerGroup, Slice, TensorSpec,
)

_AXES = {
    GroupKind.FULL_ATTENTION: [(Axis.TOKEN, Axis.HEAD, Axis.DIM), (Axis.TOKEN, Axis.DIM)],
    GroupKind.LATENT: [(Axis.TOKEN, Axis.DIM)],
    GroupKind.SLIDING_WINDOW: [(Axis.TOKEN, Axis.HEAD, Axis.DIM)],
    GroupKind.RECURRENT: [(Axis.HEAD, Axis.VALUE, Axis.KEY), (Axis.CHANNEL, Axis.KEY)],
    GroupKind.CONVOLUTION: [(Axis.CHANNEL, Axis.COLUMN)],
    GroupKind.AUXILIARY: [(Axis.TOKEN, Axis.DIM), (Axis.TOKEN, Axis.HEAD), (Axis.DIM,)],
    GroupKind.REQUEST: [(Axis.ITEM,), (Axis.ROW, Axis.ITEM), (Axis.PLANE, Axis.ROW, Axis.ITEM)],
}


@st.composite
def slices(draw, name: str = "", whole: bool = True, extent_max: int = 6) -> Slice:
    full = draw(st.integers(1, extent_max))
    start = 0 if whole else draw(st.integers(0, full - 1))
    stop = full if whole else draw(st.integers(start + 1, full))
    return Slice(name, full, start, stop)


@st.composite
def tensor_specs(draw, kind: GroupKind | None = None, name: str = "t", block_tokens: int = 0,
                 whole: bool = True, fused: bool = True) -> TensorSpec:
    """A tensor of a group of `kind`; `whole=False` cuts slices, `fused=False` keeps one leaf."""
    kind = draw(st.sampled_from(GroupKind)) if kind is None else kind
    axes = draw(st.sampled_from(_AXES[kind]).flatmap(st.permutations))
    fusible = [axis for axis in axes if axis not in (Axis.TOKEN, Axis.COLUMN)]
    fused_axis = draw(st.sampled_from([None, *fusible])) if fused else None
    specs = []
    for axis in axes:
        if axis == Axis.TOKEN:
            parts = ()
        elif axis == fused_axis:
            count = draw(st.integers(2, 3))
            parts = tuple(draw(slices(f"{name}.{part}", whole)) for part in range(count))
        else:
            parts = (draw(slices("", whole or axis == Axis.COLUMN)),)
        specs.append(AxisSpec(axis, parts))
    blocks = block_tokens if Axis.TOKEN in axes else 0
    return TensorSpec(name, draw(st.sampled_from(DType)), tuple(specs), blocks, not whole)


@st.composite
def layer_groups(draw, prefix: str = "g", whole: bool = True, fused: bool = True) -> LayerGroup:
    kind = draw(st.sampled_from(GroupKind))
    block_tokens = draw(st.sampled_from([0, 1, 4, 16]))
    count = draw(st.integers(1, 3))
    tensors = tuple(draw(tensor_specs(kind, f"{prefix}t{index}", block_tokens, whole, fused))
                    for index in range(count))
    layers = (REQUEST_LAYER,)
    if kind != GroupKind.REQUEST:
        layers = tuple(sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=4))))
    window = draw(st.integers(1, 40)) if kind == GroupKind.SLIDING_WINDOW else 0
    return LayerGroup(kind, layers, tensors, window)


@st.composite
def cache_specs(draw, whole: bool = True, fused: bool = True, groups_max: int = 4) -> CacheSpec:
    """A valid spec; leaf names say their group and tensor, so they are distinct."""
    count = draw(st.integers(1, groups_max))
    return CacheSpec(draw(st.sampled_from(["", "tiny", "org/modèle 7B"])), tuple(
        draw(layer_groups(f"g{index}", whole, fused)) for index in range(count)))
