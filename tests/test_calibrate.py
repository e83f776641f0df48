"""Code tables made from data, held against a brute-force search and against real caches."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from kvwire import _native
from kvwire.tensor_spec import DType
from kvwire.tiered import CodeTable, Part, element_format, encode_tiered

torch = pytest.importorskip("torch")

SAMPLE = Path(__file__).resolve().parents[2] / "shared/data/kv-sample"
needs_sample = pytest.mark.skipif(not SAMPLE.is_dir(), reason="shared/data/kv-sample is absent")

TORCH = {DType.FP32: torch.float32, DType.FP16: torch.float16, DType.BF16: torch.bfloat16,
         DType.E4M3: torch.float8_e4m3fn, DType.E5M2: torch.float8_e5m2}
KV_CANDIDATES = [(0b00, 0), (0b01, 0), (0b11, 0)]
STATE_CANDIDATES = [(0b001, 0), (0b011, 0), (0b101, 0), (0b011, 0b101)]


def cast(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Return the bits of fp32 values as `dtype`."""
    bits = torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(TORCH[dtype])
    width = element_format(dtype).item_bytes
    return bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[width]).numpy().view(
        f"<u{width}")


def exponents(bits: np.ndarray, dtype: DType) -> np.ndarray:
    form = element_format(dtype)
    return (bits.astype(np.int64) >> form.verbatim_bits - 1) & (1 << form.exponent_bits) - 1


def calibrate(bits, dtype, extents, candidates, elements_to_code=0):
    """Return table and predicted bits. `bits` is the whole sample, from the pattern's start."""
    data, predicted = _native.calibrate(dtype, extents, candidates, [(0, bits)], elements_to_code)
    table, taken = CodeTable.decode(data)
    assert taken == len(data) and max(table.offsets) < 32
    return table, predicted


def cost(table: CodeTable, bits: np.ndarray) -> float:
    """Return what the exponents cost with `table`, in bits per element."""
    symbols = 1 << table.format.exponent_bits
    distance = (exponents(bits, table.dtype).ravel() - table.bases(0, bits.size)) % symbols
    ranked = np.bincount(distance, minlength=symbols)[list(table.offsets)]
    return code_cost(ranked, table.tier_bits, bits.size)


def code_cost(ranked: np.ndarray, tier_bits, total: int) -> float:
    rank, left, spent = 0, total, 0
    for width in tier_bits:
        spent += left * width
        left -= int(ranked[rank:rank + (1 << width) - 1].sum())
        rank += (1 << width) - 1
    return (spent + 8 * left) / total


SHAPES = [shape for count in range(1, 5) for shape in itertools.product(range(1, 5), repeat=count)
          if sum(shape) <= 8 and sum((1 << width) - 1 for width in shape) <= 16]


def brute_force(field: np.ndarray, symbols: int, candidates) -> float:
    """Return the least cost over candidates, many ways to place bases, and all tier shapes.

    Args:
        field: exponents, [repetitions of the pattern, *extents].
    """
    def along(mask):  # the axes that do not count
        return (0, *(1 + axis for axis in range(field.ndim - 1) if not mask >> axis & 1))

    least = np.inf
    for rows, columns in candidates:
        mean, median = (find(field, along(rows), keepdims=True) for find in (np.mean, np.median))
        extra = 0
        if columns:
            extra = np.rint((field - mean).mean(along(columns), keepdims=True))
        for middle, phase in itertools.product((mean, median), np.arange(0, 1, 0.125)):
            distance = field - (np.floor(middle + phase) + extra).astype(np.int64)
            ranked = np.sort(np.bincount(distance.ravel() % symbols, minlength=symbols))[::-1]
            least = min(least, *(code_cost(ranked, shape, field.size) for shape in SHAPES))
    return least


def made_cache(tokens: int, heads: int, dim: int, spread: float) -> np.ndarray:
    """Return [tokens, heads, dim] normal values, each channel with a scale of its own."""
    random = np.random.default_rng(5)
    scale = np.exp2(spread * random.standard_normal((heads, dim)))
    return random.standard_normal((tokens, heads, dim)) * scale


def made_state(heads: int, keys: int, values: int) -> np.ndarray:
    """Return [heads, keys, values] normal values, scaled by row and by column."""
    random = np.random.default_rng(6)
    rows = np.exp2(1.5 * random.standard_normal((heads, keys, 1)))
    columns = np.exp2(1.5 * random.standard_normal((heads, 1, values)))
    return random.standard_normal((heads, keys, values)) * rows * columns


@pytest.mark.parametrize("spread", [0, 0.3, 1, 2])
@pytest.mark.parametrize("dtype", TORCH, ids=lambda dtype: dtype.name)
def test_as_good_as_a_brute_force_search_on_channels(dtype, spread):
    # Far from the ends of narrow exponents, where values would be rounded to 0.
    bits = cast(made_cache(300, 3, 64, min(spread, 1) if dtype == DType.E4M3 else spread), dtype)
    table, predicted = calibrate(bits, dtype, (3, 64), KV_CANDIDATES)
    spent = cost(table, bits)
    assert predicted == pytest.approx(spent, abs=1e-9)
    best = brute_force(exponents(bits, dtype), 1 << table.format.exponent_bits, KV_CANDIDATES)
    verbatim = table.format.verbatim_bits
    assert verbatim + spent <= 1.005 * (verbatim + best)


