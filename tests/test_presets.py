"""Presets against published numbers: the paper's transfer sizes and the geometry table."""

import pytest

from kvwire.errors import UsageError
from kvwire.layout import CacheSpec, DType, GroupKind
from kvwire.presets import preset_names

MIB = 2**20

# model: (KV bytes/token, fixed MiB, MiB at 32K tokens)
GEOMETRY = {
    "kimi-linear-48b": (8_064, 41.4, 293),
    "kimi-k3": (27_648, 428.6, 1_293),
    "prfaas-1t": (17_280, 173.9, 714),
    "qwen3-next-80b": (24_576, 73.7, 842),
    "qwen3.5-397b": (30_720, 183.2, 1_143),
    "qwen3.5-35b-a3b": (20_480, 61.4, 701),
    "qwen3.6-27b": (65_536, 146.8, 2_195),
    "ring-2.5-1t": (11_520, 280.0, 640),
    "minimax-m1": (40_960, 280.0, 1_560),
    "mimo-v2-flash": (23_040, 24.4, 744),
    "mimo-v2.5-pro": (51_200, 37.5, 1_638),
    "gpt-oss-120b": (36_864, 4.5, 1_157),
    "gpt-oss-20b": (24_576, 3.0, 771),
    "jamba-1.5-mini": (16_384, 8.3, 520),
    "jamba-1.5-large": (36_864, 37.4, 1_189),
    "nemotron-h-8b": (16_384, 97.4, 609),
    "nemotron-nano-9b-v2": (16_384, 136.9, 649),
    "nemotron-3-nano-30b-a3b": (6_144, 46.8, 239),
    "falcon-h1-7b": (45_056, 66.9, 1_475),
    "falcon-h1-34b": (147_456, 146.1, 4_754),
    "minimax-m2.5": (253_952, 0.0, 7_936),
    "qwen3-235b": (192_512, 0.0, 6_016),
    "smollm2-135m": (23_040, 0.0, 720),
}

# Table 3 of arXiv 2604.15039, decoded: MiB at 1K, 8K, 32K, 128K tokens.
TABLE_3 = {
    "kimi-linear-48b": (49, 104, 293, 1_049),
    "mimo-v2-flash": (47, 204, 744, 2_904),
    "qwen3.5-397b": (213, 423, 1_143, 4_023),
    "ring-2.5-1t": (291, 370, 640, 1_720),
    "minimax-m2.5": (248, 1_984, 7_936, 31_744),
    "qwen3-235b": (188, 1_504, 6_016, 24_064),
}


def test_every_preset_has_a_row():
    assert set(preset_names()) == set(GEOMETRY)


@pytest.mark.parametrize("model", GEOMETRY)
def test_geometry_table(model):
    row_bytes, fixed_mib, mib = GEOMETRY[model]
    spec = CacheSpec.preset(model)
    assert spec.model == model
    assert spec.row_bytes == row_bytes
    assert spec.fixed_bytes / MIB == pytest.approx(fixed_mib, abs=0.05)
    assert spec.bytes(32768) / MIB == pytest.approx(mib, abs=0.55)


@pytest.mark.parametrize("tokens, mib", [(1024, 190.8), (8192, 308.9), (32_000, 701.3),
                                         (130_000, 2316.3)])
def test_table_5_of_the_paper(tokens, mib):
    assert CacheSpec.preset("prfaas-1t").bytes(tokens) / MIB == pytest.approx(mib, abs=0.1)


@pytest.mark.parametrize("model", TABLE_3)
def test_table_3_of_the_paper(model):
    spec = CacheSpec.preset(model)
    sizes = [spec.bytes(tokens) / MIB for tokens in (1024, 8192, 32768, 131072)]
    assert sizes == pytest.approx(TABLE_3[model], abs=1)


@pytest.mark.parametrize("model, full, others", [
    ("kimi-k3", 24, 69), ("kimi-linear-48b", 7, 20), ("prfaas-1t", 15, 42),
    ("ring-2.5-1t", 10, 70), ("mimo-v2-flash", 9, 39), ("mimo-v2.5-pro", 10, 60),
    ("nemotron-h-8b", 4, 24), ("nemotron-nano-9b-v2", 4, 27), ("nemotron-3-nano-30b-a3b", 6, 23),
    ("jamba-1.5-large", 9, 63), ("falcon-h1-34b", 72, 72),
])
def test_layer_counts(model, full, others):
    groups = CacheSpec.preset(model).groups
    assert len(groups[0].layers) == full
    assert {len(group.layers) for group in groups[1:]} == {others}


def test_options_change_types_and_blocks_only():
    spec = CacheSpec.preset("qwen3-next-80b", block_tokens=64, kv_dtype="e4m3",
                            state_dtype="bf16", conv_dtype="fp32")
    assert [(group.kind, group.block_tokens, {tensor.dtype for tensor in group.tensors})
            for group in spec.groups] == [
        (GroupKind.FULL_ATTENTION, 64, {DType.E4M3}),
        (GroupKind.CONVOLUTION, 0, {DType.FP32}),
        (GroupKind.RECURRENT, 0, {DType.BF16})]
    assert spec.row_bytes == CacheSpec.preset("qwen3-next-80b").row_bytes // 2


@pytest.mark.parametrize("model", sorted(GEOMETRY.keys() - {"smollm2-135m"}))
@pytest.mark.parametrize("count", [2, 8])
def test_presets_divide(model, count):
    whole = CacheSpec.preset(model)
    parts = [whole.shard(rank, count) for rank in range(count)]
    assert all(whole.difference(part, complete=True) is None for part in parts)
    copied = any(tensor.replicated for group in parts[0].groups for tensor in group.tensors)
    total = sum(part.bytes(1000) for part in parts)
    assert total > whole.bytes(1000) if copied else total == whole.bytes(1000)


def test_three_heads_do_not_divide_by_two():
    with pytest.raises(UsageError, match="leaf k: 3 heads"):
        CacheSpec.preset("smollm2-135m").shard(0, 2)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(UsageError, match="'kimi-k4' is unknown; known are kimi-linear-48b"):
        CacheSpec.preset("kimi-k4")
