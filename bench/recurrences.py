"""Recurrences as hybrid models have them, with random weights: what an error in their state does.

Gated DeltaNet, KDA and Mamba-2, initialised as their published code does it and driven by the
hidden states of a trained model. All are linear in their state, so two runs over the same inputs
differ by what becomes of the first difference alone. Needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Recurrence", "convolved", "projected", "recurrences", "relative_errors",
           "time_step_bias"]

HEADS, HEAD_DIM = 4, 128           # of Gated DeltaNet and KDA
MAMBA_HEADS, MAMBA_HEAD_DIM, MAMBA_STATE_DIM = 8, 64, 128
SLOWEST, FASTEST = 100_000, 1_000  # tokens until 1/e is left, where decay is "slow"
_KERNEL = 4
_INITIAL_STD = 0.02
_TIME_STEP_MIN, _TIME_STEP_MAX = 0.001, 0.1
_SEED = 0


@dataclass(frozen=True)
class Recurrence:
    """One layer. All inputs are [token, ...].

    Attributes:
        keys: [token, head, key]; of unit length where `writes` says that it is a delta rule.
        values: [token, head, value].
        decays: [token, head, key or 1], factors.
        queries: [token, head, key].
        writes: [token, head], how much of the difference is written; None: of the value, all.
    """

    name: str
    keys: torch.Tensor
    values: torch.Tensor
    decays: torch.Tensor
    queries: torch.Tensor
    writes: torch.Tensor | None

    def states(self, state: torch.Tensor, start: int, stop: int) -> Iterator[torch.Tensor]:
        """Yield `state` [..., head, key, value] after each token; it is changed in place."""
        for token in range(start, stop):
            key, value = self.keys[token], self.values[token]
            state *= self.decays[token][:, :, None]
            if self.writes is not None:
                known = (key[:, None, :] @ state).squeeze(-2)
                value = (value - known) * self.writes[token][:, None]
            state += key[:, :, None] * value[..., None, :]
            yield state

    def output(self, state: torch.Tensor, token: int) -> torch.Tensor:
        """Return what the token reads: [..., head, value]."""
        return (self.queries[token][:, None, :] @ state).squeeze(-2)

    def empty(self) -> torch.Tensor:
        import torch
        return torch.zeros(self.keys.shape[1], self.keys.shape[2], self.values.shape[2])


def recurrences(hidden: torch.Tensor) -> list[Recurrence]:
    """Return the three kinds, as they are initialised, and with slow decay only, for the inputs
    `hidden` [token, channel]."""
    import torch
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        x = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        delta = _delta_inputs(x)
        mamba = _mamba_inputs(x)
        slow_keys = _slow(HEADS * HEAD_DIM)[torch.randperm(HEADS * HEAD_DIM)]
        gdn, kda = _decays_per_head(x), _decays_per_key(x)
        return [Recurrence("gdn", decays=gdn, **delta), Recurrence("kda", decays=kda, **delta),
                Recurrence("mamba2", **mamba),
                Recurrence("gdn, slow decay", **delta,
                           decays=_slow(HEADS)[:, None].expand(len(x), -1, -1)),
                Recurrence("kda, slow decay", **delta,
                           decays=slow_keys.view(HEADS, HEAD_DIM).expand(len(x), -1, -1)),
                Recurrence("mamba2, slow decay", **mamba | {
                    "decays": _slow(MAMBA_HEADS)[:, None].expand(len(x), -1, -1)})]


def _slow(count: int) -> torch.Tensor:
    import torch
    return torch.exp(-1 / torch.logspace(math.log10(FASTEST), math.log10(SLOWEST), count))


def _delta_inputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch
    from torch.nn.functional import normalize
    shape = (len(x), HEADS, HEAD_DIM)
    keys, values, queries = (convolved(projected(x, HEADS * HEAD_DIM)).view(shape)
                             for _ in range(3))
    return {"keys": normalize(keys, dim=-1), "values": values,
            "queries": normalize(queries, dim=-1), "writes": torch.sigmoid(projected(x, HEADS))}


def _decays_per_head(x: torch.Tensor) -> torch.Tensor:
    import torch
    from torch.nn.functional import softplus
    steps = softplus(projected(x, HEADS) + time_step_bias(HEADS))
    return (-torch.empty(HEADS).uniform_(0.01, 16) * steps).exp()[:, :, None]


def _decays_per_key(x: torch.Tensor) -> torch.Tensor:
    import torch
    from torch.nn.functional import softplus
    width = HEADS * HEAD_DIM
    low_rank = projected(projected(x, HEAD_DIM // 2), width) + time_step_bias(width)
    speed = torch.empty(HEADS, 1).uniform_(1, 16)
    return (-speed * softplus(low_rank).view(len(x), HEADS, HEAD_DIM)).exp()


def _mamba_inputs(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state is [head, state dimension, channel], so that it is read and written like the
    others'."""
    import torch
    from torch.nn.functional import softplus
    steps = softplus(projected(x, MAMBA_HEADS) + time_step_bias(MAMBA_HEADS))
    channels = convolved(projected(x, MAMBA_HEADS * MAMBA_HEAD_DIM))
    into, out_of = (convolved(projected(x, MAMBA_STATE_DIM))[:, None, :].expand(
        -1, MAMBA_HEADS, -1) for _ in range(2))
    decays = (-steps * torch.empty(MAMBA_HEADS).uniform_(1, 16)).exp()
    return {"keys": into, "queries": out_of, "writes": None, "decays": decays[:, :, None],
            "values": channels.view(len(x), MAMBA_HEADS, MAMBA_HEAD_DIM) * steps[:, :, None]}


