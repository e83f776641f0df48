"""Staging on a device: from its pages to pinned memory, and over loopback TCP to pages of it.

    python -m bench.gpu_staging --json FILE [--mib 256] [--page-bytes 65536]

KVWIRE_BACKEND=triton times Triton's kernels there.

Rows as of bench.gpu. `copy_gbps` is the plain copy of the same bytes to pinned memory, by the
clock of the host like all else here; `share` is of that, and end to end of the slowest part: that
copy, or kvwire's own loopback between two buffers of the host, times the code's ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np

import kvwire
from bench import measure
from bench.gpu import content
from kvwire import _native
from kvwire.buffers import Buffer
from kvwire.codec import Codec
from kvwire.errors import KvwireError
from kvwire.kernels.staged_sender import StagedSender
from kvwire.layout import CacheSpec, DType, attention

ROUNDS, WAIT_S = 3, 300
CHUNK_BYTES = 256 << 10


class Pages:
    """Keys and values in shuffled pages of a device, or of the host where `device` is None."""

    def __init__(self, device, mib: int, page_bytes: int, seed: int, filled: bool):
        self.device = device
        count = max(1, (mib << 20) // (2 * page_bytes))
        self.spec = CacheSpec("bench", (attention([0], kv_heads=1, head_dim=128,
                                                  block_tokens=page_bytes // 256),))
        self.ids = np.random.default_rng(seed).permutation(count)
        self.bytes = 2 * count * page_bytes
        self.raw = content(self.bytes, DType.BF16) if filled else np.zeros(self.bytes, np.uint8)
        shape = (count, page_bytes // 256, 1, 128)
        strides = (page_bytes, 256, 256, 2)
        if device is None:
            self.address = self.raw.ctypes.data
        else:
            device.attach()
            self.stream, self.address = device.stream(), device.allocate(self.bytes)
            device.to_device(self.address, self.raw, self.stream)
            device.record(self.stream).wait()
        half = self.bytes // 2
        arrays = {(0, name): Buffer(self.address + at, shape, strides, 2, "uint16", False, self,
                                    None if device is None else "cuda:0")
                  for name, at in (("k", 0), ("v", half))}
        self.memory = kvwire.CacheMemory(self.spec, arrays, tokens=count * page_bytes // 256,
                                         block_ids=self.ids, writable=not filled)

    def tokens(self) -> np.ndarray:
        """Return the bytes in the order of tokens, as they lie there now."""
        if self.device is not None:
            self.device.to_host(self.raw, self.address, self.stream)
            self.device.record(self.stream).wait()
        return self.raw.reshape(2, len(self.ids), -1)[:, self.ids]

    def free(self) -> None:
        if self.device is not None:
            self.device.free(self.address)


class Drain:
    """Stands for a native transfer whose wire is infinitely fast."""

    def __init__(self, codec: Codec, tokens: tuple[int, int]):
        self.codec, self.tokens = codec, tokens
        self.number, self.pushed, self.payload_bytes, self.over = 0, 0, 0, False

    def terms(self):
        return CHUNK_BYTES, 1 | 1 << self.codec, *self.tokens

    def progress(self):
        return 0, 0, 0, True, self.over, None

    def push(self, items, priority, staged):
        self.payload_bytes += sum(count for _, count, _, _ in staged[1])
        self.pushed += 1
        return self.pushed

    def wait_push(self, number, timeout_s):
        return True

    def finish(self, metadata, count):
        self.over = True

    def cancel(self):
        self.over = True

    def wake(self, number):
        """Nobody awaits it."""


def best(work) -> float:
    """Return the least seconds of some rounds."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def copy_seconds(device, source: Pages) -> float:
    room = device.pinned(source.bytes)

    def copy() -> None:
        device.to_host(room, source.address, source.stream)
        device.record(source.stream).wait()
    return best(copy)


