"""The two processes of a benchmark: each owns one pool and does what the parent asks by name."""

from __future__ import annotations

import multiprocessing
import resource
import socket
import time
import traceback
from pathlib import Path

import numpy as np

from bench import bare, workloads
from bench.measure import Unable
from bench.peers import PEERS

__all__ = ["Pair", "PeerPair", "Side", "SideFailed"]

_ANSWER_TIMEOUT_S = 120.0
_PUSH_TIMEOUT_S = 60.0
_LOOPBACK = "127.0.0.1"


class SideFailed(RuntimeError):
    """A benchmark process raised, died or did not answer; says which."""


class Side:
    """The other end of a pipe to a spawned process that holds a `Sending` or `Receiving`."""

    def __init__(self, kind: type, *arguments: object):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, method: str, *arguments: object) -> None:
        """Call `method` there and do not wait. Raises SideFailed."""
        try:
            self._pipe.send((method, arguments))
        except OSError:
            raise self._ended() from None

    def answer(self) -> object:
        """Return what the oldest unanswered call returned. Raises SideFailed."""
        if not self._pipe.poll(_ANSWER_TIMEOUT_S):
            self._process.kill()
            raise SideFailed(f"a benchmark process has not answered in {_ANSWER_TIMEOUT_S:.0f} s")
        try:
            good, result = self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if not good:
            raise SideFailed(f"a benchmark process failed:\n{result}")
        return result

    def _ended(self) -> SideFailed:
        self._process.join(10)
        return SideFailed(f"a benchmark process ended with exit code {self._process.exitcode}")

    def call(self, method: str, *arguments: object) -> object:
        self.start(method, *arguments)
        return self.answer()

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._pipe.close()
        self._process.join(10)
        self._process.kill()


class Pair:
    """A sending and a receiving process, both loaded with one workload."""

    def __init__(self, case: str, shrink: int):
        self.sending = Side(Sending, case, shrink)
        self.receiving = Side(Receiving, case, shrink)

    def both(self, method: str, *arguments: object) -> tuple[object, object]:
        """Call a method of both, at the same time."""
        self.receiving.start(method, *arguments)
        self.sending.start(method, *arguments)
        return self.receiving.answer(), self.sending.answer()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sending.close()
        self.receiving.close()


class PeerPair(Pair):
    """A pair with one connected peer: in processes of its own, for it may crash, hang or leak."""

    def __init__(self, name: str, case: str, shrink: int, piece_bytes: int | None = None):
        """Connect, for moves in pieces of `piece_bytes`. Raises Unable."""
        super().__init__(case, shrink)
        try:
            contact = self.receiving.call("listen_peer", name, _LOOPBACK, piece_bytes)
            self.receiving.start("accept_peer")
            self.sending.call("connect_peer", name, _LOOPBACK, contact, piece_bytes)
            self.receiving.answer()
        except SideFailed as why:
            self.kill()
            raise Unable(_last_line(why)) from why

    def together(self, receiving: str, sending: str, run: int) -> tuple[object, object]:
        """Prepare run `run`, then call a method of each.

        Returns: (received, sent). Raises Unable.
        """
        try:
            self.both("prepare", run)
            self.receiving.start(receiving)
            sent = self.sending.call(sending)
            return self.receiving.answer(), sent
        except SideFailed as why:
            self.kill()
            raise Unable(_last_line(why)) from why

    def kill(self) -> None:
        for side in (self.sending, self.receiving):
            side.kill()

    def __exit__(self, *exc: object) -> None:
        try:
            self.both("close_peer")
        except SideFailed:  # some were killed, some do not end well: all is measured
            self.kill()
        super().__exit__(*exc)


def _last_line(why: SideFailed) -> str:
    return str(why).strip().splitlines()[-1]


