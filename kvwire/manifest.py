"""FORMAT.md §7.1 to §7.3: the MANIFEST, the metadata, and the bytes of an item."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from kvwire import limits
from kvwire.errors import ErrorCode, FormatError, UsageError, error_from_code
from kvwire.layout import (
    Axis, AxisSpec, CacheSpec, DType, GroupKind, LayerGroup, Slice, TensorSpec, leaf_count,
)
from kvwire.structure import Cursor, Structure, pack_str

__all__ = ["Manifest", "MetadataType", "decode_metadata", "encode_metadata"]

MANIFEST = Structure(
    "MANIFEST", ticket_id="16s", spec_fingerprint="16s", token_start="Q", token_stop="Q",
    source_rank="H", source_rank_count="H", destination_rank="H", destination_rank_count="H",
    codecs="I", group_count="H", metadata_count="H")

_REPLICATED = 1


class MetadataType(IntEnum):
    """The types of application metadata (§7.1)."""

    INT = 1
    FLOAT = 2
    BOOL = 3
    TEXT = 4
    DATA = 5


@dataclass(frozen=True)
class Manifest:
    """§7.1: opens a transfer."""

    ticket_id: bytes
    spec: CacheSpec
    token_start: int
    token_stop: int
    source_rank: int = 0
    source_rank_count: int = 1
    destination_rank: int = 0
    destination_rank_count: int = 1
    codecs: int = 1
    metadata: Mapping[str, object] = field(default_factory=dict)
    spec_fingerprint: bytes | None = None

    def __post_init__(self):
        if self.spec_fingerprint is None:
            object.__setattr__(self, "spec_fingerprint", self.spec.fingerprint())

    def encode(self) -> bytes:
        """Return the payload; UsageError when the manifest breaks a rule or limit of §7.1."""
        fixed = MANIFEST.pack({**vars(self), "group_count": len(self.spec.groups),
                               "metadata_count": len(self.metadata)})
        data = b"".join((fixed, pack_str(self.spec.model),
                         *(_pack_group(group) for group in self.spec.groups),
                         encode_metadata(self.metadata)))
        try:
            Manifest.decode(data)
        except FormatError as error:
            raise UsageError(f"this cache cannot be described to a peer: {error.args[0]}") from None
        if len(data) > limits.CONTROL_BYTES_MAX:
            raise UsageError(f"the manifest takes {len(data)} bytes, over the limit of "
                             f"{limits.CONTROL_BYTES_MAX}; split the cache spec")
        return data

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        values = MANIFEST.unpack(data)
        _check_fixed(values)
        cursor = Cursor(data, "MANIFEST", MANIFEST.bytes)
        model = cursor.str("model name")
        groups = tuple(_read_group(cursor) for _ in range(values.pop("group_count")))
        if (count := leaf_count(groups)) > limits.LEAF_COUNT_MAX:
            cursor.fail(ErrorCode.LIMIT_EXCEEDED, f"leaf_count is {count}",
                        expected=limits.LEAF_COUNT_MAX, actual=count)
        metadata = decode_metadata(cursor, values.pop("metadata_count"))
        cursor.finish()
        return cls(**values, spec=_built(cursor, CacheSpec, model, groups), metadata=metadata)


def _check_fixed(values: dict) -> None:
    require = MANIFEST.require
    start, stop = values["token_start"], values["token_stop"]
    require(values, "token_stop", start <= stop <= limits.TOKEN_COUNT_MAX,
            ErrorCode.TOKENS_MISMATCH)
    for side in ("source", "destination"):
        count = values[f"{side}_rank_count"]
        require(values, f"{side}_rank", values[f"{side}_rank"] < count, ErrorCode.RANK_UNEXPECTED)
        require(values, f"{side}_rank_count", count <= limits.RANK_COUNT_MAX,
                ErrorCode.RANK_UNEXPECTED, limits.RANK_COUNT_MAX)
    require(values, "codecs", values["codecs"] & 1)
    for what, most in (("group_count", limits.GROUP_COUNT_MAX),
                       ("metadata_count", limits.METADATA_COUNT_MAX)):
        require(values, what, values[what] <= most, ErrorCode.LIMIT_EXCEEDED, most)


def _pack_group(group: LayerGroup) -> bytes:
    head = struct.pack("<BBHII", group.kind, 0, len(group.tensors), len(group.layers),
                       group.window_tokens)
    return b"".join((head, struct.pack(f"<{len(group.layers)}I", *group.layers),
                     *(_pack_tensor(tensor) for tensor in group.tensors)))


def _pack_tensor(tensor: TensorSpec) -> bytes:
    head = struct.pack("<BBBBI", tensor.dtype, _REPLICATED * tensor.replicated, len(tensor.axes),
                       0, tensor.block_tokens)
    return b"".join((pack_str(tensor.name), head, *(
        bytes((spec.axis, len(spec.slices))) + b"".join(
            pack_str(part.name) + struct.pack("<III", part.full, part.start, part.stop)
            for part in spec.slices) for spec in tensor.axes)))


def _read_group(cursor: Cursor) -> LayerGroup:
    kind = _member(cursor, GroupKind, "group kind")
    cursor.reserved(1)
    tensor_count = cursor.number(2, "tensor_count", 1, limits.TENSOR_COUNT_MAX)
    layer_count = cursor.number(4, "layer_count", 1, limits.LAYER_COUNT_MAX)
    window_tokens = cursor.integer(4)
    layers = struct.unpack(f"<{layer_count}I", cursor.take(4 * layer_count))
    tensors = tuple(_read_tensor(cursor) for _ in range(tensor_count))
    return _built(cursor, LayerGroup, kind, layers, tensors, window_tokens)


def _read_tensor(cursor: Cursor) -> TensorSpec:
    name = cursor.str("tensor name", 1)
    dtype = _member(cursor, DType, "dtype")
    flags = cursor.integer(1)
    if flags & ~_REPLICATED:
        cursor.fail(ErrorCode.RESERVED_BIT_SET, f"tensor {name!r}: flags are {flags:#x}",
                    expected=_REPLICATED, actual=flags)
    axis_count = cursor.number(1, "axis_count", 1, limits.AXIS_COUNT_MAX)
    cursor.reserved(1)
    block_tokens = cursor.integer(4)
    axes = tuple(_read_axis(cursor) for _ in range(axis_count))
    return _built(cursor, TensorSpec, name, dtype, axes, block_tokens, bool(flags & _REPLICATED))


def _read_axis(cursor: Cursor) -> AxisSpec:
    axis = _member(cursor, Axis, "axis")
    slice_count = cursor.number(1, "slice_count", 0, limits.SLICE_COUNT_MAX)
    return _built(cursor, AxisSpec, axis, tuple(_read_slice(cursor) for _ in range(slice_count)))


def _read_slice(cursor: Cursor) -> Slice:
    name = cursor.str("slice name")
    full = cursor.number(4, "full", 1, limits.EXTENT_MAX)
    return _built(cursor, Slice, name, full, cursor.integer(4), cursor.integer(4))


def _member(cursor: Cursor, kind: type[IntEnum], what: str) -> IntEnum:
    number = cursor.integer(1)
    try:
        return kind(number)
    except ValueError:
        pass
    cursor.fail(ErrorCode.FIELD_INVALID, f"{what} {number} is not known", actual=number)


def _built(cursor: Cursor, kind: type, *arguments: object):
    """Return ``kind(*arguments)``; a rule of the data model that is broken is the peer's fault."""
    try:
        return kind(*arguments)
    except UsageError as error:
        raise error_from_code(ErrorCode.FIELD_INVALID, f"{cursor.name}: {error.args[0]}",
                              offset=cursor.offset) from None


