"""How a conversation that begins with a PML prompt keeps it: by its tokens, whatever becomes of the schema's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from cpucache.layout import Plan, Segment, Span, Turns


class Opening(NamedTuple):
    """A PML prompt for a conversation to begin with."""

    plan: Plan
    turns: Turns
    asks: bool
    """It ends with a message of the user's."""
    text: str
    """What to call it."""


def dump_spans(spans: Sequence[Span]) -> dict[str, Any]:
    """Spans of slices as JSON: their segments with all that these can see, contexts first."""
    numbers: dict[Segment, int] = {}
    segments: list[dict[str, Any]] = []

    def placed(span: Span) -> list[Any]:
        assert span.segment is not None
        return [number(span.segment), span.start, len(span.tokens), [list(run) for run in span.renewed]]

    def number(segment: Segment) -> int:
        if segment not in numbers:
            context = [placed(span) for span in segment.context]
            numbers[segment] = len(segments)
            segments.append(
                {
                    "tokens": segment.tokens.tolist(),
                    "home": segment.home,
                    "context": context,
                    "module": segment.module,
                }
            )
        return numbers[segment]

    return {"spans": [placed(span) for span in spans], "segments": segments}


def load_spans(pieces: dict[str, Any]) -> list[Span]:
    """The spans that ``dump_spans`` was given."""
    segments: list[Segment] = []

    def placed(number: int, start: int, count: int, renewed: Sequence[Sequence[int]]) -> Span:
        segment = segments[number]
        span = Span(start, segment.tokens[:count], segment, tuple((begin, end) for begin, end in renewed))
        return segment.span if span.whole and not span.delta and not span.renewed else span

    for each in pieces["segments"]:
        context = tuple(placed(*place) for place in each["context"])
        segments.append(Segment(np.array(each["tokens"], np.int32), each["home"], context, each["module"]))
    return [placed(*place) for place in pieces["spans"]]
