"""The transports that kvwire is compared with, each as a receiving and a sending half.

The halves live in two processes, which may be on two machines:

    receiver = PEERS[name].receiver(host, pool, moves)          # `host`: an address of its own
    sender = PEERS[name].sender(host, receiver.contact, pool, moves)  # while the other is in
    receiver.accept()
    sender.send()  # while the other is in receiver.receive(), which ends with all in place

`pool` is a flat uint8 array, borrowed; `moves` is a `Workload.moves`; `contact` is JSON. A half
raises whatever its library does and has no deadline of its own: its process is to be killed.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import os
import select
import socket
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from bench.build import ROOT

__all__ = ["PEERS", "Peer", "absent", "installed", "versions"]

_FOLDER = ROOT / ".build" / "peers"
_STAGED_BELOW_BYTES = 16 << 10  # smaller blocks travel faster copied together: zmq and gloo
_IOVECS_MAX = 1024  # of one sendmsg or recvmsg
_ACK = bytes(64)
_MOONCAKE_CALL_BLOCKS = 1000  # it queues 1,024 requests a peer and refuses more
_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Peer:
    """A transport.

    Attributes:
        module: what it is imported as; None: always there.
        package: the distribution that has its version.
        receiver, sender: the classes of its halves.
    """

    module: str | None
    package: str | None
    receiver: type
    sender: type


class _Blocks:
    """Some ranges of a pool, in stream order.

    Attributes:
        ranges: each as a view of the pool.
        buffers: what travels: the ranges, or, where they are small and equal and `staged` is
            asked for, one buffer that holds them all.
    """

    def __init__(self, pool: np.ndarray, offsets: np.ndarray, lengths: np.ndarray,
                 staged: bool = False):
        ends = (offsets + lengths).tolist()
        self.ranges = [pool[start:end] for start, end in zip(offsets.tolist(), ends)]
        self.buffers = self.ranges
        self._stage = None
        size = int(lengths[0])
        if staged and (lengths == size).all() and size < _STAGED_BELOW_BYTES:
            self._rows = pool.reshape(-1, size)
            self._places = offsets // size
            self._stage = np.zeros((len(offsets), size), np.uint8)
            self.buffers = [self._stage.reshape(-1)]

    def gather(self) -> None:
        if self._stage is not None:
            np.take(self._rows, self._places, axis=0, out=self._stage, mode="clip")

    def scatter(self) -> None:
        if self._stage is not None:
            self._rows[self._places] = self._stage


def _sent(pool: np.ndarray, moves: np.ndarray, staged: bool = False) -> _Blocks:
    return _Blocks(pool, moves[:, 0], moves[:, 2], staged)


def _received(pool: np.ndarray, moves: np.ndarray, staged: bool = False) -> _Blocks:
    return _Blocks(pool, moves[:, 1], moves[:, 2], staged)


class SocketsReceiver:
    """One connection, blocking calls of up to 1,024 ranges."""

    def __init__(self, host: str, pool: np.ndarray, moves: np.ndarray):
        self._listener = socket.create_server((host, 0))
        self.contact = list(self._listener.getsockname())
        self._ranges = [memoryview(each) for each in _received(pool, moves).ranges]

    def accept(self) -> None:
        self._socket = _no_delay(self._listener.accept()[0])

    def receive(self) -> None:
        _move(self._ranges, self._take)

    def answer_trips(self) -> None:
        """Take the ranges one by one and confirm each."""
        for each in self._ranges:
            _move([each], self._take)
            self._socket.sendall(_ACK)

    def _take(self, ranges: list[memoryview]) -> int:
        return self._socket.recvmsg_into(ranges, 0, socket.MSG_WAITALL)[0]

    def close(self) -> None:
        self._socket.close()
        self._listener.close()


class SocketsSender:
    def __init__(self, host: str, contact: list, pool: np.ndarray, moves: np.ndarray):
        self._socket = _no_delay(socket.create_connection(tuple(contact),
                                                          source_address=(host, 0)))
        self._ranges = [memoryview(each) for each in _sent(pool, moves).ranges]

    def send(self) -> None:
        _move(self._ranges, self._socket.sendmsg)

    def trip(self, index: int) -> None:
        """Move one range; returns when it is known to be in place."""
        _move([self._ranges[index]], self._socket.sendmsg)
        _read(self._socket, len(_ACK))

    def close(self) -> None:
        self._socket.close()


class ZmqReceiver:
    """DEALER sockets, which unlike PUSH and PULL go both ways; a frame per buffer, not copied."""

    def __init__(self, host: str, pool: np.ndarray, moves: np.ndarray):
        import zmq
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self.contact = f"tcp://{host}:{self._socket.bind_to_random_port(f'tcp://{host}')}"
        self._blocks = _received(pool, moves, staged=True)

    def accept(self) -> None:
        self._socket.recv()

    def receive(self) -> None:
        for buffer in self._blocks.buffers:
            self._socket.recv_into(buffer)
        self._blocks.scatter()

    def answer_trips(self) -> None:
        for each in self._blocks.ranges:
            self._socket.recv_into(each)
            self._socket.send(_ACK)

    def close(self) -> None:
        self._socket.close(linger=0)


class ZmqSender:
    def __init__(self, host: str, contact: str, pool: np.ndarray, moves: np.ndarray):
        import zmq
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(contact)
        self._socket.send(b"")
        self._blocks = _sent(pool, moves, staged=True)

    def send(self) -> None:
        """Return when the library has everything, which is before it is delivered."""
        self._blocks.gather()
        for buffer in self._blocks.buffers:
            self._socket.send(buffer, copy=False)

    def trip(self, index: int) -> None:
        self._socket.send(self._blocks.ranges[index], copy=False)
        self._socket.recv()

    def close(self) -> None:
        self._socket.close(linger=0)


class _Gloo:
    """One of two ranks of a gloo process group; an isend or irecv per buffer."""

    def __init__(self, host: str, blocks: _Blocks, store_address: tuple[str, int], rank: int):
        import torch
        import torch.distributed as dist
        os.environ["GLOO_SOCKET_IFNAME"] = _interface(host)
        self._dist = dist
        self._rank = rank
        self._blocks = blocks
        self._buffers = [torch.from_numpy(each) for each in blocks.buffers]
        self._ranges = [torch.from_numpy(each) for each in blocks.ranges]
        self._ack = torch.zeros(len(_ACK), dtype=torch.uint8)
        self._store = dist.TCPStore(*store_address, is_master=rank == 0, wait_for_workers=False)

    def _join(self) -> None:
        self._dist.init_process_group("gloo", store=self._store, rank=self._rank, world_size=2)

    def close(self) -> None:
        self._dist.destroy_process_group()


class GlooReceiver(_Gloo):
    def __init__(self, host: str, pool: np.ndarray, moves: np.ndarray):
        super().__init__(host, _received(pool, moves, staged=True), (host, 0), rank=0)
        self.contact = [host, self._store.port]

    def accept(self) -> None:
        self._join()

    def receive(self) -> None:
        for work in [self._dist.irecv(buffer, 1) for buffer in self._buffers]:
            work.wait()
        self._blocks.scatter()

    def answer_trips(self) -> None:
        for each in self._ranges:
            self._dist.recv(each, 1)
            self._dist.send(self._ack, 1)


class GlooSender(_Gloo):
    def __init__(self, host: str, contact: list, pool: np.ndarray, moves: np.ndarray):
        super().__init__(host, _sent(pool, moves, staged=True), tuple(contact), rank=1)
        self._join()

    def send(self) -> None:
        self._blocks.gather()
        for work in [self._dist.isend(buffer, 0) for buffer in self._buffers]:
            work.wait()

    def trip(self, index: int) -> None:
        self._dist.send(self._ranges[index], 0)
        self._dist.recv(self._ack, 0)


class _Bell:
    """A connection beside a one-sided transport, for what only one of its sides comes to know."""

    def __init__(self, connected: socket.socket):
        self._socket = _no_delay(connected)

    def ring(self) -> None:
        self._socket.sendall(b".")

    def wait(self) -> None:
        _read(self._socket, 1)

    def rung(self) -> bool:
        return bool(select.select([self._socket], [], [], 0)[0])

    def close(self) -> None:
        self._socket.close()


class _Mooncake:
    """A transfer engine over TCP with one registered pool."""

    def __init__(self, host: str, pool: np.ndarray):
        os.environ.update(MC_TCP_BIND_ADDRESS=host, MC_LOG_LEVEL="ERROR")
        from mooncake.engine import TransferEngine
        self._engine = TransferEngine()
        _demand(self._engine.initialize(host, "P2PHANDSHAKE", "tcp", ""))
        self._base = pool.ctypes.data
        _demand(self._engine.register_memory(self._base, pool.nbytes))

    def close(self) -> None:
        self._bell.close()
        _demand(self._engine.unregister_memory(self._base))


class MooncakeReceiver(_Mooncake):
    """A write's end is known to its writer only, who rings."""

    def __init__(self, host: str, pool: np.ndarray, moves: np.ndarray):
        super().__init__(host, pool)
        self._listener = socket.create_server((host, 0))
        self.contact = {"engine": f"{host}:{self._engine.get_rpc_port()}", "pool": self._base,
                        "bell": list(self._listener.getsockname())}

    def accept(self) -> None:
        self._bell = _Bell(self._listener.accept()[0])

    def receive(self) -> None:
        self._bell.wait()

    def answer_trips(self) -> None:
        """Nothing to do: a write returns when it is in place."""

    def close(self) -> None:
        self._listener.close()
        super().close()


