"""A deployment described in a TOML file; examples/prfaas-case-study.toml shows every table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kvwire.errors import UsageError
from kvwire.layout import CacheSpec
from kvwire.prfaas import toml_table
from kvwire.prfaas.lengths import (
    Empirical, LengthDistribution, TruncatedLognormal, WithPrefixHits,
)
from kvwire.prfaas.profiles import ModelProfile
from kvwire.prfaas.throughput import Deployment, Link, LocalCluster, PrefillCluster, Wire
from kvwire.prfaas.toml_table import Table
from kvwire.presets import preset_names

__all__ = ["load", "trace_lengths"]

TRACE_BLOCK_TOKENS = 512
TOKENS_MAX = 1 << 24  # a longer prompt is a mistake in the file


def load(path: Path | str) -> Deployment:
    """Read a deployment file.

    Raises:
        UsageError: it is malformed; the message starts with file, line and field.
        OSError: it, or a trace that it names, cannot be read.
    """
    file = toml_table.read(Path(path))
    sizes = _model(file.table("model"))
    local, remote = file.table("local"), file.table("remote", required=False)
    link, wire = file.table("link", required=False), file.table("wire", required=False)
    lengths = _lengths(file.table("lengths"), file.table("prefix_hits", required=False))
    if (remote is None) != (link is None):
        raise file.error("link" if remote is None else "remote",
                         "remote and link belong together; describe both or neither")
    deployment = file.make(
        Deployment, file.text("name", Path(path).stem), lengths, file.number("output_tokens"),
        _local(local, sizes), remote and _remote(remote, sizes), link and _link(link),
        _wire(wire) if wire else Wire(), threshold_tokens=file.number("threshold_tokens", None))
    file.finish()
    return deployment


def _model(table: Table) -> tuple[str, int, int]:
    """Return (name, bytes per token, bytes of states)."""
    if "preset" in table:
        name = table.text("preset", known=preset_names())
        spec = table.make(CacheSpec.preset, name, kv_dtype=table.text("kv_dtype", None),
                          state_dtype=table.text("state_dtype", None))
        sizes = name, spec.row_bytes, spec.fixed_bytes
    else:
        sizes = (table.text("name", "model"), table.integer("kv_bytes_per_token"),
                 table.integer("state_bytes", 0))
    table.finish()
    return sizes


def _profile(table: Table, sizes: tuple[str, int, int], where: str) -> ModelProfile:
    name, row_bytes, state_bytes = sizes
    return table.make(ModelProfile, f"{name}, {where}", row_bytes, state_bytes,
                      table.points("prefill_points"))


def _local(table: Table, sizes: tuple[str, int, int]) -> LocalCluster:
    cluster = table.make(
        LocalCluster, table.integer("nodes"), _profile(table, sizes, "local"),
        table.integer("batch_max"), table.number("decode_step_ms") / 1e3,
        table.integer("prefill_nodes", None))
    table.finish()
    return cluster


def _remote(table: Table, sizes: tuple[str, int, int]) -> PrefillCluster:
    cluster = table.make(PrefillCluster, table.integer("nodes"), _profile(table, sizes, "remote"))
    table.finish()
    return cluster


def _link(table: Table) -> Link:
    in_flight_mib = table.number("in_flight_mib", None)
    link = table.make(Link, table.number("gbps"), table.number("share", 1.0),
                      table.number("rtt_ms", 0.0) / 1e3,
                      None if in_flight_mib is None else in_flight_mib * 2**20)
    table.finish()
    return link


def _wire(table: Table) -> Wire:
    wire = table.make(Wire, table.number("kv_ratio", 1.0), table.number("state_ratio", 1.0))
    table.finish()
    return wire


def _lengths(table: Table, hits: Table | None) -> LengthDistribution:
    if table.text("kind", known=("lognormal", "trace")) == "lognormal":
        lengths = table.make(TruncatedLognormal, table.number("mu"), table.number("sigma"),
                             table.number("low"), table.number("high"))
    else:
        path = table.folder / table.text("file")
        cached = table.text("prefix_cache", "none", known=("none", "unbounded")) == "unbounded"
        if hits and cached:
            raise table.error("prefix_cache", "is unbounded, and [prefix_hits] is there too; "
                              "the trace's own hits or assumed ones, not both")
        lengths = trace_lengths(path, cached)
    table.finish()
    if hits is None:
        return lengths
    shared = hits.make(WithPrefixHits, lengths, hits.number("hit_share"),
                       hits.number("cached_share"))
    hits.finish()
    return shared


def trace_lengths(path: Path | str, cached: bool = False) -> Empirical:
    """Return the lengths of a trace of JSON lines with ``input_length`` (and ``hash_ids``).

    Args:
        path: e.g. the Mooncake traces: prefix hashes stand for 512 tokens each.
        cached: take off what a prefix cache that forgets nothing would hold of each request; at
            least one token is left.

    Raises:
        UsageError: a line or field is malformed, or there is no line.
    """
    rows, seen = [], set()
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            tokens, hashes = _trace_row(f"{path}:{number}", line, cached)
            hit = 0
            while hit < len(hashes) and hashes[hit] in seen:
                hit += 1
            seen.update(hashes)
            prefix = min(hit * TRACE_BLOCK_TOKENS, tokens - 1)
            rows.append((tokens - prefix, prefix))
    if not rows:
        raise UsageError(f"{path}: holds no request")
    uncached, prefixes = np.array(rows, float).T
    return Empirical(uncached, prefixes)


def _trace_row(where: str, line: str, cached: bool) -> tuple[int, list[int]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: is {type(row).__name__}; wanted is an object")
    tokens = row.get("input_length")
    if type(tokens) is not int or not 1 <= tokens <= TOKENS_MAX:
        raise UsageError(f"{where}: input_length: is {str(tokens)[:40]}; wanted is an integer from "
                         f"1 to {TOKENS_MAX}")
    hashes = row.get("hash_ids", []) if cached else []
    if not isinstance(hashes, list) or not all(type(value) is int for value in hashes):
        raise UsageError(f"{where}: hash_ids: is {str(hashes)[:40]}; wanted is a list of integers")
    return tokens, hashes
