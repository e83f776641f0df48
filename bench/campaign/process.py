"""Processes that hold one object and run its coroutines when the parent asks."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import signal
import time
import traceback

__all__ = ["Lateness", "Peer", "PeerDied", "PeerFailed", "PeerHangs"]

_CALL_TIMEOUT_S = 60.0
_TICK_S = 0.05
_END_TIMEOUT_S = 1.0  # from the end of a pipe to the end of its process
_PRELOADED = ["bench.campaign.sides", "bench.campaign.proxy", "bench.campaign.endurance"]


class Lateness:
    """Sums up by how much this process runs late: on a busy machine it is not kvwire's fault.

    Attributes:
        seconds: so far.
    """

    def __init__(self):
        self.seconds = 0.0
        self._ticking = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            began = time.monotonic()
            await asyncio.sleep(_TICK_S)
            self.seconds += time.monotonic() - began - _TICK_S


class PeerDied(Exception):
    """The process has ended."""


class PeerFailed(Exception):
    """The coroutine raised; the text is its traceback."""


class PeerHangs(Exception):
    """The process has not answered in time."""


class Peer:
    """A process with one object of `kind` in it; forked from a process that has imported all.

    Use it on one event loop. `call` may be used many times at once.

    Attributes:
        died: None while the process runs, then its exit code.
        hangs: it has not answered a call in time.
    """

    def __init__(self, kind: type):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, kind), daemon=True)
        self._process.start()
        theirs.close()
        self.hangs = False
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future] = {}
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pipe.fileno(), self._answered)

    async def call(self, method: str, *arguments: object,
                   timeout_s: float = _CALL_TIMEOUT_S) -> object:
        """Return what the coroutine returns. Raises PeerDied, PeerFailed or PeerHangs."""
        number, future = next(self._numbers), self._loop.create_future()
        self._waiting[number] = future
        try:
            self._pipe.send((number, method, arguments))
            return await asyncio.wait_for(future, timeout_s)
        except asyncio.TimeoutError:  # in later Pythons an OSError, too
            self.hangs = True
            raise PeerHangs(f"{method} has not answered within {timeout_s:.0f} s") from None
        except OSError as error:
            raise PeerDied(str(error)) from None
        finally:
            self._waiting.pop(number, None)

    def signal(self, number: signal.Signals) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid, number)

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._pipe.closed:
            return
        self._process.kill()
        self._process.join()
        self._ended()
        self._pipe.close()

    @property
    def died(self) -> int | None:
        return self._process.exitcode

    def _answered(self) -> None:
        try:
            number, good, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_END_TIMEOUT_S)
            self._ended()
            return
        future = self._waiting.get(number)
        if future is not None and not future.done():
            if good:
                future.set_result(result)
            else:
                future.set_exception(PeerFailed(result))

    def _ended(self) -> None:
        self._loop.remove_reader(self._pipe.fileno())
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(PeerDied("the process has ended"))


def _serve(pipe, kind: type) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_answer_calls(pipe, kind))
    os._exit(0)


async def _answer_calls(pipe, kind: type) -> None:
    loop, ended, held = asyncio.get_running_loop(), asyncio.Event(), kind()
    tasks = set()

    async def answer(number: int, method: str, arguments: tuple) -> None:
        try:
            reply = number, True, await getattr(held, method)(*arguments)
        except Exception:
            reply = number, False, traceback.format_exc()
        pipe.send(reply)

    def called() -> None:
        try:
            task = loop.create_task(answer(*pipe.recv()))
        except EOFError:
            ended.set()
            return
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop.add_reader(pipe.fileno(), called)
    await ended.wait()
