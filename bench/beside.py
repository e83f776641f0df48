"""``python -m bench.beside``: whether coding with wide vectors slows the scalar work around it.

A core that runs wide vectors may lower its clock, for itself and for what shares it, and raise it
late. So scalar work is timed (by the CPU time of its thread) right after a chunk was coded there
and back on the same core, and while another core codes chunk after chunk; with each variant of the
kernels, and with memcpy in place of coding.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from bench.codecs import CHUNK_BYTES, code_table
from bench.measure import machine
from kvwire import _native
from kvwire.tensor_spec import DType

__all__ = ["main", "measure"]

COPY = "memcpy"
ROUNDS = 400
_TURNS = 4
_SCALAR_STEPS = 4000  # 0.3 ms: less than a core that has slowed down takes to recover
_WARM_UP_S = 0.3  # of the other core's process
_CODE_PASSES = 64


def coder(subject: str, passes: int = 1) -> Callable[[], object]:
    """Return what codes a chunk of Gaussian bf16 there and back, or copies it."""
    values = np.random.default_rng(1).standard_normal(CHUNK_BYTES // 2, np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16)
    if subject == COPY:
        return partial(np.copyto, np.empty_like(raw), raw)
    return partial(_native.tiered_bench, raw, code_table(DType.BF16, raw), CHUNK_BYTES, passes, 1,
                   subject)


def scalar_s() -> float:
    """Return the CPU seconds of integer arithmetic of which each step waits for the last."""
    began = time.thread_time_ns()
    value = 1
    for _ in range(_SCALAR_STEPS):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    return (time.thread_time_ns() - began) / 1e9


def after(subjects: Sequence[str], rounds: int) -> dict[str, float]:
    """Return the median seconds of the scalar work behind a chunk, subjects in turn."""
    coders = {subject: coder(subject) for subject in subjects}
    times: dict[str, list[float]] = {subject: [] for subject in subjects}
    for _ in range(rounds):
        for subject, code in coders.items():
            code()
            times[subject].append(scalar_s())
    return {subject: statistics.median(each) for subject, each in times.items()}


def beside(subjects: Sequence[str], rounds: int) -> dict[str, float]:
    """Return the median seconds of the scalar work while the other core codes, in turn."""
    allowed = os.sched_getaffinity(0)
    here, there = sorted(allowed)[:2]
    times: dict[str, list[float]] = {subject: [] for subject in subjects}
    os.sched_setaffinity(0, {here})
    try:
        for subject in [*subjects] * _TURNS:
            other = subprocess.Popen([sys.executable, "-m", "bench.beside", "--code", subject,
                                      "--core", str(there)], stdout=subprocess.PIPE)
            other.stdout.readline()  # it has begun
            time.sleep(_WARM_UP_S)
            times[subject] += [scalar_s() for _ in range(rounds // _TURNS)]
            other.send_signal(signal.SIGKILL)
            other.wait()
            other.stdout.close()
    finally:
        os.sched_setaffinity(0, allowed)
    return {subject: statistics.median(each) for subject, each in times.items()}


def measure(rounds: int) -> list[dict[str, object]]:
    """Return rows: the scalar work's speed as a share of what it is with memcpy."""
    subjects = [COPY, *_native.tiered_variants()]
    places = {"same core, after": after}
    if len(os.sched_getaffinity(0)) > 1:
        places["other core, beside"] = beside
    rows = []
    for place, timed in places.items():
        seconds = timed(subjects, rounds)
        rows += [{"scalar_work": place, "coder": subject,
                  "speed": round(seconds[COPY] / seconds[subject], 4)} for subject in subjects]
    return rows


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.beside",
                                     description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--code", help=argparse.SUPPRESS)  # for ever, on a core
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.code:
        os.sched_setaffinity(0, {options.core})
        code = coder(options.code, _CODE_PASSES)
        print("begun", flush=True)
        while True:
            code()
    rows = measure(options.rounds)
    for row in rows:
        print(f"{row['scalar_work']:20}{row['coder']:10}{row['speed']:8.3f}")
    if options.json:
        records = [{"machine": machine()}, *rows]
        options.json.write_text(
            "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
