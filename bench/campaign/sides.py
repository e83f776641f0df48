"""The two processes of the campaign: long-lived, many runs at once, each reporting what it saw."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import random
import resource
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import kvwire
from bench.campaign.cargo import SPENT, Cargo, Held
from bench.campaign.plan import LEASE_S, Plan
from bench.campaign.process import Lateness
from kvwire.errors import ErrorCode, KvwireError, UsageError
from kvwire.receiver import Receiver, Ticket
from kvwire.security import HmacAdmission, TlsPsk
from kvwire.sender import Sender, Transfer

__all__ = ["Receiving", "SLACK_S", "Sending", "status_kib"]

SLACK_S = 3.0  # a transfer may end so much later than its deadline, and by as much as this ..
STARVED_S = 0.5  # .. process got no processor; beyond this a run need not arrive in time
_TINY = Cargo(seed=0, layers=1, tokens=1, heads=1, head_dim=8)
_KEY = bytes(range(32))
SECURITIES = {"none": None, "hmac": HmacAdmission(_KEY)}
if kvwire.backends()["tls"]:
    SECURITIES["psk"] = TlsPsk("campaign", _KEY)
_UNLIMITED = resource.RLIM_INFINITY
_FILES_MAX = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def options(security: str, lease_s: float = LEASE_S) -> dict[str, object]:
    """Return what both ends of a link are given."""
    return {"security": SECURITIES[security], "lease_s": lease_s}


class _Side:
    """What both sides have in common: runs, their ends, limits, and what is left over."""

    name = ""

    def __init__(self):
        self.runs: dict[int, _Run] = {}
        self.shared: dict[str, Sender | Receiver] = {}
        self._made: list[Held] = []
        self.lateness = Lateness()
        self._leaked: list[int] = []

    async def limit(self, plan: Plan) -> None:
        """Take memory or file descriptors away from this process until the run has ended."""
        harm = plan.misfortune
        self._made = [cargo.held(writable=self.name == "receiving") for cargo in plan.cargoes]
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(8)))
        if harm.kind == "memory":
            used = status_kib("VmSize") << 10
            resource.setrlimit(resource.RLIMIT_AS, (used + int(harm.value), _UNLIMITED))
        elif harm.kind == "files":
            highest = max(int(name) for name in os.listdir("/proc/self/fd"))
            resource.setrlimit(resource.RLIMIT_NOFILE, (1 + highest + int(harm.value), _FILES_MAX))

    def unlimit(self) -> None:
        """Give it back, so that what follows measures kvwire, not the campaign."""
        resource.setrlimit(resource.RLIMIT_AS, (_UNLIMITED, _UNLIMITED))
        resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES_MAX, _FILES_MAX))

    async def late(self, seed: int) -> bool:
        """True when nothing was written to memory that has been given back."""
        return seed not in self.runs or all(held.is_all(SPENT)
                                            for held in self.runs[seed].spent)

    async def drop(self, seed: int) -> str | None:
        """Close what belongs to the run alone; returns what is wrong with that."""
        run = self.runs.pop(seed, None)
        if run is None or run.endpoint in self.shared.values():
            return None
        return await closes(run)

    async def census(self) -> dict[str, int]:
        """Count what this process holds, when nothing is going on."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free is no leak
        stats = Counter()
        for each in self.shared.values():
            stats.update(each.stats())
        return {"fds": len(os.listdir("/proc/self/fd")),
                "native threads": len(os.listdir("/proc/self/task")) - threading.active_count(),
                "resident MiB": status_kib("VmRSS") >> 10,
                "open transfers": stats["open_transfers"],
                "connections": stats["connections"], "links": stats["links"]}

    async def _open_for_asyncio(self, handle: Transfer | Ticket) -> None:
        """Make the descriptor that the first wait makes, so that it counts as no leak."""
        waiting = asyncio.create_task(_awaited(handle))
        await asyncio.sleep(0)
        handle.cancel()
        await asyncio.wait({waiting})
        waiting.exception()

    def _begin(self, plan: Plan, endpoint: Sender | Receiver) -> _Run:
        held, self._made = self._made, []
        run = _Run(self, plan, endpoint, held or [
            cargo.held(writable=self.name == "receiving") for cargo in plan.cargoes])
        if before := self.runs.get(plan.seed):
            run.spent = before.spent
        self.runs[plan.seed] = run
        return run

    def _end_early(self, run: _Run, handle: Transfer | Ticket) -> Awaitable | None:
        """Return the coroutine that cancels or closes in the middle, when this run wants it."""
        harm = run.plan.misfortune
        if harm is None or harm.side != self.name or harm.kind not in ("cancel", "close"):
            return None
        own = run.endpoint not in self.shared.values()
        end = run.endpoint.close if harm.kind == "close" and own else handle.cancel

        async def end_it() -> None:
            await asyncio.sleep(max(0.0, run.began + harm.after_s - time.monotonic()))
            await asyncio.to_thread(end)
        return end_it()


