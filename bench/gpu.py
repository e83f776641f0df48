"""Times the kernels that copy, code and check caches in device memory, and verifies every result.

    python -m bench.gpu --json FILE [--backend cuda|triton|cpu] [--mib 256 4096]

With cuda, times are those of the kernels by the device's events; with the other back ends, of whole
calls. `share` is of a copy within the same memory in the same run, `gbps` counts raw bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from bench import measure
from kvwire import _native
from kvwire.buffers import Buffer
from kvwire.errors import KvwireError
from kvwire.kernels import backends
from kvwire.kernels.code_plan import CodePlan, Payload
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.narrow import e4m3_of_bf16
from kvwire.layout import CacheSpec, DType, GroupKind, attention
from kvwire.memory import CacheMemory
from kvwire.presets import preset
from kvwire.tiered import CodeTable, Part, element_format

PAGE_BYTES = (4096, 16_384, 65_536)
MODELS = ("kimi-linear-48b", "qwen3.5-397b")
CHUNK_BYTES = 256 * 1024
CHANNELS = 128
SAMPLE_BYTES = 16 << 20
ROUNDS = 5


def content(count: int, dtype: DType) -> np.ndarray:
    """Return `count` bytes like a cache's: Gaussian, a scale for each of 128 channels, repeated."""
    rng = np.random.default_rng(7)
    scale = np.exp2(rng.integers(-3, 4, CHANNELS)).astype(np.float32)
    rows = min(count, SAMPLE_BYTES) // 512 + 1
    values = rng.standard_normal((rows, CHANNELS), np.float32) * scale
    bits = values.view(np.uint32)
    raw = (bits >> 16).astype(np.uint16) if dtype == DType.BF16 else bits
    return np.resize(raw.reshape(-1).view(np.uint8), count)


def address_of(held) -> int:
    if hasattr(held, "address"):
        return held.address
    return held.data_ptr() if hasattr(held, "data_ptr") else held.ctypes.data


