"""Slices, and the plans by which they are spliced.

A slice is the saved KV state of a run of tokens, evaluated in one context, at one position. Its key hashes all three.
The key of a context depends only on the tokens attended to, not on how they were cut into slices.
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
"""Relation of the context of a slice to the text before the slice in a prompt.

``exact``: all of that text. ``clean``: a part of it. ``related``: includes other text of the same schema.
``foreign``: includes text of other prompts.
"""


@dataclass(frozen=True, eq=False, repr=False)
class Slice:
    """The state of ``tokens``, saved at the positions from ``start`` on. Compared by key."""

    key: str
    tokens: Tokens
    start: int
    context_key: str
    attends_to: tuple[bytes, ...]
    """The ``text_id`` of each run of tokens in its context, in order."""
    attended_tokens: int
    """Number of tokens in its context."""
    module: str = ""
    """Dotted path of the module that the text belongs to."""
    context: tuple[Span, ...] | None = None
    """Spans after which the slice is evaluated; ``None`` if it was found in the store and can't be encoded here."""

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
        """Number of positions by which the slice is shifted after its evaluation directly after its context."""
        return self.start - (self.context[-1].end if self.context else 0)

    @property
    def needs(self) -> list[Slice]:
        """Slices in the context of this slice."""
        return [span.slice for span in self.context or () if span.slice]

    @property
    def chained(self) -> bool:
        """Whether its context fills all positions from 0 up to the slice."""
        return self.start == self.attended_tokens and not self.delta

    @classmethod
    def described(cls, key: str, info: SliceInfo, tokens: Tokens, module: str = "") -> Slice:
        """Returns a slice from its description in the store."""
        return cls(key, tokens, info.start, info.context, info.texts, info.attended_tokens, module)

    @cached_property
    def span(self) -> Span:
        """The whole slice as a span, at its saved position."""
        return Span(self.start, self.tokens, self)


