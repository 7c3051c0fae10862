"""``cpucache fidelity``: how far a cached answer is from the uncached one, and which setting brings it nearer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cpucache.bench.fidelity_plot import plot_fidelity
from cpucache.bench.plot import new_figure
from cpucache.cli.console import err, out, seconds
from cpucache.cli.options import engine_options, fidelity_options, split_fidelity
from cpucache.cli.text import read_asked
from cpucache.engine import Engine
from cpucache.engine.advice import FidelityReport, OnTrial

_WORST = 12
"""Number of tokens shown without ``--all``."""
_BAR = 16
_NEAR = 1e-3
"""KL divergence, in nats, that makes no difference to an answer."""
_PATIENCE = 3600.0
"""Seconds that the estimate of the time left looks back."""


@click.command(short_help="Measure how far a cached answer is from the uncached one.")
@click.argument("prompt")
@click.option("-s", "--schema", "schema_file", metavar="FILE", help="The schema of a PML prompt; - for standard input.")
@engine_options
@fidelity_options
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Number of tokens of the answer to compare.",
)
@click.option("--no-advice", is_flag=True, help="Do not try other settings.")
@click.option(
    "--all", "everything", is_flag=True, help=f"Show every token, not only the {_WORST} with the largest divergence."
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the divergence along the tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def fidelity(
    prompt: str,
    schema_file: str | None,
    model: str,
    max_tokens: int,
    no_advice: bool,
    everything: bool,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare the cached answer to PROMPT, a file (- for standard input), with the uncached answer.

    Slices that attended to other text than precedes them in the prompt approximate full prefill. The prompt is
    evaluated both ways. For its last fresh tokens, and for each token of the uncached answer, the predictions of the
    next token are compared: by the Kullback-Leibler divergence (KL, in nats; 0: no difference), by whether both predict
    the same token (top-1), and by how much less likely the token has become (NLL).

    Then further settings are tried: more recomputed tokens, and exact slices. They are listed with benefit and cost,
    the best first. That takes as long as several full prefills.

    \b
    cpucache fidelity schemas/trip/kyoto-first-visit.xml -s schemas/trip/schema.xml
    cpucache fidelity notes.txt --reuse anywhere
    """
    exactness = split_fidelity(options)
    asked, schema = read_asked(prompt, schema_file, exactness)
    if plot:
        # An error that would come at the end comes now.
        new_figure(plot)
    with Engine(model, **options) as engine:
        if schema is not None:
            engine.add_schema(schema)
        settings = exactness | {"max_tokens": max_tokens, "advise": not no_advice}
        with _bar(shown=not as_json) as progress:
            report = engine.fidelity(**asked, progress=progress, **settings)
    if plot:
        plot_fidelity(report, plot)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    out.print(_tokens(report, everything=everything))
    out.print(_averages(report))
    out.print(_answers(report))
    if report.trials:
        out.print(_trials(report))
    if not no_advice:
        out.print(Text(_advice(report)), soft_wrap=True)


