"""Chains of spans in position order, with the context key of the whole chain."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.reuse.slices import Slice, Slices, Span, Trail


class Chain:
    """Spans in position order; new spans are appended at the end."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices
        self.spans: list[Span] = []
        self.trail = Trail()

    @property
    def end(self) -> int:
        """Position after the last span."""
        return self.trail.end

    def copy(self) -> Chain:
        """Returns a copy that can be extended separately."""
        other = Chain(self._slices)
        other.spans, other.trail = list(self.spans), self.trail.copy()
        return other

    def add(self, span: Span) -> None:
        """Appends a span. Adjacent tokens to evaluate, of one module and for one reason, are merged into one span."""
        if not len(span.tokens):
            return
        self.trail.add(span)
        last = self.spans[-1] if self.spans else None
        if last is not None and last.end == span.start and _alike(last, span):
            tokens = joined([last.tokens, span.tokens])
            self.spans[-1] = replace(last, tokens=tokens, joined=(*last.texts, *span.texts))
        else:
            self.spans.append(span)

    def evaluate(self, tokens: Tokens, why: str = "", module: str = "", *, again: bool = False) -> None:
        """Appends tokens to evaluate, directly after the last span. ``again``: a slice of them exists (recompute)."""
        self.add(Span(self.end, tokens, why=why, module=module, recomputed=again))

    def next(self, tokens: Tokens, module: str = "", reserved: int | None = None) -> Slice:
        """Slice of ``tokens`` after this chain, at ``reserved`` or, if that is taken, at the chain's end."""
        start = self.end if reserved is None else max(reserved, self.end)
        return self._slices.make(self.spans, tokens, module, start=start, trail=self.trail)

    def only(self, texts: Iterable[bytes]) -> Chain:
        """Returns the spans of this chain that hold and attended to only these texts, packed without gaps.

        Args:
            texts: The allowed texts, each as its ``text_id``.
        """
        wanted = frozenset(texts)
        kept = []
        for span in self.spans:
            trail = Trail([span])
            if wanted.issuperset(trail.attends_to):
                kept.append(span)
        if len(kept) == len(self.spans):
            return self
        return self._packed(kept)

    def shortened(self, room: int) -> Chain:
        """Returns this chain or, if it exceeds ``room`` cells, its first span and its last spans, in half of ``room``.

        The remaining spans move to lower positions without being evaluated again.
        """
        if self.trail.n_tokens <= room:
            return self
        first, *rest = self.spans
        left = room // 2 - len(first.tokens)
        kept: list[Span] = []
        for span in reversed(rest):
            left -= len(span.tokens)
            if left < 0:
                break
            kept.insert(0, span)
        return self._packed([first, *kept] if len(first.tokens) <= room else kept)

    def _packed(self, spans: Iterable[Span]) -> Chain:
        other = Chain(self._slices)
        for span in spans:
            other.add(replace(span, start=other.end))
        return other


def _alike(one: Span, other: Span) -> bool:
    """Whether both spans are tokens to evaluate, of the same module and for the same reason."""
    return one.slice is None and other.slice is None and (one.why, one.module) == (other.why, other.module)
