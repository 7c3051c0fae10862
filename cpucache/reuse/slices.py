"""Slices, and the plans that they are spliced by.

A slice is the saved KV state of a run of tokens, evaluated in one context, at one position. Its key is a hash of all
three. The key of a context depends on what was attended to, and not on how that text was cut into slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Literal, Protocol, TypeAlias

import numpy as np

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.runtime import Memory
from cpucache.store import SliceInfo, content_key, slice_key, text_id

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


# Marks of what is hashed besides tokens: token ids are never negative.
_GAP, _SLICE = -1, -2


class Trail:
    """Running hash of the spans of a plan: its ``key`` is the context key of what follows the spans added so far.

    Tokens to evaluate, and slices whose context is exactly the text before them, are hashed as tokens, so the key
    depends neither on how text was cut nor on which slices were saved. Any other slice is hashed by its key, because
    its state differs from that of its tokens evaluated there.
    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._digest = blake2b(digest_size=16)
        self.end = 0
        """Position after the last span."""
        self.exact = True
        """Whether all tokens are back to back from position 0, and each attended to all tokens before it."""
        self.attends_to: list[bytes] = []
        self._seen: dict[bytes, None] = {}
        self.n_tokens = 0
        for span in spans:
            self.add(span)

    @property
    def key(self) -> str:
        """Context key of the spans so far: 32 hexadecimal digits."""
        return self._digest.copy().hexdigest()

    def copy(self) -> Trail:
        """Independent copy of this trail."""
        other = Trail()
        other._digest = self._digest.copy()
        other.end, other.exact, other.n_tokens = self.end, self.exact, self.n_tokens
        other.attends_to, other._seen = list(self.attends_to), dict(self._seen)
        return other

    def in_place(self, span: Span) -> bool:
        """Whether the state of ``span``, added at the end, equals that of its tokens evaluated there."""
        if span.slice is None:
            return True
        fits = span.start == self.end and not span.delta
        return fits and span.slice.context_key == self.key

    def add(self, span: Span) -> None:
        """Adds a span at the end."""
        if not len(span.tokens):
            return
        in_place = self.in_place(span)
        if span.start != self.end:
            self._note(_GAP, span.start)
        if in_place:
            self._digest.update(np.ascontiguousarray(span.tokens, "<i4").tobytes())
        else:
            assert span.slice is not None
            self._note(_SLICE, span.start, len(span.tokens))
            self._digest.update(bytes.fromhex(span.slice.key))
        self.exact &= in_place and span.start == self.end
        if span.slice is not None:
            for each in span.slice.attends_to:
                self._see(each)
        for each in span.texts:
            self._see(each)
        self.n_tokens += len(span.tokens)
        self.end = span.end

    def _see(self, text: bytes) -> None:
        if text not in self._seen:
            self._seen[text] = None
            self.attends_to.append(text)

    def _note(self, *numbers: int) -> None:
        self._digest.update(np.array(numbers, "<i4").tobytes())


class Cutting(Protocol):
    """Divides texts into segments, such as ``cpucache.layout.cuts.Cuts``."""

    def __call__(self, tokens: Tokens, *, part: bool = False) -> Sequence[int]:
        """Index after the last token of each segment. ``part``: whether ``tokens`` are a part of a longer text."""

    def ends_message(self, tokens: Tokens) -> bool:
        """Whether ``tokens`` end with the end of a message or of a message's header."""


class Whole:
    """Cutting that leaves each text as one segment."""

    def __call__(self, tokens: Tokens, *, part: bool = False) -> Sequence[int]:  # noqa: ARG002
        """Index after the last token of the text; empty for an empty text."""
        return [len(tokens)] if len(tokens) else []

    def ends_message(self, tokens: Tokens) -> bool:  # noqa: ARG002
        """Always ``False``."""
        return False


