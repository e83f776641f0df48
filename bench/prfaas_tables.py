"""Tables 3, 5 and 6 of arXiv 2604.15039 beside what kvwire's throughput model makes of them.

Every figure has a kind. "predicted": from inputs that are not this figure, nor fitted to it.
"fitted": inputs were chosen so that it comes out; that it does proves nothing. "rounded": the paper
gives so few digits that no better agreement can be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from kvwire.layout import CacheSpec
from kvwire.prfaas.lengths import TruncatedLognormal
from kvwire.prfaas.profiles import GBPS, ModelProfile
from kvwire.prfaas.throughput import (
    Deployment, Link, LocalCluster, Plan, PrefillCluster, evaluate, pool_egress_gbps, solve,
)

__all__ = ["CaseStudy", "Input", "Row", "fit_case_study", "table_3", "table_5", "table_6", "worst"]

LENGTHS = {"1K": 1024, "8K": 8192, "32K": 32768, "128K": 131072}

PHI_GBPS = {
    "kimi-linear-48b": (1.19, 2.29, 3.87, 4.88),
    "mimo-v2-flash": (0.82, 2.85, 4.66, 4.71),
    "qwen3.5-397b": (4.13, 6.28, 8.25, 7.47),
    "ring-2.5-1t": (7.27, 4.47, 2.59, 1.46),
    "minimax-m2.5": (4.94, 32.87, 59.93, 47.82),
    "qwen3-235b": (4.12, 22.42, 33.35, 21.50),
}
"""Table 3, on 8 H200, at LENGTHS."""

CASE_S_MIB = (190.8, 308.9, 701.3, 2316.3)
CASE_PREFILL_S = (0.44, 0.72, 1.84, 7.40)
CASE_PHI_GBPS = (3.61, 3.59, 3.19, 2.62)
"""Table 5: the 1T model on 8 H200."""

THRESHOLD_TOKENS = 19_400
LINK_GBPS = 100


@dataclass(frozen=True)
class Row:
    """One figure: the paper's and ours. `note` explains what kind and error alone do not."""

    table: str
    row: str
    column: str
    kind: str
    paper: float
    ours: float
    note: str = ""

    @property
    def rel_error(self) -> float:
        return self.ours / self.paper - 1

    def as_json(self) -> dict[str, object]:
        """Return the row of the result file; figures in four digits."""
        return {"table": self.table, "row": self.row, "column": self.column, "kind": self.kind,
                "paper": self.paper, "ours": float(f"{self.ours:.4g}"),
                "rel_error": round(self.rel_error, 4), "note": self.note}


@dataclass(frozen=True)
class Input:
    """A number that the paper does not give, and what it was fitted to."""

    name: str
    value: float
    fitted_to: str
    note: str = ""


@dataclass(frozen=True)
class CaseStudy:
    """The three deployments of table 6, and what had to be fitted for them."""

    remote_prefill: Deployment
    homogeneous: Deployment
    inputs: tuple[Input, ...]


# ---- table 3

def table_3() -> tuple[list[Row], list[Input]]:
    """Phi_kv of six models.

    The paper gives no prefill times with it. A floor, a linear and a quadratic term are fitted to
    the times that its figures and the caches' sizes imply: three numbers to four.
    """
    rows, inputs = [], []
    for model, figures in PHI_GBPS.items():
        spec = CacheSpec.preset(model)
        tokens = np.array(list(LENGTHS.values()), float)
        sizes = np.array([spec.bytes(int(count)) for count in tokens], float)
        implied_s = sizes * GBPS / np.array(figures)
        terms = np.stack((np.ones(4), tokens, tokens**2), axis=1) / implied_s[:, None]
        coefficients = np.linalg.lstsq(terms, np.ones(4), rcond=None)[0]
        fitted_s = terms @ coefficients * implied_s
        inputs += [Input(f"{model}: prefill seconds, term {name}", float(value),
                         "table 3, this model's column")
                   for name, value in zip(("floor", "per token", "per token squared"),
                                          coefficients)]
        for name, paper, ours in zip(LENGTHS, figures, sizes * GBPS / fitted_s):
            rows.append(Row("3", name, f"Phi_kv Gbit/s, {model}", "fitted", paper, float(ours),
                            "three terms of the prefill time to four figures; what is tested is "
                            "that such a smooth time exists, with the cache's size from the "
                            "model's configuration"))
    return rows + list(_table_3_text()), inputs


