"""No matter what bytes arrive, the format's parsers give back a value or raise a typed error."""

import dataclasses
import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import cache_specs
from vectors import generate
from vectors.read import HERE, stored_vectors

from kvwire import limits
from kvwire.checksum import crc32c_plain, segment_digest, transfer_digest
from kvwire.codec import Codec, decode_chunk, encode_chunk, join_planes, split_planes
from kvwire.control import (
    REPAIR_REASONS, Abort, ChunkRun, Commit, Done, End, Grant, Index, Item, Pull, Receipt, Repair,
    RepairEntry, Segment, SegmentEnd, SegmentIndex,
)
from kvwire.errors import ErrorCode, FormatError, KvwireError, UsageError
from kvwire.layout import DType
from kvwire.manifest import Manifest
from kvwire.wire import (
    HEADER, NO_ID, FrameHeader, FrameReader, FrameType, Greeting, Role, encode_frame,
)

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
IDS = st.binary(min_size=16, max_size=16).filter(any)
NAMES = st.text(max_size=40).filter(lambda text: "\0" not in text)
KEYS = NAMES.filter(lambda text: 0 < len(text.encode()) < 256)
METADATA = st.dictionaries(KEYS, st.one_of(
    st.integers(-1 << 63, (1 << 63) - 1), st.floats(), st.booleans(), st.text(max_size=20),
    st.binary(max_size=20)), max_size=5)
