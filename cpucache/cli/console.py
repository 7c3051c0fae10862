"""Consoles, progress bars, and files named on the command line, for all commands."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Column, Table
from rich.text import Text

from cpucache.errors import InputError
from cpucache.pml import load_prompt, load_schema, parse_prompt, parse_schema, resolve, schema_for
from cpucache.pml.tree import Prompt, Schema

if TYPE_CHECKING:
    from cpucache.engine.reply import Metrics
    from cpucache.reuse import OnProgress

# Characters that a terminal obeys: C0 except tab and newline, DEL, and C1.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}, "\N{REPLACEMENT CHARACTER}")


def safe(text: str) -> str:
    """``text`` for a terminal, with control characters replaced."""
    return text.translate(_CONTROLS)


def printed(text: str) -> str:
    """``text`` for standard output: made safe for a terminal, as it is for a pipe or a file."""
    return safe(text) if sys.stdout.isatty() else text


class _Safe(RenderHook):
    """Makes printed text safe for a terminal. Control codes of rich itself are kept."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(each) for each in renderables] if self._console.is_terminal else renderables


class _Shown:
    def __init__(self, inner: ConsoleRenderable) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            yield segment if segment.control else Segment(safe(segment.text), segment.style)


out = Console(highlight=False)
err = Console(stderr=True, highlight=False)
for _console in (out, err):
    _console.push_render_hook(_Safe(_console))


class _Speed(ProgressColumn):
    """Tokens per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.0f} tok/s" if task.speed else "", style="progress.data.speed")


@contextmanager
def token_bar(label: str, *, shown: bool = True) -> Iterator[OnProgress]:
    """Shows a bar on standard error that counts tokens and disappears at the end; only at a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not (shown and err.is_terminal)) as bars:
        task = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bars.add_task(label, total=total)
            bars.update(task, completed=done, total=total)
            if done >= total:
                # Text printed from now on begins on an empty line.
                bars.remove_task(task)
                bars.refresh()
                task = None

        yield show


_NAME = 28  # minimum width of a column of names, if a name is that long


def listing(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str | Text]],
    *,
    expendable: Sequence[str],
    close: bool = False,
    **look: Any,
) -> Table:
    """A table for ``out``. Where that is too narrow, the ``expendable`` columns are left out, the first ones first.

    Columns that may not wrap get the room they need, the others at least that of a name. ``close`` puts the columns
    nearer to one another.
    """
    rows = list(rows)
    # A space at either side, or at one, and one towards the neighbour or the edge.
    gap = 2 if close else 3
    needs = {column.header: _needs(column, [row[at] for row in rows]) for at, column in enumerate(columns)}
    for name in expendable:
        if sum(need + gap for need in needs.values()) + 1 <= out.width:
            break
        del needs[name]
    kept = [at for at, column in enumerate(columns) if column.header in needs]
    table = Table(*(columns[at] for at in kept), box=SIMPLE_HEAD, padding=(0, 0 if close else 1, 0, 1), **look)
    for row in rows:
        table.add_row(*(row[at] for at in kept))
    return table


def _needs(column: Column, cells: Sequence[str | Text]) -> int:
    lines = [line for cell in (str(column.header), *map(str, cells)) for line in cell.splitlines()]
    longest = max(map(cell_len, lines), default=0)
    return longest if column.no_wrap and not column.ratio else max(min(longest, _NAME), column.min_width or 0)


def named(text: str) -> Text:
    """A name for one line of a terminal, as it is spelt."""
    return Text(safe(text).replace("\n", "\N{REPLACEMENT CHARACTER}"))


def read_schema(name: str) -> Schema:
    """The schema in a file; ``-`` is standard input, whose ``src`` files are in the current folder."""
    if name == "-":
        return parse_schema(sys.stdin.buffer.read(), file="<stdin>", folder=Path.cwd())
    return load_schema(Path(name))


def read_prompt(name: str, *, schema: str | None = None) -> Prompt:
    """The prompt in a file, or on standard input (``-``), which can't be the ``schema`` at the same time."""
    if name == "-":
        if schema == "-":
            raise InputError("prompt and schema can't both be standard input (-)")
        return parse_prompt(sys.stdin.buffer.read(), file="<stdin>")
    return load_prompt(Path(name))


def check_prompt(prompt: Prompt, schemas: Sequence[Schema]) -> Schema:
    """The schema among those given that a prompt is written for. Raises ``PMLError`` for all that does not fit it.

    What the engine would find, before a model is loaded, and with the names of the files.
    """
    schema = schema_for(prompt, schemas)
    resolve(prompt, schema)
    return schema


def kinds(metrics: Metrics) -> str:
    """Returns the relation of an answer's cached tokens to full prefill; empty if all are exact."""
    approximate = [
        f"{count:,} {name}"
        for name, count in (
            ("clean", metrics.clean_tokens),
            ("related", metrics.related_tokens),
            ("foreign", metrics.foreign_tokens),
        )
        if count
    ]
    if not approximate:
        return ""
    exact = [f"{metrics.exact_tokens:,} exact"] if metrics.exact_tokens else []
    recomputed = f"; {metrics.recomputed_tokens:,} recomputed" if metrics.recomputed_tokens else ""
    return f" ({', '.join([*exact, *approximate])}{recomputed})"


def seconds(milliseconds: float) -> str:
    """A time for people: ``25 µs``, ``1.3 ms``, ``231 ms``, ``4.75 s``."""
    if milliseconds < 0.1:
        return f"{milliseconds * 1000:.0f} µs"
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def profile_table(columns: Mapping[str, Mapping[str, float]]) -> Table:
    """Milliseconds by stage, a column for each request or part of one."""
    table = Table(Column("where the time went", no_wrap=True), box=SIMPLE_HEAD)
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for stage in next(iter(columns.values())):
        table.add_row(stage, *(f"{column[stage]:,.2f} ms" for column in columns.values()))
    table.add_section()
    table.add_row("together", *(f"{sum(column.values()):,.2f} ms" for column in columns.values()))
    return table


def as_option(size: int) -> str:
    """A number of bytes, rounded up, as options take it: ``17MiB``."""
    return f"{-(-size >> 20)}MiB"


def times(ratio: float) -> str:
    """A ratio for people: ``2.3 times``, ``171 times``."""
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"
