"""Plans to launches of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from kvwire.errors import UsageError
from kvwire.kernels import crc_math
from kvwire.kernels.code_plan import CodePlan, Payload, ReadPlan, padded
from kvwire.kernels.copy_plan import CopyPlan
from kvwire.kernels.staging import DeviceBytes
from kvwire.layout import DType
from kvwire.tiered import element_format

__all__ = ["CudaBackend", "DeviceBytes", "Launches", "NO_BAD_ENTRY", "check_bf16",
           "decoder_of", "raise_bad_entry", "tiles_of"]

NO_BAD_ENTRY = (1 << 63) - 1
TILE_BYTES, TILE_ROWS_MAX = 16_384, 256  # kernels/cuda/copy.cuh has room for as many rows
STRIPS_EACH = 8  # of a decoding block, where there are many: checksums are added up once for all


def raise_bad_entry(plan: CopyPlan, entry: int) -> None:
    """Raise UsageError where the kernels met a block id outside its array."""
    if entry != NO_BAD_ENTRY:
        raise UsageError(f"entry {entry} of the segment's block tables is out of range: the "
                         "device's table was changed, or block_counts is wrong; nothing was read "
                         "or written there", actual=entry)


def tiles_of(plan: CopyPlan, word_bytes: int) -> tuple[int, int, np.ndarray]:
    """Return rows and words of the tiles, in the shape that makes them fewest, and the first tile
    of each leg."""
    tile_words = TILE_BYTES // word_bytes
    shapes = [(min(1 << bits, TILE_ROWS_MAX), tile_words >> bits)
              for bits in range(tile_words.bit_length())]
    rows, words = min(shapes, key=lambda shape: plan.tile_starts(*shape, word_bytes)[-1])
    return rows, words, plan.tile_starts(rows, words, word_bytes)


def check_bf16(plan: CopyPlan) -> None:
    """Raise UsageError where the elements of a plan cannot have two bytes."""
    if plan.word_bytes < 2:
        raise UsageError("the segment is no bf16: its runs are not of whole, aligned elements",
                         expected=2, actual=plan.word_bytes)


def decoder_of(dtype: int) -> str:
    """Return the kernel that decodes strips of a dtype's number; 0: opaque ones."""
    return f"kvwire_decode_{element_format(DType(dtype)).item_bytes if dtype else 1}"


