"""Display of ``chat``: an answer while it is decoded, and the figures of a turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

import click
from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from cpucache.cli.console import printed, safe, seconds
from cpucache.engine import Metrics

Answer: TypeAlias = Callable[[], AbstractContextManager[Callable[[str], None]]]
"""Context manager that yields a function to call with each piece of an answer."""

_PARSER = MarkdownIt().enable("strikethrough").enable("table")  # as rich.markdown has it
_PERIOD = 0.08  # least seconds between two drawings of the incomplete block
_SHARE = 20  # and at least this many times the duration of a drawing, during which the evaluation waits


def finished(text: str) -> int:
    """Length of the prefix of a Markdown text that no further text can change: all blocks but the last.

    Only whole lines count: "foo\\n-" may become a paragraph followed by a list, or a heading.
    """
    whole = text[: text.rfind("\n") + 1]
    starts = [token.map[0] for token in _PARSER.parse(whole) if token.level == 0 and token.map and token.nesting >= 0]
    return sum(map(len, whole.splitlines(keepends=True)[: starts[-1]])) if starts else 0


class _Block:
    """Markdown without the empty lines that some blocks begin with; if ``low``, only its last lines."""

    def __init__(self, text: str, *, low: bool = False) -> None:
        self._inner = Markdown(text)
        self._low = low

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._inner, options.update(height=None), pad=False)
        while lines and not any(_visible(segment) for segment in lines[0]):
            del lines[0]
        # A block that is redrawn must fit the screen: lines that have scrolled off can't be erased.
        for line in lines[-max(1, console.height - 2) :] if self._low else lines:
            yield from line
            yield Segment.line()


def _visible(segment: Segment) -> bool:
    return bool(segment.text.strip() or (segment.style and segment.style.bgcolor))


class _Blocks:
    """Prints each block of an answer once it is complete, and redraws the incomplete last block."""

    def __init__(self, console: Console, live: Live) -> None:
        self._console = console
        self._live = live
        self._pending = ""
        self._due = 0.0
        self._begun = False

    def add(self, piece: str) -> None:
        """Adds a piece of the answer."""
        self._pending += piece
        if "\n" in piece and (end := finished(self._pending)):
            done, self._pending = self._pending[:end], self._pending[end:]
            self._live.update(self._last())
            self._print(done)
        elif time.monotonic() < self._due:
            return
        began = time.monotonic()
        self._live.update(self._last(), refresh=True)
        ended = time.monotonic()
        self._due = ended + max(_PERIOD, _SHARE * (ended - began))

    def finish(self) -> None:
        """Prints the last block."""
        self._live.update(Text(""), refresh=True)
        self._live.stop()
        self._print(self._pending)

    def _last(self) -> RenderableType:
        return _Block(self._pending, low=True) if self._pending.strip() else Text("")

    def _print(self, text: str) -> None:
        if text.strip():
            if self._begun:
                self._console.print()
            self._console.print(_Block(text.rstrip()))
            self._begun = True


def markdown_answer(console: Console) -> Answer:
    """Shows answers as Markdown on a terminal."""

    @contextmanager
    def answer() -> Iterator[Callable[[str], None]]:
        # The thread that adds a piece also draws: a drawing thread would compete with the evaluation.
        with Live(console=console, auto_refresh=False, transient=True) as live:
            blocks = _Blocks(console, live)
            try:
                yield lambda piece: blocks.add(safe(piece))
            finally:
                blocks.finish()

    return answer


@contextmanager
def plain_answer() -> Iterator[Callable[[str], None]]:
    """Prints an answer unformatted, piece by piece."""
    try:
        yield lambda piece: click.echo(printed(piece), nl=False)
    finally:
        click.echo()


def figures(metrics: Metrics) -> str:
    """The times and token counts of a turn, in one line."""
    parts = [
        f"first token after {seconds(metrics.ttft_ms)}",
        f"{metrics.cached_tokens:,} tokens from cache, {metrics.fresh_tokens:,} evaluated",
    ]
    if metrics.encoded_tokens:
        parts.append(f"{metrics.encoded_tokens:,} encoded")
    if metrics.completion_tokens > 1:
        parts.append(f"{1000 / metrics.tpot_ms:.1f} tok/s")
    if metrics.finish == "interrupted":
        parts.append("interrupted")
    if metrics.finish == "length":
        parts.append(f"cut off after {metrics.completion_tokens:,} tokens")
    return " · ".join(parts)


def overflow(metrics: Metrics, *, moved: bool) -> str:
    """The turns that were dropped from a full context, and the tokens that did not have to be evaluated again."""
    if not moved:
        return (
            f"{metrics.left_out_tokens:,} tokens of old turns left the context; tokens after them were evaluated again"
        )
    cost = f" (evaluating them again: about {seconds(metrics.recompute_ms)})" if metrics.recompute_ms else ""
    return f"{metrics.left_out_tokens:,} tokens of old turns left the context; tokens after them were moved{cost}"
