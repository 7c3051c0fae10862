"""Tasks: evaluations that say step by step what they want evaluated, so that a scheduler can put many in one batch."""

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
    """Tokens that a task wants evaluated before it goes on. Without any, the task waits for another process."""

    runs: list[Run]
    """What has not been put into a batch yet."""
    logits: Wanted = "none"
    """``"last"``: those of the last token of all. ``"all"``: those of every token, so that the runs go into one batch.
    """
    progress: Step | None = None
    """Told how many tokens each batch had."""
    answers: bool = False
    """Whether these are tokens of an answer, which go into the next batch, whatever else does."""
    index: int = -1
    """Index in the last batch of the first token whose logits were kept."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens still to be evaluated."""
        return sum(len(run.tokens) for run in self.runs)

    def fill(self, batch: Batch, room: int) -> int:
        """Move up to ``room`` tokens into a batch; gives how many."""
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
"""Yields ``Work``, and is sent the index of the logits that were kept, in the last batch. Returns what it was to find
out. Closing it, or an error thrown into it, leaves nothing half-done in the llama.cpp context."""
