"""What one launch works on: a slice to be coded, or payloads to be decoded. Nothing here waits
before results() does; nothing is allocated once the largest plan has been seen.

These are of the CUDA kernels; `kvwire.kernels.triton_stages` has the same of Triton's.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvwire.errors import ErrorCode
from kvwire.kernels import crc_math
from kvwire.kernels.code_plan import CodePlan, Payload, ReadPlan, padded
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.cuda_backend import NO_BAD_ENTRY, decoder_of, raise_bad_entry, tiles_of
from kvwire.kernels.staging import Arena, DeviceBytes

__all__ = ["DecodeStage", "EncodeStage", "stages_of"]

RUN_BYTES_MIN = 512  # shorter ones are packed before they are coded


def stages_of(device) -> tuple[type, type]:
    """Return the classes of the device's back end that encode and decode."""
    if device.backend == "triton":
        from kvwire.kernels import triton_stages
        return triton_stages.EncodeStage, triton_stages.DecodeStage
    return EncodeStage, DecodeStage


class _Stage:
    """Device memory for one launch. `stream`: where it is made ready."""

    needs_strips = False  # in the CodePlan

    def __init__(self, device, sm_share: float, stream):
        self._device, self._blocks_max = device, device.blocks_max(sm_share)
        self._arena, self._constants = Arena(device), Arena(device)
        self._tables, = self._constants.lay([crc_math.cuda_tables()], stream)
        self._event = device.record(stream)

    def wait(self) -> None:
        """Until nothing of it runs any more; raises what the device raises."""
        self._event.wait()

    def _launch(self, kernel: str, count: int, args: list[int], stream) -> None:
        self._device.launch(kernel, (min(count, self._blocks_max), 1), [count, *args], stream)


class EncodeStage(_Stage):
    """Gathers, checks and codes one slice. After results() its payloads lie at `payload_at`."""

    def __init__(self, device, sm_share: float, slice_bytes: int, stream):
        super().__init__(device, sm_share, stream)
        self._out = DeviceBytes(device, slice_bytes)
        self._tails = DeviceBytes(device, slice_bytes)
        self._packed = None  # where runs are too short to be coded from their pages

    @property
    def raw_bytes(self) -> int:
        """Of the slice that was enqueued."""
        return self._copies.bytes

    @property
    def event(self):
        """After it, payloads are whole."""
        return self._event

    def enqueue(self, copies: CopyPlan, codes: CodePlan, stream, out: int | None = None) -> None:
        """Enqueue one small copy, one launch (two where runs are short), and the copy of its
        results. Payloads go to `out`, or to the stage's own memory. Neither allocates nor waits,
        once a plan as large has been seen: so may be captured into a CUDA graph."""
        self._copies, self._codes = copies, codes
        self._payloads_at = self._out.address if out is None else out
        is_packed, starts = copies.mean_run_bytes < RUN_BYTES_MIN, np.zeros(1, np.int64)
        if is_packed:
            tile_rows, tile_words, starts = tiles_of(copies, copies.word_bytes)
            self._packed = self._packed or DeviceBytes(self._device, self._out.bytes)
        beginnings = [crc_math.beginning(size) for size in codes.chunks[:, 1].tolist()]
        results = [np.array([NO_BAD_ENTRY]), np.zeros(len(codes.chunks), np.int64),
                   np.array(beginnings, np.uint32)]
        *rows, bad, sizes, crcs = self._arena.lay(
            [copies.legs, copies.block_ids, codes.chunks, codes.parts, codes.blob, starts,
             *results], stream)
        legs, ids, chunks, parts, blob, starts_at = rows
        segment = [0, legs, len(copies.legs), ids, bad]
        if is_packed:
            self._launch(f"kvwire_pack_{copies.word_bytes}", int(starts[-1]), [
                legs, starts_at, len(copies.legs), ids, self._packed.address, bad, tile_rows,
                tile_words], stream)
            segment = [self._packed.address, 0, 0, 0, 0]
        self._launch("kvwire_encode", len(codes.chunks), [
            *segment, chunks, parts, blob, self._tables, self._payloads_at, self._tails.address,
            sizes, crcs], stream)
        self._fetched = self._arena.fetch(bad, stream)
        self._offsets = sizes - bad, crcs - bad
        self._event = self._device.record(stream)

    def results(self) -> list[tuple[int, int, int]]:
        """Wait for the launch; return (address, payload bytes, raw CRC32C) of each chunk.

        Raises:
            UsageError: a block id in the device's table is out of range.
            What the device raises.
        """
        self._event.wait()
        count, (sizes_at, crcs_at) = len(self._codes.chunks), self._offsets
        raise_bad_entry(self._copies, int(self._fetched[:8].view(np.int64)[0]))
        sizes = self._fetched[sizes_at:sizes_at + 8 * count].view(np.int64).tolist()
        crcs = self._fetched[crcs_at:crcs_at + 4 * count].view(np.uint32).tolist()
        slots = (self._payloads_at + self._codes.chunks[:, 2]).tolist()
        return list(zip(slots, sizes, crcs))


