"""Who gets in: modes, keys, certificates, names, downgrades, strangers; with real sockets."""

import shutil
import socket
import ssl
import subprocess
import time

import pytest

import kvwire
from faults import Held, RawPeer, eventually, same_content
from kvwire import HmacAdmission, Tls, TlsPsk, _native, limits
from kvwire.errors import AdmissionError, ErrorCode
from kvwire.layout import CacheSpec
from kvwire.wire import FLAG_JOIN, FLAG_PROOF, FrameType, Greeting, Role

SPEC = CacheSpec("m", (kvwire.attention(range(2), kv_heads=2, head_dim=64, dtype="fp16"),))
TOKENS = 2000
KEY, OTHER_KEY = b"0123456789abcdef" * 2, b"fedcba9876543210" * 2

needs_tls = pytest.mark.skipif(_native.tls_library() is None, reason="built without OpenSSL")
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command")


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.ca = folder / f"{name}.pem"
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                      "-nodes", "-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2",
                      "-subj", f"/CN={name}")

    def _openssl(self, *command):
        subprocess.run(["openssl", *command], cwd=self.folder, check=True, capture_output=True)

    def tls(self, name, peer_name=None, days=2, **other):
        """Return the security of a side whose certificate carries `name`."""
        stem = f"{self.name}-{name}{days}"
        if not (self.folder / f"{stem}.pem").exists():
            (self.folder / f"{stem}.ext").write_text(f"subjectAltName=DNS:{name},IP:127.0.0.1\n")
            self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                          "-keyout", f"{stem}.key", "-out", f"{stem}.csr", "-subj", f"/CN={name}")
            dates = ["-days", str(days)] if days > 0 else [
                "-not_before", "20200101000000Z", "-not_after", "20200102000000Z"]
            if days > 0:
                self._openssl("x509", "-req", "-in", f"{stem}.csr", "-CA", f"{self.name}.pem",
                              "-CAkey", f"{self.name}.key", "-CAcreateserial", *dates,
                              "-extfile", f"{stem}.ext", "-out", f"{stem}.pem")
            else:
                self._expired(stem)
        return Tls(**{"ca": self.ca, "certificate": self.folder / f"{stem}.pem",
                      "key": self.folder / f"{stem}.key", "peer_name": peer_name} | other)

    def _expired(self, stem):
        (self.folder / "index.txt").write_text("")
        (self.folder / "ca.cnf").write_text(
            "[ca]\ndefault_ca=d\n[d]\ndatabase=index.txt\nrand_serial=yes\nnew_certs_dir=.\n"
            "default_md=sha256\npolicy=p\n[p]\ncommonName=supplied\n")
        self._openssl("ca", "-batch", "-config", "ca.cnf", "-in", f"{stem}.csr", "-out",
                      f"{stem}.pem", "-cert", f"{self.name}.pem", "-keyfile", f"{self.name}.key",
                      "-startdate", "20200101000000Z", "-enddate", "20200102000000Z",
                      "-extfile", f"{stem}.ext", "-notext")


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("stranger"), "stranger")


def deliver(receiver_security, sender_security, lanes=3, tokens=TOKENS, codec="raw"):
    source, target = Held(SPEC, tokens, 1), Held(SPEC, tokens, 2, writable=True)
    with kvwire.Receiver(security=receiver_security) as receiver:
        ticket = receiver.expect(target.memory)
        with kvwire.Sender(receiver.address, lanes=lanes, security=sender_security,
                           codec=codec) as sender:
            sender.send(ticket.id, source.memory).result(20)
            ticket.result(20)
            assert eventually(lambda: receiver.stats()["connections"] == lanes)
            assert receiver.stats()["links"] == 1
            assert sender.stats()["internal_errors"] == receiver.stats()["internal_errors"] == 0
    assert same_content(source, target)


def refused(receiver_security, sender_security, match, by=None):
    """Neither side lets the other in; the sender, whose call it is, says why."""
    with kvwire.Receiver(security=receiver_security) as receiver:
        with kvwire.Sender(receiver.address, lanes=3, security=sender_security) as sender:
            with pytest.raises(AdmissionError, match=match) as caught:
                sender.connect(10)
            assert caught.value.code == ErrorCode.ADMISSION_REFUSED
            assert eventually(lambda: receiver.stats()["links"] == 0)
            assert eventually(lambda: receiver.stats()["connections"] == 0)
            transfer = sender.send(b"T" * 16, Held(SPEC, 1, 1).memory)
            with pytest.raises(AdmissionError):
                transfer.result(10)
    return caught.value