class MooncakeSender(_Mooncake):
    def __init__(self, host: str, contact: dict, pool: np.ndarray, moves: np.ndarray):
        super().__init__(host, pool)
        self._engine_there = contact["engine"]
        self._bell = _Bell(socket.create_connection(tuple(contact["bell"])))
        self._columns = [(self._base + moves[:, 0]).tolist(),
                         (contact["pool"] + moves[:, 1]).tolist(), moves[:, 2].tolist()]

    def send(self) -> None:
        for first in range(0, len(self._columns[0]), _MOONCAKE_CALL_BLOCKS):
            part = (column[first:first + _MOONCAKE_CALL_BLOCKS] for column in self._columns)
            _demand(self._engine.batch_transfer_sync_write(self._engine_there, *part))
        self._bell.ring()

    def trip(self, index: int) -> None:
        _demand(self._engine.transfer_sync_write(
            self._engine_there, *(column[index] for column in self._columns)))


class _Nixl:
    """An agent with UCX over TCP and one registered pool.

    Without its progress thread, which would keep a core busy while others are measured; both
    halves poll instead while they have something to wait for.
    """

    def __init__(self, name: str, host: str, pool: np.ndarray):
        os.environ.update(UCX_TLS="tcp", UCX_NET_DEVICES=_interface(host))
        os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
        from nixl._api import nixl_agent, nixl_agent_config
        self._agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False))
        self._base = pool.ctypes.data
        self._registered = self._agent.register_memory([(self._base, pool.nbytes, 0, "")], "DRAM")

    def close(self) -> None:
        """Deregister: it crashes at exit otherwise."""
        self._bell.close()
        self._agent.deregister_memory(self._registered)


