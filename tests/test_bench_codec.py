"""The codec benchmark measures what it says, and fails when a bit differs or the code grows."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from bench import codec as bench_codec  # noqa: E402
from bench import beside, chunk_trace, codecs, kv_sample, tensors, workloads  # noqa: E402
from bench.measure import Unable  # noqa: E402
from kvwire import _native  # noqa: E402
from kvwire.tensor_spec import DType  # noqa: E402
from kvwire.tiered import CodeTable  # noqa: E402

KEYS = ["tensor", "codec", "level", "ratio", "encode_gbps", "decode_gbps", "memcpy_gbps",
        "threads", "bit_exact"]
LEVEL = codecs.Level("memory", 300_000, 1, 1)


@pytest.fixture
def folder(tmp_path):
    """Keys whose channels differ in scale, [layer, token, head, dim], and a state."""
    rng = np.random.default_rng(3)
    keys = rng.standard_normal((2, 256, 2, 64), np.float32) * np.exp2(rng.integers(-6, 6, (2, 64)))
    np.save(tmp_path / "made_k_bf16.npy", (keys.astype(np.float32).view(np.uint32) >> 16)
            .astype(np.uint16))
    np.save(tmp_path / "made_state_fp32.npy", rng.standard_normal((4, 64, 64), np.float32))
    return tmp_path


def test_rows_have_the_agreed_shape_and_every_codec_is_exact(folder, tmp_path):
    file = tmp_path / "rows.json"
    done = subprocess.run([sys.executable, "-m", "bench.codec", "--quick", "--data", str(folder),
                           "--json", str(file)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    first, *rows = json.loads(file.read_text())
    assert first["machine"]["cores"] >= 1 and first["machine"]["versions"]["kvwire"]
    assert first["machine"]["tiered"] == _native.tiered_active()
    assert all(list(row) == KEYS and row["bit_exact"] is True for row in rows)
    assert all(row["encode_gbps"] > 0 and row["decode_gbps"] > 0 and row["memcpy_gbps"] > 0
               for row in rows)
    own = {row["tensor"]: row for row in rows if row["codec"] == "tiered"
           and row["level"] == "memory"}
    assert own["made_k_bf16"]["ratio"] > 1.4 and own["made_state_fp32"]["ratio"] > 1.15
    assert {"random_bits", "nans", "denormals", "constant"} == {
        name.removeprefix("worst_").rpartition("_")[0] for name in own if "worst" in name}
    assert min(row["ratio"] for row in own.values()) > 0.998
    assert {"tiered", "memcpy", "lz4"} <= {row["codec"] for row in rows}
    assert all(name in done.stdout for name in (*own, "all KV in bf16", "all states in fp32"))


class Broken(codecs.Memcpy):
    """Decodes to other bits, or grows, by a little."""

    def __init__(self, **changes):
        self._changes = changes

    def measure(self, tensor, level):
        return replace(super().measure(tensor, level), **self._changes)


@pytest.mark.parametrize("changes, said", [({"bit_exact": False}, "OTHER BITS"),
                                           ({"coded_bytes": 1e9}, "MORE THAN RAW")])
def test_a_broken_codec_fails_the_run(folder, tmp_path, monkeypatch, capsys, changes, said):
    monkeypatch.setattr(codecs, "installed", lambda *_: {"tiered": Broken(**changes)})
    file = tmp_path / "rows.json"
    given = ["--quick", "--data", str(folder), "--json", str(file)]
    assert bench_codec.main(given) == 1
    assert said in capsys.readouterr().err
    row = json.loads(file.read_text())[1]
    assert row["bit_exact"] is changes.get("bit_exact", True)
    assert (row["encode_gbps"] is None) == (row["bit_exact"] is False)


@pytest.mark.parametrize("spoil, exact", [(bytes, True), (lambda data: data[:-1] + b"x", False),
                                          (lambda data: data[:-1], False)])
def test_what_another_codec_returns_is_compared(folder, spoil, exact):
    codec = codecs.Other("json", "none", lambda dtype: (bytes, spoil))
    result = codec.measure(tensors.load(folder)[0], LEVEL)
    assert result.bit_exact is exact and result.ratio == pytest.approx(1)


def test_a_codec_without_the_type_has_no_row(folder):
    def make(dtype):
        raise Unable("no such type")

    subjects = {"some": codecs.Other("json", "none", make), "memcpy": codecs.Memcpy()}
    results = bench_codec.measure(tensors.load(folder)[0], subjects, (LEVEL,))
    assert list(results) == [("memcpy", "memory")]


@pytest.mark.parametrize("variant", _native.tiered_variants())
def test_each_variant_is_measured_by_name(folder, variant):
    for tensor in tensors.load(folder):
        result = codecs.Tiered(variant).measure(tensor, LEVEL)
        assert result.bit_exact and result.raw_bytes == tensor.bits.nbytes
        assert result.table_bytes > 48 and result.ratio > 1.1


def test_a_ratio_counts_the_tables_and_sums_count_bytes():
    one = codecs.Result(1000, 400, 100, 1e-6, 2e-6, 1e-6, True)
    assert one.ratio == 2 and one.gbps(one.encode_s) == 1
    both = one + codecs.Result(1000, 1400, 100, 1e-6, 2e-6, 1e-6, False)
    assert both.ratio == 1 and both.gbps(both.decode_s) == 0.5 and not both.bit_exact


def test_tables_follow_channels_and_the_rows_and_columns_of_states():
    rng = np.random.default_rng(6)
    spread = np.exp2(rng.integers(-6, 6, (2, 4, 64)))
    keys = rng.standard_normal((512, 4, 64)) * spread[0]
    state = rng.standard_normal((4, 64, 64)) * spread[0][:, :, None] * spread[1][:, None, :]
    for array, axes, period in ((keys, (0b110, 0), 256), (state, (0b011, 0b101), state.size)):
        bits = array.astype(np.float32).view(np.uint32)
        table, _ = CodeTable.decode(codecs.code_table(DType.FP32, bits))
        assert (table.row_axes >> 1, table.column_axes >> 1, table.period) == (*axes, period)


def test_files_are_known_by_what_they_hold_or_by_their_names(tmp_path, capsys):
    files = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float16),
             "c_bf16": np.ones(3, np.uint16), "d_e4m3": np.ones(3, np.uint8),
             "e_E5M2": np.ones(3, np.uint8), "x_bf16": np.ones(3, np.uint8),
             "y": np.ones(3, np.uint16), "z": np.ones(3), "empty": np.ones(0, np.float32)}
    for name, array in files.items():
        np.save(tmp_path / f"{name}.npy", array)
    assert {tensor.name: tensor.dtype for tensor in tensors.load(tmp_path)} == {
        "a": DType.FP32, "b": DType.FP16, "c_bf16": DType.BF16, "d_e4m3": DType.E4M3,
        "e_E5M2": DType.E5M2}
    said = capsys.readouterr().err
    assert all(f"{name}.npy" in said for name in ("x_bf16", "y", "z", "empty"))


def test_a_folder_without_tensors_is_refused(tmp_path):
    assert bench_codec.main(["--data", str(tmp_path)]) == 2


def test_views_are_the_same_values_rounded():
    pytest.importorskip("torch")
    values = np.array([1.0, -2.5, 1e9, 0.0], np.float32).reshape(1, 1, 1, 4)
    keys = tensors.Tensor("k_bf16", DType.BF16, (values.view(np.uint32) >> 16).astype(np.uint16))
    fp16, e4m3, e5m2 = tensors.views(keys)
    assert [view.name for view in (fp16, e4m3, e5m2)] == ["k_fp16", "k_e4m3", "k_e5m2"]
    assert fp16.bits.view(np.float16).ravel().tolist() == [1.0, -2.5, 65504.0, 0.0]
    assert e4m3.bits.ravel().tolist() == [0x38, 0xC2, 0x7E, 0x00]
    assert e5m2.bits.ravel().tolist() == [0x3C, 0xC1, 0x7B, 0x00]
    state, = tensors.views(tensors.Tensor("s_fp32", DType.FP32, values.view(np.uint32)))
    assert (state.name, state.bits.ravel().tolist()[:2]) == ("s_bf16", [0x3F80, 0xC020])


def test_worst_cases_are_what_they_are_called():
    cases = {tensor.name: tensor for tensor in tensors.worst_cases()}
    assert len(cases) == 20
    floats = {name: cases[f"worst_{name}_fp32"].bits.view(np.float32)
              for name in ("nans", "denormals", "constant")}
    assert np.isnan(floats["nans"]).all() and (floats["constant"] == 1).all()
    tiny = np.abs(floats["denormals"])
    assert tiny.max() < np.finfo(np.float32).tiny and (tiny > 0).mean() > 0.99


def test_a_link_carries_the_sample_in_the_order_of_its_tokens(tmp_path, monkeypatch):
    sample = np.random.default_rng(7).integers(0, 1 << 16, (2, 2, 40, 3, 64), np.uint16)
    np.save(tmp_path / kv_sample.KEYS, sample[0])
    np.save(tmp_path / kv_sample.VALUES, sample[1])
    monkeypatch.setattr(kv_sample, "make", lambda: tmp_path)
    workload = workloads.make(workloads.KV, shrink=64)
    pool = workloads.source_pool(workloads.KV, workload)
    blocks = [pool[start:start + count].view(np.uint16)
              for start, _, count in workload.moves.tolist()]
    stream = np.concatenate(blocks).reshape(30, 2, workload.tokens, 3, 64)
    for layer, which, token in ((0, 0, 0), (1, 1, 39), (3, 0, 41), (29, 1, workload.tokens - 1)):
        assert (stream[layer, which, token] == sample[which, layer % 2, token % 40]).all()


@pytest.mark.long
def test_the_sample_is_made_once_and_is_real(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(kv_sample, "_FOLDER", tmp_path)
    folder = kv_sample.make()
    keys, values = (np.load(folder / name) for name in (kv_sample.KEYS, kv_sample.VALUES))
    assert keys.shape == values.shape == (len(kv_sample.LAYERS), 1024, 3, 64)
    halves = np.load(folder / "smollm2_k_fp16.npy").astype(np.float32)
    wide = (keys.astype(np.uint32) << 16).view(np.float32)
    assert np.abs(wide - halves).max() <= 0.01 * np.abs(halves).max()
    for name in ("gdn", "kda", "mamba2"):
        state = np.load(folder / f"state_synthetic_{name}_fp32.npy")
        assert state.dtype == np.float32 and state.size == 131072 and np.isfinite(state).all()
        assert (state != 0).mean() > 0.99
    made = folder.stat().st_mtime_ns
    assert kv_sample.make() == folder and folder.stat().st_mtime_ns == made


def test_tables_of_first_tokens_and_of_another_model(folder, tmp_path):
    """Of the sampled layer tables are best, and another model's are worst."""
    other = tmp_path / "other"
    other.mkdir()
    rng = np.random.default_rng(5)
    keys = rng.standard_normal((3, 128, 4, 32), np.float32) * np.exp2(rng.integers(-6, 6, (4, 32)))
    np.save(other / "another_k_bf16.npy", (keys.astype(np.float32).view(np.uint32) >> 16)
            .astype(np.uint16))
    ratios = {}
    for tables in ("own", "first", str(other)):
        chosen = bench_codec.with_tables(tensors.load(folder), tables)
        result = codecs.Tiered(None).measure(chosen[0], LEVEL)
        assert result.bit_exact and chosen[0].name == "made_k_bf16"
        ratios[tables] = result.ratio
        assert len(chosen) == (1 if tables == str(other) else 2)  # it has no state
    assert ratios["own"] >= 0.999 * ratios["first"] > 1.2 * ratios[str(other)]


