"""The invalid vectors: each breaks the minimal transfer, or a cache file, in one place."""

from __future__ import annotations

import struct
from dataclasses import replace

from vectors.generate import (
    CODECS_SPOKEN, LINK, TICKET, TRANSFER, Vector, file_bytes, minimal_spec, transfer,
)
from vectors.invalid_coded import lossy_chunks, lz4_chunks, tiered_chunks

from kvwire.checksum import crc32c
from kvwire.control import (
    ABORT, COMMIT, END, GRANT, ITEM, PULL, RECEIPT, REPAIR, SEGMENT, SEGMENT_END, Abort, ChunkRun,
    Grant, Item, Pull, Receipt, Repair, RepairEntry, Segment,
)
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec, latent
from kvwire.limits import WAITING_MANIFESTS_MAX
from kvwire.manifest import MANIFEST, Manifest
from kvwire.structure import Structure
from kvwire.wire import GREETING, HEADER, FrameReader, FrameType, Greeting, Role, encode_frame

_CRC = 4
_HEADER = 64


def patched(structure: Structure, data: bytes, field: str, value: int | bytes) -> bytes:
    """Return `data`, which begins with `structure`, with one field changed."""
    offset, count = structure.fields[field]
    new = value if isinstance(value, bytes) else value.to_bytes(count, "little")
    return data[:offset] + new + data[offset + count:]


def sealed(data: bytes) -> bytes:
    """Return a greeting or header whose last four bytes are the checksum of the others."""
    return data[:-_CRC] + struct.pack("<I", crc32c(data[:-_CRC]))


def greeting_with(field: str, value: int | bytes, greeting: bytes) -> bytes:
    return sealed(patched(GREETING, greeting, field, value))


def header_with(frame: bytes, **fields: int | bytes) -> bytes:
    """Return the frame with fields of its header changed and the header's checksum right."""
    header = frame[:_HEADER]
    for field, value in fields.items():
        header = patched(HEADER, header, field, value)
    return sealed(header) + frame[_HEADER:]


def payload_with(frame: bytes, payload: bytes) -> bytes:
    """Return the frame with another payload, its length and checksums right."""
    return header_with(frame[:_HEADER], payload_bytes=len(payload),
                       payload_crc=crc32c(payload)) + payload


def field_with(frame: bytes, structure: Structure, field: str, value: int | bytes) -> bytes:
    return payload_with(frame, patched(structure, frame[_HEADER:], field, value))


