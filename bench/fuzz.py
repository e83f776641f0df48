"""``python -m bench.fuzz``: runs the fuzz targets by turns, and adds up what they ran."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import fuzz_files
from bench.build import ROOT

__all__ = ["TARGETS", "main"]

BUILD = ROOT / ".build" / "fuzz"
VECTORS = ROOT / "tests" / "vectors"
REGRESSIONS = ROOT / "tests" / "fuzz-regressions"
TURN_SECONDS_MAX = 60
GREETING_BYTES = HEADER_BYTES = 64
CHUNK, MANIFEST = 4, 1
LITERAL_MANIFEST = 12  # first byte of that target's input: the bytes that follow, as they are
TIMEOUT_SECONDS = 120  # by the clock, and other work may hold the processor
RUN_OPTIONS = ["-print_final_stats=1", "-entropic=0", "-rss_limit_mb=1024", "-malloc_limit_mb=16",
               f"-timeout={TIMEOUT_SECONDS}", f"-report_slow_units={TIMEOUT_SECONDS}"]
SANITIZERS = {"ASAN_OPTIONS": "malloc_context_size=4:quarantine_size_mb=8",
              "UBSAN_OPTIONS": "print_stacktrace=1"}


@dataclass(frozen=True)
class Target:
    """A libFuzzer program: `share` of the time, inputs of at most `input_bytes_max`."""

    share: int
    input_bytes_max: int


TARGETS = {
    "greeting": Target(4, 80),
    "admission": Target(2, 256),
    "frames": Target(4, 4096),
    "control": Target(6, 2048),
    "manifest": Target(3, 1024),
    "plan": Target(3, 256),
    "codec": Target(6, 4096),
    "tiered": Target(6, 2048),
    "quantised": Target(3, 4096),
    "receive": Target(7, 512),
    "send": Target(7, 512),
}
FILES = "file"
FILES_SHARE = 2


def frames(stream: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (header, payload) of each frame of a stream or file, as far as they are whole."""
    at = GREETING_BYTES
    while at + HEADER_BYTES <= len(stream):
        header = stream[at:at + HEADER_BYTES]
        at += HEADER_BYTES
        payload_bytes = int.from_bytes(header[4:8], "little")
        yield header, stream[at:at + payload_bytes]
        at += payload_bytes


