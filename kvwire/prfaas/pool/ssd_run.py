"""`SsdRun`: what one file of the SSD tier holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvwire.prfaas.pool.blocks import BlockGeometry, Chain, Entry

__all__ = ["SsdRun"]


@dataclass(eq=False)
class SsdRun(Entry):
    """A file of the tier. It follows the block `parent` of another run, or begins a prefix (b"").

    `saves_from`: the depth of the nearest checkpoint before its own, when it was written.
    """

    path: Path
    tenant_key: bytes
    parent: bytes
    start: int
    hashes: tuple[bytes, ...]
    state: bool
    file_bytes: int
    before: SsdRun | None = None
    children: set[SsdRun] = field(default_factory=set)
    saves_from: int = 0

    def __post_init__(self):
        super().__init__()

    @property
    def evictable(self) -> bool:
        return not (self.references or self.children)

    def worth(self, geometry: BlockGeometry) -> tuple[int, int, int] | None:
        """A run goes with those before it that only it makes useful; see `Entry.worth`."""
        if not geometry.state_blocks:
            return self.start, self.stop, len(self.hashes)
        if not self.state:
            return None
        blocks, at = len(self.hashes), self.before
        while at is not None and not at.state and len(at.children) == 1:
            blocks += len(at.hashes)
            at = at.before
        return self.saves_from, self.stop, blocks + geometry.state_blocks

    @property
    def stop(self) -> int:
        return self.start + len(self.hashes)

    @property
    def end_hash(self) -> bytes:
        return self.hashes[-1] if self.hashes else self.parent

    @property
    def chain(self) -> Chain:
        first = self
        while first.before is not None:
            first = first.before
        return Chain(self.tenant_key, first.hashes[0])

    def metadata(self) -> dict[str, object]:
        return {"prefix.tenant_key": self.tenant_key, "prefix.parent": self.parent,
                "prefix.start": self.start, "prefix.hashes": b"".join(self.hashes),
                "prefix.state": self.state}
