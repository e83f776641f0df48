"""``python -m bench.link``: kvwire and others over a long, thin or lossy link, in one table."""

from __future__ import annotations

import argparse
import json
import math
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from bench import bare, kv_sample, sides, workloads
from bench.build import BuildError
from bench.measure import machine, progress
from bench.netlab import TCP_BYTES_MAX, Link, LinkUnavailable, enter
from bench.peers import PEERS, installed, versions
from kvwire.errors import UsageError

__all__ = ["Bench", "Run", "main", "recovery_s"]

# Of the names of `workloads`; there their size is 256 MiB, but kimi-linear's is 308 MB.
CASES = {"contiguous": "contiguous-256m", "blocks-64k": "blocks-64k", "blocks-4k": "blocks-4k",
         "kimi-linear": "kimi-linear-32k", "kv": workloads.KV}
BLACKHOLE = "blackhole"
SYSTEMS = ("kvwire", "iperf3-p1", "iperf3-p8", "bare-p1", "bare-p8")
_CASE_BYTES = 256 << 20
_SAMPLE_INTERVAL_S = 0.1
_IPERF3_SECONDS_MIN = 2
_UNITS = {"kbit": 1e-6, "mbit": 1e-3, "gbit": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3,
          "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

_BLACKHOLE_LANES = 4
_BLACKHOLE_AT_S = 2.0
_BLACKHOLE_FOR_S = 2.0
_BACK_SHARE = 0.9  # of the rate before
_BACK_FOR_S = 1.0  # so long it must stay there


@dataclass(frozen=True)
class Run:
    """One timed run.

    Attributes:
        wire_bytes: payload on the wire; fewer than `cache_bytes` behind a codec.
        verified: every byte of the destination is as it must be; None: nothing to check.
    """

    seconds: float
    cache_bytes: int
    wire_bytes: int
    verified: bool | None


class Sending(sides.Sending):
    """The source, in a namespace."""

    def __init__(self, namespace: str, case: str, shrink: Fraction):
        enter(namespace)
        super().__init__(case, shrink)

    def connect_kvwire(self, address: str, options: dict[str, object]) -> None:
        from kvwire.sender import Sender
        self.link = Sender(address, **options)
        self.link.connect()

    def send_kvwire(self, ticket: str) -> tuple[int, int]:
        """Return when it began, and payload bytes on the wire."""
        began = time.monotonic_ns()
        return began, self.link.send(ticket, self.memory).result().wire_bytes

    def connect_bare(self, connections: int, address: tuple[str, int]) -> None:
        sockets = [socket.create_connection(address) for _ in range(connections)]
        moves = self.workload.moves
        self.movers[connections] = bare.BareMover(sockets, self.source, moves[:, 0], moves[:, 2])


class Receiving(sides.Receiving):
    """The destination, in a namespace."""

    def __init__(self, namespace: str, case: str, shrink: Fraction):
        enter(namespace)
        super().__init__(case, shrink)

    def listen_kvwire(self, host: str) -> str:
        from kvwire.receiver import Receiver
        self.receiver = Receiver(f"{host}:0", allow_unauthenticated=True)
        return self.receiver.address

    def receive_kvwire(self) -> int:
        """Return when all was in place and verified."""
        self.ticket.result()
        return time.monotonic_ns()

    def listen_bare(self, host: str) -> tuple[str, int]:
        self.listener = socket.create_server((host, 0))
        return self.listener.getsockname()

    def accept_bare(self, connections: int) -> None:
        sockets = [self.listener.accept()[0] for _ in range(connections)]
        moves = self.workload.moves
        self.movers[connections] = bare.BareMover(sockets, self.pool, moves[:, 1], moves[:, 2])

    def receive_bare(self, connections: int) -> int:
        super().receive_bare(connections)
        return time.monotonic_ns()


class Bench:
    """One system's two processes, each at its end of the link; connected at the first run."""

    def __init__(self, link: Link, options: argparse.Namespace, system: str, codec: str):
        self.link = link
        self._options = options
        self._system = system
        self._codec = codec
        self._connected = False
        case = (CASES[options.case], Fraction(_CASE_BYTES, options.bytes))
        self.payload_bytes = workloads.make(*case).payload_bytes
        self.receiving = sides.Side(Receiving, link.namespace("right"), *case)
        self.sending = sides.Side(Sending, link.namespace("left"), *case)
        self._waiter = ThreadPoolExecutor(1)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sending.close()
        self.receiving.close()
        self._waiter.shutdown()

    def run(self, number: int, watch: Callable[[float, int], None] | None = None) -> Run:
        """Move the workload once.

        Args:
            watch: is told, ten times a second, seconds since the start and bytes delivered.
        """
        kind, _, connections = self._system.partition("-p")
        if kind == "iperf3":
            return self._iperf3(int(connections))
        for side in (self.receiving, self.sending):
            side.start("prepare", number)
        for side in (self.receiving, self.sending):
            side.answer()
        if kind == "kvwire":
            return self._kvwire(watch)
        if kind == "bare":
            return self._bare(int(connections), watch)
        return self._peer(watch)

    def _kvwire(self, watch: Callable[[float, int], None] | None) -> Run:
        if not self._connected:
            address = self.receiving.call("listen_kvwire", self.link.address["right"])
            options = {"codec": self._codec}
            if self._options.lanes is not None:
                options["lanes"] = self._options.lanes
            self.sending.call("connect_kvwire", address, options)
            self._connected = True
        ticket = self.receiving.call("expect_kvwire")
        self.receiving.start("receive_kvwire")
        self.sending.start("send_kvwire", ticket)
        ended = self._watched(watch)
        began, wire_bytes = self.sending.answer()
        return self._verified(began, ended, wire_bytes)

    def _bare(self, connections: int, watch: Callable[[float, int], None] | None) -> Run:
        if not self._connected:
            address = self.receiving.call("listen_bare", self.link.address["right"])
            self.receiving.start("accept_bare", connections)
            self.sending.call("connect_bare", connections, address)
            self.receiving.answer()
            self._connected = True
        self.receiving.start("receive_bare", connections)
        self.sending.start("send_bare", connections)
        ended = self._watched(watch)
        began, _ = self.sending.answer()
        return self._verified(began, ended, self.payload_bytes)

    def _peer(self, watch: Callable[[float, int], None] | None) -> Run:
        name, address = self._system, self.link.address
        if not self._connected:
            contact = self.receiving.call("listen_peer", name, address["right"])
            self.receiving.start("accept_peer")
            self.sending.call("connect_peer", name, address["left"], contact)
            self.receiving.answer()
            self._connected = True
        self.receiving.start("receive_peer")
        self.sending.start("send_peer")
        ended, _ = self._watched(watch)
        began, _ = self.sending.answer()
        return self._verified(began, ended, self.payload_bytes)

    def _iperf3(self, connections: int) -> Run:
        """Run for as long as the workload would take at the link's rate."""
        rate_gbit = self.link.payload_rate_gbit
        ideal_s = self.payload_bytes * 8e-9 / rate_gbit if rate_gbit else 0
        seconds = max(_IPERF3_SECONDS_MIN, math.ceil(ideal_s))
        serving = self.link.popen_in("right", ["iperf3", "-s", "-1", "--forceflush"],
                                     stdout=subprocess.PIPE, text=True)
        try:
            if not any("listening" in line for line in serving.stdout):
                raise RuntimeError("iperf3 does not listen")
            done = self.link.run_in(
                "left", ["iperf3", "-c", self.link.address["right"], "-P", str(connections),
                         "-t", str(seconds), "-J"], capture_output=True, text=True)
        finally:
            serving.kill()
            serving.communicate()
        said = json.loads(done.stdout)
        if "error" in said:
            raise RuntimeError(f"iperf3: {said['error']}")
        received = said["end"]["sum_received"]
        return Run(received["seconds"], received["bytes"], received["bytes"], None)

    def _watched(self, watch: Callable[[float, int], None] | None) -> object:
        """Return the receiving side's answer; meanwhile show how far it is."""
        answer = self._waiter.submit(self.receiving.answer)
        began, start = time.monotonic(), self._delivered_bytes()
        at = began
        while not answer.done():
            at = max(at + _SAMPLE_INTERVAL_S, time.monotonic())
            time.sleep(max(0.0, at - time.monotonic()))
            moved, passed = self._delivered_bytes() - start, time.monotonic() - began
            if watch is not None:
                watch(passed, moved)
            progress(f"{self._system}: {min(99, 100 * moved // self.payload_bytes):2} % of "
                     f"{self.payload_bytes >> 20} MiB, {moved * 8e-9 / passed:.2f} Gbit/s")
        return answer.result()

    def _delivered_bytes(self) -> int:
        return self.link.stats()["left"]["delivered_payload_bytes"]

    def _verified(self, began: int, ended: int, wire_bytes: int) -> Run:
        wrong = self.receiving.call("verify", self._system == self._options.corrupt)
        if wrong is not None:
            progress("")
            print(f"{self._system}: destination byte {wrong} is wrong", file=sys.stderr)
        return Run((ended - began) / 1e9, self.payload_bytes, wire_bytes, wrong is None)


def measured(link: Link, options: argparse.Namespace, subjects: Sequence[tuple[str, str]]
             ) -> list[dict[str, object]]:
    """Run systems, each with a codec, in turn; returns their rows, with the medians of the
    rounds."""
    runs: dict[tuple[str, str], list[Run] | None] = {subject: [] for subject in subjects}
    benches: dict[tuple[str, str], Bench] = {}
    with ExitStack() as open_benches:
        for number in range(options.rounds):
            for subject in [each for each in subjects if runs[each] is not None]:
                progress(f"{', '.join(subject)}: round {number + 1}/{options.rounds}")
                try:
                    if subject not in benches:
                        benches[subject] = open_benches.enter_context(
                            Bench(link, options, *subject))
                    runs[subject].append(benches[subject].run(number + 1))
                except (RuntimeError, OSError, ValueError) as error:
                    progress("")
                    print(f"{subject[0]}: {error}", file=sys.stderr)
                    runs[subject] = None
    progress("")
    return [row(link, options, *subject, runs[subject]) for subject in subjects]


def row(link: Link, options: argparse.Namespace, system: str, codec: str, runs: list[Run] | None
        ) -> dict[str, object]:
    """Return the JSON row; no figure where a run failed or was wrong."""
    verdicts = {run.verified for run in runs} if runs else {False}
    verified = False if False in verdicts else True if True in verdicts else None
    goodput = effective = share = cache_share = None
    if verified is not False:
        goodput = statistics.median(run.wire_bytes * 8e-9 / run.seconds for run in runs)
        effective = statistics.median(run.cache_bytes * 8e-9 / run.seconds for run in runs)
        if link.payload_rate_gbit:
            share = round(goodput / link.payload_rate_gbit, 3)
            cache_share = round(effective / link.payload_rate_gbit, 3)
        goodput, effective = round(goodput, 4), round(effective, 4)
    return {"case": options.case, "system": system, "codec": codec,
            "rate_gbit": options.rate, "rtt_ms": options.rtt, "loss": options.loss,
            "goodput_gbit": goodput, "effective_gbit": effective, "share_of_link": share,
            "cache_share_of_link": cache_share, "verified": verified}


def blackholed(link: Link, options: argparse.Namespace, codec: str) -> dict[str, object]:
    """Swallow one of kvwire's lanes in the middle of a transfer; returns a row with
    `recovered_s`: how long after the lane was lost the rate was back, or None: it was not."""
    samples: list[tuple[float, int]] = []
    lost_s = None

    def watch(passed_s: float, moved_bytes: int) -> None:
        nonlocal lost_s
        samples.append((passed_s, moved_bytes))
        if lost_s is None and passed_s >= _BLACKHOLE_AT_S:
            link.set(blackhole=[busiest_port(link)])
            lost_s = passed_s
        elif lost_s is not None and passed_s >= lost_s + _BLACKHOLE_FOR_S:
            link.set(blackhole=False)

    options.case = "contiguous"
    run = None
    try:
        with Bench(link, options, "kvwire", codec) as bench:
            run = bench.run(1, watch)
        needed_s = _BLACKHOLE_AT_S + _BLACKHOLE_FOR_S + _BACK_FOR_S
        if run.seconds < needed_s:
            raise RuntimeError(f"the transfer took {run.seconds:.1f} s, less than the "
                               f"{needed_s:.0f} s of the case: more --bytes")
        if link.stats()["left"]["blackholed"] == 0:
            raise RuntimeError("nothing was sent on the lane that was swallowed")
    except (RuntimeError, OSError) as error:
        progress("")
        print(f"kvwire: {error}", file=sys.stderr)
        run = None
    link.set(blackhole=False)
    progress("")
    result = row(link, options, "kvwire", codec, [run] if run else None) | {"case": BLACKHOLE}
    good = run is not None and run.verified
    return result | {"recovered_s": recovery_s(samples, lost_s) if good else None}


def busiest_port(link: Link) -> int:
    """Return the left port of the connection that has delivered most."""
    return max(link.connections(), key=lambda pair: link.stats(pair)["left"][
        "delivered_payload_bytes"])[0]


def recovery_s(samples: Sequence[tuple[float, int]], lost_s: float) -> float | None:
    """Return how long after `lost_s` the rate is back, for good; None: never.

    Args:
        samples: (seconds, bytes so far), evenly spaced. The rate before is that of the second
            half of the time before `lost_s`.
    """
    before = [sample for sample in samples if lost_s / 2 <= sample[0] <= lost_s]
    wanted = _BACK_SHARE * rate(before[0], before[-1])
    after = [sample for sample in samples if sample[0] >= lost_s]
    for first, begun in enumerate(after):
        ends = (sample for sample in after[first:] if sample[0] >= begun[0] + _BACK_FOR_S)
        end = next(ends, None)
        if end is None:
            return None
        next_sample = after[first + 1]
        if rate(begun, end) >= wanted and rate(begun, next_sample) >= wanted:
            return round(begun[0] - lost_s, 2)
    return None


def rate(begun: tuple[float, int], end: tuple[float, int]) -> float:
    """Bytes per second between two samples."""
    return (end[1] - begun[1]) / (end[0] - begun[0])


def table(rows: list[dict[str, object]], payload_rate_gbit: float | None) -> str:
    """Return the rows in plain text."""
    lines = [f"{'':12}{'codec':8}{'Gbit/s':>9}{'of the link':>13}{'cache Gbit/s':>14}{'GB/s':>8}"
             f"{'of the link':>13}  verified"]
    for each in rows:
        name = f"{each['system']:12}{each['codec']:8}"
        if each["verified"] is False:
            lines.append(f"{name}  FAILED or WRONG BYTES")
            continue
        wire, cache = ("-" if each[key] is None else f"{each[key]:.3f}"
                       for key in ("share_of_link", "cache_share_of_link"))
        back = "" if "recovered_s" not in each else f"  back after {each['recovered_s']} s"
        effective = each["effective_gbit"]
        lines.append(f"{name}{each['goodput_gbit']:9.3f}{wire:>13}{effective:14.3f}"
                     f"{effective / 8:8.3f}{cache:>13}  {'yes' if each['verified'] else '-'}{back}")
    if payload_rate_gbit:
        lines.append(f"{'the link':20}{payload_rate_gbit:9.3f}{'1.000':>13}")
    return "\n".join(lines)


def quantity(*units: str) -> Callable[[str], float]:
    """Return a parser of numbers with one of these units."""
    def parse(text: str) -> float:
        match = re.fullmatch(r"([\d.]+)\s*([A-Za-z]+)", text)
        if match is None or match[2] not in units:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of {', '.join(units)}")
        return float(match[1]) * _UNITS[match[2]]
    return parse


def arguments(given: list[str] | None) -> argparse.Namespace:
    size = quantity("B", "KiB", "MiB", "GiB")
    parser = argparse.ArgumentParser("python -m bench.link", description=__doc__)
    parser.add_argument("--rate", type=quantity("kbit", "mbit", "gbit"), default="1gbit",
                        help="of the wire, per second; %(default)s")
    parser.add_argument("--rtt", type=quantity("us", "ms", "s"), default="40ms",
                        help="there and back; %(default)s")
    parser.add_argument("--jitter", type=quantity("us", "ms", "s"), default="0ms",
                        help="added to each delay at most; %(default)s")
    parser.add_argument("--loss", type=float, default=0.0, help="probability, per MTU segment")
    parser.add_argument("--queue", type=size, help="what the bottleneck holds; one rate x RTT")
    parser.add_argument("--congestion", metavar="NAME",
                        help="default congestion control of both ends; the machine's")
    parser.add_argument("--tcp-memory", type=size, default=TCP_BYTES_MAX,
                        help="largest TCP buffer (tcp_rmem, tcp_wmem); 64MiB; 0B: the kernel's")
    parser.add_argument("--case", choices=[*CASES, BLACKHOLE], default="contiguous",
                        help="what travels; blackhole: one of four lanes is swallowed for "
                             "two seconds; %(default)s")
    parser.add_argument("--bytes", type=size, default="1GiB", help="payload; %(default)s")
    parser.add_argument("--lanes", type=int, help="of kvwire; its own choice")
    parser.add_argument("--codec", default="raw",
                        help="of kvwire, comma-separated: it runs once with each; %(default)s")
    parser.add_argument("--rounds", type=int, default=3,
                        help="runs of each system, all but iperf3's over the same connections, "
                             "so that only the first starts slowly; the median counts; "
                             "%(default)s")
    parser.add_argument("--alternate", action="store_true",
                        help="round by round, A B A B, all connections and memory kept; else "
                             "A A B B")
    parser.add_argument("--systems", default=",".join(SYSTEMS),
                        help="comma-separated; NAME-pN: N connections; also the peers "
                             f"{','.join(PEERS)}; %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    # For tests: flip a byte that this system has delivered.
    parser.add_argument("--corrupt", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.systems = options.systems.split(",")
    options.codecs = options.codec.split(",")
    for name in options.systems:
        if name not in PEERS and not re.fullmatch(r"kvwire|(iperf3|bare)-p[1-9]\d*", name):
            parser.error(f"unknown system {name}")
    if options.case == BLACKHOLE and options.lanes is None:
        options.lanes = _BLACKHOLE_LANES
    options.bytes = int(options.bytes)
    return options


def without_absent(systems: list[str]) -> list[str]:
    """Return the systems without peers that are not installed; says on stderr which."""
    here = installed(name for name in systems if name in PEERS)
    return [name for name in systems if name in here or name not in PEERS]


def make_link(options: argparse.Namespace) -> Link:
    queue = None if options.queue is None else int(options.queue)
    return Link(rate_gbit=options.rate, rtt_ms=options.rtt, loss=options.loss, queue_bytes=queue,
                jitter_ms=options.jitter, congestion=options.congestion,
                tcp_bytes_max=int(options.tcp_memory) or None)


def main(given: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 when any run failed or delivered a wrong byte, 2 when there
    can be no such link or no such case here."""
    options = arguments(given)
    try:
        if CASES.get(options.case) == workloads.KV:
            kv_sample.make()
        link = make_link(options)
    except (LinkUnavailable, BuildError, UsageError) as error:
        print(error, file=sys.stderr)
        return 2
    with link:
        facts = {"mtu": link.mtu, "congestion": link.congestion, "tcp_memory_bytes":
                 link.tcp_bytes_max, **asdict(link.settings)}
        if options.case == BLACKHOLE:
            rows = [blackholed(link, options, codec) for codec in options.codecs]
        else:
            subjects = [(system, codec) for system in without_absent(options.systems)
                        for codec in (options.codecs if system == "kvwire" else ["raw"])]
            batches = [subjects] if options.alternate else [[subject] for subject in subjects]
            rows = [each for batch in batches for each in measured(link, options, batch)]
        print(table(rows, link.payload_rate_gbit))
    if options.json:
        peers = [row["system"] for row in rows if row["system"] in PEERS]
        records = [{"machine": machine(versions(peers)), "link": facts}, *rows]
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")
    return 0 if all(each["verified"] is not False for each in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
