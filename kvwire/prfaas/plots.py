"""Plots of a plan as PNG; matplotlib is imported when one is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from kvwire.errors import UnsupportedError, UsageError
from kvwire.prfaas.profiles import GBPS
from kvwire.prfaas.throughput import Deployment, Plan, Stages

__all__ = ["plot_plan"]


def plot_plan(deployment: Deployment, plan: Plan, path: Path | str) -> None:
    """Write what every stage allows against the threshold, and the link's load below it.

    Raises:
        UnsupportedError: matplotlib is not installed. UsageError: nothing can be offloaded.
    """
    if deployment.prfaas is None:
        raise UsageError(f"deployment {deployment.name!r} has no remote cluster; a plot over the "
                         "threshold would be empty")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("plots need matplotlib: pip install kvwire[plan]") from None
    stages = Stages(replace(deployment, threshold_tokens=None))
    inside = np.isfinite(stages.thresholds) & (stages.thresholds > 0)
    thresholds = stages.thresholds[inside]
    compute, link = (rates[inside] for rates in stages.remote_rates())
    local = stages.local_rate(plan.prefill_nodes)[inside]
    decode = np.full(len(thresholds), plan.theta_decode_rps)
    best = np.minimum.reduce([compute, link, local, decode])

    figure = Figure(figsize=(8, 7), layout="constrained")
    FigureCanvasAgg(figure)
    rates, load = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, values in (("remote prefill", compute), ("link", link), ("local prefill", local),
                         ("decode", decode)):
        rates.plot(thresholds, values, linewidth=1.2, label=name)
    rates.plot(thresholds, best, color="black", linewidth=2.2, label="all together")
    rates.set_ylim(0, 2.5 * plan.lambda_max_rps)
    rates.set_ylabel("requests/s of the whole load")
    rates.set_title(f"{deployment.name}\n{plan.lambda_max_rps:.2f} requests/s, "
                    f"{plan.prefill_nodes} prefill and {plan.decode_nodes} decode nodes")
    egress = best * stages.offloaded_share[inside] * stages.wire_bytes[inside] * GBPS
    load.plot(thresholds, egress, color="black", linewidth=1.5)
    load.axhline(deployment.link.goodput_gbps, color="gray", linestyle=":", label="link")
    load.set(xscale="log", yscale="log", xlabel="threshold, tokens", ylabel="egress, Gbit/s",
             ylim=(max(egress.max() / 300, 1e-3), 2 * deployment.link.goodput_gbps))
    if 0 < plan.threshold_tokens < thresholds[-1]:
        for axes in (rates, load):
            axes.axvline(plan.threshold_tokens, color="tab:red", linestyle="--", linewidth=1,
                         label=f"threshold {plan.threshold_tokens:,.0f}")
    rates.legend(loc="upper left", fontsize="small")
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from None
