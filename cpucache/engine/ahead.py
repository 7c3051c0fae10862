"""Evaluating ahead: prompts before they are asked, and while they are being written."""

from __future__ import annotations

from collections.abc import Callable

from cpucache.engine.reply import Prepared
from cpucache.engine.request import Request
from cpucache.engine.writing import written
from cpucache.errors import CpucacheError
from cpucache.reuse import OnProgress


class Preparation:
    """A prompt that is evaluated ahead, in the background: answers come first.

    What has been evaluated stays in the llama.cpp context, and whatever begins with the same text goes on from there.
    That holds for one that was cancelled, too.

    Args:
        request: What the core was given.
    """

    def __init__(self, request: Request[Prepared]) -> None:
        self._request = request

    @property
    def ended(self) -> bool:
        """Whether nothing more is evaluated for it."""
        return self._request.ended

    def cancel(self) -> None:
        """End it within one batch, keeping what it has evaluated."""
        self._request.cancel()

    def result(self, progress: OnProgress | None = None) -> Prepared:
        """What it took, once it has ended. ``progress(done, total)`` is told about tokens.

        Raises ``CpucacheError`` when it was cancelled, or made way for an answer, and whatever else went wrong.
        """
        return self._request.result(progress)


class TypingAhead:
    """Has a text evaluated while somebody writes it.

    The text is given after each change. Words are evaluated as soon as a blank stands behind them. A new preparation
    takes the place of those before; one under way whose text the new one begins with is let go on, for what it is at is
    needed.

    Args:
        prepare: Begins to evaluate a text ahead, as ``Session.prepare`` does. Errors of the package are left for the
            prompt itself to raise.
    """

    def __init__(self, prepare: Callable[[str], Preparation]) -> None:
        self._prepare = prepare
        self._head: str | None = None
        self._under_way: list[tuple[str, Preparation]] = []

    def typed(self, text: str) -> None:
        """Note what there is of the text now."""
        head = written(text)
        if head == self._head:
            return
        self._head = head
        there = [(begun, each) for begun, each in self._under_way if not each.ended]
        kept = there[:1] if there and head.startswith(there[0][0]) else []
        for _, each in there[len(kept) :]:
            each.cancel()
        try:
            self._under_way = [*kept, (head, self._prepare(text))]
        except CpucacheError:
            self._under_way = kept

    def stop(self) -> None:
        """Cancel what is under way: the text is asked now, or given up."""
        for _, each in self._under_way:
            each.cancel()
        self._under_way, self._head = [], None
