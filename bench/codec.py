"""``python -m bench.codec``: how small and how fast kvwire's codec and others make real tensors."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from functools import reduce
from pathlib import Path

from bench import codecs, kv_sample, tensors
from bench.codecs import CHUNK_BYTES, Codec, Level, Result
from bench.measure import Unable, machine, progress
from bench.tensors import Tensor
from kvwire import _native
from kvwire.errors import UsageError

__all__ = ["main"]

LEVELS = (Level("memory", 64 << 20, 1, 7), Level("cache", 128 << 10, 100, 7))
QUICK = (Level("memory", 1 << 20, 1, 1), Level("cache", 64 << 10, 1, 1))
_GROWTH_MAX = 0.001  # of the raw bytes, of the tiered code

Measured = dict[tuple[str, str], Result]  # by codec and level


def measure(tensor: Tensor, subjects: dict[str, Codec], levels: tuple[Level, ...]) -> Measured:
    """Return what each codec does with the tensor, without those that do not know its type."""
    results = {}
    for name, codec in subjects.items():
        for level in levels:
            progress(f"{tensor.name}: {name}, in {level.name}")
            try:
                results[name, level.name] = codec.measure(tensor, level)
            except Unable:
                break
    progress("")
    return results


def faults(tensor: Tensor, results: Measured) -> list[str]:
    """Return in words what must not be: bits that differ, and a tiered code that grows."""
    found = []
    for (codec, level), result in results.items():
        if not result.bit_exact:
            found.append(f"{tensor.name}: {codec}, in {level}: DECODES TO OTHER BITS")
        if codec == "tiered" and result.coded_bytes > result.raw_bytes * (1 + _GROWTH_MAX):
            found.append(f"{tensor.name}: {codec}, in {level}: {result.coded_bytes:.0f} bytes for "
                         f"{result.raw_bytes}: MORE THAN RAW AND {_GROWTH_MAX:.1%}")
    return found


def rows(tensor: Tensor, results: Measured) -> list[dict[str, object]]:
    """Return the JSON rows; no figure where bits differed."""
    found = []
    for (codec, level), result in results.items():
        figures = {"ratio": round(result.ratio, 4),
                   "encode_gbps": round(result.gbps(result.encode_s), 3),
                   "decode_gbps": round(result.gbps(result.decode_s), 3),
                   "memcpy_gbps": round(result.gbps(result.memcpy_s), 3)}
        if not result.bit_exact:
            figures = dict.fromkeys(figures)
        found.append({"tensor": tensor.name, "codec": codec, "level": level, **figures,
                      "threads": 1, "bit_exact": result.bit_exact})
    return found


def heading(levels: tuple[Level, ...]) -> str:
    columns = "".join(f"{level.name + ': enc':>13}{'dec':>7}{'of memcpy':>14}" for level in levels)
    return f"{'GB/s':24}{'ratio':>7}{columns}"


def lines(name: str, results: Measured, levels: tuple[Level, ...]) -> list[str]:
    """Return the results in plain text, a codec a line."""
    found = [name]
    for codec in dict.fromkeys(codec for codec, _ in results):
        of_codec = [results.get((codec, level.name)) for level in levels]
        if not all(result is None or result.bit_exact for result in of_codec):
            found.append(f"  {codec:22} OTHER BITS")
            continue
        ratio = results[codec, levels[0].name].ratio
        found.append(f"  {codec:22}{ratio:7.3f}" + "".join(map(_speeds, of_codec)))
    return found


def _speeds(result: Result | None) -> str:
    if result is None:
        return ""
    encode, decode = result.memcpy_s / result.encode_s, result.memcpy_s / result.decode_s
    return (f"{result.gbps(result.encode_s):13.2f}{result.gbps(result.decode_s):7.2f}"
            f"{encode:8.2f}{decode:6.2f}")


def together(measured: list[tuple[Tensor, Measured]]) -> dict[str, Measured]:
    """Return the sums of all KV and of all states of each element type."""
    groups: dict[str, list[Measured]] = {}
    for tensor, results in measured:
        groups.setdefault(f"all {tensor.kind} in {tensor.dtype.name.lower()}", []).append(results)
    return {name: {key: reduce(Result.__add__, (each[key] for each in group))
                   for key in group[0]} for name, group in groups.items()}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench.codec", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR",
                        help="of *.npy: floats, or unsigned integers with bf16, e4m3 or e5m2 in "
                             "the name; else the sample of bench.kv_sample, made when needed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--tables", default="own", metavar="own|first|DIR",
                        help="what tiered's code tables are made of: samples of all of a layer, "
                             "KV's first tokens, or another model's tensors; %(default)s")
    parser.add_argument("--codecs", default=",".join(codecs.NAMES),
                        help="comma-separated, of: %(default)s")
    parser.add_argument("--variant", choices=_native.tiered_variants(),
                        help="of tiered's kernels; what kvwire uses here")
    parser.add_argument("--quick", action="store_true",
                        help="little data, once: right or wrong, no speeds to quote")
    options = parser.parse_args(given)
    options.codecs = options.codecs.split(",")
    if unknown := set(options.codecs) - set(codecs.NAMES):
        parser.error(f"unknown codecs: {', '.join(sorted(unknown))}")
    return options


def inputs(folder: Path) -> list[Tensor]:
    """Return the tensors of the folder and their views in other element types."""
    own = tensors.load(folder)
    if importlib.util.find_spec("torch") is None:
        print("views in other element types are left out: torch is not installed",
              file=sys.stderr)
        return own
    names = {tensor.name for tensor in own}
    return own + [view for tensor in own for view in tensors.views(tensor)
                  if view.name not in names]


def with_tables(given: list[Tensor], tables: str) -> list[Tensor]:
    """Return the tensors, to be coded with tables from what the option says."""
    if tables == "own":
        return given
    if tables == "first":
        return [tensors.tabled_by_first_tokens(tensor) for tensor in given]
    others = inputs(Path(tables))
    return [tabled for tensor in given
            if (tabled := tensors.tabled_by_others(tensor, others)) is not None]


def main(given: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 when any bit differed or the tiered code grew, 2 when there is
    nothing to code."""
    options = arguments(given)
    levels = QUICK if options.quick else LEVELS
    try:
        given_tensors = with_tables(inputs(options.data or kv_sample.make()), options.tables)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    if not given_tensors:
        print(f"{options.data}: there is no tensor", file=sys.stderr)
        return 2
    subjects = codecs.installed(options.codecs, options.variant)
    own = {name: codec for name, codec in subjects.items() if name == "tiered"}
    facts = machine(codecs.versions(subjects.values()))
    facts["tables"] = options.tables if options.tables in ("own", "first") else "another model's"
    facts["quick"] = options.quick
    facts |= {"tiered": options.variant or _native.tiered_active(), "chunk_bytes": CHUNK_BYTES}
    records, wrong, measured = [{"machine": facts}], [], []
    print(heading(levels))
    for tensor in given_tensors + tensors.worst_cases():
        is_worst = tensor.is_worst_case
        results = measure(tensor, own if is_worst else subjects, levels[:1] if is_worst else levels)
        print("\n".join(lines(tensor.name, results, levels)), flush=True)
        records += rows(tensor, results)
        wrong += faults(tensor, results)
        measured += [] if is_worst else [(tensor, results)]
    for name, results in together(measured).items():
        print("\n".join(lines(name, results, levels)))
    for fault in wrong:
        print(fault, file=sys.stderr)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
