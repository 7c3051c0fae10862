"""Plot of ``cpucache schema show``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpucache.bench.plot import new_figure

_COLOURS = {"schema": "0.35", "module": "tab:cyan", "union": "tab:purple", "parameter": "tab:olive"}
_LINE = 0.26
"""Height of a bar with its margin, in inches."""


@dataclass(frozen=True)
class Bar:
    """A part of a schema, as a bar from position ``start`` to ``end``."""

    label: str
    kind: str
    start: int
    end: int
    unused: int
    """Positions after ``end`` that the union of this member reserves and the member leaves empty."""
    cached: float | None
    """Cached share of the part's own text; ``None`` for a part without text of its own."""
    note: str
    """Text beside the bar."""


def plot_schema(bars: Sequence[Bar], title: str, path: Path) -> None:
    """Plots the parts of a schema, one below the other, along its positions.

    Cached text is filled; positions that a member of a union leaves empty are hatched. Raises ``InputError`` as
    ``new_figure`` does.
    """
    figure = new_figure(path)
    figure.set_size_inches(9, 1.2 + _LINE * len(bars))
    axes = figure.subplots()
    for at, bar in enumerate(bars):
        colour = _COLOURS[bar.kind]
        size = bar.end - bar.start
        axes.barh(at, size, left=bar.start, height=0.7, facecolor="none", edgecolor=colour, linewidth=1)
        if bar.cached:
            axes.barh(at, size * bar.cached, left=bar.start, height=0.7, color=colour, alpha=0.7)
        if bar.unused:
            axes.barh(
                at, bar.unused, left=bar.end, height=0.7, facecolor="none", edgecolor="0.8", hatch="////", linewidth=0
            )
        axes.text(bar.end + bar.unused, at, f" {bar.note}", va="center", fontsize=7, color="0.3")
    axes.set_yticks(range(len(bars)), [bar.label.replace("$", r"\$") for bar in bars], fontsize=8, ha="left")
    axes.tick_params(axis="y", length=0, pad=_room(bars))
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.set_xlim(left=0)
    axes.set_xlabel("positions; numbers are tokens; filled: cached; hatched: unused positions of a union")
    axes.set_title(title.replace("$", r"\$"), fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def _room(bars: Sequence[Bar]) -> float:
    """Width of the left-aligned labels, in points."""
    return 4.6 * max(len(bar.label) for bar in bars)
