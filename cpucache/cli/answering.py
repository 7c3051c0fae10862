"""Answers to somebody who sits at a terminal: shown as they come, and ended by Ctrl-C in good order."""

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
    """Say something that belongs to no answer."""
    err.print(f"[dim]{escape(line)}[/dim]", soft_wrap=True)


def begun(stream: Stream | None) -> bool:
    """Whether an answer has got as far as its first token."""
    return stream is not None and bool(stream.metrics.ttft_ms)


def answered(ask: Callable[..., Stream], show: Answer, **settings: Any) -> Stream | None:
    """The answer that ``ask`` gives, shown as it comes; None where Ctrl-C came before there was a stream."""
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
    """Ctrl-C ends the answer that is named meanwhile, in good order: what has come is kept."""
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
