"""A receiver that answers nonsense harms no sender: typed errors, and the memory comes back."""

import socket
import time

import numpy as np
import pytest

import kvwire
from faults import Held, RawPeer, eventually, fails
from kvwire.control import Abort, ChunkRun, Done, Grant, Receipt, Repair, RepairEntry
from kvwire.errors import ErrorCode
from kvwire.layout import CacheSpec
from kvwire.manifest import Manifest
from kvwire.wire import FrameType, Role

TOKENS = 6
SPEC = CacheSpec("m", (kvwire.attention(range(2), kv_heads=2, head_dim=8, dtype="fp16"),))


@pytest.fixture
def refusing():
    """A raw receiver that listens, a Sender that dials it, and its transfer of one cache."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:%d" % listener.getsockname()[1]
        with kvwire.Sender(address, lanes=1, lease_s=0) as sender:
            sock, _ = listener.accept()
            with RawPeer(role=Role.RECEIVER, sock=sock) as peer:
                transfer = sender.send(b"T" * 16, Held(SPEC, TOKENS, 1).memory)
                opened = peer.expect(FrameType.MANIFEST)
                yield peer, transfer, opened.header.transfer_id
                assert eventually(transfer.done)
                assert all(transfer._native.pushes_returned())


GRANT = Grant(1 << 20, 1, 1 << 16)


@pytest.mark.parametrize("frames, code", [
    ([(FrameType.RECEIPT, Receipt((ChunkRun(0, 0, 1),)))], ErrorCode.LINK_LOST),
    ([(FrameType.GRANT, Grant(0, 1, 1 << 16))], ErrorCode.LINK_LOST),
    ([(FrameType.GRANT, Grant(1 << 20, 1, 100))], ErrorCode.LINK_LOST),
    ([(FrameType.GRANT, Grant(1 << 20, 2, 1 << 16))], ErrorCode.LINK_LOST),
    ([(FrameType.GRANT, GRANT), (FrameType.RECEIPT, Receipt((ChunkRun(9, 0, 1),)))],
     ErrorCode.LINK_LOST),
    ([(FrameType.GRANT, GRANT), (FrameType.RECEIPT, Receipt((ChunkRun(0, 7, 0xFFFFFFFF),)))],
     ErrorCode.LINK_LOST),
    ([(FrameType.GRANT, GRANT), (FrameType.RECEIPT, Receipt((ChunkRun(0, 0, 0, 77),)))],
     (ErrorCode.DIGEST_MISMATCH, ErrorCode.LINK_LOST)),
    ([(FrameType.GRANT, GRANT),
      (FrameType.REPAIR, Repair((RepairEntry(9, 0, 0, ErrorCode.RAW_CORRUPT, 0, 0),)))],
     ErrorCode.LINK_LOST),
    ([(FrameType.GRANT, GRANT), (FrameType.DONE, Done(1, 1))], ErrorCode.LINK_LOST),
    ([(FrameType.MANIFEST, None)], ErrorCode.LINK_LOST),
    ([(FrameType.ABORT, Abort(ErrorCode.SPEC_MISMATCH, "no", 3, 4))], ErrorCode.SPEC_MISMATCH),
])
def test_receivers_that_answer_nonsense(refusing, frames, code):
    peer, transfer, transfer_id = refusing
    for kind, payload in frames:
        payload = Manifest(b"T" * 16, SPEC, 0, TOKENS) if payload is None else payload
        peer.send(kind, transfer_id, payload)
    with pytest.raises(kvwire.KvwireError) as caught:
        transfer.result(10)
    error = caught.value
    assert error.code in (code if isinstance(code, tuple) else (code,))
    if code == ErrorCode.SPEC_MISMATCH:
        assert error.remote and (error.expected, error.actual) == (3, 4)


def test_last_words_are_heard_while_writes_fail():
    """The receiver says why, and leaves with much of what it was sent unread: a reset."""
    memory = kvwire.tensor_memory({"a": np.zeros(32 << 20, np.uint8)})
    for _ in range(10):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            address = "127.0.0.1:%d" % listener.getsockname()[1]
            with kvwire.Sender(address, lanes=1, lease_s=0) as sender:
                sock, _ = listener.accept()
                with RawPeer(role=Role.RECEIVER, sock=sock) as peer:
                    transfer = sender.send(b"T" * 16, memory)
                    transfer_id = peer.expect(FrameType.MANIFEST).header.transfer_id
                    peer.send(FrameType.GRANT, transfer_id, Grant(1 << 30, 1, 1 << 20))
                    for _ in range(16):
                        peer.sock.recv(1 << 16)
                    peer.send(FrameType.ABORT, transfer_id, Abort(ErrorCode.SPEC_MISMATCH, "no"))
                fails(transfer, kvwire.KvwireError, ErrorCode.SPEC_MISMATCH)


def test_a_receiver_that_asks_for_ever_is_served_within_bounds(refusing):
    """The sender's attempts grow; the peer decides when it is enough, and may just leave."""
    peer, transfer, transfer_id = refusing
    peer.send(FrameType.GRANT, transfer_id, GRANT)
    for attempt in range(300):
        chunk = peer.expect(FrameType.CHUNK)
        while chunk.header.segment_index != 0:
            chunk = peer.expect(FrameType.CHUNK)
        assert chunk.header.attempt == attempt
        peer.send(FrameType.REPAIR, transfer_id, Repair((
            RepairEntry(0, 0, attempt, ErrorCode.PAYLOAD_CORRUPT, 0, 0),)))
    peer.send(FrameType.ABORT, transfer_id, Abort(ErrorCode.CANCELLED))
    fails(transfer, kvwire.TransferCancelled, ErrorCode.CANCELLED)


def test_a_silent_listener_is_given_up_after_five_seconds():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        with kvwire.Sender("127.0.0.1:%d" % listener.getsockname()[1]) as sender:
            with pytest.raises(kvwire.TransferError) as caught:
                sender.connect(30)
        assert caught.value.code == ErrorCode.CONNECT_FAILED
        assert 4 < time.monotonic() - start < 9