class DecodeStage(_Stage):
    """Copies payloads to the device, decodes and checks them, and scatters them to their pages."""

    def __init__(self, device, sm_share: float, coded_bytes: int, stream):
        super().__init__(device, sm_share, stream)
        self._coded = DeviceBytes(device, coded_bytes)

    @property
    def coded_bytes(self) -> int:
        return self._coded.bytes

    @staticmethod
    def takes_bytes(payload_bytes: int, raw_bytes: int) -> int:
        """Return what a payload takes of `coded_bytes`."""
        return padded(payload_bytes)

    def enqueue(self, copies: CopyPlan, payloads: Sequence[Payload], plan: ReadPlan, stream
                ) -> None:
        """Enqueue a copy of each payload, one of the plan, and a launch for each format; most
        chunks have one. `payloads` are the caller's again when results() returns; they go to
        multiples of SLOT_ALIGNMENT."""
        for payload in payloads:
            self._device.to_device(self._coded.address + payload.coded_offset,
                                   np.frombuffer(payload.coded, np.uint8), stream)
        self._count, self._copies = len(payloads), copies
        stops = np.array([p.raw_offset + p.raw_bytes for p in payloads], np.int64)
        crcs = np.array([crc_math.beginning(p.raw_bytes) for p in payloads], np.uint32)
        numbers = list(plan.strips_of.values())
        laid = self._arena.lay(
            [copies.legs, copies.block_ids, plan.strips, plan.blob, stops, *numbers,
             np.array([NO_BAD_ENTRY]), crcs, np.zeros(self._count, np.int32)], stream)
        legs, ids, strips, blob, stops_at = laid[:5]
        bad, crcs_at, invalid_at = laid[-3:]
        for (dtype, tier_bits), chosen, chosen_at in zip(plan.strips_of, numbers, laid[5:-3]):
            bits = sum(width << 4 * tier for tier, width in enumerate(tier_bits))
            self._launch(decoder_of(dtype), len(chosen), [
                0, legs, len(copies.legs), ids, bad, self._coded.address, strips, chosen_at, dtype,
                bits, blob, self._tables, stops_at, crcs_at, invalid_at], stream)
        self._fetched = self._arena.fetch(bad, stream)
        self._offsets = crcs_at - bad, invalid_at - bad
        self._event = self._device.record(stream)

    def results(self) -> list[tuple[int, int]]:
        """Wait; return the error code of each payload, 0: none, and the CRC32C of its raw bytes.

        Raises: as `EncodeStage.results`.
        """
        self._event.wait()
        crcs_at, invalid_at = self._offsets
        raise_bad_entry(self._copies, int(self._fetched[:8].view(np.int64)[0]))
        crcs = self._fetched[crcs_at:crcs_at + 4 * self._count].view(np.uint32).tolist()
        invalid = self._fetched[invalid_at:invalid_at + 4 * self._count].view(np.int32).tolist()
        return [(int(ErrorCode.CODED_INVALID) if bad else 0, crc)
                for bad, crc in zip(invalid, crcs)]
