"""A turn of a conversation, while it is under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpucache.engine.first_prompt import dump_pieces
from cpucache.layout import Tokens, Turns
from cpucache.reuse import History, Span
from cpucache.sessions import Entry


@dataclass
class Turn:
    """A turn under way: what is to be written down of it."""

    text: str | None
    keep: int
    """Entries that stay as they are."""
    history: History
    turns: Turns
    message: Sequence[Span]
    """The spans of the message, without ``pending``. Each has a slice."""
    pending: Tokens
    """What is evaluated together with the answer: at least the last token before it."""
    number: int
    before: int
    """Entries of the history before this turn."""
    begun: bool = False
    """The message is written down."""

    def entry(self, text: str) -> Entry:
        """The message, to be written down."""
        pieces = dump_pieces(self.message) | {"pending": self.pending.tolist()}
        size = sum(len(part.tokens) for part in self.message) + len(self.pending)
        return Entry("user", text, pieces, self.history.left_out, {"tokens": size})