def test_a_model_file_that_is_none_is_refused(tmp_path, capsys):
    assert kv_sample.main(["--gguf", str(tmp_path / "none.gguf")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, it says")
    assert kv_sample.main(["--gguf", str(tmp_path / "bad.gguf")]) == 2
    assert "transformers cannot load" in capsys.readouterr().err


def test_split_send_saves_the_coding_of_one_chunk_at_most():
    heading, *rows = chunk_trace.lines(50e-6, 40e-6, 1.5)
    assert "saved at most" in heading and len(rows) == 3
    encode, wire, decode, all_, saved = (float(word) for word in rows[0].split()[2:7])
    assert (encode, decode, saved) == (50, 40, 50) and all_ == pytest.approx(90 + wire, abs=1)
    assert wire == pytest.approx((256 << 10) / 1.5 * 8 / (1e9 * 1448 / 1538) * 1e6, rel=0.01)


def test_scalar_work_is_timed_after_and_beside_coding(tmp_path):
    file = tmp_path / "rows.json"
    assert beside.main(["--rounds", "8", "--json", str(file)]) == 0
    first, *rows = json.loads(file.read_text())
    assert first["machine"]["cores"] >= 1
    assert {row["coder"] for row in rows} == {"memcpy", *_native.tiered_variants()}
    assert all(row["speed"] == 1 for row in rows if row["coder"] == "memcpy")
    assert all(row["speed"] > 0 for row in rows)
