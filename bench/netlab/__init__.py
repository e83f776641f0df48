"""A bad link on one machine: two network namespaces, and between them a line as bad as one asks.

    with Link(rate_gbit=1, rtt_ms=40, loss=0.001) as link:
        link.run_in("left", ["ping", "-c", "3", link.address["right"]])
        link.set(blackhole=True)

The line is a process (link.cpp) between two TAP devices. The namespaces have no names: they are
that process's, and end with it and with what runs in them, however this process ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench import build

__all__ = ["Link", "LinkUnavailable", "Settings", "enter"]

WIRE_EXTRA_BYTES = 38  # Ethernet: header 14, check sequence 4, preamble 8, gap 12
SEGMENT_HEAD_BYTES = 52  # IPv4 20, TCP 20, timestamps 12
QUEUE_BYTES_MIN = 256 << 10  # four super-frames: they come in one piece even on a short link
TCP_BYTES_MAX = 64 << 20
_DEVICE = "netlab"
_QUEUE_FRAMES = 10_000
_SIDES = ("left", "right")
_MAC = {"left": "02:00:00:00:00:01", "right": "02:00:00:00:00:02"}
_ANSWER_TIMEOUT_S = 10.0
_ANSWER_BYTES_MAX = 1 << 17
_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x00020000
_MS_PRIVATE_ALL = 1 << 18 | 1 << 14  # MS_PRIVATE, MS_REC


class LinkUnavailable(Exception):
    """No such link can be made on this machine; says why."""


@dataclass(frozen=True)
class Settings:
    """The state of a link; the same in both directions. All but `rtt_ms` count per MTU segment.

    Attributes:
        rate_gbit: 10^9 bits per second of Ethernet, its overhead included. None: unlimited.
        rtt_ms: there and back, with empty queues.
        loss: probability that a segment is lost after it has taken its time on the wire.
        queue_bytes: what the bottleneck holds before it drops. None: one rate x RTT.
        jitter_ms: each delay is longer by up to this much. Order is kept.
        blackhole: drop all, or what belongs to connections with one of these ports at either end.
    """

    rate_gbit: float | None = None
    rtt_ms: float = 0.0
    loss: float = 0.0
    queue_bytes: int | None = None
    jitter_ms: float = 0.0
    blackhole: bool | tuple[int, ...] = False

    def request(self) -> str:
        rate_bps = (self.rate_gbit or 0) * 1e9
        queue = self.queue_bytes
        if queue is None:
            queue = max(QUEUE_BYTES_MIN, int(rate_bps * self.rtt_ms / 8e3))
        everything = self.blackhole is True
        ports = () if isinstance(self.blackhole, bool) else self.blackhole
        return " ".join(map(str, ["set", rate_bps, int(self.rtt_ms * 5e5),
                                  int(self.jitter_ms * 1e6), self.loss, queue, int(everything),
                                  *ports]))


class Link:
    """Two namespaces, "left" and "right", and the link between them.

    Args:
        mtu: of both devices.
        seed: of the losses and the jitter.
        congestion: the namespaces' default congestion control. None: the machine's.
        tcp_bytes_max: the namespaces' limit of a TCP buffer, for tcp_rmem and tcp_wmem; the
            kernel's 4 to 32 MiB bound a connection to window / RTT. None: as the kernel has it.
        settings: of `Settings`.

    Raises: LinkUnavailable; bench.build.BuildError.
    """

    def __init__(self, *, mtu: int = 1500, seed: int = 1, congestion: str | None = None,
                 tcp_bytes_max: int | None = TCP_BYTES_MAX, **settings: object):
        if shutil.which("ip") is None:
            raise LinkUnavailable("ip is missing; on Debian: apt-get install iproute2")
        self.mtu = mtu
        self.tcp_bytes_max = tcp_bytes_max
        self.settings = Settings()
        self.address = {"left": "10.93.0.1", "right": "10.93.0.2"}
        self._program = build.standalone(Path(__file__).with_name("link.cpp"))
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_ANSWER_TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(
                [self._program, "serve", str(theirs.fileno()), str(seed)],
                pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
        try:
            self._descriptors = self._answer()
            for side in _SIDES:
                self._configure(side, congestion)
            self.set(**settings)
        except BaseException:
            self.close()
            raise

    def set(self, **changes: object) -> None:
        """Change any of `Settings`; what is on its way already stays so."""
        if isinstance(changes.get("blackhole"), Iterable):
            changes["blackhole"] = tuple(changes["blackhole"])
        settings = replace(self.settings, **changes)
        self._ask(settings.request())
        self.settings = settings

    def cut(self, *ports: int) -> None:
        """Reset the connections with one of these ports at either end, or all; both ends see it."""
        self._ask(" ".join(map(str, ["cut", *ports])))

    def stats(self, connection: tuple[int, int] | None = None) -> dict[str, dict[str, int]]:
        """Return what came in from "left" and from "right", of one connection or in all.

        Counts MTU segments: segments, lost, queue_dropped, blackholed, retransmitted (whose
        payload had come before), delivered; and wire_bytes, payload_bytes (TCP),
        delivered_payload_bytes.
        """
        return self._ask("stats" if connection is None else "flow {} {}".format(*connection))

    def connections(self) -> list[tuple[int, int]]:
        """Return (left port, right port) of the TCP connections seen so far."""
        return [tuple(pair) for pair in self._ask("flows")]

    @property
    def payload_rate_gbit(self) -> float | None:
        """What full TCP segments leave for payload, of the link's rate."""
        if self.settings.rate_gbit is None:
            return None
        share = (self.mtu - SEGMENT_HEAD_BYTES) / (self.mtu + WIRE_EXTRA_BYTES)
        return self.settings.rate_gbit * share

    @property
    def congestion(self) -> str:
        """The namespaces' default congestion control."""
        return self.run_in("left", ["cat", "/proc/sys/net/ipv4/tcp_congestion_control"],
                           capture_output=True, text=True, check=True).stdout.strip()

    def namespace(self, side: str) -> str:
        """Return a path that names the namespace while the link is open; for `enter`."""
        return f"/proc/{self._process.pid}/fd/{self._descriptors[side]}"

    def run_in(self, side: str, command: Sequence[str], **options: object
               ) -> subprocess.CompletedProcess:
        """`subprocess.run` in a namespace."""
        return subprocess.run([*self._prefix(side), *command], **options)

    def popen_in(self, side: str, command: Sequence[str], **options: object) -> subprocess.Popen:
        """`subprocess.Popen` in a namespace; the process dies with the calling thread."""
        return subprocess.Popen([*self._prefix(side), *command], **options)

    def cpu_s(self) -> float:
        """Return CPU seconds that the link itself has used; most of both network stacks too."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """End the link; its namespaces go when nothing runs in them."""
        self._control.close()
        try:
            self._process.wait(_ANSWER_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prefix(self, side: str) -> list[str]:
        return [str(self._program), "enter", self.namespace(side), str(os.getpid())]

    def _configure(self, side: str, congestion: str | None) -> None:
        other = _SIDES[1 - _SIDES.index(side)]
        # A metric remembered from one connection would slow the next, of another measurement.
        sysctls = {"ipv4/tcp_no_metrics_save": "1", "ipv6/conf/all/disable_ipv6": "1"}
        if self.tcp_bytes_max is not None:
            sysctls["ipv4/tcp_rmem"] = f"4096 131072 {self.tcp_bytes_max}"
            sysctls["ipv4/tcp_wmem"] = f"4096 16384 {self.tcp_bytes_max}"
        if congestion is not None:
            sysctls["ipv4/tcp_congestion_control"] = congestion
        script = [f"test ! -e /proc/sys/net/{name} || echo {value} > /proc/sys/net/{name}"
                  for name, value in sysctls.items()]
        script += ["ip link set lo up",
                   f"ip link set {_DEVICE} address {_MAC[side]} mtu {self.mtu} "
                   f"txqueuelen {_QUEUE_FRAMES} up",
                   f"ip addr add {self.address[side]}/24 dev {_DEVICE}",
                   f"ip neigh add {self.address[other]} lladdr {_MAC[other]} dev {_DEVICE}"]
        done = self.run_in(side, ["sh", "-ec", "\n".join(script)], capture_output=True, text=True)
        if done.returncode != 0:
            raise LinkUnavailable(f"the {side} namespace cannot be configured: "
                                  f"{done.stderr.strip()}")

    def _ask(self, request: str) -> object:
        self._control.send(request.encode())
        answer = self._answer()
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(f"the link refused {request!r}: {answer['error']}")
        return answer

    def _answer(self) -> object:
        try:
            answer = self._control.recv(_ANSWER_BYTES_MAX)
        except TimeoutError:
            answer = b""
        if not answer:
            self._process.kill()
            said = self._process.stderr.read().strip()
            raise LinkUnavailable(
                f"the link's process ended: {said or 'it said nothing'}. It needs root "
                "(CAP_SYS_ADMIN, CAP_NET_ADMIN), network namespaces and /dev/net/tun")
        return json.loads(answer)


def enter(namespace: str) -> None:
    """Move the calling thread, and threads it starts later, into `Link.namespace(side)`.

    They see a /sys of their own too: UCX looks there for the namespace's devices.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        for failed in (libc.setns(descriptor, _CLONE_NEWNET), libc.unshare(_CLONE_NEWNS),
                       libc.mount(None, b"/", None, _MS_PRIVATE_ALL, None),
                       libc.mount(b"sysfs", b"/sys", b"sysfs", 0, None)):
            if failed:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), namespace)
    finally:
        os.close(descriptor)
