"""Reading a link: what its lanes carry, how the network treats them, early signs of congestion."""

from __future__ import annotations

import math
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kvwire.codec import Codec
from kvwire.errors import KvwireError, UsageError
from kvwire.layout import DType, GroupKind

__all__ = ["CodecChoice", "CodecEstimate", "CongestionThresholds", "CongestionWatch", "LaneStats",
           "Link", "LinkOptions", "LinkStats", "TransferStats"]

WINDOW_S = 1.0
CONGESTION_STATES = ("open", "disorder", "cwr", "recovery", "loss")
SIGNS = frozenset({"loss", "rtt", "backlog"})
GBPS = 8e-9  # of one byte per second
PACED_MAX_GBPS = 1e9  # above it the kernel means "not at all"


@dataclass(frozen=True)
class LinkOptions:
    """How the connections of each link use the network; for what this side sends.

    Attributes:
        congestion_control: "bbr", "cubic", "reno" or what else the kernel has. None: its default,
            but BBR, if it has that, in place of cubic and reno, and not over loopback.
        bandwidth_max_gbps: 10^9 bits a second that all lanes of a link together may send,
            retransmissions included, headers of TCP and below not (6 % at an MTU of 1500). Each
            lane has an equal share, whether it uses it or not. None: no limit.
        dscp: differentiated-services mark of every datagram, 0 to 63; None: the system's.
        zero_copy: have the network card read the lent arrays (MSG_ZEROCOPY), each lane until the
            kernel says that it copied them all the same, as it does on loopback. A push completes
            when its receipt is there and no card reads it; a lane that keeps memory for half a
            second after it was wanted back (by `cancel`, say) is reset. Not inside TLS.
            KVWIRE_ZEROCOPY=0 or 1 overrides it.
    """

    congestion_control: str | None = None
    bandwidth_max_gbps: float | None = None
    dscp: int | None = None
    zero_copy: bool = False

    def native(self) -> dict[str, object]:
        """Return the options as the extension takes them; raises UsageError."""
        cap = self.bandwidth_max_gbps
        if cap is not None and not 1e-4 <= cap <= 1e4:
            raise UsageError(f"bandwidth_max_gbps is {cap!r}; it must be 0.0001 to 10000")
        if self.dscp is not None and self.dscp not in range(64):
            raise UsageError(f"dscp is {self.dscp!r}; it must be 0 to 63")
        return {"congestion_control": self.congestion_control or "",
                "bandwidth_max_bytes_per_s": 0 if cap is None else int(cap / GBPS),
                "dscp": -1 if self.dscp is None else self.dscp,
                "zero_copy": bool(self.zero_copy)}


@dataclass(frozen=True)
class LaneStats:
    """One TCP connection, as the kernel sees it. Counters run from the lane's beginning.

    Attributes:
        lane: its index in the link.
        congestion_state: "open" (all is well), "disorder", "cwr", "recovery" or "loss".
        goodput_gbps: acknowledged (sender) or received (receiver) over the window, in 10^9 bits
            a second; kvwire's headers, 0.03 %, count.
        delivery_gbps: the kernel's latest estimate of what the path delivers.
        pacing_gbps: the rate that it paces at; None: it does not.
        rtt_ms, rtt_min_ms: round trip, smoothed, and the least seen lately.
        loss_rate: retransmitted bytes of those sent in the window, 0 to 1.
        sent_bytes: retransmissions included.
        retransmitted_bytes: of these.
        in_flight_bytes: on their way: sent and not acknowledged.
        queue_bytes: prepared or in the kernel's queue, and not sent.
        window_bytes: the congestion window.
        busy_s: seconds with data outstanding.
        receiver_limited_s, buffer_limited_s: of these, held back by the receiver's window, and by
            the kernel's send buffer.
    """

    lane: int
    congestion_state: str
    goodput_gbps: float
    delivery_gbps: float
    pacing_gbps: float | None
    rtt_ms: float
    rtt_min_ms: float
    loss_rate: float
    sent_bytes: int
    retransmitted_bytes: int
    in_flight_bytes: int
    queue_bytes: int
    window_bytes: int
    busy_s: float
    receiver_limited_s: float
    buffer_limited_s: float


