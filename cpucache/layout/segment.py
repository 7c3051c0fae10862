"""Segments: runs of tokens whose KV state is one slice; spans: where they stand."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

from cpucache.layout.vocabulary import Tokens, empty

Runs: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Segment:
    """A run of tokens evaluated together, in the sight of a fixed context.

    ``home`` is the position of the first token in the saved slice. ``context`` are the slices that these tokens attend
    to, in the order of their positions, as they stand then; the segment is evaluated right behind the last of them and
    then moved home. ``lead`` are tokens evaluated between the context and these, in sight of them, and not kept.
    Compared by identity: equal text in two modules makes two segments, which get one key if all that decides their
    state is equal.
    """

    tokens: Tokens
    home: int
    context: tuple[Span, ...]
    module: str
    """Dotted path of the module that the text belongs to, empty for the schema itself."""
    cache: bool = True
    """False: evaluated afresh in every prompt (``cache="false"``)."""
    placeholder: bool = False
    """The stand-in for a parameter: in sight of what follows it, but never part of a prompt."""
    lead: Tokens = field(default_factory=empty)

    @property
    def end(self) -> int:
        """The position behind the last token, at home."""
        return self.home + len(self.tokens)

    @property
    def context_end(self) -> int:
        """The position behind the last token of the context."""
        return self.context[-1].end if self.context else 0

    @property
    def start(self) -> int:
        """The position where its first token is evaluated: right behind the context, and the lead."""
        return self.context_end + len(self.lead)

    @property
    def delta(self) -> int:
        """The way home from there."""
        return self.home - self.start

    @property
    def cells(self) -> int:
        """How many cells of a context it takes to evaluate it: its own, and those of all that it sees."""
        return sum(len(span.tokens) for span in self.context) + len(self.lead) + len(self.tokens)

    @cached_property
    def sees(self) -> tuple[Segment, ...]:
        """The segments of the context."""
        return tuple(span.segment for span in self.context if span.segment)

    @property
    def led(self) -> bool:
        """Whether it, or something in its sight, has a lead."""
        return any(len(segment.lead) for segment in (self, *self.sees))

    @cached_property
    def chained(self) -> bool:
        """Whether it stands right behind everything before it and sees all of that: no approximation, nothing moved."""
        if len(self.lead):
            return False
        if not self.context:
            return self.home == 0
        last = self.context[-1]
        before = last.segment
        return (
            before is not None
            and self.home == last.end
            and last.whole
            and not last.delta
            and not last.renewed
            and before.context == self.context[:-1]
            and before.chained
        )

    @cached_property
    def span(self) -> Span:
        """All of it, at home."""
        return Span(self.home, self.tokens, self)


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens at consecutive positions from ``start``: a slice to splice, or (no segment) fresh tokens to evaluate.

    The tokens of a slice are its segment's, or the first of them. Compared by identity.
    """

    start: int
    tokens: Tokens
    segment: Segment | None = None
    renewed: Runs = ()
    """Ranges [begin, end) of the slice's tokens that are evaluated afresh where it stands, in order."""

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + len(self.tokens)

    @property
    def delta(self) -> int:
        """By how many positions the slice must be moved from where it was saved."""
        return self.start - self.segment.home if self.segment else 0

    @property
    def whole(self) -> bool:
        """Whether it is all of its segment."""
        return self.segment is not None and len(self.tokens) == len(self.segment.tokens)

    @property
    def n_renewed(self) -> int:
        """How many of the slice's tokens are evaluated afresh."""
        return sum(end - begin for begin, end in self.renewed)

    def moved(self, delta: int) -> Span:
        """The same tokens, ``delta`` positions further on."""
        return replace(self, start=self.start + delta) if delta else self