# ---- cleartext

def test_hmac_admission_delivers():
    deliver(HmacAdmission(KEY), HmacAdmission(KEY))


@pytest.mark.parametrize("here, there", [
    (HmacAdmission(KEY), HmacAdmission(OTHER_KEY)), (HmacAdmission(KEY), None),
    (None, HmacAdmission(KEY))])
def test_wrong_and_missing_keys_are_refused(here, there):
    error = refused(here, there, "different keys")
    assert "security" in str(error) and not error.remote
    assert KEY.decode() not in str(error)


def test_a_plain_greeting_does_not_pass_where_a_key_is_asked_for():
    with kvwire.Receiver(security=HmacAdmission(KEY)) as receiver:
        with RawPeer(receiver.address) as peer:
            reason = peer.expect(FrameType.ABORT).payload
            assert int.from_bytes(reason[:2], "little") == ErrorCode.ADMISSION_REFUSED
            peer.read_to_end()
        with RawPeer(receiver.address, key=KEY) as peer:
            assert peer.link_key


def test_a_recorded_admission_cannot_be_replayed():
    """Word for word what an admitted sender wrote; the acceptor's nonce is another one."""
    with kvwire.Receiver(security=HmacAdmission(KEY), lease_s=0) as receiver:
        written = []
        class Recorder(RawPeer):
            def write(self, data):
                written.append(bytes(data))
                super().write(data)
        with Recorder(receiver.address, key=KEY):
            pass
        with RawPeer(receiver.address, greet=False) as peer:
            peer.write(b"".join(written))
            abort = peer.sock.recv(4096)
            while data := peer.sock.recv(4096):
                abort += data
            assert abort[128:131] == b"KW\x09" and b"different keys" in abort


def test_a_lane_joins_with_the_key_of_its_link_only():
    with kvwire.Receiver(security=HmacAdmission(KEY)) as receiver:
        with RawPeer(receiver.address, key=KEY, lane_count=3, link_id=b"A" * 16) as first, \
                RawPeer(receiver.address, key=KEY, lane_count=3, link_id=b"B" * 16) as other:
            with RawPeer(receiver.address, link_key=first.link_key, lane_index=1, lane_count=3,
                         link_id=b"A" * 16):
                assert eventually(lambda: receiver.stats()["connections"] == 3)
            for wrong in (KEY, other.link_key, bytes(32)):
                with pytest.raises(AdmissionError):
                    RawPeer(receiver.address, link_key=wrong, lane_index=2, lane_count=3,
                            link_id=b"A" * 16)
            with pytest.raises(kvwire.PeerClosedError) as caught:  # a stranger guesses a link
                RawPeer(receiver.address, link_key=first.link_key, lane_index=2, lane_count=3,
                        link_id=b"C" * 16)
            assert caught.value.code == ErrorCode.LINK_UNKNOWN and caught.value.remote
            with pytest.raises(AdmissionError):  # the link is there: it cannot be begun again
                RawPeer(receiver.address, key=KEY, lane_count=3, link_id=b"A" * 16)
            first.send(FrameType.CLOSE)
        assert receiver.stats()["internal_errors"] == 0


def test_without_proof_a_lane_is_alone():
    with kvwire.Receiver() as receiver:
        for refused_greeting in ({"lane_count": 2}, {"link_id": b"A" * 16}):
            with RawPeer(receiver.address, link_id=b"A" * 16):
                with RawPeer(receiver.address, **refused_greeting) as peer:
                    reason = peer.expect(FrameType.ABORT).payload
                    assert int.from_bytes(reason[:2], "little") == ErrorCode.ADMISSION_REFUSED


# ---- listening

@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "some.host"])
@pytest.mark.parametrize("make", [lambda **o: kvwire.Receiver(o.pop("listen"), **o), kvwire.Sender])
def test_listening_beyond_loopback_needs_security_or_insistence(host, make):
    with pytest.raises(kvwire.UsageError, match="allow_unauthenticated=True"):
        make(listen=f"{host}:0")


