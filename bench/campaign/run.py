"""Carries out runs: two processes, the proxy between them, and what befalls any of them."""

from __future__ import annotations

import asyncio
import secrets
import signal
import tempfile
from collections.abc import Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from bench.campaign.files import Filing
from bench.campaign.plan import Plan
from bench.campaign.process import Lateness, Peer, PeerDied, PeerFailed, PeerHangs
from bench.campaign.proxy import Proxy
from bench.campaign.sides import Receiving, Sending
from bench.campaign.verdict import Verdict, judge

__all__ = ["Pair", "Runner"]

GRACE_S = 0.1  # after the end; what was held back arrives in it
_FATAL = {"kill", "stop", "memory", "files"}
_AGAIN_S = 8.0
_CALL_LIMIT_S = 30.0  # beyond the deadline; who takes longer hangs


class Pair:
    """A sending and a receiving process that listen for runs."""

    async def start(self) -> Pair:
        self.sending, self.receiving = Peer(Sending), Peer(Receiving)
        self.sending_addresses, self.receiving_addresses = await asyncio.gather(
            self.sending.call("listen"), self.receiving.call("listen"))
        return self

    def side(self, name: str) -> Peer:
        return self.sending if name == "sending" else self.receiving

    @property
    def broken(self) -> bool:
        return any(peer.hangs or peer.died is not None for peer in (self.sending, self.receiving))

    def close(self) -> None:
        self.sending.close()
        self.receiving.close()

    async def __aenter__(self) -> Pair:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        self.close()


class Runner:
    """Carries out plans, many at a time, over one long-lived pair of processes."""

    def __init__(self):
        self._renewing = asyncio.Lock()
        self.pair: Pair | None = None

    async def __aenter__(self) -> Runner:
        self._lateness = Lateness()
        self._proxy = Peer(Proxy)
        self._filing = Peer(Filing)
        self.pair = await Pair().start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        for each in (self.pair, self._proxy, self._filing):
            each.close()

    async def run(self, plan: Plan) -> Verdict:
        """Carry out one plan and judge it."""
        if plan.mode == "file":
            return await self._file_run(plan)
        fatal = plan.misfortune is not None and plan.misfortune.kind in _FATAL
        async with self._pair_for(fatal) as pair:
            return await _TransferRun(plan, pair, self._proxy, self._lateness).carry_out()

    @asynccontextmanager
    async def _pair_for(self, fatal: bool):
        if fatal:
            async with Pair() as pair:
                yield pair
            return
        pair = self.pair
        yield pair
        async with self._renewing:
            if self.pair is pair and pair.broken:
                self.pair = await Pair().start()
                pair.close()

    async def _file_run(self, plan: Plan) -> Verdict:
        """Save one cargo in peace, another one over it in trouble, and load what is there."""
        verdict, kind = Verdict(plan, harmed=True), plan.misfortune.kind
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "cache.kvw")
            await self._filing.call("save", plan, 0, path)
            size = Path(path).stat().st_size
            wrote = None
            if kind == "full":
                wrote = await self._filing.call("save", plan, 1, path,
                                                int(size * plan.misfortune.value * 1.2))
            elif kind == "kill":
                await self._killed_while_saving(plan, path)
            else:
                await self._filing.call("damage", plan, path)
            found = await self._filing.call("load", plan, path)
        verdict.story = [{"saved": wrote}, {"loaded": found}]
        verdict.delivered, verdict.codes = not found["error"], {found["code"]} - {""}
        if found["wrong"]:
            verdict.complaints.append(found["wrong"])
        if found["error"] and not (found["typed"] and kind == "damage"):
            verdict.complaints.append(f"a file that nobody damaged: {found['error']}")
        if kind == "full" and (found["leftovers"] or (found["which"] == 0) != bool(wrote)):
            verdict.complaints.append(f"full disk: {wrote}, then found {found}")
        return verdict

    async def _killed_while_saving(self, plan: Plan, path: str) -> None:
        victim = Peer(Filing)
        try:
            saving = asyncio.create_task(victim.call("save", plan, 1, path))
            await asyncio.sleep(plan.misfortune.after_s)
            victim.signal(signal.SIGKILL)
            await asyncio.gather(saving, return_exceptions=True)
        finally:
            victim.close()


