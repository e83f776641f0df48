"""Files past the page cache: every size, refusals of the file system, disks that fail."""

import errno
import os
import random

import pytest

from kvwire import direct_io
from kvwire.direct_io import DirectWriter, read_ahead

PAGE = 4096
PIECE = 4 * PAGE


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(direct_io, "PIECE_BYTES", PIECE)


def written(path, data, step=1000):
    with DirectWriter(path) as file:
        for at in range(0, len(data), step):
            file.write(data[at:at + step])
        file.sync()
    return path.read_bytes()


def read(path, extents, direct):
    with open(path, "rb") as file:
        return [bytes(view) for view in read_ahead(file.fileno(), extents, direct=direct)]


@pytest.mark.parametrize("count", [0, 1, PAGE, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE,
                                   7 * PIECE + PAGE, 9 * PIECE + 5])
def test_every_size_is_written_whole(tmp_path, count):
    data = random.Random(count).randbytes(count)
    assert written(tmp_path / "file", data) == data
    assert written(tmp_path / "at once", data, max(1, count)) == data


@pytest.mark.parametrize("direct", [False, True])
def test_extents_come_in_order_wherever_they_lie(tmp_path, direct):
    data = random.Random(1).randbytes(11 * PIECE + 77)
    path = tmp_path / "file"
    path.write_bytes(data)
    extents = [(0, 1), (5, PIECE), (PAGE, PAGE), (3, 4 * PIECE), (0, 0), (len(data) - 9, 9),
               (len(data) - 9, 50), (len(data) + PAGE, 7)] + [(at, 100) for at in range(0, 900, 9)]
    assert read(path, extents, direct) == [data[at:at + count] for at, count in extents]


def test_what_was_opened_is_read_whatever_the_path_names_now(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old" * PAGE)
    with open(path, "rb") as file:
        path.unlink()
        path.write_bytes(b"new" * PAGE)
        assert [bytes(view) for view in read_ahead(file.fileno(), [(0, 9)], direct=True)] == [
            b"oldoldold"]


@pytest.mark.parametrize("refused", ["at once", "later", "by half"])
def test_a_file_system_without_direct_io_serves_as_well(tmp_path, monkeypatch, refused):
    """A refused piece, or a short one, goes through the page cache."""
    real, left = os.pwrite, [0 if refused == "at once" else 2]

    def pwrite(fd, data, at):
        left[0] -= 1
        if direct_io.fcntl.fcntl(fd, direct_io.fcntl.F_GETFL) & os.O_DIRECT and left[0] < 0:
            if refused != "by half" or at % PAGE:
                raise OSError(errno.EINVAL, "not here, or not so")
            return min(PAGE // 2, real(fd, data[:PAGE], at))  # as if it had stopped there
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    data = random.Random(2).randbytes(6 * PIECE + 99)
    assert written(tmp_path / "file", data) == data


@pytest.mark.parametrize("piece", range(5))
def test_a_disk_that_fails_is_told_of(tmp_path, monkeypatch, piece):
    """Whichever piece it is, and nothing is left open."""
    real, left = os.pwrite, [piece]

    def pwrite(fd, data, at):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", bytes(4 * PIECE + 5))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_reader_that_stops_early_leaves_nothing_open(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(9 * PIECE))
    before = len(os.listdir("/proc/self/fd"))
    with open(path, "rb") as file:
        ahead = read_ahead(file.fileno(), [(0, PIECE)] * 9, direct=True)
        next(ahead)
        ahead.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_threads_the_same_is_done_at_once(tmp_path, monkeypatch):
    def refuse(self, *step):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(direct_io.ThreadPoolExecutor, "submit", refuse)
    data = random.Random(0).randbytes(9 * PIECE + 5)
    assert written(tmp_path / "file", data) == data
    extents = [(at, PIECE) for at in range(0, len(data), PIECE)]
    assert b"".join(read(tmp_path / "file", extents, True)) == data
