"""The command `kvwire`: the demo, and what helps to look at a cache, a file, or this build."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import kvwire
from kvwire.errors import KvwireError, UsageError
from kvwire.limits import LANE_COUNT_MAX

__all__ = ["main"]

_PACKAGE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns: 0; 1 when something failed or the demo's runs differ; 2 when the call is wrong;
        130 when interrupted.
    """
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except (KvwireError, OSError) as error:
        print(f"kvwire: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("kvwire: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvwire", description=kvwire.__doc__.partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"kvwire {kvwire.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="hand over caches of real models between processes")
    demo.add_argument("--text", metavar="FILE", type=Path,
                      help="what the models read (kvwire's README by default)")
    demo.add_argument("--models", metavar="NAME,...", help="all by default; see --list")
    demo.add_argument("--list", action="store_true", help="list the models and leave")
    demo.add_argument("--lanes", type=_lanes, default=2, metavar="N",
                      help=f"TCP connections, 1 to {LANE_COUNT_MAX} (default 2)")
    demo.add_argument("--codec", choices=("raw", "lz4", "tiered"), default="raw",
                      help="(default raw)")
    demo.set_defaults(run=_demo)

    calibrate = commands.add_parser("calibrate", help="make a model's code tables ahead of time")
    calibrate.add_argument("model", metavar="MODEL",
                           help="one of the demo's, or a transformers model that is here")
    calibrate.add_argument("--text", metavar="FILE", type=Path, help="what the model reads "
                           "(kvwire's README by default); like what it will read")
    calibrate.add_argument("--out", metavar="BOOK", type=Path, required=True,
                           help="the code book to write (.npz)")
    calibrate.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16",
                           help="the model's (default bf16)")
    calibrate.add_argument("--tokens", type=int, default=2048, help="at most (default 2048)")
    calibrate.add_argument("--order", choices=("NHD", "HND"), default="NHD",
                           help="of the pages that the tables are for (default NHD)")
    calibrate.add_argument("--name", metavar="MODEL", help="what the CacheSpec that will be sent "
                           "calls the model (transformers' model type by default)")
    calibrate.set_defaults(run=_calibrate)

    backends = commands.add_parser("backends", help="show which variants this machine uses")
    backends.set_defaults(run=_backends)

    spec = commands.add_parser("spec", help="show the cache geometry of a known model")
    spec.add_argument("name", nargs="?", metavar="NAME", help="without it: list the names")
    spec.add_argument("--tokens", type=int, help="also the bytes of a request of that length")
    spec.add_argument("--block-tokens", type=int, default=0, help="tokens a page (default: none)")
    spec.set_defaults(run=_spec)

    inspect = commands.add_parser("inspect", help="show what a cache file holds")
    inspect.add_argument("file", metavar="FILE", type=Path)
    inspect.set_defaults(run=_inspect)

    plan = commands.add_parser("plan", help="plan a deployment with remote prefill")
    plan.add_argument("file", metavar="FILE.toml", type=Path)
    plan.add_argument("--plot", metavar="FILE.png", type=Path,
                      help="what limits it, against the threshold (needs matplotlib)")
    plan.add_argument("--json", metavar="FILE", type=Path, help="the plan, for programs")
    plan.set_defaults(run=_plan)
    _add_simulate(commands)
    return parser


def _add_simulate(commands: argparse._SubParsersAction) -> None:
    simulate = commands.add_parser("simulate", help="play requests through a deployment")
    simulate.add_argument("file", metavar="FILE.toml", type=Path, help="as `kvwire plan` reads it")
    simulate.add_argument("--trace", metavar="FILE", type=Path, help="requests as JSON lines, in "
                          "the format of Mooncake's traces (by default prompts of the file's "
                          "lengths, that share nothing)")
    simulate.add_argument("--requests", type=int, default=10_000, metavar="N",
                          help="at most (default 10,000)")
    simulate.add_argument("--rate", type=float, metavar="REQUESTS/S", help="mean rate of arrival "
                          "(by default the trace's, or 0.8 of what the plan sustains)")
    simulate.add_argument("--pool-gb", type=float, default=0.0, metavar="GB", help="prefix pool "
                          "of each cluster (default 0: none)")
    simulate.add_argument("--conversion-s", type=float, metavar="SECONDS", help="let kvwire's "
                          "policy convert local nodes, which takes so long")
    simulate.add_argument("--seed", type=int, default=1)
    simulate.add_argument("--plot", metavar="FILE.png", type=Path,
                          help="times to first token (needs matplotlib)")
    simulate.add_argument("--json", metavar="FILE", type=Path, help="all figures, for programs")
    simulate.set_defaults(run=_simulate)


def _lanes(text: str) -> int:
    count = int(text)
    if not 1 <= count <= LANE_COUNT_MAX:
        raise argparse.ArgumentTypeError(f"{count} is not 1 to {LANE_COUNT_MAX}")
    return count


