"""FORMAT.md §7.12: what a receiver reports of its own speed, for the sender's choice of codecs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvwire import limits
from kvwire.structure import Structure

__all__ = ["SPEED", "SPEEDS", "Speeds"]

SPEEDS = Structure("SPEEDS", receive_bytes_per_s="Q", threads="H", speed_count="H",
                   unused="4s")
SPEED = Structure("SPEEDS entry", codec="B", dtype="B", unused="6s", decode_bytes_per_s="Q")


@dataclass(frozen=True)
class Speeds:
    """A receiver's speeds.

    Attributes:
        receive_bytes_per_s: what one core takes from its sockets; 0: not known.
        threads: cores that receive and decode.
        decode_bytes_per_s: raw bytes that one core verifies and places, by (codec, dtype).
    """

    receive_bytes_per_s: int = 0
    threads: int = 1
    decode_bytes_per_s: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def encode(self) -> bytes:
        entries = [SPEED.pack({"codec": codec, "dtype": dtype, "decode_bytes_per_s": speed})
                   for (codec, dtype), speed in sorted(self.decode_bytes_per_s.items())]
        return SPEEDS.pack({**vars(self), "speed_count": len(entries)}) + b"".join(entries)

    @classmethod
    def decode(cls, data: bytes) -> Speeds | None:
        """Return what `data` says; None where it breaks the format, and says nothing."""
        if len(data) < SPEEDS.bytes:
            return None
        values = SPEEDS.unpack(data)
        count = values["speed_count"]
        if (values["threads"] == 0 or count > limits.SPEED_COUNT_MAX
                or len(data) != SPEEDS.bytes + count * SPEED.bytes):
            return None
        entries = [SPEED.unpack(data, SPEEDS.bytes + i * SPEED.bytes) for i in range(count)]
        return cls(values["receive_bytes_per_s"], values["threads"],
                   {(entry["codec"], entry["dtype"]): entry["decode_bytes_per_s"]
                    for entry in entries})
