"""``cpucache bench accuracy``: answers from cached slices against those of full prefill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from cpucache.bench.accuracy import AccuracyReport, OnAnswer, measure_accuracy, settings_of
from cpucache.bench.datasets import OTHERS, read_examples, selected
from cpucache.bench.plot import measure_title, new_figure, plot_accuracy
from cpucache.bench.results import Results
from cpucache.bench.scores import rouge_scorer
from cpucache.bench.tasks import ALL_VARIANTS, TASKS, parse_variants
from cpucache.cli.console import err, listing, out, seconds
from cpucache.cli.options import engine_options
from cpucache.engine import Engine

_PATIENCE = 3600.0
"""Seconds that the estimate of the time left looks back: questions may take minutes each."""


@click.command(short_help="Answers from cached slices against those of full prefill.")
@engine_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="Questions: JSON Lines, gzipped or not, of LongBench, MuSiQue, or with one gold passage each.",
)
@click.option("--task", type=click.Choice(list(TASKS)), required=True, help="What is asked, and how it is scored.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Questions to ask.  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draws the questions.")
@click.option(
    "--passages",
    type=click.IntRange(1),
    metavar="N",
    help="Passages for each question of a file with one gold passage each; the others are drawn from other questions.  "
    f"[default: {OTHERS}]",
)
@click.option(
    "--pick", type=click.IntRange(1), metavar="K", help="Passages that a prompt names, in an order of its own."
)
@click.option("--of", type=click.IntRange(1), metavar="M", help="Passages of a schema, which M questions share.")
@click.option(
    "--drop", type=click.FloatRange(0, 1), default=0.0, help="Leave out other passages with this probability."
)
@click.option("--shuffle", is_flag=True, help="Name a question's own passages in another order.")
@click.option(
    "--unions",
    type=click.IntRange(1),
    metavar="N",
    help="Make the M passages members of N unions; a prompt names one of each.",
)
@click.option(
    "--argument", is_flag=True, help="Give the schema's text a parameter, and each question another argument."
)
@click.option(
    "--plain",
    is_flag=True,
    help="Ask in messages without markup: one of all passages is evaluated ahead, and slices of it are taken anywhere.",
)
@click.option(
    "--variants",
    default=ALL_VARIANTS,
    metavar="NAMES",
    help="Ways of answering, with commas between, full first: standalone, fast, balanced, high, refined, isolate, "
    f"recompute:R, or one of them with +recompute:R.  [default: {ALL_VARIANTS}]",
)
@click.option(
    "--results",
    "results_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Keep every answer here (JSON Lines), and go on from there when run again.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw quality against time.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def accuracy(
    model: str,
    data: Path,
    task: str,
    limit: int | None,
    seed: int,
    passages: int | None,
    pick: int | None,
    of: int | None,
    drop: float,
    shuffle: bool,
    unions: int | None,
    argument: bool,
    plain: bool,
    variants: str,
    results_file: Path | None,
    plot: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answers from cached slices against those of full prefill, on the same questions.

    Each passage becomes a module of a schema, which is encoded ahead. A prompt names all of its question's passages in
    the schema's order, which is exact, or (--pick, --drop, --shuffle) a selection in an order of its own. KL is the
    divergence from full prefill along its answer. Times are those of the first such prompt, from RAM; floor: the state
    lies in the context already. Scores are LongBench's. Questions that do not fit the context are passed over.

    \b
    cpucache bench accuracy --data nq.jsonl.gz --task qa --pick 5 --of 12 --limit 48 --results nq-5-of-12.jsonl
    cpucache bench accuracy --data nq.jsonl.gz --task qa --pick 5 --of 12 --plain --variants full,fast,balanced
    cpucache bench accuracy --data musique.jsonl.gz --task qa --shuffle --limit 20 --results musique.jsonl
    """
    chosen, asked = parse_variants(variants), TASKS[task]
    # What would fail at the very end fails now.
    if plot:
        new_figure(plot)
    if task == "summary":
        rouge_scorer()
    if pick is None and unions is None and of is not None:
        raise click.UsageError("--of goes with --pick or --unions")
    if pick is not None and (drop or shuffle or unions is not None or passages is not None):
        raise click.UsageError("--pick goes with --of alone: what it picks has an order of its own already")
    if plain and (unions is not None or argument):
        raise click.UsageError("--plain has no markup, and so neither --unions nor --argument")
    if unions is not None and (drop or passages is not None):
        raise click.UsageError("--unions goes with --of and --shuffle alone: one member of each is named")
    examples = selected(
        read_examples(data, passages=passages, seed=seed),
        seed=seed,
        pick=pick,
        of=of,
        drop=drop,
        shuffle=shuffle,
        unions=unions,
        argument=argument,
    )
    with Engine(model, **options) as engine:
        settings = settings_of(engine, data, examples, asked, seed=seed, positions=str(options["positions"]))
        if drop or shuffle:
            settings |= {"drop": drop, "shuffle": shuffle}
        if plain:
            settings |= {"plain": True}
        with Results(results_file, settings) as results:
            try:
                with _bar() as progress:
                    report = measure_accuracy(
                        engine,
                        data,
                        examples,
                        asked,
                        chosen,
                        results,
                        limit=limit,
                        seed=seed,
                        plain=plain,
                        progress=progress,
                    )
            except KeyboardInterrupt:
                err.print(_kept(len(results), results_file), soft_wrap=True)
                raise
    if plot:
        plot_accuracy(report, plot)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    passed_over = f"; {report.too_long} did not fit and were passed over" if report.too_long else ""
    out.print(
        escape(f"{report.model}: {task} on {report.data}, {report.outcomes[0].n} questions{passed_over}"),
        soft_wrap=True,
    )
    out.print(_table(report))
    if any(outcome.gains for outcome in report.outcomes):
        out.print(
            "Points of 100; differences are paired, their 95% intervals in --json. Times are medians.", soft_wrap=True
        )