CODES = st.sampled_from(list(ErrorCode))
ITEMS = st.builds(Item, U16, U16, U32, U64, U64)
CHUNK_BYTES = st.integers(1, limits.CHUNK_BYTES_MAX // 4096).map(lambda count: count * 4096)

PAYLOADS = {
    Grant: st.builds(Grant, st.integers(4096, (1 << 64) - 1), U32.map(lambda bits: bits | 1),
                     st.integers(4096, limits.CHUNK_BYTES_MAX)),
    Segment: st.builds(Segment, st.integers(0, 1 << 40), CHUNK_BYTES,
                       st.lists(ITEMS, min_size=1, max_size=4).map(tuple)),
    SegmentEnd: st.builds(SegmentEnd, U32, U32),
    End: st.builds(End, st.integers(0, 65536), U32, U64, METADATA),
    Receipt: st.builds(Receipt, st.lists(st.one_of(
        st.builds(ChunkRun, U32, U32, st.integers(1, (1 << 32) - 1)),
        st.builds(ChunkRun, U32, st.just(0), st.just(0), U32)), min_size=1).map(tuple)),
    Repair: st.builds(Repair, st.lists(st.builds(
        RepairEntry, U32, U32, U32, st.sampled_from(REPAIR_REASONS), U32, U32),
        min_size=1).map(tuple)),
    Done: st.builds(Done, U64, U32),
    Abort: st.builds(Abort, CODES, st.text(max_size=100), U64, U64, U64),
    Pull: st.builds(Pull, IDS, st.integers(0, 100), st.integers(100, 1 << 32),
                    st.integers(0, 4095), st.integers(0, 99), st.integers(100, 4096)),
    Commit: st.builds(Commit, U64, U64, U32, U32, U32),
}
MANIFESTS = st.builds(
    Manifest, IDS, cache_specs(whole=False), st.integers(0, 1000), st.integers(1000, 1 << 32),
    st.integers(0, 4), st.integers(5, 4096), st.integers(0, 4), st.integers(5, 4096),
    U32.map(lambda bits: bits | 1), METADATA, st.binary(min_size=16, max_size=16))


def plain(value):
    """Return metadata in a form in which NaN equals NaN and True does not equal 1."""
    return {key: (type(each), struct.pack("<d", each) if isinstance(each, float) else each)
            for key, each in value.items()}


@pytest.mark.parametrize("kind", PAYLOADS, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_a_control_payload_comes_back(kind, data):
    value = data.draw(PAYLOADS[kind])
    encoded = value.encode()
    again = kind.decode(encoded)
    assert again.encode() == encoded
    if kind is End:
        assert plain(again.metadata) == plain(value.metadata)
        value, again = (dataclasses.replace(each, metadata={}) for each in (value, again))
    assert again == value


@given(MANIFESTS)
def test_a_manifest_comes_back(manifest):
    encoded = manifest.encode()
    again = Manifest.decode(encoded)
    assert again.encode() == encoded
    assert plain(again.metadata) == plain(manifest.metadata)
    assert dataclasses.replace(again, metadata={}) == dataclasses.replace(manifest, metadata={})


@given(st.lists(st.builds(SegmentIndex, U64, U32, st.lists(U64, max_size=4).map(tuple)),
                max_size=4))
def test_an_index_comes_back(segments):
    index = Index(tuple(segments))
    assert Index.decode(index.encode(), len(segments)) == index


@given(st.builds(Greeting, st.sampled_from((Role.SENDER, Role.RECEIVER)), IDS, st.integers(0, 5),
                 st.integers(6, 64), U32.map(lambda bits: bits | 1),
                 st.integers(65536, (1 << 32) - 1), st.integers(65536, (1 << 32) - 1),
                 st.integers(1, (1 << 32) - 1), st.integers(1, 65535)))
def test_a_greeting_comes_back(greeting):
    assert Greeting.decode(greeting.encode()) == greeting


CHUNK_HEADERS = st.builds(
    lambda header, raw_bytes: dataclasses.replace(
        header, raw_bytes=raw_bytes, payload_bytes=raw_bytes, payload_crc=header.raw_crc),
    st.builds(FrameHeader, st.just(FrameType.CHUNK), transfer_id=IDS,
              segment_index=st.integers(0, 65535), attempt=st.integers(0, 65535),
              raw_offset=st.integers(0, 1 << 28).map(lambda count: count * 4096), raw_crc=U32),
    st.integers(1, limits.CHUNK_BYTES_MAX))


@given(CHUNK_HEADERS)
def test_a_chunk_header_comes_back(header):
    assert FrameHeader.decode(header.encode()) == header


def test_unused_bits_are_ignored():
    frame = bytearray(encode_frame(FrameType.CLOSE)[:-4])
    frame[3] |= 0xF0
    frame[HEADER.fields["unused"][0]] = 0xFF
    frame += crc32c_plain(frame).to_bytes(4, "little")
    assert FrameHeader.decode(bytes(frame)) == FrameHeader(FrameType.CLOSE)


def test_a_frame_that_may_be_skipped_is_read():
    stream = Greeting(Role.SENDER, b"l" * 16).encode() + encode_frame(0xFF, NO_ID, b"what?")
    (frame,) = FrameReader(Role.RECEIVER).feed(stream)
    assert frame.header.skippable and frame.payload == b"what?"


def test_check_values_of_the_checksum():
    assert crc32c_plain(b"123456789") == 0xE3069283
    assert crc32c_plain(b"") == 0
    assert crc32c_plain(b"6789", crc32c_plain(b"12345")) == 0xE3069283
    assert segment_digest([]) == transfer_digest([]) == 0
    record = struct.pack("<QII", 4096, 7, 9)
    assert segment_digest([(4096, 7, 9)]) == crc32c_plain(record)


@given(st.binary(max_size=300), st.sampled_from([1, 2, 4, 8]))
def test_planes_come_back(raw, item_bytes):
    planes = split_planes(raw, item_bytes)
    assert join_planes(planes, item_bytes) == raw
    whole = len(raw) // item_bytes * item_bytes
    assert planes == b"".join(raw[i:whole:item_bytes] for i in range(item_bytes)) + raw[whole:]


@given(st.binary(min_size=1, max_size=40), st.integers(1, 50), st.sampled_from(list(DType)),
       st.sampled_from([Codec.LZ4, Codec.TIERED]))
def test_coded_chunks_come_back(seed, count, dtype, wanted):
    raw = seed * count
    codec, payload = encode_chunk(wanted, raw, dtype)
    assert (codec == wanted) == (len(payload) < len(raw))
    assert decode_chunk(codec, payload, len(raw), dtype.item_bytes) == raw


@given(st.binary(min_size=1, max_size=100), st.integers(2, 200))
def test_garbage_is_decoded_to_its_length_or_refused(payload, raw_bytes):
    try:
        assert len(decode_chunk(Codec.LZ4, payload, raw_bytes, 2)) == raw_bytes
    except FormatError as error:
        assert error.code == ErrorCode.CODED_INVALID


@pytest.mark.parametrize("codec, code", [(1, ErrorCode.CODEC_UNSUPPORTED),
                                         (200, ErrorCode.CODEC_UNSUPPORTED), (0, None)])
def test_only_agreed_codecs_pass(codec, code):
    header = FrameHeader(FrameType.CHUNK, codec=codec)
    if code is None:
        header.check_agreed(1)
    else:
        with pytest.raises(KvwireError) as caught:
            header.check_agreed(1)
        assert caught.value.code == code


@pytest.mark.parametrize("metadata", [
    {"": 1}, {"a": 1 << 63}, {"a": None}, {1: 2}, {"a": "x" * 65536}, {"x" * 256: 1},
    {str(number): number for number in range(65)}])
def test_metadata_outside_the_format_are_the_callers_fault(metadata):
    with pytest.raises(UsageError):
        End(0, 0, 0, metadata).encode()


@pytest.mark.parametrize("kind", [*PAYLOADS, Manifest], ids=lambda kind: kind.__name__)
@given(st.binary(max_size=200))
def test_any_payload_is_read_or_refused(kind, payload):
    try:
        kind.decode(payload)
    except KvwireError as error:
        assert 100 <= error.code < 300


@given(MANIFESTS, st.data())
def test_a_damaged_manifest_is_read_or_refused(manifest, data):
    payload = bytearray(manifest.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at:at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        again = Manifest.decode(bytes(payload))
    except KvwireError as error:
        assert 100 <= error.code < 300
    else:
        assert again.encode() == payload  # one value, one encoding


def read_all(stream, reader, cuts=()):
    """Return the frames of a stream that is fed in pieces, and the code of its error."""
    frames, machine = [], FrameReader(reader)
    try:
        for start, stop in zip([0, *cuts], [*cuts, len(stream)]):
            for frame in machine.events(stream[start:stop]):
                frames.append(frame)
        machine.finish()
    except KvwireError as error:
        return frames, error.code
    return frames, None


STREAMS = [vector for vector in stored_vectors() if vector.reads != "file"]
ROLES = {"sender": Role.SENDER, "receiver": Role.RECEIVER}


@pytest.mark.parametrize("vector", STREAMS, ids=str)
def test_byte_by_byte_is_the_same_as_whole(vector):
    stream, reader = vector.data[:3000], ROLES[vector.reads]
    assert read_all(stream, reader, range(1, len(stream))) == read_all(stream, reader)


@given(st.data())
def test_any_cut_is_the_same_as_whole(data):
    vector = data.draw(st.sampled_from(STREAMS))
    stream, reader = vector.data, ROLES[vector.reads]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    assert read_all(stream, reader, cuts) == read_all(stream, reader)


@given(st.binary(max_size=300), st.sampled_from(list(Role)), st.booleans())
def test_any_stream_is_read_or_refused(stream, reader, greeted):
    writer = {Role.SENDER: Role.RECEIVER, Role.RECEIVER: Role.SENDER, Role.FILE: Role.FILE}[reader]
    start = Greeting(writer, b"l" * 16).encode() if greeted else b""
    _, code = read_all(start + stream, reader)
    assert code is None or 100 <= code < 112


@given(st.data())
def test_a_changed_byte_never_passes_as_control(data):
    """A flip in the greeting, a header or a control payload is found before anything is parsed."""
    vector = data.draw(st.sampled_from([v for v in STREAMS if not v.error]))
    stream = vector.data[:4000]
    at, bit = data.draw(st.integers(0, len(stream) - 1)), data.draw(st.integers(0, 7))
    flipped = stream[:at] + bytes((stream[at] ^ 1 << bit,)) + stream[at + 1:]
    good, _ = read_all(stream, ROLES[vector.reads])
    bad, _ = read_all(flipped, ROLES[vector.reads])
    for before, after in zip(good, bad):
        assert before.header == after.header
        assert before.payload == after.payload or before.header.type == FrameType.CHUNK


DECODERS = {FrameType.MANIFEST: Manifest, FrameType.GRANT: Grant, FrameType.SEGMENT: Segment,
            FrameType.SEGMENT_END: SegmentEnd, FrameType.END: End, FrameType.RECEIPT: Receipt,
            FrameType.REPAIR: Repair, FrameType.ABORT: Abort, FrameType.PULL: Pull,
            FrameType.DONE: Done}


@pytest.mark.parametrize("vector", [v for v in STREAMS if not v.error], ids=str)
def test_a_valid_stream_encodes_to_itself(vector):
    machine, stream = FrameReader(ROLES[vector.reads]), b""
    for header, payload in machine.feed(vector.data):
        decoder = DECODERS.get(header.type)
        stream += header.encode() + (decoder.decode(payload).encode() if decoder else payload)
    machine.finish()
    assert machine.greeting.encode() + stream == vector.data


@pytest.mark.parametrize("vector", stored_vectors("sender", valid=False), ids=str)
def test_a_sender_refuses(vector):
    with pytest.raises(KvwireError) as caught:
        for header, payload in FrameReader(Role.SENDER).feed(vector.data):
            DECODERS[header.type].decode(payload)
    assert caught.value.code == vector.code


def test_the_vectors_are_what_the_generator_writes():
    """LZ4's bytes depend on the library's version: those vectors are only read."""
    vectors = generate.all_vectors()
    described = json.loads((HERE / "vectors.json").read_text())["vectors"]
    assert [vector.described() for vector in vectors] == described
    for vector in vectors:
        if "lz4" not in vector.name and not vector.name.startswith("coded_"):
            assert vector.data == (HERE / vector.file).read_bytes(), vector.file


def test_every_file_is_listed():
    listed = {vector.file for vector in stored_vectors()}
    assert listed == {str(path.relative_to(HERE)) for path in HERE.glob("*/*.bin")}
    for vector in stored_vectors(valid=False):
        assert vector.file.endswith(f".{vector.error}.bin")
