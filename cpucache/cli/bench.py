"""``cpucache bench``: measure on this machine."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.markdown import Markdown
from rich.table import Table

from cpucache.bench.conversation import MESSAGES
from cpucache.bench.encode import measure_encode
from cpucache.bench.memory import compare_memory
from cpucache.bench.report import table
from cpucache.bench.series import Series
from cpucache.bench.sessions import SessionsReport, folder_options, measure_sessions
from cpucache.bench.store import measure_store
from cpucache.bench.text import filler_schema
from cpucache.bench.ttft import Report, measure
from cpucache.cli.accuracy import accuracy
from cpucache.cli.bench_server import server
from cpucache.cli.console import err, out, profile_table, read_schema, seconds, times
from cpucache.cli.options import engine_options
from cpucache.engine import Engine
from cpucache.errors import InputError


@click.group()
def bench() -> None:
    """Measure on this machine. Compare the ratios: absolute times depend on the machine and its load."""


bench.add_command(accuracy)
bench.add_command(server)


@bench.command(short_help="Measure time to first token, with and without the cache.")
@engine_options
@click.option("--tokens", type=click.IntRange(16), default=4000, show_default=True, help="Tokens in modules.")
@click.option(
    "--modules", type=click.IntRange(1), default=5, show_default=True, help="Number of modules that hold them."
)
@click.option("--question", type=click.IntRange(1), default=12, show_default=True, help="Fresh tokens.")
@click.option(
    "--repeat", type=click.IntRange(1), default=7, show_default=True, help="Repetitions of quick measurements."
)
@click.option(
    "--full-repeat",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Repetitions of encoding and full prefill; 0: skip both.",
)
@click.option("--memory", is_flag=True, help="Also compare peak memory, in separate processes.")
@click.option("--profile", "profiling", is_flag=True, help="Also print the time of each stage.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def ttft(
    model: str,
    tokens: int,
    modules: int,
    question: int,
    repeat: int,
    full_repeat: int,
    memory: bool,
    profiling: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure time to first token: full prefill, from RAM, from disk, and the floor.

    The floor is the time when the same state is in the llama.cpp context and only the question is evaluated: nothing
    that loads state can be faster. The first rows ask for all modules in the schema's order, where every slice is
    exact. The rows "other order" ask for them in an order never asked before, with --fidelity fast and balanced, the
    last after refining. Medians of runs made in turn in one process, on the same tokens.
    """

    def say(line: str) -> None:
        if not as_json:
            err.print(f"[dim]{line} …[/dim]")

    options["n_ctx"] = options["n_ctx"] or tokens + question + 240
    with Engine(model, **options) as engine:
        path = str(engine.model.path)
        report = measure(
            engine,
            tokens=tokens,
            modules=modules,
            question=question,
            repeat=repeat,
            full_repeat=full_repeat,
            profiling=profiling,
            say=say,
        )
    result = report.as_dict()
    if memory:
        say("peak memory, in two more processes")
        result["memory"] = compare_memory(path, n_ctx=options["n_ctx"], tokens=tokens, modules=modules)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    out.print(
        f"{report.model}: {report.cached_tokens:,} tokens cached in {report.modules} modules, "
        f"{report.fresh_tokens} fresh",
        soft_wrap=True,
    )
    out.print(_table(report))
    if report.profile is not None:
        err.print(profile_table(report.profile_medians))
    out.print(f"encoding, before other orders can be answered: {seconds(report.encode_ms)}", soft_wrap=True)
    if report.full:
        ratios = report.ratios
        out.print(
            f"full prefill takes {times(ratios['full_to_ram'])} as long as from RAM, "
            f"{times(ratios['full_to_disk'])} as long as from disk, {times(ratios['full_to_balanced'])} as long as "
            "balanced\n"
            f"encoding takes {ratios['encode_to_full']:.2f} times as long as full prefill",
            soft_wrap=True,
        )
    if memory:
        numbers = {name: decimal(value) for name, value in result["memory"].items()}
        out.print(
            f"peak memory: {numbers['cached']}; llama.cpp {numbers['plain']}, slices {numbers['slices']}, "
            f"cpucache {numbers['overhead']}",
            soft_wrap=True,
        )


