"""FORMAT.md §9.2: the frames about code tables, and what a receiver keeps of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from kvwire import limits
from kvwire.errors import ErrorCode, KvwireError
from kvwire.structure import Structure, fail
from kvwire.tiered import CodeTable
from kvwire.wire import FrameType

__all__ = ["ReceivedTables", "SentTables", "TableAnswer", "TableName", "TableState",
           "decode_answers", "decode_names", "decode_table", "encode_answers", "encode_names",
           "encode_table", "holds_structure"]

TABLE_NAME = Structure("TABLE_NAMES", table_index="I", reserved="I", table_name="16s")
TABLE_ANSWER = Structure("TABLE_ANSWER", table_index="I", state="I")
TABLE_FRAME = Structure("TABLE", table_index="I", reserved="I")


class TableState(IntEnum):
    """What a receiver says of a table."""

    KNOWN = 1
    WANTED = 2
    REFUSED = 3


@dataclass(frozen=True)
class TableName:
    """`table_name`: the first 16 bytes of the SHA-256 of the table's bytes."""

    table_index: int
    table_name: bytes


@dataclass(frozen=True)
class TableAnswer:
    """Whether the receiver has a table."""

    table_index: int
    state: TableState


def _unpacked(structure: Structure, data: bytes, offset: int = 0) -> dict:
    values = structure.unpack(data, offset)
    structure.require(values, "table_index",
                      1 <= values["table_index"] <= limits.TABLE_COUNT_MAX)
    if "reserved" in values:
        structure.require_zero(values, "reserved")
    return values


def encode_names(names: Sequence[TableName]) -> bytes:
    """Return the payload of a TABLE_NAMES."""
    return b"".join(TABLE_NAME.pack(vars(name)) for name in names)


def decode_names(data: bytes) -> list[TableName]:
    """Return what a TABLE_NAMES says; raises FormatError."""
    found = (_unpacked(TABLE_NAME, data, at) for at in range(0, len(data), TABLE_NAME.bytes))
    return [TableName(values["table_index"], values["table_name"]) for values in found]


def encode_answers(answers: Sequence[TableAnswer]) -> bytes:
    """Return the payload of a TABLE_ANSWER."""
    return b"".join(TABLE_ANSWER.pack(vars(answer)) for answer in answers)


def decode_answers(data: bytes) -> list[TableAnswer]:
    """Return what a TABLE_ANSWER says; raises FormatError."""
    answers = []
    for at in range(0, len(data), TABLE_ANSWER.bytes):
        values = _unpacked(TABLE_ANSWER, data, at)
        TABLE_ANSWER.require(values, "state", values["state"] in tuple(TableState))
        answers.append(TableAnswer(values["table_index"], TableState(values["state"])))
    return answers


def holds_structure(kind: int, payload: bytes) -> bool:
    """Return whether a frame is about tables and has the length of its structure."""
    if kind == FrameType.TABLE:
        return len(payload) >= TABLE_FRAME.bytes
    structure = {FrameType.TABLE_NAMES: TABLE_NAME, FrameType.TABLE_ANSWER: TABLE_ANSWER}.get(kind)
    if structure is None:
        return False
    entries, rest = divmod(len(payload), structure.bytes)
    return rest == 0 and 1 <= entries <= limits.TABLE_ENTRY_COUNT_MAX


def decode_table(data: bytes) -> tuple[int, bytes]:
    """Return the index and the bytes that a TABLE has for it."""
    return _unpacked(TABLE_FRAME, data)["table_index"], data[TABLE_FRAME.bytes:]


def encode_table(table_index: int, table: bytes) -> bytes:
    """Return the payload of a TABLE."""
    return TABLE_FRAME.pack({"table_index": table_index}) + table


@dataclass
class SentTables:
    """The tables of one link, at the sender."""

    tables: list[CodeTable] = field(default_factory=list)  # of index 1 and up
    answered: dict[int, TableState] = field(default_factory=dict)  # KNOWN or REFUSED
    unsaid: list[int] = field(default_factory=list)
    sent: set[int] = field(default_factory=set)

    def index_of(self, table: CodeTable) -> int:
        """Return what a part says of its table: 0 until the receiver is known to have it."""
        if table not in self.tables:
            self.tables.append(table)
            self.unsaid.append(len(self.tables))
        index = self.tables.index(table) + 1
        return index if self.answered.get(index) == TableState.KNOWN else 0

    def names(self) -> bytes:
        """Return the TABLE_NAMES of all that is to be named; empty: nothing is."""
        unsaid, self.unsaid = self.unsaid, []
        return encode_names([TableName(index, self.tables[index - 1].name) for index in unsaid])

    def on_answer(self, payload: bytes) -> list[bytes]:
        """Return the TABLEs that a TABLE_ANSWER asks for."""
        wanted = []
        for answer in decode_answers(payload):
            index, state = answer.table_index, answer.state
            if index > len(self.tables):
                fail(ErrorCode.FIELD_INVALID, "TABLE_ANSWER: no such table", actual=index,
                     expected=len(self.tables))
            if index in self.answered or index in self.sent and state == TableState.WANTED:
                continue
            if state == TableState.WANTED:
                self.sent.add(index)
                wanted.append(encode_table(index, self.tables[index - 1].encode()))
            else:
                self.answered[index] = state
        return wanted

    def lane_lost(self) -> None:
        """Forget what the peer may not have heard, or what it said of it."""
        self.unsaid = [index for index in range(1, len(self.tables) + 1)
                       if index not in self.answered]
        self.sent.clear()


@dataclass
class ReceivedTables:
    """The tables of one link, at the receiver."""

    names: dict[int, bytes] = field(default_factory=dict)
    tables: dict[int, CodeTable] = field(default_factory=dict)
    refused: set[int] = field(default_factory=set)
    bytes_held: int = 0

    def answer(self, kind: int, payload: bytes) -> bytes | None:
        """Return the TABLE_ANSWER to a skippable frame, None to others and where it is skipped."""
        act = {FrameType.TABLE_NAMES: self.on_names, FrameType.TABLE: self.on_table}.get(kind)
        return act(payload) if act and holds_structure(kind, payload) else None

    def on_names(self, payload: bytes) -> bytes:
        """Return the TABLE_ANSWER to a TABLE_NAMES."""
        answers = []
        for said in decode_names(payload):
            if self.names.setdefault(said.table_index, said.table_name) != said.table_name:
                fail(ErrorCode.FIELD_INVALID, "TABLE_NAMES: the number has another name",
                     actual=said.table_index)
            answers.append(TableAnswer(said.table_index, self._state(said.table_index)))
        return encode_answers(answers)

    def on_table(self, payload: bytes) -> bytes:
        """Return the TABLE_ANSWER to a TABLE."""
        index, data = decode_table(payload)
        if index not in self.names:
            fail(ErrorCode.FIELD_INVALID, "TABLE: the table was not named", actual=index)
        if self._state(index) == TableState.WANTED:
            self._take(index, data)
        return encode_answers([TableAnswer(index, self._state(index))])

    def _state(self, index: int) -> TableState:
        if index in self.tables:
            return TableState.KNOWN
        return TableState.REFUSED if index in self.refused else TableState.WANTED

    def _take(self, index: int, data: bytes) -> None:
        self.refused.add(index)
        if hashlib.sha256(data).digest()[:16] != self.names[index] or (
                self.bytes_held + len(data) > limits.TABLE_BYTES_MAX):
            return
        try:
            table, taken = CodeTable.decode(data)
        except KvwireError:
            return
        if taken == len(data):
            self.refused.remove(index)
            self.tables[index] = table
            self.bytes_held += len(data)