def seeds(stream: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (target, input) for all that a golden vector has to say."""
    yield "greeting", bytes([0]) + stream[:GREETING_BYTES]
    yield "frames", bytes([1, 255, 63, 0, 100, 7, 206, 64, 1]) + stream[GREETING_BYTES:]
    for header, payload in frames(stream):
        kind = header[2]
        if kind == CHUNK:
            raw_bytes = int.from_bytes(header[40:42], "little").to_bytes(2, "little")
            yield "codec", bytes([1, header[56]]) + raw_bytes + payload
        else:
            yield "control", bytes([kind if kind < 16 else 16 + kind % 2]) + payload
        if kind == MANIFEST:
            yield "manifest", bytes([LITERAL_MANIFEST]) + payload


def conversations() -> Iterator[tuple[str, bytes]]:
    """Yield (target, input) for hand-offs that succeed, as the two machines' targets decode them:
    by chance they would be found late."""
    for kind in range(6):  # raw, LZ4, in blocks, tiered, rounded, rounded and in blocks
        for lanes in (1, 2):
            said = [byte for turn in range(60) for byte in (turn % lanes, 13, 1, 1)]
            yield "receive", bytes([kind, 0, 0, 1, 0, 0, 2, kind % 2, 0, 3, 0, *said])
    segment_receipt, done = [0, 0, 1], [0, 0, 5]
    for codec, blocks, chunk in ((0, 0, 0), (1, 0, 1), (0, 1, 0), (2, 0, 0), (3, 0, 0), (3, 1, 1)):
        grant = [0, 0, 0, 3, max(1, codec)]
        answers = [[0, 0, 11, *answer, 1, 1] for answer in (grant, segment_receipt, done)]
        written = [0, 0, 7, 6] * 24
        yield "send", bytes([codec, blocks, chunk, 0, 0, 0, 0, 0, 2, 0, 0, 3, 3, 0, 0, 0, 5,
                             *answers[0], *written, *answers[1], *written, *answers[2]])


def write_corpora() -> None:
    for number, (target, data) in enumerate(conversations()):
        folder = BUILD / "corpus" / target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"conversation-{number}").write_bytes(data)
    for name in TARGETS:
        (BUILD / "corpus" / name).mkdir(parents=True, exist_ok=True)
    for path in sorted(VECTORS.glob("*valid/*.bin")):
        for number, (target, data) in enumerate(seeds(path.read_bytes())):
            (BUILD / "corpus" / target / f"{path.stem}-{number}").write_bytes(
                data[:TARGETS[target].input_bytes_max])


@dataclass
class Turn:
    executions: int
    seconds: float
    findings: list[str]


def run_target(name: str, seconds: float) -> Turn:
    """Run one libFuzzer program; what it found lies in .build/fuzz/findings."""
    findings = BUILD / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    before = set(findings.iterdir())
    start = time.monotonic()
    done = subprocess.run(
        [BUILD / name, *RUN_OPTIONS, f"-max_len={TARGETS[name].input_bytes_max}",
         f"-max_total_time={max(1, round(seconds))}", f"-artifact_prefix={findings}/{name}-",
         BUILD / "corpus" / name],
        env={**os.environ, **SANITIZERS}, capture_output=True, text=True, errors="replace")
    stated = re.search(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    new = sorted(path.name for path in set(findings.iterdir()) - before)
    if done.returncode or new:
        new = new or [f"{name}: exit status {done.returncode}"]
        (findings / f"{new[0]}.log").write_text(done.stderr[-20000:])
    return Turn(int(stated[1]) if stated else 0, time.monotonic() - start, new)


def run_files(seconds: float, seed: int) -> Turn:
    start = time.monotonic()
    executions, findings = fuzz_files.run(seconds, seed)
    return Turn(executions, time.monotonic() - start, findings)


def replay(name: str) -> list[str]:
    """Run a target's regressions once more; returns those that fail again."""
    failed = []
    for path in sorted((REGRESSIONS / name).glob("*")):
        done = subprocess.run([BUILD / name, *RUN_OPTIONS, path],
                              env={**os.environ, **SANITIZERS}, capture_output=True)
        if done.returncode:
            failed.append(str(path.relative_to(ROOT)))
    return failed


class Totals:
    """What ran so far, kept in a file from run to run."""

    def __init__(self, path: Path):
        self._path = path
        self.rows = json.loads(path.read_text())["targets"] if path.exists() else {}

    def add(self, name: str, turn: Turn) -> None:
        row = self.rows.setdefault(name, {"executions": 0, "seconds": 0, "findings": []})
        row["executions"] += turn.executions
        row["seconds"] = round(row["seconds"] + turn.seconds, 1)
        row["findings"] += turn.findings
        total = sum(row["executions"] for row in self.rows.values())
        self._path.write_text(json.dumps(
            {"commit": commit(), "executions": total, "targets": self.rows}, indent=1) + "\n")


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                          capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def turns(names: list[str], seconds: float) -> Iterator[tuple[str, float]]:
    """Yield (target, seconds) until the time is used, each target by its share of it."""
    shares = {name: FILES_SHARE if name == FILES else TARGETS[name].share for name in names}
    round_seconds = min(seconds, TURN_SECONDS_MAX * sum(shares.values()) / max(shares.values()))
    stop = time.monotonic() + seconds
    while True:
        for name, share in shares.items():
            yield name, round_seconds * share / sum(shares.values())
        if time.monotonic() + round_seconds / 2 > stop:
            return


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600, help="in all (3600)")
    parser.add_argument("--targets", default=",".join([*TARGETS, FILES]),
                        help="some of: %(default)s")
    parser.add_argument("--json", type=Path, default=BUILD / "totals.json",
                        help="where totals are added up (.build/fuzz/totals.json)")
    options = parser.parse_args(arguments)
    names = options.targets.split(",")
    if unknown := set(names) - {*TARGETS, FILES}:
        parser.error(f"unknown targets: {', '.join(sorted(unknown))}")
    os.nice(19)
    write_corpora()
    findings = [again for name in names for again in replay(name)]
    totals = Totals(options.json)
    for number, (name, seconds) in enumerate(turns(names, options.seconds)):
        seed = time.time_ns() + number
        turn = run_files(seconds, seed) if name == FILES else run_target(name, seconds)
        totals.add(name, turn)
        findings += turn.findings
        print(f"{name}: {turn.executions} executions in {turn.seconds:.0f} s", *turn.findings,
              flush=True)
    executions = sum(row["executions"] for row in totals.rows.values())
    print(f"{executions} executions in all, {len(findings)} findings in this run")
    for finding in findings:
        print(f"finding: {finding}", file=sys.stderr)
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
