"""Admission (FORMAT.md §5.1): the C++ machine against the reference, the vectors, an attacker."""

import hashlib
import hmac
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vectors.admission import CHANNEL, KEY, LINK, NONCE_A, NONCE_D, exchanges
from vectors.read import HERE

from kvwire import _native
from kvwire.admission import Acceptor, Dialler
from kvwire.errors import AdmissionError, ErrorCode, KvwireError, PeerClosedError, error_from_code
from kvwire.wire import FLAG_PROOF, Greeting, Role, encode_frame, FrameType

STORED = json.loads((HERE / "admission.json").read_text())["exchanges"]
GREETING_D, GREETING_A = Greeting(Role.SENDER, LINK), Greeting(Role.RECEIVER, LINK)
BLOCK_EDGES = [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000]


@pytest.mark.parametrize("size", BLOCK_EDGES)
def test_sha256_equals_hashlib(size):
    data = random.Random(size).randbytes(size)
    assert _native.sha256(data) == hashlib.sha256(data).digest()


@given(st.binary(max_size=200), st.binary(max_size=200), st.binary(max_size=200))
def test_hmac_equals_hmac(key, a, b):
    assert _native.hmac_sha256(key, a, b) == hmac.digest(key, a + b, "sha256")


def native_dialler(words):
    return _native.AdmissionProbe.dial(
        *(bytes.fromhex(words[name]) for name in ("dialler_greeting", "dialler_key", "nonce_d",
                                                  "channel")))


def native_acceptor(words):
    key = words["acceptor_key"]
    return _native.AdmissionProbe.accept(
        bytes.fromhex(words["acceptor_greeting"]), None if key is None else bytes.fromhex(key),
        bytes.fromhex(words["nonce_a"]), bytes.fromhex(words["channel"]))


def test_the_reference_makes_the_vectors():
    assert exchanges() == STORED


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
@pytest.mark.parametrize("words", STORED, ids=lambda words: words["name"])
def test_native_sides_write_the_vectors_however_the_bytes_are_cut(words, step):
    for side, make, hears, writes in (
            ("acceptor", native_acceptor, "dialler_writes", "acceptor_writes"),
            ("dialler", native_dialler, "acceptor_writes", "dialler_writes")):
        machine, heard = make(words), bytes.fromhex(words[hears])
        written = machine.feed(b"")
        for at in range(0, len(heard), step):
            written += machine.feed(heard[at:at + step])
        error = words.get(f"{side}_error")
        assert machine.error == (ErrorCode[error] if error else 0), side
        if "damaged" not in words["name"] or side == "acceptor":
            assert clean(written) == clean(bytes.fromhex(words[writes])), side
        if "link_key" in words:
            assert machine.done and machine.link_key == bytes.fromhex(words["link_key"])


def clean(written):
    """The code of an ABORT is pinned, its sentence is not."""
    at = written.find(b"KW\x09")
    return written if at < 0 else written[:at] + written[at + 64:at + 66]


def admit(dialler, acceptor, tail=b""):
    """Run both sides to their ends; returns the dialler's first bytes and its proof."""
    answer = acceptor.feed(dialler.output)
    proof = dialler.feed(answer)
    acceptor.feed(proof + tail)
    return dialler.output, proof


def sides(key_d=KEY, key_a=KEY, nonce_a=NONCE_A, channel_a=bytes(32)):
    return (Dialler(GREETING_D, key_d, NONCE_D),
            Acceptor(GREETING_A, lambda peer: key_a, nonce_a, channel_a))


def test_frames_behind_the_proof_are_left_alone():
    dialler, acceptor = sides()
    admit(dialler, acceptor, b"KW frames")
    assert acceptor.done and acceptor.rest == b"KW frames"
    assert acceptor.link_key == dialler.link_key