@dataclass(frozen=True)
class CodecEstimate:
    """What codec "auto" knows of one codec, for one kind of tensor. None: not measured.

    Attributes:
        codec: "raw", "lz4" or "tiered".
        ratio: raw bytes for each byte of payload, lately.
        encode_gbps, decode_gbps: cache that one core codes here and decodes at the receiver, in
            10^9 bits a second; checksums count.
        throughput_gbps: cache that the link would bring with it.
    """

    codec: str
    ratio: float
    encode_gbps: float | None
    decode_gbps: float | None
    throughput_gbps: float | None


@dataclass(frozen=True)
class CodecChoice:
    """What codec "auto" has chosen for one kind of tensor.

    Attributes:
        group_kind, dtype: the kind, as in `CacheSpec`.
        codec: the chosen one.
        why: a sentence.
        bandwidth_gbps: what the link carries, whatever the bytes mean.
        send_gbps, receive_gbps: of that one core can send here, and receive there. None: not
            measured.
        estimates: of each codec that may be used.
    """

    group_kind: str
    dtype: str
    codec: str
    why: str
    bandwidth_gbps: float | None
    send_gbps: float | None
    receive_gbps: float | None
    estimates: tuple[CodecEstimate, ...]


@dataclass(frozen=True)
class LinkStats:
    """All lanes of a link together; sums, unless it says otherwise.

    Attributes:
        link: its id.
        lanes: one `LaneStats` each; none while the link is being made or made again.
        window_s: what the rates cover: the last second, or since the poll before when that is
            longer ago, or since the link was made.
        goodput_gbps, delivery_gbps, sent_bytes, retransmitted_bytes, in_flight_bytes,
            queue_bytes: as for lanes.
        effective_gbps: cache bytes verified at the receiver over the window, before any coding.
        rtt_ms: the mean of the lanes; rtt_min_ms: their least.
        loss_rate: retransmitted bytes of those sent in the window.
        backlog_bytes: cache bytes that were pushed and are not verified; 0 for a receiver.
        capacity_gbps: `LinkOptions.bandwidth_max_gbps`, or the highest goodput that a poll has
            seen so far.
        utilisation: goodput over capacity, 0 to 1.
        codecs: what codec "auto" has chosen; empty without it.
    """

    link: str
    lanes: tuple[LaneStats, ...]
    window_s: float
    goodput_gbps: float
    effective_gbps: float
    delivery_gbps: float
    rtt_ms: float
    rtt_min_ms: float
    loss_rate: float
    sent_bytes: int
    retransmitted_bytes: int
    in_flight_bytes: int
    queue_bytes: int
    backlog_bytes: int
    capacity_gbps: float
    utilisation: float
    codecs: tuple[CodecChoice, ...]


@dataclass(frozen=True)
class TransferStats:
    """How one transfer used its link.

    Attributes:
        overlap_ratio: how much of it hid behind prefill: of the bytes verified by now (in the end:
            all), the share that was verified when the last push was made, 0 to 1; of a cache on a
            GPU, when its last slice was handed to the wire.
        goodput_gbps: chunk payload sent, in 10^9 bits a second from the first push to the end, or
            to now.
        effective_gbps: cache bytes verified, likewise.
        link_utilisation: that goodput over `LinkStats.capacity_gbps`; None when the link is not
            known, or gone.
    """

    overlap_ratio: float
    goodput_gbps: float
    effective_gbps: float
    link_utilisation: float | None


