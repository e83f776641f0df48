"""FORMAT.md §9.3: the reference by itself, and every variant of the kernels against it."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tiered import KINDS, code_tables, kinds_of_bytes

from kvwire import _native
from kvwire.errors import ErrorCode, KvwireError
from kvwire.layout import DType
from kvwire.quantised import (
    CODE_BITS, FLOATS, GROUP, PART, QuantisedPart, Rung, decode_quantised, encode_quantised,
)
from kvwire.tiered import CodeTable, Part

VARIANTS = _native.quantised_variants()
NARROW = {Rung.BF16: DType.BF16, Rung.E4M3: DType.E4M3}
GRIDS = (Rung.E4M3, Rung.INT8_GRID)


def values_of(raw: bytes, dtype: DType) -> np.ndarray:
    if dtype == DType.BF16:
        return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(raw, "<f4" if dtype == DType.FP32 else "<f2").astype(np.float32)


def raw_of(values: np.ndarray, dtype: DType) -> bytes:
    """Return the values cut, not rounded, to `dtype`."""
    if dtype == DType.BF16:
        return (values.astype("<f4").view(np.uint32) >> 16).astype("<u2").tobytes()
    with np.errstate(over="ignore"):
        return values.astype("<f4" if dtype == DType.FP32 else "<f2").tobytes()


def gauss(count: int, dtype: DType, seed: int = 0) -> bytes:
    return raw_of(np.random.default_rng(seed).standard_normal(count).astype(np.float32), dtype)


def rounded(raw: bytes, part: QuantisedPart) -> bytes:
    return decode_quantised(encode_quantised(raw, [part]), len(raw))


def nested_tuples(part):
    return [(p.raw_bytes, p.table.encode() if p.table else None, p.position, p.table_index)
            for p in part.nested]


def native_parts(parts):
    return [(part.rung, part.dtype, part.axes, part.row_axes << 4 - len(part.extents),
             part.column_axes << 4 - len(part.extents), nested_tuples(part)) for part in parts]


def native_encode(raw, parts, variant=None, out_max=None):
    return _native.quantised_encode(raw, native_parts(parts), variant, out_max)


def outcome(decode, *arguments):
    try:
        return decode(*arguments)
    except KvwireError as error:
        return error.code


def tables_of(parts):
    return {p.table_index: p.table for part in parts for p in part.nested
            if p.table and p.table_index}


def decodings(payload, raw_bytes, tables=None):
    tables = tables or {}
    stored = {index: table.encode() for index, table in tables.items()}
    return [outcome(decode_quantised, payload, raw_bytes, tables.get)] + [
        outcome(_native.quantised_decode, payload, raw_bytes, stored, variant)
        for variant in VARIANTS]


def check_variants(raw, parts):
    expected = encode_quantised(raw, parts)
    for variant in VARIANTS:
        assert native_encode(raw, parts, variant) == expected, variant
    found = decodings(expected, len(raw), tables_of(parts))
    assert isinstance(found[0], bytes) and set(found) == {found[0]}


@st.composite
def parts_of_chunks(draw, number: int = 0):
    """(raw, part): any rung, axes and kind of data."""
    rung = draw(st.sampled_from(Rung))
    extents = tuple(draw(st.lists(st.integers(1, 9), max_size=3)))
    extents += (draw(st.integers(1, 200) | st.sampled_from([63, 64, 65, 1000])),)
    extents = tuple(draw(st.permutations(extents)))
    masks = st.integers(0, (1 << len(extents)) - 1)
    rows = draw(masks) if rung in GRIDS or rung in CODE_BITS else 0
    columns = draw(masks) if rung in GRIDS else 0
    dtype = {Rung.EXACT: DType.BYTES, Rung.BF16: DType.FP32}.get(rung) or draw(
        st.sampled_from(FLOATS))
    count = int(np.prod(extents))
    nested = ()
    if rung in NARROW and draw(st.booleans()):
        table = draw(code_tables((NARROW[rung],), window=24))
        bytes_ = count * NARROW[rung].item_bytes
        nested = (Part(bytes_, table, draw(st.integers(0, table.period - 1)),
                       draw(st.sampled_from([0, 10 + number]))),)
    kind = draw(st.sampled_from([kind for kind in KINDS if kind != "wide"]))
    raw = kinds_of_bytes(kind, count * dtype.item_bytes, dtype.item_bytes, draw(st.integers(0, 99)))
    return raw, QuantisedPart(rung, dtype, extents, rows, columns, nested)


@st.composite
def chunks(draw):
    pieces = [draw(parts_of_chunks(number)) for number in range(draw(st.integers(1, 3)))]
    return b"".join(raw for raw, _ in pieces), [part for _, part in pieces]


# ---- the reference

@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("rung", CODE_BITS, ids=lambda rung: rung.name)
def test_groups_are_rounded_to_half_a_step(rung, dtype):
    tokens, channels = 150, 48
    raw = gauss(tokens * channels, dtype)
    x = values_of(raw, dtype).reshape(tokens, channels)
    y = values_of(rounded(raw, QuantisedPart(rung, dtype, x.shape, 2)), dtype).reshape(x.shape)
    steps = (1 << CODE_BITS[rung]) - 1
    for start in range(0, tokens, GROUP):  # per channel
        group, error = x[start:start + GROUP], np.abs(y - x)[start:start + GROUP].max(0)
        spread = np.ptp(group, axis=0)
        own_digits = np.abs(group).max(0) * 2.0 ** -(8 if dtype == DType.BF16 else 11)
        assert (error <= spread / steps * 0.51 + own_digits).all()
    z = values_of(rounded(raw, QuantisedPart(rung, dtype, x.shape, 1)), dtype).reshape(x.shape)
    spread = np.ptp(x, axis=1, keepdims=True)  # per token
    assert (np.abs(z - x) <= spread / steps * 0.52 + np.abs(x).max() * 2.0 ** -8).all()
    assert not (y == z).all()


def test_a_grid_follows_rows_and_columns():
    random = np.random.default_rng(5)
    rows, columns = (10.0 ** random.uniform(-3, 3, n) for n in (40, 50))
    x = random.standard_normal((2, 40, 50)) * rows[:, None] * columns
    raw = x.astype("<f4").tobytes()
    for rung, bound in ((Rung.INT8_GRID, 0.01), (Rung.E4M3, 0.04)):
        def error(row_axes, column_axes):
            part = QuantisedPart(rung, DType.FP32, x.shape, row_axes, column_axes)
            y = values_of(rounded(raw, part), DType.FP32).reshape(x.shape)
            return np.median(np.abs(y - x) / np.abs(x))
        assert error(0b011, 0b101) < 0.35 * error(0b011, 0) or rung == Rung.E4M3
        assert error(0b011, 0b101) < bound


def test_what_is_on_the_lattice_stays():
    codes = np.random.default_rng(2).integers(0, 16, (64, 8))
    codes[:2] = [[0], [15]]
    raw = raw_of((codes * 0.25 - 1.5).astype(np.float32), DType.BF16)
    assert rounded(raw, QuantisedPart(Rung.INT4, DType.BF16, (64, 8), 2)) == raw
    ints = np.random.default_rng(2).integers(-127, 128, (4, 99)).astype(np.float32)
    ints[:, 0] = 127
    raw = raw_of(ints, DType.FP16)
    assert rounded(raw, QuantisedPart(Rung.INT8_GRID, DType.FP16, ints.shape, 1)) == raw
    zeros = bytes(400)
    for rung in (*CODE_BITS, *GRIDS):
        assert rounded(zeros, QuantisedPart(rung, DType.FP32, (100,))) == zeros


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 2.0 ** 58])
@pytest.mark.parametrize("rung", [rung for rung in Rung if rung], ids=lambda rung: rung.name)
def test_a_part_that_cannot_be_rounded_goes_exact(rung, value):
    dtypes = (DType.FP32,) if rung == Rung.BF16 else FLOATS
    for dtype in dtypes if abs(value) > 1e30 or value != value else (dtypes[0], dtypes[-1]):
        values = np.random.default_rng(1).standard_normal(300).astype(np.float32)
        values[77] = value
        raw = raw_of(values, dtype)
        payload = encode_quantised(raw, [QuantisedPart(rung, dtype, (300,))])
        assert payload[8] == Rung.EXACT and decode_quantised(payload, len(raw)) == raw
        check_variants(raw, [QuantisedPart(rung, dtype, (300,))])


@pytest.mark.parametrize("rung", [rung for rung in Rung if rung], ids=lambda rung: rung.name)
def test_the_largest_that_can_be_rounded_stays_finite(rung):
    values = np.full(200, 2.0 ** 57.99, np.float32) * np.resize([1, -1, 0.3], 200)
    raw = raw_of(values.astype(np.float32), DType.FP32)
    part = QuantisedPart(rung, DType.FP32, (200,))
    y = values_of(rounded(raw, part), DType.FP32)
    assert np.isfinite(y).all() and encode_quantised(raw, [part])[8] == rung
    check_variants(raw, [part])


def test_fp16_does_not_become_infinite():
    values = np.resize([65504.0, -65504.0, 3.0, 65472.0], 256).astype(np.float32)
    for rung in (*CODE_BITS, *GRIDS):
        part = QuantisedPart(rung, DType.FP16, (256,))
        raw = raw_of(values, DType.FP16)
        assert np.isfinite(values_of(rounded(raw, part), DType.FP16)).all()
        check_variants(raw, [part])


def test_bf16_is_rounded_to_nearest_even():
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x00008000, 0x00018000,
                     0x80008001, 0x00000001], np.uint32)
    part = QuantisedPart(Rung.BF16, DType.FP32, (len(bits),))
    found = np.frombuffer(rounded(bits.astype("<u4").tobytes(), part), np.uint32)
    assert [int(word) for word in found] == [
        0x3F800000, 0x3F820000, 0x3F810000, 0x3F800000, 0, 0x00020000, 0x80010000, 0]


def test_e4m3_is_what_numpy_like_libraries_say():
    torch = pytest.importorskip("torch")
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    between = np.concatenate([values[:-1] * f + values[1:] * (1 - f)
                              for f in (0, 0.25, 0.499, 0.5, 0.501)]).astype(np.float32)
    between = np.append(between, [448.0, -448.0]).astype(np.float32)  # so that the scale is 1
    part = QuantisedPart(Rung.E4M3, DType.FP32, (len(between),))
    expected = torch.from_numpy(between).to(torch.float8_e4m3fn).float().numpy()
    found = values_of(rounded(between.astype("<f4").tobytes(), part), DType.FP32)
    assert (found == expected).all()


def test_sizes():
    """Codes, and 4 bytes of scale and minimum for 64 elements."""
    raw = gauss(1 << 17, DType.BF16)
    for rung, bits in CODE_BITS.items():
        coded = encode_quantised(raw, [QuantisedPart(rung, DType.BF16, (1024, 128), 2)])
        assert len(coded) == PART.bytes + (1 << 17) * (bits + 0.5) / 8


# ---- every rule, broken once by name

RAW = gauss(130, DType.BF16)
INT6 = encode_quantised(RAW, [QuantisedPart(Rung.INT6, DType.BF16, (1, 130), 1)])
GRID_RAW = gauss(33, DType.FP32)
GRID = encode_quantised(GRID_RAW, [QuantisedPart(Rung.INT8_GRID, DType.FP32, (3, 11), 1, 2)])
E4M3 = encode_quantised(GRID_RAW, [QuantisedPart(Rung.E4M3, DType.FP32, (3, 11), 1)])
WIDE = encode_quantised(GRID_RAW, [QuantisedPart(Rung.BF16, DType.FP32, (33,))])
EXACT = encode_quantised(b"abc", [QuantisedPart(Rung.EXACT, DType.BYTES, (3,))])
CODES_AT = PART.bytes + 16  # three groups of INT6: 12 bytes of scales and minima


def changed(data, at, value, count=1):
    assert data[at:at + count] != value.to_bytes(count, "little")
    return data[:at] + value.to_bytes(count, "little") + data[at + count:]


def header(field, value, data=INT6):
    offset, count = PART.fields[field]
    return changed(data, offset, value, min(count, 4))


BROKEN = {
    "no part": b"",
    "header cut": INT6 + bytes(31),
    "a part too many": INT6 + EXACT,
    "raw_bytes 0": header("raw_bytes", 0),
    "raw_bytes too many": header("raw_bytes", len(RAW) + 2),
    "coded_bytes no multiple": header("coded_bytes", len(INT6) + 1) + bytes(15),
    "coded_bytes beyond the end": header("coded_bytes", len(INT6) + 16),
    "coded_bytes below the header": header("coded_bytes", 16),
    "coded_bytes too few": header("coded_bytes", len(INT6) - 16),
    "coded_bytes too many": header("coded_bytes", len(INT6) + 16) + bytes(16),
    "no room for scales": header("coded_bytes", PART.bytes),
    "rung 7": header("rung", 7),
    "dtype INT8": header("dtype", int(DType.INT8)),
    "dtype of EXACT": header("dtype", int(DType.INT8), EXACT),
    "dtype of BF16": header("dtype", int(DType.FP16), WIDE),
    "row_axes 16": header("row_axes", 16),
    "row_axes of EXACT": header("row_axes", 1, EXACT),
    "row_axes of BF16": header("row_axes", 1, WIDE),
    "column_axes 16": header("column_axes", 16, GRID),
    "column_axes of groups": header("column_axes", 8),
    "reserved": header("reserved", 1),
    "extents 0": header("extents", 0),
    "extents too many": header("extents", 2),
    "extents that wrap": header("extents", 0x80000001),
    "a scale too large": changed(INT6, PART.bytes, 0x5D80, 2),
    "a scale that is NaN": changed(INT6, PART.bytes + 4, 0x7FC0, 2),
    "a negative scale": changed(INT6, PART.bytes + 1, INT6[PART.bytes + 1] | 0x80),
    "a minimum too large": changed(INT6, PART.bytes + 10, 0xDD80, 2),
    "padding of scales": changed(INT6, PART.bytes + 15, 1),
    "padding of codes": changed(INT6[:-16], CODES_AT + 3 * 48 - 1, 1),
    "a code behind the last": changed(INT6, CODES_AT + 2 * 48 + 2, 1),
    "high bits of a code behind the last": changed(INT6, CODES_AT + 2 * 48 + 32 + 2, 1),
    "a negative column scale": changed(GRID, PART.bytes + 7, GRID[PART.bytes + 7] | 0x80),
    "padding of a grid": changed(GRID, PART.bytes + 31, 1),
    "an e4m3 NaN": changed(E4M3, len(E4M3) - 16, 0xFF),
    "nested too short": changed(GRID, PART.bytes + 32, 32, 4),
    "nested padding": changed(WIDE, len(WIDE) - 1, 1),
    "nested form": changed(EXACT, PART.bytes + 17, 0xC0),
}


def raw_bytes_of(payload):
    return {b"": 260}.get(payload, {Rung.EXACT: 3, Rung.BF16: 132, Rung.E4M3: 132,
                                    Rung.INT8_GRID: 132}.get((payload + bytes(9))[8], 260))


def test_the_payloads_that_are_broken_below_are_right():
    for payload in (INT6, GRID, E4M3, WIDE, EXACT):
        found = decodings(payload, raw_bytes_of(payload))
        assert isinstance(found[0], bytes) and set(found) == {found[0]}


@pytest.mark.parametrize("payload", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_rule_is_refused(payload):
    assert set(decodings(payload, raw_bytes_of(payload))) == {ErrorCode.CODED_INVALID}


def test_a_table_that_is_not_there_is_named():
    table = CodeTable(DType.BF16, (2, 2), (3, 4, 5, 2, 6, 1), row_bases=b"\x78")
    part = QuantisedPart(Rung.BF16, DType.FP32, (33,), nested=(Part(66, table, table_index=7),))
    payload = encode_quantised(GRID_RAW, [part])
    assert set(decodings(payload, 132)) == {ErrorCode.TABLE_UNKNOWN}
    assert isinstance(decodings(payload, 132, {7: table})[1], bytes)
    with pytest.raises(KvwireError) as caught:
        _native.quantised_decode(payload, 132)
    assert caught.value.actual == 7


# ---- the variants

@settings(max_examples=400)
@given(chunks())
def test_variants_equal_the_reference(case):
    check_variants(*case)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("rung", [rung for rung in Rung if rung], ids=lambda rung: rung.name)
def test_shapes_of_caches(rung, dtype):
    """NHD and HND pages, states; groups along tokens and along channels; beyond a strip."""
    if rung == Rung.BF16:
        dtype = DType.FP32
    for extents, rows, columns in (((130, 192), 2, 0), ((130 * 3, 64), 1, 0),
                                   ((5, 3, 16, 64), 10, 0), ((70, 3, 96), 2, 0),
                                   ((3, 40, 50), 3, 5), ((5000,), 1, 0), ((7, 1, 4097), 4, 1),
                                   ((1, 1), 0, 0)):
        if rung == Rung.BF16:
            rows = 0
        for seed, kind in enumerate(("gauss", "denormals", "constant", "nearly constant")):
            count = int(np.prod(extents))
            raw = kinds_of_bytes(kind, count * dtype.item_bytes, dtype.item_bytes, seed)
            check_variants(raw, [QuantisedPart(rung, dtype, extents, rows,
                                               columns if rung in GRIDS else 0)])


@pytest.mark.parametrize("rung", [rung for rung in Rung if rung], ids=lambda rung: rung.name)
def test_odd_sizes(rung):
    dtype = DType.FP32 if rung == Rung.BF16 else DType.BF16
    for count in [*range(1, 140), *range(4090, 4103), 8191, 8193]:
        check_variants(gauss(count, dtype, count), [QuantisedPart(rung, dtype, (count,))])


def test_numbers_of_every_size():
    """All bf16 and fp16 numbers below 2^58, and binary32 ones that lie beside ties."""
    words = np.arange(1 << 16, dtype=np.uint32).astype("<u2")
    for dtype in (DType.BF16, DType.FP16):
        raw = words[np.abs(values_of(words.tobytes(), dtype)) < 2.0 ** 58].tobytes()
        count = len(raw) // 2
        for rung in (Rung.E4M3, Rung.INT8_GRID, Rung.INT8, Rung.INT6):
            check_variants(raw, [QuantisedPart(rung, dtype, (count,))])
            check_variants(raw, [QuantisedPart(rung, dtype, (count, 1), 1)])
    near = (words.astype(np.uint32)[:, None] << 16) + np.array([0, 1, 0x7FFF, 0x8000, 0x8001],
                                                             np.uint32)
    raw = near.ravel()[(near.ravel() & 0x7FFFFFFF) < (127 + 58) << 23].astype("<u4").tobytes()
    check_variants(raw, [QuantisedPart(Rung.BF16, DType.FP32, (len(raw) // 4,))])
    check_variants(raw, [QuantisedPart(Rung.E4M3, DType.FP32, (len(raw) // 4, 1), 1)])


@settings(max_examples=300)
@given(chunks(), st.data())
def test_variants_accept_and_refuse_what_the_reference_does(case, data):
    raw, parts = case
    payload = bytearray(encode_quantised(raw, parts))
    for _ in range(data.draw(st.integers(1, 3))):
        last = len(payload) - 1
        at = data.draw(st.integers(0, last) | st.integers(0, min(99, last)))
        payload[at] ^= 1 << data.draw(st.integers(0, 7))
    found = decodings(bytes(payload), len(raw), tables_of(parts))
    refused = [isinstance(other, ErrorCode) for other in found]
    assert all(refused) or all(other == found[0] for other in found)


@given(chunks())
def test_there_is_no_payload_without_room(case):
    raw, parts = case
    needed = len(encode_quantised(raw, parts))
    for variant in VARIANTS:
        for out_max in {0, 31, needed // 2, needed - 1}:
            assert native_encode(raw, parts, variant, out_max) is None
        # Trying a form of §9.1 may take more room than the strip needs in the end.
        assert native_encode(raw, parts, variant, needed + len(raw)) is not None


def test_a_part_that_breaks_a_rule_is_not_written():
    part = QuantisedPart(Rung.INT4, DType.BF16, (10,))
    for broken in (dataclasses.replace(part, dtype=DType.INT8),
                   dataclasses.replace(part, column_axes=1),
                   dataclasses.replace(part, extents=(11,)),
                   dataclasses.replace(part, rung=Rung.BF16)):
        with pytest.raises(KvwireError):
            native_encode(bytes(20), [broken])


@pytest.mark.parametrize("name", ["", "x86"])
def test_environment_forces_a_variant(name):
    done = subprocess.run(
        [sys.executable, "-c", "import kvwire._native"],
        env={**os.environ, "KVWIRE_QUANTISED": name}, capture_output=True, text=True)
    assert (done.returncode != 0) == (name == "x86")
    assert name == "" or "quantised variant x86" in done.stderr
    assert VARIANTS[-1] == "portable"
