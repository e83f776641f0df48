"""Traces made by rule: cold ones, conversations like the Mooncake trace's, agents, bursts.

A session's next prompt is its last one, the answer, and something new; all sessions of one template
begin with the same system prompt. Every function is deterministic by seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from kvwire.errors import UsageError
from kvwire.prfaas.lengths import LengthDistribution
from kvwire.prfaas.simulator.traces import BLOCK_TOKENS, Trace

__all__ = ["AGENTIC", "CONVERSATION", "SessionModel", "cold_trace", "session_trace",
           "with_bursts", "with_slow_start"]


@dataclass(frozen=True)
class SessionModel:
    """How sessions look; lengths are lognormal with this median and sigma.

    Attributes:
        first_tokens: the first prompt, with the system prompt.
        added_tokens: what each further turn adds besides the last answer.
        output_tokens: an answer.
        turn_count_mean: of a session; geometric.
        pause_s_mean: from one turn to the next; exponential.
        template_count, template_tokens: different system prompts, and how long each is.
        tokens_max: a session ends before its prompt gets longer.
        instant_s: arrivals are rounded down to multiples of it, as a recorder does; 0: not.
    """

    first_tokens: tuple[float, float]
    added_tokens: tuple[float, float]
    output_tokens: tuple[float, float]
    turn_count_mean: float
    pause_s_mean: float
    template_count: int = 1
    template_tokens: int = 0
    tokens_max: int = 1 << 17
    instant_s: float = 0.0


# Fitted to the statistics of the Mooncake conversation trace (bench/prfaas_sim.py prints both).
CONVERSATION = SessionModel(
    first_tokens=(5700, 1.12), added_tokens=(520, 1.85), output_tokens=(250, 0.79),
    turn_count_mean=1.64, pause_s_mean=170.0, template_tokens=BLOCK_TOKENS, instant_s=3.0)

# Coding agents as TraceLab (arXiv 2606.30560) has them: a turn appends 857 tokens in the median and
# 5.3K at P90, to a prefix of 126K in the median.
AGENTIC = SessionModel(
    first_tokens=(24_000, 0.6), added_tokens=(600, 1.65), output_tokens=(180, 0.8),
    turn_count_mean=80.0, pause_s_mean=20.0, template_count=4, template_tokens=8 * BLOCK_TOKENS,
    tokens_max=200_000)


def cold_trace(lengths: LengthDistribution, count: int, rate_rps: float, seed: int,
               output_tokens: int = 1024) -> Trace:
    """Return Poisson arrivals of prompts that share nothing, each with the same output length."""
    _require(count, rate_rps)
    random = np.random.default_rng(seed)
    arrival_s = np.cumsum(random.exponential(1 / rate_rps, count))
    tokens = np.maximum(1, np.rint(lengths.sample(random, count))).astype(np.int64)
    return Trace(arrival_s, tokens, np.full(count, output_tokens, np.int64))


def session_trace(model: SessionModel, count: int, rate_rps: float, seed: int) -> Trace:
    """Return about `count` requests of Poisson sessions, at a mean rate of `rate_rps`.

    Sessions have been going on for ten times their mean duration when the trace begins, so that
    it does not begin with first turns only.
    """
    _require(count, rate_rps)
    random = np.random.default_rng(seed)
    turn_count, index, tokens, outputs = _turns(model, count, random)
    first = np.concatenate(([0], np.cumsum(turn_count)[:-1]))
    session = np.repeat(np.arange(len(turn_count)), turn_count)
    pauses = random.exponential(model.pause_s_mean, len(session))
    pauses[first] = 0.0
    since_first_s = np.cumsum(pauses)
    since_first_s -= np.repeat(since_first_s[first], turn_count)
    session_rps = rate_rps * len(turn_count) / len(session)
    lead_s = 10 * model.pause_s_mean * model.turn_count_mean
    span_s = count / rate_rps
    begins_s = random.uniform(-lead_s, span_s, _poisson_like(session_rps * (lead_s + span_s)))
    chosen = random.integers(0, len(turn_count), len(begins_s))
    return _assembled(model, random, begins_s, turn_count[chosen], first[chosen],
                      (index, tokens, outputs, since_first_s), span_s)


def _poisson_like(mean: float) -> int:
    return max(1, round(mean))


def _turns(model: SessionModel, count: int, random: np.random.Generator) -> tuple:
    """Return sessions to draw from: turns of each, and index, prompt, answer of each turn."""
    sessions = max(64, min(50_000, math.ceil(count / model.turn_count_mean)))
    turn_count = random.geometric(1 / model.turn_count_mean, sessions)
    total = int(turn_count.sum())
    first = np.concatenate(([0], np.cumsum(turn_count)[:-1]))
    index = np.arange(total) - np.repeat(first, turn_count)
    outputs = _lognormal(random, model.output_tokens, total)
    grown = _lognormal(random, model.added_tokens, total)
    grown[1:] += outputs[:-1]
    low = model.template_tokens + 1
    grown[first] = np.clip(_lognormal(random, model.first_tokens, sessions), low, model.tokens_max)
    tokens = np.cumsum(grown)
    tokens -= np.repeat(tokens[first] - grown[first], turn_count)
    kept = tokens <= model.tokens_max
    session = np.repeat(np.arange(sessions), turn_count)
    return (np.bincount(session[kept], minlength=sessions), index[kept], tokens[kept],
            outputs[kept])


def _lognormal(random: np.random.Generator, shape: tuple[float, float], count: int) -> np.ndarray:
    values = random.lognormal(math.log(shape[0]), shape[1], count)
    return np.maximum(1, np.rint(values)).astype(np.int64)


def _assembled(model: SessionModel, random: np.random.Generator, begins_s: np.ndarray,
               turn_count: np.ndarray, first: np.ndarray, turns: tuple, span_s: float) -> Trace:
    """Return the turns of the sessions that begin at `begins_s`, those within the span."""
    index, tokens, outputs, since_first_s = turns
    owner = np.repeat(np.arange(len(begins_s)), turn_count)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(turn_count) - turn_count, turn_count)
    turn = first[owner] + within
    arrival_s = begins_s[owner] + since_first_s[turn]
    kept = np.flatnonzero((arrival_s >= 0) & (arrival_s < span_s))
    if not len(kept):
        raise UsageError("no request falls into the trace: ask for more of them")
    kept = kept[np.argsort(arrival_s[kept], kind="stable")]
    arrival_s, turn, owner = arrival_s[kept], turn[kept], owner[kept]
    if model.instant_s:
        arrival_s = np.floor(arrival_s / model.instant_s) * model.instant_s
    templates = random.integers(0, model.template_count, len(begins_s))[owner]
    hash_ids, starts = _hashes(model, tokens[turn], owner, templates)
    return Trace(arrival_s, tokens[turn], outputs[turn], hash_ids, starts)


def _hashes(model: SessionModel, tokens: np.ndarray, owner: np.ndarray,
            templates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hash ids of all requests, and where each one's begin.

    A template's blocks, a session's full blocks, and every partial block have ids of their own.
    """
    shared = model.template_tokens // BLOCK_TOKENS
    full = tokens // BLOCK_TOKENS
    blocks = -(-tokens // BLOCK_TOKENS)
    owners, longest = np.unique(owner), np.zeros(owner.max() + 1, np.int64)
    np.maximum.at(longest, owner, full)
    bases = np.zeros(owner.max() + 1, np.int64)
    bases[owners] = np.cumsum(longest[owners]) - longest[owners] + shared * model.template_count
    partial_base = int(bases.max() + longest.max())
    starts = np.concatenate(([0], np.cumsum(blocks)))
    request = np.repeat(np.arange(len(tokens)), blocks)
    position = np.arange(starts[-1]) - starts[request]
    ids = bases[owner[request]] + position
    of_template = position < np.minimum(shared, full[request])
    ids[of_template] = (templates[request] * shared + position)[of_template]
    partial = position >= full[request]
    ids[partial] = partial_base + np.arange(partial.sum())
    return ids, starts


def with_bursts(trace: Trace, every_s: float, burst_s: float, factor: float) -> Trace:
    """Return the trace with `factor` times the rate for `burst_s` out of every `every_s`.

    The rate between the bursts falls so that the mean stays.

    Raises: UsageError when the bursts alone would exceed the mean rate.
    """
    calm = (every_s - factor * burst_s) / (every_s - burst_s) if burst_s < every_s else -1.0
    if not (burst_s > 0 and factor > 0 and calm >= 0):
        raise UsageError(f"bursts of {burst_s} s every {every_s} s at {factor} times the rate "
                         "leave no mean rate to keep")
    end_s = float(trace.arrival_s[-1])
    begins = np.arange(0.0, end_s + every_s, every_s)
    corners = np.sort(np.concatenate((begins, begins + (every_s - burst_s))))
    rates = np.where(np.arange(len(corners) - 1) % 2 == 0, calm, factor)
    offered = np.concatenate(([0.0], np.cumsum(np.diff(corners) * rates)))
    return replace(trace, arrival_s=np.interp(trace.arrival_s, offered, corners))


def with_slow_start(trace: Trace, share: float, slower: float) -> Trace:
    """Return the trace with the first `share` of its requests at a `slower` times lower rate.

    Sessions that are already going on find empty pools; so they do not meet full load with them.
    """
    if not (0 < share < 1 and slower >= 1):
        raise UsageError(f"a slow start of {share:g} of the trace, {slower:g} times slower, is "
                         "none")
    begin_s = float(trace.arrival_s[0])
    turn_s = float(trace.arrival_s[int(share * (len(trace) - 1))])
    arrival_s = np.where(trace.arrival_s <= turn_s, begin_s + (trace.arrival_s - begin_s) * slower,
                         trace.arrival_s + (turn_s - begin_s) * (slower - 1))
    return replace(trace, arrival_s=arrival_s)


def _require(count: int, rate_rps: float) -> None:
    if count < 1 or not rate_rps > 0:
        raise UsageError(f"a trace of {count} requests at {rate_rps} a second cannot be made")