def test_listening_beyond_loopback():
    with kvwire.Receiver("0.0.0.0:0", allow_unauthenticated=True) as receiver:
        assert receiver.address
    with kvwire.Receiver("0.0.0.0:0", security=HmacAdmission(KEY)) as receiver:
        assert receiver.address
    for host in ("127.0.0.1", "localhost", "127.8.9.10"):
        with kvwire.Receiver(f"{host}:0") as receiver:
            assert receiver.address


def test_misuse_is_told_at_once(tmp_path):
    with pytest.raises(kvwire.UsageError, match="random bytes"):
        HmacAdmission(b"short")
    with pytest.raises(kvwire.UsageError, match="random bytes"):
        TlsPsk("name", "a string of characters, no bytes")
    with pytest.raises(kvwire.UsageError, match="must be one of"):
        kvwire.Receiver(security=KEY)
    assert "0123" not in repr(HmacAdmission(KEY)) + repr(TlsPsk("n", KEY))


@pytest.mark.skipif(_native.tls_library() is not None, reason="built with OpenSSL")
def test_without_openssl_tls_says_so():
    with pytest.raises(kvwire.UnsupportedError, match="libssl-dev"):
        kvwire.Receiver(security=TlsPsk("decode", KEY))


# ---- TLS

@needs_tls
@needs_openssl
@pytest.mark.parametrize("lanes, tokens", [(1, 1), (3, TOKENS), (8, 20_000)])
def test_tls_delivers(authority, lanes, tokens):
    deliver(authority.tls("decode"), authority.tls("prefill"), lanes, tokens)


@needs_tls
@needs_openssl
def test_tls_delivers_between_the_names_asked_for(authority):
    deliver(authority.tls("decode", "prefill"), authority.tls("prefill", "decode"))
    deliver(authority.tls("decode"), authority.tls("prefill", "127.0.0.1"))


@needs_tls
def test_tls_psk_delivers():
    deliver(TlsPsk("decode", KEY), TlsPsk("decode", KEY), codec="lz4")


@needs_tls
@needs_openssl
def test_a_receiver_dials_inside_tls(authority):
    source, target = Held(SPEC, TOKENS, 1), Held(SPEC, TOKENS, 2, writable=True)
    with kvwire.Sender(listen="127.0.0.1:0", security=authority.tls("prefill")) as sender:
        offer = sender.offer(source.memory).push_all().finish()
        with kvwire.Receiver(None, security=authority.tls("decode")) as receiver:
            receiver.pull(sender.address, offer.offer_id, target.memory).result(20)
            offer.result(20)
    assert same_content(source, target)


@needs_tls
@needs_openssl
@pytest.mark.parametrize("case", ["other_ca", "expired", "wrong_name", "psk_identity", "psk_key"])
def test_untrusted_peers_are_refused(authority, stranger, case):
    good = authority.tls("decode")
    if case == "other_ca":
        refused(good, stranger.tls("prefill", ca=authority.ca), "refused by the peer: unknown CA")
        refused(good, stranger.tls("prefill"), "certificate is not accepted: unable to get|self-s")
    elif case == "expired":
        refused(good, authority.tls("prefill", days=-1), "refused by the peer.*expired")
        refused(authority.tls("decode", days=-1), authority.tls("prefill"), "has expired")
    elif case == "wrong_name":
        refused(good, authority.tls("prefill", "somebody"), "ame mismatch")
        refused(authority.tls("decode", "somebody"), authority.tls("prefill"), "by the peer")
    elif case == "psk_identity":
        refused(TlsPsk("decode", KEY), TlsPsk("prefill", KEY), "TLS")
    else:
        refused(TlsPsk("decode", KEY), TlsPsk("decode", OTHER_KEY), "TLS")


@needs_tls
@needs_openssl
def test_modes_do_not_mix(authority):
    """Nobody falls back: whoever wants TLS gets TLS or an error."""
    tls, psk, hmac = authority.tls("decode"), TlsPsk("decode", KEY), HmacAdmission(KEY)
    for here, there in ((tls, psk), (psk, tls)):
        refused(here, there, "TLS")
    for here, there in ((tls, None), (psk, hmac), (None, tls), (hmac, psk)):
        with kvwire.Receiver(security=here) as receiver:
            with kvwire.Sender(receiver.address, security=there) as sender:
                with pytest.raises(kvwire.KvwireError) as caught:
                    sender.connect(10)
                assert caught.value.code in (ErrorCode.ADMISSION_REFUSED, ErrorCode.CONNECT_FAILED)
                assert "security" in str(caught.value) or "TLS" in str(caught.value)
            assert receiver.stats()["links"] == 0