def _table_3_text() -> Iterator[Row]:
    minimax = CacheSpec.preset("minimax-m2.5").bytes(LENGTHS["128K"])
    yield Row("3", "128K", "Phi_kv Gbit/s, minimax-m2.5, by figure 2", "predicted", 47.82,
              minimax * GBPS / 5.5, "5.5 s, read off the paper's figure 2 to two digits")
    at = {model: dict(zip(LENGTHS, figures)) for model, figures in PHI_GBPS.items()}
    text = "by the text; computed from table 3's own Phi_kv, so it tests the equation alone"
    for model, length, gpus, paper in (("minimax-m2.5", "32K", 512, 3800),
                                       ("qwen3-235b", "32K", 512, 2100),
                                       ("ring-2.5-1t", "32K", 512, 170),
                                       ("ring-2.5-1t", "128K", 10_000, 1800)):
        tokens = LENGTHS[length]
        seconds = CacheSpec.preset(model).bytes(tokens) * GBPS / at[model][length]
        profile = ModelProfile.of_spec(model, CacheSpec.preset(model),
                                       ((tokens, seconds), (2 * tokens, 2 * seconds)))
        yield Row("3", f"{gpus} GPUs, {length}", f"B_out Gbit/s, {model}", "rounded", paper,
                  pool_egress_gbps(gpus / 8, profile, tokens), text)
    for name, above, below, paper in (("minimax-m2.5 over mimo-v2-flash", "minimax-m2.5",
                                       "mimo-v2-flash", 13),
                                      ("qwen3-235b over qwen3.5-397b", "qwen3-235b",
                                       "qwen3.5-397b", 4)):
        yield Row("3", "32K", f"ratio of Phi_kv, {name}", "rounded", paper,
                  at[above]["32K"] / at[below]["32K"], text)


# ---- table 5

def case_profile() -> ModelProfile:
    """Return the 1T model on 8 H200: table 5's times, the preset's sizes."""
    return ModelProfile.of_spec("prfaas-1t, 8 H200", CacheSpec.preset("prfaas-1t"),
                                tuple(zip(LENGTHS.values(), CASE_PREFILL_S)))


def table_5() -> tuple[list[Row], list[Input]]:
    """S_kv and Phi_kv of the 1T model. Its configuration is not published; the sizes at 1K and 8K
    give what a token and the states take, and small whole layer numbers fit both."""
    profile, rows = case_profile(), []
    for index, (name, tokens) in enumerate(LENGTHS.items()):
        fitted = index < 2
        size_note = ("42 KDA and 15 MLA layers, chosen for the sizes at 1K and 8K" if fitted else
                     "from the layers fitted at 1K and 8K; the paper's figure fits to 0.01 % at "
                     f"{'32,000' if index == 2 else '130,000'} tokens, which it may have run, "
                     "and not at the nominal length")
        ours = profile.cache_bytes(tokens)
        rows.append(Row("5", name, "S_kv MiB", "fitted" if fitted else "predicted",
                        CASE_S_MIB[index], ours / 2**20, size_note))
        rows.append(Row("5", name, "Phi_kv Gbit/s", "predicted", CASE_PHI_GBPS[index],
                        profile.kv_throughput_gbps(tokens),
                        "the size over table 5's T_prefill, which has two decimals; longer "
                        "lengths as for S_kv"))
    inputs = [Input("prefill layers: KDA", 42, "table 5, S_kv at 1K and 8K"),
              Input("prefill layers: MLA", 15, "table 5, S_kv at 1K and 8K")]
    return rows, inputs


# ---- table 6

def fit_case_study() -> CaseStudy:
    """Return the deployments of section 4, with the H20's unpublished figures fitted.

    The H20's prefill time is the H200's, its floor stretched by one factor and what is above it by
    another; both follow from the two Theta_pd-p of table 6. Decoding: 20 requests at once at 40
    tokens a second is the only whole number that gives its Theta_pd-d.
    """
    lengths = TruncatedLognormal(9.90, 1.00, 128, 131_072)
    fast = case_profile()
    tokens, _ = lengths.grid()
    times = fast.prefill_times(tokens)
    all_s, short_s = float(times.mean()), float(times[tokens <= THRESHOLD_TOKENS].mean())
    slow_all_s, slow_short_s = 9 / 2.11, 3 / 1.64
    factor = (slow_all_s - slow_short_s) / (all_s - short_s)
    floor_factor = (slow_all_s - factor * (all_s - fast.floor_s)) / fast.floor_s
    slow = fast.slower("prfaas-1t, 8 H20", factor, floor_factor)
    local = LocalCluster(8, slow, batch_max=20, decode_step_s=1 / 40)
    fitted_to = "table 6, Theta_pd-p 1.64 (3 nodes, short requests) and 2.11 (9 nodes, all)"
    return CaseStudy(
        Deployment("PrfaaS-PD", lengths, 1024, local, PrefillCluster(4, fast), Link(LINK_GBPS)),
        Deployment("homogeneous PD", lengths, 1024, replace(local, nodes=12)),
        (Input("H20: time above the floor, over the H200's", factor, fitted_to,
               "with one factor for all of the time, fitted to 2.11, Theta_pd-p would be 1.43 in "
               "place of 1.64; with the H200's floor, 1.80. So two numbers are needed"),
         Input("H20: floor, over the H200's", floor_factor, fitted_to),
         Input("requests that decode at once on 8 H20", 20, "table 6, Theta_pd-d 3.91 (5 nodes)",
               "at the 40 tokens/s that the paper names as its goal")))


