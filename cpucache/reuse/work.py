"""Tasks: generators that yield the tokens to evaluate next, so that a scheduler can batch several tasks together."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from cpucache.reuse.progress import Step
from cpucache.runtime import Batch, Run
from cpucache.runtime.context import Wanted

T = TypeVar("T")


@dataclass
class Work:
    """Tokens that a task needs evaluated before it continues. Without tokens, the task waits for another process."""

    runs: list[Run]
    """The runs not yet added to a batch."""
    logits: Wanted = "none"
    """Logits to keep: ``"last"`` for the last token only; ``"all"`` for every token, with all runs in one batch."""
    progress: Step | None = None
    """Called with the number of these tokens in each batch."""
    answers: bool = False
    """Whether these are tokens of an answer, which are always part of the next batch."""
    index: int = -1
    """Index, in the last batch, of the first token whose logits were kept."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens not yet added to a batch."""
        return sum(len(run.tokens) for run in self.runs)

    def fill(self, batch: Batch, room: int) -> int:
        """Moves up to ``room`` tokens into a batch (with logits ``"all"``, every token); returns their number."""
        begin = batch.size
        self.index = begin
        room = self.n_tokens if self.logits == "all" else min(room, self.n_tokens)
        while batch.size - begin < room:
            part, self.runs[:1] = self.runs[0].split(room - (batch.size - begin))
            batch.add(part, "none" if self.logits == "last" and self.runs else self.logits)
        if self.logits == "last":
            self.index = batch.size - 1
        return batch.size - begin


Task: TypeAlias = Generator[Work, int, T]
"""Yields ``Work``, is sent ``Work.index`` of the last batch, and returns its result. Closing a task, or throwing an
exception into it, leaves the llama.cpp context consistent with what the slots hold."""
