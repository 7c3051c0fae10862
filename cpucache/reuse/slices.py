"""Creation of slices, and their keys.

The key of a slice is a hash of its tokens, its context and its position. The key of a context depends on what was
attended to, and not on how that text was cut into slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Protocol

import numpy as np

from cpucache.layout import Tokens
from cpucache.reuse.plan import Plan, Slice, Span
from cpucache.runtime import Memory
from cpucache.store import content_key, slice_key

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
        self.attends_to: dict[bytes, None] = {}
        """``text_id`` of each text that was attended to, in order of its first appearance."""
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
        other.attends_to = dict(self.attends_to)
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
            self.attends_to |= dict.fromkeys(span.slice.attends_to)
        self.attends_to |= dict.fromkeys(span.texts)
        self.n_tokens += len(span.tokens)
        self.end = span.end

    def _note(self, *numbers: int) -> None:
        self._digest.update(np.array(numbers, "<i4").tobytes())


class GrowingTrail:
    """Trail of spans that mostly grow from call to call. A call continues the trail of the last one if it can."""

    def __init__(self) -> None:
        self._trail = Trail()
        self._spans: list[Span] = []

    def copy(self) -> GrowingTrail:
        """Independent copy of this object."""
        other = GrowingTrail()
        other._trail, other._spans = self._trail.copy(), self._spans
        return other

    def of(self, spans: list[Span]) -> Trail:
        """The trail of ``spans``. The next call may change it: copy it before adding to it."""
        # Spans are compared by identity.
        if self._spans != spans[: len(self._spans)]:
            self._trail, self._spans = Trail(), []
        for span in spans[len(self._spans) :]:
            self._trail.add(span)
        self._spans = list(spans)
        return self._trail


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

    def create(
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
        self,
        before: Sequence[Span],
        tokens: Tokens,
        module: str = "",
        *,
        ends: Sequence[int] | None = None,
        trail: Trail | None = None,
    ) -> list[Slice]:
        """Slices of the segments of ``tokens``, directly after ``before``.

        Args:
            before: Spans of the context of the first slice; each slice belongs to the context of the next.
            tokens: The tokens to cut.
            module: Dotted path of their module.
            ends: Index after the last token of each segment, if known.
            trail: Trail of ``before``, if known; it is not changed.
        """
        spans = list(before)
        trail = Trail(before) if trail is None else trail.copy()
        cut: list[Slice] = []
        begin = 0
        for end in self.cuts(tokens, part=True) if ends is None else ends:
            cut.append(self.create(spans, tokens[begin:end], module, trail=trail))
            spans.append(cut[-1].span)
            trail.add(cut[-1].span)
            begin = end
        return cut

    def plan(
        self,
        before: Sequence[Span],
        tokens: Tokens,
        module: str = "",
        *,
        ends: Sequence[int] | None = None,
        trail: Trail | None = None,
    ) -> Plan:
        """Plan of ``before``, slices of the segments of ``tokens`` but the last, and the last to evaluate.

        For a recurrent model, all tokens but the very last are slices: its state before the last token can't be saved
        once that token has been evaluated.

        Args:
            before: Spans at the start of the plan.
            tokens: The tokens that follow; the last one is always evaluated.
            module: Dotted path of their module.
            ends: Index after the last token of each segment of ``tokens[:-1]``, if known.
            trail: Trail of ``before``, if known; it is not changed.
        """
        whole = [0, *(self.cuts(tokens[:-1], part=True) if ends is None else ends)]
        if not self.memory.points:
            whole.pop()
        cut = self.cut(before, tokens, module, ends=whole[1:], trail=trail)
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
