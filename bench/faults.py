"""``python -m bench.faults``: thousands of transfers under seeded harm; exit 1 on any violation.

Every run is two processes with a hostile proxy between them. It must end in time, delivered and
verified byte for byte or with a typed error on both sides; nothing may be written after the end;
and nothing may be left over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from bench.campaign.endurance import endure
from bench.campaign.plan import Plan, make_cargoes, make_plan
from bench.campaign.run import Runner
from bench.campaign.sides import SECURITIES
from bench.campaign.verdict import Verdict
from bench.measure import machine, progress

__all__ = ["main"]

JOBS, LARGE_JOBS = 24, 2
BATCH_RUNS, LARGE_BATCH_RUNS = 1000, 50
SETTLING_S = 10.0  # after a batch everything is given back within this time
RESIDENT_GROWTH_MIB = 64
BAR_CHARACTERS = 24


class Campaign:
    """Runs seeds, counts, and looks for leaks between batches."""

    def __init__(self, count: int, jobs: int, large: bool, sabotage: str = ""):
        self._count, self._jobs, self._large = count, jobs, large
        self._sabotage = sabotage
        self._began = time.monotonic()
        self.runs = self.delivered = self.repaired = self.failed_typed = self.harmed = 0
        self.violations: list[dict[str, object]] = []
        self.families: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.codes: Counter[str] = Counter()
        self.census: list[dict[str, object]] = []

    async def go(self, first_seed: int) -> None:
        """Carry out the runs; they differ in their seeds, from `first_seed` on."""
        batch = LARGE_BATCH_RUNS if self._large else BATCH_RUNS
        async with Runner() as runner:
            await self._warm_up(runner)
            self.census.append(await self._count_all(runner))
            for start in range(0, self._count, batch):
                seeds = range(first_seed + start, first_seed + min(start + batch, self._count))
                await self._side_by_side(runner, seeds)
                await self._look_for_leaks(runner, seeds)

    async def _warm_up(self, runner: Runner) -> None:
        """Runs without harm: what a process keeps for good after its first runs is no leak."""
        plans = [Plan(-1 - number, "warm-up", make_cargoes(number, self._large),
                      mode=("push", "pull", "reach")[number % 3], security=security,
                      deadline_s=120, must_deliver=True)
                 for number, security in enumerate(sorted(3 * list(SECURITIES)))]
        for verdict in await asyncio.gather(*map(runner.run, plans)):
            if verdict.complaints:
                raise RuntimeError(f"a run without any harm fails: {verdict.complaints}")

    async def _side_by_side(self, runner: Runner, seeds: range) -> None:
        waiting = iter(seeds)

        async def work() -> None:
            for seed in waiting:
                plan = make_plan(seed, self._large)
                plan.sabotage = self._sabotage
                self._add(await runner.run(plan))

        await asyncio.gather(*(work() for _ in range(self._jobs)))

    def _add(self, verdict: Verdict) -> None:
        self.runs += 1
        self.families[verdict.plan.name].update({
            "runs": 1, "harmed": int(verdict.harmed), "delivered": int(verdict.delivered)})
        self.codes.update(verdict.codes)
        self.harmed += verdict.harmed
        if verdict.complaints:
            self.violations.append(verdict.violation())
            progress("")
            print(f"seed {verdict.plan.seed} ({verdict.plan.name}): "
                  + "; ".join(verdict.complaints), file=sys.stderr)
        elif verdict.delivered:
            self.delivered += 1
            self.repaired += verdict.repaired
        else:
            self.failed_typed += 1
        progress(self._bar())

    def _bar(self) -> str:
        share = self.runs / self._count
        bar = ("#" * int(share * BAR_CHARACTERS)).ljust(BAR_CHARACTERS, ".")
        rate = self.runs / (time.monotonic() - self._began)
        return (f"[{bar}] {self.runs}/{self._count} runs, {rate:.0f}/s, {self.delivered} "
                f"delivered, {self.failed_typed} failed typed, {len(self.violations)} violations")

    async def _look_for_leaks(self, runner: Runner, seeds: range) -> None:
        """When nothing is going on, each process must hold what it held at the beginning."""
        until = time.monotonic() + SETTLING_S
        while (growth := self._growth(census := await self._count_all(runner))) and (
                time.monotonic() < until):
            await asyncio.sleep(0.2)
        self.census.append(census)
        if growth:
            self.violations.append({"seed": seeds.start, "family": "leak", "complaints": growth,
                                    "story": [f"seeds {seeds.start} to {seeds.stop - 1}"]})
            progress("")
            print(f"seeds {seeds.start} to {seeds.stop - 1}: " + "; ".join(growth),
                  file=sys.stderr)

    def _growth(self, census: dict[str, dict[str, int]]) -> list[str]:
        first = self.census[0]
        return [f"the {side} process holds {count} {what}, {first[side][what]} at the beginning"
                for side, held in census.items() for what, count in held.items()
                if count > first[side][what] + (RESIDENT_GROWTH_MIB if "MiB" in what else 0)]

    async def _count_all(self, runner: Runner) -> dict[str, dict[str, int]]:
        pair = runner.pair
        return {"sending": await pair.sending.call("census"),
                "receiving": await pair.receiving.call("census")}

    def report(self, seed: int) -> dict[str, object]:
        """Return the JSON of the whole campaign."""
        seconds = round(time.monotonic() - self._began, 1)
        summary = (f"{self.runs} runs in {seconds} s: {self.delivered} delivered "
                   f"({self.repaired} after repairs), {self.failed_typed} failed with typed "
                   f"errors, {len(self.violations)} violations")
        return {"seed": seed, "runs": self.runs, "delivered": self.delivered,
                "repaired": self.repaired, "failed_typed": self.failed_typed,
                "violations": self.violations, "harmed": self.harmed, "large": self._large,
                "seconds": seconds, "summary": summary,
                "families": self.families,
                "codes": dict(self.codes.most_common()), "census": self.census}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1,
                        help="of the first run; run n has seed + n, so that --seed X --count 1 "
                             "repeats run X")
    parser.add_argument("--count", type=int, default=1000, help="runs; %(default)s")
    parser.add_argument("--large", action="store_true", help="transfers of 64 MiB and more")
    parser.add_argument("--jobs", type=int,
                        help=f"runs side by side; {JOBS}, of large ones {LARGE_JOBS}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--endurance", action="store_true",
                        help="no harm: --count transfers over one link, then 1,000 at once; "
                             "what grows")
    # For tests of the campaign itself; see `Plan.sabotage`.
    parser.add_argument("--sabotage", default="", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.jobs = options.jobs or (LARGE_JOBS if options.large else JOBS)
    return options


def main(given: list[str] | None = None) -> int:
    """Run the campaign; returns 1 when there was a violation."""
    options = arguments(given)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would be counted as leaks
    about = machine()
    report = asyncio.run(_endured(options) if options.endurance else _campaigned(options))
    report["machine"] = about
    progress("")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1, default=str) + "\n")
    print(report["summary"])
    return 1 if report["violations"] else 0


async def _campaigned(options: argparse.Namespace) -> dict[str, object]:
    campaign = Campaign(options.count, options.jobs, options.large, options.sabotage)
    await campaign.go(options.seed)
    return campaign.report(options.seed)


async def _endured(options: argparse.Namespace) -> dict[str, object]:
    report = await endure(options.count)
    return report | {"summary": f"{report['transfers']} transfers over one link, then "
                                f"{report['concurrent']} at once: resident growth "
                                f"{report['resident_growth_mib']} MiB, "
                                f"{len(report['violations'])} violations"}


if __name__ == "__main__":
    sys.exit(main())
