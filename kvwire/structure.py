"""Fixed structures of FORMAT.md in little-endian bytes, and a cursor that checks what it reads."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from kvwire.errors import ErrorCode, UsageError, error_from_code

__all__ = ["Cursor", "Structure", "fail", "pack_str"]


def fail(code: ErrorCode, message: str, **evidence) -> None:
    """Raise the error that stands for `code`."""
    raise error_from_code(code, message, **evidence)


class Structure:
    """Fields without padding: ``Structure("GRANT", window_bytes="Q", codecs="I", ...)``.

    `fields` maps each name to (offset, bytes); `bytes` is the length of all.
    """

    def __init__(self, name: str, **codes: str):
        self.name = name
        self.fields: dict[str, tuple[int, int]] = {}
        offset = 0
        for field, code in codes.items():
            self.fields[field] = (offset, struct.calcsize("<" + code))
            offset += self.fields[field][1]
        self.bytes = offset
        self._struct = struct.Struct("<" + "".join(codes.values()))
        self._zeros = {field: b"" if code.endswith("s") else 0 for field, code in codes.items()}

    def pack(self, values: Mapping[str, object]) -> bytes:
        """Return the bytes; fields that `values` lacks (the reserved ones) are 0."""
        try:
            return self._struct.pack(*(values.get(field, zero)
                                       for field, zero in self._zeros.items()))
        except struct.error as error:
            raise UsageError(f"{self.name}: a field does not fit its bytes: {error}") from None

    def unpack(self, data: bytes, offset: int = 0) -> dict[str, object]:
        if len(data) - offset < self.bytes:
            fail(ErrorCode.TRUNCATED, f"{self.name}: the bytes end inside it",
                 expected=self.bytes, actual=len(data) - offset, offset=offset)
        return dict(zip(self.fields, self._struct.unpack_from(data, offset)))

    def require(self, values: Mapping[str, object], field: str, holds: bool,
                code: ErrorCode = ErrorCode.FIELD_INVALID, expected: object = None) -> None:
        """Raise `code` about `field` unless its rule holds."""
        if not holds:
            value = values[field]
            shown = value.hex() if isinstance(value, bytes) else value
            wanted = "" if expected is None else f", expected {expected}"
            fail(code, f"{self.name}: {field} is {shown}{wanted}", expected=expected,
                 actual=value, offset=self.fields[field][0])

    def require_zero(self, values: Mapping[str, object], field: str) -> None:
        """Raise RESERVED_BIT_SET unless the reserved `field` is 0."""
        value = values[field]
        zero = not any(value) if isinstance(value, bytes) else value == 0
        self.require(values, field, zero, ErrorCode.RESERVED_BIT_SET, 0)


class Cursor:
    """Reads a control payload from front to back; TRUNCATED when a structure runs past its end."""

    def __init__(self, data: bytes, name: str, offset: int = 0):
        self.data = bytes(data)
        self.name = name
        self.offset = offset

    def fail(self, code: ErrorCode, message: str, **evidence) -> None:
        fail(code, f"{self.name}: {message}", offset=self.offset, **evidence)

    def take(self, count: int) -> bytes:
        left = len(self.data) - self.offset
        if count > left:
            self.fail(ErrorCode.TRUNCATED, f"{count} bytes are wanted, {left} are left",
                      expected=count, actual=left)
        self.offset += count
        return self.data[self.offset - count:self.offset]

    def integer(self, count: int, signed: bool = False) -> int:
        return int.from_bytes(self.take(count), "little", signed=signed)

    def number(self, count: int, what: str, low: int, high: int) -> int:
        """Return an integer of `count` bytes; over `high` is LIMIT_EXCEEDED."""
        value = self.integer(count)
        if value > high:
            self.fail(ErrorCode.LIMIT_EXCEEDED, f"{what} is {value}, over {high}",
                      expected=high, actual=value)
        if value < low:
            self.fail(ErrorCode.FIELD_INVALID, f"{what} is {value}, below {low}",
                      expected=low, actual=value)
        return value

    def reserved(self, count: int) -> None:
        value = self.integer(count)
        if value:
            self.fail(ErrorCode.RESERVED_BIT_SET, f"a reserved byte before here is {value}",
                      expected=0, actual=value)

    def text(self, count: int, what: str) -> str:
        data = self.take(count)
        try:
            return data.decode()
        except UnicodeDecodeError:
            self.fail(ErrorCode.FIELD_INVALID, f"{what} is no UTF-8: {data[:32]!r}")

    def str(self, what: str, low: int = 0) -> str:
        """Return a `str` of FORMAT.md §2, of at least `low` bytes."""
        text = self.text(self.number(1, f"length of {what}", low, 255), what)
        if "\0" in text:
            self.fail(ErrorCode.FIELD_INVALID, f"{what} holds a NUL: {text!r}")
        return text

    def finish(self) -> None:
        left = len(self.data) - self.offset
        if left:
            self.fail(ErrorCode.FIELD_INVALID, f"{left} bytes follow the last structure",
                      expected=0, actual=left)


def pack_str(text: str) -> bytes:
    """Return a `str` of FORMAT.md §2."""
    data = text.encode()
    if len(data) > 255 or b"\0" in data:
        raise UsageError(f"{text!r} must be at most 255 UTF-8 bytes without NUL")
    return bytes((len(data),)) + data