def _kept(answers: int, file: Path | None) -> str:
    if file is None:
        return "stopped; with --results FILE, answers are kept and a second run goes on from there"
    return escape(f"stopped; {answers:,} answers are in {file}: the same command goes on from there")


@contextmanager
def _bar() -> Iterator[OnAnswer]:
    """Shows a bar on standard error that counts questions, with the time left; only at a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=err, transient=True, disable=not err.is_terminal, speed_estimate_period=_PATIENCE
    ) as bars:
        task = None

        def show(done: int, total: int, variant: str) -> None:
            nonlocal task
            if task is None:
                # Questions that an earlier run has answered say nothing about how long one takes.
                task = bars.add_task(variant, total=total, completed=done)
            bars.update(task, description=variant, completed=done)

        yield show


def _table(report: AccuracyReport) -> Table:
    titles = [measure_title(name) for name in report.measures]
    intervals = [f"{title}\n95%" for title in titles]
    others = [header for title in titles[1:] for header in (f"{title}\n- full", title)]
    columns = [Column("", overflow="fold")]
    for title, interval in zip(titles, intervals, strict=True):
        columns += [_figures(header) for header in (title, f"{title}\n- full", interval)]
    columns += [_figures(header) for header in ("KL", "same", "TTFT", "/ full", "/ floor", "again\n/ floor")]
    rows: list[list[str | Text]] = []
    for outcome in report.outcomes:
        cells = []
        for name in report.measures:
            cells.append(f"{100 * outcome.scores[name]:.1f}")
            gain = outcome.gains.get(name)
            cells += [f"{100 * gain.mean:+.1f}", f"{100 * gain.low:+.1f} {100 * gain.high:+.1f}"] if gain else ["", ""]
        cells += [f"{outcome.kl:.3f}", f"{outcome.same:.0%}", seconds(outcome.ttft.median)]
        for ratio in (outcome.ttft_to_full, outcome.ttft_to_floor, outcome.again_to_floor):
            cells.append("" if ratio is None else f"{ratio:.2f}" if ratio >= 1 else f"{ratio:.3f}")
        rows.append([Text(outcome.variant), *cells])
    return listing(
        columns, rows, expendable=[*intervals, "again\n/ floor", "/ floor", "same", *others, "KL"], close=True
    )


def _figures(header: str) -> Column:
    return Column(header, justify="right", no_wrap=True)
