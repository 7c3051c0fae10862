"""Places: where pieces of a schema's text are written, and where segments stand in the sight of others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias

from cpucache.layout.segment import Segment, Span
from cpucache.pml.tree import Module, Schema, SchemaNode, Scope, Union

Edge: TypeAlias = Literal["", "end"]
Place: TypeAlias = tuple[SchemaNode | Schema, Edge]
"""Where a piece of text is written: a ``Text``, the start or (``"end"``) end of a ``Role``, the start of a schema."""

Outline: TypeAlias = dict[Scope, list[Segment | Module | Union]]
"""What each scope consists of, in reading order."""


class Contexts:
    """Places segments in the sight of others: at home, or (``packed``) back to back from position 0."""

    def __init__(self, *, packed: bool) -> None:
        self._packed = packed
        # Spans are compared by identity, so that what shares a context is found to.
        self._moved: dict[tuple[Segment, int], Span] = {}

    def of(self, seen: Iterable[Segment]) -> tuple[Span, ...]:
        """The context that these make, in the order of their positions."""
        if not self._packed:
            return tuple(segment.span for segment in seen)
        spans: list[Span] = []
        end = 0
        for segment in seen:
            span = segment.span
            if segment.home != end:
                span = self._moved.setdefault((segment, end), span.moved(end - segment.home))
            spans.append(span)
            end = span.end
        return tuple(spans)