def _serve(pipe, kind: type, arguments: tuple) -> None:
    side = None
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        try:
            side = side or kind(*arguments)
            pipe.send((True, getattr(side, method)(*given)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


class _Common:
    def __init__(self, case: str, shrink: int):
        self.workload = workloads.make(case, shrink)
        self.source = workloads.source_pool(case, self.workload)
        self.movers: dict[int, bare.BareMover] = {}
        self.resident_mib_at_start = 0.0

    def moves_cut(self, piece_bytes: int | None) -> np.ndarray:
        moves = self.workload.moves
        return moves if piece_bytes is None else workloads.cut(moves, piece_bytes)

    def close_peer(self) -> None:
        self.peer.close()

    def resident_start(self) -> None:
        """What is resident from here on beyond now is the transport's."""
        self.resident_mib_at_start = _status_mib("VmRSS")

    def resident_peak_reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def resident_growth_mib(self) -> float:
        """Return the peak since the last reset, beyond what was resident at the start."""
        return _status_mib("VmHWM") - self.resident_mib_at_start


class Sending(_Common):
    def connect_kvwire(self, lanes: int | None, address: str, security: object = None) -> None:
        from kvwire.sender import Sender
        links = self.__dict__.setdefault("links", {})
        options = {"security": security} | ({} if lanes is None else {"lanes": lanes})
        links[lanes] = Sender(address, **options)
        links[lanes].connect()

    def connect_bare(self, lanes: int, port: int) -> None:
        sockets = [_no_delay(socket.create_connection(("127.0.0.1", port))) for _ in range(lanes)]
        moves = self.workload.moves
        self.movers[lanes] = bare.BareMover(sockets, self.source, moves[:, 0], moves[:, 2])

    def prepare(self, run: int) -> None:
        workloads.stamp(self.source, run)
        self.memory = self.workload.memory(self.source, writable=False)
        self.resident_peak_reset()

    def send_kvwire(self, lanes: int | None, ticket: str) -> tuple[int, float]:
        """Return when it began, and CPU seconds until the receipt."""
        cpu, began = _cpu_s(), time.monotonic_ns()
        self.links[lanes].send(ticket, self.memory).result(_PUSH_TIMEOUT_S)
        return began, _cpu_s() - cpu

    def push_one_by_one(self, ticket: str) -> list[int]:
        """Push token by token; returns nanoseconds from each push to its verified receipt."""
        transfer = self.links[None].open(ticket, self.memory)
        while not transfer.progress().granted and not transfer.done():
            time.sleep(0.001)
        took = []
        for token in range(self.workload.tokens):
            began = time.monotonic_ns()
            transfer.push(0, tokens=(token, token + 1)).wait(_PUSH_TIMEOUT_S)
            took.append(time.monotonic_ns() - began)
        transfer.finish().result(_PUSH_TIMEOUT_S)
        return took

    def connect_peer(self, name: str, host: str, contact: object, piece_bytes: int | None = None
                     ) -> None:
        """Connect from `host`, an address of this machine, in moves of `piece_bytes`, if given."""
        moves = self.moves_cut(piece_bytes)
        self.peer = PEERS[name].sender(host, contact, self.source, moves)

    def send_peer(self) -> tuple[int, float]:
        """Return when it began, and CPU seconds until the library says that it has sent."""
        cpu, began = _cpu_s(), time.monotonic_ns()
        self.peer.send()
        return began, _cpu_s() - cpu

    def trip_peer(self) -> list[int]:
        """Move page by page; returns nanoseconds until each was known to be in place."""
        took = []
        for index in range(self.workload.payload_bytes // workloads.PAGE_BYTES):
            began = time.monotonic_ns()
            self.peer.trip(index)
            took.append(time.monotonic_ns() - began)
        return took

    def send_bare(self, lanes: int) -> tuple[int, float]:
        cpu, began = _cpu_s(), time.monotonic_ns()
        self.movers[lanes].move(sending=True)
        return began, _cpu_s() - cpu


class Receiving(_Common):
    """The destination. Knows the source's bytes too, to check against."""

    def __init__(self, case: str, shrink: int):
        super().__init__(case, shrink)
        self.pool = workloads.random_pool(self.workload.pool_bytes)
        self.expected = workloads.random_pool(self.workload.pool_bytes)

    def listen_kvwire(self, security: object = None) -> str:
        from kvwire.receiver import Receiver
        self.receiver = Receiver(security=security)
        return self.receiver.address

    def listen_bare(self) -> int:
        self.listener = socket.create_server(("127.0.0.1", 0))
        return self.listener.getsockname()[1]

    def accept_bare(self, lanes: int) -> None:
        sockets = [_no_delay(self.listener.accept()[0]) for _ in range(lanes)]
        moves = self.workload.moves
        self.movers[lanes] = bare.BareMover(sockets, self.pool, moves[:, 1], moves[:, 2])

    def prepare(self, run: int) -> None:
        workloads.stamp(self.source, run)
        self.pool.fill(workloads.POISON)

    def expect_kvwire(self) -> str:
        """Bind the pool to a ticket; returns its id."""
        self.ticket = self.receiver.expect(self.workload.memory(self.pool, writable=True))
        self.resident_peak_reset()
        return self.ticket.id

    def receive_kvwire(self) -> tuple[int, float]:
        """Return when all was in place and verified, and CPU seconds from now until then."""
        cpu = _cpu_s()
        self.ticket.result(_PUSH_TIMEOUT_S)
        return time.monotonic_ns(), _cpu_s() - cpu

    def receive_bare(self, lanes: int) -> tuple[int, float]:
        cpu = _cpu_s()
        self.movers[lanes].move(sending=False)
        return time.monotonic_ns(), _cpu_s() - cpu

    def listen_peer(self, name: str, host: str, piece_bytes: int | None = None) -> object:
        """Listen at `host`, an address of this machine; returns what `connect_peer` must know."""
        moves = self.moves_cut(piece_bytes)
        self.peer = PEERS[name].receiver(host, self.pool, moves)
        return self.peer.contact

    def accept_peer(self) -> None:
        self.peer.accept()

    def receive_peer(self) -> tuple[int, float]:
        """Return when all was in place, and CPU seconds from now until then."""
        cpu = _cpu_s()
        self.peer.receive()
        return time.monotonic_ns(), _cpu_s() - cpu

    def answer_peer(self) -> None:
        self.peer.answer_trips()

    def copy(self) -> tuple[float, float]:
        """memcpy the workload within this process: seconds, CPU seconds."""
        cpu, began = _cpu_s(), time.monotonic_ns()
        bare.copy_moves(self.pool, self.source, self.workload.moves)
        return (time.monotonic_ns() - began) / 1e9, _cpu_s() - cpu

    def verify(self, flip_a_byte: bool = False) -> int | None:
        """Compare the whole pool, poison included; returns the first wrong offset or None."""
        if flip_a_byte:
            self.pool[self.workload.moves[-1, 1]] ^= 1
        workloads.expect(self.expected, self.source, self.workload.moves)
        return workloads.first_difference(self.expected, self.pool)


def _no_delay(each: socket.socket) -> socket.socket:
    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return each


def _cpu_s() -> float:
    """CPU seconds of this process so far, all threads, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