def to_host(device, staging, source: Pages, codec: Codec) -> tuple[float, float]:
    """Return seconds and ratio of staging by itself."""
    sender = StagedSender(staging, device, _native.CodeBook())

    def once() -> Drain:
        drain = Drain(codec, source.memory.tokens)
        staged = sender.add(drain, source.memory, source.spec, weakref.WeakMethod(drain.wake))
        push = sender.push(staged, source.memory.items(0), device.engine_event(), 0)
        with sender.changed:
            sender.changed.wait_for(lambda: push.to_hand == 0, WAIT_S)
        if staged.error:
            raise staged.error
        sender.finish(staged, (b"", 0))
        return drain
    ratio = source.bytes / once().payload_bytes
    seconds = best(once)
    sender.close()
    return seconds, ratio


def over_loopback(staging, source: Pages, target: Pages, codec: str) -> tuple[float, bool]:
    """Return seconds of a transfer, and whether every byte is in its place."""
    with kvwire.Receiver(staging=staging) as receiver, \
            kvwire.Sender(receiver.address, codec=codec, staging=staging) as sender:
        def once() -> None:
            ticket = receiver.expect(target.memory)
            sender.send(ticket.id, source.memory)
            ticket.result(WAIT_S)
        once()
        seconds = best(once)
    return seconds, bool((target.tokens() == source.tokens()).all())


def rows(device, mib: int, page_bytes: int, staging) -> list[dict]:
    """Return the rows of one size."""
    source = Pages(device, mib, page_bytes, 1, True)
    target = Pages(device, mib, page_bytes, 2, False)
    plain, emptied = Pages(None, mib, page_bytes, 3, True), Pages(None, mib, page_bytes, 4, False)
    copy_gbps = source.bytes / copy_seconds(device, source) / 1e9
    wire_s, wire_right = over_loopback(staging, plain, emptied, "raw")
    wire_gbps = plain.bytes / wire_s / 1e9
    found = []

    def row(case: str, seconds: float, of_gbps: float, ratio: float, verified: bool) -> None:
        gbps = source.bytes / seconds / 1e9
        found.append({"case": case, "backend": device.backend, "page_bytes": page_bytes,
                      "bytes": source.bytes, "gbps": round(gbps, 3),
                      "copy_gbps": round(copy_gbps, 3), "share": round(gbps / of_gbps, 4),
                      "ratio": round(ratio, 4), "verified": verified})

    row("loopback between host buffers", wire_s, wire_gbps, 1.0, wire_right)
    ways = {"": staging}
    if device.backend == "cuda":
        ways[", mapped"] = replace(staging, maps_ring=True)
    for codec in (Codec.RAW, Codec.TIERED):
        for way, settings in ways.items():
            name = codec.name.lower()
            host_s, ratio = to_host(device, settings, source, codec)
            end_s, right = over_loopback(settings, source, target, name)
            row(f"staging to the host, {name}{way}", host_s, copy_gbps, ratio, right)
            row(f"staging end to end, {name}{way}", end_s, min(copy_gbps, wire_gbps) * ratio, ratio,
                right)
    for pages in (source, target):
        pages.free()
    return found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_staging", description=__doc__)
    parser.add_argument("--json", help="where to write rows and machine")
    parser.add_argument("--mib", type=int, nargs="+", default=[256])
    parser.add_argument("--page-bytes", type=int, nargs="+", default=[4096, 65_536])
    options = parser.parse_args(given)
    try:
        staging = kvwire.Staging()
        device = staging.open("cuda:0")
    except KvwireError as error:
        print(f"bench.gpu_staging: {error}", file=sys.stderr)
        return 2
    found = []
    for mib in options.mib:
        for page_bytes in options.page_bytes:
            for row in rows(device, mib, page_bytes, staging):
                found.append(row)
                print("{case:32} {page_bytes:6} B pages {bytes:11} B  {gbps:9.2f} GB/s  "
                      "{share:6.3f}  ratio {ratio}  verified {verified}".format(**row))
    if options.json:
        record = {"machine": measure.machine() | {"backend": device.backend}, "rows": found}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["verified"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
