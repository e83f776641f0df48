"""The hostile proxy: carries the connections of many runs at once, each with its own harms."""

from __future__ import annotations

import asyncio
import random
import socket
from collections import Counter

from bench.campaign.plan import DOWN, UP, Harm, Plan
from kvwire import _native

__all__ = ["Proxy"]

_GREETING_BYTES = 64
_HEADER_BYTES = 64
_SEARCHED_BYTES = 1024  # the first frame begins soon after the greeting, or the stream is secret
_READ_BYTES = 1 << 18
_REMEMBERED_BYTES = 8192
_IDLE_S = 0.02
_SLOW_SOCKET_BYTES = 1 << 15
_NEEDS_BYTES = {"flip", "drop", "repeat_frame", "move_frame", "drop_frame"}


class Proxy:
    """Lives in a process of its own; see `process.Peer`."""

    def __init__(self):
        self._runs: dict[int, _Run] = {}

    async def open(self, plan: Plan, target: str) -> str:
        """Start to listen for a run; returns the address to dial instead of `target`."""
        run = self._runs[plan.seed] = _Run(plan, target)
        return await run.listen()

    async def retarget(self, seed: int, target: str) -> str:
        """Later connections go elsewhere, and no harm is done to them; returns the address."""
        run = self._runs[seed]
        run.plan, run.target = Plan(seed, "healed", []), target
        return run.address

    async def release(self, seed: int) -> None:
        """End all stalls: what was held back flows now, too late."""
        if run := self._runs.get(seed):
            run.released.set()

    async def close(self, seed: int) -> list[str]:
        """Reset all connections of a run; returns what was done to it."""
        run = self._runs.pop(seed, None)
        if run is None:
            return []
        run.close()
        return run.log


class _Run:
    def __init__(self, plan: Plan, target: str):
        self.plan, self.target = plan, target
        self.released = asyncio.Event()
        self.streams: dict[tuple[int, str], _Stream] = {}
        self.log: list[str] = []
        self._accepted = 0
        self._fired: set[Harm] = set()
        self._tasks: set[asyncio.Task] = set()
        self._writers: list[asyncio.StreamWriter] = []

    async def listen(self) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        if self.plan.bytes_per_s:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SLOW_SOCKET_BYTES)
        self._server = await asyncio.start_server(self._serve, sock=listener, limit=_READ_BYTES)
        self.address = "127.0.0.1:%d" % listener.getsockname()[1]
        return self.address

    def close(self) -> None:
        self.released.set()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for writer in self._writers:
            reset(writer)

    def fires(self, harm: Harm) -> bool:
        """False for a harm that is done once and was done elsewhere."""
        if harm.once and harm in self._fired:
            return False
        self._fired.add(harm)
        return True

    async def pause(self, seconds: float | None) -> None:
        """Wait that long, or until the run is over."""
        try:
            await asyncio.wait_for(self.released.wait(), seconds)
        except asyncio.TimeoutError:
            pass

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self._accepted = self._accepted, self._accepted + 1
        self._writers.append(writer)
        self._tasks.add(asyncio.current_task())
        try:
            if number in self.plan.refused:
                self.log.append(f"connection {number} refused")
                reset(writer)
            elif number in self.plan.mute:
                self.log.append(f"connection {number} never served")
                await self.pause(None)
            else:
                await self._carry(number, reader, writer)
        except (OSError, EOFError):
            reset(writer)
        except asyncio.CancelledError:
            pass
        finally:
            self._tasks.discard(asyncio.current_task())

    async def _carry(self, number: int, reader: asyncio.StreamReader,
                     writer: asyncio.StreamWriter) -> None:
        host, port = self.target.rsplit(":", 1)
        far_reader, far = await asyncio.open_connection(host, int(port), limit=_READ_BYTES)
        self._writers.append(far)
        up = _Stream(self, number, UP, reader, writer, far)
        down = _Stream(self, number, DOWN, far_reader, far, writer)
        self.streams[number, UP], self.streams[number, DOWN] = up, down
        pumps = [asyncio.create_task(up.pump()), asyncio.create_task(down.pump())]
        self._tasks.update(pumps)
        try:
            await asyncio.gather(*pumps)
        except (_Broken, OSError) as error:
            for pump in pumps:
                pump.cancel()
            for end in getattr(error, "resets", (writer, far)):
                reset(end)
        finally:
            self._tasks.difference_update(pumps)