def flipped(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes((data[offset] ^ 1,)) + data[offset + 1:]


def frames_of(stream: bytes, reader: Role) -> dict[str, bytes]:
    """Return the structures of a stream by name."""
    parts, offset = {"GREETING": stream[:GREETING.bytes]}, GREETING.bytes
    for header, payload in FrameReader(reader).feed(stream):
        size = _HEADER + len(payload)
        parts[header.name] = stream[offset:offset + size]
        offset += size
    return parts


class Broken:
    """Collects vectors of one stream, some structures of which are replaced."""

    def __init__(self, stream: bytes, reads: str, tickets: list[Manifest]):
        self.parts = frames_of(stream, Role.RECEIVER if reads == "receiver" else Role.SENDER)
        self.vectors: list[Vector] = []
        self._reads, self._tickets = reads, tickets

    def __getitem__(self, name: str) -> bytes:
        return self.parts[name]

    def add(self, name: str, code: ErrorCode, contains: str, before: bytes = b"",
            tickets: list[Manifest] | None = None, **parts: bytes) -> None:
        """Add the stream with `parts` in place of its own; `before` comes after the greeting."""
        parts = self.parts | parts
        stream = parts.pop("GREETING") + before + b"".join(parts.values())
        self.raw(name, code, contains, stream, tickets)

    def raw(self, name: str, code: ErrorCode, contains: str, stream: bytes,
            tickets: list[Manifest] | None = None) -> None:
        self.vectors.append(Vector(
            name, stream, self._reads, contains,
            tickets=self._tickets if tickets is None else tickets, error=code.name))


def greetings(broken: Broken) -> None:
    code, good = ErrorCode, broken["GREETING"]
    broken.raw("greeting_magic", code.BAD_MAGIC, "first byte flipped", flipped(good, 0))
    broken.raw("greeting_http", code.BAD_MAGIC, "a stranger's first line",
               (b"GET / HTTP/1.1\r\nHost: kvwire\r\n" + b"x" * 64)[:64])
    broken.raw("greeting_zeros", code.BAD_MAGIC, "64 zero bytes", bytes(64))
    broken.raw("greeting_flipped", code.GREETING_CORRUPT, "a bit of link_id flipped",
               flipped(good, 20))
    broken.raw("greeting_short", code.TRUNCATED, "63 bytes", good[:63])
    for name, error, field, value in (
            ("version_zero", code.VERSION_UNSUPPORTED, "version", 0),
            ("version_min_zero", code.VERSION_UNSUPPORTED, "version_min", 0),
            ("version_newer", code.VERSION_UNSUPPORTED, "version_min", 2),
            ("role_unknown", code.FIELD_INVALID, "role", 4),
            ("role_file", code.FIELD_INVALID, "role", Role.FILE),
            ("role_conflict", code.ROLE_CONFLICT, "role", Role.RECEIVER),
            ("reserved_a", code.RESERVED_BIT_SET, "reserved_a", 1),
            ("reserved_flag", code.RESERVED_BIT_SET, "flags", 1),
            ("join_alone", code.FIELD_INVALID, "flags", 0x0200),
            ("link_id_zero", code.FIELD_INVALID, "link_id", bytes(16)),
            ("lane_index", code.FIELD_INVALID, "lane_index", 1),
            ("lane_count_zero", code.FIELD_INVALID, "lane_count", 0),
            ("lane_count_over", code.FIELD_INVALID, "lane_count", 65),
            ("codecs_without_raw", code.FIELD_INVALID, "codecs", 2),
            ("payload_bytes_max", code.FIELD_INVALID, "payload_bytes_max", 65535),
            ("control_bytes_max", code.FIELD_INVALID, "control_bytes_max", 65535),
            ("transfers_max", code.FIELD_INVALID, "transfers_max", 0),
            ("reserved_b", code.RESERVED_BIT_SET, "reserved_b", b"\0\0\0\0\0\0\0\1")):
        broken.raw(f"greeting_{name}", error, f"{field} is {value}",
                   greeting_with(field, value, good))


def headers(broken: Broken) -> None:
    code, manifest, chunk = ErrorCode, broken["MANIFEST"], broken["CHUNK"]
    broken.add("header_magic", code.BAD_MAGIC, "magic flipped", MANIFEST=flipped(manifest, 0))
    broken.add("header_flipped", code.HEADER_CORRUPT, "a bit of payload_bytes flipped",
               MANIFEST=flipped(manifest, 7))
    broken.add("zeroed_memory", code.BAD_MAGIC, "64 zero bytes in place of a frame",
               MANIFEST=bytes(64))
    for name, error, part, field, value in (
            ("type_zero", code.TYPE_UNKNOWN, "MANIFEST", "type", 0),
            ("type_unknown", code.TYPE_UNKNOWN, "MANIFEST", "type", 0x0F),
            ("reserved_flag", code.RESERVED_BIT_SET, "MANIFEST", "flags", 8),
            ("manifest_short", code.TRUNCATED, "MANIFEST", "payload_bytes", 63),
            ("manifest_over", code.LIMIT_EXCEEDED, "MANIFEST", "payload_bytes", 1048577),
            ("chunk_over", code.LIMIT_EXCEEDED, "CHUNK", "payload_bytes", 4194305),
            ("chunk_empty", code.TRUNCATED, "CHUNK", "payload_bytes", 0),
            ("segment_step", code.TRUNCATED, "SEGMENT", "payload_bytes", 41),
            ("segment_end_long", code.LIMIT_EXCEEDED, "SEGMENT_END", "payload_bytes", 9),
            ("transfer_id_zero", code.FIELD_INVALID, "MANIFEST", "transfer_id", bytes(16)),
            ("close_transfer_id", code.FIELD_INVALID, "CLOSE", "transfer_id", TRANSFER),
            ("segment_index_over", code.LIMIT_EXCEEDED, "SEGMENT", "segment_index", 65536),
            ("segment_index_set", code.FIELD_INVALID, "MANIFEST", "segment_index", 1),
            ("attempt_set", code.FIELD_INVALID, "SEGMENT", "attempt", 1),
            ("raw_offset_set", code.FIELD_INVALID, "SEGMENT", "raw_offset", 4096),
            ("raw_bytes_set", code.FIELD_INVALID, "SEGMENT", "raw_bytes", 1),
            ("raw_bytes_zero", code.FIELD_INVALID, "CHUNK", "raw_bytes", 0),
            ("raw_crc_set", code.FIELD_INVALID, "END", "raw_crc", 1),
            ("table_index_set", code.FIELD_INVALID, "END", "table_index", 1),
            ("table_unknown", code.TABLE_UNKNOWN, "CHUNK", "table_index", 1),
            ("codec_set", code.FIELD_INVALID, "END", "codec", 1),
            ("reserved", code.RESERVED_BIT_SET, "CHUNK", "reserved", 1)):
        broken.add(f"header_{name}", error, f"{part}: {field} is {value}",
                   **{part: header_with(broken[part], **{field: value})})
    broken.add("header_raw_lengths", code.FIELD_INVALID, "codec raw, payload_bytes differs",
               CHUNK=payload_with(chunk, chunk[_HEADER:-1]))
    broken.add("header_raw_crcs", code.FIELD_INVALID, "codec raw, payload_crc differs",
               CHUNK=header_with(chunk, payload_crc=1))
    broken.add("header_coded_not_smaller", code.FIELD_INVALID, "codec LZ4, as long as raw",
               CHUNK=header_with(chunk, codec=1))
    broken.add("frame_cut", code.TRUNCATED, "the stream ends inside a payload",
               CLOSE=broken["SEGMENT"][:-1])
    broken.add("header_cut", code.TRUNCATED, "the stream ends inside a header",
               CLOSE=broken["SEGMENT"][:63])
    broken.add("after_close", code.STATE_INVALID, "a frame after CLOSE",
               CLOSE=broken["CLOSE"] + broken["END"])
    broken.add("wrong_writer", code.STATE_INVALID, "a sender writes GRANT", before=encode_frame(
        FrameType.GRANT, TRANSFER, Grant(1 << 20, 1, 1 << 20).encode()))
    broken.add("index_in_stream", code.STATE_INVALID, "INDEX outside a file",
               before=encode_frame(FrameType.INDEX, TRANSFER))
    broken.add("control_corrupt", code.CONTROL_CORRUPT, "a bit of the manifest flipped",
               MANIFEST=flipped(manifest, 100))
    broken.add("close_payload_crc", code.CONTROL_CORRUPT, "payload_crc of no bytes is not 0",
               CLOSE=header_with(broken["CLOSE"], payload_crc=1))


def manifests(broken: Broken) -> None:
    code, manifest = ErrorCode, broken["MANIFEST"]
    for name, error, field, value in (
            ("token_stop_backwards", code.TOKENS_MISMATCH, "token_start", 4),
            ("token_stop_over", code.TOKENS_MISMATCH, "token_stop", (1 << 32) + 1),
            ("tokens_of_another", code.TOKENS_MISMATCH, "token_stop", 4),
            ("source_rank", code.RANK_UNEXPECTED, "source_rank", 1),
            ("source_rank_count_zero", code.RANK_UNEXPECTED, "source_rank_count", 0),
            ("source_rank_count_over", code.RANK_UNEXPECTED, "source_rank_count", 4097),
            ("source_rank_count", code.RANK_UNEXPECTED, "source_rank_count", 2),
            ("destination_rank", code.RANK_UNEXPECTED, "destination_rank", 1),
            ("destination_rank_count", code.RANK_UNEXPECTED, "destination_rank_count", 2),
            ("codecs_without_raw", code.FIELD_INVALID, "codecs", 2),
            ("group_count_over", code.LIMIT_EXCEEDED, "group_count", 65),
            ("group_count_long", code.TRUNCATED, "group_count", 2),
            ("group_count_short", code.FIELD_INVALID, "group_count", 0),
            ("metadata_count_over", code.LIMIT_EXCEEDED, "metadata_count", 65)):
        broken.add(f"manifest_{name}", error, f"{field} is {value}",
                   MANIFEST=field_with(manifest, MANIFEST, field, value))
    group = MANIFEST.bytes + 2  # after the model's name, of one letter
    tensor = group + 12 + 4
    body = tensor + 4  # after the tensor's name, mla
    axes = body + 8
    slices = axes + 2 + 2
    rope = slices + 7 + 12
    for name, error, offset, value in (
            ("model_not_utf8", code.FIELD_INVALID, group - 1, b"\xff"),
            ("model_nul", code.FIELD_INVALID, group - 1, b"\0"),
            ("group_kind", code.FIELD_INVALID, group, b"\x08"),
            ("group_reserved", code.RESERVED_BIT_SET, group + 1, b"\1"),
            ("tensor_count_over", code.LIMIT_EXCEEDED, group + 2, b"\x11"),
            ("layer_count_over", code.LIMIT_EXCEEDED, group + 4, b"\1\x10\0\0"),
            ("tensor_name_empty", code.FIELD_INVALID, tensor, b"\0"),
            ("dtype", code.FIELD_INVALID, body, b"\x0a"),
            ("tensor_flag", code.RESERVED_BIT_SET, body + 1, b"\2"),
            ("axis_count_over", code.LIMIT_EXCEEDED, body + 2, b"\6"),
            ("tensor_reserved", code.RESERVED_BIT_SET, body + 3, b"\1"),
            ("axis", code.FIELD_INVALID, axes, b"\x0b"),
            ("token_axis_sliced", code.FIELD_INVALID, axes + 2, b"\1"),
            ("axis_twice", code.FIELD_INVALID, axes, b"\3"),
            ("slice_count_over", code.LIMIT_EXCEEDED, axes + 3, b"\x11"),
            ("extent_over", code.LIMIT_EXCEEDED, slices + 7, b"\1\0\0\1"),
            ("slice_empty", code.FIELD_INVALID, slices + 11, b"\4\0\0\0"),
            ("slice_outside", code.FIELD_INVALID, slices + 15, b"\5\0\0\0"),
            ("leaf_unknown", code.SPEC_MISMATCH, rope + 1, b"r0pe")):
        payload = manifest[_HEADER:]
        payload = payload[:offset] + value + payload[offset + len(value):]
        broken.add(f"manifest_{name}", error, f"byte {offset} of the payload on: {value.hex()}",
                   MANIFEST=payload_with(manifest, payload))
    metadata(broken)


def metadata(broken: Broken) -> None:
    code, manifest = ErrorCode, broken["MANIFEST"]
    entry = {"a": b"\1a\3\1", "b": b"\1b\3\1"}
    for name, error, entries, count in (
            ("keys_fall", code.FIELD_INVALID, entry["b"] + entry["a"], 2),
            ("key_twice", code.FIELD_INVALID, entry["a"] * 2, 2),
            ("key_empty", code.FIELD_INVALID, b"\0\3\1", 1),
            ("type", code.FIELD_INVALID, b"\1a\6\1", 1),
            ("bool", code.FIELD_INVALID, b"\1a\3\2", 1),
            ("text", code.FIELD_INVALID, b"\1a\4\1\0\0\0\xff", 1),
            ("length", code.LIMIT_EXCEEDED, b"\1a\5\1\0\1\0", 1),
            ("bytes", code.LIMIT_EXCEEDED, b"\1a\5\0\0\1\0" + bytes(65536), 1),
            ("cut", code.TRUNCATED, b"\1a\1\0\0\0", 1),
            ("rest", code.FIELD_INVALID, entry["a"] + b"\0", 1)):
        payload = patched(MANIFEST, manifest[_HEADER:], "metadata_count", count) + entries
        broken.add(f"metadata_{name}", error, f"the manifest ends in {entries[:16].hex()}",
                   MANIFEST=payload_with(manifest, payload))
    broken.add("end_metadata_count", code.LIMIT_EXCEEDED, "END: metadata_count is 65",
               END=field_with(broken["END"], END, "metadata_count", 65))
    broken.add("end_metadata_cut", code.TRUNCATED, "END: metadata_count is 1, but none follows",
               END=field_with(broken["END"], END, "metadata_count", 1))
    broken.add("end_rest", code.FIELD_INVALID, "a byte follows END's structure",
               END=payload_with(broken["END"], broken["END"][_HEADER:] + b"\0"))
    broken.add("end_reserved", code.RESERVED_BIT_SET, "END: reserved is not 0",
               END=field_with(broken["END"], END, "reserved", b"\0\0\0\0\0\1"))


def agreement(broken: Broken, expected: Manifest) -> None:
    code, manifest = ErrorCode, broken["MANIFEST"]
    again = header_with(manifest, transfer_id=TRANSFER[::-1])
    spec = CacheSpec("another", minimal_spec().groups)
    wider = CacheSpec("m", (replace(minimal_spec().groups[0], layers=(0, 1)),))
    broken.raw("ticket_unknown", code.TICKET_UNKNOWN, "no such ticket, and none comes",
               broken["GREETING"] + manifest, [])
    broken.add("ticket_complete", code.TICKET_EXPIRED, "a second transfer to a complete ticket",
               CLOSE=again)
    broken.add("rank_twice", code.RANK_UNEXPECTED, "a second transfer of the same rank",
               MANIFEST=manifest + again)
    broken.add("model", code.SPEC_MISMATCH, "the ticket is for another model",
               tickets=[replace(expected, spec=spec)])
    for name, change in (("dtype", {"dtype": "bf16"}), ("extent", {"latent_dim": 8})):
        options = {"latent_dim": 4, "rope_dim": 1, "dtype": "fp16"} | change
        other = CacheSpec("m", (latent([0], **options),))
        broken.add(f"leaf_{name}", code.SPEC_MISMATCH, f"the ticket's leaves have another {name}",
                   tickets=[replace(expected, spec=other)])
    broken.add("transfer_duplicate", code.TRANSFER_DUPLICATE, "the id again, another manifest",
               MANIFEST=manifest + field_with(manifest, MANIFEST, "codecs", 3))
    broken.add("incomplete_ticket", code.INCOMPLETE, "a layer of the ticket never comes",
               tickets=[replace(expected, spec=wider)])
    broken.raw("waiting_manifests", code.RESOURCES_EXHAUSTED, "one more than may wait",
               broken["GREETING"] + b"".join(
                   header_with(manifest, transfer_id=bytes((number + 1,)) * 16)
                   for number in range(WAITING_MANIFESTS_MAX + 1)), [])


def segments(broken: Broken) -> None:
    code, segment, chunk = ErrorCode, broken["SEGMENT"], broken["CHUNK"]
    for name, field, value in (
            ("raw_bytes", "raw_bytes", 29), ("raw_bytes_over", "raw_bytes", (1 << 40) + 1),
            ("chunk_bytes_zero", "chunk_bytes", 0), ("chunk_bytes_grid", "chunk_bytes", 4097),
            ("chunk_bytes_over", "chunk_bytes", 8 << 20), ("item_count", "item_count", 2),
            ("item_count_zero", "item_count", 0)):
        broken.add(f"segment_{name}", code.SEGMENT_INVALID, f"{field} is {value}",
                   SEGMENT=field_with(segment, SEGMENT, field, value))
    for field, value in (("group_index", 1), ("tensor_index", 1), ("layer", 1),
                         ("token_start", 4), ("token_stop", 4)):
        fixed = segment[_HEADER:_HEADER + SEGMENT.bytes]
        item = patched(ITEM, segment[_HEADER + SEGMENT.bytes:], field, value)
        broken.add(f"item_{field}", code.SEGMENT_INVALID, f"{field} is {value}",
                   SEGMENT=payload_with(segment, fixed + item))
    twice = Segment.decode(segment[_HEADER:])
    differs = payload_with(segment, replace(twice, chunk_bytes=8192).encode())
    broken.add("segment_differs", code.SEGMENT_INVALID, "announced again, differently",
               SEGMENT=segment + differs)
    broken.add("segment_overlap", code.OVERLAP, "two segments with the same item",
               SEGMENT=segment + header_with(segment, segment_index=1))
    items = Segment(2 * twice.raw_bytes, 4096, twice.items * 2)
    broken.add("item_overlap", code.OVERLAP, "one segment with the same item twice",
               SEGMENT=payload_with(segment, items.encode()))
    broken.add("before_grant", code.STATE_INVALID, "SEGMENT while the manifest waits for a ticket",
               tickets=[])
    broken.add("no_manifest", code.TRANSFER_UNKNOWN, "a transfer that was never opened",
               MANIFEST=b"")
    broken.add("not_announced", code.SEGMENT_INVALID, "CHUNK of a segment that was not announced",
               CHUNK=header_with(chunk, segment_index=1))
    broken.add("chunk_offset", code.FIELD_INVALID, "no chunk lies at raw_offset",
               CHUNK=header_with(chunk, raw_offset=4096))
    broken.add("chunk_grid", code.FIELD_INVALID, "raw_offset is no multiple of chunk_bytes",
               CHUNK=header_with(chunk, raw_offset=1))
    broken.add("chunk_length", code.FIELD_INVALID, "raw_bytes is not the chunk's",
               CHUNK=header_with(payload_with(chunk, chunk[_HEADER:-1]),
                                 raw_bytes=len(chunk) - _HEADER - 1,
                                 raw_crc=crc32c(chunk[_HEADER:-1])))


def chunks(broken: Broken) -> None:
    code, chunk = ErrorCode, broken["CHUNK"]
    raw = chunk[_HEADER:]
    bad = flipped(chunk, _HEADER)
    broken.add("codec_not_agreed", code.CODEC_UNSUPPORTED, "codec LZ4, the manifest has raw only",
               CHUNK=header_with(chunk[:-1], codec=1, payload_bytes=len(raw) - 1))
    broken.add("codec_unknown", code.CODEC_UNSUPPORTED, "codec 200",
               CHUNK=header_with(chunk[:-1], codec=200, payload_bytes=len(raw) - 1))
    broken.add("chunk_flipped", code.PAYLOAD_CORRUPT, "a bit of a raw payload flipped", CHUNK=bad)
    broken.add("retries", code.RETRIES_EXHAUSTED, "eight attempts, each flipped", CHUNK=b"".join(
        header_with(bad, attempt=attempt) for attempt in range(8)))
    broken.add("segment_digest", code.DIGEST_MISMATCH, "SEGMENT_END: digest differs",
               SEGMENT_END=field_with(broken["SEGMENT_END"], SEGMENT_END, "digest", 1))
    broken.add("segment_chunk_count", code.SEGMENT_INVALID, "SEGMENT_END: chunk_count differs",
               SEGMENT_END=field_with(broken["SEGMENT_END"], SEGMENT_END, "chunk_count", 2))
    end = broken["END"]
    for name, error, field, value in (
            ("digest", code.DIGEST_MISMATCH, "digest", 1),
            ("segment_count", code.INCOMPLETE, "segment_count", 0),
            ("segment_count_over", code.INCOMPLETE, "segment_count", 65537),
            ("raw_bytes", code.INCOMPLETE, "raw_bytes", 1)):
        broken.add(f"end_{name}", error, f"END: {field} is {value}",
                   END=field_with(end, END, field, value))
    abort = encode_frame(FrameType.ABORT, TRANSFER, Abort(code.CANCELLED, "no need").encode())
    broken.add("abort_length", code.FIELD_INVALID, "ABORT: message_bytes differs",
               END=field_with(abort, ABORT, "message_bytes", 6))
    broken.add("abort_reserved", code.RESERVED_BIT_SET, "ABORT: reserved is not 0",
               END=field_with(abort, ABORT, "reserved", 1))
    broken.add("abort_text", code.FIELD_INVALID, "ABORT: the message is not UTF-8",
               END=payload_with(abort, abort[_HEADER:-1] + b"\xff"))
    lz4_chunks(broken)
    tiered_chunks(broken)
    lossy_chunks(broken)


def answers(broken: Broken) -> None:
    """Streams of a receiver."""
    code = ErrorCode
    grant = encode_frame(FrameType.GRANT, TRANSFER, Grant(1 << 20, 1, 1 << 20).encode())
    pull = encode_frame(FrameType.PULL, TICKET, Pull(b"offer of vectors", 0, 100).encode())
    receipt = encode_frame(FrameType.RECEIPT, TRANSFER, Receipt((ChunkRun(0, 0, 1),)).encode())
    repair = encode_frame(FrameType.REPAIR, TRANSFER, Repair(
        (RepairEntry(0, 0, 0, code.RAW_CORRUPT, 1, 2),)).encode())
    done = broken["DONE"]
    for name, error, frame, structure, field, value in (
            ("grant_window", code.FIELD_INVALID, grant, GRANT, "window_bytes", 4095),
            ("grant_codecs", code.FIELD_INVALID, grant, GRANT, "codecs", 2),
            ("grant_chunk_bytes", code.FIELD_INVALID, grant, GRANT, "chunk_bytes_max", 4095),
            ("receipt_first", code.FIELD_INVALID, receipt, RECEIPT, "chunk_count", 0),
            ("receipt_digest", code.FIELD_INVALID, receipt, RECEIPT, "digest", 1),
            ("repair_reason", code.FIELD_INVALID, repair, REPAIR, "reason", 215),
            ("repair_reserved", code.RESERVED_BIT_SET, repair, REPAIR, "reserved", 1),
            ("pull_tokens", code.TOKENS_MISMATCH, pull, PULL, "token_start", 101),
            ("pull_rank", code.RANK_UNEXPECTED, pull, PULL, "destination_rank", 1),
            ("pull_rank_count", code.RANK_UNEXPECTED, pull, PULL, "destination_rank_count", 4097),
            ("pull_reserved", code.RESERVED_BIT_SET, pull, PULL, "reserved", bytes(9) + b"\1")):
        if name == "receipt_first":
            frame = payload_with(receipt, Receipt((ChunkRun(0, 1, 1),)).encode())
        broken.raw(name, error, f"{structure.name}: {field} is "
                   f"{value.hex() if isinstance(value, bytes) else value}",
                   broken["GREETING"] + field_with(frame, structure, field, value))
    broken.raw("done_reserved", code.RESERVED_BIT_SET, "DONE: reserved is not 0",
               broken["GREETING"] + payload_with(done, done[_HEADER:-1] + b"\1"))
    broken.raw("receipt_step", code.TRUNCATED, "RECEIPT of 17 bytes",
               broken["GREETING"] + payload_with(receipt, receipt[_HEADER:] + b"\0"))
    broken.raw("receipt_empty", code.TRUNCATED, "RECEIPT without entries",
               broken["GREETING"] + payload_with(receipt, b""))
    broken.raw("sender_role_conflict", code.ROLE_CONFLICT, "a sender's greeting, read by a sender",
               Greeting(Role.SENDER, LINK, codecs=CODECS_SPOKEN).encode())
    broken.raw("receiver_writes_chunk", code.STATE_INVALID, "a receiver writes SEGMENT_END",
               broken["GREETING"] + encode_frame(FrameType.SEGMENT_END, TRANSFER, bytes(8)))


def files() -> list[Vector]:
    code, good = ErrorCode, file_bytes()
    commit, body = good[-96:], good[:-96]
    index_at = int.from_bytes(commit[64:72], "little")
    end_at = index_at - _HEADER - 24
    first_chunk = good.index(b"KW\x04")
    found = []

    def add(name: str, error: ErrorCode, contains: str, data: bytes) -> None:
        found.append(Vector(f"file_{name}", data, "file", contains, error=error.name))

    def with_frame(at: int, frame: bytes) -> bytes:
        return good[:at] + frame + good[at + len(frame):]

    add("empty", code.FILE_NOT_COMMITTED, "no byte", b"")
    add("no_commit", code.FILE_NOT_COMMITTED, "all but the COMMIT", body)
    add("cut", code.FILE_NOT_COMMITTED, "all but the last byte", good[:-1])
    add("longer", code.FILE_NOT_COMMITTED, "a byte too many in front of the COMMIT",
        body + b"\0" + commit)
    add("commit_flipped", code.FILE_NOT_COMMITTED, "a bit of the COMMIT flipped",
        flipped(good, len(good) - 1))
    add("commit_reserved", code.FILE_NOT_COMMITTED, "COMMIT: reserved is not 0",
        body + field_with(commit, COMMIT, "reserved", 1))
    for name, error, field, value in (
            ("index_offset", code.FILE_INDEX_CORRUPT, "index_offset", 1 << 40),
            ("index_elsewhere", code.FILE_INDEX_CORRUPT, "index_offset", end_at),
            ("file_bytes", code.FILE_NOT_COMMITTED, "file_bytes", 96),
            ("segment_count", code.FILE_INDEX_CORRUPT, "segment_count", 1),
            ("chunk_count", code.FILE_INDEX_CORRUPT, "chunk_count", 1),
            ("digest", code.DIGEST_MISMATCH, "digest", 1)):
        add(name, error, f"COMMIT: {field} is {value}",
            body + field_with(commit, COMMIT, field, value))
    add("role", code.FIELD_INVALID, "a sender's greeting",
        Greeting(Role.SENDER, LINK, codecs=CODECS_SPOKEN).encode() + good[64:])
    add("greeting", code.GREETING_CORRUPT, "a bit of the greeting flipped", flipped(good, 20))
    add("header", code.HEADER_CORRUPT, "a bit of a CHUNK's header flipped",
        flipped(good, first_chunk + 8))
    add("chunk", code.PAYLOAD_CORRUPT, "a bit of a CHUNK's payload flipped",
        flipped(good, first_chunk + _HEADER))
    add("index", code.CONTROL_CORRUPT, "a bit of the INDEX flipped",
        flipped(good, index_at + _HEADER))
    end = good[end_at:end_at + _HEADER + 24]
    add("end_raw_bytes", code.INCOMPLETE, "END: raw_bytes differs",
        with_frame(end_at, field_with(end, END, "raw_bytes", 1)))
    add("end_digest", code.DIGEST_MISMATCH, "END: digest differs",
        with_frame(end_at, field_with(end, END, "digest", 1)))
    index = good[index_at:-96]
    payload = index[_HEADER:]
    offset = 16 * int.from_bytes(commit[80:84], "little")
    add("chunk_elsewhere", code.FILE_INDEX_CORRUPT, "INDEX: two chunks' offsets swapped",
        good[:index_at] + payload_with(index, payload[:offset] + payload[offset + 8:offset + 16]
                                       + payload[offset:offset + 8] + payload[offset + 16:])
        + commit)
    return found


def invalid_vectors() -> list[Vector]:
    sent, answered = transfer("minimal", "", minimal_spec(), (0, 3), items_per_segment=2)
    broken = Broken(sent.data, "receiver", sent.tickets)
    greetings(broken)
    headers(broken)
    manifests(broken)
    agreement(broken, sent.tickets[0])
    segments(broken)
    chunks(broken)
    receiver = Broken(answered.data, "sender", [])
    answers(receiver)
    return broken.vectors + receiver.vectors + files()
