"""The codecs that the codec benchmark compares, and how one is timed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import numpy as np

from bench.build import ROOT
from bench.measure import Unable
from bench.tensors import Tensor
from kvwire import _native
from kvwire.tensor_spec import DType
from kvwire.tiered import CodeTable

__all__ = ["CHUNK_BYTES", "NAMES", "Codec", "Level", "Result", "installed", "versions"]

_FOLDER = ROOT / ".build" / "codecs"
CHUNK_BYTES = 256 << 10  # as kvwire sends them
_SAMPLE_ELEMENTS = 131_072  # that a code table is made from
_PATTERN_AXES = 4
_OTHERS_S = 1.0  # so long the passes of a codec from Python are repeated
_OTHERS_PASSES_MIN = 3


@dataclass(frozen=True)
class Level:
    """Where the data lie.

    Attributes:
        raw_bytes: a tensor is repeated, or cut, to so many.
        passes: over them in each round.
        rounds: of copying, coding and decoding in turn; the median counts.
    """

    name: str
    raw_bytes: int
    passes: int
    rounds: int


@dataclass(frozen=True)
class Result:
    """What one codec does with some bytes.

    Attributes:
        coded_bytes: of all payloads, without `table_bytes` of code tables sent once.
        encode_s, decode_s, memcpy_s: for `raw_bytes`, in one thread.
    """

    raw_bytes: int
    coded_bytes: float
    table_bytes: int
    encode_s: float
    decode_s: float
    memcpy_s: float
    bit_exact: bool

    def __add__(self, other: Result) -> Result:
        sums = [a + b for a, b in zip(self._amounts(), other._amounts())]
        return Result(*sums, self.bit_exact and other.bit_exact)

    def _amounts(self) -> tuple[float, ...]:
        return (self.raw_bytes, self.coded_bytes, self.table_bytes, self.encode_s, self.decode_s,
                self.memcpy_s)

    @property
    def ratio(self) -> float:
        return self.raw_bytes / (self.coded_bytes + self.table_bytes)

    def gbps(self, seconds: float) -> float:
        """10^9 raw bytes per second."""
        return self.raw_bytes / seconds / 1e9


class Codec(ABC):
    """Codes tensors, in chunks of CHUNK_BYTES."""

    @abstractmethod
    def measure(self, tensor: Tensor, level: Level) -> Result:
        """Code and decode the tensor as it lies at `level`; returns what it took, scaled to the
        tensor's own size. Raises Unable."""


class Tiered(Codec):
    """kvwire's own, timed in C++; a code table for each layer, made from a sample of it.

    Args:
        variant: of the kernels; None: the one that kvwire uses.
    """

    def __init__(self, variant: str | None):
        self._variant = variant

    def measure(self, tensor: Tensor, level: Level) -> Result:
        calibrated_on = tensor.calibrated_on or tensor.layers()
        return reduce(Result.__add__, (
            self._layer(layer, code_table(tensor.dtype, samples), level)
            for layer, samples in zip(tensor.layers(), calibrated_on)))

    def _layer(self, layer: np.ndarray, table: bytes, level: Level) -> Result:
        raw = _resident(layer, level)
        done = _native.tiered_bench(raw, table, CHUNK_BYTES, level.passes, level.rounds,
                                    self._variant)
        return _scaled(layer.nbytes, raw.nbytes, done["coded_bytes"], len(table),
                       [done["encode_s"], done["decode_s"], done["memcpy_s"]], done["exact"])


def code_table(dtype: DType, layer: np.ndarray) -> bytes:
    """Return the cheapest code table for elements like those of `layer`."""
    extents = list(layer.shape)
    while len(extents) > _PATTERN_AXES:
        extents[:2] = [extents[0] * extents[1]]
    axes = [1 << axis for axis, extent in enumerate(extents) if extent > 1]
    rows = [sum(chosen) for count in range(len(axes) + 1)
            for chosen in itertools.combinations(axes, count)]
    candidates = [(each, 0) for each in rows]
    if len(axes) >= 2:  # a state's (head, key) rows and (head, value) columns
        everything = sum(axes)
        candidates.append((everything - axes[-1], everything - axes[-2]))
    flat = layer.reshape(-1)
    samples = [(start, flat[start:start + count])
               for start, count in _native.sample_runs(flat.size, _SAMPLE_ELEMENTS)]
    made, _ = _native.calibrate(int(dtype), extents, candidates, samples, flat.size)
    return _without_tokens(CodeTable.decode(made)[0]).encode()


def _without_tokens(table: CodeTable) -> CodeTable:
    """Return the table without outer axes that count in no base: a link's patterns have none, and
    short patterns are faster."""
    counted = table.row_axes | table.column_axes
    first = next((axis for axis in range(_PATTERN_AXES) if counted >> axis & 1), _PATTERN_AXES)
    return replace(table, extents=(1,) * first + table.axes[first:])


class Memcpy(Codec):
    """No codec: the bytes are copied there and back."""

    def measure(self, tensor: Tensor, level: Level) -> Result:
        raw = _resident(tensor.bits, level)
        there, back = np.full_like(raw, 1), np.full_like(raw, 2)
        times = [[_timed(np.copyto, [pair])[0] for pair in ((there, raw), (back, there))]
                 for _ in range(level.passes * level.rounds)]
        encode_s, decode_s = zip(*times)
        return _scaled(tensor.bits.nbytes, raw.nbytes, raw.nbytes, 0,
                       [encode_s, decode_s, encode_s], np.array_equal(raw, back))


