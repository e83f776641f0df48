"""What bench.gpu is compared with, by torch: index_select, that and .cpu(), SplitZip's code; how
much packing beside it slows a matrix product.

    python -m bench.gpu_peers --json FILE [--mib 256] [--page-bytes 4096 16384 65536]

Rows as of bench.gpu; `copy_gbps` is a copy within the device. Of the product `share` is its rate
beside staging over that alone, `gbps` how fast staging then was.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import numpy as np

from bench import measure
from bench.gpu import content
from kvwire.layout import DType

ROUNDS = 5
PRODUCT_WIDTH, PRODUCT_S = 4096, 2.0


def seconds(torch, device: str, work) -> float:
    """Return the least time of some rounds, the device's queue drained before and after."""
    drained = torch.cuda.synchronize if device != "cpu" else lambda: None
    best = float("inf")
    for _ in range(ROUNDS):
        drained()
        began = time.perf_counter()
        work()
        drained()
        best = min(best, time.perf_counter() - began)
    return best


def rows(torch, device: str, raw_bytes: int, page_bytes: int) -> list[dict]:
    """Return the rows of one size."""
    from bench import splitzip
    raw = content(raw_bytes, DType.BF16)
    count = raw.nbytes // page_bytes
    ids = np.random.default_rng(1).permutation(count)
    pages = torch.from_numpy(raw.reshape(count, page_bytes)).to(device)
    wanted = raw.reshape(count, page_bytes)[ids]
    index = torch.from_numpy(ids).to(device)
    room = torch.empty_like(pages)
    copy_gbps = raw.nbytes / seconds(torch, device, lambda: room.copy_(pages)) / 1e9
    found = []

    def row(case: str, work, verify, ratio: float = 1.0) -> None:
        gbps = raw.nbytes / seconds(torch, device, work) / 1e9
        found.append({"case": case, "backend": "torch", "page_bytes": page_bytes,
                      "bytes": raw.nbytes, "gbps": round(gbps, 3),
                      "copy_gbps": round(copy_gbps, 3), "share": round(gbps / copy_gbps, 4),
                      "ratio": round(ratio, 4), "verified": bool(verify())})

    row("index_select", lambda: torch.index_select(pages, 0, index, out=room),
        lambda: (room.cpu().numpy() == wanted).all())
    row("index_select and .cpu()", lambda: torch.index_select(pages, 0, index).cpu(),
        lambda: (torch.index_select(pages, 0, index).cpu().numpy() == wanted).all())
    codes, top = (torch.from_numpy(each).to(device) for each in splitzip.calibrated(
        raw[:1 << 20].view(np.uint16)))
    elements = pages.view(-1).view(torch.int16)
    decoded = torch.empty_like(elements)
    coded = splitzip.encode(elements, codes)
    ratio = raw.nbytes / coded.bytes
    row("SplitZip encode", lambda: splitzip.encode(elements, codes), lambda: True, ratio)
    row("SplitZip decode", lambda: splitzip.decode(coded, top, decoded),
        lambda: torch.equal(decoded, elements), ratio)
    found[-2]["verified"] = found[-1]["verified"]
    return found


def beside_a_product(torch, mib: int, page_bytes: int) -> dict:
    """Return the row of a matrix product while staging packs and codes beside it."""
    import kvwire
    from bench.gpu_staging import Pages, to_host
    from kvwire.codec import Codec
    staging = kvwire.Staging()
    device = staging.open("cuda:0")
    source = Pages(device, mib, page_bytes, 1, True)
    a, b = (torch.randn(PRODUCT_WIDTH, PRODUCT_WIDTH, device="cuda", dtype=torch.bfloat16)
            for _ in range(2))

    def products_per_s() -> float:
        torch.cuda.synchronize()
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < PRODUCT_S:
            for _ in range(20):
                torch.matmul(a, b)
            torch.cuda.synchronize()
            count += 20
        return count / (time.perf_counter() - began)

    wanted = torch.matmul(a, b)
    products_per_s()
    alone, times, stop = products_per_s(), [], threading.Event()

    def pack() -> None:
        while not stop.is_set():
            times.append(to_host(device, staging, source, Codec.TIERED))
    packing = threading.Thread(target=pack)
    packing.start()
    beside = products_per_s()
    stop.set()
    packing.join()
    source.free()
    best_s, ratio = min(times)
    exact = torch.equal(torch.matmul(a, b), wanted) and {each for _, each in times} == {ratio}
    return {"case": "matrix product beside staging", "backend": device.backend,
            "page_bytes": page_bytes,
            "bytes": source.bytes, "gbps": round(source.bytes / best_s / 1e9, 3),
            "copy_gbps": None, "share": round(beside / alone, 4), "ratio": round(ratio, 4),
            "verified": exact}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_peers", description=__doc__)
    parser.add_argument("--json", help="where to write rows and machine")
    parser.add_argument("--mib", type=int, nargs="+", default=[256])
    parser.add_argument("--page-bytes", type=int, nargs="+", default=[4096, 16_384, 65_536])
    options = parser.parse_args(given)
    try:
        import torch
        import triton  # noqa: F401
    except ImportError as error:
        print(f"bench.gpu_peers: {error}; pip install kvwire[triton]", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("bench.gpu_peers: torch finds no CUDA device", file=sys.stderr)
        return 2
    found = [row for mib in options.mib for page in options.page_bytes
             for row in rows(torch, "cuda", mib << 20, page)]
    found.append(beside_a_product(torch, min(options.mib), 65_536))
    for row in found:
        print("{case:30} {page_bytes:6} B pages {bytes:11} B  {gbps:9.2f} GB/s  {share:6.3f}  "
              "ratio {ratio}  verified {verified}".format(**row))
    if options.json:
        record = {"machine": measure.machine() | {"backend": "torch"}, "rows": found}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(row["verified"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
