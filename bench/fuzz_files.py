"""Cache files, damaged at random and with their checksums made right again: every one is read, or
refused with a typed error."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from bench.build import ROOT
from kvwire.checksum import crc32c
from kvwire.errors import KvwireError
from kvwire.files import load

__all__ = ["damaged", "run"]

VECTORS = ROOT / "tests" / "vectors"
FINDINGS = ROOT / ".build" / "fuzz" / "findings"
GREETING_BYTES = HEADER_BYTES = 64
PAYLOAD_CRC, HEADER_CRC, GREETING_CRC = 48, 60, 60
ODD_NUMBERS = [0, 1, 2, 3, 64, 96, 4095, 4096, 65536, 1 << 24, (1 << 32) - 1, 1 << 40, 1 << 63,
               (1 << 64) - 1]


def sources() -> list[bytes]:
    """Every vector that is a cache file, good or bad."""
    paths = [*VECTORS.glob("valid/cache_file*.bin"), *VECTORS.glob("invalid/file_*.bin")]
    return [path.read_bytes() for path in sorted(paths)]


def frame_offsets(data: bytes) -> list[int]:
    offsets, at = [], GREETING_BYTES
    while at + HEADER_BYTES <= len(data):
        offsets.append(at)
        at += HEADER_BYTES + int.from_bytes(data[at + 4:at + 8], "little")
    return offsets


def put(data: bytearray, at: int, value: int, width: int) -> None:
    data[at:at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")


def seal(data: bytearray, at: int) -> None:
    """Make the checksums of the frame at `at` right, as far as it lies within the file."""
    payload_bytes = int.from_bytes(data[at + 4:at + 8], "little")
    payload = bytes(data[at + HEADER_BYTES:at + HEADER_BYTES + payload_bytes])
    put(data, at + PAYLOAD_CRC, crc32c(payload), 4)
    put(data, at + HEADER_CRC, crc32c(bytes(data[at:at + HEADER_CRC])), 4)


def damaged(source: bytes, choose: random.Random) -> bytes:
    """Return `source` with one to three things changed."""
    data = bytearray(source)
    for _ in range(choose.randint(1, 3)):
        offsets = frame_offsets(data)
        if not offsets:
            return bytes(data)
        at = choose.choice(offsets)
        stop = min(len(data), at + HEADER_BYTES + int.from_bytes(data[at + 4:at + 8], "little"))
        kind = choose.randrange(16)
        if kind == 0:
            del data[choose.randrange(len(data)):]
        elif kind == 1:
            data[at:at] = data[at:stop]
        elif kind == 2:
            del data[at:stop]
        elif kind == 3:
            data[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
        elif kind == 4:
            put(data, choose.randrange(GREETING_BYTES), choose.choice(ODD_NUMBERS), 2)
            put(data, GREETING_CRC, crc32c(bytes(data[:GREETING_CRC])), 4)
        else:
            first = at if choose.random() < 0.3 or stop == at + HEADER_BYTES else at + HEADER_BYTES
            value = choose.choice([*ODD_NUMBERS, choose.getrandbits(8), choose.choice(offsets)])
            put(data, choose.randrange(first, stop), value, choose.choice([1, 2, 4, 8]))
            seal(data, at)
    return bytes(data)


def run(seconds: float, seed: int) -> tuple[int, list[str]]:
    """Return how many files were read; ends early at one that breaks the reader, with its name."""
    choose, start, executions, findings = random.Random(seed), time.monotonic(), 0, []
    originals = sources()
    file = os.memfd_create("cache")
    try:
        while time.monotonic() - start < seconds and not findings:
            data = damaged(choose.choice(originals), choose)
            os.ftruncate(file, 0)
            os.pwrite(file, data, 0)
            executions += 1
            try:
                load(f"/proc/self/fd/{file}")
            except KvwireError:
                pass
            except Exception as error:  # whatever else comes out is the finding
                findings.append(keep(data, error))
    finally:
        os.close(file)
    return executions, findings


def keep(data: bytes, error: Exception) -> str:
    FINDINGS.mkdir(parents=True, exist_ok=True)
    path: Path = FINDINGS / f"file-{crc32c(data):08x}"
    path.write_bytes(data)
    return f"{path.name} ({type(error).__name__}: {error})"
