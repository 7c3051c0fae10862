"""Answers at a terminal: shown piece by piece, and ended by Ctrl-C, which keeps the text so far."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.markup import escape

from cpucache.cli.chat_input import unechoed
from cpucache.cli.chat_screen import Answer
from cpucache.cli.console import err, token_bar
from cpucache.engine import Stream


def note(line: str) -> None:
    """Prints a line on standard error that is no part of an answer."""
    err.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)


def begun(stream: Stream | None) -> bool:
    """Whether an answer has its first token."""
    return stream is not None and bool(stream.metrics.ttft_ms)


def answered(ask: Callable[..., Stream], show: Answer, **settings: Any) -> Stream | None:
    """Shows the answer of ``ask`` piece by piece. Returns its stream; ``None`` if Ctrl-C came before there was one."""
    stream = None
    with unechoed(), _interruptible() as name:
        try:
            with token_bar("evaluating") as progress:
                stream = ask(progress=progress, **settings)
                name(stream)
                first = next(stream, "")
            if begun(stream):
                with show() as piece_of:
                    piece_of(first)
                    for piece in stream:
                        piece_of(piece)
        except KeyboardInterrupt:
            pass
    return stream


@contextmanager
def _interruptible() -> Iterator[Callable[[Stream], None]]:
    """Makes Ctrl-C stop an answer during a block; its text so far is kept. Yields a function that sets the answer."""
    answers: list[Stream] = []

    def stop(_number: int, _frame: FrameType | None) -> None:
        if not answers:
            raise KeyboardInterrupt
        answers[-1].stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield answers.append
    finally:
        signal.signal(signal.SIGINT, before)
