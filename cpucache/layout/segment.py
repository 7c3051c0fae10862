"""Segments: runs of a schema's text that are reused as units, and the text that a prompt adds to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TypeAlias

from cpucache.layout.vocabulary import Tokens, empty
from cpucache.store import text_id

LONGEST = 512
"""Maximum length of a segment, in tokens. Longer text is cut, so that an interruption loses one segment at most."""


@dataclass(frozen=True, eq=False, repr=False)
class Segment:
    """A run of a schema's text, reused as a unit. Compared by identity."""

    tokens: Tokens
    reserved: int | None
    """Position of the first token in a reserved layout; ``None`` in a packed layout."""
    module: str
    """Dotted path of the module that the text belongs to; empty for the schema itself."""
    cache: bool = True
    """Whether its slices are reused; false for ``cache="false"`` modules, which every prompt evaluates."""

    @cached_property
    def id(self) -> bytes:
        """The ``text_id`` of the tokens."""
        return text_id(self.tokens)

    def __repr__(self) -> str:
        place = "" if self.reserved is None else f" at {self.reserved}"
        return f"<Segment of {self.module!r}, {len(self.tokens)} tokens{place}>"


@dataclass(frozen=True, eq=False)
class Placeholder:
    """Tokens in place of an argument while the schema is encoded: the parameter's scaffold, padded to its length."""

    tokens: Tokens
    reserved: int | None


@dataclass(frozen=True, eq=False)
class NewText:
    """Text that a prompt adds to its schema: an argument, text between references, or a turn."""

    tokens: Tokens
    placeholder: Tokens = field(default_factory=empty)
    """Tokens in its place while the schema is encoded; empty unless the text is an argument."""


Piece: TypeAlias = Segment | NewText
"""Element of a bound prompt. A bound prompt is a list of pieces in reading order."""


@dataclass(frozen=True)
class RoleRun:
    """Tokens ``begin`` to ``end`` of a conversation: the content of one message, without the chat template's text."""

    role: str
    """Role of the message; ``"tools"`` for the definition of a tool."""
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class Text:
    """Text without markup, as tokens."""

    tokens: Tokens
    parts: tuple[tuple[int, int], ...] = ()
    """``(begin, end)`` of runs of tokens that may be reused at any position. They are in order and do not overlap."""
    edges: tuple[int, ...] = ()
    """Further segment boundaries, as indices into the tokens. The boundaries of parts are not listed."""
    roles: tuple[RoleRun, ...] = ()
    """Runs of a conversation's messages, in order. Reuse does not depend on them."""

    def first(self, count: int) -> Text:
        """The first ``count`` tokens, with the parts, edges and roles that lie entirely within them."""
        return Text(
            self.tokens[:count],
            tuple(part for part in self.parts if part[1] <= count),
            tuple(edge for edge in self.edges if edge <= count),
            tuple(run for run in self.roles if run.end <= count),
        )

    def within(self, begin: int, end: int) -> bool:
        """Whether one part contains all tokens from ``begin`` to ``end``."""
        return any(first <= begin and end <= last for first, last in self.parts)

    @property
    def _edges(self) -> list[int]:
        return [*(edge for part in self.parts for edge in part), *self.edges]

    def ends(self, cuts: Callable[[Tokens], Sequence[int]]) -> list[int]:
        """Ends of the segments of all tokens but the last. Cuts within a part depend only on its own tokens."""
        size = len(self.tokens) - 1
        edges = sorted({min(edge, size) for edge in self._edges} | {0, size})
        found: list[int] = []
        for begin, end in pairwise(edges):
            found += [begin + cut for cut in cuts(self.tokens[begin:end])]
        return found
