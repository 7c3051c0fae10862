"""What the commands share: where things are printed, progress bars, and reading files named on the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from cpucache.errors import InputError
from cpucache.pml import load_prompt, load_schema, parse_prompt, parse_schema
from cpucache.pml.tree import Prompt, Schema

if TYPE_CHECKING:
    from cpucache.reuse import OnProgress

# What a terminal takes for a command: C0 but for tab and newline, DEL, and C1.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}, "\N{REPLACEMENT CHARACTER}")


def safe(text: str) -> str:
    """``text`` for a terminal: what it would obey instead of showing is replaced."""
    return text.translate(_CONTROLS)


def printed(text: str) -> str:
    """``text`` for standard output: made safe for a terminal, as it is for a pipe or a file."""
    return safe(text) if sys.stdout.isatty() else text


class _Safe(RenderHook):
    """Makes safe what a console prints on a terminal, but for what it tells the terminal itself."""

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
    """A bar on standard error that counts tokens, gone when it is done; nothing where nobody looks."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not (shown and err.is_terminal)) as bars:
        task = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bars.add_task(label, total=total)
            bars.update(task, completed=done, total=total)
            if done >= total:
                # Whatever is printed from now on has the line for itself.
                bars.remove_task(task)
                bars.refresh()
                task = None

        yield show


def read_schema(name: str) -> Schema:
    """The schema in a file; ``-`` is standard input, whose ``src`` files lie in the current folder."""
    if name == "-":
        return parse_schema(sys.stdin.buffer.read(), file="<stdin>", folder=Path.cwd())
    return load_schema(Path(name))


def read_prompt(name: str, *, schema: str) -> Prompt:
    """The prompt in a file, or on standard input (``-``), which can't be the ``schema`` at the same time."""
    if name == "-":
        if schema == "-":
            raise InputError("prompt and schema can't both be standard input (-)")
        return parse_prompt(sys.stdin.buffer.read(), file="<stdin>")
    return load_prompt(Path(name))


def seconds(milliseconds: float) -> str:
    """A time for people: ``25 µs``, ``1.3 ms``, ``231 ms``, ``4.75 s``."""
    if milliseconds < 0.1:
        return f"{milliseconds * 1000:.0f} µs"
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.1f} ms" if milliseconds < 10 else f"{milliseconds:.0f} ms"


def times(ratio: float) -> str:
    """A ratio for people: ``2.3 times``, ``171 times``."""
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"
