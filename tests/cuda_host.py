"""The kernels of kernels/cuda on the CPU, called with numpy arrays: tests/simt plays the GPU."""

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
from kvwire.kernels.cuda_backend import decoder_of
from kvwire.kernels.driver import THREADS

SOURCES = Path(kvwire.kernels.__file__).parent / "cuda"
SIMT = Path(__file__).parent / "simt"
NO_BAD_ENTRY = (1 << 63) - 1
VERBS = ("unpack", "pack", "narrow")
FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         "-fsanitize=undefined", "-fno-sanitize-recover=all", "-shared", "-fPIC"]


def build(target, *sources, kernels=SOURCES, races=False):
    """Compile CUDA sources, and what they need of tests/simt, into a shared library.

    Args:
        races: have each touch of memory looked at; a launch takes some ten times as long.
    """
    compiler = os.environ.get("CXX", "g++").split()
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"{compiler[0]} is not here")
    command = [*compiler, *FLAGS, "-I", kernels, "-I", SIMT, "-include", SIMT / "simt.hpp"]
    with tempfile.TemporaryDirectory() as folder:
        if races:  # objects first: the sanitizer's own library is to be left out
            objects = [f"{folder}/{number}.o" for number in range(len(sources))]
            for source, made in zip(sources, objects):
                subprocess.run([*command, "-fsanitize=thread", "-c", "-x", "c++", source, "-o",
                                made], check=True)
            sources = [*objects, SIMT / "races.cpp"]
        subprocess.run([*command, *sources, SIMT / "simt.cpp", "-o", target], check=True)


def loaded(path):
    """Return the library of `build`."""
    made = ctypes.CDLL(path)
    made.simt_launch.restype = ctypes.c_char_p
    return made


@lru_cache(maxsize=2)
def library(races=False):
    with tempfile.TemporaryDirectory() as folder:
        build(f"{folder}/kernels.so", SIMT / "kernels.cpp", races=races)
        return loaded(f"{folder}/kernels.so")


def launch(made, kernel, grid, threads, args, seed=0):
    """Run a kernel to its end. Arrays go by address, numbers as 8 bytes, None as null.

    Raises AssertionError: what its threads did wrong together.
    """
    values = [ctypes.c_int64(arg.ctypes.data if isinstance(arg, np.ndarray) else arg or 0)
              for arg in args]
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    assert made.simt_parameters(kernel.encode()) == len(args), kernel
    fault = made.simt_launch(kernel.encode(), *map(ctypes.c_uint, grid), ctypes.c_uint(threads),
                             pointers, ctypes.c_uint64(seed))
    assert fault is None, f"{kernel}, seed {seed}: {fault.decode()}"


def aligned(size, fill=0):
    """Return bytes at a multiple of 16."""
    room = np.full(size + 16, fill, np.uint8)
    start = -room.ctypes.data % 16
    return room[start:start + size]


class Host:
    """Runs what the driver runs on a GPU. A segment is an array or a CopyPlan.

    Args:
        blocks_max: of a launch.
        seed: in which order threads run.
        races: as for `build`.
    """

    def __init__(self, blocks_max=1 << 30, seed=0, races=False):
        self.blocks_max, self.seed, self.races = blocks_max, seed, races
        self.bad_entry = np.array([NO_BAD_ENTRY])

    def _launch(self, kernel, blocks, args, blocks_y=1):
        if blocks:
            launch(library(self.races), kernel, (min(blocks, self.blocks_max), blocks_y), THREADS,
                   args, self.seed)

    def copy(self, plan: CopyPlan, segment, pack, rows=4, words=64):
        starts = plan.tile_starts(rows, words, plan.word_bytes)
        tiles = int(starts[-1])
        self._launch(f"kvwire_{VERBS[int(pack)]}_{plan.word_bytes}", tiles, [
            tiles, plan.legs, starts, len(plan.legs), plan.block_ids, segment, self.bad_entry,
            rows, words])

    def _segment(self, segment):
        if isinstance(segment, CopyPlan):
            return None, segment.legs, len(segment.legs), segment.block_ids, self.bad_entry
        return segment, None, 0, None, None

    def encode(self, plan: CodePlan, segment):
        """Return what each slot holds, and the checksum of each chunk."""
        out, tails = aligned(plan.out_bytes + 16, 0xA5), aligned(plan.out_bytes)
        sizes, raw_bytes = np.zeros(len(plan.chunks), np.int64), plan.chunks[:, 1].tolist()
        crcs = np.array([crc_math.beginning(size) for size in raw_bytes], np.uint32)
        self._launch("kvwire_encode", len(plan.chunks), [
            len(plan.chunks), *self._segment(segment), plan.chunks, plan.parts,
            aligned_copy(plan.blob), crc_math.cuda_tables(), out, tails, sizes, crcs])
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
            self._launch(decoder_of(dtype), len(numbers), [
                len(numbers), *self._segment(segment), aligned_copy(coded), plan.strips, numbers,
                dtype, bits, aligned_copy(plan.blob), crc_math.cuda_tables(), stops, crcs,
                invalid])
        return invalid.tolist(), crcs.tolist()

    def crc(self, chunks, segment):
        crcs = np.array([crc_math.beginning(size) for _, size in chunks], np.uint32)
        blocks_y = max(1, -(-max((size for _, size in chunks), default=0)
                         // crc_math.CUDA_SPAN_BYTES))
        self._launch("kvwire_crc", len(chunks), [
            len(chunks), *self._segment(segment), np.array(chunks, np.int64),
            crc_math.cuda_tables(), crcs], blocks_y)
        return crcs.tolist()


def aligned_copy(data):
    data = np.frombuffer(data, np.uint8)
    room = aligned(len(data))
    room[:] = data
    return room
