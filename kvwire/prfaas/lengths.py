"""How long requests are: the distribution of uncached lengths, and its two sides of a threshold.

A length here is what is left to prefill: the prompt without its cached prefix. How long that
prefix was is known beside it (`grid`), 0 where there is none.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from kvwire.errors import UsageError

__all__ = ["Empirical", "LengthDistribution", "TruncatedLognormal", "WithPrefixHits"]

SIGMA_MAX = 20  # the mean of a wider one is no number any more


@lru_cache(maxsize=16)
def _quantile_middles(distribution: LengthDistribution,
                      count: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([distribution.quantile((index + 0.5) / count) for index in range(count)])
    cached = np.zeros(count)
    lengths.flags.writeable = cached.flags.writeable = False
    return lengths, cached


class LengthDistribution(ABC):
    """What the throughput model asks of a distribution of lengths; all in tokens.

    A mean of an empty side is 0. Implementations are immutable.
    """

    @abstractmethod
    def share_above(self, tokens: float) -> float:
        """Return p = P(L > tokens)."""

    def shares_above(self, tokens: np.ndarray) -> np.ndarray:
        """Return `share_above` of each of many lengths."""
        return np.array([self.share_above(float(length)) for length in tokens])

    @abstractmethod
    def mean_above(self, tokens: float) -> float:
        """Return l_long = E[L | L > tokens]."""

    @abstractmethod
    def quantile(self, share: float) -> float:
        """Return the least length that `share` of the requests do not exceed."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Return `count` lengths, int64, at least 1."""

    def mean(self) -> float:
        """Return E[L]."""
        return self.mean_above(0)

    def mean_below(self, tokens: float) -> float:
        """Return l_short = E[L | L <= tokens]."""
        above = self.share_above(tokens)
        if above >= 1:
            return 0.0
        return max(0.0, (self.mean() - above * self.mean_above(tokens)) / (1 - above))

    def grid(self, count: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        """Return lengths, rising, and their cached prefixes, that stand for equal shares of the
        requests: the middles of `count` quantiles, or what an implementation holds. Read-only."""
        return _quantile_middles(self, count)


@dataclass(frozen=True)
class TruncatedLognormal(LengthDistribution):
    """ln L is normal (mu, sigma), given low <= L <= high."""

    mu: float
    sigma: float
    low: float
    high: float

    def __post_init__(self):
        if not (0 < self.sigma <= SIGMA_MAX and 0 < self.low < self.high < math.inf):
            raise UsageError(f"sigma is {self.sigma:g}, low {self.low:g}, high {self.high:g}; "
                             f"wanted are 0 < sigma <= {SIGMA_MAX} and 0 < low < high")
        if not (math.isfinite(self.mu) and self._mass > 1e-9):
            raise UsageError(f"mu is {self.mu:g}: next to nothing of it is between low "
                             f"{self.low:g} and high {self.high:g}")

    def share_above(self, tokens: float) -> float:
        cut = min(max(tokens, self.low), self.high)
        return (self._below(self.high) - self._below(cut)) / self._mass

    def mean_above(self, tokens: float) -> float:
        cut = min(max(tokens, self.low), self.high)
        share = self.share_above(cut)
        if share <= 0:
            return 0.0
        scale = math.exp(self.mu + self.sigma**2 / 2)
        part = self._below(self.high, self.sigma) - self._below(cut, self.sigma)
        return scale * part / (share * self._mass)

    def quantile(self, share: float) -> float:
        below = self._below(self.low) + share * self._mass
        if not 0 < below < 1:
            return self.low if below <= 0 else self.high
        cut = math.exp(self.mu + self.sigma * NormalDist().inv_cdf(below))
        return min(max(cut, self.low), self.high)

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        lengths = np.empty(0)
        while len(lengths) < count:
            drawn = np.exp(rng.normal(self.mu, self.sigma, 2 * count + 16))
            kept = drawn[(drawn >= self.low) & (drawn <= self.high)]
            lengths = np.concatenate((lengths, kept))
        return np.maximum(np.rint(lengths[:count]), 1).astype(np.int64)

    @property
    def _mass(self) -> float:
        return self._below(self.high) - self._below(self.low)

    def _below(self, tokens: float, shift: float = 0.0) -> float:
        """The normal distribution function at ln tokens, its mean moved by shift * sigma."""
        z = (math.log(tokens) - self.mu) / self.sigma - shift
        return 0.5 * math.erfc(-z / math.sqrt(2))


class Empirical(LengthDistribution):
    """The lengths themselves, e.g. of a trace or of the last requests.

    Args:
        uncached: tokens to prefill per request, at least one request, none negative. Copied.
        cached: tokens of the cached prefix of each, or None for none.
    """

    def __init__(self, uncached: np.ndarray, cached: np.ndarray | None = None):
        lengths = np.asarray(uncached, float).ravel()
        prefixes = np.zeros_like(lengths) if cached is None else np.asarray(cached, float).ravel()
        if not len(lengths) or len(prefixes) != len(lengths):
            raise UsageError(f"{len(lengths)} lengths with {len(prefixes)} prefixes; wanted are "
                             "as many of both, and at least one")
        if not (lengths.min() >= 0 and prefixes.min() >= 0 and np.isfinite(lengths.sum())):
            raise UsageError("lengths and prefixes must be finite and not negative")
        order = np.argsort(lengths, kind="stable")
        self._sorted = lengths[order]
        self._cached = prefixes[order]
        self._sums = np.concatenate(([0.0], np.cumsum(self._sorted)))

    def __len__(self) -> int:
        return len(self._sorted)

    def share_above(self, tokens: float) -> float:
        return 1 - self._index(tokens) / len(self._sorted)

    def shares_above(self, tokens: np.ndarray) -> np.ndarray:
        return 1 - np.searchsorted(self._sorted, tokens, "right") / len(self._sorted)

    def mean(self) -> float:
        return float(self._sums[-1] / len(self._sorted))

    def mean_above(self, tokens: float) -> float:
        return self._mean_above(self._sums, tokens)

    def mean_below(self, tokens: float) -> float:
        return self._mean_below(self._sums, tokens)

    def quantile(self, share: float) -> float:
        index = math.ceil(share * len(self._sorted)) - 1
        return float(self._sorted[min(max(index, 0), len(self._sorted) - 1)])

    def grid(self, count: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        return self._sorted, self._cached

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return np.maximum(np.rint(rng.choice(self._sorted, count)), 1).astype(np.int64)

    def _index(self, tokens: float) -> int:
        return int(np.searchsorted(self._sorted, tokens, "right"))

    def _mean_above(self, sums: np.ndarray, tokens: float) -> float:
        index = self._index(tokens)
        count = len(self._sorted) - index
        return float((sums[-1] - sums[index]) / count) if count else 0.0

    def _mean_below(self, sums: np.ndarray, tokens: float) -> float:
        index = self._index(tokens)
        return float(sums[index] / index) if index else 0.0


@dataclass(frozen=True)
class WithPrefixHits(LengthDistribution):
    """Prompts of `prompts`, of which a share finds a share of itself in the prefix cache.

    Attributes:
        prompts: lengths of whole prompts.
        hit_share: of the requests, 0 to 1.
        cached_share: of the tokens of such a request, 0 to below 1.
    """

    prompts: LengthDistribution
    hit_share: float
    cached_share: float

    def __post_init__(self):
        if not (0 <= self.hit_share <= 1 and 0 <= self.cached_share < 1):
            raise UsageError(f"hit_share is {self.hit_share:g} and cached_share "
                             f"{self.cached_share:g}; wanted are 0 to 1, and 0 to below 1")

    def share_above(self, tokens: float) -> float:
        hit, cold = self._shares_above(tokens)
        return hit + cold

    def mean_above(self, tokens: float) -> float:
        hit, cold = self._shares_above(tokens)
        if hit + cold <= 0:
            return 0.0
        left = 1 - self.cached_share
        return (hit * left * self.prompts.mean_above(tokens / left)
                + cold * self.prompts.mean_above(tokens)) / (hit + cold)

    def quantile(self, share: float) -> float:
        low, high = 0.0, self.prompts.quantile(1.0)
        for _ in range(60):
            middle = (low + high) / 2
            if 1 - self.share_above(middle) < share:
                low = middle
            else:
                high = middle
        return high

    def grid(self, count: int = 4096) -> tuple[np.ndarray, np.ndarray]:
        return _rests_of_middles(self, count)

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        whole = self.prompts.sample(rng, count)
        left = np.where(rng.random(count) < self.hit_share, 1 - self.cached_share, 1.0)
        return np.maximum(np.rint(whole * left), 1).astype(np.int64)

    def _shares_above(self, tokens: float) -> tuple[float, float]:
        whole = tokens / (1 - self.cached_share)
        return (self.hit_share * self.prompts.share_above(whole),
                (1 - self.hit_share) * self.prompts.share_above(tokens))


@lru_cache(maxsize=16)
def _rests_of_middles(distribution: WithPrefixHits,
                      count: int) -> tuple[np.ndarray, np.ndarray]:
    def whole(part: int) -> np.ndarray:
        quantile = distribution.prompts.quantile
        return np.array([quantile((index + 0.5) / part) for index in range(part)])

    hits = round(count * distribution.hit_share)
    hit, cold = whole(hits), whole(count - hits)
    lengths = np.concatenate((hit * (1 - distribution.cached_share), cold))
    cached = np.concatenate((hit * distribution.cached_share, np.zeros(len(cold))))
    order = np.argsort(lengths, kind="stable")
    lengths, cached = lengths[order], cached[order]
    lengths.flags.writeable = cached.flags.writeable = False
    return lengths, cached
