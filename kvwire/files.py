"""Cache files (FORMAT.md §7.11): a transfer's frames in a file that is whole or not there."""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from kvwire import _native, checksum, plan
from kvwire.checksum import crc32c, segment_digest, transfer_digest
from kvwire.codec import Codec, encode_chunk
from kvwire.control import Commit, End, Index, Item, Segment, SegmentEnd, SegmentIndex
from kvwire.direct_io import DirectWriter
from kvwire.errors import UsageError
from kvwire.file_reader import COMMIT_FRAME_BYTES, CacheFile, FileReader, TokenRange, check_held
from kvwire.layout import Axis, CacheSpec, DType, TensorSpec
from kvwire.manifest import Manifest
from kvwire.memory import CacheMemory
from kvwire.reference_memory import item_raw_bytes
from kvwire.wire import NO_ID, FrameHeader, FrameType, Greeting, Role, encode_frame

__all__ = ["CacheFile", "inspect", "load", "save"]

checksum.use(_native.crc32c)

_CHUNK_BYTES = 1 << 20
_TOKENS_ALL = (0, 1 << 32)
_NUMPY_DTYPES = {DType.FP32: "float32", DType.FP16: "float16", DType.BF16: "uint16",
                 DType.E4M3: "uint8", DType.E5M2: "uint8", DType.INT8: "int8",
                 DType.BYTES: "uint8", DType.INT32: "int32", DType.INT64: "int64"}


def save(path: str | os.PathLike, source: CacheMemory | CacheSpec, arrays: Mapping | None = None,
         *, tokens: int | TokenRange = 0, codec: str = "raw",
         metadata: Mapping[str, object] | None = None) -> None:
    """Write a request's cache to a file, which appears whole or not at all.

    Nothing is rounded: files are lossless with every codec.

    Args:
        source: the memory; or a spec, with `arrays` and `tokens` as `CacheMemory` takes them.
        codec: "raw", "lz4" or "tiered".
        metadata: int, float, bool, str or bytes values by name; 64 entries, 64 KiB.

    An older file at `path` is replaced when the new one is safe on disk; until then it stays.

    Raises:
        UsageError: the arrays do not fit the spec, or a limit of the format is exceeded.
        OSError: the file cannot be written.
    """
    if isinstance(source, CacheSpec):
        source = CacheMemory(source, arrays or {}, tokens=tokens)
    elif arrays is not None:
        raise UsageError("arrays are given together with a CacheMemory; give a spec instead")
    source.check_on_host("save()")
    chosen = Codec.of(codec)
    with _replaced(path) as file:
        FileWriter(file, secrets.token_bytes(16)).write(source, chosen, metadata or {},
                                                     secrets.token_bytes(16))


def load(path: str | os.PathLike, memory: CacheMemory | None = None, *,
         layers: Iterable[int] | None = None, tokens: int | TokenRange | None = None
         ) -> dict[tuple, np.ndarray] | None:
    """Read a cache file, or the chosen part of it, and verify every byte that is read.

    Args:
        memory: where to put it; None: into new arrays.
        layers: only these; all by default.
        tokens: only these absolute positions (start, stop), or up to a stop. States come whole.

    Returns: without a `memory`, contiguous arrays {(layer, tensor name): array} in the file's
        order of axes, (group index, layer, tensor name) where two groups share a name. BF16 comes
        as uint16, FP8 as uint8. A group's TOKEN axis covers what the file holds of `tokens`.

    Raises:
        FormatError: the file is no cache file, or damaged; nothing of `memory` is then good.
        SpecMismatchError, RefusedError: `memory` does not fit what the file holds.
    """
    with FileReader.open(path) as reader:
        wanted = _TOKENS_ALL if tokens is None else _token_range(tokens)
        chosen = None if layers is None else frozenset(layers)
        if chosen is not None and not chosen <= set(reader.contents.layers):
            raise UsageError(f"layers {sorted(chosen - set(reader.contents.layers))} are not in "
                             f"the file, which holds {list(reader.contents.layers)}")
        arrays = None
        if memory is None:
            memory, arrays = _new_memory(reader, chosen, wanted)
        memory.check_on_host("load()")
        reader.read_into(memory, chosen, wanted)
        return arrays


