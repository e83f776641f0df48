"""The staging thread of a `Sender`: slices of device memory to chunks that the wire can take."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kvwire import _native, plan
from kvwire.codec import Codec
from kvwire.control import Item
from kvwire.errors import (
    ErrorCode, InternalError, KvwireError, LimitError, TransferCancelled, UnsupportedError,
    UsageError,
)
from kvwire.kernels.code_plan import CodePlan, table_of_bytes
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.slices import cut, slices_of
from kvwire.kernels.stages import EncodeStage, stages_of
from kvwire.kernels.staging import PinnedRing, Slot, Staging, settle, settled, typed
from kvwire.layout import CacheSpec
from kvwire.tiered import Part

__all__ = ["Source", "StagedSender"]

STAGES = 3  # slices under way: one is made, one is copied, one waits for room
GRANT_POLL_S, RECLAIM_POLL_S = 0.004, 0.02
GRANT_POLL_SHARE = 0.02  # of this thread's time: an offer may wait long, and the engine has to run


@dataclass(eq=False)
class Source:
    """One transfer out of device memory.

    Attributes:
        wake: weak, of a function that those who await the transfer are woken by.
        error: what staging failed it with.
    """

    native: object
    memory: object
    spec: CacheSpec
    wake: weakref.WeakMethod
    groups: list = field(init=False)
    error: KvwireError | None = None
    metadata: tuple[bytes, int] | None = None  # of the end, once finish() was called
    waiting: list[tuple[int, int, _Slice]] = field(default_factory=list)  # in order
    to_hand: int = 0                           # slices that the native side does not have yet
    reading: int = 0                           # slices whose pages the device may be reading
    # Chunk bytes, codecs by bit, tokens [start, stop) that travel; zeros: no grant yet.
    terms: tuple[int, int, int, int] = (0, 0, 0, 0)
    plain: set = field(default_factory=set)    # (layer, group, tensor) of which no table is made

    def __post_init__(self) -> None:
        self.groups = plan.to_native(self.spec)

    def ended(self) -> bool:
        return self.native.progress()[4]

    def granted(self) -> bool:
        if not self.terms[0]:
            self.terms = self.native.terms()
        return self.terms[0] > 0

    def wanted(self, items: Sequence[Item]) -> list[Item]:
        """Return what of `items` travels: a pull may want fewer tokens; states travel whole."""
        *_, start, stop = self.terms
        kept = []
        for item in items:
            if self.spec.groups[item.group_index].tensors[item.tensor_index].has_tokens:
                item = cut(item, max(item.token_start, start), min(item.token_stop, stop))
                if item.token_start >= item.token_stop:
                    continue
            kept.append(item)
        return kept


@dataclass(eq=False)
class StagedSlices:
    """What became of one push: how many slices are not handed on, and the native pushes."""

    to_hand: int
    numbers: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Slice:
    source: Source
    items: list[Item]
    ready: object
    priority: int
    push: StagedSlices
    stage: EncodeStage | None = None
    slot: Slot | None = None
    is_read: bool = False  # its pages, by the device
    chunks: list = field(default_factory=list)
    copied: object = None


class StagedSender:
    """Queues slices by priority, and brings each to pinned memory and to its native transfer.

    Raises LimitError where the device, or page-locked memory, has no room.
    """

    def __init__(self, staging: Staging, device, code_book):
        device.attach()
        self._device, self._staging, self._book = device, staging, code_book
        self._compute, self._copy = device.stream(), device.stream()
        encode_stage, _ = stages_of(device)
        self._stages: list[EncodeStage] = []
        with settled(device, self._compute):
            for _ in range(STAGES):
                self._stages.append(encode_stage(device, staging.sm_share, staging.slice_bytes,
                                                 self._compute))
            self.ring = PinnedRing(device, staging.ring_bytes // staging.slice_bytes,
                                   staging.slice_bytes)
        self.changed = threading.Condition()
        self._queued: dict[Source, None] = {}  # that have slices waiting
        self._serial = itertools.count()
        self._sources: weakref.WeakSet[Source] = weakref.WeakSet()  # they hold the arrays
        self._lent: deque[tuple[object, int, Slot]] = deque()  # transfer, push, slot
        self._made: deque[_Slice] = deque()
        self._copying: deque[_Slice] = deque()
        self._closed, self._broken = False, None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="kvwire-staging", daemon=True)
        self._thread.start()

    def add(self, native, memory, spec: CacheSpec, wake: weakref.WeakMethod) -> Source:
        """Return what stands for a transfer here."""
        source = Source(native, memory, spec, wake)
        with self.changed:
            self._sources.add(source)
        if self._broken:
            self._fail(source, self._broken)
        return source

    def push(self, source: Source, items: Sequence[Item], ready, priority: int) -> StagedSlices:
        """Queue the items; `ready`: event after which their pages are final."""
        portions = list(slices_of(source.spec, items, self._staging.slice_bytes))
        push = StagedSlices(len(portions))
        with self.changed:
            if source.metadata is not None:
                raise UsageError("push after finish: the transfer's end has been announced")
            if self._closed or self._broken:  # the transfer has ended, or is about to
                push.to_hand = 0
                return push
            source.to_hand += len(portions)
            for items in portions:
                bisect.insort(source.waiting, (-priority, next(self._serial), _Slice(
                    source, items, ready, priority, push)))
            if portions:
                self._queued[source] = None
            self.changed.notify_all()
        return push

    def finish(self, source: Source, metadata: tuple[bytes, int]) -> None:
        """Announce the end once all that was pushed has been handed on."""
        with self.changed:
            if source.metadata is not None:
                raise UsageError("finish was called before")
            source.metadata = metadata
            hand_now = source.to_hand == 0
        if hand_now:
            source.native.finish(*metadata)

    def wait_idle(self, source: Source) -> None:
        """Wait until the device reads no page of a transfer that has ended."""
        with self.changed:
            self.changed.wait_for(lambda: source.reading == 0)

    def close(self) -> None:
        """Stop. All transfers have ended, or end with it; slots are back when it returns."""
        if os.getpid() != self._pid:  # a forked lock may never open
            return
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        try:
            self._device.attach()
            while (slice_ := self._next()) is not None or not self._closed:
                self._step(slice_)
        except BaseException as error:  # the device's: none of its transfers can go on
            self._break_down(typed(error))
        finally:
            settle(self._stages)
            for slice_ in (*self._made, *self._copying):
                self._give_up(slice_)
            self._made.clear()
            self._copying.clear()
            self._drop_waiting()
            for native, number, slot in self._lent:
                native.cancel()
                slot.release()
            self._lent.clear()

    def _step(self, slice_: _Slice | None) -> None:
        if slice_ is not None and self._begin(slice_):
            self._made.append(slice_)
        if self._made and (slice_ is None or len(self._made) > 1):
            self._copy_oldest()
        while self._copying and (self._copying[0].copied.done()
                                 or slice_ is None and not self._made
                                 or len(self._made) + len(self._copying) >= STAGES):
            self._hand_oldest()
        self._reclaim()

    def _next(self) -> _Slice | None:
        """Return the first slice that may be sent; None: nothing now, or closed. Waits where
        nothing is under way."""
        with self.changed:
            while not self._closed:
                began_s = time.monotonic()
                slice_ = self._first_granted()
                looked_s = time.monotonic() - began_s
                if slice_ is not None:
                    return slice_
                if self._made or self._copying:
                    return None
                self._reclaim()
                self.changed.wait(max(GRANT_POLL_S, looked_s / GRANT_POLL_SHARE) if self._queued
                                  else RECLAIM_POLL_S if self._lent else None)
        return None

    def _first_granted(self) -> _Slice | None:
        """Take the first slice that may be sent; with the lock. Each transfer is asked once, not
        each slice: the engine's thread may want to push meanwhile."""
        for source in [source for source in self._queued if source.ended()]:
            self._drop(source)
        granted = [source for source in self._queued if source.granted()]
        if not granted:
            return None
        first = min(granted, key=lambda source: source.waiting[0][:2])
        *_, slice_ = first.waiting.pop(0)
        if not first.waiting:
            del self._queued[first]
        return slice_

    def _begin(self, slice_: _Slice) -> bool:
        """Enqueue the making of a slice; False: its transfer is over, or failed with it."""
        source = slice_.source
        slice_.items = source.wanted(slice_.items)
        with self.changed:
            if not slice_.items or source.ended():
                self._handed(slice_)
                return False
            source.reading += 1
        busy = {each.stage for each in (*self._made, *self._copying)}
        slice_.stage = next(stage for stage in self._stages if stage not in busy)
        try:
            copies = CopyPlan.of_items(source.spec, slice_.items, source.memory,
                                       source.memory.block_counts)
            self._device.wait_for(self._compute, slice_.ready)
            codes, where = self._codes(slice_, copies), ()
            if self._staging.maps_ring:
                slice_.slot = self._slot()
                where = (slice_.slot.room.ctypes.data,)
            slice_.stage.enqueue(copies, codes, self._compute, *where)
        except BaseException as error:
            with contextlib.suppress(Exception):  # a part of it may have been enqueued
                self._device.record(self._compute).wait()
            self._let_go(slice_)
            self._not_read(slice_)
            self._fail(source, typed(error))  # first: the last slice to be handed says the end
            self._done_with(slice_)
            if isinstance(error, InternalError) or not isinstance(error, KvwireError):
                raise
            return False
        return True

    def _codes(self, slice_: _Slice, copies: CopyPlan) -> CodePlan:
        chunk_bytes, codecs, *_ = slice_.source.terms
        ranges = [(at, min(chunk_bytes, copies.bytes - at))
                  for at in range(0, copies.bytes, chunk_bytes)]
        if not codecs >> Codec.TIERED & 1:
            return CodePlan.of_chunks(ranges)
        source, raw = slice_.source, b""
        coder = _native.SegmentCoder(self._book, source.spec.model, source.groups,
                                     plan.native_items(slice_.items), copies.placements[0],
                                     chunk_bytes)
        names = {(item.layer, item.group_index, item.tensor_index) for item in slice_.items}
        chunks = []
        for at, count in ranges:
            parts, at_hand = coder.parts(at, count)
            if not at_hand and (raw or not names <= source.plain):
                raw = raw or self._raw(slice_.stage, copies)
                parts, at_hand = coder.parts(at, count, raw)
                if not at_hand and all(table is None for _, table, _ in parts):
                    source.plain |= names
            chunks.append((at, [Part(size, table_of_bytes(table) if table else None, position)
                                for size, table, position in parts]))
        try:
            return CodePlan.of_chunks(chunks, with_strips=slice_.stage.needs_strips)
        except UnsupportedError:  # bases that repeat too late
            return CodePlan.of_chunks(ranges)

    def _raw(self, stage: EncodeStage, copies: CopyPlan) -> bytes:
        """Return a slice as it is, once for each tensor: what its code tables are made of."""
        stage.enqueue(copies, CodePlan.of_chunks([(0, copies.bytes)]), self._compute)
        (address, count, _), = stage.results()
        raw = np.empty(count, np.uint8)
        self._device.to_host(raw, address, self._copy)
        self._device.record(self._copy).wait()
        return raw.tobytes()

    def _copy_oldest(self) -> None:
        """Enqueue the copy of what is made; what was made in its slot is there already."""
        slice_ = self._made[0]
        source = slice_.source
        try:
            made = slice_.stage.results()
        except UsageError as error:  # of this transfer's block ids
            made, source.error = [], source.error or error
        self._not_read(slice_)  # from here on: a slot may be long in coming
        try:
            if made and slice_.slot is None:
                slice_.slot = self._slot()
                made = self._copied(slice_, made)
            elif made:
                slice_.copied = slice_.stage.event
        except LimitError as error:
            self._device.record(self._copy).wait()  # if that fails too, the slot is lost
            made, source.error = [], source.error or error
        if not made:
            self._made.popleft()
            self._let_go(slice_)
            self._fail(source, source.error)
            self._done_with(slice_)
            return
        raw_chunk, left = source.terms[0], slice_.stage.raw_bytes
        for address, count, crc in made:
            raw = count == min(raw_chunk, left)
            left -= min(raw_chunk, left)
            slice_.chunks.append((address, count, crc, int(Codec.RAW if raw else Codec.TIERED)))
        self._copying.append(slice_)
        self._made.popleft()  # not before: what fails on the way is given up as made

    def _copied(self, slice_: _Slice, made: list) -> list[tuple[int, int, int]]:
        """Enqueue the copies to its slot, payloads side by side, neighbours in one copy; return
        `made` with the addresses there."""
        room, at, copied = slice_.slot.room, 0, []
        runs: list[list[int]] = []  # address, bytes, where to
        for address, count, crc in made:
            copied.append((room.ctypes.data + at, count, crc))
            if runs and runs[-1][0] + runs[-1][1] == address:
                runs[-1][1] += count
            else:
                runs.append([address, count, at])
            at += count
        for address, count, where in runs:
            self._device.to_host(room[where:where + count], address, self._copy)
        slice_.copied = self._device.record(self._copy)
        return copied

    def _let_go(self, slice_: _Slice) -> None:
        """Of its slot, which nothing goes to any more."""
        if slice_.slot is not None:
            slice_.slot.release()
            slice_.slot = None

    def _slot(self) -> Slot:
        while (slot := self.ring.try_acquire()) is None:
            if self._closed:
                raise TransferCancelled("the sender was closed", code=ErrorCode.CANCELLED)
            if self._copying:
                self._hand_oldest()
            elif self._made and self._made[0].slot is not None:  # it was made there
                self._copy_oldest()
            elif self._lent:
                native, number, _ = self._lent[0]
                native.wait_push(number, RECLAIM_POLL_S)
            self._reclaim()
        return slot

    def _hand_oldest(self) -> None:
        slice_ = self._copying[0]
        slice_.copied.wait()
        source = slice_.source
        try:
            number = source.native.push(plan.native_items(slice_.items), slice_.priority,
                                        (source.terms[0], slice_.chunks))
        except KvwireError as error:
            slice_.slot.release()
            self._fail(source, error)
        else:
            self._lent.append((source.native, number, slice_.slot))
            slice_.push.numbers.append(number)
        self._copying.popleft()
        self._done_with(slice_)

    def _reclaim(self) -> None:
        """Take back the slots of pushes that have completed."""
        for _ in range(len(self._lent)):
            native, number, slot = self._lent.popleft()
            if native.wait_push(number, 0.0):
                slot.release()
            else:
                self._lent.append((native, number, slot))

    def _not_read(self, slice_: _Slice) -> None:
        """The device reads no page of it any more."""
        with self.changed:
            slice_.source.reading -= not slice_.is_read
            slice_.is_read = True
            self.changed.notify_all()

    def _done_with(self, slice_: _Slice) -> None:
        with self.changed:
            self._handed(slice_)

    def _handed(self, slice_: _Slice) -> None:
        """Count it; with the lock."""
        source = slice_.source
        source.to_hand -= 1
        slice_.push.to_hand -= 1
        self.changed.notify_all()
        if slice_.push.to_hand == 0 and (wake := source.wake()) is not None:
            wake(source.native.number)
        if source.to_hand == 0 and source.metadata is not None and not source.ended():
            source.native.finish(*source.metadata)

    def _fail(self, source: Source, error: KvwireError) -> None:
        source.error = source.error or error
        source.native.cancel()

    def _give_up(self, slice_: _Slice) -> None:
        """Of what was under way: wait for the device, which may have been lost."""
        if slice_.copied is not None:
            with contextlib.suppress(Exception):  # the error that is on its way says it
                slice_.copied.wait()
        self._not_read(slice_)
        self._let_go(slice_)
        self._done_with(slice_)

    def _drop_waiting(self) -> None:
        with self.changed:
            for source in list(self._queued):
                self._drop(source)

    def _drop(self, source: Source) -> None:
        """Nothing of what waits will be sent; with the lock."""
        del self._queued[source]
        waiting, source.waiting = source.waiting, []
        for *_, slice_ in waiting:
            self._handed(slice_)

    def _break_down(self, error: KvwireError) -> None:
        with self.changed:
            self._broken = error
            sources = list(self._sources)
        for source in sources:
            if not source.ended():
                self._fail(source, error)