@bench.command("encode", short_help="Compare encoding of a schema with one evaluation of its text.")
@click.argument("schemas", metavar="[SCHEMA]...", nargs=-1)
@engine_options
@click.option(
    "--tokens", type=click.IntRange(16), default=2000, show_default=True, help="Number of tokens, without SCHEMA."
)
@click.option(
    "--modules", type=click.IntRange(1), default=5, show_default=True, help="Number of modules, without SCHEMA."
)
@click.option("--repeat", type=click.IntRange(1), default=3, show_default=True, help="Runs of each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def encode_speed(
    schemas: tuple[str, ...], model: str, tokens: int, modules: int, repeat: int, as_json: bool, **options: Any
) -> None:
    """Compare encoding of a schema into an empty store with one evaluation of the same text.

    SCHEMA is a PML file; without one, a schema of random words is measured. "again" is the time to find that every
    slice is in the store already. The store of the user is neither read nor written.

    \b
    cpucache bench encode
    cpucache bench encode schemas/trip/schema.xml -m qwen2.5-coder-1.5b-instruct
    """

    def say(line: str) -> None:
        if not as_json:
            err.print(f"[dim]{line} …[/dim]")

    parsed = [read_schema(name) for name in schemas]
    if not schemas:
        options["n_ctx"] = options["n_ctx"] or tokens + 256
    with Engine(model, **options | {"store": None}) as engine:
        names = [engine.add_schema(schema).schema.name for schema in parsed or [filler_schema(engine, tokens, modules)]]
        results = [measure_encode(engine, name, repeat=repeat, say=say).as_dict() for name in names]
        result = {"model": engine.model.path.stem, "schemas": results}
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    out.print(result["model"])
    out.print(Markdown("\n".join(table(result))))


@bench.command("report", short_help="Write Markdown tables of results.")
@click.argument("results", metavar="RESULT...", nargs=-1, required=True)
def markdown_report(results: tuple[str, ...]) -> None:
    """Write Markdown tables of results.

    RESULT is a file that holds what `cpucache bench ttft`, `encode`, `sessions`, `server` or `accuracy` has printed
    with --json; - is standard input.

    \b
    cpucache bench ttft --json > ttft.json
    cpucache bench report ttft.json
    """
    for number, name in enumerate(results):
        try:
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
            result = json.loads(text)
            lines = table(result)
        except (OSError, ValueError, LookupError, TypeError, AttributeError, InputError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error) if isinstance(error, InputError) else ""
            raise InputError(f"{name}: {why or 'not the JSON of a benchmark'}") from error
        if number:
            click.echo()
        click.echo(f"{result.get('model', name)}\n\n" + "\n".join(lines))


