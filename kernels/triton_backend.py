"""Plans to launches of the Triton kernels. Bytes are uint8 tensors of torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvwire.errors import UsageError
from kvwire.kernels.code_plan import CodePlan, Payload, ReadPlan
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.cuda_backend import check_bf16, raise_bad_entry
from kvwire.kernels.triton.upload import upload
from kvwire.layout import DType

__all__ = ["TritonBackend"]


class TritonBackend:
    """As `kvwire.kernels.cuda_backend.CudaBackend`; pages are packed before they are coded."""

    name = "triton"

    def __init__(self, device: str = "cuda"):
        self._device = device

    def empty(self, count: int):
        import torch
        return torch.empty(count, dtype=torch.uint8, device=self._device)

    def upload(self, data: np.ndarray):
        import torch
        raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return torch.from_numpy(raw.copy()).to(self._device)

    def download(self, held, dtype=np.uint8) -> np.ndarray:
        return held.cpu().numpy().view(dtype)

    def _check(self, what: str, held) -> None:
        """Raise UsageError unless `held` is what the kernels take."""
        import torch
        if held.dtype != torch.uint8 or not held.is_contiguous():
            raise UsageError(f"{what} must be a contiguous uint8 tensor", expected="torch.uint8",
                             actual=f"{held.dtype}, strides {tuple(held.stride())}")
        if held.device.type != torch.device(self._device).type:
            raise UsageError(f"{what} is on the wrong device", expected=self._device,
                             actual=str(held.device))

    def pack(self, plan: CopyPlan, segment) -> None:
        self._copy(plan, segment, pack=True)

    def pack_e4m3(self, plan: CopyPlan, segment) -> None:
        from kvwire.kernels.triton.narrow import narrow
        check_bf16(plan)
        packed = self.empty(plan.bytes)
        self.pack(plan, packed)
        self._check("segment", segment)
        narrow(packed, segment[:plan.bytes // 2])

    def unpack(self, plan: CopyPlan, segment) -> None:
        self._copy(plan, segment, pack=False)

    def _copy(self, plan: CopyPlan, segment, pack: bool) -> None:
        from kvwire.kernels.triton.copy import DeviceRows, copy_segment
        self._check("segment", segment)
        if segment.numel() < plan.bytes:
            raise UsageError("segment is too short", expected=plan.bytes, actual=segment.numel())
        rows = DeviceRows(plan, segment.device)
        copy_segment(rows, segment, pack=pack)
        raise_bad_entry(plan, int(rows.bad_entry))

    def _packed(self, segment):
        if not isinstance(segment, CopyPlan):
            self._check("segment", segment)
            return segment
        packed = self.empty(segment.bytes)
        self.pack(segment, packed)
        return packed

    def encode(self, plan: CodePlan, segment, out) -> tuple[np.ndarray, np.ndarray]:
        from kvwire.kernels.triton.tiered import encode_chunks
        if any(isinstance(parts, int) for parts in plan.sources):
            raise UsageError("the Triton kernels code every chunk: pack those that stay raw")
        raw = self._packed(segment)
        self._check("out", out)
        sizes = encode_chunks(plan, raw, out).cpu().numpy()
        return sizes, self.crc32c(plan.chunks[:, :2].copy(), raw)

    def decode(self, payloads: Sequence[Payload], coded, segment, table_of=lambda index: None
               ) -> tuple[np.ndarray, np.ndarray]:
        from kvwire.kernels.triton.tiered import decode_chunks
        self._check("coded", coded)
        plan = ReadPlan.of_payloads(payloads, table_of)
        paged = isinstance(segment, CopyPlan)
        raw = self._packed(segment)  # what the payloads do not cover stays as it is
        invalid = decode_chunks(plan, coded, raw, len(payloads)).cpu().numpy() != 0
        chunks = np.array([(p.raw_offset, p.raw_bytes) for p in payloads], np.int64)
        crcs = self.crc32c(chunks.reshape(-1, 2), raw)
        if paged:
            self.unpack(segment, raw)
        return invalid, crcs

    def exponent_histogram(self, raw, dtype: DType, channels: np.ndarray, channel_count: int
                           ) -> np.ndarray:
        """Return how often each exponent occurs in each channel, int64 [channel_count, exponents]:
        what `CodeTable`s are made of. Element i counts in channels[i % len(channels)]."""
        from kvwire.kernels.triton.histogram import exponent_histogram
        self._check("raw", raw)
        return exponent_histogram(raw, dtype, upload(channels, raw.device), channel_count
                                  ).cpu().numpy()

    def crc32c(self, chunks: np.ndarray, segment) -> np.ndarray:
        from kvwire.kernels.triton.crc import crc32c_chunks
        return crc32c_chunks(self._packed(segment), chunks).cpu().numpy().view(np.uint32)