def _demo(options: argparse.Namespace) -> int:
    from kvwire import demo
    from kvwire.demo import models
    if options.list:
        for name in models.model_names():
            print(f"{name:14}{models.title(name)}")
        return 0
    sys.stdout.reconfigure(errors="replace")  # models may write what the terminal cannot
    names = options.models.split(",") if options.models else models.model_names()
    path = options.text or _default_text()
    text = path.read_text("utf-8", errors="replace")
    print(f"text: {path}, {len(text):,} characters")
    good = demo.run(names, text, lanes=options.lanes, codec=options.codec, stream=sys.stdout)
    return 0 if good else 1


def _calibrate(options: argparse.Namespace) -> int:
    from kvwire.demo import calibration
    if options.tokens < 1:
        raise UsageError(f"--tokens is {options.tokens}; it must be at least 1")
    text = (options.text or _default_text()).read_text("utf-8", errors="replace")
    spec, tensors, tokens = calibration.read(options.model, text, dtype=options.dtype,
                                             tokens=options.tokens)
    memory = calibration.memory_of(spec, tensors, tokens, options.order, options.name)
    book = kvwire.CodeBook()
    print("\n".join(calibration.table(book.calibrate(memory))))
    book.save(options.out)
    print(f"{len(book)} tables of {memory.spec.model}, {tokens:,} tokens, in {options.out}")
    return 0


def _default_text() -> Path:
    """Return the README of the clone that kvwire runs from, else a text that is always there."""
    readme = _PACKAGE.parent / "README.md"
    in_a_clone = (_PACKAGE.parent / "pyproject.toml").exists()
    return readme if in_a_clone and readme.exists() else _PACKAGE / "FORMAT.md"


def _backends(options: argparse.Namespace) -> int:
    found = kvwire.backends()
    width = 2 + max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}{value if isinstance(value, str) else ', '.join(map(str, value))}")
    return 0


def _spec(options: argparse.Namespace) -> int:
    from kvwire.presets import preset_names
    if options.name is None:
        print("\n".join(preset_names()))
        return 0
    spec = kvwire.CacheSpec.preset(options.name, block_tokens=options.block_tokens)
    print(spec)
    if options.tokens is not None:
        for kind, count in spec.bytes_by_kind(options.tokens).items():
            print(f"{kind.name.lower():17}{count:>18,} bytes")
        print(f"{'all':17}{spec.bytes(options.tokens):>18,} bytes")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    held = kvwire.inspect(options.file)
    print(held.spec)
    start, stop = held.tokens
    print(f"tokens     [{start:,}, {stop:,})")
    print(f"bytes      {held.raw_bytes:,} of cache in a file of {held.file_bytes:,}")
    print(f"frames     {held.segment_count:,} segments, {held.chunk_count:,} chunks")
    for name, value in held.metadata.items():
        print(f"metadata   {name} = {value!r}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    import json

    from kvwire.prfaas import deployment, plan_report, plots, throughput
    described = deployment.load(options.file)
    plan = throughput.solve(described)
    print(plan_report.text(described, plan))
    if options.json is not None:
        fields = plan_report.as_json(described, plan)
        options.json.write_text(json.dumps(fields, indent=1, allow_nan=False) + "\n", "utf-8")
    if options.plot is not None:
        plots.plot_plan(described, plan, options.plot)
    return 0


def _simulate(options: argparse.Namespace) -> int:
    import json

    from kvwire.prfaas import deployment
    from kvwire.prfaas.simulator import comparison, plots, traces
    for name in ("pool_gb", "conversion_s"):
        if not 0 <= (getattr(options, name) or 0) <= 1e9:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be "
                             "a number from 0 to 1e9")
    if options.seed < 0:
        raise UsageError(f"--seed is {options.seed}; it must not be negative")
    described = deployment.load(options.file)
    trace = None if options.trace is None else traces.read_trace(options.trace)
    if options.plot is not None:
        plots.require_matplotlib()
    described, trace = comparison.requests_of(described, trace, count=options.requests,
                                              rate_rps=options.rate, seed=options.seed)
    progress = _Progress(len(trace))
    outcomes = dict(comparison.compare(described, trace, pool_bytes=options.pool_gb * 1e9,
                                       conversion_s=options.conversion_s, progress=progress))
    progress.end()
    print(f"{described.name}: {len(trace):,} requests in {trace.duration_s:,.0f} s\n")
    print(comparison.text(outcomes))
    if options.json is not None:
        rows = {name: outcome.summary.as_json() | {"conversions": outcome.conversions}
                for name, outcome in outcomes.items()}
        options.json.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", "utf-8")
    if options.plot is not None:
        plots.plot_ttft(described.name, {name: outcome.times_s
                                         for name, outcome in outcomes.items()}, options.plot)
    return 0


class _Progress:
    """A bar on a terminal, nothing elsewhere."""

    def __init__(self, count: int):
        self._count, self._shown = count, sys.stderr.isatty()

    def __call__(self, name: str, index: int) -> None:
        if self._shown:
            done = 30 * index // self._count
            sys.stderr.write(f"\r{name:<10} [{'#' * done:<30}] {index:,} of {self._count:,}")
            sys.stderr.flush()

    def end(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")


if __name__ == "__main__":
    sys.exit(main())
