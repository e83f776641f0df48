"""`Transfer`, `Push` and `Ticket` of caches in device memory: the same calls, staged."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from kvwire.control import Item
from kvwire.errors import KvwireError
from kvwire.handles import priority_of
from kvwire.kernels.staged_receiver import StagedReceiver, Target
from kvwire.kernels.staged_sender import Source, StagedSender, StagedSlices
from kvwire.layout import CacheSpec
from kvwire.manifest import encode_metadata
from kvwire.memory import CacheMemory
from kvwire.receiver import Receiver, Ticket
from kvwire.sender import Offer, Push, Sender, Transfer

__all__ = ["StagedOffer", "StagedPush", "StagedTicket", "StagedTransfer"]


class StagedTransfer(Transfer):
    """A transfer out of device memory."""

    def __init__(self, sender: Sender, native: object, memory: CacheMemory, spec: CacheSpec,
                 staged: StagedSender, device: object):
        Transfer.__init__(self, sender, native, memory, spec)
        self._staged, self._device = staged, device
        self._source: Source = staged.add(native, memory, spec,
                                          weakref.WeakMethod(sender._wake_soon))

    def push_items(self, items: Sequence[Item], *, priority: int = 0, ready: object = None
                   ) -> StagedPush:
        """As `Transfer.push_items`; what the engine has enqueued by now, on torch's current stream,
        is done before the pages are read.

        Args:
            ready: an event of the device to wait for instead.
        """
        self._endpoint._checked()
        self.memory.check_known(items)
        ready = self._device.engine_event() if ready is None else ready
        return StagedPush(self, self._staged.push(self._source, items, ready,
                                                  priority_of(priority)))

    def finish(self, metadata: Mapping[str, object] | None = None) -> StagedTransfer:
        self._endpoint._checked()
        metadata = metadata or {}
        self._staged.finish(self._source, (encode_metadata(metadata), len(metadata)))
        return self

    def cancel(self) -> None:
        super().cancel()
        self._staged.wait_idle(self._source)

    def exception(self) -> KvwireError | None:
        error = super().exception()
        return error if error is None else self._source.error or error

    def _outcome(self):
        if self.done():
            self._staged.wait_idle(self._source)
        return super()._outcome()


class StagedOffer(StagedTransfer, Offer):
    """An offer out of device memory: nothing of it is read before it is pulled."""

    def __init__(self, sender: Sender, native: object, memory: CacheMemory, spec: CacheSpec,
                 name: bytes, staged: StagedSender, device: object):
        StagedTransfer.__init__(self, sender, native, memory, spec, staged, device)
        self.offer_id = name.hex()


class StagedPush(Push):
    """Completes when all its slices have arrived, or the transfer has ended."""

    def __init__(self, transfer: StagedTransfer, slices: StagedSlices):
        self._transfer, self._slices = transfer, slices

    def done(self) -> bool:
        self._transfer._endpoint._check_process()
        return self._poll(0.0)

    def wait(self, timeout_s: float | None = None) -> bool:
        return self._transfer._wait_for(timeout_s, self._poll)

    def _poll(self, timeout_s: float) -> bool:
        changed, native = self._transfer._staged.changed, self._transfer._native
        with changed:
            if not changed.wait_for(lambda: self._slices.to_hand == 0, timeout_s):
                return False
        return all(native.wait_push(number, timeout_s) for number in self._slices.numbers)


class StagedTicket(Ticket):
    """A hand-off into device memory."""

    def __init__(self, receiver: Receiver, native: object, memory: CacheMemory,
                 staged: StagedReceiver, target: Target):
        super().__init__(receiver, native, memory)
        self._staged, self._target = staged, target

    def cancel(self) -> None:
        super().cancel()
        self._staged.wait_idle(self._target)

    def exception(self) -> KvwireError | None:
        error = super().exception()
        if error is None or self._target.error is None:
            return error
        self._target.error.layers = error.layers
        return self._target.error

    def _outcome(self):
        if self.done():
            self._staged.wait_idle(self._target)
        return super()._outcome()
