"""The staging thread of a `Receiver`: payloads that have landed to the pages of a device."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvwire import _native
from kvwire.codec import Codec
from kvwire.errors import ErrorCode, InternalError, KvwireError, UsageError
from kvwire.kernels.code_plan import Payload, ReadPlan, padded, table_of_bytes
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.stages import DecodeStage, stages_of
from kvwire.kernels.staging import Staging, settle, settled, typed

__all__ = ["StagedReceiver", "Target"]

STAGES = 2
ROOM_BYTES = 256 << 10  # a chunk of the usual size; larger ones take neighbouring rooms
COPIES_KEPT = 16  # plans of segments, for each ticket
POLL_S = 0.05
REPAIRED = {ErrorCode.PAYLOAD_CORRUPT, ErrorCode.RAW_CORRUPT, ErrorCode.CODED_INVALID,
            ErrorCode.TABLE_UNKNOWN}  # what a REPAIR may say: FORMAT.md §7.8


@dataclass(eq=False)
class Target:
    """One ticket for device memory. `error`: what staging failed it with."""

    ready: object   # event after which the pages may be written
    memory: object  # kept for as long as they may be; None: they are not any more
    native: object = None  # once it is bound
    error: KvwireError | None = None
    writing: int = 0
    copies: dict = field(default_factory=dict)  # (transfer, segment) -> CopyPlan

    def ended(self) -> bool:
        return self.native is not None and self.native.progress()[4]


@dataclass(eq=False)
class _Batch:
    """Payloads of one segment in one stage."""

    target: Target
    stage: DecodeStage
    landed: list


class StagedReceiver:
    """Decodes what lands, chunk by chunk, and tells the receiver what came of it.

    Args:
        verdict: verdict([(landed, error code, raw CRC32C), ...]); receipts of one call go together.
        chunk_bytes_max: the largest payload.

    Raises LimitError where the device, or page-locked memory, has no room.
    """

    def __init__(self, staging: Staging, device, verdict: Callable, chunk_bytes_max: int):
        device.attach()
        self._device, self._verdict = device, verdict
        self._stream = device.stream()
        coded_bytes = max(staging.slice_bytes, chunk_bytes_max)
        _, decode_stage = stages_of(device)
        rooms = staging.ring_bytes // ROOM_BYTES
        self._stages: list[DecodeStage] = []
        with settled(device, self._stream):
            for _ in range(STAGES):
                self._stages.append(decode_stage(device, staging.sm_share, coded_bytes,
                                                 self._stream))
            self._pinned = device.pinned(rooms * ROOM_BYTES)
        self.room_count = rooms
        self.zone = _native.LandingZone(self._pinned.ctypes.data, rooms, ROOM_BYTES)
        self.changed = threading.Condition()
        self._targets: dict[bytes, Target] = {}
        self._under_way: deque[_Batch] = deque()
        self._ahead: deque = deque()  # has left the zone, and is in no batch
        self._closed, self._broken = False, None
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._run, name="kvwire-staging", daemon=True)
        self._thread.start()

    def add(self, name: bytes, memory, ready) -> Target:
        """Return what stands for a ticket that is about to be bound; it is forgotten when that has
        ended.

        Raises what has broken the device; UsageError where the name is that of an open ticket.
        """
        if self._broken:
            raise self._broken
        target = Target(ready, memory)
        with self.changed:
            if name in self._targets and not self._targets[name].ended():
                raise UsageError(f"ticket {name.hex()} is bound already")
            self._targets = {known: each for known, each in self._targets.items()
                             if each.writing or not each.ended()} | {name: target}
        return target

    def bound(self, target: Target, native) -> None:
        """Say what `add` was for; None: it could not be bound."""
        with self.changed:
            target.native = native
            if native is None:
                self._targets = {name: each for name, each in self._targets.items()
                                 if each is not target}
            self.changed.notify_all()
        if self._broken and native is not None:
            self._fail(target, self._broken)

    def wait_idle(self, target: Target) -> None:
        """Wait until the device writes no page of a ticket that has ended."""
        with self.changed:
            self.changed.wait_for(lambda: target.writing == 0)
            target.memory = None

    def close(self) -> None:
        """Stop. All tickets have ended, or end with it."""
        if os.getpid() != self._pid:  # a forked lock may never open
            return
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self.zone.close()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # ---- the thread

    def _run(self) -> None:
        try:
            self._device.attach()
            while not self._closed:
                landed = self._take(0.0 if self._under_way else POLL_S)
                if landed is not None:
                    self._begin(landed)
                if self._under_way and (landed is None or len(self._under_way) == STAGES):
                    self._settle_oldest()
        except BaseException as error:  # the device's: none of its tickets can go on
            self._break_down(typed(error))
        finally:
            settle(self._stages)
            for batch in self._under_way:
                self._give_up(batch)
            self._under_way.clear()
            for landed in self._ahead:
                landed.release()
            self._ahead.clear()

    def _take(self, timeout_s: float):
        return self._ahead.popleft() if self._ahead else self.zone.pop(timeout_s)

    def _target_of(self, landed) -> Target | None:
        """Return the ticket that a payload is for; None: it has ended."""
        def known() -> bool:  # a ticket can be filled before bound() has told us of it
            target = self._targets.get(landed.ticket_id)
            return self._closed or target is None or target.native is not None

        with self.changed:
            self.changed.wait_for(known)
            target = self._targets.get(landed.ticket_id)
            if target is None or self._closed or target.ended():
                return None
            target.writing += 1
            return target

    def _begin(self, landed) -> None:
        """Enqueue a payload, and those of its segment that have landed after it."""
        target = self._target_of(landed)
        if target is None:
            landed.release()
            return
        busy = {batch.stage for batch in self._under_way}
        stage = next(stage for stage in self._stages if stage not in busy)
        batch = _Batch(target, stage, [landed])
        room = stage.coded_bytes - stage.takes_bytes(landed.payload_bytes, landed.raw_bytes)
        while (more := self._take(0.0)) is not None:
            taken_bytes = stage.takes_bytes(more.payload_bytes, more.raw_bytes)
            if _segment(more) != _segment(landed) or taken_bytes > room:
                self._ahead.appendleft(more)
                break
            room -= taken_bytes
            batch.landed.append(more)
        try:
            self._enqueue(batch)
        except BaseException as error:
            with contextlib.suppress(Exception):  # a part of it may have been enqueued
                self._device.record(self._stream).wait()
            self._not_written(target)
            for each in batch.landed:
                each.release()
            if isinstance(error, InternalError) or not isinstance(error, KvwireError):
                raise
            self._fail(target, error)

    def _enqueue(self, batch: _Batch) -> None:
        target, key = batch.target, _segment(batch.landed[0])
        if key not in target.copies:
            if len(target.copies) == COPIES_KEPT:
                target.copies.clear()
            target.copies[key] = CopyPlan.of_placements([batch.landed[0].placement])
        payloads, plan = self._planned(batch, _tables_of(batch.landed))
        if plan is None:
            return self._not_written(target)
        self._device.wait_for(self._stream, target.ready)
        batch.stage.enqueue(target.copies[key], payloads, plan, self._stream)
        self._under_way.append(batch)

    def _planned(self, batch: _Batch, tables: Callable) -> tuple[list[Payload], ReadPlan | None]:
        """Return what can be decoded of a batch; the rest of it is put back, to be the next.

        A payload that is wrong by itself is given its verdict; then there is no plan.
        """
        while True:
            payloads = _payloads(batch.landed)
            try:
                return payloads, ReadPlan.of_payloads(payloads, tables)
            except KvwireError as error:
                half = len(batch.landed) // 2
                if half == 0:
                    code = error.code if error.code in REPAIRED else ErrorCode.CODED_INVALID
                    self._verdict([(batch.landed[0], int(code), 0)])
                    batch.landed.pop().release()
                    return [], None
                self._ahead.extendleft(reversed(batch.landed[half:]))
                del batch.landed[half:]

    def _settle_oldest(self) -> None:
        batch = self._under_way[0]
        try:
            results = batch.stage.results()
        except UsageError as error:  # of this ticket's block ids
            results = []
            self._fail(batch.target, error)
        self._under_way.popleft()
        self._not_written(batch.target)
        self._verdict([(landed, *result) for landed, result in zip(batch.landed, results)])
        for landed in batch.landed:
            landed.release()

    def _not_written(self, target: Target) -> None:
        with self.changed:
            target.writing -= 1
            self.changed.notify_all()

    def _fail(self, target: Target, error: KvwireError) -> None:
        target.error = target.error or error
        target.native.cancel()

    def _give_up(self, batch: _Batch) -> None:
        """Of what was under way, and is not any more."""
        self._not_written(batch.target)
        for landed in batch.landed:
            landed.release()

    def _break_down(self, error: KvwireError) -> None:
        with self.changed:
            self._broken = error
            targets = [each for each in self._targets.values()
                       if each.native is not None]  # bound() fails the others
        for target in targets:
            if not target.ended():
                self._fail(target, error)
        self.zone.close()


def _segment(landed) -> tuple[bytes, int]:
    return landed.transfer_id, landed.segment_index


def _payloads(landed: list) -> list[Payload]:
    """Return the payloads as they will lie in a stage, one after another."""
    payloads, at = [], 0
    for each in landed:
        room = (ctypes.c_uint8 * each.payload_bytes).from_address(each.address)
        payloads.append(Payload(memoryview(room).cast("B"), at, each.raw_offset, each.raw_bytes,
                                each.codec == Codec.RAW))
        at += padded(each.payload_bytes)
    return payloads


def _tables_of(landed: list) -> Callable:
    """Return the look-up of the link's tables that payloads name."""
    tables = {index: data for each in landed for index, data in each.tables.items()}
    return lambda index: table_of_bytes(tables[index]) if index in tables else None
