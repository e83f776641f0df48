"""Keep a global index told of what one node holds, through losses of either side."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from kvwire.errors import TransferError
from kvwire.prfaas.pool.blocks import Chain
from kvwire.prfaas.pool.metadata import GlobalIndex

__all__ = ["IndexObserver", "IndexPublisher"]

Snapshot = Callable[[], Iterable[tuple[Chain, Sequence[bytes], Sequence[bytes]]]]

_WAITING_MAX = 65_536
_RETRY_S = 0.1


class IndexObserver:
    """A `PoolObserver` that tells an index at once: one that is embedded, as in the simulator."""

    def __init__(self, index: GlobalIndex, node: str):
        self._index, self._node = index, node

    def published(self, chain: Chain, hashes: list[bytes], states: list[bytes]) -> None:
        self._index.publish(self._node, chain, hashes, states)

    def withdrawn(self, chain: Chain, name: bytes, state: bool) -> None:
        self._index.withdraw(self._node, chain, (name,), states_only=state)


class IndexPublisher:
    """A `PoolObserver` that tells an index in the background, and never makes the pool wait.

    It announces the node now and then. When the index did not know of the node, or something could
    not be said, everything is said again from `snapshot`; until then nothing is kept, so that an
    index that is gone for long costs no memory.

    Args:
        node: "cluster/node".
        snapshot: what the node holds: `PrefixPool.snapshot` or `PrefixStore.snapshot`. Set it
            with `follow` where the pool needs its observer first.
        announce_s: how often; a third of the index's `node_ttl_s` or less.
        repeat_s: how often everything is said again, in case entries were lost one by one; less
            than the index's `entry_ttl_s`.
    """

    def __init__(self, index: GlobalIndex, node: str, snapshot: Snapshot | None = None, *,
                 announce_s: float = 3.0, repeat_s: float = 3 * 3600.0):
        self._index, self._node = index, node
        self._announce_s, self._repeat_s = announce_s, repeat_s
        self._snapshot = snapshot
        self._waiting: deque[tuple[Chain, Sequence[bytes], Sequence[bytes] | None, bool]] = deque()
        self._lost = True        # nothing has been said yet
        self._said_count = 0     # how often everything was
        self._condition = threading.Condition()
        self._closed = self._sending = False
        self._thread = threading.Thread(target=self._run, daemon=True,
                                        name="kvwire index publisher")
        if snapshot is not None:
            self._thread.start()

    def follow(self, snapshot: Snapshot) -> None:
        """Begin, with what the node holds."""
        self._snapshot = snapshot
        self._thread.start()

    def published(self, chain: Chain, hashes: list[bytes], states: list[bytes]) -> None:
        self._put((chain, hashes, states, False))

    def withdrawn(self, chain: Chain, name: bytes, state: bool) -> None:
        self._put((chain, (name,), None, state))

    def synced(self) -> bool:
        """True when the index has been told everything, as far as is known here."""
        with self._condition:
            return not (self._lost or self._waiting or self._sending)

    @property
    def said_count(self) -> int:
        """How often everything has been said."""
        return self._said_count

    def close(self) -> None:
        """End, and take the node off the index if it can be reached. Idempotent."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            self._condition.notify()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self._index.forget(self._node)
        except TransferError:
            pass  # its entries expire

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _put(self, change: tuple) -> None:
        with self._condition:
            if len(self._waiting) >= _WAITING_MAX:
                self._lost = True
            if self._lost and self._thread.is_alive():
                return
            self._waiting.append(change)
            self._condition.notify()

    def _run(self) -> None:
        announce_at = repeat_at = time.monotonic()
        while True:
            with self._condition:
                wait_s = min(announce_at, repeat_at) - time.monotonic()
                if not (self._waiting or self._closed) and wait_s > 0:
                    self._condition.wait(wait_s)
                if self._closed:
                    return
                self._sending = True
            try:
                now = time.monotonic()
                if now >= announce_at:
                    self._lost |= not self._index.announce(self._node)
                    announce_at = now + self._announce_s
                if self._lost or now >= repeat_at:
                    self._say_everything()
                    repeat_at = now + self._repeat_s
                self._say_what_waits()
            except TransferError:
                with self._condition:
                    self._lost = True
                    self._waiting.clear()
                    if not self._closed:
                        self._condition.wait(_RETRY_S)
                announce_at = time.monotonic()
            finally:
                self._sending = False

    def _say_everything(self) -> None:
        """Under a new incarnation, so that what was said before and is not true any more goes."""
        with self._condition:
            self._waiting.clear()  # the snapshot is newer
            self._lost = False     # what changes from here on waits again
        self._index.forget(self._node)
        self._index.announce(self._node)
        for chain, hashes, states in self._snapshot():
            self._index.publish(self._node, chain, hashes, states)
        self._said_count += 1

    def _say_what_waits(self) -> None:
        while self._waiting:
            chain, hashes, states, states_only = self._waiting.popleft()
            if states is not None:
                self._index.publish(self._node, chain, hashes, states)
            else:
                self._index.withdraw(self._node, chain, hashes, states_only=states_only)
