"""The same plans on memory of the CPU, by kvwire's native planner and codec."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvwire import _native
from kvwire.errors import ErrorCode, FormatError
from kvwire.kernels.code_plan import CodePlan, Payload
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.cuda_backend import check_bf16
from kvwire.kernels.narrow import e4m3_of_bf16
from kvwire.tiered import OPAQUE

__all__ = ["CpuBackend"]


class CpuBackend:
    """As `kvwire.kernels.cuda_backend.CudaBackend`, with numpy arrays of uint8 for bytes."""

    name = "cpu"

    def empty(self, count: int) -> np.ndarray:
        return np.empty(count, np.uint8)

    def upload(self, data: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).copy()

    def download(self, held: np.ndarray, dtype=np.uint8) -> np.ndarray:
        return held.view(dtype)

    def pack(self, plan: CopyPlan, segment: np.ndarray) -> None:
        segment[:plan.bytes] = self._packed(plan)

    def pack_e4m3(self, plan: CopyPlan, segment: np.ndarray) -> None:
        check_bf16(plan)
        segment[:plan.bytes // 2] = e4m3_of_bf16(self._packed(plan).view(np.uint16))

    def unpack(self, plan: CopyPlan, segment: np.ndarray) -> None:
        at = 0
        for placement in plan.placements:
            placement.scatter(0, segment[at:at + placement.bytes].tobytes())
            at += placement.bytes

    def _packed(self, segment: np.ndarray | CopyPlan) -> np.ndarray:
        if isinstance(segment, CopyPlan):
            data = b"".join(each.gather(0, each.bytes) for each in segment.placements)
            return np.frombuffer(data, np.uint8)
        return segment

    def encode(self, plan: CodePlan, segment, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raw, sizes = self._packed(segment), []
        chunks = plan.chunks[:, :2]
        for (start, count, at, *_), parts in zip(plan.chunks.tolist(), plan.sources):
            data = raw[start:start + count].tobytes()
            if isinstance(parts, int):
                out[at:at + count] = raw[start:start + count]
                sizes.append(count)
                continue
            native = [(part.raw_bytes, part.table and part.table.encode(), part.position,
                       part.table_index if part.table else OPAQUE) for part in parts]
            coded = _native.tiered_encode(data, native, out_max=count)
            data = coded if coded and len(coded) < count else data
            out[at:at + len(data)] = np.frombuffer(data, np.uint8)
            sizes.append(len(data))
        return np.array(sizes, np.int64), self.crc32c(chunks, raw)

    def decode(self, payloads: Sequence[Payload], coded: np.ndarray, segment,
               table_of=lambda index: None) -> tuple[np.ndarray, np.ndarray]:
        raw, invalid = self._packed(segment).copy(), []
        for payload in payloads:
            if payload.is_raw:
                raw[payload.raw_offset:payload.raw_offset + payload.raw_bytes] = \
                    np.frombuffer(payload.coded, np.uint8)
                invalid.append(False)
                continue
            indices = {int(at) for at in _table_indices(payload.coded)}
            tables = {index: table.encode() for index in indices if (table := table_of(index))}
            try:
                data = _native.tiered_decode(payload.coded, payload.raw_bytes, tables)
                raw[payload.raw_offset:payload.raw_offset + payload.raw_bytes] = \
                    np.frombuffer(data, np.uint8)
                invalid.append(False)
            except FormatError as error:
                if error.code != ErrorCode.CODED_INVALID:
                    raise
                invalid.append(True)
        if isinstance(segment, CopyPlan):
            self.unpack(segment, raw)
        else:
            segment[:len(raw)] = raw
        chunks = np.array([(p.raw_offset, p.raw_bytes) for p in payloads], np.int64)
        return np.array(invalid), self.crc32c(chunks.reshape(-1, 2), raw)

    def crc32c(self, chunks: np.ndarray, segment) -> np.ndarray:
        raw = self._packed(segment)
        return np.array([_native.crc32c(raw[at:at + count].tobytes())
                         for at, count in chunks.tolist()], np.uint32)


def _table_indices(coded: bytes):
    """Yield the table index of each part, as far as the headers can be followed."""
    at = 0
    while at + 16 <= len(coded):
        fields = np.frombuffer(coded, "<u4", 4, at)
        yield fields[2]
        if fields[1] < 16:
            return
        at += int(fields[1])