@dataclass(frozen=True)
class CongestionThresholds:
    """What `on_congestion` tells of.

    Attributes:
        loss_rate: "loss": more than this share of the bytes of the last second was sent again.
        rtt_factor, rtt_rise_ms: "rtt": a lane's round trip is above this multiple of its least,
            and by so much.
        backlog_s: "backlog": what was pushed would take longer than this at the present goodput.
        poll_s: how often to look.
        quiet_s: a sign is told again after it has been absent for so long.
    """

    loss_rate: float = 0.001
    rtt_factor: float = 2.0
    rtt_rise_ms: float = 5.0
    backlog_s: float = 2.0
    poll_s: float = 0.01
    quiet_s: float = 1.0

    def signs(self, stats: LinkStats) -> frozenset[str]:
        """Return which of "loss", "rtt" and "backlog" `stats` shows."""
        drained_gbit = stats.effective_gbps * self.backlog_s
        found = {
            "loss": stats.loss_rate > self.loss_rate,
            "rtt": any(lane.rtt_ms > self.rtt_factor * lane.rtt_min_ms
                       and lane.rtt_ms > self.rtt_rise_ms + lane.rtt_min_ms
                       for lane in stats.lanes),
            "backlog": stats.window_s >= WINDOW_S / 2
                       and stats.backlog_bytes * GBPS > drained_gbit,
        }
        return frozenset(sign for sign, present in found.items() if present)


class Link:
    """A link of a `Sender` or `Receiver`; from ``links()``. Safe from any thread."""

    def __init__(self, native: object, name: bytes, capacity_gbps: float | None = None):
        self._native = native
        self._name = name
        self._limit_gbps = capacity_gbps
        self._peak_gbps = 0.0
        self._lock = threading.Lock()
        self._samples: deque[_Sample] = deque()

    @property
    def id(self) -> str:
        """128-bit name, 32 hexadecimal digits."""
        return self._name.hex()

    def stats(self) -> LinkStats:
        """Read counters of all lanes; takes microseconds and disturbs no transfer.

        Raises: UsageError when the link is gone.
        """
        (born_ns, now_ns, verified_bytes, backlog_bytes, lanes,
         choices) = self._native.link_stats(self._name)
        now = _Sample(now_ns / 1e9, verified_bytes,
                      {lane[0]: (lane[3], lane[4], lane[5]) for lane in lanes})
        with self._lock:
            before = self._before(now, born_ns / 1e9)
            return self._summary(now, before, backlog_bytes, lanes, _codec_choices(*choices))

    def _before(self, now: _Sample, born_s: float) -> _Sample:
        """Remember `now`; return the sample that rates are counted from."""
        samples = self._samples
        if not samples:
            samples.append(_Sample(born_s, 0, {}))
        while len(samples) > 1 and samples[1].time_s <= now.time_s - WINDOW_S:
            samples.popleft()
        if now.time_s - samples[-1].time_s >= WINDOW_S / 128:
            samples.append(now)
        return samples[0]

    def _summary(self, now: _Sample, before: _Sample, backlog_bytes: int,
                 native_lanes: list[tuple], codecs: tuple[CodecChoice, ...]) -> LinkStats:
        window_s = max(now.time_s - before.time_s, 1e-6)
        moved, sent, again = zip(*(
            [b - a for a, b in zip(before.lanes.get(serial, (0, 0, 0)), counters)]
            for serial, counters in now.lanes.items())) if now.lanes else ((), (), ())
        lanes = tuple(map(_lane_stats, native_lanes, moved, sent, again,
                          [window_s] * len(native_lanes)))
        goodput_gbps = sum(moved) / window_s * GBPS
        if window_s >= WINDOW_S / 100:  # over less a burst looks like a rate
            self._peak_gbps = max(self._peak_gbps, goodput_gbps)
        capacity_gbps = self._limit_gbps or self._peak_gbps
        return LinkStats(
            link=self.id, lanes=lanes, window_s=window_s, goodput_gbps=goodput_gbps,
            effective_gbps=(now.verified_bytes - before.verified_bytes) / window_s * GBPS,
            delivery_gbps=sum(lane.delivery_gbps for lane in lanes),
            rtt_ms=sum(lane.rtt_ms for lane in lanes) / max(len(lanes), 1),
            rtt_min_ms=min((lane.rtt_min_ms for lane in lanes), default=0.0),
            loss_rate=sum(again) / max(sum(sent), 1),
            sent_bytes=sum(lane.sent_bytes for lane in lanes),
            retransmitted_bytes=sum(lane.retransmitted_bytes for lane in lanes),
            in_flight_bytes=sum(lane.in_flight_bytes for lane in lanes),
            queue_bytes=sum(lane.queue_bytes for lane in lanes), backlog_bytes=backlog_bytes,
            capacity_gbps=capacity_gbps,
            utilisation=min(goodput_gbps / capacity_gbps, 1.0) if capacity_gbps else 0.0,
            codecs=codecs)


