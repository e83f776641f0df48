"""The C++ tests under the address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUILD_AND_RUN_SECONDS_MAX = 900


def missing_tool(directory):
    """What `make cpp-test` lacks here, or ''."""
    compiler = os.environ.get("CXX", "g++").split()
    for tool in ("make", compiler[0]):
        if shutil.which(tool) is None:
            return tool
    probe = directory / "probe.cpp"
    probe.write_text("int main() {}")
    command = [*compiler, "-fsanitize=address,undefined", str(probe), "-o", str(probe) + ".out"]
    linked = subprocess.run(command, capture_output=True).returncode == 0
    return "" if linked else f"{compiler[0]}'s sanitizer libraries"


@pytest.mark.timeout(BUILD_AND_RUN_SECONDS_MAX)
def test_cpp_tests_pass_under_sanitizers(tmp_path):
    if missing := missing_tool(tmp_path):
        pytest.skip(f"needs {missing}")
    done = subprocess.run(
        ["make", "--no-print-directory", "cpp-test"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed, 0 failed" in done.stdout
