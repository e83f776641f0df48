"""Every error that kvwire raises: whose fault it is, and what to do next.

    KvwireError                       .code .expected .actual .offset .remote
    ├─ UsageError(ValueError)         you broke the API's contract        → fix the call
    │   ├─ UnsupportedError           kvwire does not handle this thing   → see the message
    │   └─ ForkedError                object used after fork()            → make it in the child
    ├─ FormatError                    bytes break FORMAT.md               → drop the stream or file
    │   ├─ ChecksumError              a checksum or digest differs
    │   ├─ LimitError                 a stated maximum is exceeded
    │   └─ VersionError               no common format version
    ├─ RefusedError                   the two sides do not agree          → fix the configuration
    │   ├─ SpecMismatchError          the cache specs differ; names the field
    │   ├─ AdmissionError             wrong key, certificate or security mode
    │   ├─ TicketError                unknown, expired or used-up ticket or offer
    │   └─ OverlapError               two parts claim the same destination
    ├─ TransferError(OSError)         the network or the peer failed      → a retry is sane
    │   ├─ PeerClosedError            the peer, or the last lane to it, went away
    │   ├─ TransferTimeout(TimeoutError)
    │   └─ TransferCancelled          one of the two sides cancelled
    └─ InternalError                  kvwire's own invariant failed       → report a bug

``KvwireError`` itself is never raised. ``code`` is an `ErrorCode`, the number that FORMAT.md §11
pins and that C++ and the wire use. ``remote`` is true when the peer found the error and told us.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = [
    "ErrorCode", "KvwireError", "UsageError", "UnsupportedError", "ForkedError", "FormatError",
    "ChecksumError", "LimitError", "VersionError", "RefusedError", "SpecMismatchError",
    "AdmissionError", "TicketError", "OverlapError", "TransferError", "PeerClosedError",
    "TransferTimeout", "TransferCancelled", "InternalError", "error_from_code",
]


class ErrorCode(IntEnum):
    """FORMAT.md §11. Numbers are pinned: never reused, never changed."""

    BAD_MAGIC = 100
    VERSION_UNSUPPORTED = 101
    GREETING_CORRUPT = 102
    HEADER_CORRUPT = 103
    RESERVED_BIT_SET = 104
    TYPE_UNKNOWN = 105
    FIELD_INVALID = 106
    LIMIT_EXCEEDED = 107
    CONTROL_CORRUPT = 108
    TRUNCATED = 109
    ROLE_CONFLICT = 110
    STATE_INVALID = 111

    TICKET_UNKNOWN = 200
    TICKET_EXPIRED = 201
    SPEC_MISMATCH = 202
    TOKENS_MISMATCH = 203
    RANK_UNEXPECTED = 204
    OVERLAP = 205
    CODEC_UNSUPPORTED = 206
    TABLE_UNKNOWN = 207
    TRANSFER_UNKNOWN = 208
    TRANSFER_DUPLICATE = 209
    SEGMENT_INVALID = 210
    INCOMPLETE = 211
    PAYLOAD_CORRUPT = 212
    RAW_CORRUPT = 213
    CODED_INVALID = 214
    RETRIES_EXHAUSTED = 215
    DIGEST_MISMATCH = 216
    SOURCE_CHANGED = 217
    CANCELLED = 218
    DEADLINE_EXCEEDED = 219
    OFFER_UNKNOWN = 220
    RESOURCES_EXHAUSTED = 221

    PEER_CLOSED = 300
    CONNECT_FAILED = 301
    GREETING_TIMEOUT = 302
    LINK_LOST = 303
    CLOSED = 304
    LINK_UNKNOWN = 305
    ADMISSION_REFUSED = 306

    USAGE = 400
    UNSUPPORTED = 401
    FORKED = 402

    FILE_NOT_COMMITTED = 500
    FILE_INDEX_CORRUPT = 501

    INTERNAL = 900


class KvwireError(Exception):
    """Base of all kvwire errors; catch it, never raise it.

    Args:
        message: what went wrong, where, and what to do next.
        code: `ErrorCode`; each class has a default.
        expected, actual: the evidence, where there is one (checksums, limits, lengths).
        offset: bytes from the start of the thing the message names.
        remote: the peer found the error and told us.
    """

    default_code = ErrorCode.INTERNAL

    def __init__(self, message: str, *, code: ErrorCode | None = None, expected: object = None,
                 actual: object = None, offset: int | None = None, remote: bool = False):
        super().__init__(message)
        self.code = ErrorCode(code if code is not None else self.default_code)
        self.expected = expected
        self.actual = actual
        self.offset = offset
        self.remote = remote

    def __str__(self) -> str:
        return f"{self.args[0] if self.args else ''} [{self.code.name} {int(self.code)}]"

    def __reduce__(self):
        return _rebuild, (type(self), self.args[0], dict(self.__dict__))


def _rebuild(kind: type, message: str, state: dict) -> KvwireError:
    error = kind(message, code=state["code"])
    error.__dict__.update(state)
    return error


class UsageError(KvwireError, ValueError):
    """The caller broke the API's contract; fix the call."""

    default_code = ErrorCode.USAGE


