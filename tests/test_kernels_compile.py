"""Every kernel compiles for sm_80 and sm_90 without a GPU, and the report in the tree is whole."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvwire.kernels

KERNELS = Path(kvwire.kernels.__file__).parent
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def run(*args):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(args, env=environment, check=True, capture_output=True, text=True)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("only", ["copy", "crc", "layout", "histogram", "narrow"])
def test_triton_kernels_compile_without_spills(tmp_path, only):
    pytest.importorskip("triton")
    pytest.importorskip("torch")
    run(sys.executable, "-m", "kvwire.kernels.aot", "--only", only, "--json", tmp_path / "rows")
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert not any(row["spill_bytes"] for row in rows)
    kept = json.loads((KERNELS / "aot-report.json").read_text())["rows"]

    def names(rows):
        return {(row["kernel"], row["variant"], row["arch"]) for row in rows}
    assert names(rows) == {name for name in names(kept) if only in name[0]}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_cuda_sources_compile_without_warnings_and_spill_little(tmp_path):
    said = run(NVCC, "--options-file", KERNELS / "cuda" / "nvcc.options", "-Xptxas=-v",
               KERNELS / "cuda" / "kvwire.cu", "-o", tmp_path / "kvwire.fatbin").stderr
    spills = re.findall(r"entry function '(\w+)'.*?(\d+) bytes spill stores, "
                        r"(\d+) bytes spill loads", said, re.DOTALL)
    assert len(spills) == 2 * 17
    for kernel, stored, loaded in spills:  # the encoder's: a loop's state, once a strip
        assert max(int(stored), int(loaded)) <= (128 if kernel == "kvwire_encode" else 0), kernel


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_the_build_made_a_fatbin():
    if os.environ.get("KVWIRE_CUDA") == "0":
        pytest.skip("KVWIRE_CUDA=0")
    assert (KERNELS / "cuda" / "kvwire.fatbin").stat().st_size > 0
