"""Large files past the page cache: their bytes are copied once and cost no page of it.

`DirectWriter` writes while more is made, `read_ahead` reads before it is asked for. Where a file
system knows no direct I/O, or refuses a piece, the same goes through the page cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

__all__ = ["PIECE_BYTES", "DirectWriter", "read_ahead"]

PIECE_BYTES = 4 << 20
_ALIGNMENT_BYTES = 4096  # of addresses, offsets and counts; no disk in use asks for more
_THREADS = 2             # so that the disk has the next piece when it is done with one
_O_DIRECT = getattr(os, "O_DIRECT", 0)

Extent = tuple[int, int]  # offset, bytes


class DirectWriter:
    """A new file, written in pieces by threads of its own.

    A file of less than a piece is written by `sync`, through the page cache.

    Raises, from any method: OSError of any piece.
    """

    def __init__(self, path: str | os.PathLike):
        self._piece, self._filled, self._offset = _new_piece(PIECE_BYTES), 0, 0
        self._threads = ThreadPoolExecutor(_THREADS, "kvwire file writer")
        self._writing: deque[Future[memoryview]] = deque()
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def __enter__(self):
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        os.close(self._fd)

    def write(self, data: bytes) -> None:
        """Append bytes (any C-contiguous buffer); they are copied."""
        data = memoryview(data).cast("B")
        while data:
            count = min(len(data), len(self._piece) - self._filled)
            self._piece[self._filled:self._filled + count] = data[:count]
            self._filled += count
            data = data[count:]
            if self._filled == len(self._piece):
                self._hand_over()

    def sync(self) -> None:
        """Return when all that was written is safe on disk. Nothing may be written afterwards."""
        while self._writing:
            self._writing.popleft().result()
        whole = self._filled // _ALIGNMENT_BYTES * _ALIGNMENT_BYTES
        self._write(self._piece[:whole], self._offset)
        _set_direct(self._fd, False)
        self._write(self._piece[whole:self._filled], self._offset + whole)
        os.fsync(self._fd)

    def _hand_over(self) -> None:
        if not self._offset:
            _set_direct(self._fd, True)
        self._writing.append(_begun(self._threads, self._write, self._piece, self._offset))
        self._offset += len(self._piece)
        self._filled = 0
        if len(self._writing) > _THREADS:
            self._piece = self._writing.popleft().result()
        else:
            self._piece = _new_piece(PIECE_BYTES)

    def _write(self, piece: memoryview, offset: int) -> memoryview:
        left = piece
        while left:
            count = _either_way(self._fd, os.pwrite, left, offset)
            offset += count
            left = left[count:]
        return piece


def read_ahead(file: int, extents: Iterable[Extent], *, direct: bool) -> Iterator[memoryview]:
    """Yield the bytes of each extent of an open file, or as many as it has of it.

    A single one is read at once, through the page cache.

    Args:
        extents: of `PIECE_BYTES` at most, or they are read in more memory.
        direct: past the page cache, for what will not be read again soon.

    A view is good until the next one is asked for. Close the generator if it is not exhausted.
    """
    extents = list(extents)
    if len(extents) < 2:  # nothing to read ahead
        for offset, count in extents:
            yield memoryview(os.pread(file, count, offset))
        return
    fd = _opened_again(file) if direct else os.dup(file)
    threads = ThreadPoolExecutor(_THREADS, "kvwire file reader")
    try:
        reading: deque[Future[tuple[memoryview, memoryview]]] = deque()
        spare: list[memoryview] = []
        for extent in extents:
            piece = spare.pop() if spare else memoryview(b"")
            reading.append(_begun(threads, _read, fd, piece, *extent))
            if len(reading) > _THREADS:
                piece, data = reading.popleft().result()
                yield data
                spare.append(piece)
        while reading:
            yield reading.popleft().result()[1]
    finally:
        threads.shutdown(cancel_futures=True)
        os.close(fd)


def _opened_again(file: int) -> int:
    """Return the same file, whatever its path now names, open for direct I/O where it can be."""
    try:
        return os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
    except OSError:
        return os.dup(file)


def _read(fd: int, piece: memoryview, offset: int, count: int) -> tuple[memoryview, memoryview]:
    """Return the memory to use next time, and the bytes."""
    skipped = offset % _ALIGNMENT_BYTES
    wanted = skipped + count
    room = -(-wanted // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    if room > len(piece):
        piece = _new_piece(max(room, PIECE_BYTES + 2 * _ALIGNMENT_BYTES))
    filled = 0
    while filled < wanted:
        got = _either_way(fd, os.preadv, [piece[filled:room]], offset - skipped + filled)
        if not got:
            break
        filled += got
    return piece, piece[skipped:min(wanted, filled)]


def _new_piece(count: int) -> memoryview:
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Direct I/O does not go with pages that a fork makes shared (open(2)).
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with suppress(OSError, AttributeError):  # kernels are built without
            memory.madvise(getattr(mmap, advice))
    return memoryview(memory)


def _begun(threads: ThreadPoolExecutor, step: Callable, *arguments: object) -> Future:
    """Return a step that a thread does; where none can be had any more, it is done here."""
    try:
        return threads.submit(step, *arguments)
    except RuntimeError:  # the interpreter is about to end, or a limit is reached
        done: Future = Future()
    try:
        done.set_result(step(*arguments))
    except BaseException as error:
        done.set_exception(error)
    return done


def _either_way(fd: int, step: Callable[..., int], *arguments: object) -> int:
    """Do a step, through the page cache if it is refused as it is."""
    try:
        return step(fd, *arguments)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    _set_direct(fd, False)
    return step(fd, *arguments)


def _set_direct(fd: int, direct: bool) -> None:
    """Set the way of an open file, as far as its file system knows both."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~_O_DIRECT
    with suppress(OSError):
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | (_O_DIRECT if direct else 0))