class UnsupportedError(UsageError):
    """kvwire does not handle this thing; the message names it and says what does work."""

    default_code = ErrorCode.UNSUPPORTED


class ForkedError(UsageError):
    """The object belongs to the parent process; its threads and sockets do not survive a fork."""

    default_code = ErrorCode.FORKED


class FormatError(KvwireError):
    """Bytes break FORMAT.md: the peer, the path or the file is at fault."""

    default_code = ErrorCode.FIELD_INVALID


class ChecksumError(FormatError):
    """A checksum or digest differs; ``expected`` and ``actual`` are the two values."""

    default_code = ErrorCode.PAYLOAD_CORRUPT


class LimitError(FormatError):
    """A stated maximum is exceeded; ``expected`` is the limit, ``actual`` the value."""

    default_code = ErrorCode.LIMIT_EXCEEDED


class VersionError(FormatError):
    """No common format version."""

    default_code = ErrorCode.VERSION_UNSUPPORTED


class RefusedError(KvwireError):
    """The two sides do not agree on what is to be transferred; a retry changes nothing."""

    default_code = ErrorCode.TOKENS_MISMATCH


class SpecMismatchError(RefusedError):
    """The cache specs of the two sides differ; the message names the field and both values."""

    default_code = ErrorCode.SPEC_MISMATCH


class AdmissionError(RefusedError):
    """The peer was not let in, or could not be trusted: keys, certificates or modes differ."""

    default_code = ErrorCode.ADMISSION_REFUSED


class TicketError(RefusedError):
    """The ticket or offer is unknown, expired, or does not expect this rank."""

    default_code = ErrorCode.TICKET_UNKNOWN


class OverlapError(RefusedError):
    """Two parts of a hand-off claim the same destination bytes."""

    default_code = ErrorCode.OVERLAP


class TransferError(KvwireError, OSError):
    """The network or the peer failed; trying again is sane."""

    default_code = ErrorCode.LINK_LOST

    def __str__(self) -> str:
        return KvwireError.__str__(self)


class PeerClosedError(TransferError):
    """The peer, or the last lane to it, went away."""

    default_code = ErrorCode.PEER_CLOSED


class TransferTimeout(TransferError, TimeoutError):
    """A deadline passed."""

    default_code = ErrorCode.DEADLINE_EXCEEDED


class TransferCancelled(TransferError):
    """One of the two sides cancelled the transfer."""

    default_code = ErrorCode.CANCELLED


class InternalError(KvwireError):
    """kvwire's own invariant failed: please report it; the object is poisoned."""


_CLASS_BY_CODE = {
    ErrorCode.VERSION_UNSUPPORTED: VersionError,
    ErrorCode.GREETING_CORRUPT: ChecksumError,
    ErrorCode.HEADER_CORRUPT: ChecksumError,
    ErrorCode.CONTROL_CORRUPT: ChecksumError,
    ErrorCode.PAYLOAD_CORRUPT: ChecksumError,
    ErrorCode.RAW_CORRUPT: ChecksumError,
    ErrorCode.RETRIES_EXHAUSTED: ChecksumError,
    ErrorCode.DIGEST_MISMATCH: ChecksumError,
    ErrorCode.CODED_INVALID: FormatError,
    ErrorCode.SEGMENT_INVALID: FormatError,
    ErrorCode.LIMIT_EXCEEDED: LimitError,
    ErrorCode.RESOURCES_EXHAUSTED: LimitError,
    ErrorCode.SOURCE_CHANGED: UsageError,
    ErrorCode.SPEC_MISMATCH: SpecMismatchError,
    ErrorCode.OVERLAP: OverlapError,
    ErrorCode.TICKET_UNKNOWN: TicketError,
    ErrorCode.TICKET_EXPIRED: TicketError,
    ErrorCode.RANK_UNEXPECTED: TicketError,
    ErrorCode.OFFER_UNKNOWN: TicketError,
    ErrorCode.DEADLINE_EXCEEDED: TransferTimeout,
    ErrorCode.GREETING_TIMEOUT: TransferTimeout,
    ErrorCode.CANCELLED: TransferCancelled,
    ErrorCode.PEER_CLOSED: PeerClosedError,
    ErrorCode.LINK_LOST: PeerClosedError,
    ErrorCode.LINK_UNKNOWN: PeerClosedError,
    ErrorCode.ADMISSION_REFUSED: AdmissionError,
    ErrorCode.TRANSFER_UNKNOWN: TransferError,
    ErrorCode.UNSUPPORTED: UnsupportedError,
    ErrorCode.FORKED: ForkedError,
    ErrorCode.INTERNAL: InternalError,
}
_CLASS_BY_FAMILY = {1: FormatError, 2: RefusedError, 3: TransferError, 4: UsageError,
                    5: FormatError, 9: InternalError}


def error_from_code(code: int, message: str, **evidence) -> KvwireError:
    """Build the exception that stands for a wire or native error code."""
    code = ErrorCode(code)
    kind = _CLASS_BY_CODE.get(code) or _CLASS_BY_FAMILY[int(code) // 100]
    return kind(message, code=code, **evidence)
