"""What a model costs on one instance: bytes of cache, seconds of prefill.

Source: arXiv 2604.15039 section 2 (S_kv, T_prefill, equation 1). Sizes come from a `CacheSpec`,
times from measurements.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from kvwire.errors import UsageError
from kvwire.layout import CacheSpec

__all__ = ["ModelProfile"]

GBPS = 8e-9  # of one byte per second


@dataclass(frozen=True)
class ModelProfile:
    """One model on one kind of instance.

    Attributes:
        name: of the model and the instance, for people.
        kv_bytes_per_token: what one more token adds to the cache, in all layers.
        state_bytes: what every request has, whatever its length: recurrent and convolution
            states, full sliding windows.
        prefill_points: measured (tokens, seconds) of one request alone, tokens rising, at least
            two; seconds include everything up to the first token.

    Raises:
        UsageError: a size is negative, both are 0, or the points are too few or do not rise.
    """

    name: str
    kv_bytes_per_token: int
    state_bytes: int
    prefill_points: tuple[tuple[float, float], ...]

    def __post_init__(self):
        if min(self.kv_bytes_per_token, self.state_bytes) < 0 or (
                self.kv_bytes_per_token + self.state_bytes == 0):
            raise UsageError(f"profile {self.name!r}: kv_bytes_per_token is "
                             f"{self.kv_bytes_per_token}, state_bytes is {self.state_bytes}; they "
                             "must not be negative, nor both 0")
        points = tuple((float(tokens), float(seconds)) for tokens, seconds in self.prefill_points)
        object.__setattr__(self, "prefill_points", points)
        self._check_points(points)

    def _check_points(self, points: tuple[tuple[float, float], ...]) -> None:
        where = f"profile {self.name!r}: prefill_points"
        if len(points) < 2:
            raise UsageError(f"{where} are {len(points)}; at least 2 are needed")
        for tokens, seconds in points:
            if not (0 < tokens < math.inf and 0 < seconds < math.inf):
                raise UsageError(f"{where}: ({tokens:g}, {seconds:g}) must be positive and finite")
        for (before, faster), (tokens, seconds) in zip(points, points[1:]):
            if tokens <= before or seconds < faster:
                raise UsageError(f"{where}: ({tokens:g}, {seconds:g}) follows ({before:g}, "
                                 f"{faster:g}); tokens must rise and seconds must not fall")

    @classmethod
    def of_spec(cls, name: str, spec: CacheSpec,
                points: Sequence[tuple[float, float]]) -> ModelProfile:
        """Return the profile with the sizes of `spec`; a sliding window counts when it is full."""
        return cls(name, spec.row_bytes, spec.fixed_bytes, tuple(points))

    def slower(self, name: str, factor: float, floor_factor: float = 1.0) -> ModelProfile:
        """Return the profile on slower instances: the times above the floor are stretched by
        `factor`, the floor (launches, scheduling) by `floor_factor`."""
        floor = self.floor_s
        points = tuple((tokens, floor * floor_factor + factor * (seconds - floor))
                       for tokens, seconds in self.prefill_points)
        return replace(self, name=name, prefill_points=points)

    def cache_bytes(self, tokens: float) -> float:
        """Return S_kv: bytes of the whole cache of a request of `tokens` tokens."""
        return self.state_bytes + self.kv_bytes_per_token * tokens

    def wire_bytes(self, tokens: float, held_tokens: float = 0, kv_ratio: float = 1.0,
                   state_ratio: float = 1.0) -> float:
        """Return what travels when the other side holds the KV of the first `held_tokens`.

        KV travels for the rest only; states travel whole, for they are of use at their exact
        length alone. The ratios are those of a codec, raw bytes for each byte sent.
        """
        return (self.kv_bytes_per_token * (tokens - held_tokens) / kv_ratio
                + self.state_bytes / state_ratio)

    @property
    def floor_s(self) -> float:
        """Seconds of a prefill of no tokens: the first slope, followed back to 0."""
        return self._pieces[0][2]

    def prefill_s(self, uncached_tokens: float, cached_tokens: float = 0) -> float:
        """Return the seconds of a prefill of `uncached_tokens` behind a cached prefix.

        Without a prefix, T(n): the monotone cubic through the measured points (Fritsch-Carlson);
        below the first point along its tangent; above the last one along its tangent and with the
        curvature of the last three points (attention is quadratic).
        With one, T(0) + T(cached + uncached) - T(cached): what the whole takes, less what the
        prefix took, the floor paid again; and never less than T(uncached), for to attend to a
        prefix costs something.
        """
        alone_s = self._time(uncached_tokens)
        if not cached_tokens:
            return alone_s
        behind_s = (self._pieces[0][2] + self._time(cached_tokens + uncached_tokens)
                    - self._time(cached_tokens))
        return behind_s if behind_s > alone_s else alone_s

    def prefill_times(self, uncached_tokens: np.ndarray,
                      cached_tokens: np.ndarray | float = 0) -> np.ndarray:
        """Return `prefill_s` of many requests, float64."""
        alone = self._times(uncached_tokens)
        if not np.any(cached_tokens):
            return alone
        whole = self._times(np.add(cached_tokens, uncached_tokens)) - self._times(cached_tokens)
        return np.where(np.equal(cached_tokens, 0), alone, np.maximum(alone, self.floor_s + whole))

    def kv_throughput_gbps(self, tokens: float) -> float:
        """Return Phi_kv, equation 1: cache made per second of prefill, in 10^9 bits a second."""
        return self.cache_bytes(tokens) * GBPS / self._time(tokens)

    def _time(self, tokens: float) -> float:
        start, cubic, constant, slope, square = self._pieces[
            bisect_right(self._starts, tokens, 1) - 1]
        along = tokens - start
        return constant + along * (slope + along * (square + along * cubic))

    def _times(self, tokens: np.ndarray | float) -> np.ndarray:
        tokens = np.asarray(tokens, float)
        piece = np.searchsorted(self._starts[1:], tokens, "right")
        start, cubic, constant, slope, square = np.array(self._pieces)[piece].T
        along = tokens - start.T
        return constant.T + along * (slope.T + along * (square.T + along * cubic.T))

    @cached_property
    def _starts(self) -> tuple[float, ...]:
        return tuple(piece[0] for piece in self._pieces)

    @cached_property
    def _pieces(self) -> tuple[tuple[float, float, float, float, float], ...]:
        """(start, cubic, constant, slope, square) of each stretch, the first from 0."""
        points = self.prefill_points
        slopes = _monotone_slopes(points)
        (first, at_first), (last, at_last) = points[0], points[-1]
        floor = max(at_first - slopes[0] * first, 0.0)
        pieces = [(0.0, 0.0, floor, (at_first - floor) / first, 0.0)]
        for (x0, y0), (x1, y1), s0, s1 in zip(points, points[1:], slopes, slopes[1:]):
            width, secant = x1 - x0, (y1 - y0) / (x1 - x0)
            pieces.append((x0, (s0 + s1 - 2 * secant) / width**2, y0, s0,
                           (3 * secant - 2 * s0 - s1) / width))
        pieces.append((last, 0.0, at_last, slopes[-1], _end_curvature(points)))
        return tuple(pieces)


def _secants(points: Sequence[tuple[float, float]]) -> list[float]:
    return [(y1 - y0) / (x1 - x0) for (x0, y0), (x1, y1) in zip(points, points[1:])]


def _end_curvature(points: Sequence[tuple[float, float]]) -> float:
    secants = _secants(points)
    if len(secants) < 2:
        return 0.0
    return max(0.0, (secants[-1] - secants[-2]) / (points[-1][0] - points[-3][0]))


def _monotone_slopes(points: Sequence[tuple[float, float]]) -> list[float]:
    """Return a slope for each point so that the cubics between them never turn back.

    Inside, the weighted harmonic mean of the secants; at the ends the three-point formula, cut to
    0 and to three times the secant. Source: Fritsch and Butland, SIAM J. Sci. Stat. Comput. 5(2).
    """
    widths = [x1 - x0 for (x0, _), (x1, _) in zip(points, points[1:])]
    secants = _secants(points)
    if len(secants) == 1:
        return [secants[0]] * 2

    def inside(h0: float, h1: float, s0: float, s1: float) -> float:
        if s0 <= 0 or s1 <= 0:
            return 0.0
        return 3 * (h0 + h1) / ((2 * h1 + h0) / s0 + (h1 + 2 * h0) / s1)

    def end(h0: float, h1: float, s0: float, s1: float) -> float:
        return min(max(((2 * h0 + h1) * s0 - h0 * s1) / (h0 + h1), 0.0), 3 * s0)

    middle = [inside(*widths[i:i + 2], *secants[i:i + 2]) for i in range(len(secants) - 1)]
    first = end(widths[0], widths[1], secants[0], secants[1])
    last = end(widths[-1], widths[-2], secants[-1], secants[-2])
    return [first, *middle, last]
