"""FORMAT.md §5.1 in plain Python: how a lane is admitted, without I/O."""

from __future__ import annotations

import hmac
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256

from kvwire.control import Abort
from kvwire.errors import ErrorCode, KvwireError, error_from_code
from kvwire.structure import fail
from kvwire.wire import (
    FLAG_JOIN, FLAG_PROOF, GREETING, FrameReader, FrameType, Greeting, encode_frame,
)

__all__ = ["Acceptor", "Admission", "Dialler"]

DIALLER, ACCEPTOR, LINK_KEY = (
    label.ljust(16, b"\0") for label in (b"kvwire dialler", b"kvwire acceptor", b"kvwire link key"))
NONCE_BYTES = MAC_BYTES = 32
CLEARTEXT = bytes(32)


class Admission(ABC):
    """One side of one lane until its frames begin.

    Attributes:
        own, peer: the greetings; `peer` is None until it has come.
        done: the lane is admitted; `rest` holds the bytes that came after.
        link_key: what further lanes of this link prove; None where nothing was proved.
    """

    def __init__(self, own: Greeting, nonce: bytes, channel: bytes = CLEARTEXT):
        self.own, self.peer = own, None
        self.done, self.link_key = False, None
        self._nonce, self._channel = nonce, channel
        self._buffer = bytearray()
        self._error: KvwireError | None = None
        self._steps = self._run()
        self._wanted, self.output = next(self._steps)

    @property
    def rest(self) -> bytes:
        return bytes(self._buffer) if self.done else b""

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the peer; return what is to be written. Raises what the lane ends with."""
        if self._error:
            raise self._error
        self._buffer += data
        written = b""
        while not self.done and len(self._buffer) >= self._wanted:
            taken = bytes(self._buffer[:self._wanted])
            del self._buffer[:self._wanted]
            try:
                self._wanted, output = self._steps.send(taken)
            except StopIteration as end:
                self.done, output = True, end.value
            except KvwireError as error:
                self._error = error
                raise
            written += output
        return written

    @abstractmethod
    def _run(self):
        """Yields (bytes wanted next, bytes to write); is sent the former; returns last writes."""

    def _greeted(self, data: bytes) -> None:
        self._peer_bytes = data
        self.peer = Greeting.decode(data, self.own.role)

    def _macs(self, key: bytes, greetings: bytes, nonces: bytes) -> dict[bytes, bytes]:
        text = greetings + nonces + self._channel
        return {label: hmac.digest(key, label + text, sha256)
                for label in (DIALLER, ACCEPTOR, LINK_KEY)}

    def _check(self, given: bytes, expected: bytes) -> None:
        if not hmac.compare_digest(given, expected):
            what = "link" if self.own.flags & FLAG_JOIN else "security"
            fail(ErrorCode.ADMISSION_REFUSED, f"admission: the peer proves another {what} key")


class Dialler(Admission):
    """The side that made the connection. `output` holds its first bytes.

    Args:
        own: its greeting; FLAG_JOIN set for a further lane.
        key: the link key of a lane that joins, else that of the security mode (§15).
        nonce: 32 random bytes, never used twice.
        channel: of a TLS connection, its exporter's second half.
    """

    def __init__(self, own: Greeting, key: bytes, nonce: bytes, channel: bytes = CLEARTEXT):
        self._key = key
        super().__init__(replace(own, flags=own.flags | FLAG_PROOF), nonce, channel)

    def _run(self):
        own = self.own.encode()
        self._greeted((yield GREETING.bytes, own + self._nonce))
        self.own.check_answer(self.peer)
        if not self.peer.flags & FLAG_PROOF:
            yield from self._refused()
        answer = yield NONCE_BYTES + MAC_BYTES, b""
        macs = self._macs(self._key, own + self._peer_bytes, self._nonce + answer[:NONCE_BYTES])
        self._check(answer[NONCE_BYTES:], macs[ACCEPTOR])
        self.link_key = macs[LINK_KEY]
        return macs[DIALLER]

    def _refused(self):
        reader = FrameReader(self.own.role, greeting=self.peer)
        while True:
            for frame in reader.events((yield 1, b"")):
                if frame.header.type != FrameType.ABORT:
                    fail(ErrorCode.ADMISSION_REFUSED, "admission: the peer gives no proof")
                if frame.payload is not None:
                    why = Abort.decode(frame.payload)
                    raise error_from_code(why.code, why.message, remote=True)


class Acceptor(Admission):
    """The side that was dialled.

    Args:
        own: its greeting's role and limits; the rest is echoed.
        key_of: returns the key that a lane must prove; raises what the lane is refused with,
            LINK_UNKNOWN or ADMISSION_REFUSED, also where no proof is announced but one is wanted.
        nonce, channel: as a dialler's.
    """

    def __init__(self, own: Greeting, key_of: Callable[[Greeting], bytes], nonce: bytes,
                 channel: bytes = CLEARTEXT):
        self._key_of, self._answered, self._accepting = key_of, False, False
        super().__init__(own, nonce, channel)

    def _run(self):
        self._greeted((yield GREETING.bytes, b""))
        peer = self.peer
        self.own = replace(self.own, link_id=peer.link_id, lane_index=peer.lane_index,
                           lane_count=peer.lane_count)
        self._accepting = True
        key = self._key_of(peer)
        self.own = replace(self.own, flags=peer.flags)
        own = self.own.encode()
        if not peer.flags & FLAG_PROOF:
            return own
        nonce = yield NONCE_BYTES, b""
        macs = self._macs(key, self._peer_bytes + own, nonce + self._nonce)
        self.link_key, self._answered = macs[LINK_KEY], True
        self._check((yield MAC_BYTES, own + self._nonce + macs[ACCEPTOR]), macs[DIALLER])
        return b""

    def last_words(self, why: KvwireError) -> bytes:
        """Return what tells the peer why the lane is closed; nothing to one that never greeted."""
        if not self._accepting:
            return b""
        start = b"" if self._answered else replace(self.own, flags=0).encode()
        return start + encode_frame(FrameType.ABORT, payload=Abort.of(why).encode())