class Case:
    """A segment whose pages, or states, lie in the back end's memory."""

    def __init__(self, backend, name: str, page_bytes: int, spec: CacheSpec, tokens: int):
        self.name, self.page_bytes = name, page_bytes
        group = spec.groups[0]
        self.dtype = group.tensors[0].dtype
        pages = -(-tokens // group.block_tokens) if group.block_tokens else 0
        arrays, views, self.held = {}, {}, []
        self.ids = np.random.default_rng(1).permutation(pages)
        for layer in group.layers:
            for tensor in group.tensors:
                shape = [tensor.block_tokens if axis.axis.name == "TOKEN" else axis.held
                         for axis in tensor.axes]
                shape = [pages, *shape] if pages else shape
                width = tensor.dtype.item_bytes
                raw = content(int(np.prod(shape)) * width, tensor.dtype)
                self.held.append(backend.upload(raw))
                strides = [width * int(np.prod(shape[axis + 1:])) for axis in range(len(shape))]
                arrays[layer, tensor.name] = Buffer(address_of(self.held[-1]), tuple(shape),
                                                    tuple(strides), width, f"uint{8 * width}",
                                                    False, self.held[-1])
                views[layer, tensor.name] = raw.reshape(pages, -1)[self.ids] if pages else raw
        memory = CacheMemory(spec, arrays, tokens=tokens, block_ids=self.ids if pages else None,
                             writable=True)
        items = [item for layer in group.layers for item in memory.items(layer)]
        self.plan = CopyPlan.of_items(spec, items, memory, {0: pages} if pages else None)
        names = [(item.layer, group.tensors[item.tensor_index].name) for item in items]
        self.raw = np.concatenate([views[name].reshape(-1) for name in names])

    @property
    def bytes(self) -> int:
        return self.plan.bytes


def cases(backend, mib: list[int], page_bytes: tuple[int, ...], models: tuple[str, ...]):
    for size in mib:
        for page in page_bytes:
            block_tokens = page // 256
            spec = CacheSpec("bench", (attention([0], kv_heads=1, head_dim=128,
                                                 block_tokens=block_tokens),))
            pages = max(1, (size << 20) // (2 * page))
            yield Case(backend, "pages", page, spec, pages * block_tokens)
    for model in models:
        spec = preset(model)
        states = [group for group in spec.groups if group.kind == GroupKind.RECURRENT]
        yield Case(backend, f"states {model}", 0, CacheSpec(model, tuple(states[:1])), 0)


def seconds(backend, work) -> float:
    """Return the least time of some rounds: of kernels where the device tells, else of calls."""
    driver = getattr(backend, "_driver", None)
    best = float("inf")
    for _ in range(ROUNDS):
        if hasattr(driver, "kernel_s"):
            driver.timed, driver.kernel_s = True, 0.0
            work()
            driver.timed = False
            best = min(best, driver.kernel_s)
        else:
            synchronize(backend)
            began = time.perf_counter()
            work()
            synchronize(backend)
            best = min(best, time.perf_counter() - began)
    return best


def synchronize(backend) -> None:
    if backend.name == "triton":
        import torch
        if torch.cuda.is_available():
            torch.cuda.synchronize()


def copy_seconds(backend, target, source) -> float:
    driver = getattr(backend, "_driver", None)
    if hasattr(driver, "copy"):
        return seconds(backend, lambda: driver.copy(target.address, source.address,
                                                    source.bytes))
    if backend.name == "triton":
        return seconds(backend, lambda: target.copy_(source))
    return seconds(backend, lambda: np.copyto(target, source))


def measured(backend, case: Case) -> list[dict]:
    """Return a row for each kernel. A result that is not right is a row that says so."""
    raw, rows = case.raw, []
    source, segment = backend.upload(raw), backend.empty(case.bytes)
    copy_gbps = case.bytes / copy_seconds(backend, segment, source) / 1e9

    def row(what: str, work, verify, ratio: float | None = None) -> None:
        gbps = case.bytes / seconds(backend, work) / 1e9
        rows.append({"case": f"{what}, {case.name}", "backend": backend.name,
                     "page_bytes": case.page_bytes, "bytes": case.bytes, "gbps": round(gbps, 3),
                     "copy_gbps": round(copy_gbps, 3), "share": round(gbps / copy_gbps, 4),
                     "ratio": ratio, "verified": bool(verify())})

    row("pack", lambda: backend.pack(case.plan, segment),
        lambda: (backend.download(segment)[:case.bytes] == raw).all())
    row("unpack", lambda: backend.unpack(case.plan, source), lambda: packed_again(backend, case))
    if case.dtype == DType.BF16:
        narrowed = backend.empty(case.bytes // 2)
        row("pack to e4m3", lambda: backend.pack_e4m3(case.plan, narrowed),
            lambda: (backend.download(narrowed) == e4m3_of_bf16(raw.view(np.uint16))).all())
    if hasattr(backend, "exponent_histogram"):  # Triton's alone
        channels = np.arange(CHANNELS)
        row("histogram", lambda: backend.exponent_histogram(source, case.dtype, channels, CHANNELS),
            lambda: (backend.exponent_histogram(source, case.dtype, channels, CHANNELS)
                     == histogram_of(raw, case.dtype)).all())
    ranges = np.array([(at, min(CHUNK_BYTES, case.bytes - at))
                       for at in range(0, case.bytes, CHUNK_BYTES)], np.int64)
    wanted = [_native.crc32c(raw[at:at + count].tobytes()) for at, count in ranges.tolist()]
    row("crc", lambda: backend.crc32c(ranges, source),
        lambda: backend.crc32c(ranges, source).tolist() == wanted)

    table = CodeTable.of_elements(raw[:1 << 20].tobytes(), case.dtype)
    codes = CodePlan.of_chunks([(at, [Part(count, table)]) for at, count in ranges.tolist()])
    out = backend.empty(codes.out_bytes)
    sizes, crcs = backend.encode(codes, source, out)
    slots = backend.download(out)
    coded = [slots[at:at + size].tobytes() for at, size in zip(codes.chunks[:, 2], sizes)]
    exact = crcs.tolist() == wanted and all(
        _native.tiered_decode(data, count, {}) == raw[at:at + count].tobytes()
        for data, (at, count) in zip(coded, ranges.tolist()) if len(data) < count)
    ratio = round(case.bytes / int(sizes.sum()), 4)
    row("encode", lambda: backend.encode(codes, source, out), lambda: exact, ratio)
    payloads = [Payload(data, int(slot), at, count) for data, slot, (at, count)
                in zip(coded, codes.chunks[:, 2], ranges.tolist()) if len(data) < count]
    if payloads:
        target = backend.upload(raw)  # chunks that went raw are there
        row("decode", lambda: backend.decode(payloads, out, target),
            lambda: (backend.download(target) == raw).all(), ratio)
    return rows


def histogram_of(raw: np.ndarray, dtype: DType) -> np.ndarray:
    """Return how often each exponent occurs in each channel."""
    form = element_format(dtype)
    items = raw.view(f"uint{8 * form.item_bytes}")
    mask = (1 << form.exponent_bits) - 1
    exponents = items >> 8 * form.item_bytes - 1 - form.exponent_bits & mask
    channel = np.arange(len(items), dtype=np.int64) % CHANNELS
    counts = np.bincount(channel << form.exponent_bits | exponents,
                         minlength=CHANNELS << form.exponent_bits)
    return counts.reshape(CHANNELS, -1)


def packed_again(backend, case: Case) -> bool:
    again = backend.empty(case.bytes)
    backend.pack(case.plan, again)
    return bool((backend.download(again)[:case.bytes] == case.raw).all())


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--json", help="where to write rows and machine")
    parser.add_argument("--backend", choices=backends.BACKENDS)
    parser.add_argument("--mib", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--pages", type=int, nargs="+", default=PAGE_BYTES)
    parser.add_argument("--models", nargs="*", default=MODELS, choices=MODELS)
    options = parser.parse_args(given)
    try:
        backend = backends.load(options.backend)
    except KvwireError as error:
        print(f"bench.gpu: {error}", file=sys.stderr)
        return 2
    rows = []
    for case in cases(backend, options.mib, tuple(options.pages), tuple(options.models)):
        for row in measured(backend, case):
            rows.append(row)
            print("{case:28} {backend:7} {page_bytes:6} B pages {bytes:11} B  {gbps:9.2f} GB/s  "
                  "{share:6.3f} of a copy  ratio {ratio}  verified {verified}".format(**row))
    if options.json:
        record = {"machine": measure.machine() | {"backend": backend.name}, "rows": rows}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["verified"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
