"""The C++ decoders find in any stream the error that the reference finds, or none."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire import DECODERS, MANIFESTS, ROLES, STREAMS

from kvwire import _native, limits
from kvwire.errors import ErrorCode, KvwireError
from kvwire.link_tables import decode_answers, decode_names, decode_table, holds_structure
from kvwire.manifest import Manifest
from kvwire.wire import FrameReader, FrameType, Greeting, Role, encode_frame


ABOUT_TABLES = {(Role.RECEIVER, FrameType.TABLE_NAMES): decode_names,
                (Role.SENDER, FrameType.TABLE_ANSWER): decode_answers,
                (Role.RECEIVER, FrameType.TABLE): decode_table}


def reference_code(stream, reader):
    machine = FrameReader(reader)
    try:
        for header, payload in machine.events(stream):
            if payload is not None and (decoder := DECODERS.get(header.type)):
                decoder.decode(payload)
            decode = ABOUT_TABLES.get((reader, header.type))
            if decode and payload is not None and holds_structure(header.type, payload):
                decode(payload)
        machine.finish()
    except KvwireError as error:
        return int(error.code)
    return 0


def same_code(stream, reader):
    native, reference = _native.check_stream(int(reader), bytes(stream)), reference_code(
        stream, reader)
    assert ErrorCode(native or 900) == ErrorCode(reference or 900)
    return native


@pytest.mark.parametrize("attempt", [0, limits.ATTEMPT_MAX, limits.ATTEMPT_MAX + 1, (1 << 32) - 1])
def test_attempts_have_an_end(attempt):
    greeting = Greeting(Role.SENDER, bytes(range(16))).encode()
    chunk = encode_frame(FrameType.CHUNK, bytes(range(16)), b"abcd", attempt=attempt, raw_bytes=4)
    refused = same_code(greeting + chunk, Role.RECEIVER) == ErrorCode.LIMIT_EXCEEDED
    assert refused == (attempt > limits.ATTEMPT_MAX)


@pytest.mark.parametrize("vector", STREAMS, ids=str)
def test_every_vector(vector):
    code = same_code(vector.data, ROLES[vector.reads])
    if vector.error and vector.reads == "sender":
        assert code == vector.code


@settings(max_examples=300)
@given(st.data())
def test_mutated_streams(data):
    vector = data.draw(st.sampled_from(STREAMS))
    stream = bytearray(vector.data[:6000])
    stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    same_code(bytes(stream), ROLES[vector.reads])


@settings(max_examples=400)
@given(st.data())
def test_mutated_payloads_with_right_checksums(data):
    """Changes inside a control payload that pass the checksum reach the structure's own checks.

    One at a time: which of two errors is found first is nobody's promise. MANIFEST has a test of
    its own.
    """
    frames = []
    for vector in STREAMS:
        if not vector.error:
            frames += [(vector.reads, header.type, payload, header.transfer_id,
                        header.segment_index)
                       for header, payload in FrameReader(ROLES[vector.reads]).feed(vector.data)
                       if header.type in DECODERS and header.type != FrameType.MANIFEST]
    reads, kind, payload, transfer_id, segment_index = data.draw(st.sampled_from(frames))
    payload = bytearray(payload)
    if payload and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at] = data.draw(st.integers(0, 255))
    else:
        payload = payload[:data.draw(st.integers(0, len(payload)))]
    writer = Role.RECEIVER if reads == "sender" else Role.SENDER
    stream = Greeting(writer, b"l" * 16).encode() + encode_frame(
        kind, transfer_id, bytes(payload), segment_index=segment_index)
    same_code(stream, ROLES[reads])


@settings(max_examples=150)
@given(st.data())
def test_mutated_manifests(data):
    """A wrong length shifts all that follows; then only the verdict must be the same."""
    manifest = data.draw(MANIFESTS)
    payload = bytearray(manifest.encode())
    assert _native.decode_manifest(bytes(payload)) == bytes(payload)
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    stream = Greeting(Role.SENDER, b"l" * 16).encode() + encode_frame(
        FrameType.MANIFEST, b"t" * 16, bytes(payload))
    native, reference = _native.check_stream(Role.RECEIVER, stream), reference_code(
        stream, Role.RECEIVER)
    assert bool(native) == bool(reference)
    if not native:
        again = Manifest.decode(bytes(payload)).encode()
        assert _native.decode_manifest(bytes(payload)) == again