@needs_tls
@needs_openssl
def test_files_that_do_not_serve_are_told(authority, tmp_path):
    good = authority.tls("decode")
    (tmp_path / "junk.pem").write_text("junk")
    for change in ({"ca": tmp_path / "junk.pem"}, {"certificate": tmp_path / "none.pem"},
                   {"key": tmp_path / "junk.pem"}, {"key": authority.tls("prefill").key}):
        options = {"ca": good.ca, "certificate": good.certificate, "key": good.key} | change
        with pytest.raises(kvwire.UsageError, match="does not serve"):
            kvwire.Receiver(security=Tls(**options))


# ---- strangers

def threads_and_rss():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["Threads"]), int(status["VmRSS"].split()[0]) << 10


@pytest.mark.parametrize("security", [HmacAdmission(KEY), pytest.param(
    TlsPsk("decode", KEY), marks=needs_tls)], ids=["hmac", "tls"])
def test_a_flood_of_strangers_stays_bounded(security):
    """10,000 connections that send a little and wait: few are held, the others closed at once."""
    with kvwire.Receiver(security=security) as receiver:
        host, port = kvwire.handles.split_address(receiver.address)
        before = threads_and_rss()
        held, most = [], 0
        for number in range(10_000):
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.connect((host, port))
            sock.send(b"KVWIRE\r\n"[:number % 9])
            held.append(sock)
            if number % 50 == 49:
                most = max(most, receiver.stats()["connections"])
            if len(held) == 400:
                for old in held[:300]:
                    old.close()
                del held[:300]
        assert 0 < most <= limits.ADMISSIONS_PER_ADDRESS_MAX
        threads, rss = threads_and_rss()
        assert threads <= before[0] and rss - before[1] < 32 << 20
        for sock in held:
            sock.close()
        assert eventually(lambda: receiver.stats()["connections"] == 0)
        source, target = Held(SPEC, 10, 1), Held(SPEC, 10, 2, writable=True)
        ticket = receiver.expect(target.memory)
        with kvwire.Sender(receiver.address, lanes=3, security=security) as sender:
            sender.send(ticket.id, source.memory).result(20)
        ticket.result(20)
        assert receiver.stats()["internal_errors"] == 0


@needs_tls
def test_slow_handshakes_are_cut_off_after_five_seconds():
    """A byte a second keeps nobody in: the time runs from the connection, not from the byte."""
    with kvwire.Receiver(security=TlsPsk("decode", KEY)) as receiver:
        with socket.create_connection(kvwire.handles.split_address(receiver.address)) as sock:
            start = time.monotonic()
            sock.settimeout(1)
            for byte in b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03":
                try:
                    sock.send(bytes((byte,)))
                    if not sock.recv(1):
                        break
                except TimeoutError:
                    continue
                except ConnectionError:
                    break
            assert 4 < time.monotonic() - start < 9
        assert eventually(lambda: receiver.stats()["connections"] == 0)


@needs_tls
@needs_openssl
def test_another_implementation_of_tls_is_understood(authority):
    """The records made here are TLS 1.3's: OpenSSL reads and writes the other end of them."""
    good = authority.tls("prefill")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(good.ca)
    context.load_cert_chain(good.certificate, good.key)
    with kvwire.Receiver(security=authority.tls("decode")) as receiver:
        with socket.create_connection(kvwire.handles.split_address(receiver.address)) as sock, \
                context.wrap_socket(sock, server_hostname="decode") as wrapped:
            greeting = Greeting(Role.SENDER, b"L" * 16)
            wrapped.sendall(greeting.encode())
            answer = b""
            while len(answer) < 64 + 64:
                answer += wrapped.recv(4096)
            assert Greeting.decode(answer, Role.SENDER).flags == 0  # TLS alone is no proof
            assert answer[64:67] == b"KW\x09"
            assert int.from_bytes(answer[128:130], "little") == ErrorCode.ADMISSION_REFUSED
