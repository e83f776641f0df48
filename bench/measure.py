"""Rounds, statistics and provenance: how numbers are taken, whatever is measured."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench import bare, build

__all__ = ["Sample", "Series", "Unable", "alternate", "machine", "percentile", "progress"]

_PROGRESS_INTERVAL_S = 5.0
_progress_at = 0.0


class Unable(Exception):
    """A system cannot run a case; says why."""


@dataclass(frozen=True)
class Sample:
    """One timed run.

    Attributes:
        cpu_s: CPU seconds of sender and receiver together.
        verified: every byte of the destination is as it must be; None: nothing to check.
    """

    seconds: float
    cpu_s: float
    payload_bytes: int
    verified: bool | None

    @property
    def gbps(self) -> float:
        """10^9 bytes per second."""
        return self.payload_bytes / self.seconds / 1e9


@dataclass
class Series:
    """The runs of one system in one case."""

    case: str
    system: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def verified(self) -> bool | None:
        """False when any run was wrong, None when there was nothing to check."""
        verdicts = {sample.verified for sample in self.samples}
        return False if False in verdicts else True if True in verdicts else None

    def row(self) -> dict[str, object]:
        """Return the JSON row; no figure where a run was not verified."""
        rates = [sample.gbps for sample in self.samples]
        cpu = statistics.median(s.cpu_s / s.payload_bytes * 2**30 for s in self.samples)
        figures = {"gbps_median": round(statistics.median(rates), 3),
                   "gbps_min": round(min(rates), 3), "gbps_max": round(max(rates), 3),
                   "runs": len(rates), "cpu_s_per_gib": round(cpu, 3)}
        if self.verified is False:
            figures = dict.fromkeys(figures) | {"runs": len(rates)}
        return {"case": self.case, "system": self.system, **figures,
                "verified": self.verified}


def alternate(case: str, systems: dict[str, Callable[[int], Sample]], rounds: int) -> list[Series]:
    """Run each system once per round, A B C .. A B C ..; the first round is a warm-up.

    A system that raises Unable is left out from there on, and of what is returned.
    """
    series = {name: Series(case, name) for name in systems}
    for round_number in range(rounds + 1):
        for position, (name, run) in enumerate(systems.items()):
            if name not in series:
                continue
            progress(f"{case}: round {round_number}/{rounds}, {name}")
            try:
                sample = run(round_number * len(systems) + position + 1)
            except Unable as why:
                progress("")
                print(f"{name}: no row in {case}: {why}", file=sys.stderr)
                del series[name]
                continue
            if round_number > 0 or sample.verified is False:
                series[name].samples.append(sample)
    progress("")
    return list(series.values())


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def progress(text: str) -> None:
    """Show one line on stderr: in place on a terminal, else now and then."""
    global _progress_at
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
    elif text and time.monotonic() >= _progress_at:
        sys.stderr.write(text + "\n")
        _progress_at = time.monotonic() + _PROGRESS_INTERVAL_S
    sys.stderr.flush()


def machine(more_versions: dict[str, str] | None = None) -> dict[str, object]:
    """Return what a figure needs to be believed: the machine, the compiler, the versions."""
    import kvwire
    from kvwire import _native
    info = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in info.splitlines()
              if line.startswith("model name")]
    versions = {name: _version(name) for name in ("numpy", "lz4")}
    try:
        versions["iperf3"] = bare.iperf3_version()
    except bare.Iperf3Missing:
        pass
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "busy_cores_before": round(_busy_cores(), 2),
        "kernel": platform.release(),
        "compiler": _first_line(build.compiler(), "--version"),
        "python": platform.python_version(),
        "kvwire_commit": _commit(),
        "crc32c": _native.crc32c_active(),
        "versions": {"kvwire": kvwire.__version__, **versions, **(more_versions or {})},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _busy_cores(interval_s: float = 1.0) -> float:
    """Return how many cores other processes kept busy over the next moment."""
    def idle_s() -> float:
        fields = Path("/proc/stat").read_text().split(maxsplit=6)
        return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")  # idle and iowait

    began, idle = time.monotonic(), idle_s()
    time.sleep(interval_s)
    passed = time.monotonic() - began
    return max(0.0, os.cpu_count() - (idle_s() - idle) / passed)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=build.ROOT)
    return done.stdout.partition("\n")[0]


def _commit() -> str:
    """Return the commit, with "+" when the sources differ from it."""
    changed = _first_line("git", "status", "--porcelain", "--", "csrc", "kvwire", "bench/*.*")
    return _first_line("git", "rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
