"""The ceilings: plain sockets (bare.cpp), memcpy, and iperf3."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import numpy as np

from bench.build import library

__all__ = ["BareMover", "Iperf3Missing", "build_native", "copy_moves", "iperf3", "iperf3_version"]

_IPERF3_BYTES = "1G"


class Iperf3Missing(Exception):
    """iperf3 is not installed; says how to."""


def build_native() -> Path:
    """Compile bare.cpp unless that was done; returns the library. Raises BuildError."""
    return library(Path(__file__).with_name("bare.cpp"))


def _native() -> ctypes.CDLL:
    native = ctypes.CDLL(str(build_native()))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    native.bare_plan.restype = pointer
    native.bare_plan.argtypes = [pointer, pointer, pointer, size, size]
    native.bare_plan_free.argtypes = [pointer]
    native.bare_move.argtypes = [pointer, pointer, ctypes.c_int]
    native.bare_copy.argtypes = [pointer] * 5 + [size]
    return native


class BareMover:
    """One side of a plain transfer: sends or receives a fixed list of ranges of a pool.

    Args:
        sockets: connected, blocking; the ranges' 256 KiB pieces are dealt to them in turn.
        pool: uint8; borrowed.
        offsets, lengths: int64 [count], in stream order.
    """

    def __init__(self, sockets: list[socket.socket], pool: np.ndarray, offsets: np.ndarray,
                 lengths: np.ndarray):
        self._native = _native()
        self._sockets = sockets
        self._pool = pool
        offsets, lengths = (np.ascontiguousarray(a, np.int64) for a in (offsets, lengths))
        self._fds = (ctypes.c_int * len(sockets))(*(s.fileno() for s in sockets))
        self._plan = self._native.bare_plan(pool.ctypes.data, offsets.ctypes.data,
                                            lengths.ctypes.data, len(offsets), len(sockets))

    def move(self, sending: bool) -> None:
        """Move everything; returns when the last byte was given to, or taken from, the kernel."""
        error = self._native.bare_move(self._plan, self._fds, sending)
        if error:
            raise OSError(error, os.strerror(error))

    def close(self) -> None:
        self._native.bare_plan_free(self._plan)
        for each in self._sockets:
            each.close()


def copy_moves(destination: np.ndarray, source: np.ndarray, moves: np.ndarray) -> None:
    """memcpy each move, in one thread."""
    starts, places, counts = (np.ascontiguousarray(column) for column in moves.T)
    _native().bare_copy(destination.ctypes.data, source.ctypes.data, places.ctypes.data,
                        starts.ctypes.data, counts.ctypes.data, len(moves))


def iperf3_version() -> str:
    """Return iperf3's version. Raises Iperf3Missing."""
    if shutil.which("iperf3") is None:
        raise Iperf3Missing("iperf3 is missing, so its rows are absent; on Debian: "
                            "apt-get install iperf3")
    return subprocess.run(["iperf3", "--version"], capture_output=True,
                          text=True).stdout.split()[1]


def iperf3(connections: int) -> tuple[float, float, int]:
    """Run iperf3 over loopback once; return (seconds, CPU seconds of both sides, bytes)."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    server = subprocess.Popen(["iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", port],
                              stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):  # until it listens
            done = subprocess.run(
                ["iperf3", "-c", "127.0.0.1", "-p", port, "-P", str(connections), "-l", "1M",
                 "-n", _IPERF3_BYTES, "-J"], capture_output=True, text=True)
            said = json.loads(done.stdout)
            if "error" not in said:
                break
            time.sleep(0.02)
        else:
            raise RuntimeError(f"iperf3: {said['error']}")
        server.wait(10)
    finally:
        server.kill()
        server.wait()
    end = said["end"]
    received, cpu = end["sum_received"], end["cpu_utilization_percent"]
    busy = (cpu["host_total"] + cpu["remote_total"]) / 100
    return received["seconds"], busy * received["seconds"], received["bytes"]