class _TransferRun:
    def __init__(self, plan: Plan, pair: Pair, proxy: Peer, lateness: Lateness):
        self._plan, self._pair, self._proxy = plan, pair, proxy
        self._lateness, self._late_s = lateness, lateness.seconds
        self._limit_s = _CALL_LIMIT_S + plan.deadline_s
        self._names = [secrets.token_bytes(16) for _ in plan.cargoes]
        self._complaints: list[str] = []
        self._story: list[object] = []
        self._killed: str | None = None

    async def carry_out(self) -> Verdict:
        plan, harm = self._plan, self._plan.misfortune
        if harm and harm.kind in ("memory", "files"):
            await self._pair.side(harm.side).call("limit", plan)
        fate = asyncio.create_task(self._befall())
        sent, got = await self._both_ways()
        await fate
        verdict = self._judge(plan, sent, got)
        if plan.rounds > 1 and not verdict.complaints:
            self._names = [secrets.token_bytes(16) for _ in plan.cargoes]
            verdict = verdict.followed_by(
                self._judge(plan, *await self._push(plan, self._address, "again")))
        if self._killed and plan.restart and plan.mode == "push":
            verdict.story.append({"again": await self._again()})
        log = await self._clean_up()
        verdict.story.append({"proxy": log})
        verdict.harmed = bool(log or harm)
        verdict.complaints += self._complaints
        verdict.story += self._story
        return verdict

    def _judge(self, plan: Plan, sent: list | None, got: list | None) -> Verdict:
        return judge(plan, sent, got, self._lateness.seconds - self._late_s)

    async def _both_ways(self) -> tuple[list | None, list | None]:
        plan, pair = self._plan, self._pair
        if plan.mode == "push":
            self._address = await self._open_proxy(pair.receiving_addresses)
            return await self._push(plan, self._address)
        if plan.mode == "pull":
            offers = await self._call("sending", "offer", plan)
            if offers is None:
                return None, None
            address = await self._open_proxy(pair.sending_addresses)
            return await self._together(self._call("sending", "send", plan, []),
                                        self._call("receiving", "pull", plan, address, offers))
        await self._call("sending", "adopt", plan)
        address = await self._open_proxy(pair.sending_addresses)
        link = await self._call("receiving", "dial", plan, address)
        if not isinstance(link, str):
            return None, None if link is None else [link] * len(plan.cargoes)
        return await self._together(
            self._call("sending", "send", plan, self._names, link),
            self._call("receiving", "bind_dialled", plan, self._names))

    async def _open_proxy(self, addresses: dict[str, str]) -> str:
        return await self._proxy.call("open", self._plan, addresses[self._plan.security])

    async def _push(self, plan: Plan, address: str, dial: str = "dial"
                    ) -> tuple[list | None, list | None]:
        receiving = asyncio.create_task(self._call("receiving", "bind", plan, self._names))
        failed = await self._call("sending", dial, plan, address)
        if failed is not None:
            return [failed] * len(plan.cargoes), await receiving
        return await self._together(self._call("sending", "send", plan, self._names), receiving)

    async def _together(self, sending: Awaitable, receiving: Awaitable
                        ) -> tuple[list | None, list | None]:
        sent, got = await asyncio.gather(sending, receiving)
        return sent, got

    async def _call(self, side: str, method: str, *arguments: object) -> object:
        """Call one side; None when it was killed, or died, which is a complaint."""
        peer = self._pair.side(side)
        try:
            return await peer.call(method, *arguments, timeout_s=self._limit_s)
        except PeerDied:
            if self._killed != side:
                self._complaints.append(f"the {side} process died in {method}: {peer.died}")
        except (PeerFailed, PeerHangs) as error:
            last_line = str(error).strip().rpartition("\n")[2]
            self._complaints.append(f"the {side} process, {method}: {last_line}")
            self._story.append(str(error))
        return None

    async def _befall(self) -> None:
        harm = self._plan.misfortune
        if harm is None or harm.kind not in ("kill", "stop"):
            return
        await asyncio.sleep(harm.after_s)
        peer = self._pair.side(harm.side)
        if harm.kind == "kill":
            self._killed = harm.side
            peer.signal(signal.SIGKILL)
        else:
            peer.signal(signal.SIGSTOP)
            await asyncio.sleep(harm.value)
            peer.signal(signal.SIGCONT)

    async def _again(self) -> list:
        """The killed process starts again; what was bound there is bound anew, and must arrive."""
        plan = replace(self._plan, misfortune=None, harms=[], must_deliver=True, restart=False,
                       deadline_s=_AGAIN_S)
        side, self._killed = self._killed, None
        pair, self._limit_s = self._pair, _CALL_LIMIT_S + _AGAIN_S
        if side == "sending":
            pair.sending.close()
            pair.sending = Peer(Sending)
        else:
            pair.receiving.close()
            pair.receiving = Peer(Receiving)
            pair.receiving_addresses = await pair.receiving.call("listen")
        address = await self._proxy.call("retarget", plan.seed,
                                         pair.receiving_addresses[plan.security])
        first = replace(plan, must_deliver=False)  # the old link's end may be news to it
        sent, got = await self._push(first, address, "dial" if side == "sending" else "again")
        verdict = self._judge(first, sent, got)
        if not verdict.delivered and not verdict.complaints:
            self._names = [secrets.token_bytes(16) for _ in plan.cargoes]
            sent, got = await self._push(plan, address, "again")
            verdict = verdict.followed_by(self._judge(plan, sent, got))
        self._complaints += [f"after the restart: {each}" for each in verdict.complaints]
        return verdict.story

    async def _clean_up(self) -> list[str]:
        """Let go of what was held back, look for late writes, close, and return the harm done."""
        await self._proxy.call("release", self._plan.seed)
        await asyncio.sleep(GRACE_S)
        for side in ("sending", "receiving"):
            if side == self._killed or self._pair.side(side).died is not None:
                continue
            if await self._call(side, "late", self._plan.seed) is False:
                self._complaints.append(f"the {side} side wrote to memory it had given back")
        log = await self._proxy.call("close", self._plan.seed)
        for side in ("sending", "receiving"):
            if side != self._killed and self._pair.side(side).died is None:
                if wrong := await self._call(side, "drop", self._plan.seed):
                    self._complaints.append(f"the {side} side: {wrong}")
        return log
