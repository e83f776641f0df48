"""Traces of requests: columns in memory, JSON lines in a file.

The file's format is that of the Mooncake traces (FAST'25): one object a line with ``timestamp``
(ms), ``input_length`` and ``output_length`` (tokens) and ``hash_ids``, one number per block of 512
prompt tokens, the last block partial. Equal numbers stand for equal blocks after equal prefixes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kvwire.errors import UsageError

__all__ = ["BLOCK_TOKENS", "Trace", "TraceStatistics", "read_trace", "write_trace"]

BLOCK_TOKENS = 512
TOKENS_MAX = 1 << 24  # a longer prompt is a mistake in the file
HASH_ID_MAX = (1 << 62) - 1
_FIELDS = ("timestamp", "input_length", "output_length", "hash_ids")


@dataclass(frozen=True)
class TraceStatistics:
    """What a generated trace and a real one are compared by.

    Attributes:
        rate_rps: requests per second from the first arrival to the last.
        arrivals_per_instant: requests that share a timestamp, on average.
        reused_block_share: blocks that an unbounded cache of all earlier prompts has, of all.
        reused_request_share: requests with two such blocks or more; one is often a system prompt.
    """

    request_count: int
    rate_rps: float
    arrivals_per_instant: float
    input_tokens_mean: float
    input_tokens_p50: float
    input_tokens_p90: float
    input_tokens_max: int
    output_tokens_mean: float
    reused_block_share: float
    reused_request_share: float


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests in the order of their arrival.

    Attributes:
        arrival_s: float64 [n], not decreasing.
        input_tokens, output_tokens: int64 [n], at least 1.
        hash_ids: int64, of all requests one after another; None: nothing is shared.
        hash_starts: int64 [n + 1]; request i owns ``hash_ids[hash_starts[i]:hash_starts[i + 1]]``.
        block_tokens: tokens that one hash id stands for.
    """

    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    hash_ids: np.ndarray | None = None
    hash_starts: np.ndarray | None = None
    block_tokens: int = BLOCK_TOKENS

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return float(self.arrival_s[-1] - self.arrival_s[0])

    def hashes(self, index: int) -> list[int]:
        """Return the hash ids of one request, the partial last block's too."""
        if self.hash_ids is None:
            return []
        start, stop = self.hash_starts[index], self.hash_starts[index + 1]
        return self.hash_ids[start:stop].tolist()

    def keys(self, index: int) -> list[bytes]:
        """Return the hash ids of one request's full blocks as a prefix pool takes them."""
        if self.hash_ids is None:
            return []
        start = self.hash_starts[index]
        full = self.input_tokens[index] // self.block_tokens
        wide = np.zeros((full, 2), "<i8")
        wide[:, 0] = self.hash_ids[start:start + full]
        return wide.view("V16").ravel().tolist()

    def head(self, count: int) -> Trace:
        """Return the first `count` requests."""
        count = min(count, len(self))
        hashes, starts = self.hash_ids, self.hash_starts
        if hashes is not None:
            starts = starts[:count + 1]
            hashes = hashes[:starts[-1]]
        return replace(self, arrival_s=self.arrival_s[:count],
                       input_tokens=self.input_tokens[:count],
                       output_tokens=self.output_tokens[:count],
                       hash_ids=hashes, hash_starts=starts)

    def at_rate(self, rate_rps: float) -> Trace:
        """Return the same requests, their arrivals stretched to this mean rate."""
        if len(self) < 2 or not self.duration_s:
            raise UsageError("a trace whose requests arrive at one instant has no rate to change")
        factor = (len(self) - 1) / rate_rps / self.duration_s
        return replace(self, arrival_s=(self.arrival_s - self.arrival_s[0]) * factor)

    def spread(self, seed: int) -> Trace:
        """Return the same requests, those of one instant spread up to the next one.

        A recorder that rounds arrivals to seconds makes batches that were none.
        """
        instants, counts = np.unique(self.arrival_s, return_counts=True)
        if len(instants) < 2:
            return self
        step = np.diff(instants, append=instants[-1] + np.median(np.diff(instants)))
        random = np.random.default_rng(seed).random(len(self))
        arrival_s = np.repeat(instants, counts) + random * np.repeat(step, counts)
        return replace(self, arrival_s=np.sort(arrival_s))

    def coarser(self, factor: int) -> Trace:
        """Return the trace with blocks of `factor` times the tokens, partial last blocks dropped.

        A hash id stands for its whole prefix, so the last of each `factor` names the larger block.
        """
        if self.hash_ids is None:
            return replace(self, block_tokens=self.block_tokens * factor)
        full = self.input_tokens // self.block_tokens // factor
        starts = np.concatenate(([0], np.cumsum(full)))
        owner = np.repeat(np.arange(len(self)), full)
        within = np.arange(starts[-1]) - starts[owner]
        picked = self.hash_starts[owner] + (within + 1) * factor - 1
        return replace(self, hash_ids=self.hash_ids[picked], hash_starts=starts,
                       block_tokens=self.block_tokens * factor)

    def statistics(self) -> TraceStatistics:
        """Return what compares two traces."""
        reused_blocks = reused_requests = 0
        seen: set[int] = set()
        for index in range(len(self)):
            hashes = self.hashes(index)
            reused = next((number for number, hash_id in enumerate(hashes) if hash_id not in seen),
                          len(hashes))
            seen.update(hashes)
            reused_blocks += reused
            reused_requests += reused > 1
        tokens = self.input_tokens
        blocks = 0 if self.hash_ids is None else len(self.hash_ids)
        return TraceStatistics(
            request_count=len(self),
            rate_rps=(len(self) - 1) / self.duration_s if self.duration_s else 0.0,
            arrivals_per_instant=len(self) / len(np.unique(self.arrival_s)),
            input_tokens_mean=float(tokens.mean()),
            input_tokens_p50=float(np.percentile(tokens, 50)),
            input_tokens_p90=float(np.percentile(tokens, 90)),
            input_tokens_max=int(tokens.max()), output_tokens_mean=float(self.output_tokens.mean()),
            reused_block_share=reused_blocks / blocks if blocks else 0.0,
            reused_request_share=reused_requests / len(self))