def projected(x: torch.Tensor, width: int) -> torch.Tensor:
    """Return `x` [token, channel] by random weights of `width` columns."""
    import torch
    return x @ (torch.randn(width, x.shape[1]) * _INITIAL_STD).T


def convolved(x: torch.Tensor) -> torch.Tensor:
    """Convolve each channel over the last few tokens, then SiLU."""
    import torch
    from torch.nn.functional import conv1d, pad, silu
    bound = 1 / math.sqrt(_KERNEL)
    weights = torch.empty(x.shape[1], 1, _KERNEL).uniform_(-bound, bound)
    return silu(conv1d(pad(x.T[None], (_KERNEL - 1, 0)), weights, groups=x.shape[1])[0].T)


def time_step_bias(count: int) -> torch.Tensor:
    """Biases after which softplus gives time steps spread evenly over their logarithms."""
    import torch
    low, high = math.log(_TIME_STEP_MIN), math.log(_TIME_STEP_MAX)
    step = torch.exp(torch.empty(count).uniform_(low, high))
    return step + torch.log(-torch.expm1(-step))


def relative_errors(recurrence: Recurrence, rungs: dict[str, Callable], start: int,
                    after: list[int], read_over: int = 64) -> dict[str, list[dict[str, float]]]:
    """Round the state once after `start` tokens and run on, beside the exact run.

    Args:
        rungs: functions from a state [head, key, value] to the rounded one.
        after: numbers of further tokens, ascending; 0 is the hand-off itself.
        read_over: tokens over which the error of what is read is measured.

    Returns:
        For each rung and number: relative errors (L2) of the state and of what the last
        `read_over` tokens read from it (of the hand-off: what that many last tokens would read).
    """
    import torch
    exact = recurrence.empty()
    for exact in recurrence.states(exact, 0, start):
        pass
    states = torch.stack([exact, *(rounded(exact) for rounded in rungs.values())])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in rungs}

    def note(steps: int, difference: torch.Tensor, whole: torch.Tensor) -> None:
        state_error = _norms(states[1:] - states[0]) / _norms(states[:1])
        for row, name in enumerate(rungs):
            found[name].append({"steps": steps, "state": float(state_error[row]),
                                "read": float((difference[row] / whole).sqrt())})

    def squares(tokens: range) -> tuple[torch.Tensor, torch.Tensor]:
        reads = torch.stack([recurrence.output(states, token) for token in tokens])
        return (reads[:, 1:] - reads[:, :1]).square().sum((0, 2, 3)), reads[:, 0].square().sum()

    with torch.no_grad():
        if after and after[0] == 0:
            note(0, *squares(range(start - read_over, start)))
        difference, whole = torch.zeros(len(rungs)), torch.zeros(())
        for token, states in enumerate(recurrence.states(states, start, start + after[-1]), start):
            steps = token - start + 1
            ahead = next(number for number in after if number >= steps)
            if steps > ahead - read_over:
                one, all_ = squares(range(token, token + 1))
                difference, whole = difference + one, whole + all_
            if steps == ahead:
                note(steps, difference, whole)
                difference, whole = torch.zeros(len(rungs)), torch.zeros(())
    return found


def _norms(states: torch.Tensor) -> torch.Tensor:
    return states.flatten(1).norm(dim=1)
