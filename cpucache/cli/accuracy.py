"""``cpucache bench accuracy``: compares answers from slices with those of full prefill."""

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


@click.command(short_help="Compare answers from slices with those of full prefill.")
@engine_options
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="Questions: JSON Lines, also gzipped, of LongBench or MuSiQue, or with one gold passage each.",
)
@click.option("--task", type=click.Choice(list(TASKS)), required=True, help="Decides the instruction and the scores.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Number of questions.  [default: all]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Draws the questions.")
@click.option(
    "--passages",
    type=click.IntRange(1),
    metavar="N",
    help="Number of passages for each question, if the file has one gold passage each; others are drawn from it.  "
    f"[default: {OTHERS}]",
)
@click.option(
    "--pick", type=click.IntRange(1), metavar="K", help="Number of passages that a prompt names, in random order."
)
@click.option(
    "--of", type=click.IntRange(1), metavar="M", help="Number of passages of a schema, which M questions share."
)
@click.option(
    "--drop",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Probability with which passages without the answer are left out.",
)
@click.option("--shuffle", is_flag=True, help="Name the passages of a question in random order.")
@click.option(
    "--unions",
    type=click.IntRange(1),
    metavar="N",
    help="Make the M passages members of N unions; a prompt names one of each.",
)
@click.option(
    "--argument", is_flag=True, help="Add a parameter to the schema's text, with another argument in each question."
)
@click.option(
    "--plain",
    is_flag=True,
    help="Ask in messages without markup. A message of all passages is evaluated ahead; its slices are used anywhere.",
)
@click.option(
    "--variants",
    default=ALL_VARIANTS,
    metavar="NAMES",
    help="Variants, separated by commas, full first. Others: standalone, fast, balanced, high, refined, isolate, "
    f"recompute:R, and one with +recompute:R.  [default: {ALL_VARIANTS}]",
)
@click.option(
    "--results",
    "results_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Save every answer in this file (JSON Lines). The next run continues after the saved answers.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Plot quality against time.")
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
    """Compare answers from slices with those of full prefill, on the same questions.

    Each passage becomes a module of a schema, which is encoded ahead. A prompt names all of its question's passages in
    the schema's order, which is exact, or (--pick, --drop, --shuffle) a selection in another order. KL is the
    divergence from full prefill along its answer. Times are those of the first such prompt, from RAM; floor: the state
    is already in the llama.cpp context. Scores are LongBench's. Questions that do not fit the context are skipped.

    \b
    cpucache bench accuracy --data nq.jsonl.gz --task qa --pick 5 --of 12 --limit 48 --results nq-5-of-12.jsonl
    cpucache bench accuracy --data nq.jsonl.gz --task qa --pick 5 --of 12 --plain --variants full,fast,balanced
    cpucache bench accuracy --data musique.jsonl.gz --task qa --shuffle --limit 20 --results musique.jsonl
    """
    chosen, asked = parse_variants(variants), TASKS[task]
    # An error that would come at the end comes now.
    if plot:
        new_figure(plot)
    if task == "summary":
        rouge_scorer()
    if pick is None and unions is None and of is not None:
        raise click.UsageError("--of needs --pick or --unions")
    if pick is not None and (drop or shuffle or unions is not None or passages is not None):
        raise click.UsageError("--pick can be combined with --of only: it draws an order itself")
    if plain and (unions is not None or argument):
        raise click.UsageError("--plain excludes --unions and --argument: its messages have no markup")
    if unions is not None and (drop or passages is not None):
        raise click.UsageError(
            "--unions can be combined with --of and --shuffle only: a prompt names one member of each union"
        )
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
    passed_over = f"; {report.too_long} did not fit and were skipped" if report.too_long else ""
    out.print(
        escape(f"{report.model}: {task} on {report.data}, {report.outcomes[0].n} questions{passed_over}"),
        soft_wrap=True,
    )
    out.print(_table(report))
    if any(outcome.gains for outcome in report.outcomes):
        out.print(
            "Scores: 100 is the best. Differences are paired; --json has their 95% intervals. Times are medians.",
            soft_wrap=True,
        )


def _kept(answers: int, file: Path | None) -> str:
    if file is None:
        return "stopped; with --results FILE, answers are saved and the next run continues after them"
    return escape(f"stopped; {answers:,} answers are saved in {file}: the same command continues after them")


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
