"""What the commands share: where things are printed, progress bars, and reading files named on the command line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from cpucache.engine.reply import Metrics
from cpucache.errors import InputError
from cpucache.pml import load_prompt, load_schema, parse_prompt, parse_schema, resolve, schema_for
from cpucache.pml.tree import Prompt, Schema
from cpucache.reuse import OnProgress

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


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
    """How near to full prefill the cached tokens of an answer are; nothing where they are the same."""
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


def times(ratio: float) -> str:
    """A ratio for people: ``2.3 times``, ``171 times``."""
    return f"{ratio:.1f} times" if ratio < 10 else f"{ratio:.0f} times"
