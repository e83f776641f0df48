"""`python -m bench.gpu` where there is no GPU: all of it but the device's own clock."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_driver import cuda  # noqa: F401
from standin_device import StandInDevice
from triton_interpreter import torch

import kvwire
from bench import gpu, gpu_peers, gpu_staging, splitzip
from kvwire.kernels import backends
from kvwire.kernels.triton_backend import TritonBackend
from kvwire.layout import CacheSpec, attention

ROOT = Path(__file__).parent.parent


def test_rows_of_the_cpu_are_verified(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert gpu.main(["--backend", "cpu", "--mib", "1", "--pages", "4096", "--models",
                     "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["machine"]["backend"] == "cpu"
    assert [row["case"] for row in record["rows"]] == [
        f"{what}, pages" for what in ("pack", "unpack", "pack to e4m3", "crc", "encode", "decode")]
    for row in record["rows"]:
        assert row["verified"] and row["gbps"] > 0 and row["bytes"] == 1 << 20
    assert record["rows"][4]["ratio"] > 1.2


def test_rows_of_cuda_are_verified(cuda, monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    backend = backends.load("cuda")
    spec = CacheSpec("m", (attention([0], kv_heads=1, head_dim=128, block_tokens=4),))
    rows = gpu.measured(backend, gpu.Case(backend, "pages", 1024, spec, 8))
    assert [row["case"] for row in rows] == [
        f"{what}, pages" for what in ("pack", "unpack", "pack to e4m3", "crc", "encode", "decode")]
    assert all(row["verified"] for row in rows)


def test_rows_of_triton_are_verified(monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", 1)
    backend = TritonBackend("cpu")
    spec = CacheSpec("m", (attention([0], kv_heads=1, head_dim=128, block_tokens=4),))
    rows = gpu.measured(backend, gpu.Case(backend, "pages", 1024, spec, 8))
    assert "histogram, pages" in {row["case"] for row in rows}
    assert len(rows) == 7 and all(row["verified"] for row in rows)


@pytest.mark.long
@pytest.mark.parametrize("model", gpu.MODELS)
def test_states_of_the_models_are_cases(model):
    case, = gpu.cases(backends.load("cpu"), [], (), (model,))
    assert case.bytes == len(case.raw) > 1 << 20
    segment = gpu.backends.load("cpu").empty(case.bytes)
    gpu.backends.load("cpu").pack(case.plan, segment)
    assert (segment == case.raw).all()


@pytest.mark.skipif(not backends.obstacle("cuda"), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main(["--backend", "cuda"]) == 2
    assert "cannot run here" in capsys.readouterr().err


def test_staging_is_timed_and_verified():
    device = StandInDevice()
    staging = kvwire.Staging(device=device, ring_bytes=1 << 20, slice_bytes=256 << 10)
    rows = gpu_staging.rows(device, 1, 16_384, staging)
    assert [row["case"] for row in rows] == ["loopback between host buffers"] + [
        f"staging {where}, {codec}{way}" for codec in ("raw", "tiered")
        for way in ("", ", mapped") for where in ("to the host", "end to end")]
    for row in rows:
        assert row["verified"] and row["gbps"] > 0 and row["bytes"] == 1 << 20
    assert rows[1]["ratio"] == 1 and rows[5]["ratio"] == rows[7]["ratio"] > 1.2
    device.close()


def test_splitzip_is_lossless_and_escapes_cost_seven_bytes():
    raw = gpu.content(8 * splitzip.CHUNK, gpu.DType.BF16).view(np.int16).copy()
    raw[[5, 2000, 2001]] = 200 << 7, 0x7F80, -1  # exponents that no code is left for
    codes, top = map(torch.from_numpy, splitzip.calibrated(raw.view(np.uint16)[2048:]))
    coded = splitzip.encode(torch.from_numpy(raw), codes)
    assert coded.values.numel() >= 3 and coded.positions[0] == 5
    assert coded.bytes == 3 * raw.size // 2 + 7 * coded.values.numel()
    decoded = torch.empty(raw.size, dtype=torch.int16)
    splitzip.decode(coded, top, decoded)
    assert (decoded.numpy() == raw).all()


@pytest.mark.long
def test_peers_are_verified(monkeypatch):
    monkeypatch.setattr(gpu_peers, "ROUNDS", 1)
    rows = gpu_peers.rows(torch, "cpu", 64 << 10, 16_384)
    assert all(row["verified"] for row in rows) and len(rows) == 4


@pytest.mark.parametrize("module", [gpu_staging, gpu_peers])
@pytest.mark.skipif(not backends.obstacle("cuda"), reason="there is a GPU")
def test_staging_and_peers_say_that_there_is_no_gpu(module, capsys):
    assert module.main([]) == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("module", ["bench.gpu_staging", "bench.gpu_peers"])
def test_staging_and_peers_on_the_gpu(module, tmp_path):
    subprocess.run([sys.executable, "-m", module, "--mib", "16", "--json", tmp_path / "rows"],
                   check=True, cwd=ROOT)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_every_kernel_on_the_gpu(name, tmp_path):
    subprocess.run([sys.executable, "-m", "bench.gpu", "--backend", name, "--mib", "16",
                    "--json", tmp_path / "rows"], check=True, cwd=ROOT)
