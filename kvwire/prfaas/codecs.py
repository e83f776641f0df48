"""Which codec a transfer takes: the least work that meets the request's time to first token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from kvwire.errors import UsageError
from kvwire.prfaas.profiles import GBPS

__all__ = ["CodecOption", "EXACT_OPTIONS", "RAW", "TIERED", "choose", "exposed_s"]


class CodecOption(NamedTuple):
    """One codec that a sender may use.

    Attributes:
        name: as `Sender.open(codec=...)` takes it; of a lossy rung, any.
        kv_ratio, state_ratio: raw bytes for each byte sent.
        gbps: cache that sender and receiver code together, in 10^9 bits a second.
        exact: what arrives is what was sent, bit for bit.
    """

    name: str
    kv_ratio: float = 1.0
    state_ratio: float = 1.0
    gbps: float = math.inf
    exact: bool = True


RAW = CodecOption("raw")
TIERED = CodecOption("tiered", kv_ratio=1.50, state_ratio=1.19, gbps=160.0)
"""Ratios of bf16 keys and values and of fp32 states, and what four cores code, by bench.codec."""

EXACT_OPTIONS = (RAW, TIERED)


def exposed_s(option: CodecOption, kv_bytes: float, state_bytes: float, prefill_s: float,
              link_gbps: float) -> float:
    """Return the seconds by which a transfer outlasts the prefill that makes its bytes.

    KV is coded and sent as layers are done, beside the prefill; states only when all is done.
    """
    coded_gbps = option.gbps
    kv_gbps = min(coded_gbps, link_gbps * option.kv_ratio)
    state_gbps = min(coded_gbps, link_gbps * option.state_ratio)
    late_s = kv_bytes * GBPS / kv_gbps - prefill_s
    return (late_s if late_s > 0 else 0.0) + state_bytes * GBPS / state_gbps


def choose(options: Sequence[CodecOption], kv_bytes: float, state_bytes: float, prefill_s: float,
           link_gbps: float, *, late_s: float = 0.0, ttft_max_s: float = math.inf,
           scarce: bool = False, lossy: bool = False) -> CodecOption:
    """Return the codec for one transfer.

    Among the exact ones that meet `ttft_max_s`: where the link is scarce the one that sends least,
    else the first in `options`, but a later one where it brings the first token a tenth sooner. If
    none meets it, lossy ones are tried too, if `lossy` allows them, in their order. If still none,
    the exact or allowed one that comes nearest.

    Args:
        options: least work first; at least one is exact.
        kv_bytes, state_bytes: of cache to be transferred.
        prefill_s: seconds of prefill beside which KV can travel.
        late_s: what is certain beside prefill and transfer: queues, backlog, round trip.
        ttft_max_s: the request's goal.
    """
    known_s = late_s + prefill_s
    first = options[0]
    if first.exact and not scarce:  # most transfers: nothing to gain over the least work
        first_s = known_s + exposed_s(first, kv_bytes, state_bytes, prefill_s, link_gbps)
        if first_s <= 1.1 * known_s and first_s <= ttft_max_s:
            return first
    exact = [(known_s + exposed_s(option, kv_bytes, state_bytes, prefill_s, link_gbps), option)
             for option in options if option.exact]
    if not exact:
        raise UsageError(f"options are {[option.name for option in options]}; one must be exact")
    good = [pair for pair in exact if pair[0] <= ttft_max_s]
    if good and scarce:
        return min((option for _, option in good), key=lambda option: (
            kv_bytes / option.kv_ratio + state_bytes / option.state_ratio))
    if good:
        soon_s = 1.1 * min(good, key=_first)[0]
        return next(option for ttft_s, option in good if ttft_s <= soon_s)
    if lossy:
        more = [(known_s + exposed_s(option, kv_bytes, state_bytes, prefill_s, link_gbps), option)
                for option in options if not option.exact]
        for ttft_s, option in more:
            if ttft_s <= ttft_max_s:
                return option
        exact += more
    return min(exact, key=_first)[1]


_first = itemgetter(0)
