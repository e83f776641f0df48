"""`SsdTier`: prefixes in kvwire cache files, which are whole or not there.

One file holds a *run*: consecutive blocks of one prefix, and the checkpoint at their end if there
is one. Its metadata say whose prefix it is, what comes before, and the hashes of its blocks; what
a file says is checked against what was asked for, and all that is read against its checksums.

A file appears under its name when it is safe on disk, by a rename, and never changes. Whatever
moment the process dies at, the next one finds whole runs and perhaps ``*.tmp`` files, which it
removes. Runs go leaf first, so that no run is left without the one it follows.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvwire import files
from kvwire.errors import ErrorCode, FormatError, KvwireError, UsageError
from kvwire.file_reader import CacheFile, FileReader
from kvwire.memory import CacheMemory
from kvwire.prfaas.pool.admission import AdmissionPolicy
from kvwire.prfaas.pool.blocks import BlockGeometry, Chain, Match
from kvwire.prfaas.pool.eviction import EvictionPolicy, EvictionQueue, Lru
from kvwire.prfaas.pool.hashes import HASH_BYTES
from kvwire.prfaas.pool.ssd_run import SsdRun

__all__ = ["SsdStats", "SsdTier"]

_SUFFIX = ".kvc"
_RUN_BLOCKS_MAX = 2048  # their hashes are metadata of the file, of which 64 KiB fit

MemoryOf = Callable[[int, int, bool], CacheMemory]
"""(first block, block after the last, with the checkpoint at the end) -> where they lie."""


@dataclass(frozen=True)
class SsdStats:
    """What the tier holds and has done so far.

    Attributes:
        damaged_files: that were found broken or foreign, and removed.
        full: prefixes that were not written because nothing could be evicted for them.
        refused: runs that were not worth a write.
    """

    runs: int
    file_bytes: int
    capacity_bytes: int
    written_runs: int
    evicted_runs: int
    damaged_files: int
    full: int
    refused: int


class SsdTier:
    """Prefixes of one model in a folder.

    Args:
        folder: made if missing. Files of other models and block sizes lie in folders of their
            own in it, each of which one tier at a time may use.
        memory_spec_fingerprint: `CacheSpec.fingerprint` of what is written.
        geometry: of the blocks.
        capacity_bytes: of all files together.
        codec: of the files: "raw", "lz4" or "tiered".
        on_gone: called with (chain, hashes of blocks, hash of a checkpoint or None) for each run
            that has gone, without any lock.
        admission: which runs are written; None: all.
        policy: which run goes first, of those that none follows; `Lru` by default. After a restart
            the time of writing stands for the last use.

    Threads: every method may be called from any thread. Files are read and written without the
    lock.

    Raises: UsageError: another tier, in this or another process, has the folder.
    """

    def __init__(self, folder: str | os.PathLike, memory_spec_fingerprint: bytes,
                 geometry: BlockGeometry, capacity_bytes: int, *, codec: str = "raw",
                 policy: EvictionPolicy | None = None, admission: AdmissionPolicy | None = None,
                 on_gone: Callable[[Chain, Sequence[bytes], bytes | None], object] | None = None):
        if capacity_bytes < 0:
            raise UsageError(f"capacity_bytes is {capacity_bytes}; it must not be negative")
        self.geometry, self.capacity_bytes = geometry, capacity_bytes
        self._codec, self._admission, self._on_gone = codec, admission, on_gone
        self._gone: list[SsdRun] = []
        self._folder = Path(folder) / f"{memory_spec_fingerprint.hex()}-{geometry.block_tokens}"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._claim = _claimed(self._folder)
        self._lock, self._write_lock = threading.RLock(), threading.Lock()
        self._blocks: dict[bytes, tuple[SsdRun, int]] = {}  # and the block's depth
        self._states: dict[bytes, SsdRun] = {}
        self._runs: set[SsdRun] = set()
        self._queue = EvictionQueue(policy if policy is not None else Lru(), geometry)
        self._file_bytes = 0
        self._written = self._evicted = self._damaged = self._full = self._refused = 0
        self._recover()

    def close(self) -> None:
        """Let another tier have the folder. Idempotent; nothing may be read or written then."""
        self._claim.close()

    # ---- find

    def match(self, hashes: Sequence[bytes], tenant_key: bytes) -> Match:
        """Return what the files hold of a prompt."""
        with self._lock:
            kv_blocks = self._deepest(hashes, tenant_key)
            usable = kv_blocks
            if self.geometry.state_blocks:
                while usable and hashes[usable - 1] not in self._states:
                    usable -= 1
        tokens = usable * self.geometry.block_tokens
        return Match(kv_blocks, tokens, tokens)

    def read(self, hashes: Sequence[bytes], tenant_key: bytes, start: int, memory_of: MemoryOf, *,
             state: bool = True) -> None:
        """Read the blocks from `start` to the end of `hashes`, and the checkpoint there.

        Raises:
            UsageError: the tier does not hold them: `match` says what it holds.
            FormatError: a file is damaged. It is removed, with the runs that follow it, and what
                was read must not be used.
            OSError: a file cannot be read; treated alike.
        """
        with self._lock:
            parts = self._parts(hashes, tenant_key, start, state)
            for run, _, _, _ in parts:
                run.references += 1
            self._use(parts[-1][0] if parts else None)
        try:
            for run, low, high, with_state in parts:
                self._read_run(run, memory_of(low, high, with_state),
                               low * self.geometry.block_tokens, high * self.geometry.block_tokens)
        finally:
            with self._lock:
                for run, _, _, _ in parts:
                    self._unreference(run)

    def _parts(self, hashes: Sequence[bytes], tenant_key: bytes, start: int, state: bool
               ) -> list[tuple[SsdRun, int, int, bool]]:
        """Return (run, first block, block after the last, with its checkpoint), in order."""
        stop = len(hashes)
        needed = state and self.geometry.state_blocks > 0
        if self._deepest(hashes, tenant_key) < stop or (
                needed and hashes[-1] not in self._states):
            raise UsageError(f"the SSD tier does not hold all {stop} blocks, and their end's "
                             "checkpoint: match() says what it holds")
        parts = []
        at = start
        while at < stop:
            run = self._blocks[hashes[at]][0]
            high = min(run.stop, stop)
            last = needed and high == stop and self._states[hashes[-1]] is run
            parts.append((run, at, high, last))
            at = high
        if needed and not (parts and parts[-1][3]):
            parts.append((self._states[hashes[-1]], stop, stop, True))
        return parts

    def _read_run(self, run: SsdRun, memory: CacheMemory, start: int, stop: int) -> None:
        try:
            with FileReader.open(run.path, direct=True) as reader:
                self._check(run, reader.contents)
                reader.read_into(memory, None, (min(start, memory.tokens[0]), stop))
        except (KvwireError, OSError):
            with self._changing():
                self._drop(run, damaged=True)
            raise

    def _check(self, run: SsdRun, contents: CacheFile) -> None:
        for name, value in run.metadata().items():
            if contents.metadata.get(name) != value:
                raise FormatError(f"{run.path}: {name} is not that of the run: another file took "
                                  "its name", code=ErrorCode.FILE_INDEX_CORRUPT, expected=value,
                                  actual=contents.metadata.get(name))

    def _deepest(self, hashes: Sequence[bytes], tenant_key: bytes) -> int:
        low, high = 0, len(hashes)
        while low < high:
            middle = (low + high) // 2
            held = self._blocks.get(hashes[middle])
            if held is not None and held[1] == middle + 1 and held[0].tenant_key == tenant_key:
                low = middle + 1
            else:
                high = middle
        return low

    # ---- write

    def write(self, hashes: Sequence[bytes], tenant_key: bytes, checkpoints: Sequence[int],
              memory_of: MemoryOf) -> int:
        """Write what the tier lacks of a prefix, as far as that is worth it; what comes before it
        is here or written too.

        Args:
            checkpoints: depths in blocks at which `memory_of` can give states.

        Returns: how many files were written; the rest was here, was not worth it, or
            there was no room.
        Raises: OSError: the disk failed or is full; what is not whole is not there.
        """
        written = 0
        with self._write_lock:  # so that no two runs hold the same block
            for start, stop, state in self._missing(hashes, tenant_key, checkpoints):
                parent = hashes[start - 1] if start else b""
                run = SsdRun(self._path(hashes[stop - 1], start, stop, state), tenant_key, parent,
                           start, tuple(hashes[start:stop]), state, 0)
                if not self._write_run(run, memory_of):
                    break
                written += 1
        return written

    def _missing(self, hashes: Sequence[bytes], tenant_key: bytes, checkpoints: Sequence[int]
                 ) -> list[tuple[int, int, bool]]:
        """Return (first block, block after the last, with checkpoint) of the files to write."""
        with self._lock:
            held = self._deepest(hashes, tenant_key)
            wanted = sorted(depth for depth in checkpoints
                            if hashes[depth - 1] not in self._states)
            pieces: list[tuple[int, int, bool]] = []
            for end in sorted({*wanted, len(hashes)}):
                state, start = end in wanted, min(held, end)
                if not state and start == end:
                    continue
                if not self._admits(hashes, start, end, state, pieces):
                    self._refused += 1  # its blocks may come with the next end
                    continue
                while end - start > _RUN_BLOCKS_MAX:
                    pieces.append((start, start + _RUN_BLOCKS_MAX, False))
                    start += _RUN_BLOCKS_MAX
                pieces.append((start, end, state))
                held = max(held, end)
        return pieces

    def _admits(self, hashes: Sequence[bytes], start: int, stop: int, state: bool,
                pieces: list[tuple[int, int, bool]]) -> bool:
        """Say whether a run is worth it, behind the `pieces` of the prefix that are."""
        if self._admission is None:
            return True
        saves_from, state_blocks = start, self.geometry.state_blocks
        if state_blocks:
            if not state:
                return False  # without states its KV saves nothing
            known = {end for _, end, with_state in pieces if with_state}
            saves_from = next((depth for depth in range(stop - 1, 0, -1) if depth in known
                               or hashes[depth - 1] in self._states), 0)
        return self._admission.admits(saves_from, stop, stop - start + state_blocks, self.geometry)

    def _write_run(self, run: SsdRun, memory_of: MemoryOf) -> bool:
        units = len(run.hashes) + (self.geometry.state_blocks if run.state else 0)
        with self._changing():
            before = self._blocks.get(run.parent)
            if run.parent and before is None:
                return False  # evicted since it was looked for
            run.before = before[0] if before else None
            if run.before is not None:
                run.before.references += 1
            room = self._make_room(units * self.geometry.block_bytes)
        try:
            if room:
                memory = memory_of(run.start, run.stop, run.state)
                run.file_bytes = self._save(run, memory)
        finally:
            with self._lock:
                if run.before is not None:
                    self._unreference(run.before)
        if not room:
            self._full += 1
            return False
        with self._changing():
            self._written += 1
            return self._adopt(run)

    def _save(self, run: SsdRun, memory: CacheMemory) -> int:
        """Return the bytes of the file."""
        run.path.parent.mkdir(exist_ok=True)
        files.save(run.path, memory, codec=self._codec, metadata=run.metadata())
        return run.path.stat().st_size

    def _adopt(self, run: SsdRun) -> bool:
        """Make a file known; False, and it is removed, when what it follows has gone meanwhile."""
        if run.before is not None:
            if run.before not in self._runs:
                run.path.unlink(missing_ok=True)
                return False
            run.before.children.add(run)
        for depth, name in enumerate(run.hashes, run.start + 1):
            self._blocks[name] = run, depth
        if run.state:
            self._states[run.end_hash] = run
            run.saves_from = self._checkpoint_before(run)
        self._runs.add(run)
        self._file_bytes += run.file_bytes
        self._use(run)
        run.references += 1  # what makes it worth its place may be written next
        self._make_room(0)  # metadata and frames have bytes, too
        self._unreference(run)
        return True

    def _path(self, end_hash: bytes, start: int, stop: int, state: bool) -> Path:
        name = f"{end_hash.hex()}-{start}-{stop}{'-state' if state else ''}{_SUFFIX}"
        return self._folder / name[:2] / name

    # ---- evict

    def _checkpoint_before(self, run: SsdRun) -> int:
        """Return the depth of the last checkpoint before a run's own, 0 for none."""
        depth, at = run.stop, run
        while at is not None:
            for name in reversed(at.hashes[:depth - at.start]):
                if name in self._states and depth < run.stop:
                    return depth
                depth -= 1
            at = at.before
        return 0

    def _use(self, run: SsdRun | None) -> None:
        """Mark a run as used, and those before it after it, so that they go later."""
        last = run
        while run is not None:
            self._queue.policy.used(run)
            run = run.before
        if last is not None:
            self._queue.offer(last)

    def _unreference(self, run: SsdRun) -> None:
        run.references -= 1
        if run in self._runs:
            self._queue.offer(run)

    def _make_room(self, count: int) -> bool:
        while self._file_bytes + count > self.capacity_bytes:
            run = self._queue.pop()
            if run is None:
                return False
            self._drop(run)
            self._evicted += 1
        return True

    def _drop(self, run: SsdRun, damaged: bool = False) -> None:
        """Forget a run and those that follow it, these first, and remove their files."""
        for child in list(run.children):
            self._drop(child)
        if run not in self._runs:
            return
        self._runs.remove(run)
        run.queued = 0
        self._file_bytes -= run.file_bytes
        self._damaged += damaged
        if run.before is not None:
            run.before.children.discard(run)
            self._queue.offer(run.before)
        for name in run.hashes:
            del self._blocks[name]
        if run.state:
            del self._states[run.end_hash]
        run.path.unlink(missing_ok=True)
        self._gone.append(run)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock, then tell of what has gone."""
        with self._lock:
            yield
            gone, self._gone = self._gone, []
        for run in gone if self._on_gone is not None else ():
            self._on_gone(run.chain, run.hashes, run.end_hash if run.state else None)

    # ---- recover

    def _recover(self) -> None:
        """Find the runs that an earlier process left, and remove what is no whole run."""
        found = []
        for path in self._folder.rglob("*"):
            if not path.is_file():
                continue  # a folder, a pipe: none of ours, whatever it is called
            if path.suffix == ".tmp":
                path.unlink(missing_ok=True)
            elif path.suffix == _SUFFIX:
                run = self._recovered(path)
                if run is None:
                    self._damaged += 1
                    path.unlink(missing_ok=True)
                else:
                    found.append((run.start, path.stat().st_mtime_ns, run))
        for start, _, run in sorted(found, key=lambda item: item[:2]):
            before = self._blocks.get(run.parent)
            fits = not run.parent if start == 0 else (
                before is not None and before[1] == start
                and before[0].tenant_key == run.tenant_key)
            if not fits or any(name in self._blocks for name in run.hashes):
                self._damaged += 1
                run.path.unlink(missing_ok=True)
                continue
            run.before = before[0] if before else None
            self._adopt(run)
        for _, run in sorted(((written, run) for _, written, run in found),
                             key=lambda item: item[0]):
            self._use(run)
        self._make_room(0)
        self._gone.clear()  # nobody has been told of them

    def _recovered(self, path: Path) -> SsdRun | None:
        try:
            contents = files.inspect(path)
        except (KvwireError, OSError):
            return None
        said = contents.metadata
        names, start = said.get("prefix.hashes"), said.get("prefix.start")
        if not isinstance(names, bytes) or not isinstance(start, int) or (
                len(names) % HASH_BYTES):
            return None
        hashes = tuple(names[at:at + HASH_BYTES] for at in range(0, len(names), HASH_BYTES))
        run = SsdRun(path, said.get("prefix.tenant_key"), said.get("prefix.parent"), start, hashes,
                   bool(said.get("prefix.state")), contents.file_bytes)
        if not isinstance(run.tenant_key, bytes) or not isinstance(run.parent, bytes):
            return None
        if not (hashes or (run.state and run.parent)):
            return None
        return run if run.path == self._path(run.end_hash, start, run.stop, run.state) else None

    def holds(self, name: bytes, state: bool) -> bool:
        """Say whether a block, or with `state` the checkpoint at its end, is here."""
        with self._lock:
            return name in (self._states if state else self._blocks)

    def snapshot(self) -> Iterator[tuple[Chain, list[bytes], list[bytes]]]:
        """Yield (chain, hashes, hashes of the checkpoints) of all that is held."""
        with self._lock:
            runs = [(run.chain, list(run.hashes), [run.end_hash] * run.state)
                    for run in self._runs]
        yield from runs

    def stats(self) -> SsdStats:
        with self._lock:
            return SsdStats(len(self._runs), self._file_bytes, self.capacity_bytes, self._written,
                            self._evicted, self._damaged, self._full, self._refused)


def _claimed(folder: Path) -> BinaryIO:
    """Return the open file whose lock says that the folder is taken; it ends with the process."""
    file = open(folder / "claim", "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(f"another SsdTier uses {folder}: close it, or give each its own "
                         "folder") from None
    return file