@dataclass(frozen=True)
class _Sample:
    time_s: float
    verified_bytes: int
    lanes: dict[int, tuple[int, int, int]]  # by serial: moved, sent, retransmitted bytes


def _codec_choices(bandwidth: float, send: float, receive: float, kinds: list[tuple]
                   ) -> tuple[CodecChoice, ...]:
    def gbps(bytes_per_s: float) -> float | None:
        return bytes_per_s * GBPS or None

    def estimate(codec: int, ratio: float, *rates: float) -> CodecEstimate:
        return CodecEstimate(Codec(codec).name.lower(), ratio, *map(gbps, rates))

    return tuple(
        CodecChoice(GroupKind(group).name.lower(), DType(dtype).name.lower(),
                    Codec(codec).name.lower(), why, gbps(bandwidth), gbps(send), gbps(receive),
                    tuple(estimate(*candidate) for candidate in candidates))
        for group, dtype, codec, why, candidates in kinds)


def _lane_stats(lane: tuple, moved_bytes: int, sent_bytes: int, again_bytes: int,
                window_s: float) -> LaneStats:
    (_, index, state, _, sent, again, delivery, pacing, rtt_us, rtt_min_us, in_flight, queue,
     window, busy_us, receiver_us, buffer_us) = lane
    pacing_gbps = pacing * GBPS
    return LaneStats(
        index, CONGESTION_STATES[state], moved_bytes / window_s * GBPS, delivery * GBPS,
        pacing_gbps if pacing_gbps < PACED_MAX_GBPS else None, rtt_us / 1e3, rtt_min_us / 1e3,
        again_bytes / max(sent_bytes, 1), sent, again, in_flight, queue, window, busy_us / 1e6,
        receiver_us / 1e6, buffer_us / 1e6)


class CongestionWatch:
    """The thread that polls an endpoint's links and tells of signs; ends with `stop` or with the
    endpoint."""

    def __init__(self, links: weakref.WeakMethod[Callable[[], Iterable[Link]]],
                 callback: Callable[[frozenset[str], LinkStats], object],
                 thresholds: CongestionThresholds):
        self._links = links
        self._callback = callback
        self._thresholds = thresholds
        self._absent: dict[str, dict[str, float]] = {}  # by link, sign: since when
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvwire-congestion", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """When it returns the callback is not called any more, unless it is what called."""
        self._stopping.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._thresholds.poll_s):
            links = self._links()
            if links is None:
                return
            try:
                self._look(links())
            except KvwireError:  # the endpoint was closed
                return
            del links

    def _look(self, links: Iterable[Link]) -> None:
        for link in links:
            try:
                stats = link.stats()
            except UsageError:  # gone since
                continue
            now_s = time.monotonic()
            signs = self._thresholds.signs(stats)
            absent = self._absent.setdefault(link.id, dict.fromkeys(SIGNS, -math.inf))
            new = {sign for sign in signs
                   if now_s - absent.pop(sign, now_s) > self._thresholds.quiet_s}
            for sign in SIGNS - signs:
                absent.setdefault(sign, now_s)
            if new:
                self._tell(frozenset(new), stats)

    def _tell(self, signs: frozenset[str], stats: LinkStats) -> None:
        try:
            self._callback(signs, stats)
        except Exception:  # the callback's bug is shown, and does not end the watch
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self._thread)))