class Slices:
    """Creates slices, and their keys, for one model and one state format.

    Args:
        fingerprint: Hash that identifies the model's weights.
        state_format: Everything else that the bytes of a state depend on.
        cuts: Divides texts into segments; without it, each text is one segment.
    """

    def __init__(self, fingerprint: str, state_format: str, cuts: Cutting | None = None) -> None:
        self.fingerprint = fingerprint
        self.state_format = state_format
        """Part of every slice key."""
        self.scope = state_format
        """Part of every content key, by which slices are found whatever their contexts."""
        self.cuts: Cutting = cuts or Whole()
        self.memory = Memory()
        """Abilities of the model's memory; set by ``KVCache``."""

    def point(self, slice_: Slice) -> Slice:
        """Recurrent state after a slice, as a slice of no tokens. A recurrent model can only continue after a point."""
        none = slice_.tokens[:0]
        key = self.key(slice_.key, none, slice_.end)
        return Slice(key, none, slice_.end, slice_.key, slice_.attends_to, slice_.attended_tokens, slice_.module)

    def within(self, namespace: str, *, isolate: bool = False) -> Slices:
        """Returns the ``Slices`` of a namespace.

        Slices that are not exact are found only in the namespace that encoded them. Exact slices have the same key in
        all namespaces; with ``isolate``, keys differ too, and nothing is shared.
        """
        own = f"{self.state_format}/in-{namespace}"
        other = Slices(self.fingerprint, own if isolate else self.state_format, self.cuts)
        other.scope = own
        return other

    @property
    def shared(self) -> bool:
        """Whether slices may exist that another namespace saved, and that can't be found by content in this one."""
        return self.scope != self.state_format

    def content(self, tokens: Tokens) -> str:
        """Content key, by which all slices of these tokens are found."""
        return content_key(self.fingerprint, self.scope, tokens)

    def key(self, context_key: str, tokens: Tokens, start: int) -> str:
        """Key of the slice of ``tokens`` at position ``start``, in the context with key ``context_key``."""
        return slice_key(self.fingerprint, self.state_format, context_key, tokens, start)

    def make(
        self,
        before: Sequence[Span],
        tokens: Tokens,
        module: str = "",
        *,
        start: int | None = None,
        trail: Trail | None = None,
    ) -> Slice:
        """Describes the slice of ``tokens`` in the context ``before``. Nothing is evaluated.

        Args:
            before: Spans of the context.
            tokens: Tokens of the slice.
            module: Dotted path of their module.
            start: Position to move the slice to, if not directly after ``before``.
            trail: Trail of ``before``, if known.
        """
        trail = Trail(before) if trail is None else trail
        start = trail.end if start is None else start
        context = trail.key
        key = self.key(context, tokens, start)
        return Slice(key, tokens, start, context, tuple(trail.attends_to), trail.n_tokens, module, tuple(before))

    def cut(
        self, before: Sequence[Span], tokens: Tokens, module: str = "", *, ends: Sequence[int] | None = None
    ) -> list[Slice]:
        """Slices of the segments of ``tokens``, directly after ``before``.

        Args:
            before: Spans of the context of the first slice; each slice belongs to the context of the next.
            tokens: The tokens to cut.
            module: Dotted path of their module.
            ends: Index after the last token of each segment, if known.
        """
        spans = list(before)
        trail = Trail(before)
        cut: list[Slice] = []
        begin = 0
        for end in self.cuts(tokens, part=True) if ends is None else ends:
            cut.append(self.make(spans, tokens[begin:end], module, trail=trail))
            spans.append(cut[-1].span)
            trail.add(cut[-1].span)
            begin = end
        return cut

    def plan(
        self, before: Sequence[Span], tokens: Tokens, module: str = "", *, ends: Sequence[int] | None = None
    ) -> Plan:
        """Plan of ``before``, slices of the segments of ``tokens`` but the last, and the last to evaluate.

        For a recurrent model, all tokens but the very last are slices: its state before the last token can't be saved
        once that token has been evaluated.

        Args:
            before: Spans at the start of the plan.
            tokens: The tokens that follow; the last one is always evaluated.
            module: Dotted path of their module.
            ends: Index after the last token of each segment of ``tokens[:-1]``, if known.
        """
        whole = [0, *(self.cuts(tokens[:-1], part=True) if ends is None else ends)]
        if not self.memory.points:
            whole.pop()
        cut = self.cut(before, tokens, module, ends=whole[1:])
        spans = [*before, *(slice_.span for slice_ in cut)]
        done = whole[-1] if whole else 0
        return Plan((*spans, Span(spans[-1].end if spans else 0, tokens[done:])))

    def chained(self, plan: Plan, module: str = "") -> list[Span]:
        """Spans of a plan, with tokens to evaluate replaced by slices of their segments."""
        spans: list[Span] = []
        for span in plan.spans:
            if span.slice:
                spans.append(span)
            else:
                spans += [block.span for block in self.cut(spans, span.tokens, module)]
        return spans
