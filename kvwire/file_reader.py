"""Reads cache files (FORMAT.md §7.11): trusts what a checksum covers, reads what it must."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import BinaryIO, NamedTuple

from kvwire import _native, plan
from kvwire.checksum import crc32c, segment_digest, transfer_digest
from kvwire.codec import Codec, decode_chunk
from kvwire.control import Commit, End, Index, Item, Segment
from kvwire.direct_io import PIECE_BYTES, read_ahead
from kvwire.errors import ErrorCode, FormatError
from kvwire.layout import Axis, CacheSpec, TensorSpec
from kvwire.manifest import Manifest
from kvwire.memory import CacheMemory
from kvwire.reference_memory import check_item, item_raw_bytes
from kvwire.structure import fail
from kvwire.wire import GREETING, HEADER, FrameHeader, FrameType, Greeting, Role

__all__ = ["COMMIT_FRAME_BYTES", "CacheFile", "FileReader", "check_held"]

COMMIT_FRAME_BYTES = 96
_GAP_BYTES_MAX = 64 << 10  # that is rather read than skipped
TokenRange = tuple[int, int]


@dataclass(frozen=True)
class CacheFile:
    """What a cache file holds.

    Attributes:
        tokens: absolute positions [start, stop) of the request.
        layers: the layer numbers, request tensors' included, in rising order.
        raw_bytes: of the cache; file_bytes: of the file.
    """

    spec: CacheSpec
    metadata: Mapping[str, object]
    tokens: TokenRange
    layers: tuple[int, ...]
    raw_bytes: int
    file_bytes: int
    segment_count: int
    chunk_count: int


class _Range(NamedTuple):
    """Bytes of a segment in the file, and where they lie in what is read of it."""

    source: int
    target: int
    count: int


class FileReader:
    """An open cache file whose commit, manifest, end, index and announcements are verified."""

    def __init__(self, file: BinaryIO, *, direct: bool = False):
        self._file, self._direct = file, direct
        self._file_bytes = os.fstat(file.fileno()).st_size
        commit = self._commit()
        self._greeting = Greeting.decode(self._read(0, GREETING.bytes), Role.FILE)
        header, payload = self._frame(GREETING.bytes, FrameType.MANIFEST)
        self._transfer_id = header.transfer_id
        self._manifest = Manifest.decode(payload)
        _, payload = self._frame(commit.index_offset, FrameType.INDEX)
        self._index = Index.decode(payload, commit.segment_count).segments
        chunk_count = sum(len(segment.chunk_offsets) for segment in self._index)
        if chunk_count != commit.chunk_count or chunk_count * HEADER.bytes > self._file_bytes:
            _index_corrupt("chunk_count contradicts the COMMIT", commit.chunk_count, chunk_count)
        self._segments = [self._announced(number) for number in range(len(self._index))]
        end = self._end(GREETING.bytes + HEADER.bytes + header.payload_bytes)
        self._check_end(end, commit)
        spec = self._manifest.spec
        self.contents = CacheFile(
            spec, {**self._manifest.metadata, **end.metadata},
            (self._manifest.token_start, self._manifest.token_stop),
            tuple(sorted({layer for group in spec.groups for layer in group.layers})),
            end.raw_bytes, self._file_bytes, len(self._index), chunk_count)

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike, *, direct: bool = False) -> Iterator[FileReader]:
        """Open a file; `direct`: its chunks are read past the page cache."""
        with open(path, "rb") as file:
            yield cls(file, direct=direct)

    def _commit(self) -> Commit:
        try:
            offset = self._file_bytes - COMMIT_FRAME_BYTES
            _, payload = self._frame(offset, FrameType.COMMIT) if offset >= 0 else (0, b"")
            commit = Commit.decode(payload)
        except FormatError as error:
            fail(ErrorCode.FILE_NOT_COMMITTED, f"no COMMIT at the end of the file: {error.args[0]}")
        if commit.file_bytes != self._file_bytes:
            fail(ErrorCode.FILE_NOT_COMMITTED, "the file has another length than its COMMIT says",
                 expected=commit.file_bytes, actual=self._file_bytes)
        return commit

    def _read(self, offset: int, count: int) -> bytes:
        data = os.pread(self._file.fileno(), count, offset)
        if len(data) < count:
            fail(ErrorCode.TRUNCATED, "the file ends inside a frame", expected=count,
                 actual=len(data), offset=offset)
        return data

    def _frame(self, offset: int, kind: FrameType, segment_index: int = 0,
               data: memoryview | None = None) -> tuple[FrameHeader, bytes]:
        """Return a frame that must be of one kind; `data`: what was read of it already, or more."""
        if not 0 <= offset <= self._file_bytes - HEADER.bytes:
            _index_corrupt(f"{kind.name} lies outside the file", self._file_bytes, offset)
        if data is None or len(data) < HEADER.bytes:
            data = self._read(offset, HEADER.bytes)
        header = FrameHeader.decode(data)
        if header.type != kind or header.segment_index != segment_index:
            _index_corrupt(f"there is no {kind.name} of segment {segment_index} at {offset}",
                           kind, header.type)
        if kind not in (FrameType.MANIFEST, FrameType.COMMIT):
            if header.transfer_id != self._transfer_id:
                _index_corrupt(f"{kind.name} at {offset} is of another transfer", 0, 0)
        payload = data[HEADER.bytes:HEADER.bytes + header.payload_bytes]
        missing = header.payload_bytes - len(payload)
        if missing:
            payload = bytes(payload) + self._read(offset + HEADER.bytes + len(payload), missing)
        crc = crc32c(payload)
        if crc != header.payload_crc:
            code = (ErrorCode.PAYLOAD_CORRUPT if kind == FrameType.CHUNK
                    else ErrorCode.CONTROL_CORRUPT)
            fail(code, f"{kind.name} at {offset}: payload checksum differs",
                 expected=header.payload_crc, actual=crc, offset=offset)
        return header, payload

    def _announced(self, number: int) -> Segment:
        segment, manifest = self._index[number], self._manifest
        _, payload = self._frame(segment.segment_offset, FrameType.SEGMENT, number)
        announced = Segment.decode(payload)
        tensors = [check_item(manifest.spec, item, manifest.token_start, manifest.token_stop)
                   for item in announced.items]
        raw_bytes = sum(map(item_raw_bytes, tensors, announced.items))
        if raw_bytes != announced.raw_bytes:
            fail(ErrorCode.SEGMENT_INVALID, f"segment {number}: raw_bytes is not the items' sum",
                 expected=raw_bytes, actual=announced.raw_bytes)
        if announced.chunk_count != len(segment.chunk_offsets):
            _index_corrupt(f"segment {number} has another chunk_count", announced.chunk_count,
                           len(segment.chunk_offsets))
        return announced

    def _end(self, offset: int) -> End:
        """Return the END, which follows the last SEGMENT_END, or the manifest at `offset`."""
        if self._index:
            last, number = self._index[-1], len(self._index) - 1
            where, kind = last.segment_offset, FrameType.SEGMENT
            if last.chunk_offsets:
                where, kind = last.chunk_offsets[-1], FrameType.CHUNK
            header, _ = self._frame(where, kind, number)
            where += HEADER.bytes + header.payload_bytes
            header, _ = self._frame(where, FrameType.SEGMENT_END, number)
            offset = where + HEADER.bytes + header.payload_bytes
        return End.decode(self._frame(offset, FrameType.END)[1])

    def _check_end(self, end: End, commit: Commit) -> None:
        if end.segment_count != commit.segment_count:
            fail(ErrorCode.INCOMPLETE, "END and COMMIT have another segment_count",
                 expected=end.segment_count, actual=commit.segment_count)
        raw_bytes = sum(announced.raw_bytes for announced in self._segments)
        if raw_bytes != end.raw_bytes:
            fail(ErrorCode.INCOMPLETE, "END: raw_bytes is not the sum of the segments",
                 expected=raw_bytes, actual=end.raw_bytes)
        digest = transfer_digest((number, segment.digest, announced.raw_bytes) for
                                 number, (segment, announced) in
                                 enumerate(zip(self._index, self._segments)))
        for what, stated in (("END", end.digest), ("COMMIT", commit.digest)):
            if stated != digest:
                fail(ErrorCode.DIGEST_MISMATCH, f"{what}: the transfer's digest differs",
                     expected=stated, actual=digest)

    def items(self, layers: frozenset[int] | None) -> Iterator[tuple[int, int, Item]]:
        """Yield (segment, offset in the segment, item) of the chosen layers."""
        for number, announced in enumerate(self._segments):
            offset = 0
            for item in announced.items:
                if layers is None or item.layer in layers:
                    yield number, offset, item
                offset += item_raw_bytes(self.tensor(item), item)

    def tensor(self, item: Item) -> TensorSpec:
        return self._manifest.spec.groups[item.group_index].tensors[item.tensor_index]

    def read_into(self, memory: CacheMemory, layers: frozenset[int] | None, wanted: TokenRange
                  ) -> None:
        """Place what `memory` holds of the chosen layers and tokens."""
        check_held(self, layers, {key: _held_tokens(memory, key) for key in memory.leaves},
                    wanted)
        plans: dict[int, tuple[list[Item], list[_Range]]] = {}
        for number, offset, item in self.items(layers):
            part = _part(self, memory, item, wanted)
            if part is not None:
                items, ranges = plans.setdefault(number, ([], []))
                target = ranges[-1].target + ranges[-1].count if ranges else 0
                items.append(part)
                _append_ranges(ranges, self.tensor(item), item, part, offset, target)
        chunks = {number: self._chunks(number, ranges) for number, (_, ranges) in plans.items()}
        with closing(self._frames(chunks)) as frames:
            for number, (items, ranges) in plans.items():
                self._read_segment(number, items, ranges, zip(chunks[number], frames), memory)

    def _chunks(self, number: int, ranges: list[_Range]) -> list[int]:
        """Return the chunks of a segment that hold bytes of `ranges`."""
        size = self._segments[number].chunk_bytes
        return sorted({chunk for source, _, count in ranges if count
                       for chunk in range(source // size, (source + count - 1) // size + 1)})

    def _frames(self, chunks: Mapping[int, list[int]]) -> Iterator[memoryview]:
        """Yield the frame of each chunk, or what can be read of it at once, good until the next
        one; chunks near each other are read together, ahead of who takes them."""
        together: list[list[tuple[int, int]]] = []
        for offset, count in (self._extent(number, chunk) for number, numbers in chunks.items()
                              for chunk in numbers):
            if together and (offset + count - together[-1][0][0] <= PIECE_BYTES
                             and 0 <= offset - sum(together[-1][-1]) <= _GAP_BYTES_MAX):
                together[-1].append((offset, count))
            else:
                together.append([(offset, count)])
        extents = [(group[0][0], sum(group[-1]) - group[0][0]) for group in together]
        with closing(read_ahead(self._file.fileno(), extents, direct=self._direct)) as ahead:
            for group, data in zip(together, ahead):
                for offset, count in group:
                    at = offset - group[0][0]
                    yield data[at:at + count]

    def _extent(self, number: int, chunk: int) -> tuple[int, int]:
        """Return the offset of a chunk's frame, and its bytes, or more if it is coded."""
        offsets = self._index[number].chunk_offsets
        offset = min(offsets[chunk], self._file_bytes)
        count = HEADER.bytes + self._segments[number].chunk_raw_bytes(chunk)
        if chunk + 1 < len(offsets) and offsets[chunk + 1] > offset:
            count = min(count, offsets[chunk + 1] - offset)
        return offset, min(count, self._file_bytes - offset)

    def _read_segment(self, number: int, items: list[Item], ranges: list[_Range],
                      frames: Iterable[tuple[int, memoryview]], memory: CacheMemory) -> None:
        spec, announced, index = self._manifest.spec, self._segments[number], self._index[number]
        placement = plan.place(spec, items, memory)
        plan.zero_missing_columns(spec, items, memory)
        item_bytes = self.tensor(announced.items[0]).dtype.item_bytes
        records, first = [], 0
        for chunk, frame in frames:
            at = chunk * announced.chunk_bytes
            stop = at + announced.chunk_raw_bytes(chunk)
            raw, raw_crc = self._chunk(number, chunk, item_bytes, frame)
            records.append((at, stop - at, raw_crc))
            while ranges[first].source + ranges[first].count <= at:
                first += 1
            for source, target, count in islice(ranges, first, None):
                if source >= stop:
                    break
                low, high = max(source, at), min(source + count, stop)
                placement.scatter(target + low - source, raw[low - at:high - at])
        if len(records) == len(index.chunk_offsets) and segment_digest(records) != index.digest:
            fail(ErrorCode.DIGEST_MISMATCH, f"segment {number}: the digest differs",
                 expected=index.digest, actual=segment_digest(records))

    def _chunk(self, number: int, chunk: int, item_bytes: int, frame: memoryview
               ) -> tuple[bytes, int]:
        announced = self._segments[number]
        offset, raw_bytes = self._index[number].chunk_offsets[chunk], announced.chunk_raw_bytes(
            chunk)
        header, payload = self._frame(offset, FrameType.CHUNK, number, frame)
        place = header.raw_offset, header.raw_bytes
        if place != (chunk * announced.chunk_bytes, raw_bytes):
            _index_corrupt(f"chunk {chunk} of segment {number} is not at {offset}",
                           chunk * announced.chunk_bytes, header.raw_offset)
        header.check_agreed(self._greeting.codecs & self._manifest.codecs)
        if header.codec == Codec.TIERED:
            raw = _native.tiered_decode(bytes(payload), raw_bytes)
        else:
            raw = decode_chunk(header.codec, payload, raw_bytes, item_bytes)
        if header.codec != Codec.RAW and crc32c(raw) != header.raw_crc:
            fail(ErrorCode.RAW_CORRUPT, f"chunk at {offset}: raw bytes have another checksum",
                 expected=header.raw_crc, actual=crc32c(raw), offset=offset)
        return raw, header.raw_crc


