"""roundtrip-4k: how long one 4 KiB block takes from submit to verified receipt on a warm link."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import build, workloads
from bench.measure import Unable, percentile, progress
from bench.sides import Pair, PeerPair

__all__ = ["CASE", "measure"]

CASE = "roundtrip-4k"
_WARM_UP_SHARE = 11  # of the trips of each round, the first eleventh is not counted


def measure(rounds: int, shrink: int, have_compiler: bool, peer_names: list[str]
            ) -> tuple[list[dict[str, object]], bool]:
    """Take the case's round trips with each system once per round, alternating.

    Returns: the rows, and whether every byte arrived right in every round.
    """
    with Pair(CASE, shrink) as pair, ExitStack() as peer_pairs:
        address = pair.receiving.call("listen_kvwire")
        pair.sending.call("connect_kvwire", None, address)
        systems: dict[str, Callable[[], list[int] | None]] = {"kvwire": lambda: _python(pair)}
        if have_compiler:
            progress(f"{CASE}: compiling roundtrip.cpp")
            program = build.program(Path(__file__).with_name("roundtrip.cpp"))
            count = str(workloads.make(CASE, shrink).tokens)
            systems["kvwire-cpp"] = lambda: _native(program, "kvwire", count)
            systems["bare-p1"] = lambda: _native(program, "bare", count)
        for name in peer_names:
            systems[name] = _Peer(name, shrink, peer_pairs)
        taken: dict[str, list[int]] = {name: [] for name in systems}
        wrong = set()
        for round_number in range(rounds):
            for name, run in systems.items():
                if name not in taken:
                    continue
                progress(f"{CASE}: round {round_number + 1}/{rounds}, {name}")
                try:
                    times = run()
                except Unable as why:
                    print(f"{name}: no row in {CASE}: {why}", file=sys.stderr)
                    del taken[name]
                    continue
                if times is None:
                    wrong.add(name)
                else:
                    taken[name] += times[len(times) // _WARM_UP_SHARE:]
        progress("")
    rows = [{"case": CASE, "system": name, "p50_us": round(percentile(times, 50) / 1000, 1),
             "p99_us": round(percentile(times, 99) / 1000, 1)}
            for name, times in taken.items() if name not in wrong]
    return rows, not wrong


class _Peer:
    """A peer, connected at its first run."""

    def __init__(self, name: str, shrink: int, pairs: ExitStack):
        self._start = lambda: pairs.enter_context(
            PeerPair(name, CASE, shrink, workloads.PAGE_BYTES))
        self._pair: PeerPair | None = None

    def __call__(self) -> list[int] | None:
        self._pair = self._pair or self._start()
        run = time.monotonic_ns() & 0xFFFF
        _, times = self._pair.together("answer_peer", "trip_peer", run)
        return times if self._pair.receiving.call("verify") is None else None


def _python(pair: Pair) -> list[int] | None:
    """Return nanoseconds of each trip, or None when a byte was wrong."""
    pair.both("prepare", time.monotonic_ns() & 0xFFFF)
    ticket = pair.receiving.call("expect_kvwire")
    pair.receiving.start("receive_kvwire")
    times = pair.sending.call("push_one_by_one", ticket)
    pair.receiving.answer()
    return times if pair.receiving.call("verify") is None else None


def _native(program: Path, system: str, count: str) -> list[int] | None:
    done = subprocess.run([program, system, count], capture_output=True, text=True, timeout=60)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        return None
    return [int(line) for line in done.stdout.split()]
