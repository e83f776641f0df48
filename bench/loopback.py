"""``python -m bench.loopback``: kvwire and its ceilings over loopback, in one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench import bare, peers, roundtrip, tls, workloads
from bench.build import BuildError
from bench.measure import Sample, alternate, machine, progress
from bench.sides import Pair, PeerPair

__all__ = ["main"]

ROUNDS = 9
QUICK_ROUNDS = 2
KVWIRE_LANES = {"kvwire": None, "kvwire-p1": 1}  # None: the default, four
DEFAULT_LANES = 4


def throughput(case: str, rounds: int, shrink: int, have: set[str], peer_names: list[str],
               corrupt: str | None, inside_tls: bool = False) -> list[dict[str, object]]:
    """Measure all systems in one case; returns the rows.

    Args:
        have: which of "iperf3" and "bare" this machine can run.
        peer_names: which peers run beside them.
        corrupt: a system one byte of whose destination is flipped before it is verified.
        inside_tls: measure kvwire inside TLS too, and what one core does of its cipher.
    """
    with Pair(case, shrink) as pair, ExitStack() as peer_pairs:
        bench = _Case(pair, workloads.make(case, shrink).payload_bytes, corrupt)
        systems = bench.connect(have)
        for name in peer_names:
            systems[name] = _Peer(name, case, shrink, bench, peer_pairs)
        if inside_tls:
            secret = tls.security()
            inside = _Case(peer_pairs.enter_context(Pair(case, shrink)), bench.payload_bytes,
                           corrupt)
            systems["kvwire-tls"] = inside.connect_inside(secret)
            systems["aes-128-gcm"] = lambda run: tls.cipher(bench.payload_bytes)
        rows = [series.row() for series in alternate(case, systems, rounds)]
        rss = max(bench.growth_mib, default=0.0) / DEFAULT_LANES
    return [*rows, {"case": case, "system": "kvwire", "rss_mib_per_connection": round(rss, 2)}]


class _Case:
    """The systems of one case as functions of a run number."""

    def __init__(self, pair: Pair, payload_bytes: int, corrupt: str | None):
        self._pair = pair
        self.payload_bytes = payload_bytes
        self._corrupt = corrupt
        self.growth_mib: list[float] = []

    def connect(self, have: set[str]) -> dict[str, Callable[[int], Sample]]:
        receiving, sending = self._pair.receiving, self._pair.sending
        address = receiving.call("listen_kvwire")
        for lanes in KVWIRE_LANES.values():
            sending.call("connect_kvwire", lanes, address)
        systems = {}
        if "bare" in have:
            systems["memcpy"] = self._copy
            port = receiving.call("listen_bare")
            for lanes in (1, 2):
                receiving.start("accept_bare", lanes)
                sending.call("connect_bare", lanes, port)
                receiving.answer()
        if "iperf3" in have:
            systems["iperf3-p1"] = lambda run: self._iperf3(1)
            systems["iperf3-p2"] = lambda run: self._iperf3(2)
        if "bare" in have:
            systems["bare-p1"] = lambda run: self._bare("bare-p1", 1, run)
            systems["bare-p2"] = lambda run: self._bare("bare-p2", 2, run)
        for name, lanes in KVWIRE_LANES.items():
            systems[name] = lambda run, name=name, lanes=lanes: self._kvwire(name, lanes, run)
        self._pair.both("resident_start")
        return systems

    def connect_inside(self, security: object) -> Callable[[int], Sample]:
        """Return kvwire with this security, and nothing else, in this pair of processes."""
        address = self._pair.receiving.call("listen_kvwire", security)
        self._pair.sending.call("connect_kvwire", None, address, security)
        self._pair.both("resident_start")
        return lambda run: self._kvwire("kvwire-tls", None, run)

    def _kvwire(self, name: str, lanes: int | None, run: int) -> Sample:
        receiving, sending = self._pair.receiving, self._pair.sending
        self._pair.both("prepare", run)
        ticket = receiving.call("expect_kvwire")
        receiving.start("receive_kvwire")
        sent = sending.call("send_kvwire", lanes, ticket)
        received = receiving.answer()
        if lanes is None:
            self.growth_mib += self._pair.both("resident_growth_mib")
        return self.sample(name, sent, received)

    def _bare(self, name: str, lanes: int, run: int) -> Sample:
        self._pair.both("prepare", run)
        self._pair.receiving.start("receive_bare", lanes)
        sent = self._pair.sending.call("send_bare", lanes)
        return self.sample(name, sent, self._pair.receiving.answer())

    def sample(self, name: str, sent: tuple[int, float], received: tuple[int, float],
               pair: Pair | None = None) -> Sample:
        """Verify what `pair` (None: the case's own) has received."""
        return Sample((received[0] - sent[0]) / 1e9, sent[1] + received[1], self.payload_bytes,
                      self._verified(name, pair or self._pair))

    def _copy(self, run: int) -> Sample:
        self._pair.receiving.call("prepare", run)
        seconds, cpu_s = self._pair.receiving.call("copy")
        return Sample(seconds, cpu_s, self.payload_bytes,
                      self._verified("memcpy", self._pair))

    def _iperf3(self, connections: int) -> Sample:
        seconds, cpu_s, moved = bare.iperf3(connections)
        return Sample(seconds, cpu_s, moved, None)  # it throws its bytes away

    def _verified(self, name: str, pair: Pair) -> bool:
        wrong = pair.receiving.call("verify", name == self._corrupt)
        if wrong is not None:
            progress("")
            print(f"{name}: destination byte {wrong} is wrong", file=sys.stderr)
        return wrong is None


class _Peer:
    """A peer in one case, connected at its first run."""

    def __init__(self, name: str, case: str, shrink: int, bench: _Case, pairs: ExitStack):
        self._name = name
        self._start = lambda: pairs.enter_context(PeerPair(name, case, shrink))
        self._bench = bench
        self._pair: PeerPair | None = None

    def __call__(self, run: int) -> Sample:
        self._pair = self._pair or self._start()
        received, sent = self._pair.together("receive_peer", "send_peer", run)
        return self._bench.sample(self._name, sent, received, self._pair)


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows in plain text, with each rate's share of iperf3's better one."""
    lines, case = [], None
    heading = (f"{'':17}{'GB/s':>8}{'min':>8}{'max':>8}{'of iperf3':>11}{'CPU s/GiB':>11}"
               f"{'runs':>6}  verified")
    for row in rows:
        if "machine" in row:
            continue
        if row["case"] != case:
            case = row["case"]
            best = max((r["gbps_median"] for r in rows if r.get("case") == case
                        and r["system"].startswith("iperf3")), default=None)
            lines += ["", case + (heading[len(case):] if "gbps_median" in row else
                                  f"{'p50 us':>{25 - len(case)}}{'p99 us':>8}")]
        lines.append(_line(row, best))
    return "\n".join(lines)


def _line(row: dict[str, object], best: float | None) -> str:
    name = f"  {row['system']:15}"
    if "rss_mib_per_connection" in row:
        return f"{name}{row['rss_mib_per_connection']:8.2f} MiB resident per connection"
    if "p50_us" in row:
        return f"{name}{row['p50_us']:8.1f}{row['p99_us']:8.1f}"
    if row["verified"] is False:
        return f"{name}  WRONG BYTES in {row['runs']} runs"
    share = f"{row['gbps_median'] / best:11.2f}" if best else f"{'-':>11}"
    return (f"{name}{row['gbps_median']:8.2f}{row['gbps_min']:8.2f}{row['gbps_max']:8.2f}{share}"
            f"{row['cpu_s_per_gib']:11.2f}{row['runs']:6}  "
            f"{'yes' if row['verified'] else '-'}")


def available() -> set[str]:
    """Return which optional systems can run; says on stderr what the others need."""
    have = set()
    for name, probe in {"iperf3": bare.iperf3_version, "bare": bare.build_native}.items():
        try:
            probe()
            have.add(name)
        except (bare.Iperf3Missing, BuildError) as error:
            print(error, file=sys.stderr)
    return have


def arguments(given: list[str] | None) -> argparse.Namespace:
    names = list(workloads.CASES)
    parser = argparse.ArgumentParser("python -m bench.loopback", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument("--cases", default=",".join(name for name in names if name != workloads.KV),
                        help="comma-separated; %(default)s; also " + workloads.KV)
    parser.add_argument("--rounds", type=int, help=f"timed runs of each system; {ROUNDS}")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_ROUNDS} rounds")
    parser.add_argument("--peers", nargs="?", const=",".join(peers.PEERS), metavar="NAMES",
                        help=f"other transports beside it, of: {','.join(peers.PEERS)}; "
                             "without NAMES: all")
    parser.add_argument("--tls", action="store_true",
                        help="kvwire inside TLS 1.3 too, and the speed of its cipher")
    # For tests: divide the sizes; flip a byte that this system has delivered.
    parser.add_argument("--shrink", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--corrupt", help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - set(names):
        parser.error(f"unknown cases: {', '.join(sorted(unknown))}")
    options.peers = options.peers.split(",") if options.peers else []
    if unknown := set(options.peers) - set(peers.PEERS):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    if options.tls and (lacks := tls.missing()):
        parser.error(f"--tls: {lacks}")
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    return options


def main(given: list[str] | None = None) -> int:
    """Run the benchmark; returns 1 when any run delivered a wrong byte."""
    options = arguments(given)
    have = available()
    beside = peers.installed(options.peers)
    rows: list[dict[str, object]] = [{"machine": machine(peers.versions(beside))}]
    good = True
    for case in options.cases:
        if case == roundtrip.CASE:
            more, right = roundtrip.measure(options.rounds, options.shrink, "bare" in have, beside)
            good &= right
        else:
            more = throughput(case, options.rounds, options.shrink, have, beside, options.corrupt,
                              options.tls)
        rows += more
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(table(rows))
    return 0 if good and all(row.get("verified") is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