@dataclass(frozen=True, eq=False, repr=False)
class Span:
    """Tokens at consecutive positions from ``start``: a slice to splice, or (no slice) tokens to evaluate.

    The tokens of a slice are all of its tokens, or the first of them. Compared by identity; ``same`` compares content.
    """

    start: int
    tokens: Tokens
    slice: Slice | None = None
    relation: Relation = "exact"
    missing: bool = False
    """Whether the slice is missing, and encoded for this plan."""
    recomputed: bool = False
    """For tokens to evaluate: whether they are recomputed although a slice of them exists."""
    module: str = ""
    """For tokens to evaluate: their module, if they are recomputed or the module is never cached."""
    why: str = ""
    """Why no better slice was taken, or why the tokens are evaluated."""
    joined: tuple[bytes, ...] = ()
    """For tokens to evaluate that join several texts: the ``text_id`` of each."""

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.start + len(self.tokens)

    @property
    def delta(self) -> int:
        """Number of positions by which the slice must be shifted from its saved position."""
        return self.start - self.slice.start if self.slice else 0

    @property
    def whole(self) -> bool:
        """Whether the span is a whole slice."""
        return self.slice is not None and len(self.tokens) == len(self.slice.tokens)

    @property
    def texts(self) -> tuple[bytes, ...]:
        """The ``text_id`` of each text in the span."""
        return self.joined or (text_id(self.tokens if self.slice is None else self.slice.tokens),)

    def moved(self, delta: int) -> Span:
        """Returns the span shifted by ``delta`` positions."""
        return replace(self, start=self.start + delta) if delta else self

    def same(self, other: Span) -> bool:
        """Whether both spans hold the same state at the same positions."""
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
    """Spans in position order. Gaps between them are unused positions; spans never overlap."""

    spans: tuple[Span, ...]
    besides: tuple[Slice, ...] = ()
    """Missing slices that are encoded for other prompts; this plan recomputes their tokens."""

    @cached_property
    def tokens(self) -> Tokens:
        """All tokens of the prompt, as a prompt without reuse evaluates them."""
        return joined([span.tokens for span in self.spans])

    @property
    def n_tokens(self) -> int:
        """Number of tokens of all spans."""
        return sum(len(span.tokens) for span in self.spans)

    @property
    def n_cached(self) -> int:
        """Number of tokens whose state comes from slices."""
        return sum(len(span.tokens) for span in self.spans if span.slice)

    @property
    def n_recomputed(self) -> int:
        """Number of recomputed tokens."""
        return sum(len(span.tokens) for span in self.spans if span.recomputed)

    @property
    def exact(self) -> bool:
        """Whether all slices are exact."""
        return all(span.relation == "exact" for span in self.spans)

    @property
    def slices(self) -> list[Slice]:
        """Slices to splice, in order."""
        return [span.slice for span in self.spans if span.slice]

    @property
    def wanted(self) -> list[Slice]:
        """Slices that must exist after the prompt has been evaluated."""
        return [*self.slices, *self.besides]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.spans[-1].end if self.spans else 0

    def count(self, relation: Relation) -> int:
        """Number of tokens from slices of this relation that existed before the plan."""
        spans = (span for span in self.spans if span.slice and span.relation == relation and not span.missing)
        return sum(len(span.tokens) for span in spans)

    def first(self, count: int) -> Plan:
        """Returns a plan of the first ``count`` tokens. A slice that is cut becomes tokens to evaluate."""
        spans: list[Span] = []
        for span in self.spans:
            if 0 < count < len(span.tokens):
                spans.append(Span(span.start, span.tokens[:count]))
            elif count > 0:
                spans.append(span)
            count -= len(span.tokens)
        return Plan(tuple(spans), self.besides)

    def evaluating(self, count: int) -> Plan:
        """Returns the plan with its last ``count + 1`` spans joined into one span of tokens to evaluate."""
        if not count:
            return self
        spans, end = self.spans[: -count - 1], self.spans[-count - 1 :]
        return Plan((*spans, Span(end[0].start, joined([span.tokens for span in end]))), self.besides)

    def without_reuse(self) -> Plan:
        """Returns a plan that evaluates all tokens without gaps: a full prefill."""
        return Plan((Span(0, self.tokens),))

    def __repr__(self) -> str:
        return f"<Plan of {self.n_tokens} tokens in {len(self.spans)} spans, {self.n_cached} from slices>"


# Token ids are never negative, so negative numbers mark gaps and slices.
_GAP, _SLICE = -1, -2


class Trail:
    """Context key of a growing prefix of a plan; spans are added one by one.

    Evaluated tokens and exact slices are hashed as their tokens, so that the key does not depend on how text was cut
    or which part was saved. Any other slice is hashed by its key: its state differs from that of its tokens evaluated
    there.
    """

    def __init__(self, spans: Iterable[Span] = ()) -> None:
        self._digest = blake2b(digest_size=16)
        self.end = 0
        """Position after the last span."""
        self.exact = True
        """Whether all tokens follow each other from position 0, and attended to all tokens before them."""
        self.attends_to: list[bytes] = []
        self._seen: dict[bytes, None] = {}
        self.n_tokens = 0
        for span in spans:
            self.add(span)

    @property
    def key(self) -> str:
        """32 hexadecimal digits."""
        return self._digest.copy().hexdigest()

    def copy(self) -> Trail:
        """Returns a copy that can be extended separately."""
        other = Trail()
        other._digest = self._digest.copy()
        other.end, other.exact, other.n_tokens = self.end, self.exact, self.n_tokens
        other.attends_to, other._seen = list(self.attends_to), dict(self._seen)
        return other

    def in_place(self, span: Span) -> bool:
        """Whether the state of ``span`` after this trail equals that of its tokens evaluated there."""
        if span.slice is None:
            return True
        fits = span.start == self.end and not span.delta
        return fits and span.slice.context_key == self.key

    def add(self, span: Span) -> None:
        """Appends a span."""
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
    """Cuts texts into segments, as ``cpucache.layout.cuts.Cuts`` does."""

    def __call__(self, tokens: Tokens, *, part: bool = False) -> Sequence[int]:
        """Returns the end of each segment. ``part``: whether ``tokens`` are part of a longer text."""

    def ends_message(self, tokens: Tokens) -> bool:
        """Returns whether ``tokens`` end at the end of a message or of its header."""


