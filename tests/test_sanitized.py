"""The C++ tests under the address, undefined-behaviour and thread sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD_AND_RUN_SECONDS_MAX = 900


def missing_tool(directory, sanitizers, compiler=None):
    """What a build with these sanitizers lacks here, or ''."""
    compiler = (compiler or os.environ.get("CXX", "g++")).split()
    for tool in ("make", compiler[0]):
        if shutil.which(tool) is None:
            return tool
    probe = directory / "probe.cpp"
    probe.write_text("int main() {}")
    command = [*compiler, f"-fsanitize={sanitizers}", str(probe), "-o", str(probe) + ".out"]
    linked = subprocess.run(command, capture_output=True).returncode == 0
    return "" if linked else f"{compiler[0]}'s sanitizer libraries"


def run_target(target, sanitizers, directory):
    if missing := missing_tool(directory, sanitizers):
        pytest.skip(f"needs {missing}")
    done = subprocess.run(
        ["make", "--no-print-directory", target], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed, 0 failed" in done.stdout


@pytest.mark.long
@pytest.mark.timeout(BUILD_AND_RUN_SECONDS_MAX)
def test_cpp_tests_pass_under_sanitizers(tmp_path):
    run_target("cpp-test", "address,undefined", tmp_path)


@pytest.mark.long
@pytest.mark.timeout(BUILD_AND_RUN_SECONDS_MAX)
def test_transport_has_no_data_race(tmp_path):
    run_target("tsan-test", "thread", tmp_path)
