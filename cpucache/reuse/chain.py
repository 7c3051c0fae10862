"""Chains: consecutive spans, together with the trail (and so the context key) of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.reuse.plan import Slice, Span
from cpucache.reuse.slices import Slices, Trail


class Chain:
    """Spans in order of position; new spans are added at the end."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices
        self.spans: list[Span] = []
        self.trail = Trail()

    @property
    def end(self) -> int:
        """Position after the last span."""
        return self.trail.end

    def copy(self) -> Chain:
        """Independent copy of this chain."""
        other = Chain(self._slices)
        other.spans, other.trail = list(self.spans), self.trail.copy()
        return other

    def add(self, span: Span) -> None:
        """Adds a span at the end. Adjacent tokens to evaluate for the same reason are merged into one span."""
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
        """Adds tokens to evaluate directly after the last span.

        Args:
            tokens: The tokens to evaluate.
            why: Reason for evaluating them, as shown by ``cpucache plan``.
            module: Dotted path of their module.
            again: Whether they are evaluated although a slice of them exists.
        """
        self.add(Span(self.end, tokens, why=why, module=module, recomputed=again))

    def next(self, tokens: Tokens, module: str = "", reserved: int | None = None) -> Slice:
        """Slice of ``tokens`` with this chain as its context.

        It is saved at position ``reserved``, or at the end of the chain where the chain already extends beyond that.
        """
        start = self.end if reserved is None else max(reserved, self.end)
        return self._slices.create(self.spans, tokens, module, start=start, trail=self.trail)

    def only(self, texts: Iterable[bytes]) -> Chain:
        """Chain of the spans that hold, and attended to, only the given texts, moved back to back.

        Args:
            texts: ``text_id`` of each text.
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
        """This chain, or, if it takes more than ``room`` cells, its first span and its last ones, in at most half.

        The remaining spans move down without being evaluated again, as when the oldest turns of a conversation leave.
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
