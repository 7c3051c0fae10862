"""Segments: runs of a schema's text that are reused as units, and the text that a prompt brings besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

from cpucache.layout.vocabulary import Tokens, empty
from cpucache.store import text_id

LONGEST = 512
"""Tokens of a segment at most. Longer text is cut, so that interrupted work is lost in small parts only."""


@dataclass(frozen=True, eq=False, repr=False)
class Segment:
    """A run of a schema's text, reused as a unit. Compared by identity."""

    tokens: Tokens
    reserved: int | None
    """Position that a reserved layout gives to its first token; ``None`` in a packed layout."""
    module: str
    """Dotted path of the module that the text belongs to, empty for the schema itself."""
    cache: bool = True
    """False: evaluated in every prompt (``cache="false"``)."""

    @cached_property
    def id(self) -> bytes:
        """The ``text_id`` of the tokens."""
        return text_id(self.tokens)

    def __repr__(self) -> str:
        place = "" if self.reserved is None else f" at {self.reserved}"
        return f"<Segment of {self.module!r}, {len(self.tokens)} tokens{place}>"


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Tokens that replace an argument while the schema is encoded: the parameter's scaffold, padded to its length."""

    tokens: Tokens
    reserved: int | None


@dataclass(frozen=True, eq=False)
class NewText:
    """Text that a prompt brings: an argument, text between references, a turn."""

    tokens: Tokens
    placeholder: Tokens = field(default_factory=empty)
    """Tokens that replace it while the schema is encoded: of an argument, its placeholder; of other text, none."""


Piece: TypeAlias = Segment | NewText
"""A prompt on its schema's layout is a list of pieces, in the order in which the model reads them."""


@dataclass(frozen=True)
class RoleRun:
    """A run of tokens that one message says, without what the template puts around it."""

    role: str
    """Role of the message; ``"tools"``: the run describes a tool."""
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Text:
    """Text without markup, as tokens."""

    tokens: Tokens
    parts: tuple[tuple[int, int], ...] = ()
    """Runs of tokens that may be reused wherever they stand, each by its beginning and end: they do not overlap, and
    come in order."""
    edges: tuple[int, ...] = ()
    """Places, as indices into the tokens, where one segment ends and the next begins, besides those of the parts."""
    roles: tuple[RoleRun, ...] = ()
    """Of a conversation: who says what, in order. Reuse does not depend on it."""

    def first(self, count: int) -> Text:
        """The first tokens, with the parts that lie among them."""
        return Text(
            self.tokens[:count],
            tuple(part for part in self.parts if part[1] <= count),
            tuple(edge for edge in self.edges if edge <= count),
            tuple(run for run in self.roles if run.end <= count),
        )

    def within(self, begin: int, end: int) -> bool:
        """Whether some tokens are within one of the parts."""
        return any(first <= begin and end <= last for first, last in self.parts)

    @property
    def _edges(self) -> list[int]:
        return [*(edge for part in self.parts for edge in part), *self.edges]

    def ends(self, cuts: Callable[[Tokens], Sequence[int]]) -> list[int]:
        """The ends of the segments of all tokens but the last. Cuts within a part depend on that part alone."""
        size = len(self.tokens) - 1
        edges = sorted({min(edge, size) for edge in self._edges} | {0, size})
        found: list[int] = []
        for begin, end in pairwise(edges):
            found += [begin + cut for cut in cuts(self.tokens[begin:end])]
        return found