def test_a_recorded_admission_cannot_be_replayed():
    first, proof = admit(*sides())
    _, acceptor = sides(nonce_a=bytes(32))
    acceptor.feed(first)
    with pytest.raises(AdmissionError):
        acceptor.feed(proof)
    with pytest.raises(AdmissionError):  # and stays refused
        acceptor.feed(b"")


def test_an_acceptor_s_recorded_answer_does_not_satisfy_another_dialler():
    answer = sides()[1].feed(sides()[0].output)
    with pytest.raises(AdmissionError):
        Dialler(GREETING_D, KEY, bytes(32)).feed(answer)


def test_a_proof_cannot_be_reflected():
    dialler = Dialler(GREETING_D, KEY, NONCE_D)
    echo = replace(GREETING_A, flags=FLAG_PROOF).encode()
    mirror = Dialler(replace(GREETING_D, role=Role.RECEIVER), KEY, NONCE_D)
    with pytest.raises(AdmissionError):
        dialler.feed(echo + NONCE_D + mirror.output[-32:])


def test_a_proof_holds_on_its_own_connection_only():
    with pytest.raises(AdmissionError):
        admit(*sides(channel_a=CHANNEL))


@pytest.mark.parametrize("field, value", [
    ("payload_bytes_max", 1 << 22), ("codecs", 1), ("transfers_max", 7), ("version", 2)])
def test_what_the_greetings_say_is_covered(field, value):
    """Somebody on the path rewrites the acceptor's greeting, checksum and all."""
    dialler, acceptor = sides()
    acceptor.own = replace(acceptor.own, codecs=3, payload_bytes_max=1 << 20)
    answer = acceptor.feed(dialler.output)
    forged = replace(Greeting.decode(answer), **{field: value}).encode()
    assert forged != answer[:64]
    with pytest.raises(AdmissionError):
        dialler.feed(forged + answer[64:])


def test_a_dialler_never_goes_on_without_proof():
    grant = encode_frame(FrameType.GRANT, b"t" * 16, bytes(16))
    for frame in (encode_frame(FrameType.CLOSE), grant):
        dialler = sides()[0]
        with pytest.raises(AdmissionError):
            dialler.feed(GREETING_A.encode() + frame)


def test_a_refusal_is_told():
    def unknown(peer):
        raise error_from_code(ErrorCode.LINK_UNKNOWN, "no such link")
    dialler, acceptor = sides()[0], Acceptor(GREETING_A, unknown, NONCE_A)
    with pytest.raises(PeerClosedError) as caught:
        acceptor.feed(dialler.output)
    with pytest.raises(PeerClosedError, match="no such link") as told:
        dialler.feed(acceptor.last_words(caught.value))
    assert told.value.remote and told.value.code == ErrorCode.LINK_UNKNOWN


@given(st.data())
def test_native_and_reference_judge_damaged_streams_alike(data):
    words = data.draw(st.sampled_from(STORED))
    side = data.draw(st.sampled_from(["dialler", "acceptor"]))
    other = "acceptor" if side == "dialler" else "dialler"
    heard = bytearray(bytes.fromhex(words[f"{other}_writes"]))
    if heard:
        heard[data.draw(st.integers(0, len(heard) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    native = (native_dialler if side == "dialler" else native_acceptor)(words)
    native.feed(bytes(heard))
    assert native.error == reference_error(words, side, bytes(heard))


def reference_error(words, side, heard):
    def key_of(peer):
        if words["acceptor_key"] is None:
            raise error_from_code(ErrorCode.LINK_UNKNOWN, "no such link")
        return bytes.fromhex(words["acceptor_key"])
    given = {name: bytes.fromhex(value) for name, value in words.items()
             if isinstance(value, str) and name != "name" and not name.endswith("error")}
    greeting = Greeting.decode(given[f"{side}_greeting"])
    machine = Dialler(greeting, given["dialler_key"], given["nonce_d"], given["channel"]) \
        if side == "dialler" else Acceptor(greeting, key_of, given["nonce_a"], given["channel"])
    try:
        machine.feed(heard)
    except KvwireError as error:
        return error.code
    return 0