@bench.command("store")
@engine_options
@click.option("--tokens", type=click.IntRange(16), default=2000, show_default=True, help="Tokens in slices.")
@click.option("--repeat", type=click.IntRange(1), default=9, show_default=True, help="Runs of each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def store_speed(model: str, tokens: int, repeat: int, as_json: bool, **options: Any) -> None:
    """Compare the store with plain copies and writes, and measure an answer while the store writes."""

    def say(line: str) -> None:
        if not as_json:
            err.print(f"[dim]{line} …[/dim]")

    options["n_ctx"] = options["n_ctx"] or tokens + 256
    with Engine(model, **options) as engine:
        report = measure_store(engine, tokens=tokens, repeat=repeat, say=say)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    table = Table(box=SIMPLE_HEAD)
    for name in ("", "median", "min", "max"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, series in (
        ("load from files into llama.cpp", report.load),
        ("  copy from memory into llama.cpp", report.copy),
        ("save, until it is on disk", report.save),
        ("  plain write and fsync", report.write),
        ("look up among 100,000 slices", report.lookup),
        ("find by tokens among 100,000 slices", report.variants),
        ("first token while slices are written", report.busy),
        ("  while none are written", report.idle),
    ):
        table.add_row(name, *(seconds(value) for value in (series.median, min(series.values), max(series.values))))
    out.print(f"{decimal(report.bytes)} of slices")
    out.print(table)
    ratios = report.ratios
    out.print(
        f"loading has {ratios['load_to_copy_speed']:.2f} times the speed of a copy, "
        f"saving {ratios['save_to_write_speed']:.2f} times that of a plain write;\n"
        f"while slices are written, the first token takes {ratios['busy_to_idle_ttft']:.2f} times as long",
        soft_wrap=True,
    )


@bench.command("sessions")
@engine_options
@click.option("--turns", type=click.IntRange(1, len(MESSAGES)), default=20, show_default=True, help="Turns.")
@click.option(
    "--answer", type=click.IntRange(1), default=64, show_default=True, help="Maximum length of an answer, in tokens."
)
@click.option(
    "--repeat", type=click.IntRange(1), default=3, show_default=True, help="Repetitions of quick measurements."
)
@click.option("--recompute/--no-recompute", default=True, help="Also evaluate each turn from the beginning (slow).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def conversations(
    model: str, turns: int, answer: int, repeat: int, recompute: bool, as_json: bool, **options: Any
) -> None:
    """Measure time to first token in conversations, turn by turn.

    The same conversation about a garden is resumed at each turn in four ways: evaluated from the beginning, from state
    in the llama.cpp context, from RAM, and from disk in a new engine. Then the cost of saving is measured, and the time
    of a turn for which old turns leave the context.
    """

    def say(line: str) -> None:
        if not as_json:
            err.print(f"[dim]{line} …[/dim]")

    with tempfile.TemporaryDirectory(prefix="cpucache-bench-") as folder:
        options |= folder_options(Path(folder))

        def open_engine(**more: Any) -> Engine:
            return Engine(model, **options | more)

        report = measure_sessions(open_engine, turns=turns, answer=answer, repeat=repeat, recompute=recompute, say=say)
    if as_json:
        click.echo(json.dumps(report.as_dict(), indent=2))
        return
    out.print(f"{report.model}: {turns} turns; times to first token")
    out.print(_turns(report))
    ratios = report.ratios
    lines = [
        f"resuming from disk takes {ratios['disk_to_in_context']:.2f} times as long as in context (median), "
        f"{ratios['disk_to_in_context_worst']:.2f} times at worst",
        f"1,000 tokens more add {ratios['growth_in_context_ms_per_1000']:.0f} ms in context, "
        f"{ratios['growth_disk_ms_per_1000']:.0f} ms from disk",
        f"saving takes {ratios['save_of_turn']:.1%} of a turn at most; a turn that is saved takes "
        f"{ratios['saving_to_not_saving']:.3f} times as long as one that is not",
    ]
    lines += [
        f"turn {number}: {ratios[name]:.1%} below recomputation"
        for number in (10, 20)
        if (name := f"below_recompute_turn_{number}") in ratios
    ]
    lines += [
        f"overflow: {each.left_out:,} tokens left out, {each.moved:,} moved, {each.evaluated} evaluated "
        + f"({each.new} new): {seconds(each.ttft_ms)}"
        + (f"; recomputed {seconds(each.recompute_ms)}" if recompute else "")
        for each in report.truncations
    ]
    out.print("\n".join(lines), soft_wrap=True, highlight=False)


def _turns(report: SessionsReport) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("turn", "tokens", "new", "full", "tok/s", "context", "RAM", "disk", "ratio", "written"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, turn in enumerate(report.turns, 1):
        recomputed = turn.recompute.values
        table.add_row(
            str(number),
            f"{turn.tokens:,}",
            str(turn.new),
            seconds(turn.recompute.median) if recomputed else "",
            f"{turn.prefill_rate:.0f}" if recomputed else "",
            *(seconds(series.median) for series in (turn.in_context, turn.ram, turn.disk)),
            f"{turn.disk.median / turn.in_context.median:.2f}",
            decimal(turn.bytes),
        )
    return table


def _table(report: Report) -> Table:
    table = Table(box=SIMPLE_HEAD)
    for name in ("time to first token", "median", "min", "max", "/ floor"):
        table.add_column(name, justify="left" if name == "time to first token" else "right", no_wrap=True)

    def row(name: str, series: Series, floor: Series = report.floor) -> None:
        table.add_row(
            name,
            *(seconds(value) for value in (series.median, min(series.values), max(series.values))),
            f"{series.median / floor.median:.2f}",
        )

    row("floor", report.floor)
    row("exact, from RAM", report.ram)
    row("exact, from disk", report.disk)
    row("floor, other orders", report.other_floor, report.other_floor)
    row("other order, fast, first time", report.other, report.other_floor)
    row("  asked again", report.other_again, report.other_floor)
    row("  balanced", report.balanced, report.other_floor)
    row("  after refining", report.refined, report.other_floor)
    for name, series in report.full.items():
        row(f"full prefill, {name}", series)
    row("encoding, once", report.encode)
    return table
