"""Reads tests/vectors/vectors.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kvwire.errors import ErrorCode
from kvwire.manifest import Manifest

HERE = Path(__file__).parent


@dataclass(frozen=True)
class StoredVector:
    """One entry of vectors.json; `tickets` are what the reader expects."""

    file: str
    reads: str
    contains: str
    link: str = ""
    lane: int = 0
    tickets: tuple[str, ...] = ()
    error: str = ""

    def __str__(self) -> str:
        return self.file

    @property
    def data(self) -> bytes:
        return (HERE / self.file).read_bytes()

    @property
    def code(self) -> ErrorCode:
        return ErrorCode[self.error]

    def expected(self) -> list[Manifest]:
        return [Manifest.decode(bytes.fromhex(payload)) for payload in self.tickets]


def stored_vectors(reads: str | None = None, valid: bool | None = None) -> list[StoredVector]:
    entries = json.loads((HERE / "vectors.json").read_text())["vectors"]
    vectors = [StoredVector(**entry | {"tickets": tuple(entry.get("tickets", ()))})
               for entry in entries]
    return [vector for vector in vectors if reads in (None, vector.reads)
            and valid in (None, not vector.error)]
