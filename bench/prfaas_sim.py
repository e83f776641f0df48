"""``python -m bench.prfaas_sim``: the case study of arXiv 2604.15039 simulated request by request.

    python -m bench.prfaas_sim --trace FILE --json FILE --plots DIR
    python -m bench.prfaas_sim --speed          # seconds and memory of large simulations

The closed form checked, the times to first token of table 6, the four policies on a trace, kvwire's
against the published one at several bandwidths, nodes that change their roles, hot prefixes copied
between nodes, and what happens when something breaks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from bench import measure
from bench import prfaas_sim_cases as cases
from bench.measure import progress
from bench.prfaas_tables import CaseStudy, fit_case_study
from kvwire.errors import KvwireError
from kvwire.prfaas.simulator import generator, plots
from kvwire.prfaas.simulator.traces import Trace, read_trace
from kvwire.prfaas.throughput import Link

__all__ = ["main", "table_6_ttft"]

PARTS = ("closed-form", "table-6", "policies", "conversion", "faults", "rebalance", "beyond-cold",
         "beyond-agentic", "beyond-conversation")
LINKS_GBPS = {"cold": (100, 25, 10, 7, 5), "agentic": (100, 25, 10), "conversation": (100, 10)}
REBALANCE_GBPS = (100, 10)
COUNT = 6000
COLD_COUNT = 10_000  # long enough that a queue that grows is seen to
CASE_COUNT = 20_000
CONVERSION_HOURS = 4.0
REQUESTS_PER_HOUR = 15_000
SPEED = {"published, no pools": (1_000_000, 60), "kvwire, no pools": (1_000_000, 60),
         "published, pools": (100_000, 120), "kvwire, pools": (100_000, 120)}
"""Requests, and the seconds that they may take."""
MEMORY_GIB_MAX = 4.0

Row = dict[str, object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate what was asked for, print and write it.

    Returns: 0; 1 when a trace or file is bad, or a speed is out of its bound; 2 for a wrong call.
    """
    options = _options(arguments)
    if options.speed_case:
        print(json.dumps(measure_speed(options.speed_case, options.requests)))
        return 0
    try:
        if options.speed:
            rows, good = speeds(options.requests)
            _write(options, rows)
        else:
            simulated(options)
            good = True
    except (KvwireError, OSError) as error:
        progress("")
        print(f"bench.prfaas_sim: {error}", file=sys.stderr)
        return 1
    return 0 if good else 1


