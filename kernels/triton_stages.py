"""The stages of `kvwire.kernels.stages`, by Triton's kernels: pages are packed before they are
coded, and decoded before they are scattered. Scratch is torch's; nothing here waits before
results() does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from kvwire.errors import ErrorCode
from kvwire.kernels.code_plan import CHUNK, STRIP, CodePlan, Payload, ReadPlan, padded
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.cuda_backend import raise_bad_entry
from kvwire.kernels.staging import DeviceBytes
from kvwire.kernels.triton.copy import DeviceRows, copy_segment
from kvwire.kernels.triton.crc import crc32c_chunks
from kvwire.kernels.triton.tiered import decode_chunks, encode_chunks

__all__ = ["DecodeStage", "EncodeStage"]

RAW_OFFSET, CHUNK_OF_STRIP = STRIP.index("RAW_OFFSET"), STRIP.index("CHUNK")
OUT_OFFSET = CHUNK.index("OUT_OFFSET")


class _Stage:
    needs_strips = True

    def __init__(self, device):
        self._device, self._event = device, None

    def wait(self) -> None:
        """Until nothing of it runs any more; raises what the device raises."""
        if self._event is not None:
            self._event.wait()

    def _tensor(self, held: DeviceBytes):
        return self._device.tensor(held.address, held.bytes)

    def _fetch(self, tensors: Sequence) -> None:
        """Enqueue the copies of results; torch pins what they go to."""
        self._fetched = [each.to("cpu", non_blocking=True) for each in tensors]

    def _results(self, copies: CopyPlan) -> list[np.ndarray]:
        """Wait; return what was fetched, but for the first: the least bad entry."""
        self._event.wait()
        bad, *results = (each.numpy() for each in self._fetched)
        raise_bad_entry(copies, int(bad[0]))
        return results


class EncodeStage(_Stage):
    """As `kvwire.kernels.stages.EncodeStage`."""

    def __init__(self, device, sm_share: float, slice_bytes: int, stream):
        super().__init__(device)
        self._packed, self._out = DeviceBytes(device, slice_bytes), DeviceBytes(device, slice_bytes)

    @property
    def raw_bytes(self) -> int:
        return self._copies.bytes

    def enqueue(self, copies: CopyPlan, codes: CodePlan, stream) -> None:
        self._copies, self._codes = copies, codes
        with self._device.on(stream):
            packed, rows = self._tensor(self._packed), DeviceRows(copies, self._device.device)
            copy_segment(rows, packed, pack=True)
            crcs = crc32c_chunks(packed, codes.chunks[:, :2])
            coded = [encode_chunks(codes, packed, self._tensor(self._out))] if len(
                codes.strips) else []
            self._fetch([rows.bad_entry, crcs, *coded])
        self._event = self._device.record(stream)

    def results(self) -> list[tuple[int, int, int]]:
        crcs, *coded = self._results(self._copies)
        sizes = coded[0].tolist() if coded else [0] * len(self._codes.chunks)
        found = []
        for row, parts, size, crc in zip(self._codes.chunks.tolist(), self._codes.sources, sizes,
                                         crcs.view(np.uint32).tolist()):
            if isinstance(parts, int):  # it stays as it is, where it was packed
                found.append((self._packed.address + row[0], row[1], crc))
            else:
                found.append((self._out.address + row[OUT_OFFSET], size, crc))
        return found


class DecodeStage(_Stage):
    """As `kvwire.kernels.stages.DecodeStage`. Raw bytes lie in it, side by side where they are
    neighbours in the segment, until they are scattered."""

    def __init__(self, device, sm_share: float, coded_bytes: int, stream):
        super().__init__(device)
        self._coded, self._raw = DeviceBytes(device, coded_bytes), DeviceBytes(device, coded_bytes)

    @property
    def coded_bytes(self) -> int:
        return self._coded.bytes

    @staticmethod
    def takes_bytes(payload_bytes: int, raw_bytes: int) -> int:
        return padded(max(payload_bytes, raw_bytes))

    def enqueue(self, copies: CopyPlan, payloads: Sequence[Payload], plan: ReadPlan, stream
                ) -> None:
        for payload in payloads:
            self._device.to_device(self._coded.address + payload.coded_offset,
                                   np.frombuffer(payload.coded, np.uint8), stream)
        self._copies = copies
        places, runs = laid(payloads)
        shifts = places - np.array([payload.raw_offset for payload in payloads], np.int64)
        strips = plan.strips.copy()
        strips[:, RAW_OFFSET] += shifts[strips[:, CHUNK_OF_STRIP]]
        chunks = np.stack([places, [payload.raw_bytes for payload in payloads]], axis=1)
        with self._device.on(stream):
            raw, rows = self._tensor(self._raw), DeviceRows(copies, self._device.device)
            invalid = decode_chunks(replace(plan, strips=strips), self._tensor(self._coded), raw,
                                    len(payloads))
            crcs = crc32c_chunks(raw, chunks)
            for at, start, stop in runs:
                copy_segment(rows, raw[at:], pack=False, start=start, stop=stop)
            self._fetch([rows.bad_entry, crcs, invalid])
        self._event = self._device.record(stream)

    def results(self) -> list[tuple[int, int]]:
        crcs, invalid = self._results(self._copies)
        return [(int(ErrorCode.CODED_INVALID) if bad else 0, crc)
                for bad, crc in zip(invalid.tolist(), crcs.view(np.uint32).tolist())]


def laid(payloads: Sequence[Payload]) -> tuple[np.ndarray, list[tuple[int, int, int]]]:
    """Return where the raw bytes of each payload go, and the runs of neighbours: (where the run
    is, start and stop in the segment)."""
    places, runs, end = np.zeros(len(payloads), np.int64), [], 0
    for number in sorted(range(len(payloads)), key=lambda n: payloads[n].raw_offset):
        start, count = payloads[number].raw_offset, payloads[number].raw_bytes
        if runs and runs[-1][2] == start:
            runs[-1] = *runs[-1][:2], start + count
        else:
            end = padded(end)
            runs.append((end, start, start + count))
        places[number] = end
        end += count
    return places, runs