class _Run:
    def __init__(self, side: _Side, plan: Plan, endpoint: Sender | Receiver, held: list[Held]):
        self.plan, self.endpoint, self.held = plan, endpoint, held
        self._lateness, self._late_s = side.lateness, side.lateness.seconds
        self.handles: list[Transfer | Ticket] = []
        self.spent: list[Held] = []
        self.began = time.monotonic()

    @property
    def late_s(self) -> float:
        """How much later than it should this process has run since the run began."""
        return self._lateness.seconds - self._late_s

    def spend(self, held: Held) -> None:
        """Its transfer has ended: spoil it; nobody may write it any more."""
        held.fill(SPENT)
        self.spent.append(held)


class Sending(_Side):
    name = "sending"

    async def listen(self) -> dict[str, str]:
        """Listen for receivers of all runs; returns the address of each security mode."""
        self.shared = {name: Sender(listen="127.0.0.1:0", **options(name))
                       for name in SECURITIES}
        for each in self.shared.values():
            await self._open_for_asyncio(each.offer(_TINY.held(writable=False).memory))
        return {name: each.address for name, each in self.shared.items()}

    async def offer(self, plan: Plan) -> list[str]:
        """Offer the run's cargoes on the shared sender; returns the offers' ids."""
        run = self._begin(plan, self.shared[plan.security])
        run.handles = [run.endpoint.offer(held.memory, deadline_s=plan.deadline_s,
                                         codec=plan.codec) for held in run.held]
        return [offer.offer_id for offer in run.handles]

    async def dial(self, plan: Plan, address: str) -> dict[str, object] | None:
        """Make a sender for the run alone; returns how that failed, or None."""
        began = time.monotonic()
        try:
            self._begin(plan, Sender(address, lanes=plan.lanes, codec=plan.codec,
                                     chunk_bytes=plan.chunk_bytes,
                                     connect_timeout_s=plan.deadline_s,
                                     **options(plan.security, plan.lease_s)))
        except Exception as error:
            return outcome(plan, error, began)
        return None

    async def again(self, plan: Plan, address: str) -> None:
        """Use the same sender once more."""
        self._begin(plan, self.runs[plan.seed].endpoint)

    async def adopt(self, plan: Plan) -> None:
        """Use the link that the run's receiver makes to the shared sender."""
        self._begin(plan, self.shared[plan.security])

    async def send(self, plan: Plan, tickets: list[str], link: str | None = None
                   ) -> list[dict[str, object]]:
        """Push all there is; returns how each transfer ended."""
        run = self.runs[plan.seed]
        try:
            run.handles = run.handles or [
                run.endpoint.open(ticket, held.memory, deadline_s=plan.deadline_s, link=link,
                                  codec=plan.codec, priority=held.cargo.seed % 3)
                for ticket, held in zip(tickets, run.held)]
        except Exception as error:
            return [outcome(plan, error, run.began) for _ in run.held]
        return await asyncio.gather(*(self._carry_through(run, handle, held)
                                      for handle, held in zip(run.handles, run.held)))

    async def _carry_through(self, run: _Run, transfer: Transfer, held: Held) -> dict:
        pushing = asyncio.create_task(self._push(run, transfer, held))
        found = await settle(run, transfer, self._end_early(run, transfer))
        self.unlimit()
        pushes = await pushing
        if not found["hangs"] and not all(push.done() for push in pushes):
            found["wrong"] = "a push of an ended transfer has not completed"
        run.spend(held)
        return found

    async def _push(self, run: _Run, transfer: Transfer, held: Held) -> list:
        """Push as planned; spoils what has been given back, where so planned."""
        pushes, spoiling = [], []
        plan = run.plan
        try:
            for layer, options in _portions(plan, held.cargo):
                pushes.append(transfer.push(layer, **options))
                if plan.reuse_source and not plan.in_parts:
                    spoiling.append(asyncio.create_task(self._spoil(pushes[-1], held, layer)))
                if plan.by_layer:
                    await asyncio.sleep(plan.pause_s)
            transfer.finish({"seed": run.plan.seed})
        except UsageError:
            if not transfer.done() and transfer._endpoint._finalizer.alive:
                raise
        await asyncio.wait(spoiling, timeout=run.plan.deadline_s + SLACK_S) if spoiling else None
        return pushes

    async def _spoil(self, push, held: Held, layer: int) -> None:
        try:
            await push
        except KvwireError:  # it is not to be known, so it is not to be spoiled
            return
        held.fill(SPENT, layer)


