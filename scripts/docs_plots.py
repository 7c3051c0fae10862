"""Plots of the documentation, drawn from the raw results in bench/results/.

python scripts/docs_plots.py FOLDER       write the plots as SVG files
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
_INK = "#7f8c99"  # legible on white and on black
_FULL, _CACHED, _BETTER = "#9aa5b1", "#2f80ed", "#27ae60"
_NAMES = {
    "full": "full prefill",
    "standalone": "standalone",
    "standalone+recompute:0.1": "standalone, recompute 0.1",
    "fast": "fast",
    "balanced": "balanced",
    "refined": "refined",
}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cpucache",  # fixed, so that the same results have the same bytes
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "font.size": 10,
}


def plots() -> dict[str, str]:
    """Returns every plot by name, as the text of an SVG."""
    drawn: dict[str, Callable[[], Figure]] = {
        "ttft": lambda: _ttft(_read("ttft")),
        "fidelity-time": lambda: _quality_and_time(
            [("5 of 12 passages", _read("nq-5-of-12")), ("10 of 16", _read("nq-10-of-16"))]
        ),
        "fidelity-kl": lambda: _divergence(
            [("5 of 12 passages", _read("nq-5-of-12")), ("10 of 16", _read("nq-10-of-16"))]
        ),
    }
    with mpl.rc_context(_STYLE):
        return {name: _svg(draw()) for name, draw in drawn.items()}


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _ttft(result: dict[str, Any]) -> Figure:
    """Bars of times to first token, on a logarithmic scale."""
    bars = {
        "full prefill": (result["full"]["flash off"], _FULL),
        "balanced, another order": (result["balanced"], _CACHED),
        "fast, another order": (result["other"], _CACHED),
        "exact, from disk": (result["disk"], _BETTER),
        "exact, from RAM": (result["ram"], _BETTER),
        "the floor": (result["floor"], _FULL),
    }
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    axes = figure.subplots()
    names = list(bars)[::-1]
    times = [bars[name][0]["median_ms"] for name in names]
    drawn = axes.barh(names, times, color=[bars[name][1] for name in names])
    axes.bar_label(drawn, [_time(each) for each in times], padding=3, color=_INK)
    axes.set_xscale("log")
    axes.set_xlim(50, 40_000)
    axes.set_xlabel("time to first token in ms, logarithmic")
    return figure


def _quality_and_time(results: Sequence[tuple[str, dict[str, Any]]]) -> Figure:
    """F1 against time to first token: a point a variant, with the interval of its difference from full prefill."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    for axes, (picked, result) in zip(figure.subplots(1, len(results), sharey=True), results, strict=True):
        for each, marker in zip(result["variants"], "*osD^vP", strict=False):
            f1, seconds = each["scores"]["f1"], each["ttft"]["median_ms"] / 1000
            spread = [[f1["difference"] - f1["low"]], [f1["high"] - f1["difference"]]] if "low" in f1 else None
            name = _NAMES.get(each["variant"], each["variant"])
            axes.errorbar([seconds], [f1["mean"]], yerr=spread, fmt=marker, markersize=7, capsize=3, label=name)
        axes.axhline(result["variants"][0]["scores"]["f1"]["mean"], color=_INK, linewidth=0.7, zorder=0)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.margins(0.15, 0.1)
        axes.set_xlabel("time to first token in s, logarithmic")
        _title(axes, picked, result)
    figure.axes[0].set_ylabel("F1, points of 100")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def _divergence(results: Sequence[tuple[str, dict[str, Any]]]) -> Figure:
    """Bars of the divergence from full prefill, one a variant."""
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    for axes, (picked, result) in zip(figure.subplots(1, len(results), sharey=True), results, strict=True):
        variants = [each for each in result["variants"] if each["variant"] != "full"][::-1]
        names = [_NAMES.get(each["variant"], each["variant"]) for each in variants]
        drawn = axes.barh(names, [each["kl"] for each in variants], color=_CACHED)
        axes.bar_label(drawn, [f"{each['kl']:.3f} ({each['same']:.0%})" for each in variants], padding=3, color=_INK)
        axes.set_xlim(0, 0.55)
        axes.set_xlabel("mean KL in nats (equal answers)")
        _title(axes, picked, result)
    return figure


def _title(axes: Axes, picked: str, result: dict[str, Any]) -> None:
    axes.set_title(f"{picked}, {result['variants'][0]['n']} questions", fontsize=10, color=_INK)


def _time(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.1f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"


def main() -> None:
    """Writes every plot into the folder that the command line names."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, drawing in plots().items():
        (folder / f"{name}.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
