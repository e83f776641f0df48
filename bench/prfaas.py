"""``python -m bench.prfaas``: the tables of arXiv 2604.15039 recomputed, line by line, and the
router's decision time.

    python -m bench.prfaas --json FILE       # tables 3, 5 and 6
    python -m bench.prfaas --router          # microseconds a decision, 1,000,000 cached blocks

Exits with 1 when a predicted figure is further from the paper than its bound.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench import measure
from bench.prfaas_tables import (
    Input, Row, fit_case_study, table_3, table_5, table_6, worst,
)

__all__ = ["main"]

ERROR_MAX = 0.03
EGRESS_ERROR_MAX = 0.08
SIMULATION = "bench.prfaas_sim"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write what was asked for; returns 1 when a figure is out of its bound."""
    parser = argparse.ArgumentParser(prog="python -m bench.prfaas", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows to this file")
    parser.add_argument("--router", action="store_true", help="time the router instead")
    parser.add_argument("--blocks", type=int, default=1_000_000, metavar="N",
                        help="cached blocks that the router's index knows (default 1,000,000)")
    parser.add_argument("--decisions", type=int, default=20_000, metavar="N",
                        help="to be timed, for each rule and regime (default 20,000)")
    parser.add_argument("--simulate", action="store_true",
                        help=f"add the times to first token, by {SIMULATION}")
    options = parser.parse_args(arguments)
    if options.blocks < 1 or options.decisions < 10:
        parser.error("--blocks must be at least 1, --decisions at least 10")
    rows, inputs = ([], []) if options.router else tables(options.simulate)
    timed = []
    if options.router:
        from bench.prfaas_router import measure_router
        timed = measure_router(options.blocks, options.decisions)
    for line in [*report(rows, inputs), *timings(timed)] if rows else timings(timed):
        print(line)
    if options.json is not None:
        head = {"machine": measure.machine(), "inputs": [vars(given) for given in inputs]}
        written = [head, *(row.as_json() for row in rows), *timed]
        options.json.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", "utf-8")
    return 1 if out_of_bound(rows) else 0


def tables(simulate: bool = False) -> tuple[list[Row], list[Input]]:
    """Return all rows, and the inputs that had to be fitted for them."""
    phi, phi_inputs = table_3()
    sizes, size_inputs = table_5()
    case = fit_case_study()
    rows = [*phi, *sizes, *table_6(case)]
    if simulate:
        rows += simulated(case)
    return rows, [*phi_inputs, *size_inputs, *case.inputs]


def simulated(case: object) -> Iterable[Row]:
    """Return table 6's times to first token; `bench.prfaas_sim.table_6_ttft(case)` has them as
    (column, "mean TTFT s" or "P90 TTFT s", paper, ours, note)."""
    if importlib.util.find_spec(SIMULATION) is None:
        print(f"no times to first token: {SIMULATION} is not here", file=sys.stderr)
        return []
    found = importlib.import_module(SIMULATION).table_6_ttft(case)
    return [Row("6", row, column, "simulated", paper, ours, note)
            for column, row, paper, ours, note in found]


def out_of_bound(rows: Iterable[Row]) -> list[Row]:
    """Return the predicted figures, and the egress, that are further off than asked for."""
    def bound(row: Row) -> float | None:
        if row.row.startswith("egress"):
            return EGRESS_ERROR_MAX
        return ERROR_MAX if row.kind == "predicted" else None

    return [row for row in rows if bound(row) is not None and abs(row.rel_error) > bound(row)]


def report(rows: Sequence[Row], inputs: Sequence[Input]) -> list[str]:
    """Return the rows as a table, with each different note once below its rows."""
    lines = [f"{'table':5} {'figure':36} {'of':42} {'kind':10} {'paper':>9} {'ours':>9} "
             f"{'error':>8}"]
    for index, row in enumerate(rows):
        lines.append(f"{row.table:5} {row.row:36} {row.column:42} {row.kind:10} "
                     f"{row.paper:>9.5g} {row.ours:>9.5g} {row.rel_error:>+8.2%}")
        last = index + 1 == len(rows) or rows[index + 1].note != row.note
        if row.note and last:
            lines.append(f"      {row.note}")
    lines += ["", "fitted inputs"]
    lines += [f"  {given.name:55} {given.value:>11.5g}   to {given.fitted_to}"
              + (f"; {given.note}" if given.note else "") for given in inputs]
    far = out_of_bound(rows)
    lines += ["", f"largest error of a predicted figure: {worst(rows):.2%}; out of bound: "
              + (", ".join(f"{row.row} {row.column}" for row in far) or "none")]
    return lines


def timings(rows: Sequence[dict[str, object]]) -> list[str]:
    """Return the router's rows as a table."""
    return [f"router, {row['rule'] + (' and sooner' if row['sooner'] else ''):17} rule, "
            f"{row['regime']:8} bandwidth, {row['blocks']:,} cached blocks: median "
            f"{row['us_median']} µs (best tenth {row['us_median_best']}), p99 {row['us_p99']} µs"
            for row in rows]


if __name__ == "__main__":
    sys.exit(main())
