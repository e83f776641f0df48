"""Ten thousand transfers over one link, and a thousand at once: what grows, and by how much."""

from __future__ import annotations

import asyncio
from pathlib import Path

from bench.campaign.cargo import Cargo
from bench.campaign.process import Peer
from bench.campaign.sides import Receiving, Sending, status_kib
from bench.measure import progress
from kvwire.receiver import Receiver, Ticket
from kvwire.sender import Sender, Transfer

__all__ = ["RESIDENT_MAX_MIB", "endure"]

RESIDENT_MAX_MIB = 64  # of either process, beyond the callers' arrays, with all transfers open
CONCURRENT = 1000
_AT_ONCE = 100
_COUNTED_EVERY = 1000
_GROWTH_MAX_MIB = 8  # from the first hundred transfers to the last
_SMALL = Cargo(seed=1, layers=1, tokens=16, heads=1, head_dim=64)
_BROAD = Cargo(seed=2, layers=4, tokens=64, heads=2, head_dim=64)


class _Enduring:
    """Half of a link that stays; `held` are the arrays of the present transfers."""

    writable = False

    async def prepare(self, cargo: Cargo, count: int) -> None:
        """Make arrays; what is resident from here on beyond now is kvwire's."""
        self.held = [cargo.held(writable=self.writable) for _ in range(count)]
        Path("/proc/self/clear_refs").write_text("5")
        self._resident_kib = status_kib("VmRSS")

    async def growth_mib(self) -> float:
        """Return the most that was resident since `prepare`, beyond what was then."""
        return round((status_kib("VmHWM") - self._resident_kib) / 1024, 1)


class _Source(_Enduring, Sending):
    async def connect(self, address: str) -> None:
        self.shared["none"] = Sender(address)
        self.shared["none"].connect()

    async def send(self, tickets: list[str]) -> None:
        self.sent: list[Transfer] = [self.shared["none"].open(ticket, held.memory)
                                     for ticket, held in zip(tickets, self.held)]
        for transfer in self.sent:
            transfer.push(0)

    async def finish(self) -> None:
        for transfer, held in zip(self.sent, self.held):
            for layer in held.cargo.all_layers[1:]:
                transfer.push(layer)
            transfer.finish()
        for transfer in self.sent:
            await transfer


class _Sink(_Enduring, Receiving):
    writable = True

    async def expect(self) -> list[str]:
        self.tickets: list[Ticket] = [self.shared["none"].expect(held.memory) for held in self.held]
        return [ticket.id for ticket in self.tickets]

    async def first_layers(self) -> int:
        """Wait for a layer of each transfer; returns how many are open then."""
        for ticket in self.tickets:
            await ticket.layer(0)
        return self.shared["none"].stats()["open_transfers"]

    async def collect(self) -> list[str]:
        """Wait for all; returns what is wrong with any."""
        for ticket in self.tickets:
            await ticket
        report = dict.fromkeys(self.held[0].cargo.all_layers, "ready")
        return [wrong for held in self.held if (wrong := held.wrong(report))]


async def endure(transfers: int) -> dict[str, object]:
    """Measure both; returns the JSON, with what is wrong under "violations".

    Args:
        transfers: over one link, a hundred at a time; a multiple of 1,000.
    """
    source, sink = Peer(_Source), Peer(_Sink)
    try:
        await source.call("connect", (await sink.call("listen"))["none"])
        wrong = await _together(source, sink, _SMALL, _AT_ONCE)
        census = [await _census(source, sink)]
        for done in range(_AT_ONCE, transfers, _AT_ONCE):
            wrong += await _together(source, sink, _SMALL, _AT_ONCE)
            if (done + _AT_ONCE) % _COUNTED_EVERY == 0:
                progress(f"{done + _AT_ONCE}/{transfers} transfers over one link")
                census.append(await _census(source, sink))
        wrong += _growth(census)
        wrong += await _together(source, sink, _BROAD, CONCURRENT)
        grown = {"sending": await source.call("growth_mib"),
                 "receiving": await sink.call("growth_mib")}
    finally:
        source.close()
        sink.close()
    progress("")
    wrong += [f"the {side} process: {mib} MiB more resident with {CONCURRENT} open transfers"
              for side, mib in grown.items() if mib > RESIDENT_MAX_MIB]
    return {"transfers": transfers, "concurrent": CONCURRENT,
            "concurrent_mib": round(CONCURRENT * _BROAD.spec.bytes(_BROAD.tokens) / 2**20, 1),
            "resident_growth_mib": grown, "census": census, "violations": wrong}


async def _together(source: Peer, sink: Peer, cargo: Cargo, count: int) -> list[str]:
    """Transfer `count` cargoes at once: none ends before all have begun to arrive."""
    await asyncio.gather(source.call("prepare", cargo, count), sink.call("prepare", cargo, count))
    await source.call("send", await sink.call("expect"))
    opened = await sink.call("first_layers")
    _, wrong = await asyncio.gather(source.call("finish"), sink.call("collect"))
    return wrong + [f"only {opened} of {count} were open"] * (opened < count)


async def _census(source: Peer, sink: Peer) -> dict[str, dict[str, int]]:
    return {"sending": await source.call("census"), "receiving": await sink.call("census")}


def _growth(census: list[dict[str, dict[str, int]]]) -> list[str]:
    # Of two: what a process opens but once, early, is no growth; what transfers leave grows on.
    first, second, last = census[0], census[min(1, len(census) - 2)], census[-1]
    before = {side: {what: max(count, second[side][what]) for what, count in held.items()}
              for side, held in first.items()}
    return [f"the {side} process holds {last[side][what]} {what}, {count} at the beginning"
            for side, held in before.items() for what, count in held.items()
            if last[side][what] > count + (_GROWTH_MAX_MIB if "MiB" in what else 0)]