def inspect(path: str | os.PathLike) -> CacheFile:
    """Return what a cache file holds; its index is verified, its chunks are not read."""
    with FileReader.open(path) as reader:
        return reader.contents


def _token_range(tokens: int | TokenRange) -> TokenRange:
    start, stop = tokens if isinstance(tokens, tuple) else (0, tokens)
    if not 0 <= start <= stop:
        raise UsageError(f"tokens is {tokens!r}; it must be (start, stop), or the stop alone")
    return start, stop


@contextmanager
def _replaced(path: str | os.PathLike) -> Iterator[DirectWriter]:
    """Yield a file that takes the place of `path` at the end, durably, or not at all."""
    path = os.path.abspath(os.fspath(path))
    temporary = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with DirectWriter(temporary) as file:
            yield file
            file.sync()
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Output(Protocol):
    def write(self, data: bytes) -> object:
        """Append a copy of `data`."""


class FileWriter:
    """Writes the frames of one file and remembers where they lie."""

    def __init__(self, file: _Output, file_id: bytes):
        self._file, self._file_id, self._offset = file, file_id, 0
        self._book = None

    def write(self, memory: CacheMemory, codec: Codec, metadata: Mapping[str, object],
              transfer_id: bytes, chunk_bytes: int = _CHUNK_BYTES, calibrated: bool = True) -> None:
        """`calibrated`: TIERED chunks get the best tables, else plain ones, by the reference."""
        self._transfer_id, self._codec, self._chunk_bytes = transfer_id, codec, chunk_bytes
        self._raw = memoryview(bytearray(min(chunk_bytes, max(1, memory.bytes))))
        if codec == Codec.TIERED and calibrated:
            self._book = _native.CodeBook()
        codecs = 1 << Codec.RAW | 1 << codec
        self._put(Greeting(Role.FILE, self._file_id, codecs=codecs).encode())
        self._frame(FrameType.MANIFEST, Manifest(
            NO_ID, memory.spec, *memory.tokens, codecs=codecs, metadata=metadata).encode())
        layers = sorted({layer for group in memory.spec.groups for layer in group.layers})
        written = [self._segment(index, memory, items) for index, items in enumerate(
            items for items in map(memory.items, layers) if items)]
        raw_bytes = sum(raw for _, raw in written)
        digest = transfer_digest((index, segment.digest, raw)
                                 for index, (segment, raw) in enumerate(written))
        self._frame(FrameType.END, End(len(written), digest, raw_bytes).encode())
        index_offset = self._offset
        self._frame(FrameType.INDEX, Index(tuple(segment for segment, _ in written)).encode())
        self._frame(FrameType.COMMIT, Commit(
            index_offset, self._offset + COMMIT_FRAME_BYTES, len(written), digest,
            sum(len(segment.chunk_offsets) for segment, _ in written)).encode())

    def _segment(self, index: int, memory: CacheMemory, items: list[Item]
                 ) -> tuple[SegmentIndex, int]:
        tensors = [memory.spec.groups[item.group_index].tensors[item.tensor_index]
                   for item in items]
        announced = Segment(sum(map(item_raw_bytes, tensors, items)), self._chunk_bytes,
                            tuple(items))
        placement = plan.place(memory.spec, items, memory)
        coder = self._book and _native.SegmentCoder(
            self._book, memory.spec.model, plan.to_native(memory.spec), plan.native_items(items),
            placement, self._chunk_bytes)
        segment_offset, records, offsets = self._offset, [], []
        self._frame(FrameType.SEGMENT, announced.encode(), segment_index=index)
        for chunk in range(announced.chunk_count):
            at, count = chunk * self._chunk_bytes, announced.chunk_raw_bytes(chunk)
            codec, payload, raw_crc = self._coded(placement, coder, at, count, tensors[0].dtype)
            payload_crc = raw_crc if codec == Codec.RAW else crc32c(payload)
            offsets.append(self._offset)
            records.append((at, count, raw_crc))
            self._put(FrameHeader(
                FrameType.CHUNK, len(payload), self._transfer_id, index, 0, at, count, raw_crc,
                payload_crc, 0, codec).encode())
            self._put(payload)
        digest = segment_digest(records)
        self._frame(FrameType.SEGMENT_END, SegmentEnd(len(offsets), digest).encode(),
                    segment_index=index)
        return SegmentIndex(segment_offset, digest, tuple(offsets)), announced.raw_bytes

    def _coded(self, placement: object, coder: object, at: int, count: int, dtype: DType
               ) -> tuple[Codec, bytes, int]:
        """Return codec, payload and raw checksum of a chunk; good until the next one."""
        coded = coder.encode(at, count) if coder else None
        if coded:
            return Codec.TIERED, *coded
        raw = self._raw[:count]
        raw_crc = placement.gather_into(at, raw)
        if coder or self._codec == Codec.RAW:
            return Codec.RAW, raw, raw_crc
        return *encode_chunk(self._codec, bytes(raw), dtype), raw_crc

    def _frame(self, kind: FrameType, payload: bytes, **fields: int) -> None:
        self._put(encode_frame(kind, self._transfer_id, payload, **fields))

    def _put(self, data: bytes) -> None:
        self._file.write(data)
        self._offset += len(data)


