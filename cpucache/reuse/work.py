"""Tasks: generators that yield the tokens to evaluate next, so that a scheduler can combine several in one batch."""

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
    """Tokens that a task needs evaluated before its next step. Without tokens, the task waits for another process."""

    runs: list[Run]
    """Runs not yet added to a batch."""
    logits: Wanted = "none"
    """Logits to keep. ``"last"``: of the last token. ``"all"``: of every token; all runs then go into one batch."""
    progress: Step | None = None
    """Called with the number of tokens added to each batch."""
    answers: bool = False
    """Whether these are tokens of an answer, which always go into the next batch."""
    index: int = -1
    """Index in the last batch of the first token whose logits were kept."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens still to be evaluated."""
        return sum(len(run.tokens) for run in self.runs)

    def fill(self, batch: Batch, room: int) -> int:
        """Moves up to ``room`` tokens (all with ``logits="all"``) into a batch. Returns the number of tokens moved."""
        begin = batch.size
        self.index = begin
        room = self.n_tokens if self.logits == "all" else min(room, self.n_tokens)
        while batch.size - begin < room:
            part, rest = self.runs[0].split(room - (batch.size - begin))
            self.runs[:1] = [rest] if len(rest.tokens) else []
            batch.add(part, "none" if self.logits == "last" and self.runs else self.logits)
        if self.logits == "last":
            self.index = batch.size - 1
        return batch.size - begin


Task: TypeAlias = Generator[Work, int, T]
"""Yields ``Work``; is sent the index, in the last batch, of the first logits kept; returns its result. Closing a task,
or throwing an error into it, leaves the llama.cpp context consistent."""
