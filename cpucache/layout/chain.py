"""Chains: segments that see everything before them, so that reusing them is exact. Prefix blocks, and turns."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

from cpucache.errors import InputError
from cpucache.layout.plan import Piece, Plan
from cpucache.layout.segment import Segment, Span
from cpucache.layout.vocabulary import Tokens, empty, joined

BLOCK = 256
"""Tokens of a prefix block unless told otherwise."""


class Chains:
    """Makes segments that see everything before them: the same object for the same tokens behind the same spans.

    Long text is cut into blocks of ``size`` tokens, each of which is found again by whatever begins with the same text
    (hash chaining, as in vLLM's automatic prefix caching): a block's key names its tokens and, through its context, all
    before it.
    """

    def __init__(self, size: int = BLOCK) -> None:
        if size < 1:
            raise InputError(f"block_size={size}: a block has at least one token")
        self.size = size
        self._known: WeakValueDictionary[tuple[object, ...], Segment] = WeakValueDictionary()

    def segment(self, before: Sequence[Span], tokens: Tokens, module: str = "") -> Segment:
        """``tokens`` right behind ``before``, in one piece."""
        key = (*((span.segment, span.start, len(span.tokens), span.renewed) for span in before), tokens.tobytes())
        segment = self._known.get(key)
        if segment is None:
            segment = Segment(tokens, before[-1].end if before else 0, tuple(before), module)
            self._known[key] = segment
        return segment

    def cut(self, before: Sequence[Span], tokens: Tokens, module: str = "") -> list[Segment]:
        """``tokens`` right behind ``before``, in blocks; the last may be shorter."""
        spans = list(before)
        made: list[Segment] = []
        for begin in range(0, len(tokens), self.size):
            segment = self.segment(spans, tokens[begin : begin + self.size], module)
            spans.append(segment.span)
            made.append(segment)
        return made

    def blocks(self, before: Sequence[Span], tokens: Tokens, module: str = "") -> list[Segment]:
        """The whole blocks of ``tokens``: what is left behind them is shorter than a block."""
        return self.cut(before, tokens[: len(tokens) // self.size * self.size], module)

    def plan(self, before: Sequence[Span], tokens: Tokens, module: str = "") -> Plan:
        """``before``, the whole blocks of ``tokens``, and what is left as fresh tokens: the last token at least."""
        spans = [*before, *(segment.span for segment in self.blocks(before, tokens[:-1], module))]
        done = sum(len(span.tokens) for span in spans[len(before) :])
        return Plan((*spans, Span(spans[-1].end if spans else 0, tokens[done:])), exact=True)

    def exact(self, pieces: Sequence[Piece]) -> Plan:
        """What a prompt consists of, back to back, every slice in the sight of all before it.

        A piece of the schema that has seen just that is taken as it is. Whatever stands before the last of the schema's
        pieces becomes slices of this combination, up to what is never to be saved; the rest is fresh, the last token at
        least.
        """
        pieces = [piece for piece in pieces if isinstance(piece, Segment) or len(piece)]
        spans: list[Span] = []
        ours = [index for index, piece in enumerate(pieces) if isinstance(piece, Segment)]
        fresh = list(pieces)
        for index, piece in enumerate(pieces[: ours[-1] + 1] if ours else ()):
            if isinstance(piece, Segment):
                if not piece.cache:
                    break
                tokens = piece.tokens[:-1] if index == len(pieces) - 1 else piece.tokens
                seen = len(piece.context) == len(spans) and all(map(operator.is_, piece.context, spans))
                if seen and piece.chained and len(tokens):
                    last = len(tokens) < len(piece.tokens)
                    spans.append(replace(piece.span, tokens=tokens) if last else piece.span)
                else:
                    spans += [segment.span for segment in self.cut(spans, tokens, piece.module)]
                fresh[index] = piece.tokens[len(tokens) :]
            else:
                spans += [segment.span for segment in self.cut(spans, piece)]
                fresh[index] = empty()
        rest = joined([piece.tokens if isinstance(piece, Segment) else piece for piece in fresh])
        return Plan((*spans, Span(spans[-1].end if spans else 0, rest)), exact=True)

    def chained(self, plan: Plan, module: str = "") -> list[Span]:
        """A plan whose fresh tokens are slices as well, in the sight of everything before them in it."""
        spans: list[Span] = []
        for span in plan.spans:
            if span.segment:
                spans.append(span)
            else:
                spans += [segment.span for segment in self.cut(spans, span.tokens, module)]
        return spans
