"""A turn of a conversation that is being answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpucache.engine.first_prompt import dump_pieces
from cpucache.layout import Tokens, Turns
from cpucache.reuse import History, Span
from cpucache.sessions import Entry


@dataclass
class Turn:
    """A turn that is being answered, with the data for its entries in the transcript."""

    text: str | None
    """The message; ``None`` when an existing message is answered."""
    keep: int
    """Number of leading entries of the transcript that stay."""
    history: History
    turns: Turns
    message: Sequence[Span]
    """The spans of the message, without ``pending``. Each has a slice."""
    pending: Tokens
    """Tokens before the answer that are saved in its slice: at least the last one."""
    number: int
    """Number of the message among those of the user, from 1 on."""
    before: int
    """Number of entries of the history before this turn."""
    begun: bool = False
    """Whether the message is in the transcript."""

    def entry(self, text: str) -> Entry:
        """The transcript entry of the message."""
        pieces = dump_pieces(self.message) | {"pending": self.pending.tolist()}
        size = sum(len(part.tokens) for part in self.message) + len(self.pending)
        return Entry("user", text, pieces, self.history.left_out, {"tokens": size})