def _new_memory(reader: FileReader, layers: frozenset[int] | None, wanted: TokenRange
                ) -> tuple[CacheMemory, dict[tuple, np.ndarray]]:
    """Return new contiguous arrays for the chosen part, and the memory that they make up."""
    spec = reader.contents.spec
    found: dict[int, TokenRange] = {}
    for _, _, item in reader.items(layers):
        if reader.tensor(item).has_tokens:
            start, stop = found.get(item.group_index, (item.token_start, item.token_stop))
            found[item.group_index] = min(start, item.token_start), max(stop, item.token_stop)
    kept = [index for index, group in enumerate(spec.groups)
            if layers is None or layers.intersection(group.layers)]
    ranges = {}
    for number, index in enumerate(kept):
        low, high = found.get(index, (0, 0))
        low = max(low, wanted[0])
        ranges[number] = low, max(low, min(high, wanted[1]))
    spec = (spec if layers is None else spec.select(layers)).with_block_tokens(0)
    number_of = {group: number for number, group in enumerate(spec.groups)}
    check_held(reader, layers, {
        (group.kind, layer, leaf.name): ranges[number_of[group]] if tensor.has_tokens else None
        for group, layer, tensor, leaf in spec.leaves()}, wanted)
    arrays = {(number, layer, tensor.name): _new_array(tensor, ranges[number])
              for number, group in enumerate(spec.groups)
              for layer in group.layers for tensor in group.tensors}
    memory = CacheMemory(spec, arrays, tokens=_hull(ranges.values()), group_tokens=ranges,
                         writable=True)
    places = Counter((layer, name) for _, layer, name in arrays)
    return memory, {(kept[number], layer, name) if places[layer, name] > 1 else (layer, name): array
                    for (number, layer, name), array in arrays.items()}


def _new_array(tensor: TensorSpec, tokens: TokenRange) -> np.ndarray:
    shape = [tokens[1] - tokens[0] if spec.axis == Axis.TOKEN else spec.held
             for spec in tensor.axes]
    dtype = np.dtype(_NUMPY_DTYPES[tensor.dtype])
    if 0 in shape:  # numpy would give it strides of 0, as a broadcast array has
        return np.ndarray(shape, dtype, bytearray(), strides=[dtype.itemsize] * len(shape))
    return np.empty(shape, dtype)


def _hull(ranges: Iterable[TokenRange]) -> TokenRange:
    ranges = list(ranges) or [(0, 0)]
    return min(start for start, _ in ranges), max(stop for _, stop in ranges)
