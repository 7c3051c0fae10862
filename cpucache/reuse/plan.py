"""Slices, and the plans that they are spliced by.

A slice is the saved KV state of a run of tokens, evaluated in one context, at one position. ``Slices`` creates slices
and computes their keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.store import SliceInfo, text_id

Relation: TypeAlias = Literal["exact", "clean", "related", "foreign"]
"""How the context of a slice relates to the text before the slice in a prompt.

``exact``: the context equals that text. ``clean``: it is a part of that text. ``related``: it holds other text of the
same schema. ``foreign``: it holds text of other prompts.
"""


@dataclass(frozen=True, eq=False, repr=False)
class Slice:
    """KV state of ``tokens``, saved at consecutive positions from ``start``. Slices are compared by key."""

    key: str
    tokens: Tokens
    start: int
    context_key: str
    attends_to: tuple[bytes, ...]
    """``text_id`` of each text that the slice attended to, in order."""
    attended_tokens: int
    """Number of tokens that the slice attended to before its own."""
    module: str = ""
    """Dotted path of the module that the text belongs to."""
    context: tuple[Span, ...] | None = None
    """Spans to evaluate the slice after; ``None`` if it was found in the store, and so can't be encoded again."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slice) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"<Slice {self.key[:8]} of {self.module!r}, {len(self.tokens)} tokens at {self.start}>"

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def delta(self) -> int:
        """Positions that the slice is moved by, after it was evaluated directly after its context."""
        return self.start - (self.context[-1].end if self.context else 0)

    @property
    def needs(self) -> list[Slice]:
        """Slices in the slice's context, in order."""
        return [span.slice for span in self.context or () if span.slice]

    @property
    def chained(self) -> bool:
        """Whether the context fills all positions before the slice, and the slice is not moved."""
        return self.start == self.attended_tokens and not self.delta

    @classmethod
    def described(cls, key: str, info: SliceInfo, tokens: Tokens, module: str = "") -> Slice:
        """Slice from the store's description of it. It has no context spans."""
        return cls(key, tokens, info.start, info.context, info.texts, info.attended_tokens, module)

    @cached_property
    def span(self) -> Span:
        """Span of the whole slice, at the position where it was saved."""
        return Span(self.start, self.tokens, self)


@dataclass(frozen=True, eq=False, repr=False)
class Span:
    """Tokens at consecutive positions from ``start``: a slice to splice, or (no slice) tokens to evaluate.

    A span with a slice holds all of its tokens, or the first of them. Spans are compared by identity; ``same``
    compares content.
    """

    start: int
    tokens: Tokens
    slice: Slice | None = None
    relation: Relation = "exact"
    missing: bool = False
    """Whether the store lacks the slice, so that it is encoded for this plan."""
    recomputed: bool = False
    """Of tokens to evaluate: whether they are evaluated although a slice of them exists."""
    module: str = ""
    """Of tokens to evaluate: their module, if they are recomputed or the module is never cached."""
    why: str = ""
    """Reason why no better slice was taken, or why the tokens are evaluated."""
    joined: tuple[bytes, ...] = ()
    """Of tokens to evaluate that were joined from several texts: the ``text_id`` of each."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def delta(self) -> int:
        """Positions that the slice must be moved by, from where it was saved."""
        return self.start - self.slice.start if self.slice else 0

    @property
    def whole(self) -> bool:
        """Whether the span holds all tokens of a slice."""
        return self.slice is not None and len(self.tokens) == len(self.slice.tokens)

    @property
    def texts(self) -> tuple[bytes, ...]:
        """``text_id`` of each text in the span."""
        return self.joined or (text_id(self.tokens if self.slice is None else self.slice.tokens),)

    def moved(self, delta: int) -> Span:
        """Returns the same span, ``delta`` positions later."""
        return replace(self, start=self.start + delta) if delta else self

    def same(self, other: Span) -> bool:
        """Whether both spans yield the same state at the same positions."""
        return (
            self.slice == other.slice
            and self.start == other.start
            and len(self.tokens) == len(other.tokens)
            and (self.slice is not None or bool(np.array_equal(self.tokens, other.tokens)))
        )

    def __repr__(self) -> str:
        what = f"{self.relation} slice {self.slice.key[:8]} of {self.slice.module!r}" if self.slice else "evaluated"
        return f"<Span {self.start}..{self.end} {what}>"


@dataclass(frozen=True, repr=False)
class Plan:
    """Spans in order of position. Spans never overlap; gaps between them are unused positions."""

    spans: tuple[Span, ...]
    besides: tuple[Slice, ...] = ()
    """Missing slices that are encoded for later prompts only: in this prompt, their tokens are recomputed."""

    @cached_property
    def tokens(self) -> Tokens:
        """All tokens of the prompt, in the order in which full prefill evaluates them."""
        return joined([span.tokens for span in self.spans])

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all spans."""
        return sum(len(span.tokens) for span in self.spans)

    @property
    def n_cached(self) -> int:
        """Number of tokens whose state comes from slices."""
        return sum(len(span.tokens) for span in self.spans if span.slice)

    @property
    def n_recomputed(self) -> int:
        """Number of tokens that are evaluated although slices of them exist."""
        return sum(len(span.tokens) for span in self.spans if span.recomputed)

    @property
    def exact(self) -> bool:
        """Whether every slice attended to all text before it, and to nothing else."""
        return all(span.relation == "exact" for span in self.spans)

    @property
    def slices(self) -> list[Slice]:
        """Slices to splice, in order of position."""
        return [span.slice for span in self.spans if span.slice]

    @property
    def wanted(self) -> list[Slice]:
        """Slices that exist once the prompt has been evaluated."""
        return [*self.slices, *self.besides]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.spans[-1].end if self.spans else 0

    def count(self, relation: Relation) -> int:
        """Number of tokens that come from slices of this relation, missing slices not counted."""
        spans = (span for span in self.spans if span.slice and span.relation == relation and not span.missing)
        return sum(len(span.tokens) for span in spans)

    def first(self, count: int) -> Plan:
        """Plan of the first ``count`` tokens. A span that ends after them becomes tokens to evaluate."""
        spans: list[Span] = []
        for span in self.spans:
            if 0 < count < len(span.tokens):
                spans.append(Span(span.start, span.tokens[:count]))
            elif count > 0:
                spans.append(span)
            count -= len(span.tokens)
        return Plan(tuple(spans), self.besides)

    def evaluating(self, count: int) -> Plan:
        """Plan with its last span and the ``count`` spans before it joined into one span of tokens to evaluate."""
        if not count:
            return self
        spans, end = self.spans[: -count - 1], self.spans[-count - 1 :]
        return Plan((*spans, Span(end[0].start, joined([span.tokens for span in end]))), self.besides)

    def without_reuse(self) -> Plan:
        """Plan that evaluates the same tokens back to back from position 0: a full prefill."""
        return Plan((Span(0, self.tokens),))

    def __repr__(self) -> str:
        return f"<Plan of {self.n_tokens} tokens in {len(self.spans)} spans, {self.n_cached} from slices>"