class NixlReceiver(_Nixl):
    def __init__(self, host: str, pool: np.ndarray, moves: np.ndarray):
        super().__init__("receiver", host, pool)
        self._listener = socket.create_server((host, 0))
        self.contact = {"agent": self._agent.get_agent_metadata().hex(), "pool": self._base,
                        "bell": list(self._listener.getsockname())}

    def accept(self) -> None:
        """Connected when a first notice is here; until it is told so the sender must poll too."""
        self._bell = _Bell(self._listener.accept()[0])
        self.receive()
        self._bell.ring()

    def receive(self) -> None:
        while not self._agent.get_new_notifs():
            pass

    answer_trips = receive

    def close(self) -> None:
        self._listener.close()
        super().close()


class NixlSender(_Nixl):
    def __init__(self, host: str, contact: dict, pool: np.ndarray, moves: np.ndarray):
        super().__init__("sender", host, pool)
        self._there = self._agent.add_remote_agent(bytes.fromhex(contact["agent"]))
        self._indices = np.arange(len(moves), dtype=np.int32)
        self._sides = [self._prepared("NIXL_INIT_AGENT", self._base + moves[:, 0], moves[:, 2]),
                       self._prepared(self._there, contact["pool"] + moves[:, 1], moves[:, 2])]
        self._bell = _Bell(socket.create_connection(tuple(contact["bell"])))
        self._agent.send_notif(self._there, b"connected")
        while not self._bell.rung():
            self._agent.get_new_notifs()

    def _prepared(self, agent: str, starts: np.ndarray, lengths: np.ndarray) -> object:
        rows = np.stack([starts, lengths, np.zeros_like(starts)], axis=1).astype(np.uint64)
        return self._agent.prep_xfer_dlist(agent, rows, "DRAM")

    def send(self) -> None:
        self._write(self._indices, b"in place")

    def trip(self, index: int) -> None:
        last = index + 1 == len(self._indices)
        self._write(self._indices[index:index + 1], b"in place" if last else b"")

    def _write(self, indices: np.ndarray, notice: bytes) -> None:
        here, there = self._sides
        write = self._agent.make_prepped_xfer("WRITE", here, indices, there, indices, notice)
        state = self._agent.transfer(write)
        while state == "PROC":
            state = self._agent.check_xfer_state(write)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended in state {state}")
        self._agent.release_xfer_handle(write)

    def close(self) -> None:
        for side in self._sides:
            self._agent.release_dlist_handle(side)
        self._agent.remove_remote_agent(self._there)
        super().close()


