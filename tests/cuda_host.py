"""The device functions of kernels/cuda, compiled for the CPU and called with numpy arrays."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

import kvwire.kernels
from kvwire.kernels import crc_math
from kvwire.kernels.code_plan import CodePlan, Payload, ReadPlan
from kvwire.kernels.copy_plan import CopyPlan

SOURCES = Path(kvwire.kernels.__file__).parent / "cuda"
NO_BAD_ENTRY = (1 << 63) - 1
VERBS = ("unpack", "pack", "narrow")  # of kernels/cuda/host.cpp
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined",
         "-fno-sanitize-recover=all", "-shared", "-fPIC"]


@lru_cache(maxsize=1)
def library():
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not here")
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/host.so"
        subprocess.run([*compiler, *FLAGS, SOURCES / "host.cpp", "-o", path], check=True)
        return ctypes.CDLL(path)


def call(function, *args):
    """Arrays go by address, numbers as they are, None as null."""
    plain = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else
             ctypes.c_void_p(None) if a is None else ctypes.c_int64(a) for a in args]
    function.restype = None
    function(*plain)


def aligned(size, fill=0):
    """Return bytes at a multiple of 16."""
    room = np.full(size + 16, fill, np.uint8)
    start = -room.ctypes.data % 16
    return room[start:start + size]


class Host:
    """Runs what the driver runs on a GPU. A segment is an array or a CopyPlan."""

    def __init__(self):
        self.library = library()
        self.bad_entry = np.array([NO_BAD_ENTRY])

    def copy(self, plan: CopyPlan, segment, pack, rows=4, words=64):
        starts = plan.tile_starts(rows, words, plan.word_bytes)
        call(self.library.kvwire_host_copy, int(pack), plan.word_bytes, int(starts[-1]), plan.legs,
             starts, len(plan.legs), plan.block_ids, segment, self.bad_entry, rows, words)

    def _segment(self, segment):
        if isinstance(segment, CopyPlan):
            return None, segment.legs, len(segment.legs), segment.block_ids, self.bad_entry
        return segment, None, 0, None, None

    def encode(self, plan: CodePlan, segment):
        """Return what each slot holds, and the checksum of each chunk."""
        out, tails = aligned(plan.out_bytes + 16, 0xA5), aligned(plan.out_bytes)
        sizes, raw_bytes = np.zeros(len(plan.chunks), np.int64), plan.chunks[:, 1].tolist()
        crcs = np.array([crc_math.beginning(size) for size in raw_bytes], np.uint32)
        call(self.library.kvwire_host_encode, len(plan.chunks), *self._segment(segment),
             plan.chunks, plan.parts, aligned_copy(plan.blob), crc_math.cuda_tables(), out, tails,
             sizes, crcs)
        assert (out[plan.out_bytes:] == 0xA5).all()
        slots = [out[at:at + size].tobytes() for at, size in zip(plan.chunks[:, 2], sizes)]
        return slots, crcs.tolist()

    def decode(self, payloads: list[Payload], coded: bytes, segment, tables=None):
        """Return which chunks are invalid, and the checksum of each as written."""
        plan = ReadPlan.of_payloads(payloads, (tables or {}).get)
        stops = np.array([p.raw_offset + p.raw_bytes for p in payloads], np.int64)
        crcs = np.array([crc_math.beginning(p.raw_bytes) for p in payloads], np.uint32)
        invalid = np.zeros(len(payloads), np.int32)
        for (dtype, tier_bits), numbers in plan.strips_of.items():
            bits = sum(width << 4 * tier for tier, width in enumerate(tier_bits))
            call(self.library.kvwire_host_decode, len(numbers), *self._segment(segment),
                 aligned_copy(coded), plan.strips, numbers, dtype, bits,
                 aligned_copy(plan.blob), crc_math.cuda_tables(), stops, crcs, invalid)
        return invalid.tolist(), crcs.tolist()

    def crc(self, chunks, segment):
        crcs = np.array([crc_math.beginning(size) for _, size in chunks], np.uint32)
        call(self.library.kvwire_host_crc, len(chunks), *self._segment(segment),
             np.array(chunks, np.int64), crc_math.cuda_tables(), crcs)
        return crcs.tolist()


def aligned_copy(data):
    data = np.frombuffer(data, np.uint8)
    room = aligned(len(data))
    room[:] = data
    return room
