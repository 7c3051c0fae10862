"""Plans: what a prompt consists of, in the order of positions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np

from cpucache.layout.refresh import Refresh, Reused
from cpucache.layout.segment import Runs, Segment, Span
from cpucache.layout.vocabulary import Tokens, joined


@dataclass(frozen=True)
class Plan:
    """Spans in order of position. Gaps between them are positions left out; spans never overlap."""

    spans: tuple[Span, ...]
    exact: bool = False
    """Slices have seen all that stands before them, so that it makes no difference whether they were there before."""

    @cached_property
    def tokens(self) -> Tokens:
        """Every token of the prompt, as a prompt without reuse evaluates them."""
        return joined([span.tokens for span in self.spans])

    @property
    def n_tokens(self) -> int:
        return sum(len(span.tokens) for span in self.spans)

    @property
    def n_cached(self) -> int:
        """Tokens whose state comes from slices."""
        return sum(len(span.tokens) - span.n_renewed for span in self.spans if span.segment)

    @property
    def segments(self) -> list[Segment]:
        """The segments to splice, in order."""
        return [span.segment for span in self.spans if span.segment]

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.spans[-1].end if self.spans else 0

    def without_reuse(self) -> Plan:
        """The same tokens, all fresh and back to back: a full prefill."""
        return Plan((Span(0, self.tokens),), exact=True)


Piece: TypeAlias = Segment | Tokens


def schedule(pieces: Sequence[Piece], *, packed: bool, ends: bool = True, refresh: Refresh | None = None) -> Plan:
    """Give every piece its position.

    A slice stands at home, or behind what stands before it where that reaches further (text that a prompt brings, or
    modules in another order). ``packed`` lets everything stand back to back. Fresh tokens always stand right behind
    what is before them: llama.cpp evaluates no tokens behind a gap, and this way none has to be moved. The last token
    of all is fresh even when it belongs to a slice: the answer begins with its logits, which no slice holds. Not so
    when it is not the end (``ends=False``).

    ``refresh`` says which tokens of slices that have not seen what stands before them are evaluated afresh. Where there
    are any, everything stands back to back: these could not be evaluated behind a gap either.
    """
    # Tokens may be missing altogether: an empty argument, or what a template does not add.
    pieces = [piece for piece in pieces if isinstance(piece, Segment) or len(piece)]
    reused = [_reusable(piece, last=ends and index == len(pieces) - 1) for index, piece in enumerate(pieces)]
    renewed = _renewed(pieces, reused, refresh) if refresh else {}
    packed = packed or any(renewed.values())
    spans: list[Span] = []
    fresh: list[Tokens] = []
    cursor = 0

    def flush() -> None:
        nonlocal cursor
        tokens = joined(fresh)
        fresh.clear()
        if len(tokens):
            spans.append(Span(cursor, tokens))
            cursor += len(tokens)

    for piece, most in zip(pieces, reused, strict=True):
        if not isinstance(piece, Segment):
            fresh.append(piece)
            continue
        runs = renewed.get(piece, ())
        size = 0 if runs == ((0, most),) else most
        if size:
            flush()
            start = cursor if packed else max(piece.home, cursor)
            spans.append(Span(start, piece.tokens[:size], piece, runs))
            cursor = start + size
        fresh.append(piece.tokens[size:])
    flush()
    return Plan(tuple(spans))


def _reusable(piece: Piece, *, last: bool) -> int:
    """How many tokens of a piece may come from a slice."""
    return len(piece.tokens) - last if isinstance(piece, Segment) and piece.cache else 0


def _renewed(pieces: Sequence[Piece], sizes: Sequence[int], refresh: Refresh) -> dict[Segment, Runs]:
    """What of the slices is evaluated afresh."""
    reused = [
        Reused(piece, size, exact=_sees_all(piece, pieces[:index]))
        for index, (piece, size) in enumerate(zip(pieces, sizes, strict=True))
        if isinstance(piece, Segment) and size > 0
    ]
    runs = refresh.runs(reused, [piece for piece in pieces if not isinstance(piece, Segment)])
    return {each.segment: chosen for each, chosen in zip(reused, runs, strict=True)}


def _sees_all(segment: Segment, before: Sequence[Piece]) -> bool:
    """Whether a segment was evaluated in the sight of exactly what stands before it, without any gaps."""
    seen = segment.sees
    between = [piece.tokens if isinstance(piece, Segment) else piece for piece in before[len(seen) :]]
    return (
        not any(len(each.lead) for each in seen)
        and len(seen) <= len(before)
        and all(map(operator.is_, seen, before))
        and segment.context_end == sum(len(each.tokens) for each in seen)
        and np.array_equal(segment.lead, joined(between))
    )