PEERS = {
    "sockets": Peer(None, None, SocketsReceiver, SocketsSender),
    "gloo": Peer("torch", "torch", GlooReceiver, GlooSender),
    "zmq": Peer("zmq", "pyzmq", ZmqReceiver, ZmqSender),
    "mooncake": Peer("mooncake", "mooncake-transfer-engine-non-cuda", MooncakeReceiver,
                     MooncakeSender),
    "nixl": Peer("nixl", "nixl", NixlReceiver, NixlSender),
}

# Behind everything else: what is there may not replace a package of this environment.
if str(_FOLDER) not in sys.path:
    sys.path.append(str(_FOLDER))


def absent(name: str) -> str | None:
    """Return why the peer `name` cannot be run here, and what to do, or None when it is there."""
    module = PEERS[name].module
    if module is None or importlib.util.find_spec(module) is not None:
        return None
    return f"{name} is not installed, so its rows are absent: make peers"


def installed(names: Iterable[str]) -> list[str]:
    """Return those of the peers that can be run here; says on stderr which cannot."""
    reasons = {name: absent(name) for name in names}
    for reason in filter(None, reasons.values()):
        print(reason, file=sys.stderr)
    return [name for name, reason in reasons.items() if reason is None]


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the packages that bring these peers."""
    packages = [PEERS[name].package for name in names if PEERS[name].package]
    return {package: importlib.metadata.version(package) for package in packages}


def _move(ranges: list[memoryview], call) -> None:
    """Give the ranges to `call` (sendmsg or recvmsg), which may do less than it is asked to."""
    for first in range(0, len(ranges), _IOVECS_MAX):
        batch = ranges[first:first + _IOVECS_MAX]
        left = sum(each.nbytes for each in batch)
        while moved := call(batch):
            left -= moved
            if left == 0:
                break
            batch = _rest(batch, moved)
        if left:
            raise ConnectionError(f"the connection ended {left} bytes before the end of a call")


def _rest(batch: list[memoryview], moved: int) -> list[memoryview]:
    ends = list(accumulate(each.nbytes for each in batch))
    at = next(index for index, end in enumerate(ends) if end > moved)
    return [batch[at][moved - ends[at]:], *batch[at + 1:]]


def _read(each: socket.socket, count: int) -> None:
    _move([memoryview(bytearray(count))], lambda batch: each.recv_into(batch[0]))


def _no_delay(each: socket.socket) -> socket.socket:
    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return each


def _demand(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"Mooncake returned {status}")


def _interface(host: str) -> str:
    """Return the name of the network interface that has the IPv4 address `host`."""
    wanted = socket.inet_aton(host)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("<256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if answer[20:24] == wanted:
                return name
    raise RuntimeError(f"no interface here has the address {host}")
