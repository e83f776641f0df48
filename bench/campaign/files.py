"""Cache files that meet full disks, killed writers and damage."""

from __future__ import annotations

import os
import random
import resource
from pathlib import Path

import kvwire
from bench.campaign.cargo import Held
from bench.campaign.plan import Plan

__all__ = ["Filing"]


class Filing:
    """Lives in a process of its own, which may be killed while it saves."""

    def __init__(self):
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)

    async def save(self, plan: Plan, which: int, path: str, limit_bytes: int | None = None
                   ) -> str | None:
        """Save one cargo; returns the error of a disk that is full after `limit_bytes`."""
        memory = self._held(plan, which, writable=False).memory
        if limit_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, self._before[1]))
        try:
            kvwire.save(path, memory, codec=plan.codec, metadata={"which": which})
        except OSError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._before)
        return None

    async def damage(self, plan: Plan, path: str) -> None:
        rng = random.Random(plan.seed)
        content = bytearray(Path(path).read_bytes())
        kind = rng.choice(("flip", "cut", "swap", "append"))
        at = rng.randrange(len(content))
        if kind == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:]
        elif kind == "swap":
            other = rng.randrange(len(content))
            count = min(64, len(content) - max(at, other))
            content[at:at + count], content[other:other + count] = (
                content[other:other + count], content[at:at + count])
        else:
            content += rng.randbytes(rng.randrange(1, 200))
        Path(path).write_bytes(content)

    async def load(self, plan: Plan, path: str) -> dict[str, object]:
        """Load whichever cargo the file says it holds, and compare; says what it found."""
        leftovers = [name for name in os.listdir(os.path.dirname(path))
                     if name != os.path.basename(path)]
        try:
            which = kvwire.inspect(path).metadata["which"]
            held = self._held(plan, which, writable=True)
            kvwire.load(path, held.memory)
        except kvwire.KvwireError as error:
            return {"error": f"{type(error).__name__}: {error}", "code": error.code.name,
                    "typed": isinstance(error, (kvwire.FormatError, kvwire.RefusedError)),
                    "leftovers": leftovers, "wrong": None, "which": None}
        report = dict.fromkeys(held.cargo.all_layers, "ready")
        return {"error": None, "code": "", "typed": False, "leftovers": leftovers,
                "wrong": held.wrong(report), "which": which}

    def _held(self, plan: Plan, which: int, writable: bool) -> Held:
        return plan.cargoes[which % len(plan.cargoes)].held(writable)
