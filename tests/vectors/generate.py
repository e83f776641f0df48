"""Writes tests/vectors with the reference implementation; the same bytes each time.

    python tests/vectors/generate.py            add the vectors that are missing
    python tests/vectors/generate.py --example  print the worked examples of FORMAT.md

Vectors are only ever added: to change one, give it a new name.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from kvwire.codec import Codec
from kvwire.control import (
    Abort, ChunkRun, Done, End, Grant, Item, Pull, Receipt, Repair, RepairEntry, Segment,
    SegmentEnd,
)
from kvwire.errors import ErrorCode
from kvwire.files import FileWriter
from kvwire.layout import (
    Axis, CacheSpec, DType, attention, convolution, latent, recurrent, sliding_window,
)
from kvwire.manifest import Manifest
from kvwire.memory import CacheMemory
from kvwire.reference import ReferenceReceiver
from kvwire.reference_memory import ReferenceMemory, ReferenceTicket
from kvwire.reference_sender import ReferenceSender
from kvwire.tiered import element_format
from kvwire.wire import FrameReader, FrameType, Role, encode_frame

HERE = Path(__file__).parent
EXAMPLE_INTRODUCTION = """\
A latent cache of one layer, three tokens: for each the leaf `latent` of four fp16 elements and the
leaf `rope` of one, fused in one tensor `mla`; 30 bytes in one segment of one chunk. Left of the
bytes stands their offset in the stream, in hexadecimal."""
TICKET, TRANSFER, LINK = b"ticket of vector", b"transfer, vector", b"link of vectors."
CODECS_SPOKEN = 1 << Codec.RAW | 1 << Codec.LZ4  # by all vectors but those of later codecs


@dataclass
class Vector:
    """One stream or file. `tickets`: the receiver's, each as a manifest of what it expects."""

    name: str
    data: bytes
    reads: str
    contains: str
    link: str = ""
    lane: int = 0
    tickets: list[Manifest] = field(default_factory=list)
    error: str = ""

    @property
    def file(self) -> str:
        return f"invalid/{self.name}.{self.error}.bin" if self.error else f"valid/{self.name}.bin"

    def described(self) -> dict:
        words = {"file": self.file, "reads": self.reads, "contains": self.contains}
        if self.link:
            words |= {"link": self.link, "lane": self.lane}
        if self.tickets:
            words["tickets"] = [manifest.encode().hex() for manifest in self.tickets]
        if self.error:
            words["error"] = self.error
        return words


def filled(spec: CacheSpec, token_start: int, token_stop: int) -> ReferenceMemory:
    """Return memory with bytes that tell every place apart: 0 to 250 again and again."""
    memory = ReferenceMemory(spec, token_start, token_stop)
    for number, array in enumerate(memory.arrays.values()):
        array[:] = (np.arange(array.size) + 7 * number) % 251
    return memory


def number_like(count: int, dtype: DType) -> np.ndarray:
    """Return bytes of `count` elements whose exponents crowd, as those of caches do."""
    form, place = element_format(dtype), np.arange(count, dtype=np.uint64)
    mantissa_bits = form.verbatim_bits - 1
    exponent = (1 << form.exponent_bits - 1) - place % 3 % 2 - place % 11 // 10 - place % 97 // 96
    bits = (place >> 3 & 1) << form.exponent_bits | exponent.astype(np.uint64)
    bits = bits << mantissa_bits | place * 2654435761 % (1 << mantissa_bits)
    return bits.astype(f"<u{form.item_bytes}").view(np.uint8)


