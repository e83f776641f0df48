"""TOML tables that know their lines: every complaint names file, line and field."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

from kvwire.errors import UnsupportedError, UsageError

__all__ = ["Table", "read"]

Made = TypeVar("Made")
_REQUIRED = object()
NUMBER_MAX = 1e15  # of anything that a deployment has, in any unit
_HEADER = re.compile(r"\s*\[\[?\s*([^\]#]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"\s*([A-Za-z0-9_\-.\"' ]+?)\s*=")


def read(path: Path) -> Table:
    """Parse a TOML file.

    Raises:
        UsageError: it is no TOML; names the line. OSError: it cannot be read.
    """
    try:
        import tomllib
    except ImportError:
        try:
            import tomli as tomllib
        except ImportError:
            raise UnsupportedError("Python 3.10 reads no TOML by itself: "
                                   "pip install tomli") from None
    try:
        text = Path(path).read_text("utf-8")
        values = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: is no UTF-8: byte {error.start}") from None
    except RecursionError:
        raise UsageError(f"{path}: is no TOML: nested too deeply") from None
    except ValueError as error:  # TOMLDecodeError is one, and a number of too many digits
        place = re.search(r"\(at line (\d+)", str(error))
        line = place[1] if place else len(text.splitlines())
        raise UsageError(f"{path}:{line}: is no TOML: {error}") from None
    return Table(str(path), (), values, _lines(text))


def _lines(text: str) -> dict[tuple[str, ...], int]:
    """Return the first line of each table and key."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = _parts(header[1])
            found.setdefault(table, number)
        elif key := _KEY.match(line):
            parts = _parts(key[1])
            for end in range(1, len(parts) + 1):
                found.setdefault(table + parts[:end], number)
    return found


def _is_number(value: object) -> bool:
    """Say whether it is 0 or of a size that can be reckoned with; NaN is not."""
    return type(value) in (int, float) and (
        value == 0 or 1 / NUMBER_MAX <= abs(value) <= NUMBER_MAX)


def _parts(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip(" \"'") for part in dotted.split("."))


class Table:
    """One table of a file; remembers what was asked for, so that `finish` finds what was not."""

    def __init__(self, path: str, names: tuple[str, ...], values: Mapping[str, object],
                 lines: Mapping[tuple[str, ...], int]):
        self._path = path
        self._names = names
        self._values = values
        self._lines = lines
        self._asked: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def folder(self) -> Path:
        """Where relative paths of the file start."""
        return Path(self._path).parent

    def error(self, key: str | None, message: str) -> UsageError:
        """Return the error about `key` of this table, or about the table."""
        names = self._names if key is None else (*self._names, key)
        line = next((self._lines[names[:end]] for end in range(len(names), 0, -1)
                     if names[:end] in self._lines), 1)
        return UsageError(f"{self._path}:{line}: {'.'.join(names) or 'the file'}: {message}")

    def make(self, build: Callable[..., Made], *values: object, **named: object) -> Made:
        """Return ``build(*values, **named)``; what it refuses is said of this table's line."""
        try:
            return build(*values, **named)
        except UsageError as error:
            raise self.error(None, error.args[0]) from None

    def table(self, key: str, required: bool = True) -> Table | None:
        """Return the table `key`; None when it is neither there nor required."""
        value = self._get(key, _REQUIRED if required else None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"is {value!r}; wanted is a table [{key}]")
        return Table(self._path, (*self._names, key), value, self._lines)

    def number(self, key: str, default: object = _REQUIRED) -> float | None:
        """Return a finite number."""
        value = self._get(key, default)
        if value is default:
            return value
        if not _is_number(value):
            raise self.error(key, f"is {value!r}; wanted is a number up to {NUMBER_MAX:g}")
        return float(value)

    def integer(self, key: str, default: object = _REQUIRED) -> int | None:
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, int) or not _is_number(value):
            raise self.error(key, f"is {value!r}; wanted is an integer up to {NUMBER_MAX:g}")
        return value

    def text(self, key: str, default: object = _REQUIRED,
             known: Collection[str] | None = None) -> str | None:
        """Return a string, one of `known` where they are given."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, str) or (known is not None and value not in known):
            wanted = "a string" if known is None else f"one of {', '.join(known)}"
            raise self.error(key, f"is {value!r}; wanted is {wanted}")
        return value

    def points(self, key: str) -> tuple[tuple[float, float], ...]:
        """Return a list of pairs of numbers."""
        value = self._get(key, _REQUIRED)
        pairs = value if isinstance(value, list) else [None]
        for index, pair in enumerate(pairs):
            if not (isinstance(pair, list) and len(pair) == 2
                    and all(map(_is_number, pair))):
                where = f"entry {index + 1} is {pair!r}" if pair is not None else f"is {value!r}"
                raise self.error(key, f"{where}; wanted is [[tokens, seconds], ...]")
        return tuple((float(tokens), float(seconds)) for tokens, seconds in pairs)

    def finish(self) -> None:
        """Raise UsageError about the first key that nobody asked for."""
        for key in self._values:
            if key not in self._asked:
                known = ", ".join(sorted(self._asked))
                raise self.error(key, f"is not known here; known are {known}")

    def _get(self, key: str, default: object) -> object:
        self._asked.add(key)
        if key not in self._values:
            if default is _REQUIRED:
                raise self.error(None, f"{key} is missing")
            return default
        return self._values[key]
