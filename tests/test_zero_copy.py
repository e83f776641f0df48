"""MSG_ZEROCOPY: the kernel reads the source after the send; nobody gets it back before that."""

import errno
import platform
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import kvwire
from faults import eventually
from kvwire.layout import REQUEST_LAYER

SCRIBBLE = 0xEE
STUCK_AFTER_BYTES = 1 << 20
BUFFER_BYTES = 1 << 16


class Relay:
    """Carries one lane to `target`, until it is stuck; then what comes later ends in `rest`."""

    def __init__(self, target):
        host, port = target.rsplit(":", 1)
        self._target = host, int(port)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.address = "127.0.0.1:%d" % self._listener.getsockname()[1]
        self.stuck, self.drain, self.rest = threading.Event(), threading.Event(), bytearray()
        self._threads = [threading.Thread(target=self._carry, daemon=True)]
        self._threads[0].start()

    def _carry(self):
        near, _ = self._listener.accept()
        self._listener.close()
        with near, socket.create_connection(self._target) as far:
            back = threading.Thread(target=self._back, args=(far, near), daemon=True)
            back.start()
            carried = 0
            while carried < STUCK_AFTER_BYTES:
                data = near.recv(BUFFER_BYTES)
                far.sendall(data)
                carried += len(data)
            self.stuck.set()
            self.drain.wait(60)
            try:
                while data := near.recv(BUFFER_BYTES):
                    self.rest += data
            except ConnectionResetError:
                pass

    def _back(self, far, near):
        try:
            while data := far.recv(BUFFER_BYTES):
                near.sendall(data)
        except OSError:
            pass

    def join(self):
        self.drain.set()
        self._threads[0].join(60)
        assert not self._threads[0].is_alive()


def wait_until_it_stands_still(transfer):
    last, sent = -1, transfer.progress().wire_bytes
    while sent != last:
        time.sleep(0.2)
        last, sent = sent, transfer.progress().wire_bytes


@pytest.mark.parametrize("io", ["epoll", "io_uring"])
@pytest.mark.parametrize("how", ["cancel", "close"])
def test_a_source_taken_back_from_a_dead_lane_is_read_no_more(monkeypatch, how, io):
    monkeypatch.setenv("KVWIRE_ZEROCOPY", "1")
    monkeypatch.setenv("KVWIRE_IO", io)
    source, target = np.full(16 << 20, 7, np.uint8), np.zeros(16 << 20, np.uint8)
    with kvwire.Receiver() as receiver:
        relay = Relay(receiver.address)
        with kvwire.Sender(relay.address, lanes=1) as sender:
            ticket = kvwire.receive(receiver, {"a": target})
            transfer = sender.send(ticket.id, kvwire.tensor_memory({"a": source}))
            assert relay.stuck.wait(20)
            wait_until_it_stands_still(transfer)
            assert sender.stats()["zero_copy_sends"] > 0
            transfer.cancel() if how == "cancel" else sender.close()
            assert transfer.done()
            source[:] = SCRIBBLE
            relay.join()
    assert bytes([SCRIBBLE]) * 64 not in relay.rest
    assert not (target == SCRIBBLE).any()


@pytest.mark.parametrize("lanes, codec", [(1, "raw"), (3, "raw"), (3, "lz4"), (3, "tiered")])
def test_sources_are_overwritten_as_they_come_back(monkeypatch, lanes, codec):
    monkeypatch.setenv("KVWIRE_ZEROCOPY", "1")
    names = sorted(str(i) for i in range(12))
    truth = {name: np.random.default_rng(int(name)).normal(size=1 << 18).astype(np.float32)
             for name in names}
    for array in truth.values():
        array[::2] = 0  # lz4 shortens it too
    source = {name: array.copy() for name, array in truth.items()}
    target = {name: np.zeros_like(array) for name, array in truth.items()}
    with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address, lanes=lanes) as sender:
        ticket = kvwire.receive(receiver, target)
        transfer = sender.open(ticket.id, kvwire.tensor_memory(source), codec=codec)
        items = transfer.memory.items(REQUEST_LAYER, None, True)
        pushes = {name: transfer.push_items([item]) for name, item in zip(names, items)}
        transfer.finish()
        for name, push in pushes.items():
            assert push.wait(20)
            source[name].view(np.uint8)[:] = SCRIBBLE
        ticket.result(20)
        transfer.result(20)
        stats, wire_bytes = sender.stats(), transfer.progress().wire_bytes
    assert all((target[name] == truth[name]).all() for name in names)
    assert stats["zero_copy"] == "always" and stats["zero_copy_sends"] > 12
    assert (wire_bytes < sum(array.nbytes for array in truth.values())) == (codec != "raw")


def test_a_lane_stops_asking_when_the_kernel_copies_all_the_same():
    source, target = np.ones(64 << 20, np.uint8), np.zeros(64 << 20, np.uint8)
    options = kvwire.LinkOptions(zero_copy=True)
    with kvwire.Receiver() as receiver:
        with kvwire.Sender(receiver.address, lanes=1, link_options=options) as sender:
            ticket = kvwire.receive(receiver, {"a": target})
            sender.send(ticket.id, kvwire.tensor_memory({"a": source})).result(20)
            ticket.result(20)
            assert eventually(lambda: sender.stats()["zero_copies_copied"] > 0)
            stats = sender.stats()
            assert 0 < stats["zero_copy_sends"] < stats["send_calls"] / 2
    assert (target == source).all()


