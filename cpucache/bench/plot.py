"""Plots of measurements, as files. matplotlib is imported only when a plot is drawn."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpucache.bench.tasks import FULL
from cpucache.errors import InputError

if TYPE_CHECKING:
    from cpucache.bench.accuracy import AccuracyReport

_TITLES = {"f1": "F1", "exact_match": "EM", "rouge_l": "ROUGE-L", "accuracy": "accuracy"}


def new_figure(path: Path) -> Any:
    """Returns an empty figure that can be saved to ``path``. Commands call it before a long measurement, as a check.

    Raises ``InputError`` if matplotlib is not installed or does not know the suffix, or the folder does not exist.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("drawing needs another package: pip install 'cpucache[bench]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise InputError(f"{path}: can't draw into this file; its suffix must be one of {', '.join(sorted(known))}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    return figure


def measure_title(name: str) -> str:
    """Returns the name of a measure as people write it."""
    return _TITLES.get(name, name)


def plot_accuracy(report: AccuracyReport, path: Path) -> None:
    """Plots quality against time to first token: a point a variant, and the interval of its gain over full prefill.

    Raises ``InputError`` as ``new_figure`` does.
    """
    figure = new_figure(path)
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    name = report.measures[0]
    for outcome, marker in zip(report.outcomes, cycle("osD^vP*X"), strict=False):
        x, y = outcome.ttft.median / 1000, 100 * outcome.scores[name]
        gain = outcome.gains.get(name)
        # Rounding may leave a mean outside an interval of no width, and bars must not be negative.
        bars = [[max(0, 100 * size)] for size in (gain.mean - gain.low, gain.high - gain.mean)] if gain else None
        axes.errorbar([x], [y], yerr=bars, fmt=marker, capsize=3, label=outcome.variant)
        if outcome.variant == FULL:
            axes.axhline(y, color="0.8", linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(0.15)
    axes.set_xlabel("time to first token, median, in seconds")
    axes.set_ylabel(f"{measure_title(name)}, points of 100")
    axes.set_title(f"{report.model}: {report.task} on {report.data}, {report.outcomes[0].n} questions", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=150)