def encode_metadata(metadata: Mapping[str, object]) -> bytes:
    """Return the entries in rising order of their keys; int, float, bool, str or bytes values."""
    entries = sorted(metadata.items(), key=lambda entry: _metadata_key(entry[0]))
    data = b"".join(pack_str(key) + _pack_value(key, value) for key, value in entries)
    if len(entries) > limits.METADATA_COUNT_MAX or len(data) > limits.METADATA_BYTES_MAX:
        raise UsageError(f"metadata: {len(entries)} entries of {len(data)} bytes; at most "
                         f"{limits.METADATA_COUNT_MAX} of {limits.METADATA_BYTES_MAX} bytes fit")
    return data


def _metadata_key(key: object) -> bytes:
    if not isinstance(key, str) or not key:
        raise UsageError(f"metadata key {key!r} must be a non-empty str")
    return key.encode()


def _pack_value(key: str, value: object) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<B?", MetadataType.BOOL, value)
    if isinstance(value, int):
        if not -1 << 63 <= value < 1 << 63:
            raise UsageError(f"metadata {key!r}: {value} does not fit 64 bits")
        return struct.pack("<Bq", MetadataType.INT, value)
    if isinstance(value, float):
        return struct.pack("<Bd", MetadataType.FLOAT, value)
    if isinstance(value, str):
        return _pack_bytes(MetadataType.TEXT, value.encode())
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _pack_bytes(MetadataType.DATA, bytes(value))
    raise UsageError(f"metadata {key!r} is a {type(value).__name__}; it must be an int, float, "
                     "bool, str or bytes")


def _pack_bytes(kind: MetadataType, data: bytes) -> bytes:
    return struct.pack("<BI", kind, len(data)) + data


def decode_metadata(cursor: Cursor, count: int) -> dict[str, object]:
    """Read `count` metadata entries."""
    start, metadata, last = cursor.offset, {}, b""
    for _ in range(count):
        key = cursor.str("metadata key", 1)
        if key.encode() <= last:
            cursor.fail(ErrorCode.FIELD_INVALID, f"metadata key {key!r} does not rise")
        last = key.encode()
        metadata[key] = _read_value(cursor, key)
        if cursor.offset - start > limits.METADATA_BYTES_MAX:
            cursor.fail(ErrorCode.LIMIT_EXCEEDED, "metadata take too many bytes",
                        expected=limits.METADATA_BYTES_MAX, actual=cursor.offset - start)
    return metadata


def _read_value(cursor: Cursor, key: str) -> object:
    kind = _member(cursor, MetadataType, f"metadata {key!r}: type")
    if kind == MetadataType.INT:
        return cursor.integer(8, signed=True)
    if kind == MetadataType.FLOAT:
        return struct.unpack("<d", cursor.take(8))[0]
    if kind == MetadataType.BOOL:
        value = cursor.integer(1)
        if value > 1:
            cursor.fail(ErrorCode.FIELD_INVALID, f"metadata {key!r}: {value} is no truth value",
                        expected=1, actual=value)
        return bool(value)
    length = cursor.number(4, f"metadata {key!r}: length", 0, limits.METADATA_BYTES_MAX)
    return cursor.text(length, key) if kind == MetadataType.TEXT else cursor.take(length)