class Whole:
    """Treats every text as one segment."""

    def __call__(self, tokens: Tokens, *, part: bool = False) -> Sequence[int]:  # noqa: ARG002
        """Returns the end of the text."""
        return [len(tokens)] if len(tokens) else []

    def ends_message(self, tokens: Tokens) -> bool:  # noqa: ARG002
        """Returns ``False``: uncut text has no known message ends."""
        return False


class Slices:
    """Describes slices of one model and one state format, with their keys and contexts.

    Args:
        fingerprint: Identifies the model's weights.
        state_format: Identifies the other settings that the bytes of a state depend on.
        cuts: Cuts texts into segments; without it each text is one segment.
    """

    def __init__(self, fingerprint: str, state_format: str, cuts: Cutting | None = None) -> None:
        self.fingerprint = fingerprint
        self.state_format = state_format
        """Part of every key."""
        self.scope = state_format
        """Part of the content key, by which slices that are not exact are found."""
        self.cuts: Cutting = cuts or Whole()
        self.memory = Memory()
        """Capabilities of the model's memory; set by ``KVCache``."""

    def point(self, slice_: Slice) -> Slice:
        """Returns the recurrent state at the end of a slice, as a slice of no tokens. Only it can be extended."""
        none = slice_.tokens[:0]
        key = self.key(slice_.key, none, slice_.end)
        return Slice(key, none, slice_.end, slice_.key, slice_.attends_to, slice_.attended_tokens, slice_.module)

    def within(self, namespace: str, *, isolate: bool = False) -> Slices:
        """Returns the ``Slices`` of a namespace.

        Slices that are not exact are found only in the namespace that asked for them. Exact slices have the same key in
        all namespaces, unless ``isolate`` is set: then nothing is shared.
        """
        own = f"{self.state_format}/in-{namespace}"
        other = Slices(self.fingerprint, own if isolate else self.state_format, self.cuts)
        other.scope = own
        return other

    @property
    def shared(self) -> bool:
        """Whether the store may hold slices from other namespaces, which this scope does not find by content."""
        return self.scope != self.state_format

    def content(self, tokens: Tokens) -> str:
        """Returns the content key, shared by all slices of these tokens."""
        return content_key(self.fingerprint, self.scope, tokens)

    def key(self, context_key: str, tokens: Tokens, start: int) -> str:
        """Returns the key of the slice of these tokens in that context, at position ``start``."""
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
        """Returns the slice of ``tokens`` evaluated directly after ``before``. Nothing is evaluated here.

        Args:
            before: Context of the slice.
            tokens: Tokens of the slice.
            module: Dotted path of its module.
            start: Position to which the slice is shifted; by default it stays after ``before``.
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
        """Returns slices of ``tokens`` directly after ``before``. ``ends``: ends of the segments, if known."""
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
        """Returns a plan of ``before``, slices of all segments of ``tokens`` but the last, and the rest to evaluate.

        ``ends``: ends of the segments of ``tokens[:-1]``, if known. For a recurrent model, all of these segments are
        slices: the state before the last token can't be recovered after that token has been evaluated.
        """
        whole = [0, *(self.cuts(tokens[:-1], part=True) if ends is None else ends)]
        if not self.memory.points:
            whole.pop()
        cut = self.cut(before, tokens, module, ends=whole[1:])
        spans = [*before, *(slice_.span for slice_ in cut)]
        done = whole[-1] if whole else 0
        return Plan((*spans, Span(spans[-1].end if spans else 0, tokens[done:])))

    def chained(self, plan: Plan, module: str = "") -> list[Span]:
        """Returns the spans of a plan, with tokens to evaluate replaced by slices."""
        spans: list[Span] = []
        for span in plan.spans:
            if span.slice:
                spans.append(span)
            else:
                spans += [block.span for block in self.cut(spans, span.tokens, module)]
        return spans
