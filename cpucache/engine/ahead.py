"""Evaluation of prompts ahead of the request for an answer, and while the user types them."""

from __future__ import annotations

from collections.abc import Callable

from cpucache.engine.reply import Prepared
from cpucache.engine.request import Request
from cpucache.engine.writing import written
from cpucache.errors import CpucacheError
from cpucache.reuse import OnProgress


class Preparation:
    """A prompt that is evaluated in the background, ahead of the request for its answer. Answers have priority.

    The evaluated tokens stay in the llama.cpp context, also after ``cancel``. The next prompt that begins with the same
    tokens evaluates only the rest.

    Args:
        request: The request that was submitted to the core.
    """

    def __init__(self, request: Request[Prepared]) -> None:
        self._request = request

    @property
    def ended(self) -> bool:
        """Whether the evaluation has ended, complete or not."""
        return self._request.ended

    def cancel(self) -> None:
        """Ends the evaluation within one batch. The llama.cpp context keeps the tokens evaluated so far."""
        self._request.cancel()

    def result(self, progress: OnProgress | None = None) -> Prepared:
        """Waits until the evaluation has ended, and returns its token counts.

        ``progress(done, total)`` is called with numbers of tokens, in this thread. Raises ``CpucacheError`` when the
        preparation was cancelled or another request ended it, and any error of the evaluation.
        """
        return self._request.result(progress)


class TypingAhead:
    """Evaluates a text while the user types it.

    Call ``typed`` with the whole text after each change. A word is evaluated once a blank follows it. A new preparation
    cancels earlier ones, except a running one whose text is a prefix of the new text: the new one needs its tokens.

    Args:
        prepare: Starts the preparation of a text, such as ``Session.prepare``. A ``CpucacheError`` that it raises is
            ignored: the prompt raises it again when it is asked.
    """

    def __init__(self, prepare: Callable[[str], Preparation]) -> None:
        self._prepare = prepare
        self._head: str | None = None
        self._under_way: list[tuple[str, Preparation]] = []

    def typed(self, text: str) -> None:
        """Prepares the text in its current state, if a word was completed or changed since the last call."""
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
        """Cancels all preparations. Call it when the text is asked or abandoned."""
        for _, each in self._under_way:
            each.cancel()
        self._under_way, self._head = [], None
