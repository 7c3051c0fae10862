"""Plot of ``cpucache fidelity``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpucache.bench.plot import new_figure
from cpucache.engine.advice import FidelityReport

_BEST = 3
"""Most changes that are drawn."""
_LEAST = 1e-6
"""Least divergence that is drawn, in nats: a logarithmic scale has no zero."""


def plot_fidelity(report: FidelityReport, path: Path) -> None:
    """Plots the divergence along the tokens, now and with the changes that help most.

    Raises ``InputError`` as ``new_figure`` does.
    """
    figure = new_figure(path)
    axes = figure.subplots()
    now = report.now.distance
    for trial in (report.now, *(trial for trial in report.trials[:_BEST] if report.gain(trial) > 0)):
        kl = trial.distance.kl
        label = f"{trial.change or 'now'}: {trial.distance.kl_mean:.3g} on average"
        axes.semilogy(np.arange(1, len(kl) + 1), np.maximum(kl, _LEAST), marker=".", linewidth=1, label=label)
    if 0 < now.asked < len(now.kl):
        axes.axvline(now.asked + 0.5, color="0.6", linewidth=1, linestyle="--", zorder=0)
        place = axes.get_xaxis_transform()
        axes.text(now.asked + 0.3, 0.98, "prompt", transform=place, ha="right", va="top", color="0.4", fontsize=9)
        axes.text(now.asked + 0.7, 0.98, "answer", transform=place, ha="left", va="top", color="0.4", fontsize=9)
    axes.set_xlabel("predicted tokens")
    axes.set_ylabel("KL divergence from full prefill, in nats")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=150)
