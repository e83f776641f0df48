"""How fast the prefix-cache pool is, what its eviction keeps, and how near SSD is to the disk.

    python -m bench.prefix_pool [--json FILE] [--trace FILE] [--folder DIR] [--cases pool,...]

- pool:  a pool of a million blocks, full: microseconds of a hit (lease and release), an insertion
         (with room, and with what has to go first) and an eviction, per block and per call; and a
         match in the embedded index.
- trace: what LRU and the cost-aware policy save on a trace of requests in the format of
         Mooncake's (JSON lines, `input_length` and `hash_ids` of 512 tokens), in memory and, by
         `SsdTier`'s accounts without its files, on SSD ("ssd trace").
- admission: what rules for writing to SSD save, and how much they write, below memory of a tenth of
         its size, on a generated trace of conversations.
- ssd:   runs of a real geometry through `SsdTier`, against plain writes and reads of as many bytes
         in the same folder and round, through the page cache and past it (O_DIRECT, two pieces at
         once): the share is of the faster. Nothing is left of the page cache before reads.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import kvwire
from bench.measure import machine, progress
from kvwire.prfaas.pool.admission import AdmissionPolicy, CostPerByte
from kvwire.prfaas.pool.blocks import BlockGeometry, Chain
from kvwire.prfaas.pool.eviction import CostAware, EvictionPolicy, Lru
from kvwire.prfaas.pool.host_tier import HostTier
from kvwire.prfaas.pool.metadata import EmbeddedIndex
from kvwire.prfaas.pool.pool import PrefixPool
from kvwire.prfaas.pool.ssd_tier import SsdTier
from kvwire.prfaas.simulator import generator

POOL_BLOCKS = 1_000_000
CHAIN_BLOCKS = 24        # 12K tokens in blocks of 512, the mean of Mooncake's trace
TRACE_TOKENS = 512
_PIECE_BYTES = 4 << 20

# Seconds of prefill by tokens: arXiv 2604.15039, Table 5, from a floor at 0.
PREFILL_POINTS = ((0, 0.41), (1024, 0.44), (8192, 0.72), (32_000, 1.84), (130_000, 7.40))
MODELS = {  # bytes per token, bytes of states
    "prfaas-1t": (17_280, 182_353_920),
    "qwen3.5-397b": (30_720, 183 << 20),
    "attention only": (122_880, 0),
}
TRACE_CAPACITIES_GB = (100, 300, 1000)
SSD_CAPACITIES_GB = (300, 1000, 3000)

ADMISSION_REQUESTS = 6000
ADMISSION_CAPACITIES_GB = 50, 500  # memory, SSD
S_PER_GB_MINS = (0.1, 0.25, 0.5, 1.0, 2.0)


def prefill_s(cached: int, total: int) -> float:
    return _at(total) - _at(cached)


def _at(tokens: int) -> float:
    place = min(max(bisect_right(PREFILL_POINTS, (tokens, 0.0)), 1), len(PREFILL_POINTS) - 1)
    (x0, y0), (x1, y1) = PREFILL_POINTS[place - 1:place + 1]
    return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)


def policies() -> dict[str, EvictionPolicy]:
    return {"lru": Lru(), "cost-aware": CostAware(prefill_s)}


# ---- pool

def pool_rows(blocks: int, samples: int) -> Iterator[dict]:
    for model in ("attention only", "prfaas-1t"):
        geometry = BlockGeometry.of_sizes(TRACE_TOKENS, *MODELS[model])
        for label, policy in policies().items():
            for row in _pool_rows(geometry, policy, blocks, samples):
                progress(f"pool: {model}, {label}, {row['operation']}")
                yield {"case": "pool", "model": model, "policy": label} | row
    yield from _index_rows(blocks, samples)


def _pool_rows(geometry: BlockGeometry, policy: EvictionPolicy, blocks: int, samples: int
               ) -> Iterator[dict]:
    rng = random.Random(1)
    pool, chains = PrefixPool(geometry, blocks, policy=policy), []
    while pool.stats().free_blocks >= CHAIN_BLOCKS + geometry.state_blocks:
        chains.append(_chain(rng))
        pool.insert(chains[-1])
    asked = rng.sample(chains, min(samples, len(chains)))
    fresh = [_chain(rng) for _ in range(2 * samples)]
    unit = CHAIN_BLOCKS + geometry.state_blocks

    def hit(number: int) -> None:
        pool.lease(asked[number % len(asked)]).release()

    steps = {"hit": hit, "insert into a full pool": lambda i: pool.insert(fresh[i]),
             "evict": lambda i: pool.evict(unit),
             "insert": lambda i: pool.insert(fresh[samples + i])}
    for operation, step in steps.items():
        yield _timed(operation, blocks, step, samples)


def _index_rows(blocks: int, samples: int) -> Iterator[dict]:
    index, rng, chains = EmbeddedIndex(), random.Random(2), []
    for number in range(blocks // CHAIN_BLOCKS):
        chains.append(_chain(rng))
        for node in rng.sample(range(8), 1 + number % 2):
            index.publish(f"cluster/{node}", Chain(b"", chains[-1][0]), chains[-1],
                          chains[-1][-1:])
    asked = rng.sample(chains, min(samples, len(chains)))
    yield {"case": "pool", "model": "", "policy": ""} | _timed(
        "match in the embedded index", blocks,
        lambda i: index.match(b"", asked[i % len(asked)]), samples)


def _chain(rng: random.Random) -> list[bytes]:
    return [rng.randbytes(16) for _ in range(CHAIN_BLOCKS)]


def _timed(operation: str, blocks: int, step: Callable[[int], object], samples: int) -> dict:
    times = []
    for number in range(samples):
        start = time.perf_counter()
        step(number)
        times.append((time.perf_counter() - start) * 1e6)
    times.sort()
    middle = statistics.median(times)
    return {"operation": operation, "pool_blocks": blocks, "blocks_per_call": CHAIN_BLOCKS,
            "us_per_block_median": round(middle / CHAIN_BLOCKS, 3),
            "us_per_call_median": round(middle, 2),
            "us_per_call_p99": round(times[int(0.99 * len(times))], 2)}


# ---- trace

def trace_rows(path: Path) -> Iterator[dict]:
    prompts = list(_prompts(path))
    all_tokens = sum(tokens for _, tokens in prompts)
    all_s = sum(prefill_s(0, tokens) for _, tokens in prompts)
    for model, sizes in MODELS.items():
        geometry = BlockGeometry.of_sizes(TRACE_TOKENS, *sizes)
        for capacity_gb in TRACE_CAPACITIES_GB:
            for label, policy in policies().items():
                pool = PrefixPool(geometry, int(capacity_gb * 1e9) // geometry.block_bytes,
                                  policy=policy)
                tokens, seconds = _replay(pool, prompts)
                progress(f"trace: {model}, {capacity_gb} GB, {label}")
                yield {"case": "trace", "model": model, "capacity_gb": capacity_gb,
                       "policy": label, "token_hit_ratio": round(tokens / all_tokens, 4),
                       "prefill_s_saved": round(seconds, 1), "prefill_s_all": round(all_s, 1)}


def ssd_trace_rows(path: Path) -> Iterator[dict]:
    """Yield what files alone save on the trace, which an SSD that reads at once would give."""
    prompts = list(_prompts(path))
    all_tokens = sum(tokens for _, tokens in prompts)
    for model, sizes in MODELS.items():
        geometry = BlockGeometry.of_sizes(TRACE_TOKENS, *sizes)
        for capacity_gb in SSD_CAPACITIES_GB:
            for label, policy in policies().items():
                with tempfile.TemporaryDirectory() as folder:
                    tier = _SsdAccounts(folder, bytes(8), geometry, int(capacity_gb * 1e9),
                                        policy=policy)
                    tokens, seconds = _replay_ssd(tier, prompts)
                    tier.close()
                progress(f"ssd trace: {model}, {capacity_gb} GB, {label}")
                yield {"case": "ssd trace", "model": model, "capacity_gb": capacity_gb,
                       "policy": label, "token_hit_ratio": round(tokens / all_tokens, 4),
                       "prefill_s_saved": round(seconds, 1)}


class _SsdAccounts(SsdTier):
    """An `SsdTier` whose files have sizes, and nothing else."""

    saved_bytes = 0

    def _save(self, run, memory):
        blocks = len(run.hashes) + run.state * self.geometry.state_blocks
        self.saved_bytes += blocks * self.geometry.block_bytes
        return blocks * self.geometry.block_bytes

    def _read_run(self, run, memory, start, stop):
        pass


def _replay_ssd(tier: SsdTier, prompts: list[tuple[list[bytes], int]]) -> tuple[int, float]:
    tokens, seconds = 0, 0.0
    for hashes, _ in prompts:
        held = tier.match(hashes, b"")
        if held.usable_tokens:
            tokens += held.usable_tokens
            seconds += prefill_s(0, held.usable_tokens)
            tier.read(hashes[:held.usable_tokens // TRACE_TOKENS], b"", 0, lambda *run: None)
        ends = {held.kv_blocks, len(hashes)} - {0} if tier.geometry.state_blocks else ()
        tier.write(hashes, b"", sorted(ends), lambda *run: None)
    return tokens, seconds


def _replay(pool: PrefixPool, prompts: list[tuple[list[bytes], int]]) -> tuple[int, float]:
    tokens, seconds = 0, 0.0
    for hashes, _ in prompts:
        with pool.lease(hashes) as lease:
            tokens += lease.tokens
            seconds += prefill_s(0, lease.tokens)
            pool.insert(hashes, checkpoints=pool.boundaries(hashes) or None)
    return tokens, seconds


def _prompts(path: Path) -> Iterator[tuple[list[bytes], int]]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            request = json.loads(line)
            tokens, ids = int(request["input_length"]), request["hash_ids"]
            hashes = [int(name).to_bytes(16, "little") for name in ids[:tokens // TRACE_TOKENS]]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise SystemExit(f"{path}, line {number}: {type(error).__name__}: {error}") from None
        if hashes:
            yield hashes, tokens


# ---- admission

def admission_rows(requests: int) -> Iterator[dict]:
    """Yield what each rule has written, and what memory and files then save together."""
    trace = generator.session_trace(generator.CONVERSATION, requests, 3.4, 1)
    prompts = [hashes for hashes in map(trace.keys, range(len(trace))) if hashes]
    rules: dict[str, AdmissionPolicy | None] = {"all": None, "second use": None, "none": None}
    rules |= {f"{least:g} s/GB": CostPerByte(prefill_s, s_per_gb_min=least)
              for least in S_PER_GB_MINS}
    memory_gb, ssd_gb = ADMISSION_CAPACITIES_GB
    for model, sizes in MODELS.items():
        geometry = BlockGeometry.of_sizes(TRACE_TOKENS, *sizes)
        for label, admission in rules.items():
            pool = PrefixPool(geometry, int(memory_gb * 1e9) // geometry.block_bytes,
                              policy=CostAware(prefill_s))
            with tempfile.TemporaryDirectory() as folder:
                tier = _SsdAccounts(folder, bytes(8), geometry,
                                    0 if label == "none" else int(ssd_gb * 1e9),
                                    policy=CostAware(prefill_s), admission=admission)
                seconds = _replay_both(pool, tier, prompts, at_hits=label == "second use")
                tier.close()
            progress(f"admission: {model}, {label}")
            yield {"case": "admission", "model": model, "memory_gb": memory_gb, "ssd_gb": ssd_gb,
                   "rule": label, "written_gb": round(tier.saved_bytes / 1e9, 1),
                   "prefill_s_saved": round(seconds, 1)}


def _replay_both(pool: PrefixPool, tier: SsdTier, prompts: list[list[bytes]], at_hits: bool
                 ) -> float:
    """Return the prefill seconds saved. Prefixes are offered to the files when they are committed,
    or `at_hits`, when they are found in memory."""
    seconds, with_states = 0.0, bool(tier.geometry.state_blocks)

    def write(hashes: list[bytes]) -> None:
        tier.write(hashes, b"", (len(hashes),) if with_states else (), lambda *run: None)

    for hashes in prompts:
        on_ssd = tier.match(hashes, b"").usable_tokens
        if on_ssd > pool.match(hashes).usable_tokens:
            found = hashes[:on_ssd // TRACE_TOKENS]
            tier.read(found, b"", 0, lambda *run: None)
            pool.insert(found)
        with pool.lease(hashes) as lease:
            seconds += prefill_s(0, lease.tokens)
            if at_hits and lease.tokens:
                write(hashes[:lease.blocks])
            checkpoints = pool.boundaries(hashes)
            pool.insert(hashes, checkpoints=checkpoints or None)
        for depth in () if at_hits else sorted({*checkpoints, len(hashes)}):
            write(hashes[:depth])
    return seconds


# ---- SSD

def ssd_rows(folder: str | None, rounds: int, run_blocks: int, pause_s: float) -> Iterator[dict]:
    spec = kvwire.CacheSpec.preset("kimi-linear-48b")
    host = HostTier(spec, 320, 2 * (run_blocks + 30))
    geometry = host.geometry
    rng = np.random.default_rng(1)
    bytes_of_host = np.frombuffer(host._memory, np.uint8)
    for at in range(0, bytes_of_host.size, 1 << 26):
        piece = bytes_of_host[at:at + (1 << 26)]
        piece[...] = rng.integers(0, 256, piece.size, np.uint8)
    slots = list(range(run_blocks + geometry.state_blocks))
    targets = [slot + len(slots) for slot in slots]
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for number in range(rounds + 1):  # the first is a warm-up
            taken, run_bytes = _ssd_round(Path(place), host, slots, targets, run_blocks, number,
                                          pause_s)
            progress(f"ssd: round {number} of {rounds}")
            for name, seconds in taken.items() if number else ():
                found.setdefault(name, []).append(seconds)
    for way in ("write", "read"):
        yield {"case": "ssd", "operation": way, "run_bytes": run_bytes, "rounds": rounds,
               **_ssd_row(way, found, run_bytes / 1e9), "verified": True}


def _ssd_row(way: str, found: dict[str, list[tuple[float, float]]], run_gb: float) -> dict:
    """Compare the tier with the plain way that is the faster one in the median."""
    wall_s = {name.removeprefix(f"{way} "): [wall for wall, _ in taken]
              for name, taken in found.items() if name.startswith(way)}
    tier_s = wall_s.pop("tier")
    best = min(wall_s, key=lambda name: statistics.median(wall_s[name]))
    rates = {f"disk_{name}_gbps": round(run_gb / statistics.median(taken), 3)
             for name, taken in wall_s.items()}
    cpu_s = statistics.median(cpu for _, cpu in found[f"{way} tier"])
    return {**rates, "disk": best, "tier_gbps": round(run_gb / statistics.median(tier_s), 3),
            "share": round(statistics.median(plain / tier for plain, tier
                                             in zip(wall_s[best], tier_s)), 3),
            "tier_cpu_s_per_gb": round(cpu_s / run_gb, 3)}


def _ssd_round(place: Path, host: HostTier, slots: list[int], targets: list[int], blocks: int,
               number: int, pause_s: float) -> tuple[dict[str, tuple[float, float]], int]:
    """Return the seconds, and CPU seconds, of each way, and the bytes that each moved."""
    geometry, taken = host.geometry, {}
    stop = blocks * geometry.block_tokens
    # The same folders in all rounds: a virtual disk takes blocks faster that it has seen before.
    tier = SsdTier(place / "tier", host.spec.fingerprint(), geometry, 1 << 40)
    hashes = [bytes(8) + index.to_bytes(8, "little") for index in range(blocks)]
    source = host.memory(slots[:blocks], (0, stop), slots[blocks:])
    target = host.memory(targets[:blocks], (0, stop), targets[blocks:], writable=True)
    data = memoryview(host._memory)[:source.bytes]
    into = memoryview(mmap.mmap(-1, source.bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    into[:] = data  # its pages are there, as the tier's are
    plain = {name: place / name for name in ("buffered", "direct")}

    def tier_write() -> None:
        tier.write(hashes, b"t", (blocks,), lambda low, high, state: source)

    def tier_read() -> None:
        tier.read(hashes, b"t", 0, lambda low, high, state: target)

    writes = {"write buffered": lambda: _write_buffered(plain["buffered"], data),
              "write direct": lambda: _write_direct(plain["direct"], data),
              "write tier": tier_write}
    reads = {"read buffered": lambda: _read_buffered(plain["buffered"], into),
             "read direct": lambda: _read_direct(plain["direct"], into), "read tier": tier_read}
    for steps in (writes, reads):
        order = list(steps.items())
        for name, step in order[number % 3:] + order[:number % 3]:
            _forget_pages(place)
            time.sleep(pause_s)
            start, cpu = time.perf_counter(), time.process_time()
            step()
            taken[name] = time.perf_counter() - start, time.process_time() - cpu
    _check_same(host, slots, targets, blocks)
    tier.close()
    for path in [*plain.values(), *place.rglob("*.kvc")]:
        path.unlink()
    return taken, source.bytes


def _check_same(host: HostTier, slots: list[int], targets: list[int], blocks: int) -> None:
    same = all((array[slots[:blocks]] == array[targets[:blocks]]).all()
               for array in host._arrays.values())
    same &= all((host._state_array(key, slots[blocks:])
                 == host._state_array(key, targets[blocks:])).all() for key in host._states)
    if not same:
        raise SystemExit("what was read from SSD is not what was written")
    for array in host._arrays.values():
        array[targets[:blocks]] = 0


def _write_buffered(path: Path, data: memoryview) -> None:
    with open(path, "wb", buffering=0) as file:
        for at in range(0, len(data), _PIECE_BYTES):
            file.write(data[at:at + _PIECE_BYTES])
        os.fsync(file.fileno())


def _write_direct(path: Path, data: memoryview) -> None:
    _direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, data,
            lambda fd, piece, at: os.pwrite(fd, piece, at))


def _read_buffered(path: Path, into: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        at = 0
        while at < len(into):
            at += file.readinto(into[at:at + _PIECE_BYTES])


def _read_direct(path: Path, into: memoryview) -> None:
    _direct(path, os.O_RDONLY, into, lambda fd, piece, at: os.preadv(fd, [piece], at))


def _direct(path: Path, flags: int, data: memoryview,
            step: Callable[[int, memoryview, int], int]) -> None:
    """Move whole pages past the page cache, two pieces at once."""
    fd = os.open(path, flags | os.O_DIRECT)
    pages = len(data) // mmap.PAGESIZE * mmap.PAGESIZE
    with ThreadPoolExecutor(2) as threads:
        moved = threads.map(lambda at: step(fd, data[at:min(at + _PIECE_BYTES, pages)], at),
                            range(0, pages, _PIECE_BYTES))
        if sum(moved) != pages:
            raise SystemExit(f"{path}: the disk did not take or give {pages} bytes")
    os.fsync(fd)
    os.close(fd)


def _forget_pages(place: Path) -> None:
    """Put what is written on the disk, and drop it from the page cache."""
    for path in place.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prefix_pool", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--trace", metavar="FILE", type=Path)
    parser.add_argument("--folder", metavar="DIR", help="on the disk to measure")
    parser.add_argument("--cases", default="pool,trace,admission,ssd", metavar="CASE,...")
    parser.add_argument("--blocks", type=int, default=POOL_BLOCKS, help="of the full pool")
    parser.add_argument("--samples", type=int, default=2000, help="calls of each operation")
    parser.add_argument("--requests", type=int, default=ADMISSION_REQUESTS,
                        help="of the trace for admission (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of SSD writes and reads")
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS", help="before each "
                        "of them, where a disk lends a burst that the first would use up")
    parser.add_argument("--run-blocks", type=int, default=100, help="of 320 tokens, in a file")
    options = parser.parse_args(arguments)
    cases = options.cases.split(",")
    if unknown := set(cases) - {"pool", "trace", "admission", "ssd"}:
        parser.error(f"--cases: {', '.join(sorted(unknown))} are not known")
    rows = []
    if "pool" in cases:
        rows += pool_rows(options.blocks, options.samples)
    if "trace" in cases and options.trace is not None:
        rows += [*trace_rows(options.trace), *ssd_trace_rows(options.trace)]
    if "admission" in cases:
        rows += admission_rows(options.requests)
    if "ssd" in cases:
        rows += ssd_rows(options.folder, options.rounds, options.run_blocks, options.pause)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items() if value != ""))
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