def _write(options: argparse.Namespace, rows: list[Row]) -> None:
    if options.json is not None:
        head = {"machine": measure.machine(), "seed": options.seed, "requests": options.requests}
        text = json.dumps([head, *rows], indent=1, allow_nan=False)
        options.json.write_text(text + "\n", "utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.prfaas_sim", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", type=Path, metavar="FILE",
                        help="JSON lines as of the Mooncake traces; else one is generated alike")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write PNGs there")
    parser.add_argument("--parts", default=",".join(PARTS), help="(default all: %(default)s)")
    parser.add_argument("--requests", type=int, metavar="N",
                        help=f"of each simulation (default {CASE_COUNT} for table 6, "
                             f"{COLD_COUNT} cold, else {COUNT})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--speed", action="store_true", help="measure large simulations instead")
    parser.add_argument("--speed-case", choices=SPEED, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    if options.requests is not None and options.requests < 100:
        parser.error("--requests must be at least 100")
    if options.seed < 0:
        parser.error("--seed must not be negative")
    return options


def table_6_ttft(case: CaseStudy) -> Iterator[tuple[str, str, float, float, str]]:
    """Yield (column, row, paper, ours, note) of table 6's times to first token.

    At next to no load: the paper's times are those of requests alone, see the note.
    """
    note = ("simulated at 2 % of Lambda_max. With queues, at 90 % of it, mean and P90 are about "
            "twice as long; the paper's are what requests take alone")
    for row in cases.table_6(case, CASE_COUNT, 1, (cases.LOADS[0],)):
        yield row["deployment"], row["figure"], row["paper"], row["ours"], note


# ---- the parts

def simulated(options: argparse.Namespace) -> list[Row]:
    """Run the parts; return all rows. What is done is in the JSON file after each part."""
    trace = None if options.trace is None else read_trace(options.trace)
    if options.plots is not None:
        plots.require_matplotlib()
        options.plots.mkdir(parents=True, exist_ok=True)
    case, rows = fit_case_study(), []
    parts: dict[str, Callable[..., Iterable[Row]]] = {
        "closed-form": _closed_form, "table-6": _table_6, "policies": _policies,
        "conversion": _conversion, "faults": _faults, "rebalance": _rebalance} | {
            f"beyond-{name}": _beyond(name) for name in LINKS_GBPS}
    for part in options.parts:
        for row in parts[part](case, trace, options):
            rows.append(row)
            progress("")
            print(_line(row), flush=True)
        _write(options, rows)
    return rows


def _closed_form(case: CaseStudy, trace: Trace | None, options: argparse.Namespace
                 ) -> Iterable[Row]:
    progress("closed form")
    return cases.closed_form(case, options.requests or CASE_COUNT, options.seed)


def _table_6(case: CaseStudy, trace: Trace | None, options: argparse.Namespace) -> Iterator[Row]:
    progress("table 6")
    times: dict[str, np.ndarray] = {}
    yield from cases.table_6(case, options.requests or CASE_COUNT, options.seed, keep=times)
    _plot(options, "table-6-ttft", plots.plot_ttft,
          f"Time to first token at {cases.LOADS[-1]:.0%} of each deployment's Lambda_max", times)


def _conversation(case: CaseStudy, trace: Trace | None, options: argparse.Namespace
                  ) -> cases.Traffic:
    if trace is None:
        trace = _generated(options)
    if options.requests is not None:
        trace = trace.head(options.requests)
    return cases.conversation(case, trace.spread(options.seed))


def _generated(options: argparse.Namespace) -> Trace:
    return generator.session_trace(generator.CONVERSATION, options.requests or 12_000, 3.4,
                                   options.seed)


def _policies(case: CaseStudy, trace: Trace | None, options: argparse.Namespace) -> Iterator[Row]:
    for source, given in (("given", trace), ("generated", _generated(options))):
        if given is not None:
            figures = {name: float(f"{value:.4g}") if isinstance(value, float) else value
                       for name, value in asdict(given.statistics()).items()}
            yield {"part": "trace", "source": source, **figures}
    times: dict[str, np.ndarray] = {}
    traffic = _conversation(case, trace, options)
    for row in cases.four_policies(case, traffic, Link(100.0), times):
        yield row
    _plot(options, "policies-ttft", plots.plot_ttft,
          "Time to first token of conversations, 100 Gbit/s", times)


def _beyond(name: str) -> Callable[..., Iterator[Row]]:
    """Return the part that compares policies on one kind of traffic."""
    def part(case: CaseStudy, trace: Trace | None, options: argparse.Namespace) -> Iterator[Row]:
        count = options.requests or COUNT
        traffic = (cases.cold(case, options.requests or COLD_COUNT, options.seed)
                   if name == "cold" else
                   cases.agentic(case, count, options.seed) if name == "agentic" else
                   _conversation(case, trace, options))
        rates: dict[str, list[float]] = {}
        for gbps in LINKS_GBPS[name]:
            progress(f"{name}, {gbps} Gbit/s")
            for row in cases.beyond(traffic, Link(float(gbps)), steps=5):
                rates.setdefault(row["policy"], []).append(row["bearable_rps"])
                yield row
        _plot(options, f"beyond-{name}", plots.plot_rates,
              f"{name}: requests/s with P90 TTFT within {traffic.ttft_p90_max_s:g} s",
              [f"{gbps} Gbit/s" for gbps in LINKS_GBPS[name]], rates)
    return part


def _conversion(case: CaseStudy, trace: Trace | None, options: argparse.Namespace
                ) -> Iterator[Row]:
    progress("conversion")
    hours = (CONVERSION_HOURS if options.requests is None
             else options.requests / REQUESTS_PER_HOUR)
    return cases.conversion(case, hours, options.seed)


def _faults(case: CaseStudy, trace: Trace | None, options: argparse.Namespace) -> Iterator[Row]:
    times: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    yield from cases.faults(case, options.requests or COUNT, options.seed, 120.0, times)
    for number, (name, (_, fault)) in enumerate(cases.FAULTS.items(), 1):
        _plot(options, f"fault-{number}", plots.plot_timeline, name, times[name],
              [(fault.begin_s, fault.end_s)])


def _rebalance(case: CaseStudy, trace: Trace | None, options: argparse.Namespace
               ) -> Iterator[Row]:
    traffic = cases.agentic(case, options.requests or COUNT, options.seed)
    for gbps in REBALANCE_GBPS:
        progress(f"rebalance, {gbps} Gbit/s")
        yield from cases.rebalance(traffic, Link(float(gbps)), steps=5)


def _plot(options: argparse.Namespace, name: str, plot: Callable, *arguments: object) -> None:
    if options.plots is not None:
        plot(*arguments, options.plots / f"{name}.png")


def _line(row: Row) -> str:
    shown = {name: value for name, value in row.items() if name != "part"}
    return f"{row['part']}: " + ", ".join(f"{name} {_text(value)}"
                                          for name, value in shown.items())


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- speed

def speeds(requests: int | None) -> tuple[list[Row], bool]:
    """Measure each case in a process of its own; also returns whether all kept their bounds."""
    rows = []
    for name, (count, seconds_max) in SPEED.items():
        progress(f"{name}: {count:,} requests")
        command = [sys.executable, "-m", "bench.prfaas_sim", "--speed-case", name,
                   "--requests", str(requests or count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout) | {"seconds_max": seconds_max})
        progress("")
        print(_line(rows[-1]), flush=True)
    good = all(row["cpu_s"] <= row["seconds_max"] and row["peak_gib"] <= MEMORY_GIB_MAX
               for row in rows)
    return rows, good


def measure_speed(name: str, count: int | None) -> Row:
    """Simulate `count` requests at 0.9 of the plan's rate; return seconds and memory."""
    case = fit_case_study()
    policy_name, pools = name.split(", ")
    if pools == "pools":
        trace = generator.session_trace(generator.CONVERSATION, count or SPEED[name][0], 3.4, 1)
        traffic = cases.conversation(case, trace.spread(1))
    else:
        traffic = cases.cold(case, count or SPEED[name][0], 1)
    link = Link(100.0)
    plan, policy = cases.contenders(traffic, link)[policy_name]
    simulation = traffic.simulation(policy(), link, plan.prefill_nodes, 0.9 * plan.lambda_max_rps)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    simulation.run(lambda index: progress(f"{name}: {index:,} of {len(simulation.trace):,}"))
    cpu_s = time.process_time() - began_cpu_s
    return {"part": "speed", "case": name, "requests": len(simulation.trace),
            "seconds": round(time.perf_counter() - began_s, 1), "cpu_s": round(cpu_s, 2),
            "load": round(os.getloadavg()[0], 1),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}


if __name__ == "__main__":
    sys.exit(main())