class Receiving(_Side):
    name = "receiving"

    async def listen(self) -> dict[str, str]:
        """Listen for senders of all runs; returns the address of each security mode."""
        self.shared = {name: Receiver(**options(name)) for name in SECURITIES}
        for each in self.shared.values():
            await self._open_for_asyncio(each.expect(_TINY.held(writable=True).memory))
        return {name: each.address for name, each in self.shared.items()}

    async def bind(self, plan: Plan, ticket_ids: list[bytes]) -> list[dict[str, object]]:
        """Expect the run's cargoes on the shared receiver; returns how each ticket ended."""
        run = self._begin(plan, self.shared[plan.security])
        await asyncio.sleep(plan.bind_after_s)
        return await self._expect(run, ticket_ids)

    async def dial(self, plan: Plan, address: str) -> str | dict[str, object]:
        """Make a link to a listening sender; returns its id, or how that failed."""
        began = time.monotonic()
        try:
            run = self._begin(plan, Receiver(listen=None, connect_timeout_s=plan.deadline_s,
                                             **options(plan.security, plan.lease_s)))
            return await asyncio.to_thread(run.endpoint.dial, address, lanes=plan.lanes)
        except Exception as error:
            return outcome(plan, error, began)

    async def bind_dialled(self, plan: Plan, ticket_ids: list[bytes]) -> list[dict[str, object]]:
        return await self._expect(self.runs[plan.seed], ticket_ids)

    async def pull(self, plan: Plan, address: str, offers: list[str]) -> list[dict[str, object]]:
        began = time.monotonic()
        try:
            run = self._begin(plan, Receiver(listen=None, connect_timeout_s=plan.deadline_s,
                                             **options(plan.security, plan.lease_s)))
        except Exception as error:
            return [outcome(plan, error, began) for _ in plan.cargoes]

        def pull(offer: str, held: Held) -> Ticket:
            return run.endpoint.pull(address, offer, held.memory, deadline_s=plan.deadline_s,
                                     lanes=plan.lanes)
        return await self._receive_each(run, [
            lambda offer=offer, held=held: asyncio.to_thread(pull, offer, held)
            for offer, held in zip(offers, run.held)])

    async def _expect(self, run: _Run, ticket_ids: list[bytes]) -> list[dict[str, object]]:
        async def expect(name: bytes, held: Held) -> Ticket:
            return run.endpoint.expect(held.memory, deadline_s=run.plan.deadline_s,
                                       ticket_id=name)
        return await self._receive_each(run, [
            lambda name=name, held=held: expect(name, held)
            for name, held in zip(ticket_ids, run.held)])

    async def _receive_each(self, run: _Run, openings: list[Callable[[], Awaitable[Ticket]]]
                            ) -> list[dict[str, object]]:
        return await asyncio.gather(*(self._receive(run, opening, held)
                                      for opening, held in zip(openings, run.held)))

    async def _receive(self, run: _Run, opening: Callable[[], Awaitable[Ticket]],
                       held: Held) -> dict[str, object]:
        try:
            ticket = await opening()
        except Exception as error:
            found = outcome(run.plan, error, run.began)
            report = dict.fromkeys(held.cargo.all_layers, "partly written")
            self.unlimit()
        else:
            run.handles.append(ticket)
            found = await settle(run, ticket, self._end_early(run, ticket))
            self.unlimit()
            report = ticket.report()
            if found["error"] is None and set(report.values()) != {"ready"}:
                found["wrong"] = f"delivered, but the report says {report}"
        if run.plan.sabotage == "wrong byte":
            held.fill(0, held.cargo.layers)
        found["wrong"] = found["wrong"] or held.wrong(report)
        run.spend(held)
        if run.plan.sabotage == "late write":
            held.fill(0, held.cargo.layers)
        if run.plan.sabotage == "leak":
            self._leaked.append(os.dup(0))
        return found


