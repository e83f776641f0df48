"""What the I/O threads wait with: chosen by KVWIRE_IO, and what if a sandbox forbids it."""

import subprocess
import sys

import numpy as np
import pytest

import kvwire
from faults import eventually

# Makes io_uring_setup fail with EPERM, as container runtimes do: a BPF program that compares the
# system call's number (first word of seccomp_data), set by prctl(PR_SET_SECCOMP).
FORBID = """
import ctypes, struct
program = b"".join(struct.pack("HBBI", *each) for each in [
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)])
held = ctypes.create_string_buffer(program)
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, ctypes.addressof(held))), 0, 0) == 0
"""

TRANSFER = """
import numpy as np, kvwire
source = np.arange(1 << 20, dtype=np.int64)
target = np.zeros_like(source)
with kvwire.Receiver() as receiver, kvwire.Sender(receiver.address) as sender:
    ticket = kvwire.receive(receiver, {"a": target})
    sender.send(ticket.id, kvwire.tensor_memory({"a": source})).result(20)
    ticket.result(20)
    assert (source == target).all()
    print(sender.stats()["io"], "|", sender.stats()["io_note"])
"""


def run(script, monkeypatch, wish):
    monkeypatch.setenv("KVWIRE_IO", wish)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          check=True).stdout.strip()


def has_uring():
    with kvwire.Receiver() as receiver:
        return receiver.stats()["io"] == "io_uring"


@pytest.mark.parametrize("wish", ["epoll", "io_uring"])
def test_the_wish_is_granted_or_explained(monkeypatch, wish):
    io, note = run(TRANSFER, monkeypatch, wish).split(" |")
    assert io == wish and not note or io == "epoll" and "no io_uring" in note


def test_the_default_is_epoll(monkeypatch):
    assert run(TRANSFER, monkeypatch, "") == "epoll |"


def test_where_a_sandbox_forbids_io_uring_it_is_epoll(monkeypatch):
    assert run(FORBID + TRANSFER, monkeypatch, "io_uring").startswith(
        "epoll | no io_uring: not permitted here")


def test_an_unknown_wish_is_refused(monkeypatch):
    monkeypatch.setenv("KVWIRE_IO", "iocp")
    with pytest.raises(kvwire.UsageError, match='"iocp"'):
        kvwire.Receiver()


def test_a_closed_lane_leaves_at_once(monkeypatch):
    """A request that waits inside the kernel would keep the connection open."""
    monkeypatch.setenv("KVWIRE_IO", "io_uring")
    if not has_uring():
        pytest.skip("needs io_uring")
    with kvwire.Receiver() as receiver:
        sender = kvwire.Sender(receiver.address)
        ticket = kvwire.receive(receiver, {"a": np.zeros(8)})
        transfer = sender.send(ticket.id, kvwire.tensor_memory({"a": np.ones(8)}))
        transfer.result(10)
        sender.close()
        assert eventually(lambda: receiver.stats()["connections"] == 0)
        assert transfer.done()  # the handle, and what it holds of the sender, is still there
