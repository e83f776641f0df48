"""What the fault tests share: a proxy that does harm at chosen bytes, a peer that speaks raw
frames, and small caches whose every byte is accounted for."""

import asyncio
import random
import socket
import threading
import time
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest

import kvwire
from kvwire.admission import Acceptor, Dialler
from kvwire.layout import Axis
from kvwire.wire import FLAG_JOIN, Frame, FrameReader, Greeting, Role, encode_frame

UP, DOWN = "up", "down"  # from the dialler to the listener, and back
GREETING_BYTES = 64
ADMISSION_BYTES = 128  # a greeting, a nonce and a proof, either way
HEADER_BYTES = 64
POISON = 0xA5
CARRIERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Fault:
    """What happens, once, to byte `at` of one direction of one lane (None: of every lane).

    flip: it is XORed with `value`. cut: the lane is reset before it. close: both ends see a clean
    end before it. stall: nothing more passes for `value` seconds.
    """

    lane: int | None
    way: str
    at: int
    kind: str
    value: float = 1


class Proxy:
    """Carries the lanes of one link, told apart by the `lane_index` of the dialler's greeting.

    Args:
        target: "host:port".
        faults: as above.
        bytes_per_s: each direction of each lane is slowed down to this.
        edit: (lane, way, header, payload) -> payload; every frame passes through it whole.

    `fired` holds the (fault, lane) that have happened. Once `silent` is set nothing passes any
    more, on new lanes either; all stay connected.
    """

    def __init__(self, target, *faults, bytes_per_s=None, edit=None):
        self.faults, self.bytes_per_s, self.edit = faults, bytes_per_s, edit
        self.passed, self.fired, self.silent = {}, set(), False
        self._target = target.rsplit(":", 1)
        self._writers = {}
        self._tasks = set()
        self._server = on_loop(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.address = "127.0.0.1:%d" % self._server.sockets[0].getsockname()[1]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        on_loop(self._close())

    @property
    def lanes(self):
        return list(self._writers)

    def cut(self, lane, near_end_only=False):
        """Reset one lane now; `near_end_only`: what it has swallowed still reaches the target."""
        on_loop(self._cut(lane, 1 if near_end_only else 2))

    async def _cut(self, lane, ends=2):
        for writer in self._writers.get(lane, ())[:ends]:
            abort(writer)

    async def _close(self):
        if self._server.is_serving():
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        for lane in self._writers:
            await self._cut(lane)

    async def _serve(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        far = None
        try:
            first = await reader.readexactly(GREETING_BYTES)
            lane = int.from_bytes(first[32:34], "little")
            far_reader, far = await asyncio.open_connection(*self._target)
            self._writers[lane] = writer, far
            await asyncio.gather(self._pump(lane, UP, reader, far, first),
                                 self._pump(lane, DOWN, far_reader, writer))
        except (OSError, EOFError, asyncio.CancelledError):
            for end in (writer, far):
                abort(end)
        finally:
            self._tasks.discard(asyncio.current_task())

    async def _pump(self, lane, way, reader, writer, data=b""):
        faults = sorted((fault for fault in self.faults if fault.way == way
                         and fault.lane in (None, lane) and (fault, lane) not in self.fired),
                        key=lambda fault: fault.at)
        offset, editor = 0, Editor(self.edit, lane, way) if self.edit else bytes
        data = data or await reader.read(1 << 16)
        while data:
            data = bytearray(editor(data))
            start = 0
            while faults and faults[0].at < offset + len(data):
                fault, at = faults[0], faults[0].at - offset
                del faults[0]
                self.fired.add((fault, lane))
                if fault.kind == "flip":
                    data[at] ^= int(fault.value)
                    continue
                await self._pass(lane, way, writer, data[start:at])
                start = at
                await harm(fault, writer)
            await self._pass(lane, way, writer, data[start:])
            offset += len(data)
            data = await reader.read(1 << 16)
        writer.write_eof()

    async def _pass(self, lane, way, writer, data):
        step = self.bytes_per_s // 100 if self.bytes_per_s else len(data) or 1
        for start in range(0, len(data), step):
            while self.silent:
                await asyncio.sleep(1)
            writer.write(data[start:start + step])
            await writer.drain()
            if self.bytes_per_s:
                await asyncio.sleep(0.01)
        self.passed[lane, way] = self.passed.get((lane, way), 0) + len(data)


async def harm(fault, writer):
    if fault.kind == "stall":
        await asyncio.sleep(fault.value)
    elif fault.kind == "close":
        writer.write_eof()
        await asyncio.sleep(0.05)
        raise EOFError
    else:
        raise ConnectionResetError


def abort(writer):
    if writer is None:
        return
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()


class Editor:
    """Cuts a stream into its admission and frames, and passes frames through `edit`."""

    def __init__(self, edit, lane, way):
        self._edit, self._place = edit, (lane, way)
        self._reader = FrameReader(Role.RECEIVER if way == UP else Role.SENDER)
        self._admission_left = ADMISSION_BYTES
        self._buffer = bytearray()

    def __call__(self, data):
        self._buffer += data
        out = bytes(self._buffer[:self._admission_left])
        del self._buffer[:len(out)]
        self._admission_left -= len(out)
        while not self._admission_left and len(self._buffer) >= HEADER_BYTES:
            size = HEADER_BYTES + int.from_bytes(self._buffer[4:8], "little")
            if len(self._buffer) < size:
                break
            head, payload = bytes(self._buffer[:HEADER_BYTES]), bytes(self._buffer[64:size])
            del self._buffer[:size]
            out += head + self._edit(*self._place, head, payload)
        return out


@cache
def loop():
    """The event loop that all proxies share, in a thread of its own."""
    made = asyncio.new_event_loop()
    threading.Thread(target=made.run_forever, daemon=True, name="proxies").start()
    return made


def on_loop(coroutine):
    return asyncio.run_coroutine_threadsafe(coroutine, loop()).result(20)


class RawPeer:
    """A peer that writes what it is told and reads frames by the reference implementation.

    It dials without proof unless given a `key`, or the `link_key` of a link to join; one that is
    dialled proves what the dialler does, with `key`.
    """

    def __init__(self, address=None, role=Role.SENDER, sock=None, greet=True, timeout_s=10.0,
                 key=None, link_key=None, **greeting):
        host, _, port = (address or ":").rpartition(":")
        self.sock = sock or socket.create_connection((host, int(port)), timeout_s)
        self.sock.settimeout(timeout_s)
        self.frames, self._reader, self.link_key = [], FrameReader(role), None
        self.greeting = Greeting(role, greeting.pop("link_id", random.randbytes(16)), **greeting)
        if not greet:
            return
        if sock is not None:
            self._admit(Acceptor(self.greeting, lambda peer: key or b"", random.randbytes(32)))
        elif key is None and link_key is None:
            self.write(self.greeting.encode())
            self.read_until(lambda: self._reader.greeting)
        else:
            joins = FLAG_JOIN if link_key is not None else 0
            self._admit(Dialler(replace(self.greeting, flags=joins),
                                key if link_key is None else link_key, random.randbytes(32)))

    def _admit(self, admission):
        self.write(admission.output)
        while not admission.done:
            if not (data := self.sock.recv(1 << 16)):
                raise EOFError("closed before the lane was admitted")
            self.write(admission.feed(data))
        self.greeting, self.link_key = admission.own, admission.link_key
        self._reader = FrameReader(self.greeting.role, greeting=admission.peer)
        self.frames += self._reader.feed(admission.rest)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sock.close()

    def write(self, data):
        self.sock.sendall(data)

    def send(self, kind, transfer_id=bytes(16), payload=b"", **fields):
        payload = payload if isinstance(payload, bytes) else payload.encode()
        self.write(encode_frame(kind, transfer_id, payload, **fields))

    def read_until(self, condition):
        """Read frames until `condition()`; EOFError when the stream ends before."""
        while not condition():
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError(f"closed after {[frame.header.name for frame in self.frames]}")
            self.frames += self._reader.feed(data)

    def expect(self, kind) -> Frame:
        """Return, and take, the next frame of this type; those before it are dropped."""
        self.read_until(lambda: any(frame.header.type == kind for frame in self.frames))
        while (frame := self.frames.pop(0)).header.type != kind:
            pass
        return frame

    def read_to_end(self):
        """Return the frames up to the end of the stream, whether it is clean or a reset."""
        try:
            self.read_until(lambda: False)
        except (EOFError, ConnectionError):
            pass
        return self.frames


class Held:
    """One machine's arrays for any spec: scattered blocks, poisoned margins, random content."""

    def __init__(self, spec, tokens=0, seed=0, writable=False, repeat_blocks=False, **options):
        start, stop = (0, tokens) if isinstance(tokens, int) else tokens
        rng = random.Random(seed)
        self.spec, self.storage, self.arrays, tables = spec, [], {}, {}
        noise = np.random.default_rng(seed)
        for index, group in enumerate(spec.groups):
            size = group.block_tokens
            blocks = -(-stop // size) - start // size if size else 0
            tables[index] = rng.sample(range(blocks + 3), blocks)
            if repeat_blocks and blocks:
                tables[index] = [rng.choice(tables[index]) for _ in range(blocks)]
            for layer in group.layers:
                for tensor in group.tensors:
                    shape = [(tensor.block_tokens or stop - start + 1) if axis.axis == Axis.TOKEN
                             else axis.held for axis in tensor.axes]
                    shape = [blocks + 3, *shape] if tensor.block_tokens else shape
                    self.arrays[index, layer, tensor.name] = self._array(
                        shape, tensor.dtype.item_bytes, None if writable else noise)
        self.memory = kvwire.CacheMemory(spec, self.arrays, tokens=tokens, block_ids=tables,
                                  writable=writable, **options)

    def _array(self, shape, item_bytes, noise):
        size = int(np.prod(shape)) * item_bytes
        raw = np.full(size + 128, POISON, np.uint8)
        if noise is not None:
            raw[:] = noise.integers(0, 256, len(raw), np.uint8)
        self.storage.append(raw)
        return raw[64:64 + size].view(CARRIERS[item_bytes]).reshape(shape)

    def poison(self):
        for raw in self.storage:
            raw[:] = POISON

    def is_poison(self):
        return all((raw == POISON).all() for raw in self.storage)

    def leaves(self):
        """Yield ((kind, layer, leaf name), views of its tokens in order, axes of each view)."""
        for index, group in enumerate(self.spec.groups):
            start, stop = self.memory.token_range(index)
            for layer in group.layers:
                for tensor in group.tensors:
                    array = self.arrays[index, layer, tensor.name]
                    for leaf in tensor.leaves:
                        lie = self.memory.leaves[group.kind, layer, leaf.name].tokens
                        yield ((group.kind, layer, leaf.name), [axis.axis for axis in tensor.axes],
                               list(leaf_views(tensor, leaf, array, lie, start, stop)))

    def content(self):
        """Return {leaf: canonical array}: axes in rising order of `Axis`, tokens in order."""
        found = {}
        for key, axes, views in self.leaves():
            at = axes.index(Axis.TOKEN) if Axis.TOKEN in axes else 0
            array = np.concatenate(views, at) if views else np.empty(0)
            found[key] = array.transpose(sorted(range(len(axes)), key=lambda i: axes[i])) \
                if views else array
        return found

    def only_leaves_were_written(self):
        """True when every byte outside the request's cache is still poison. Destroys it."""
        for _, _, views in self.leaves():
            for view in views:
                view[...] = int.from_bytes(bytes([POISON]) * view.itemsize, "little")
        return self.is_poison()


def leaf_views(tensor, leaf, array, lie, start, stop):
    at = [axis.axis for axis in tensor.axes]
    index = [slice(None)] * len(at)
    if tensor.fused_axis is not None:
        place = at.index(tensor.fused_axis)
        index[place] = slice(leaf.offset, leaf.offset + leaf.axes[place].held)
    if lie is None:
        yield array[tuple(index)]
        return
    token = at.index(Axis.TOKEN)
    size = tensor.block_tokens
    while start < stop:
        upto = min(stop, (start // size + 1) * size) if size else stop
        low = start - lie.origin
        if size:
            block = array[lie.block_ids[low // size]]
            index[token] = slice(low % size, low % size + upto - start)
            yield block[tuple(index)]
        else:
            index[token] = slice(low, low + upto - start)
            yield array[tuple(index)]
        start = upto


def same_content(source, target):
    ours, theirs = source.content(), target.content()
    return ours.keys() == theirs.keys() and all(
        ours[key].tobytes() == theirs[key].tobytes() for key in ours)


def eventually(condition, timeout_s=10.0):
    """Return True as soon as `condition()` is true; fail the test when it is not in time."""
    due = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > due:
            raise AssertionError(f"it did not come about in {timeout_s} s")
        time.sleep(0.005)
    return True


class Ends:
    """A receiver and a sender; with `bytes_per_s`, a slow path between them."""

    def __init__(self, bytes_per_s=None, receiver=None, **sender):
        self.receiver = kvwire.Receiver(**receiver or {})
        self.proxy = Proxy(self.receiver.address, bytes_per_s=bytes_per_s) if bytes_per_s else None
        self.sender = kvwire.Sender((self.proxy or self.receiver).address, **sender)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.sender.close()
        self.receiver.close()
        if self.proxy:
            self.proxy.__exit__()


def fails(handle, kind, code, timeout_s=10):
    """Wait for a transfer or ticket to fail; return its error, of this class and code."""
    with pytest.raises(kind) as caught:
        handle.result(timeout_s)
    assert caught.value.code == code, caught.value
    return caught.value


def fail_both(ticket, transfer, kind, code, found_by="receiver"):
    """The side that found it and the side that was told say the same."""
    here = fails(ticket, kind, code)
    there = fails(transfer, kind, code)
    assert (here.remote, there.remote) == (found_by == "sender", found_by == "receiver")
    assert (here.expected, here.actual) == (there.expected, there.actual)
    assert here.layers == ticket.report()
    assert all(transfer._native.pushes_returned())
    return here