def _index_corrupt(message: str, expected: int, actual: int) -> None:
    fail(ErrorCode.FILE_INDEX_CORRUPT, message, expected=expected, actual=actual)


def _held_tokens(memory: CacheMemory, key: tuple) -> TokenRange | None:
    """Return the tokens that a leaf of `memory` takes part with; None for a state."""
    tokens = memory.leaves[key].tokens
    return None if tokens is None else (tokens.start, tokens.origin + tokens.count)


def _leaf_keys(reader: FileReader, item: Item) -> list[tuple]:
    group = reader.contents.spec.groups[item.group_index]
    return [(group.kind, item.layer, leaf.name) for leaf in reader.tensor(item).leaves]


def _part(reader: FileReader, memory: CacheMemory, item: Item, wanted: TokenRange) -> Item | None:
    """Return the part of a file's item that is wanted and that `memory` holds."""
    held = [key for key in _leaf_keys(reader, item) if key in memory.leaves]
    if not held:
        return None
    tokens = _held_tokens(memory, held[0])
    if tokens is None or not reader.tensor(item).has_tokens:
        return item
    start = max(item.token_start, tokens[0], wanted[0])
    stop = min(item.token_stop, tokens[1], wanted[1])
    return replace(item, token_start=start, token_stop=stop) if start < stop else None


