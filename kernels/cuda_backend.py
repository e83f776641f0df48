"""Plans to launches of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvwire.errors import UsageError
from kvwire.kernels import crc_math
from kvwire.kernels.code_plan import CodePlan, Payload, ReadPlan
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.staging import DeviceBytes

__all__ = ["CudaBackend", "DeviceBytes", "NO_BAD_ENTRY", "check_bf16", "raise_bad_entry",
           "tiles_of"]

NO_BAD_ENTRY = (1 << 63) - 1
TILE_ROWS_WORDS = 2048  # room for addresses and words of a tile: kernels/cuda/kvwire.cu
STRIP_BYTES_MAX = 16_384


def raise_bad_entry(plan: CopyPlan, entry: int) -> None:
    """Raise UsageError where the kernels met a block id outside its array."""
    if entry != NO_BAD_ENTRY:
        raise UsageError(f"entry {entry} of the segment's block tables is out of range: the "
                         "device's table was changed, or block_counts is wrong; nothing was read "
                         "or written there", actual=entry)


def tiles_of(plan: CopyPlan, word_bytes: int) -> tuple[int, int, np.ndarray]:
    """Return rows and words of the tiles, in the shape that makes them fewest, and the first tile
    of each leg."""
    shapes = [(min(1 << bits, 256), TILE_ROWS_WORDS >> bits) for bits in range(12)]
    rows, words = min(shapes, key=lambda shape: plan.tile_starts(*shape, word_bytes)[-1])
    return rows, words, plan.tile_starts(rows, words, word_bytes)


def check_bf16(plan: CopyPlan) -> None:
    """Raise UsageError where the elements of a plan cannot have two bytes."""
    if plan.word_bytes < 2:
        raise UsageError("the segment is no bf16: its runs are not of whole, aligned elements",
                         expected=2, actual=plan.word_bytes)


class CudaBackend:
    """The kernels of kernels/cuda/kvwire.cu, on the default stream; each call waits for its end.

    Segments are `DeviceBytes`, or, in `encode`, `decode` and `crc32c`, a CopyPlan: then pages are
    read or written where they lie. That pays from runs of 512 bytes on; pack shorter ones first.
    """

    name = "cuda"

    def __init__(self, driver):
        self._driver = driver
        self._crc_tables = self.upload(crc_math.cuda_tables())

    def empty(self, count: int) -> DeviceBytes:
        return DeviceBytes(self._driver, count)

    def upload(self, data: np.ndarray) -> DeviceBytes:
        made = self.empty(data.nbytes)
        self._driver.write(made.address, np.ascontiguousarray(data))
        return made

    def download(self, held: DeviceBytes, dtype=np.uint8) -> np.ndarray:
        data = np.empty(held.bytes // np.dtype(dtype).itemsize, dtype)
        self._driver.read(held.address, data)
        return data

    def pack(self, plan: CopyPlan, segment: DeviceBytes) -> None:
        """Gather all of a segment from its pages."""
        self._copy("pack", plan, segment)

    def pack_e4m3(self, plan: CopyPlan, segment: DeviceBytes) -> None:
        """As `pack` of bf16 elements, each narrowed to fp8 (`kvwire.kernels.narrow`): half the
        bytes.

        Raises UsageError: runs of single bytes are no bf16.
        """
        check_bf16(plan)
        self._copy("narrow", plan, segment)

    def unpack(self, plan: CopyPlan, segment: DeviceBytes) -> None:
        """Scatter all of a segment to its pages."""
        self._copy("unpack", plan, segment)

    def _copy(self, verb: str, plan: CopyPlan, segment: DeviceBytes) -> None:
        word_bytes = plan.word_bytes
        if verb == "narrow":
            word_bytes = 8 if word_bytes >= 8 else 2
        rows, words, starts = tiles_of(plan, word_bytes)
        if starts[-1] == 0:
            return
        pages, bad_entry = self._pages(plan)
        tile_starts = self.upload(starts)
        tiles = int(starts[-1])
        self._driver.launch(f"kvwire_{verb}_{word_bytes}", (tiles, 1),
                            [tiles, pages[0].address, tile_starts.address, len(plan.legs),
                             pages[1].address, segment.address, bad_entry.address, rows, words])
        raise_bad_entry(plan, int(self.download(bad_entry, np.int64)[0]))

    def _pages(self, plan: CopyPlan) -> tuple[list[DeviceBytes], DeviceBytes]:
        return ([self.upload(plan.legs), self.upload(plan.block_ids)],
                self.upload(np.array([NO_BAD_ENTRY])))

    def _run(self, kernel: str, grid: tuple[int, int], segment, args: list) -> None:
        """Launch with a segment in front of the arguments; DeviceBytes go by address."""
        if isinstance(segment, CopyPlan):
            (legs, ids), bad_entry = self._pages(segment)
            front = [0, legs.address, len(segment.legs), ids.address, bad_entry.address]
        else:
            front = [segment.address, 0, 0, 0, 0]
        plain = [arg.address if isinstance(arg, DeviceBytes) else arg for arg in args]
        self._driver.launch(kernel, grid, [grid[0], *front, *plain])
        if isinstance(segment, CopyPlan):
            raise_bad_entry(segment, int(self.download(bad_entry, np.int64)[0]))

    def _beginnings(self, sizes: list[int]) -> DeviceBytes:
        return self.upload(np.array([crc_math.beginning(size) for size in sizes], np.uint32))

    def encode(self, plan: CodePlan, segment: DeviceBytes | CopyPlan, out: DeviceBytes
               ) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes that each chunk takes in its slot of `out`, and its raw CRC32C."""
        count = len(plan.chunks)
        sizes = self.upload(np.zeros(count, np.int64))
        crcs = self._beginnings(plan.chunks[:, 1].tolist())
        tails = self.empty(plan.out_bytes)
        rows = [self.upload(each) for each in (plan.chunks, plan.parts, plan.blob)]
        self._run("kvwire_encode", (count, 1), segment,
                  [*rows, self._crc_tables, out, tails, sizes, crcs])
        return self.download(sizes, np.int64), self.download(crcs, np.uint32)

    def decode(self, payloads: Sequence[Payload], coded: DeviceBytes,
               segment: DeviceBytes | CopyPlan, table_of=lambda index: None
               ) -> tuple[np.ndarray, np.ndarray]:
        """Return which chunks are CODED_INVALID, and the CRC32C of what was written of each.

        Raises:
            FormatError, RefusedError: as `ReadPlan.of_payloads`, before anything is written.
        """
        plan = ReadPlan.of_payloads(payloads, table_of)
        stops = self.upload(np.array([p.raw_offset + p.raw_bytes for p in payloads], np.int64))
        crcs = self._beginnings([payload.raw_bytes for payload in payloads])
        invalid = self.upload(np.zeros(len(payloads), np.int32))
        strips, blob = self.upload(plan.strips), self.upload(plan.blob)
        for (dtype, tier_bits), numbers in plan.strips_of.items():
            bits = sum(width << 4 * tier for tier, width in enumerate(tier_bits))
            self._run("kvwire_decode", (len(numbers), 1), segment,
                      [coded, strips, self.upload(numbers), dtype, bits, blob, self._crc_tables,
                       stops, crcs, invalid])
        return self.download(invalid, np.int32) != 0, self.download(crcs, np.uint32)

    def crc32c(self, chunks: np.ndarray, segment: DeviceBytes | CopyPlan) -> np.ndarray:
        """Return the CRC32C of each chunk: int64 [chunks, 2], offset and bytes."""
        crcs = self._beginnings(chunks[:, 1].tolist())
        blocks = max(1, -(-int(chunks[:, 1].max(initial=0)) // STRIP_BYTES_MAX))
        self._run("kvwire_crc", (len(chunks), blocks), segment,
                  [self.upload(chunks), self._crc_tables, crcs])
        return self.download(crcs, np.uint32)