@pytest.mark.parametrize("dtype", [DType.FP32, DType.BF16], ids=lambda dtype: dtype.name)
def test_as_good_as_a_brute_force_search_on_states(dtype):
    bits = cast(made_state(4, 64, 96), dtype)
    table, predicted = calibrate(bits, dtype, (4, 64, 96), STATE_CANDIDATES)
    assert (len(table.row_bases), len(table.column_bases)) == (4 * 64, 4 * 96)
    spent = cost(table, bits)
    assert predicted == pytest.approx(spent, abs=1e-9)
    best = brute_force(exponents(bits, dtype)[None], 256, STATE_CANDIDATES)
    verbatim = table.format.verbatim_bits
    assert verbatim + spent <= 1.005 * (verbatim + best)


def test_prediction_is_what_the_code_then_takes():
    bits = cast(made_cache(512, 2, 64, 1), DType.BF16)
    table, predicted = calibrate(bits, DType.BF16, (2, 64), KV_CANDIDATES)
    coded = encode_tiered(bits.tobytes(), [Part(bits.nbytes, table, 0, table_index=1)])
    # The rest: index, header, and what fills up the last byte of each plane.
    assert predicted < 8 * len(coded) / bits.size - 8 < predicted + 0.02


def test_a_sample_serves_the_whole():
    bits = cast(made_cache(2048, 4, 64, 1), DType.BF16)
    flat = bits.ravel()
    runs = [(at, flat[at:at + count]) for at, count in _native.sample_runs(flat.size, 32_768)]
    data, _ = _native.calibrate(DType.BF16, (4, 64), KV_CANDIDATES, runs)
    sampled, whole = CodeTable.decode(data)[0], calibrate(bits, DType.BF16, (4, 64),
                                                          KV_CANDIDATES)[0]
    assert sum(len(run) for _, run in runs) < flat.size / 8
    assert cost(sampled, bits) < 1.01 * cost(whole, bits)


def test_a_table_that_costs_more_than_it_saves_is_not_taken():
    bits = cast(made_cache(64, 8, 128, 0.5), DType.BF16)
    def bases(elements_to_code):
        table, _ = calibrate(bits, DType.BF16, (8, 128), KV_CANDIDATES, elements_to_code)
        return len(table.row_bases)
    assert bases(0) == bases(1 << 24) == 1024 and bases(1024) < 1024


def test_position_counts_from_the_pattern():
    bits = cast(made_cache(100, 1, 50, 2), DType.BF16).ravel()
    whole, bits_of_whole = _native.calibrate(DType.BF16, (50,), [(1, 0)], [(0, bits)])
    later = [(at + 50 * 7, bits[at:at + 50]) for at in range(0, bits.size, 50)]
    assert _native.calibrate(DType.BF16, (50,), [(1, 0)], later) == (whole, bits_of_whole)
    turned = [(at + 20, bits[at:at + 50]) for at in range(0, bits.size, 50)]
    table, _ = _native.calibrate(DType.BF16, (50,), [(1, 0)], turned)
    assert table != whole
    bases, moved = (CodeTable.decode(data)[0].bases(0, 50) for data in (whole, table))
    assert np.abs(bases - np.roll(moved, -20)).max() <= 1


def test_unlawful_calls_are_refused():
    sample = np.zeros(8, np.uint16)
    for dtype, extents, samples in [
            (DType.INT8, (1,), []), (DType.BF16, (0,), []), (DType.BF16, (1 << 16, 1 << 15), []),
            (DType.BF16, (1, 1, 1, 1, 1), []), (DType.BF16, (1,), [(0, b"odd")]),
            (DType.BF16, (1,), [(0, sample[::2])])]:
        with pytest.raises(ValueError, match="calibration"):
            _native.calibrate(dtype, extents, [(0, 0)], samples)


# ---- real caches

def ratio(arrays, dtype, extents, candidates) -> float:
    """Return raw bytes over coded bytes, where each array brings its table with it."""
    raw = coded = 0
    for bits in arrays:
        table, _ = calibrate(np.ascontiguousarray(bits), dtype, extents, candidates, bits.size)
        raw += bits.nbytes
        coded += len(encode_tiered(bits.tobytes(), [Part(bits.nbytes, table)]))
    return raw / coded


@needs_sample
@pytest.mark.parametrize("dtype, goal", [
    (DType.BF16, 1.49), (DType.E4M3, 1.18), (DType.E5M2, 1.39), (DType.FP16, 1.16)],
    ids=lambda value: getattr(value, "name", None))
def test_keys_and_values_of_a_real_model(dtype, goal):
    layers = []
    for name in "kv":
        bits = np.load(SAMPLE / f"smollm2_{name}_bf16_L3_T1024_H3_D64.npy")
        layers += list(cast((bits.astype(np.uint32) << 16).view(np.float32), dtype))
    assert ratio(layers, dtype, (3, 64), KV_CANDIDATES) >= goal


@needs_sample
@pytest.mark.parametrize("dtype, goal", [(DType.BF16, 1.45), (DType.FP32, 1.17)],
                         ids=lambda value: getattr(value, "name", None))
def test_synthetic_states(dtype, goal):
    ratios = []
    for name in ("gdn", "kda", "mamba2"):
        bits = cast(np.load(SAMPLE / f"state_synthetic_{name}_fp32.npy"), dtype)
        ratios.append(ratio([bits], dtype, bits.shape, STATE_CANDIDATES))
    assert np.mean(ratios) >= goal