def filled_with_numbers(spec: CacheSpec, token_start: int, token_stop: int) -> ReferenceMemory:
    memory = ReferenceMemory(spec, token_start, token_stop)
    for key, array in memory.arrays.items():
        dtype = memory.leaves[key].dtype
        array[:] = number_like(array.size // dtype.item_bytes, dtype)
    return memory


def all_items(spec: CacheSpec, token_start: int, token_stop: int) -> list[Item]:
    return [Item(group, tensor, layer, *((token_start, token_stop) if each.has_tokens else (0, 0)))
            for group, held in enumerate(spec.groups) for layer in held.layers
            for tensor, each in enumerate(held.tensors)]


def run(sender: ReferenceSender, receiver: ReferenceReceiver, lane_count: int = 1,
        damage=lambda data: data) -> tuple[list[bytes], list[bytes]]:
    """Return what both sides wrote on each lane; `damage` changes what the sender writes."""
    sent, answered = [b""] * lane_count, [b""] * lane_count
    writes = sender.start()
    while writes:
        following = []
        for lane, data in writes:
            data = damage(data)
            sent[lane] += data
            for answer_lane, answer in receiver.feed(lane, data):
                answered[answer_lane] += answer
                following += sender.feed(answer_lane, answer)
        writes = following or (sender.close() if sender.done and not closed(sent) else [])
    return sent, answered


def closed(sent: list[bytes]) -> bool:
    return all(stream[-64:][2:3] == bytes((FrameType.CLOSE,)) for stream in sent)


def transfer(name: str, contains: str, spec: CacheSpec, tokens: tuple[int, int], *,
             lane_count: int = 1, into: CacheSpec | None = None, codec: Codec = Codec.RAW,
             damage=lambda data: data, seed: int | None = None, chunk_bytes: int = 4096,
             metadata: dict | None = None, items_per_segment: int = 1, fill=filled, rounding=None,
             names_tables: bool = True, window_bytes: int = 1 << 26) -> list[Vector]:
    """Return the streams of one whole transfer, all lanes, both directions."""
    source = fill(spec, *tokens)
    items = all_items(spec, *tokens)
    parts = [items[at:at + items_per_segment] for at in range(0, len(items), items_per_segment)]
    segments = [(part, source.gather(spec, part)) for part in parts]
    manifest = Manifest(TICKET, spec, *tokens, codecs=1 << codec | 1, metadata=metadata or {})
    expected = Manifest(TICKET, into or spec, *tokens)
    ticket = ReferenceTicket(ReferenceMemory(into or spec, *tokens))
    codecs = CODECS_SPOKEN | 1 << codec
    sender = ReferenceSender(manifest, segments, transfer_id=TRANSFER, link_id=LINK, codec=codec,
                             codecs=codecs, lane_count=lane_count, seed=seed,
                             chunk_bytes=chunk_bytes, rounding=rounding,
                             names_tables=names_tables,
                             metadata={"first_token": 42} if metadata else None)
    receiver = ReferenceReceiver({TICKET: ticket}, codecs=codecs, window_bytes=window_bytes)
    sent, answered = run(sender, receiver, lane_count, damage)
    if not ticket.complete:
        raise SystemExit(f"{name}: the transfer failed: {sender.error}")
    vectors = []
    for lane in range(lane_count):
        suffix = f".lane{lane}" if lane_count > 1 else ""
        vectors += [
            Vector(name + suffix, sent[lane], "receiver", contains, name, lane, [expected]),
            Vector(f"{name}{suffix}.answers", answered[lane], "sender",
                   f"the receiver's answers: {contains}", name, lane)]
    return vectors


def minimal_spec() -> CacheSpec:
    return CacheSpec("m", (latent([0], latent_dim=4, rope_dim=1, dtype="fp16"),))


def hybrid_spec(block_tokens: int = 16) -> CacheSpec:
    return CacheSpec("hybrid", (
        attention([3, 7], kv_heads=2, head_dim=8, block_tokens=block_tokens),
        sliding_window([5], 64, kv_heads=1, head_dim=4, dtype="e4m3"),
        latent([2], latent_dim=16, rope_dim=4),
        recurrent([0, 1], heads=2, key_dim=4, value_dim=8),
        convolution([0, 1], {"q": 8, "k": 8, "v": 16}, columns=3)))


def damage_once() -> Callable[[bytes], bytes]:
    """Return what flips a bit of the first CHUNK that passes by, and of no other."""
    left = [1]

    def damage(data: bytes) -> bytes:
        if data[:3] == bytes((*b"KW", FrameType.CHUNK)) and left:
            left.pop()
            return data[:-1] + bytes((data[-1] ^ 1,))
        return data

    return damage


def tensor_parallel() -> Vector:
    """Return one stream with the transfers of two source ranks, a head each, into one ticket."""
    whole = CacheSpec("tp", (attention([0], kv_heads=2, head_dim=4),))
    ticket = ReferenceTicket(ReferenceMemory(whole, 0, 5), source_rank_count=2)
    receiver = ReferenceReceiver({TICKET: ticket}, codecs=CODECS_SPOKEN)
    stream = b""
    for rank in range(2):
        spec = whole.shard(rank, 2)
        source, items = filled(spec, 0, 5), all_items(spec, 0, 5)
        sender = ReferenceSender(
            Manifest(TICKET, spec, 0, 5, rank, 2), [(items, source.gather(spec, items))],
            transfer_id=TRANSFER[:-1] + bytes((rank,)), link_id=LINK, codecs=CODECS_SPOKEN)
        part, _ = _run_on_open_lane(sender, receiver, greet=rank == 0)
        stream += part
    if not ticket.complete:
        raise SystemExit("tensor_parallel: the hand-off failed")
    return Vector("tensor_parallel", stream, "receiver", "two source ranks, one head each, on one "
                  "lane into one ticket", "tensor_parallel", 0,
                  [Manifest(TICKET, whole, 0, 5, 0, 2)])


def _run_on_open_lane(sender: ReferenceSender, receiver: ReferenceReceiver, greet: bool
                      ) -> tuple[bytes, bytes]:
    """As `run`, on a lane that both sides may have greeted on already."""
    sent, answered, writes = b"", b"", sender.start()
    if not greet:
        sender.feed(0, _GREETING_ANSWER)
        writes = writes[1:]
    while writes:
        following = []
        for lane, data in writes:
            sent += data
            for _, answer in receiver.feed(lane, data):
                answered += answer
                following += sender.feed(lane, answer)
        writes = following
    return sent, answered


_GREETING_ANSWER = ReferenceReceiver(codecs=CODECS_SPOKEN).feed(0, ReferenceSender(
    Manifest(TICKET, CacheSpec("", ()), 0, 0), [], transfer_id=TRANSFER,
    link_id=LINK, codecs=CODECS_SPOKEN).start()[0][1])[0][1]


def receiver_frames() -> Vector:
    """Return a receiver's stream with every frame type that it writes."""
    frames = [
        encode_frame(FrameType.PULL, TICKET, Pull(b"offer of vectors", 0, 100, 1, 2, 4).encode()),
        encode_frame(FrameType.GRANT, TRANSFER, Grant(1 << 20, 3, 1 << 18).encode()),
        encode_frame(FrameType.RECEIPT, TRANSFER, Receipt(
            (ChunkRun(0, 0, 3), ChunkRun(1, 0, 0, 0xDEADBEEF))).encode()),
        encode_frame(FrameType.REPAIR, TRANSFER, Repair(
            (RepairEntry(0, 3, 0, ErrorCode.RAW_CORRUPT, 1, 2),)).encode()),
        encode_frame(0x80, TRANSFER, b"a frame from the future"),
        encode_frame(FrameType.ABORT, TRANSFER, Abort(
            ErrorCode.CANCELLED, "the user left \u2013 no need", 1, 2, 3).encode()),
        encode_frame(FrameType.DONE, TRANSFER, Done(12345, 0xCAFEF00D).encode()),
        encode_frame(FrameType.CLOSE)]
    return Vector("receiver_frames", _GREETING_ANSWER + b"".join(frames), "sender",
                  "every frame type that a receiver writes, and one that may be skipped")


def pings() -> Vector:
    """Return a stream that asks for answers, answers, and does so in lengths to be skipped."""
    frames = [encode_frame(kind, payload=b"01234567"[:size]) for size in (8, 7, 0)
              for kind in (FrameType.PING, FrameType.PONG)]
    return Vector("pings", _GREETING_ANSWER + b"".join(frames), "sender",
                  "PING and PONG, and others of their types that are skipped")


def cache_memory(spec: CacheSpec, token_stop: int, numbers: bool = False) -> CacheMemory:
    """Return the memory of a contiguous spec with bytes that tell every place apart."""
    arrays = {}
    for number, (group, layer, tensor) in enumerate(
            (group, layer, tensor) for group in spec.groups for layer in group.layers
            for tensor in group.tensors):
        shape = [token_stop if axis.axis == Axis.TOKEN else axis.held for axis in tensor.axes]
        count = math.prod(shape) * tensor.dtype.item_bytes
        if numbers:
            data = number_like(math.prod(shape), tensor.dtype)
        else:
            data = ((np.arange(count) + 7 * number) % 251).astype(np.uint8)
        arrays[layer, tensor.name] = data.view(f"V{tensor.dtype.item_bytes}").reshape(shape)
    return CacheMemory(spec, arrays, tokens=token_stop)


def file_bytes(codec: Codec = Codec.RAW) -> bytes:
    stream = io.BytesIO()
    memory = cache_memory(hybrid_spec(0), 40, numbers=codec == Codec.TIERED)
    FileWriter(stream, LINK).write(memory, codec, {"first_token": 42}, TRANSFER, chunk_bytes=4096,
                                   calibrated=False)
    return stream.getvalue()


def cache_file() -> list[Vector]:
    return [Vector("cache_file", file_bytes(), "file", "a cache file of a hybrid spec"),
            Vector("cache_file_lz4", file_bytes(Codec.LZ4), "file", "its chunks coded by LZ4"),
            Vector("cache_file_tiered", file_bytes(Codec.TIERED), "file",
                   "its chunks coded by the tiered code, tables inside")]


def valid_vectors() -> list[Vector]:
    from vectors import lossy
    heads = CacheSpec("hnd", (attention([0], kv_heads=2, head_dim=4, block_tokens=4, order="HND",
                                        fused=True),))
    return [
        *transfer("minimal", "the worked example: two leaves, three tokens", minimal_spec(), (0, 3),
                  items_per_segment=2),
        *transfer("hybrid", "all kinds of groups, metadata, several segments", hybrid_spec(),
                  (100, 170), metadata={"blob": b"\0\xff", "cached": True, "length": -70,
                                        "scale": 0.5, "text": "gr\u00fc\u00df"}),
        *transfer("two_lanes", "chunks and ends shuffled over two lanes", hybrid_spec(), (0, 200),
                  lane_count=2, seed=1),
        *transfer("lz4", "chunks coded by LZ4 over byte planes", hybrid_spec(), (0, 200),
                  codec=Codec.LZ4, items_per_segment=3),
        *transfer("tiered", "chunks coded by the tiered code, tables inside", hybrid_spec(),
                  (0, 200), codec=Codec.TIERED, items_per_segment=3, fill=filled_with_numbers,
                  names_tables=False),
        *transfer("tiered_named", "tables of the link: named, wanted, sent, and referred to",
                  hybrid_spec(), (0, 200), codec=Codec.TIERED, items_per_segment=3,
                  fill=filled_with_numbers, window_bytes=8192),
        *transfer("lossy", "chunks of all rungs, and what is nested coded by tables inside",
                  lossy.SPEC, (0, 400), codec=Codec.QUANTISED, fill=filled_with_numbers,
                  rounding=lossy.parts),
        *transfer("lossy_repaired", "a lossy chunk with a flipped bit, and its second attempt",
                  lossy.SPEC, (0, 40), codec=Codec.QUANTISED, fill=filled_with_numbers,
                  rounding=lossy.parts, damage=damage_once()),
        *transfer("repaired", "a chunk with a flipped bit, and its second attempt",
                  hybrid_spec(), (0, 20), damage=damage_once()),
        *transfer("zero_tokens", "no token: states only", hybrid_spec(), (9, 9)),
        *transfer("hnd", "fused HND pages of 4 tokens into contiguous NHD", heads, (3, 14),
                  into=CacheSpec("hnd", (attention([0], kv_heads=2, head_dim=4),))),
        *transfer("columns", "convolution states of 3 columns into 4", CacheSpec("", (
            convolution([0], {"x": 4, "b": 2}, columns=3),)), (0, 1), into=CacheSpec("c", (
                convolution([0], {"x": 4, "b": 2}, columns=4),))),
        tensor_parallel(), receiver_frames(), pings(), *cache_file()]


def hex_lines(data: bytes, offset: int) -> list[str]:
    return [f"{offset + at:04x}  " + data[at:at + 32].hex(" ", -4)
            for at in range(0, len(data), 32)]


def annotated(data: bytes, reader: Role) -> list[str]:
    """Return a stream as hexadecimal lines, each structure under a title."""
    lines = ["greeting", *hex_lines(data[:64], 0)]
    offset = 64
    for header, payload in FrameReader(reader).feed(data):
        lines += [titled(f"{header.name} header", header, ("segment_index", "attempt",
                                                           "raw_offset", "raw_bytes"))
                  if header.type == FrameType.CHUNK else f"{header.name} header"]
        lines += hex_lines(data[offset:offset + 64], offset)
        if payload:
            lines += [f"{header.name} payload{described(header.type, payload)}",
                      *hex_lines(payload, offset + 64)]
        offset += 64 + len(payload)
    return lines


def titled(title: str, value: object, names: tuple[str, ...]) -> str:
    fields = ", ".join(f"{name} {getattr(value, name)}" for name in names)
    return f"{title}: {fields}"


def described(kind: int, payload: bytes) -> str:
    """Return the most telling fields of a payload."""
    structures = {
        FrameType.MANIFEST: (Manifest, ("token_start", "token_stop", "source_rank_count",
                                        "destination_rank_count", "codecs")),
        FrameType.GRANT: (Grant, ("window_bytes", "codecs", "chunk_bytes_max")),
        FrameType.SEGMENT: (Segment, ("raw_bytes", "chunk_bytes")),
        FrameType.SEGMENT_END: (SegmentEnd, ("chunk_count",)),
        FrameType.END: (End, ("segment_count", "raw_bytes")),
        FrameType.DONE: (Done, ("raw_bytes",))}
    if kind == FrameType.RECEIPT:
        return titled("", Receipt.decode(payload).runs[0], ("segment_index", "chunk_first",
                                                            "chunk_count"))
    if kind not in structures:
        return ""
    decoder, names = structures[kind]
    return titled("", decoder.decode(payload), names)


def example() -> str:
    sent, answered = transfer("minimal", "", minimal_spec(), (0, 3), items_per_segment=2)
    blocks = [("valid/minimal.bin", "sender", annotated(sent.data, Role.RECEIVER)),
              ("valid/minimal.answers.bin", "receiver", annotated(answered.data, Role.SENDER))]
    return "\n\n".join([EXAMPLE_INTRODUCTION, *(
        f"What the {who} writes (`{file}`):\n\n```\n" + "\n".join(lines) + "\n```"
        for file, who, lines in blocks)])


def all_vectors() -> list[Vector]:
    from vectors.invalid import invalid_vectors
    return valid_vectors() + invalid_vectors()


def main() -> None:
    if "--example" in sys.argv:
        from vectors import lossy, tiered
        print(example(), tiered.example(), lossy.example(), sep="\n\n")
        return
    vectors = all_vectors()
    for vector in vectors:
        path = HERE / vector.file
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            path.write_bytes(vector.data)
    words = {"comment": "Each file is one stream or cache file, read by the named role. Streams of "
             "one link belong together. A ticket is given as the payload of a MANIFEST that "
             "describes what it expects: its id, spec, tokens and ranks. A vector with an error "
             "must be refused with it (a chunk's error: by a REPAIR).",
             "vectors": [vector.described() for vector in vectors]}
    (HERE / "vectors.json").write_text(json.dumps(words, indent=1) + "\n")
    from vectors.admission import exchanges
    (HERE / "admission.json").write_text(json.dumps({
        "comment": "What each side of an admission is given, writes and ends with: a link key, or "
                   "its error. Bytes are hexadecimal; an ABORT's sentence is not pinned.",
        "exchanges": exchanges()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