class _Broken(Exception):
    """The connection carries nothing any more; `resets` are the ends that learn of it."""

    def __init__(self, *resets: asyncio.StreamWriter):
        self.resets = resets


def reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


class _Stream:
    """One way of one connection. Each kind of `Harm` is the method of that name."""

    def __init__(self, run: _Run, number: int, way: str, reader: asyncio.StreamReader,
                 near: asyncio.StreamWriter, far: asyncio.StreamWriter):
        self._run, self._number, self._way = run, number, way
        self._reader, self._near, self._far = reader, near, far
        mine = [harm for harm in run.plan.harms
                if harm.way == way and harm.connection in (None, number)]
        self._places = sorted(((harm.at, 0, harm) for harm in mine if harm.frame is None),
                              key=lambda place: place[0])
        self._frame_harms = [harm for harm in mine if harm.frame is not None]
        self._frames = bool(run.plan.harms)
        self._found: Counter[int] = Counter()
        self._next_header, self._in_sight = _GREETING_BYTES, False
        self._starts: list[int] = []
        self._buffer, self._offset = bytearray(), 0
        self._passed = b""
        self._inbox = bytearray()
        self._silent = False
        self._random = random.Random(f"{run.plan.seed} {number} {way}")

    async def pump(self) -> None:
        await self._advance(False)
        ended = False
        while not ended:
            patience = _IDLE_S if self._inbox or self._buffer else None
            try:
                data = await asyncio.wait_for(self._reader.read(_READ_BYTES), patience)
                ended = not data
                self._buffer += data
            except asyncio.TimeoutError:
                self._frames = self._frames and not self._buffer
                await self._flush()
            self._parse()
            await self._advance(ended)
        await self._flush()
        if not self._silent:
            self._far.write_eof()
            self._silent = True

    def _parse(self) -> None:
        """Find the frames in what has come, and the places of harms that are bound to them."""
        while self._frames:
            at = self._next_header - self._offset
            head = bytes(self._buffer[max(at, 0):at + _HEADER_BYTES])
            if at < 0 or len(head) < _HEADER_BYTES and not (head and self._no_frame(head)):
                return
            if self._no_frame(head):
                self._next_header += 1
                self._frames = not self._in_sight and self._next_header < _SEARCHED_BYTES
                continue
            self._in_sight = True
            count = _HEADER_BYTES + int.from_bytes(head[4:8], "little")
            self._frame_found(head[2], self._next_header, count)
            self._next_header += count

    def _no_frame(self, head: bytes) -> bool:
        if len(head) < _HEADER_BYTES:
            return not self._in_sight and head[:2] != b"KW"[:len(head)]
        crc = int.from_bytes(head[60:], "little")
        return head[:2] != b"KW" or _native.crc32c(head[:60]) != crc

    def _frame_found(self, kind: int, start: int, count: int) -> None:
        self._starts.append(start)
        for harm in self._frame_harms:
            wanted, number = harm.frame
            if wanted in (0, kind) and self._found[wanted] == number:
                at = start + (count - 1 if harm.at < 0 else min(harm.at, count))
                self._places.append((at, count, harm))
        self._places.sort(key=lambda place: place[0])
        self._found[kind] += 1
        self._found[0] += 1

    async def _advance(self, ended: bool) -> None:
        """Pass on what may pass, harm by harm."""
        while True:
            here = self._offset
            end = here + len(self._buffer)
            if self._frames and not ended and (self._in_sight or end > self._next_header):
                end = max(here, min(end, self._next_header))
            while self._starts and self._starts[0] < here:
                del self._starts[0]
            if self._inbox and here in (*self._starts[:1], self._next_header) and end > here:
                await self._flush()
            if self._places and self._places[0][0] <= here:
                at, count, harm = self._places[0]
                if at == here and harm.kind in _NEEDS_BYTES and end == here:
                    return
                del self._places[0]
                if at == here and self._run.fires(harm):
                    self._run.log.append(f"{harm.kind} {harm.value:g}: connection {self._number} "
                                         f"{self._way}, byte {here}, {len(self._buffer)} at hand")
                    await getattr(self, harm.kind)(harm, count)
                continue
            if end == here:
                return
            stops = [end, *(place[0] for place in self._places[:1])]
            stops += [start for start in self._starts[:2] if start > here] if self._inbox else []
            await self._pass(self._take(min(stops) - here))

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        self._offset += len(taken)
        return taken

    async def _pass(self, data: bytes) -> None:
        if self._silent:
            return
        self._passed = (self._passed + data)[-_REMEMBERED_BYTES:]
        plan, start = self._run.plan, 0
        while start < len(data):
            step = len(data) - start
            if not self._run.released.is_set():
                step = min(step, plan.piece_bytes)
                if plan.bytes_per_s:
                    step = min(step, max(1, int(plan.bytes_per_s * 0.005)))
            self._far.write(data[start:start + step])
            await self._far.drain()
            start += step
            if plan.bytes_per_s:
                await self._run.pause(step / plan.bytes_per_s)
            elif step < plan.piece_bytes:
                await asyncio.sleep(0)

    async def _flush(self) -> None:
        moved = bytes(self._inbox)
        self._inbox.clear()
        if moved and not self._silent:
            try:
                self._far.write(moved)
            except RuntimeError:  # this stream has been ended; the frame is lost
                return
            await self._far.drain()

    async def _frame(self, count: int) -> bytes:
        """Take the whole frame that begins here; less when the stream ends in it."""
        while len(self._buffer) < count:
            data = await self._reader.read(_READ_BYTES)
            if not data:
                break
            self._buffer += data
        return self._take(count)

    async def flip(self, harm: Harm, count: int) -> None:
        self._buffer[0] ^= int(harm.value)

    async def drop(self, harm: Harm, count: int) -> None:
        await self._frame(int(harm.value))
        self._frames = False

    async def repeat(self, harm: Harm, count: int) -> None:
        await self._pass(self._passed[-int(harm.value):])

    async def invent(self, harm: Harm, count: int) -> None:
        await self._pass(self._random.randbytes(int(harm.value)))

    async def repeat_frame(self, harm: Harm, count: int) -> None:
        await self._pass(await self._frame(count) * 2)

    async def drop_frame(self, harm: Harm, count: int) -> None:
        await self._frame(count)

    async def move_frame(self, harm: Harm, count: int) -> None:
        """Put it behind the frame that passes next on the other lane, or on this one."""
        other = self._run.streams.get((int(harm.value), self._way), self)
        other._inbox += await self._frame(count)
        if other is not self and not other._buffer:
            await other._flush()
        elif other is self and self._starts[:1] == [self._offset]:
            await self._pass(await self._frame(self._next_header - self._offset))

    async def stall(self, harm: Harm, count: int) -> None:
        await self._run.pause(harm.value)

    async def blackhole(self, harm: Harm, count: int) -> None:
        await self._run.pause(None)

    async def cut(self, harm: Harm, count: int) -> None:
        raise _Broken(self._near, self._far)

    async def cut_near(self, harm: Harm, count: int) -> None:
        raise _Broken(self._near)

    async def cut_far(self, harm: Harm, count: int) -> None:
        raise _Broken(self._far)

    async def finish(self, harm: Harm, count: int) -> None:
        for way in (UP, DOWN):
            if not (stream := self._run.streams[self._number, way])._silent:
                await stream.half_close(harm, count)
        raise _Broken()

    async def half_close(self, harm: Harm, count: int) -> None:
        self._far.write_eof()
        self._silent = True