@dataclass(frozen=True)
class Other(Codec):
    """A codec of another library, called from Python chunk by chunk.

    Attributes:
        module: what it is imported as.
        package: the distribution that has its version.
        make: returns, for a dtype, an encoder of bytes-like chunks, which may destroy what it is
            given, and the decoder of what that returns. Raises Unable.
    """

    module: str
    package: str
    make: Callable[[DType], tuple[Callable, Callable]]

    def measure(self, tensor: Tensor, level: Level) -> Result:
        encode, decode = self.make(tensor.dtype)
        raw = _resident(tensor.bits, level)
        out = np.full_like(raw, 1)
        data = memoryview(raw)
        chunks = [data[at:at + CHUNK_BYTES] for at in range(0, len(data), CHUNK_BYTES)]
        times, exact, enough = [], True, time.monotonic() + _OTHERS_S
        passes = level.passes * level.rounds
        while len(times) < min(passes, _OTHERS_PASSES_MIN) or (
                len(times) < passes and time.monotonic() < enough):
            memcpy_s, _ = _timed(np.copyto, [(out, raw)])
            encode_s, payloads = _timed(encode, [(bytearray(chunk),) for chunk in chunks])
            decode_s, decoded = _timed(decode, [(payload,) for payload in payloads])
            times.append((encode_s, decode_s, memcpy_s))
            exact = exact and all(map(bytes.__eq__, map(bytes, decoded), map(bytes, chunks)))
        coded_bytes = sum(map(len, payloads))
        return _scaled(tensor.bits.nbytes, raw.nbytes, coded_bytes, 0, list(zip(*times)), exact)


def _resident(bits: np.ndarray, level: Level) -> np.ndarray:
    """Return the bytes of the array, repeated or cut to those of the level."""
    return np.resize(bits.reshape(-1).view(np.uint8), level.raw_bytes)


def _timed(call: Callable, arguments: list[tuple]) -> tuple[float, list]:
    """Call once for each of the arguments; return the seconds and the results.

    CPU seconds: a busy machine would stretch the others' long passes more than tiered's short ones.
    """
    began = time.process_time_ns()
    results = [call(*each) for each in arguments]
    return (time.process_time_ns() - began) / 1e9, results


def _scaled(own_bytes: int, raw_bytes: int, coded_bytes: int, table_bytes: int,
            times: list[Sequence[float]], bit_exact: bool) -> Result:
    """Return the medians of what was measured on `raw_bytes`, as if they were `own_bytes`."""
    share = own_bytes / raw_bytes
    seconds = [statistics.median(each) * share for each in times]
    return Result(own_bytes, coded_bytes * share, table_bytes, *seconds, bit_exact)


def _lz4(dtype: DType) -> tuple[Callable, Callable]:
    from lz4 import block
    return block.compress, block.decompress


def _zstd(dtype: DType) -> tuple[Callable, Callable]:
    import zstandard
    return (zstandard.ZstdCompressor(level=1).compress,
            zstandard.ZstdDecompressor().decompress)


def _blosc2(codec: str, filter_: str) -> Callable[[DType], tuple[Callable, Callable]]:
    def make(dtype: DType) -> tuple[Callable, Callable]:
        import blosc2
        blosc2.set_nthreads(1)
        options = {"codec": blosc2.Codec[codec], "clevel": 1, "typesize": dtype.item_bytes,
                   "filters": [blosc2.Filter[filter_]], "nthreads": 1}
        return (lambda chunk: blosc2.compress2(chunk, **options)), blosc2.decompress2
    return make


def _zipnn(dtype: DType) -> tuple[Callable, Callable]:
    names = {DType.FP32: "float32", DType.FP16: "float16", DType.BF16: "bfloat16"}
    if dtype not in names:
        raise Unable(f"zipnn does not know {dtype.name.lower()}")
    import zipnn
    coder = zipnn.ZipNN(bytearray_dtype=names[dtype], threads=1)
    return coder.compress, coder.decompress


_OTHERS = {
    "lz4": Other("lz4", "lz4", _lz4),
    "zstd-1": Other("zstandard", "zstandard", _zstd),
    "blosc2-bitshuffle-lz4": Other("blosc2", "blosc2", _blosc2("LZ4", "BITSHUFFLE")),
    "blosc2-shuffle-zstd-1": Other("blosc2", "blosc2", _blosc2("ZSTD", "SHUFFLE")),
    "zipnn": Other("zipnn", "zipnn", _zipnn),
}
NAMES = ("tiered", "memcpy", *_OTHERS)

# Behind everything else: what is there may not replace a package of this environment.
if str(_FOLDER) not in sys.path:
    sys.path.append(str(_FOLDER))


def installed(names: Iterable[str], variant: str | None) -> dict[str, Codec]:
    """Return those of the codecs that are there; says on stderr which are not."""
    found = {}
    for name in names:
        codec = _OTHERS.get(name) or (Tiered(variant) if name == "tiered" else Memcpy())
        if isinstance(codec, Other) and importlib.util.find_spec(codec.module) is None:
            print(f"{name} is not installed, so its rows are absent: make codecs",
                  file=sys.stderr)
            continue
        found[name] = codec
    return found


def versions(codecs: Iterable[Codec]) -> dict[str, str]:
    """Return the versions of the packages that bring these codecs."""
    packages = [codec.package for codec in codecs if isinstance(codec, Other)]
    return {package: importlib.metadata.version(package) for package in packages}
