"""Plots of simulations as PNG; matplotlib is imported when one is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kvwire.errors import UnsupportedError, UsageError

__all__ = ["plot_rates", "plot_timeline", "plot_ttft", "require_matplotlib"]


def plot_ttft(title: str, times_s: Mapping[str, np.ndarray], path: Path | str) -> None:
    """Write the distributions of times to first token, one curve a name.

    Raises: UnsupportedError: matplotlib is not installed. UsageError: `path` cannot be written.
    """
    figure, axes = _figure()
    for name, values in times_s.items():
        ordered = np.sort(values[np.isfinite(values)])
        axes.plot(ordered, np.arange(1, len(ordered) + 1) / max(1, len(values)), label=name)
    axes.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    axes.set(title=title, xscale="log", xlabel="time to first token, s", ylabel="share of requests",
             ylim=(0, 1))
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_rates(title: str, groups: Sequence[str], rates_rps: Mapping[str, Sequence[float]],
               path: Path | str) -> None:
    """Write bars of requests a second: for each group one bar a name.

    Raises: as `plot_ttft`.
    """
    figure, axes = _figure()
    width = 0.8 / max(1, len(rates_rps))
    for number, (name, values) in enumerate(rates_rps.items()):
        at = np.arange(len(groups)) + (number - (len(rates_rps) - 1) / 2) * width
        axes.bar_label(axes.bar(at, values, width, label=name), fmt="%.2f", fontsize="x-small")
    axes.set_xticks(np.arange(len(groups)), groups)
    axes.set(title=title, ylabel="requests/s")
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_timeline(title: str, requests: tuple[np.ndarray, np.ndarray],
                  faults: Sequence[tuple[float, float]], path: Path | str) -> None:
    """Write times to first token against arrival, with the faults as bands.

    Args:
        requests: arrival and time to first token of each, in seconds; infinite: it failed.
        faults: (begin, end) in seconds.

    Raises: as `plot_ttft`.
    """
    figure, axes = _figure()
    arrival_s, times_s = requests
    served = np.isfinite(times_s)
    axes.plot(arrival_s[served], times_s[served], ".", markersize=2, label="served")
    if not served.all():
        axes.plot(arrival_s[~served], np.full((~served).sum(), times_s[served].max()), "x",
                  markersize=3, color="tab:red", label="failed")
    for begin_s, end_s in faults:
        axes.axvspan(begin_s, end_s, color="tab:red", alpha=0.15)
    axes.set(title=title, yscale="log", xlabel="arrival, s", ylabel="time to first token, s")
    axes.legend(fontsize="small", markerscale=2)
    _save(figure, path)


def require_matplotlib() -> None:
    """Raise UnsupportedError unless plots can be made; worth knowing before a long simulation."""
    try:
        import matplotlib.backends.backend_agg  # noqa: F401
    except ImportError:
        raise UnsupportedError("plots need matplotlib: pip install kvwire[plan]") from None


def _figure():
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _save(figure, path: Path | str) -> None:
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error}") from None