def check_held(reader: FileReader, layers: frozenset[int] | None,
                needs: Mapping[tuple, TokenRange | None], wanted: TokenRange) -> None:
    """Raise unless the file holds each leaf that `needs` names, with its tokens, if any."""
    found: dict[tuple, list[TokenRange]] = {}
    for _, _, item in reader.items(layers):
        for key in _leaf_keys(reader, item):
            found.setdefault(key, []).append((item.token_start, item.token_stop))
    for key, tokens in needs.items():
        if layers is not None and key[1] not in layers:
            continue
        low, high = (0, 0) if tokens is None else (max(tokens[0], wanted[0]),
                                                   min(tokens[1], wanted[1]))
        what = f"group {key[0].name.lower()}, layer {key[1]}, leaf {key[2]}"
        if key not in found and (tokens is None or low < high):
            fail(ErrorCode.SPEC_MISMATCH, f"{what}: not in the file")
        reached = low
        for start, stop in sorted(found.get(key, ())):
            reached = max(reached, stop) if start <= reached else reached
        if reached < high:
            fail(ErrorCode.TOKENS_MISMATCH, f"{what}: token {reached} is not in the file",
                 expected=high, actual=reached)


def _append_ranges(ranges: list[_Range], tensor: TensorSpec, item: Item, part: Item, offset: int,
                   target: int) -> None:
    """Append where the bytes of `part` lie in the segment, in wire order (§7.2).

    The bytes of `item`, of which it is a part, begin at `offset`.
    """
    row_bytes, outer, pieces, low, high = tensor.row_bytes, 1, [(0, 1)], 0, 1
    if tensor.has_tokens:
        kinds = [spec.axis for spec in tensor.axes]
        outer = math.prod(spec.held for spec in tensor.axes[:kinds.index(Axis.TOKEN)])
        low, high = part.token_start, part.token_stop
        cuts = [item.token_start, item.token_stop]
        if tensor.block_tokens and kinds[0] != Axis.TOKEN:
            first = item.token_start // tensor.block_tokens + 1
            cuts[1:1] = range(first * tensor.block_tokens, item.token_stop, tensor.block_tokens)
        pieces = list(zip(cuts, cuts[1:]))
    run = row_bytes // outer
    for start, stop in pieces:
        begin, end = max(start, low), min(stop, high)
        for index in range(outer if begin < end else 0):
            source = offset + (index * (stop - start) + begin - start) * run
            target = _append(ranges, source, target, (end - begin) * run)
        offset += (stop - start) * row_bytes


def _append(ranges: list[_Range], source: int, target: int, count: int) -> int:
    """Append bytes, joined with the last ones where they follow; return where they end."""
    last = ranges[-1] if ranges else _Range(0, 0, 0)
    if ranges and (last.source + last.count, last.target + last.count) == (source, target):
        ranges[-1] = _Range(last.source, last.target, last.count + count)
    else:
        ranges.append(_Range(source, target, count))
    return target + count