def test_it_is_off_by_default_and_when_forced_off(monkeypatch):
    for forced in (None, "0"):
        if forced:
            monkeypatch.setenv("KVWIRE_ZEROCOPY", forced)
        options = kvwire.LinkOptions(zero_copy=bool(forced))
        source, target = np.ones(1 << 20), np.zeros(1 << 20)
        with kvwire.Receiver() as receiver:
            with kvwire.Sender(receiver.address, link_options=options) as sender:
                ticket = kvwire.receive(receiver, {"a": target})
                sender.send(ticket.id, kvwire.tensor_memory({"a": source})).result(20)
                ticket.result(20)
                stats = sender.stats()
                assert stats["zero_copy"] == "off" and stats["zero_copy_sends"] == 0


def test_an_unknown_wish_is_refused(monkeypatch):
    monkeypatch.setenv("KVWIRE_ZEROCOPY", "perhaps")
    with pytest.raises(kvwire.UsageError, match='"perhaps"'):
        kvwire.Receiver()


# The kernel refuses one system call when one of its arguments has a certain value, or certain bits:
# a BPF program over seccomp_data, whose words are the call's number and, from 16 on, arguments.
FORBID = """
import ctypes, struct, sys
number, argument, jump, value, error = map(int, sys.argv[1:])
program = b"".join(struct.pack("HBBI", *each) for each in [
    (0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16 + 8 * argument), (jump, 0, 1, value),
    (0x06, 0, 0, 0x00050000 | error), (0x06, 0, 0, 0x7FFF0000)])
held = ctypes.create_string_buffer(program)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(6, ctypes.addressof(held))), 0, 0) == 0

import numpy as np, kvwire
source = np.arange(1 << 20, dtype=np.int64)
target = np.zeros_like(source)
with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address, lanes=1) as sender:
    ticket = kvwire.receive(receiver, {"a": target})
    sender.send(ticket.id, kvwire.tensor_memory({"a": source})).result(20)
    ticket.result(20)
    assert (source == target).all()
    stats = sender.stats()
    assert stats["lanes_lost"] == 0
    print(stats["zero_copy_sends"], stats["zero_copies_refused"], stats["zero_copy_note"])
"""
EQUAL, ANY_BIT = 0x15, 0x45
SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000
SETSOCKOPT, SENDMSG = {"x86_64": (54, 46), "aarch64": (208, 211)}.get(platform.machine(), (0, 0))


def sent_where_forbidden(monkeypatch, *rule):
    """Zero-copy sends, refused ones, and the note."""
    monkeypatch.setenv("KVWIRE_ZEROCOPY", "1")
    if not SENDMSG:
        pytest.skip("knows the system calls' numbers on x86_64 and aarch64")
    done = subprocess.run([sys.executable, "-c", FORBID, *map(str, rule)], capture_output=True,
                          text=True, check=True)
    sends, refused, note = done.stdout.strip().split(" ", 2)
    return int(sends), int(refused), note


def test_a_system_without_the_option_gets_copies(monkeypatch):
    sends, refused, note = sent_where_forbidden(
        monkeypatch, SETSOCKOPT, 2, EQUAL, SO_ZEROCOPY, errno.EPERM)
    assert (sends, refused) == (0, 0) and note.startswith("SO_ZEROCOPY: ")


def test_a_lane_asks_once_where_the_flag_is_refused(monkeypatch):
    sends, refused, note = sent_where_forbidden(
        monkeypatch, SENDMSG, 2, ANY_BIT, MSG_ZEROCOPY, errno.EPERM)
    assert (sends, refused) == (0, 1) and note.startswith("MSG_ZEROCOPY: ")


def test_a_lane_asks_again_where_memory_was_short(monkeypatch):
    sends, refused, note = sent_where_forbidden(
        monkeypatch, SENDMSG, 2, ANY_BIT, MSG_ZEROCOPY, errno.ENOBUFS)
    assert sends == 0 and refused > 8 and note.startswith("MSG_ZEROCOPY: ")


def test_inside_tls_there_is_none(monkeypatch):
    monkeypatch.setenv("KVWIRE_ZEROCOPY", "1")
    if not kvwire.backends()["tls"]:
        pytest.skip("built without OpenSSL")
    security = kvwire.TlsPsk("test", bytes(range(32)))
    source, target = np.ones(1 << 20), np.zeros(1 << 20)
    with kvwire.Receiver(security=security) as receiver:
        with kvwire.Sender(receiver.address, security=security) as sender:
            ticket = kvwire.receive(receiver, {"a": target})
            sender.send(ticket.id, kvwire.tensor_memory({"a": source})).result(20)
            ticket.result(20)
            stats = sender.stats()
    assert stats["zero_copy_sends"] == 0 and "TLS" in stats["zero_copy_note"]
    assert (target == source).all()
