"""Compiles the benchmark's C++ into .build/bench, once per state of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["ROOT", "BuildError", "compiler", "library", "program", "standalone"]

ROOT = Path(__file__).parent.parent
_BUILD = ROOT / ".build" / "bench"
_FLAGS = ["-std=c++17", "-O3", "-g", "-Wall", "-Wextra", "-pthread", "-I", str(ROOT / "csrc")]


class BuildError(Exception):
    """The C++ half of a benchmark cannot be built here; says what to do."""


def compiler() -> str:
    """Return the C++ compiler's command. Raises BuildError where there is none."""
    command = os.environ.get("CXX", "g++").split()[0]
    if shutil.which(command) is None:
        raise BuildError(f"{command} is missing; on Debian: apt-get install g++")
    return command


def library(source: Path) -> Path:
    """Return `source` as a shared library."""
    return _built(source.stem + ".so", [source], [], ["-shared", "-fPIC", str(source)])


def program(source: Path) -> Path:
    """Return `source` linked with all of csrc but the Python binding."""
    core = sorted(p for p in (ROOT / "csrc").rglob("*.cpp")
                  if p.relative_to(ROOT / "csrc").parts[0] not in ("bind", "fuzz", "tests"))
    headers = sorted((ROOT / "csrc").rglob("*.hpp"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda path: _object(path, headers), [source, *core]))
    return _built(source.stem, objects, [], [*map(str, objects), "-ldl"])


def standalone(source: Path) -> Path:
    """Return `source`, which needs only itself and the headers beside it, as a program."""
    return _built(source.stem, [source], sorted(source.parent.glob("*.hpp")), [str(source)])


def _object(source: Path, headers: list[Path]) -> Path:
    name = "-".join(source.relative_to(ROOT).with_suffix(".o").parts)
    return _built(name, [source], headers, ["-c", str(source)])


def _built(name: str, inputs: list[Path], headers: list[Path], arguments: list[str]) -> Path:
    command = [compiler(), *_FLAGS, *arguments]
    state = hashlib.sha256("\n".join(command).encode())
    for path in [*inputs, *headers]:
        state.update(path.read_bytes())
    target, stamp = _BUILD / name, _BUILD / f"{name}.sha256"
    if target.exists() and stamp.exists() and stamp.read_text() == state.hexdigest():
        return target
    _BUILD.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr}")
    stamp.write_text(state.hexdigest())
    return target
