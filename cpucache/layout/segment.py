"""Segments: runs of tokens whose KV state is one slice."""

from __future__ import annotations

from dataclasses import dataclass

from cpucache.layout.vocabulary import Tokens


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens evaluated together, in the sight of a fixed context.

    ``home`` is the position of the first token in the saved slice. ``context`` are the segments that these tokens
    attend to, in the order of their positions; the segment is evaluated right behind the last of them and then moved
    home. Compared by identity: equal text in two modules makes two segments, which get one key if all that decides
    their state is equal.
    """

    tokens: Tokens
    home: int
    context: tuple[Segment, ...]
    module: str
    """Dotted path of the module that the text belongs to, empty for the schema itself."""
    cache: bool = True
    """False: evaluated afresh in every prompt (``cache="false"``)."""
    placeholder: bool = False
    """The stand-in for a parameter: in sight of what follows it, but never part of a prompt."""

    @property
    def end(self) -> int:
        """The position behind the last token, at home."""
        return self.home + len(self.tokens)

    @property
    def context_end(self) -> int:
        """The position behind the last token in sight, where this segment is evaluated."""
        return self.context[-1].end if self.context else 0