class Launches:
    """A call whose tables lie on the device; `CudaBackend.prepare` makes it. Segments, tables and
    pages live as long as it does."""

    def __init__(self, backend: CudaBackend, report: Callable, pages: CopyPlan | None,
                 *state: np.ndarray):
        """`state`: what the kernels find at first, and report; in front comes the bad entry."""
        self._driver, self._report, self._plan = backend._driver, report, pages
        self._backend, self._calls, self._kept = backend, [], []
        self._state = [np.array([NO_BAD_ENTRY]), *state]
        self._starts = np.cumsum([0, *(padded(each.nbytes) for each in self._state)]).tolist()
        initial = np.zeros(self._starts[-1], np.uint8)
        for at, each in zip(self._starts, self._state):
            initial[at:at + each.nbytes] = each.view(np.uint8)
        self._initial, self._now = backend.upload(initial), backend.empty(len(initial))

    def state(self, number: int) -> int:
        """Return the address of an array; 0: the bad entry."""
        return self._now.address + self._starts[number]

    def front(self, segment: DeviceBytes | CopyPlan) -> list:
        """Return the arguments that stand for a segment."""
        if isinstance(segment, CopyPlan):
            return [0, segment.legs, len(segment.legs), segment.block_ids, self.state(0)]
        return [segment, 0, 0, 0, 0]

    def add(self, kernel: str, grid: tuple[int, int], args: list) -> None:
        """Add a launch, unless there is nothing to do. Arrays are uploaded; they and DeviceBytes go
        by address."""
        if 0 in grid:
            return
        held = [self._backend.upload(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        self._kept += [arg for arg in held if isinstance(arg, DeviceBytes)]
        plain = [arg.address if isinstance(arg, DeviceBytes) else arg for arg in held]
        self._calls.append((kernel, grid, plain))

    def enqueue(self, stream: int = 0) -> None:
        """Enqueue it all. Neither allocates, nor waits, nor reads the host's memory: a CUDA graph
        may capture it, once it has run once, and each replay works on what then lies there."""
        self._driver.copy_async(self._now.address, self._initial.address, self._now.bytes, stream)
        for kernel, grid, args in self._calls:
            self._driver.launch(kernel, grid, args, stream)

    def results(self):
        """Return what the call returns. On another stream than the default one, wait for it first.

        Raises UsageError: a block id is out of range.
        """
        held = self._backend.download(self._now)
        bad, *state = (held[at:at + each.nbytes].view(each.dtype)
                       for at, each in zip(self._starts, self._state))
        if self._plan is not None:
            raise_bad_entry(self._plan, int(bad[0]))
        return self._report(*state)

    def run(self):
        self.enqueue()
        return self.results()


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

    def prepare(self, call: str, *args) -> Launches:
        """Lay what a call needs on the device, to be enqueued again and again, e.g.
        prepare("encode", codes, pages, out). Any of the calls below."""
        return getattr(self, f"_{call}")(*args)

    def pack(self, plan: CopyPlan, segment: DeviceBytes) -> None:
        """Gather all of a segment from its pages."""
        self._pack(plan, segment).run()

    def pack_e4m3(self, plan: CopyPlan, segment: DeviceBytes) -> None:
        """As `pack` of bf16 elements, each narrowed to fp8 (`kvwire.kernels.narrow`): half the
        bytes.

        Raises UsageError: runs of single bytes are no bf16.
        """
        self._pack_e4m3(plan, segment).run()

    def unpack(self, plan: CopyPlan, segment: DeviceBytes) -> None:
        """Scatter all of a segment to its pages."""
        self._unpack(plan, segment).run()

    def encode(self, plan: CodePlan, segment: DeviceBytes | CopyPlan, out: DeviceBytes
               ) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes that each chunk takes in its slot of `out`, and its raw CRC32C."""
        return self._encode(plan, segment, out).run()

    def decode(self, payloads: Sequence[Payload], coded: DeviceBytes,
               segment: DeviceBytes | CopyPlan, table_of=lambda index: None
               ) -> tuple[np.ndarray, np.ndarray]:
        """Return which chunks are CODED_INVALID, and the CRC32C of what was written of each.

        Raises:
            FormatError, RefusedError: as `ReadPlan.of_payloads`, before anything is written.
        """
        return self._decode(payloads, coded, segment, table_of).run()

    def crc32c(self, chunks: np.ndarray, segment: DeviceBytes | CopyPlan) -> np.ndarray:
        """Return the CRC32C of each chunk: int64 [chunks, 2], offset and bytes."""
        return self._crc32c(chunks, segment).run()

    # ---- the same, prepared

    def _pack(self, plan: CopyPlan, segment: DeviceBytes) -> Launches:
        return self._copy("pack", plan, segment, plan.word_bytes)

    def _pack_e4m3(self, plan: CopyPlan, segment: DeviceBytes) -> Launches:
        check_bf16(plan)
        return self._copy("narrow", plan, segment, 8 if plan.word_bytes >= 8 else 2)

    def _unpack(self, plan: CopyPlan, segment: DeviceBytes) -> Launches:
        return self._copy("unpack", plan, segment, plan.word_bytes)

    def _copy(self, verb: str, plan: CopyPlan, segment: DeviceBytes, word_bytes: int) -> Launches:
        rows, words, starts = tiles_of(plan, word_bytes)
        made, tiles = Launches(self, lambda: None, plan), int(starts[-1])
        made.add(f"kvwire_{verb}_{word_bytes}", (tiles, 1), [
            tiles, plan.legs, starts, len(plan.legs), plan.block_ids, segment, made.state(0),
            rows, words])
        return made

    def _encode(self, plan: CodePlan, segment, out: DeviceBytes) -> Launches:
        count = len(plan.chunks)
        made = Launches(self, lambda *found: found, _pages(segment), np.zeros(count, np.int64),
                        _beginnings(plan.chunks[:, 1].tolist()))
        made.add("kvwire_encode", (count, 1), [
            count, *made.front(segment), plan.chunks, plan.parts, plan.blob, self._crc_tables, out,
            self.empty(plan.out_bytes), made.state(1), made.state(2)])
        return made

    def _decode(self, payloads: Sequence[Payload], coded: DeviceBytes, segment,
                table_of=lambda index: None) -> Launches:
        plan = ReadPlan.of_payloads(payloads, table_of)
        stops = self.upload(np.array([p.raw_offset + p.raw_bytes for p in payloads], np.int64))
        made = Launches(self, lambda crcs, invalid: (invalid != 0, crcs), _pages(segment),
                        _beginnings([payload.raw_bytes for payload in payloads]),
                        np.zeros(len(payloads), np.int32))
        strips, blob = self.upload(plan.strips), self.upload(plan.blob)
        for (dtype, tier_bits), numbers in plan.strips_of.items():
            bits = sum(width << 4 * tier for tier, width in enumerate(tier_bits))
            blocks = max(-(-len(numbers) // STRIPS_EACH),
                         min(len(numbers), 4 * self._driver.multiprocessors))
            made.add(decoder_of(dtype), (blocks, 1), [
                len(numbers), *made.front(segment), coded, strips, numbers, dtype, bits, blob,
                self._crc_tables, stops, made.state(1), made.state(2)])
        return made

    def _crc32c(self, chunks: np.ndarray, segment) -> Launches:
        made = Launches(self, lambda crcs: crcs, _pages(segment),
                        _beginnings(chunks[:, 1].tolist()))
        blocks = max(1, -(-int(chunks[:, 1].max(initial=0)) // crc_math.CUDA_SPAN_BYTES))
        made.add("kvwire_crc", (len(chunks), blocks), [
            len(chunks), *made.front(segment), chunks, self._crc_tables, made.state(1)])
        return made


def _pages(segment: DeviceBytes | CopyPlan) -> CopyPlan | None:
    return segment if isinstance(segment, CopyPlan) else None


def _beginnings(sizes: list[int]) -> np.ndarray:
    return np.array([crc_math.beginning(size) for size in sizes], np.uint32)
