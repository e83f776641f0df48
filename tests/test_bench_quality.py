"""bench.quality: it rounds what it says, and follows an error as a recurrence does."""

import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parent.parent))

from bench import quality  # noqa: E402
from bench.recurrences import Recurrence, recurrences, relative_errors  # noqa: E402
from kvwire.quantised import Rung  # noqa: E402


def words(tokens: int) -> np.ndarray:
    values = np.random.default_rng(1).standard_normal((tokens, 3, 64)).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def test_a_prefix_keeps_its_edges():
    source = words(1500)
    for rung, ratio in ((Rung.INT8, 1.7), (Rung.INT6, 2.1), (Rung.INT4, 2.8), (Rung.E4M3, 1.8)):
        found, travelling = quality.round_prefix(source, rung, True, edges=True)
        assert (found[:4] == source[:4]).all() and (found[-128:] == source[-128:]).all()
        assert (found[4:-128] != source[4:-128]).any((1, 2)).all()
        assert ratio < source.nbytes / travelling < ratio * 1.1
        bare, fewer = quality.round_prefix(source, rung, True, edges=False)
        assert fewer < travelling and (bare[:4] != source[:4]).any()
    found, travelling = quality.round_prefix(source, Rung.EXACT, True, edges=True)
    assert (found == source).all() and travelling == source.nbytes


def test_an_error_decays_as_the_state_does():
    tokens, decay = 40, 0.9
    zeros = torch.zeros(tokens, 1, 2)
    made = Recurrence("test", zeros, zeros, torch.full((tokens, 1, 1), decay), zeros + 1, None)
    made.values[0] = made.keys[0] = 1.0  # all of the state is written by the first token

    def spoilt(state):
        return state + torch.tensor([[0.0, 0.1], [0.0, 0.1]]) * state[0, 0, 0]

    (errors,) = relative_errors(made, {"spoilt": spoilt}, 8, [0, 1, 16], read_over=4).values()
    assert [error["steps"] for error in errors] == [0, 1, 16]
    for error in errors:  # both decay alike
        assert error["state"] == pytest.approx(0.1 / np.sqrt(2), rel=1e-4)
        assert error["read"] == pytest.approx(0.1 / np.sqrt(2), rel=1e-4)


def test_a_delta_rule_forgets_what_it_overwrites():
    made = recurrences(torch.randn(300, 32, generator=torch.Generator().manual_seed(1)))
    assert [r.name for r in made] == ["gdn", "kda", "mamba2", "gdn, slow decay",
                                      "kda, slow decay", "mamba2, slow decay"]
    for recurrence in made:
        errors = relative_errors(recurrence, {"halved": lambda state: state * 0.5}, 100, [0, 199])
        first, last = errors["halved"]
        assert first["state"] == pytest.approx(0.5, rel=1e-3)
        assert last["state"] < 0.5 * first["state"]
    rows = [{"kind": "state", "recurrence": "gdn", "rung": rung, "steps": 5, "read_error": 0.5,
             "ratio": 2.0, "ratio_then_tiers": 2.5}
            for rung in quality.STATE_RUNGS]
    quality.print_tables(rows)


def test_what_travels_is_what_a_sender_sends():
    random = np.random.default_rng(2)
    state = (random.standard_normal((2, 64, 64)) * 2.0 ** random.uniform(-6, 6, (2, 64, 1))
             ).astype(np.float32)
    keys, values = words(1500), words(1500)
    with quality.Wire() as wire:
        for rung, *_, sent_as in quality.STATE_RUNGS.values():
            ratio = state.nbytes / wire.state_bytes(state, sent_as)
            assert ratio > {Rung.BF16: 2.6, Rung.INT8_GRID: 3.7, Rung.E4M3: 4.2}[rung]
        for scheme in quality.SCHEMES:
            found = wire.kv_bytes([(keys, values)], scheme)
            rounded = quality._rounded_layers([(keys, values)], scheme)[1]
            assert (scheme.lossy is None and np.isnan(found)) or 0.6 < found / rounded < 0.99