def read_trace(path: Path | str) -> Trace:
    """Read a file of JSON lines.

    Raises: UsageError naming the file, the line and the field that is wrong; OSError.
    """
    columns: tuple[list, ...] = ([], [], [], [])
    previous_ms = 0.0
    before: dict[int, tuple[int, int]] = {}  # each hash id's place, and the id before it
    for where, row in _rows(Path(path)):
        values = _checked(where, row)
        if values[0] < previous_ms:
            raise UsageError(f"{where}: timestamp is {values[0]:g}, before the {previous_ms:g} of "
                             "the line above; sort the trace by arrival")
        previous_ms = values[0]
        _check_chain(where, values[3], before)
        for column, value in zip(columns, values):
            column.append(value)
    timestamps, inputs, outputs, hashes = columns
    if not timestamps:
        raise UsageError(f"{path}: no request in it")
    starts = np.concatenate(([0], np.cumsum([len(ids) for ids in hashes])))
    flat = np.fromiter((hash_id for ids in hashes for hash_id in ids), np.int64, starts[-1])
    return Trace(np.array(timestamps, np.float64) / 1e3, np.array(inputs, np.int64),
                 np.array(outputs, np.int64), flat, starts.astype(np.int64))


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:  # a UnicodeDecodeError is one too
                raise UsageError(f"{where}: no JSON: {error}") from None
            except RecursionError:
                raise UsageError(f"{where}: no JSON: nested too deeply") from None
            if not isinstance(row, dict):
                raise UsageError(f"{where}: {_shown(row)} where an object with the fields "
                                 f"{', '.join(_FIELDS)} is expected")
            yield where, row


def _checked(where: str, row: dict) -> tuple[float, int, int, list[int]]:
    for field in _FIELDS:
        if field not in row:
            raise UsageError(f"{where}: the field {field} is missing")
    timestamp = row["timestamp"]
    if type(timestamp) not in (int, float) or not 0 <= timestamp < 1e15:
        raise UsageError(f"{where}: timestamp is {_shown(timestamp)}, expected milliseconds of 0 "
                         "or more")
    for field in ("input_length", "output_length"):
        if type(row[field]) is not int or not 1 <= row[field] <= TOKENS_MAX:
            raise UsageError(f"{where}: {field} is {_shown(row[field])}, expected a whole number "
                             f"of tokens, 1 to {TOKENS_MAX}")
    hashes = row["hash_ids"]
    if not isinstance(hashes, list):
        raise UsageError(f"{where}: hash_ids is {_shown(hashes)}, expected a list of numbers")
    for position, hash_id in enumerate(hashes):
        if type(hash_id) is not int or not 0 <= hash_id <= HASH_ID_MAX:
            raise UsageError(f"{where}: hash_ids[{position}] is {_shown(hash_id)}, expected a "
                             "whole number of 0 or more")
    expected = -(-row["input_length"] // BLOCK_TOKENS)
    if len(hashes) != expected:
        raise UsageError(f"{where}: hash_ids has {len(hashes)} entries, expected {expected} for "
                         f"input_length {row['input_length']} in blocks of {BLOCK_TOKENS}")
    return float(timestamp), row["input_length"], row["output_length"], hashes


def _check_chain(where: str, hashes: list[int], before: dict[int, tuple[int, int]]) -> None:
    """A hash id stands for its whole prefix, so it always follows the same one."""
    previous = -1
    for position, hash_id in enumerate(hashes):
        if before.setdefault(hash_id, (position, previous)) != (position, previous):
            raise UsageError(f"{where}: hash_ids[{position}] is {hash_id}, which followed another "
                             "block on a line above; equal ids must stand for equal prefixes")
        previous = hash_id


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def write_trace(trace: Trace, path: Path | str) -> None:
    """Write what `read_trace` reads.

    Raises: UsageError for a trace without hash ids or with blocks of another length.
    """
    if trace.hash_ids is None or trace.block_tokens != BLOCK_TOKENS:
        raise UsageError(f"a trace file has hash ids of blocks of {BLOCK_TOKENS} tokens")
    with open(path, "w", encoding="utf-8") as file:
        for index in range(len(trace)):
            row = (round(float(trace.arrival_s[index]) * 1e3), int(trace.input_tokens[index]),
                   int(trace.output_tokens[index]), trace.hashes(index))
            file.write(json.dumps(dict(zip(_FIELDS, row))) + "\n")