def table_6(case: CaseStudy) -> list[Row]:
    """The three deployments but for their times to first token, which need a simulation."""
    remote = case.remote_prefill
    best, ours = solve(remote), evaluate(remote, THRESHOLD_TOKENS, 3)
    alone = solve(case.homogeneous)
    naive = evaluate(remote, 0, 0)
    return [*_lengths_rows(remote, ours), *_best_rows(best), *_rate_rows(ours),
            *_homogeneous_rows(alone), *_naive_rows(naive, ours, alone),
            Row("6", "Lambda_max over homogeneous", "PrfaaS-PD", "predicted", 1.54,
                best.lambda_max_rps / alone.lambda_max_rps,
                "the numerator follows from table 5, the denominator is fitted")]


def _lengths_rows(deployment: Deployment, plan: Plan) -> Iterator[Row]:
    yield Row("6", "mean input, K tokens", "all", "rounded", 27,
              deployment.lengths.mean() / 1024, "27,486 tokens")
    yield Row("6", "offloaded share p", "PrfaaS-PD", "predicted", 0.496, plan.offloaded_share,
              "from the distribution, at the paper's threshold")
    yield Row("6", "l_long, K tokens", "PrfaaS-PD", "rounded", 44, plan.long_tokens / 1024,
              "45,046 tokens, 44.0 times 1,024")


def _best_rows(best: Plan) -> Iterator[Row]:
    yield Row("6", "threshold t, tokens", "PrfaaS-PD", "predicted", THRESHOLD_TOKENS,
              best.threshold_tokens, "equation 7; the local side of it rests on the fitted H20")
    for name, paper, ours in (("N_prfaas", 4, best.prfaas_nodes), ("N_p", 3, best.prefill_nodes),
                              ("N_d", 5, best.decode_nodes)):
        kind = "predicted" if name != "N_prfaas" else "rounded"
        yield Row("6", name, "PrfaaS-PD", kind, paper, ours,
                  "given" if name == "N_prfaas" else "by search over all splits")


def _rate_rows(plan: Plan) -> Iterator[Row]:
    column = "PrfaaS-PD"
    yield Row("6", "Theta_prfaas", column, "predicted", 1.61, plan.theta_prfaas_rps,
              "table 5's times, averaged over the requests above the threshold; the time at their "
              "mean length would give 1.63")
    yield Row("6", "Theta_pd-p", column, "fitted", 1.64, plan.theta_prefill_rps, "the H20's times")
    yield Row("6", "Theta_pd-d", column, "fitted", 3.91, plan.theta_decode_rps, "the batch of 20")
    yield Row("6", "Lambda_max", column, "predicted", 3.24, plan.lambda_max_rps,
              "bound by Theta_prfaas, which is predicted")
    egress = "the paper says about 13 and 13 %; sizes and rate above give this"
    yield Row("6", "egress Gbit/s", column, "rounded", 13, plan.egress_gbps, egress)
    yield Row("6", "egress, share of the link", column, "rounded", 0.13, plan.link_utilisation,
              egress)


def _homogeneous_rows(plan: Plan) -> Iterator[Row]:
    column = "homogeneous PD"
    yield Row("6", "N_p", column, "predicted", 9, plan.prefill_nodes, "by search over all splits")
    yield Row("6", "N_d", column, "predicted", 3, plan.decode_nodes, "by search over all splits")
    yield Row("6", "Theta_pd-p", column, "fitted", 2.11, plan.theta_prefill_rps, "the H20's times")
    yield Row("6", "Theta_pd-d", column, "predicted", 2.35, plan.theta_decode_rps,
              "from the batch of 20, fitted to another column")
    yield Row("6", "Lambda_max", column, "fitted", 2.11, plan.lambda_max_rps, "it is Theta_pd-p")


def _naive_rows(plan: Plan, prfaas: Plan, homogeneous: Plan) -> Iterator[Row]:
    column = "naive heterogeneous PD"
    yield Row("6", "Theta_prfaas", column, "predicted", 2.45, plan.theta_prfaas_rps,
              "table 5's times, averaged over all requests; the time at their mean length would "
              "give 2.53")
    yield Row("6", "Theta_pd-d", column, "predicted", 6.25, plan.theta_decode_rps,
              "from the batch of 20, fitted to another column")
    yield Row("6", "Lambda_max", column, "predicted", 2.45, plan.lambda_max_rps)
    yield Row("6", "Lambda_max over homogeneous", column, "predicted", 1.16,
              plan.lambda_max_rps / homogeneous.lambda_max_rps, "the denominator is fitted")
    yield Row("6", "Lambda_max below PrfaaS-PD", column, "rounded", 0.25,
              1 - plan.lambda_max_rps / prfaas.lambda_max_rps, "by the text")


def worst(rows: list[Row]) -> float:
    """Return the largest error of the figures that are predicted."""
    return max((abs(row.rel_error) for row in rows if row.kind == "predicted"), default=math.nan)
