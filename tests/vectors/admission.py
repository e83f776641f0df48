"""Exchanges of FORMAT.md §5.1, made with the reference implementation from fixed nonces."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvwire.admission import Acceptor, Dialler
from kvwire.errors import ErrorCode, KvwireError, error_from_code
from kvwire.wire import FLAG_JOIN, Greeting, Role

LINK = b"link of vectors."
NONCE_D, NONCE_A, CHANNEL = bytes(range(32)), bytes(range(100, 132)), bytes(range(200, 232))
KEY = b"thirty-two bytes of a shared key"


@dataclass
class Exchange:
    """What each side is given, writes, and ends with; all bytes in hexadecimal in the file."""

    name: str
    dialler: Greeting
    acceptor: Greeting
    dialler_key: bytes = KEY
    acceptor_key: bytes | None = KEY  # None: it does not know the link
    channel: bytes = bytes(32)
    damage: int | None = None         # bit 0 of this byte of the dialler's stream is flipped

    def run(self) -> dict:
        """Return the exchange in words."""
        dialler = Dialler(self.dialler, self.dialler_key, NONCE_D, self.channel)
        acceptor = Acceptor(self.acceptor, self._key_of, NONCE_A, self.channel)
        written, errors, to_acceptor = {"dialler": b"", "acceptor": b""}, {}, dialler.output
        while to_acceptor:
            to_acceptor = self._damaged(to_acceptor, len(written["dialler"]))
            written["dialler"] += to_acceptor
            to_dialler = self._feed(acceptor, to_acceptor, "acceptor", errors)
            written["acceptor"] += to_dialler
            to_acceptor = b""
            if "dialler" not in errors and not dialler.done:
                to_acceptor = self._feed(dialler, to_dialler, "dialler", errors)
        words = {
            "name": self.name, "dialler_greeting": dialler.own.encode().hex(),
            "acceptor_greeting": self.acceptor.encode().hex(),
            "dialler_key": self.dialler_key.hex(), "channel": self.channel.hex(),
            "acceptor_key": None if self.acceptor_key is None else self.acceptor_key.hex(),
            "nonce_d": NONCE_D.hex(), "nonce_a": NONCE_A.hex(),
            "dialler_writes": written["dialler"].hex(),
            "acceptor_writes": written["acceptor"].hex()}
        if errors:
            return words | {f"{side}_error": error for side, error in errors.items()}
        return words | {"link_key": dialler.link_key.hex()}

    def _key_of(self, peer: Greeting) -> bytes:
        if self.acceptor_key is None:
            raise error_from_code(ErrorCode.LINK_UNKNOWN, "no such link")
        return self.acceptor_key

    def _damaged(self, data: bytes, offset: int) -> bytes:
        if self.damage is None or not offset <= self.damage < offset + len(data):
            return data
        at = self.damage - offset
        return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1:]

    @staticmethod
    def _feed(side, data: bytes, name: str, errors: dict) -> bytes:
        try:
            return side.feed(data)
        except KvwireError as error:
            errors[name] = error.code.name
            return side.last_words(error) if isinstance(side, Acceptor) else b""


def exchanges() -> list[dict]:
    dialler = Greeting(Role.SENDER, LINK, 0, 4, codecs=1)
    acceptor = Greeting(Role.RECEIVER, LINK, codecs=3, payload_bytes_max=1 << 20)
    further = replace(dialler, lane_index=3, flags=FLAG_JOIN)
    plain = Exchange("establish", dialler, acceptor)
    link_key = bytes.fromhex(plain.run()["link_key"])
    return [exchange.run() for exchange in (
        plain,
        Exchange("open", dialler, acceptor, b"", b""),
        Exchange("tls", dialler, acceptor, channel=CHANNEL),
        Exchange("join", further, acceptor, link_key, link_key),
        Exchange("receiver_dials", replace(dialler, role=Role.RECEIVER),
                 replace(acceptor, role=Role.SENDER)),
        Exchange("wrong_key", dialler, acceptor, KEY, KEY[::-1]),
        Exchange("missing_key", dialler, acceptor, b"", KEY),
        Exchange("join_with_another_link_s_key", further, acceptor, KEY, link_key),
        Exchange("link_unknown", further, acceptor, link_key, None),
        Exchange("nonce_damaged", dialler, acceptor, damage=64),
        Exchange("proof_damaged", dialler, acceptor, damage=96 + 31),
        Exchange("greeting_damaged", dialler, acceptor, damage=40),
        Exchange("same_role", dialler, replace(acceptor, role=Role.SENDER)))]
