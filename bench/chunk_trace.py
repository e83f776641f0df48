"""``python -m bench.chunk_trace``: what a chunk's way costs, and what split-send could save of it.

Split-send (UCCL-Zip, arXiv 2604.17172) sends the verbatim plane of a chunk while its exponents are
still being coded. Nothing can be decoded without the exponents, and while one chunk is on the wire
the next is coded anyway. So at most the coding of the first chunk is saved, once per transfer.
"""

from __future__ import annotations

import argparse
import sys
from functools import reduce

from bench import kv_sample, tensors
from bench.codecs import CHUNK_BYTES, Level, Result, Tiered
from kvwire.errors import UsageError

__all__ = ["lines", "main"]

RATES_GBIT = (1, 5, 10)
PAYLOAD_SHARE = 1448 / 1538  # of Ethernet's rate, in full segments
TRANSFER_BYTES = 64 << 20
LEVEL = Level("memory", 64 << 20, 1, 5)


def lines(encode_s: float, decode_s: float, ratio: float) -> list[str]:
    """Return the table, from the seconds that one chunk takes a core and what it shrinks by."""
    found = [f"{'of a chunk, us:':16}{'encode':>8}{'wire':>8}{'decode':>8}{'all':>8}"
             f"{'saved at most':>15}{'of all':>9}{'of 64 MiB':>11}"]
    for rate in RATES_GBIT:
        wire_s = CHUNK_BYTES / ratio * 8e-9 / (rate * PAYLOAD_SHARE)
        chunk_s = encode_s + wire_s + decode_s
        slowest_s = max(encode_s, wire_s, decode_s)
        transfer_s = chunk_s + (TRANSFER_BYTES / CHUNK_BYTES - 1) * slowest_s
        saved_s = min(encode_s, wire_s)
        shown = (encode_s, wire_s, decode_s, chunk_s)
        times = "".join(f"{seconds * 1e6:8.0f}" for seconds in shown)
        found.append(f"{f'{rate} Gbit/s':16}{times}{saved_s * 1e6:15.0f}{saved_s / chunk_s:9.1%}"
                     f"{saved_s / transfer_s:11.2%}")
    return found


def main(given: list[str] | None = None) -> int:
    argparse.ArgumentParser("python -m bench.chunk_trace",
                            description=__doc__.partition("\n")[0]).parse_args(given)
    try:
        folder = kv_sample.make()
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    kv = [tensor for tensor in tensors.load(folder)
          if f"{tensor.name}.npy" in (kv_sample.KEYS, kv_sample.VALUES)]
    done = reduce(Result.__add__, (Tiered(None).measure(tensor, LEVEL) for tensor in kv))
    chunks = done.raw_bytes / CHUNK_BYTES
    print("\n".join(lines(done.encode_s / chunks, done.decode_s / chunks, done.ratio)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