@contextmanager
def _bar(*, shown: bool) -> Iterator[OnTrial]:
    """Shows a bar on standard error that counts the trials; only at a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    disabled = not (shown and err.is_terminal)
    with Progress(*columns, console=err, transient=True, disable=disabled, speed_estimate_period=_PATIENCE) as bars:
        task = bars.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=total, description=what.replace("[", r"\["))

        yield show


def _tokens(report: FidelityReport, *, everything: bool) -> Table:
    """Returns the predictions, token by token."""
    now = report.now.distance
    count = len(now.kl)
    chosen = range(count) if everything else sorted(np.argsort(-now.kl, kind="stable")[:_WORST].tolist())
    table = Table(box=SIMPLE_HEAD)
    if len(chosen) < count:
        table.title = f"the {len(chosen)} tokens with the largest divergence, of {count}; --all shows every one"
        table.title_justify = "left"
    table.add_column("", no_wrap=True)
    for name in ("#", "token", "KL"):
        table.add_column(name, no_wrap=True, justify="left" if name == "token" else "right")
    table.add_column("", no_wrap=True, min_width=_BAR)
    table.add_column("top-1", no_wrap=True)
    table.add_column("NLL", no_wrap=True, justify="right")
    most = max(float(now.kl.max(initial=0)), _NEAR)
    before = ""
    for index in chosen:
        of = "prompt" if index < now.asked else "answer"
        kl, agrees = float(now.kl[index]), bool(now.agrees[index])
        table.add_row(
            Text(of if of != before else "", style="dim"),
            str(index + 1 if index < now.asked else index + 1 - now.asked),
            # As JSON, so that white space and control characters are visible and have no effect.
            Text(json.dumps(report.pieces[index], ensure_ascii=False)),
            f"{kl:.4f}",
            Text("━" * round(_BAR * kl / most), style="yellow" if agrees else "red"),
            Text("same" if agrees else "differs", style="green" if agrees else "red"),
            f"{now.nll[index]:+.4f}",
        )
        before = of
    return table


def _averages(report: FidelityReport) -> Table:
    now = report.now.distance
    numbers = now.summary()
    table = Table("on average", box=SIMPLE_HEAD)
    for name in ("tokens", "KL", "top-1 the same", "NLL in all"):
        table.add_column(name, justify="right")
    for of, count, nll in (
        ("prompt", now.asked, now.nll[: now.asked].sum()),
        ("answer", len(now.kl) - now.asked, numbers["nll_change"]),
    ):
        kl, same = numbers[f"kl_{of}"], numbers[f"top1_{of}"]
        figures = (f"{kl:.4f}", f"{same:.0%}", f"{nll:+.4f}") if count else ("", "", "")
        table.add_row(of, str(count), *figures)
    return table


def _answers(report: FidelityReport) -> Table:
    """Both answers side by side, from where they differ on in another colour."""
    table = Table(box=SIMPLE_HEAD, expand=True)
    table.add_column("", no_wrap=True)
    table.add_column("without reuse", ratio=1)
    table.add_column("from slices", ratio=1)
    both = report.truth.text.strip(), report.now.distance.text.strip()
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False)))
    texts = [Text(text) for text in both]
    for text in texts:
        text.stylize("bold yellow", same)
    table.add_row("answer", *texts)
    if both[0] == both[1]:
        table.add_row("first difference", "none", "none")
    else:
        table.add_row("first difference", *(Text(_excerpt(text, same)) for text in both))
    table.add_row()
    times = report.truth.ttft_ms, report.now.distance.ttft_ms
    table.add_row("time to first token", *(Text(seconds(time), style="bold") for time in times))
    return table


def _excerpt(text: str, at: int) -> str:
    """Returns the words at which answers begin to differ."""
    start = text.rfind(" ", 0, at) + 1
    rest = text[start : at + 24]
    return f"at character {at + 1}: {json.dumps(rest, ensure_ascii=False)}" if rest else f"ends at character {at + 1}"


def _trials(report: FidelityReport) -> Table:
    """Returns the settings that were tried, with benefit and cost."""
    table = Table(box=SIMPLE_HEAD)
    # Names of modules may be long. They must not be cut off, since a reader copies them.
    table.add_column("what was tried", overflow="fold")
    for name in ("KL", "top-1 the same", "first token", "store"):
        table.add_column(name, justify="right", no_wrap=True)
    now = report.now
    for trial in report.trials:
        distance = trial.distance
        helps = report.gain(trial) > 0
        table.add_row(
            Text(trial.change, style="bold" if helps else "dim"),
            f"{now.distance.kl_mean:.4f} → {distance.kl_mean:.4f}",
            f"{now.distance.agrees.mean():.0%} → {distance.agrees.mean():.0%}" if len(distance.agrees) else "",
            _signed(report.delay_ms(trial)),
            f"+{decimal(trial.bytes)}" if trial.bytes else "",
        )
    return table


def _signed(milliseconds: float) -> str:
    return ("-" if milliseconds < 0 else "+") + seconds(abs(milliseconds))


def _advice(report: FidelityReport) -> str:
    """Returns the advice."""
    now = report.now.distance
    if now.kl_mean < _NEAR:
        return "Nothing needs to be done: the model predicts the same with and without reuse."
    best = report.best
    if best is None:
        tried = "No setting that was tried" if report.trials else "No setting"
        return f"{tried} reduces the divergence; --no-cache answers without reuse."
    delay = report.delay_ms(best)
    return (
        f"Use {best.change}: KL goes from {now.kl_mean:.4f} to {best.distance.kl_mean:.4f}, the first token comes "
        + (f"{seconds(delay)} later" if delay > max(1.0, now.ttft_ms / 10) else "as early as now")
        + (f", and the store holds {decimal(best.bytes)} more." if best.bytes else ".")
    )