def _portions(plan: Plan, cargo: Cargo) -> list[tuple[int, dict[str, object]]]:
    """Return the pushes of one transfer: (layer, options of `Transfer.push`)."""
    rng = random.Random(cargo.seed)
    portions = []
    for layer in cargo.all_layers:
        cuts = [0, cargo.tokens]
        if plan.in_parts and layer < cargo.layers:
            cuts = sorted({*cuts, rng.randint(0, cargo.tokens), rng.randint(0, cargo.tokens)})
        ranges = list(zip(cuts, cuts[1:])) or [(0, 0)]
        portions += [(layer, {"tokens": tokens}) for tokens in ranges]
    if plan.in_parts:
        rng.shuffle(portions)
        portions = [(layer, options | {"priority": rng.randint(-2, 2)})
                    for layer, options in portions]
    return portions


async def _awaited(handle: Transfer | Ticket) -> object:
    return await handle


async def settle(run: _Run, handle: Transfer | Ticket, early: Awaitable | None
                 ) -> dict[str, object]:
    """Wait until a handle has ended; returns how. A handle that does not end is cancelled."""
    waiting = asyncio.create_task(_awaited(handle))
    ending = asyncio.create_task(early) if early else None
    limit_s = run.plan.deadline_s + SLACK_S
    while not waiting.done() and time.monotonic() < run.began + limit_s + 2 * run.late_s:
        await asyncio.wait({waiting}, timeout=0.5)
    hangs = not waiting.done()
    if hangs:
        waiting.cancel()
    if not handle.done():  # it hangs, or there is no descriptor to wait with
        await asyncio.to_thread(handle.cancel)
    if ending:
        await ending
    found = outcome(run.plan, None if hangs else waiting.exception(), run.began)
    found["repaired"] = handle.progress().repaired_chunks
    found["hangs"], found["late_s"] = hangs, round(run.late_s, 2)
    if not handle.done():
        found["wrong"] = "not done when awaited, cancelled or closed"
    return found


def outcome(plan: Plan, error: BaseException | None, began: float) -> dict[str, object]:
    """Describe an end: `typed` is true when the error is one that a run may end with."""
    typed = isinstance(error, KvwireError) and error.code not in (
        ErrorCode.INTERNAL, ErrorCode.USAGE, ErrorCode.UNSUPPORTED)
    kind = plan.misfortune.kind if plan.misfortune else ""
    own = (kind == "memory" and isinstance(error, MemoryError)
           or kind == "close" and isinstance(error, UsageError) and "is closed" in str(error))
    return {"error": None if error is None else f"{type(error).__name__}: {error}",
            "code": error.code.name if isinstance(error, KvwireError) else "",
            "typed": typed or own,
            "took_s": round(time.monotonic() - began, 3), "hangs": False, "wrong": None,
            "repaired": 0, "late_s": 0.0}


async def closes(run: _Run) -> str | None:
    """Close a run's endpoint; returns a complaint when that takes too long."""
    closing = asyncio.create_task(asyncio.to_thread(run.endpoint.close))
    began, late_s = time.monotonic(), run.late_s
    while not closing.done():
        limit_s = SLACK_S + 2 * (run.late_s - late_s)
        if time.monotonic() > began + limit_s:
            return f"close() has not returned within {limit_s:.1f} s"
        await asyncio.wait({closing}, timeout=0.5)
    return None


def status_kib(field: str) -> int:
    """Return a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")
