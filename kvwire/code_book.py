"""`CodeBook`: the code tables of the tiered codec (FORMAT.md §9.1), made ahead of time and kept."""

from __future__ import annotations

import errno
import io
import os
import secrets
import struct
import zipfile
from dataclasses import dataclass
from urllib.parse import quote, unquote

import numpy as np

from kvwire import _native, plan
from kvwire.errors import ErrorCode, ForkedError, FormatError, UsageError
from kvwire.layout import Axis, DType, GroupKind
from kvwire.memory import CacheMemory
from kvwire.tiered import element_format

__all__ = ["Calibrated", "CodeBook"]

ENTRIES_MAX = 65_536
_TABLE_BYTES_MAX = 48 + 65_536
_NPY_HEADER_BYTES_MAX = 256
_CHUNK_BYTES = 256 << 10
# What zipfile and numpy raise on bytes that are wrong; EINVAL where an offset is negative.
_DAMAGES = (ValueError, EOFError, OverflowError, RuntimeError, OSError, struct.error,
            zipfile.BadZipFile)


@dataclass(frozen=True)
class Calibrated:
    """What a table is for, and what it promises.

    Attributes:
        shape: held extents, all but TOKEN, in memory order.
        exponent_bits: what an element's exponent should take, all told.
    """

    kind: GroupKind
    layer: int
    tensor: str
    dtype: DType
    shape: tuple[int, ...]
    exponent_bits: float

    @property
    def ratio(self) -> float:
        """Raw bytes to coded bytes, without the table and what frames cost."""
        form = element_format(self.dtype)
        return 8 * form.item_bytes / (form.verbatim_bits + self.exponent_bits)


class CodeBook:
    """Code tables by model, group kind, tensor, layer, dtype and the pattern that elements form.

    A `Sender` has a book of its own and fills it from the first data it sends; one that is given
    a book begins with its tables, and may share it with others: any thread may use it. Tables
    that data has drifted away from are made anew. Up to 256 MiB of tables are kept, the ones asked
    for last. After a fork, a book that a sender was given is the parent's (`ForkedError`).

        book = CodeBook()
        for one in book.calibrate(memory):
            print(one.layer, one.tensor, one.ratio)
        book.save("tables.npz")
        sender = kvwire.Sender(address, codec="tiered", code_book=CodeBook.load("tables.npz"))
    """

    def __init__(self) -> None:
        self._native = _native.CodeBook()
        self._owner: int | None = None

    @property
    def native(self) -> _native.CodeBook:
        """The book in C++."""
        if self._owner not in (None, os.getpid()):  # a forked lock may never open
            raise ForkedError(f"this CodeBook is in use in process {self._owner}: load it again")
        return self._native

    def lend(self) -> _native.CodeBook:
        """Return the book in C++ for threads that do not survive a fork."""
        native, self._owner = self.native, os.getpid()
        return native

    def __len__(self) -> int:
        return len(self.native.tables())

    @property
    def names(self) -> tuple[str, ...]:
        """What there is a table for: "model|kind|tensor|layer|dtype|extents", numbers by FORMAT.md.

        Model and tensor are percent-encoded. Extents are the pattern's without its token axis, so
        that pages in NHD and in HND order have the same.
        """
        return tuple(_name(key) for key, _ in self.native.tables())

    def calibrate(self, memory: CacheMemory, *, skip_tokens: int = 64,
                  chunk_bytes: int = _CHUNK_BYTES) -> list[Calibrated]:
        """Make the tables of all that a filled memory holds, in place of older ones.

        Args:
            memory: is read, in samples.
            skip_tokens: so many first tokens are no samples where there are more than twice as
                many: attention sinks are unlike the rest.
            chunk_bytes: a table is worth its bytes if it saves more on a chunk of that size.

        Returns: what was made, by layer. Tensors of a dtype that has no exponent, and those of
            less than 2,048 elements, have none.
        """
        memory.check_on_host("calibrate()")
        if skip_tokens < 0:
            raise UsageError(f"skip_tokens is {skip_tokens}; it must be at least 0")
        spec, made = memory.spec, []
        groups = plan.to_native(spec)
        for layer in sorted({layer for group in spec.groups for layer in group.layers}):
            for item in memory.items(layer):
                coder = _native.SegmentCoder(
                    self.native, spec.model, groups, plan.native_items([item]),
                    plan.place(spec, [item], memory), chunk_bytes, skip_tokens)
                group = spec.groups[item.group_index]
                tensor = group.tensors[item.tensor_index]
                if (bits := coder.calibrate()) is not None:
                    shape = tuple(axis.held for axis in tensor.axes if axis.axis != Axis.TOKEN)
                    made.append(Calibrated(group.kind, layer, tensor.name, tensor.dtype, shape,
                                           bits))
        return made

    def save(self, path: str | os.PathLike) -> None:
        """Write all tables: an uncompressed .npz of uint8 arrays by their `names`.

        An older file at `path` is replaced once the new one is whole. Raises OSError.
        """
        arrays = {_name(key): np.frombuffer(table, np.uint8)
                  for key, table in self.native.tables()}
        temporary = f"{os.fspath(path)}.{secrets.token_hex(8)}.tmp"
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **arrays)
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike) -> CodeBook:
        """Return the book that a file holds; every table is checked.

        Raises:
            FormatError: the file is no such file, or damaged.
            OSError: it cannot be read.
        """
        book = cls()
        with open(path, "rb") as file:
            try:
                for name, table in _stored_arrays(file):
                    if not book.native.put(_key(name), table):
                        raise ValueError(f"{name!r} is no table for what it is named after")
            except _DAMAGES as error:
                if isinstance(error, OSError) and error.errno != errno.EINVAL:
                    raise
                raise FormatError(f"{os.fspath(path)}: no code book: {error}",
                                  code=ErrorCode.CODED_INVALID) from None
        return book


def _stored_arrays(file):
    """Yield (name, bytes) of each array; never reads more than a table's bytes at once."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if len(members) > ENTRIES_MAX:
            raise ValueError(f"it has {len(members)} entries, at most {ENTRIES_MAX} are allowed")
        for member in members:
            stored = member.compress_type == zipfile.ZIP_STORED
            if not stored or member.file_size > _TABLE_BYTES_MAX + _NPY_HEADER_BYTES_MAX:
                raise ValueError(f"{member.filename!r} is compressed or too large")
            data = io.BytesIO(archive.read(member))
            if np.lib.format.read_magic(data) != (1, 0):
                raise ValueError(f"{member.filename!r} is no array of this format")
            shape, _, dtype = np.lib.format.read_array_header_1_0(data)
            table = data.read()
            if dtype != np.uint8 or shape != (len(table),):
                raise ValueError(f"{member.filename!r} holds no bytes")
            yield member.filename.removesuffix(".npy"), table


def _name(key: tuple) -> str:
    model, kind, tensor, layer, dtype, extents = key
    return "|".join((quote(model, safe=""), str(kind), quote(tensor, safe=""), str(layer),
                     str(dtype), "x".join(map(str, extents))))


def _key(name: str) -> tuple:
    model, kind, tensor, layer, dtype, extents = name.split("|")
    key = (unquote(model, errors="strict"), int(kind), unquote(tensor, errors="strict"),
           int(layer), int(dtype), [int(extent) for extent in extents.split("x")])
    limits = (1 << 8, 1 << 32, 1 << 8, *(4 * [1 << 32]))
    numbers = (key[1], key[3], key[4], *key[5])
    if len(numbers) != len(limits) or not all(0 <= n < m for n, m in zip(numbers, limits)):
        raise ValueError(f"{name!r} names no tensor")
    return key
