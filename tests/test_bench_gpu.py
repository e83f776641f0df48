"""`python -m bench.gpu` where there is no GPU: all of it but the device's own clock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu
from kvwire.kernels import backends

ROOT = Path(__file__).parent.parent


def test_rows_of_the_cpu_are_verified(tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert gpu.main(["--backend", "cpu", "--mib", "1", "--pages", "4096", "--models",
                     "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["machine"]["backend"] == "cpu"
    assert [row["case"] for row in record["rows"]] == [
        f"{what}, pages" for what in ("pack", "unpack", "crc", "encode", "decode")]
    for row in record["rows"]:
        assert row["verified"] and row["gbps"] > 0 and row["bytes"] == 1 << 20
    assert record["rows"][3]["ratio"] > 1.2


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


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_every_kernel_on_the_gpu(name, tmp_path):
    subprocess.run([sys.executable, "-m", "bench.gpu", "--backend", name, "--mib", "16",
                    "--json", tmp_path / "rows"], check=True, cwd=ROOT)
