"""Slots: sequences of the llama.cpp context, the spans that they hold, and how much of a plan these cover."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import common, joined
from cpucache.reuse.plan import Plan, Slice, Span
from cpucache.reuse.slices import GrowingTrail


class Points(NamedTuple):
    """Saved recurrent states. Each is called a point, and is found by the slice that it follows."""

    of: Callable[[Slice], Slice]
    """Returns the point after a slice, as a slice of no tokens."""
    there: Callable[[Slice], bool]
    """Returns whether the point after a slice is saved."""


class Slot:
    """A sequence of the llama.cpp context that answers a request, and the spans that the sequence holds."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.held: list[Span] = []
        self.busy = False
        """Whether a task uses the slot."""
        self.points: Points | None = None
        """Saved recurrent states; ``None`` for a model without recurrent state."""
        self.owner = ""
        """Owner of the text that the slot holds. Text in slots of other owners is not reused."""
        self.index = -1
        """Index, in the last batch, of the logits of the slot's last token."""
        self._trail = GrowingTrail()

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.held[-1].end if self.held else 0

    def holds(self, span: Span) -> bool:
        """Whether the slot holds a span with the same state at the same positions."""
        index = self._index(span.start)
        return index is not None and self.held[index].same(span)

    def _index(self, position: int) -> int | None:
        """Index of the held span at a position, if there is one."""
        index = bisect_right(self.held, position, key=lambda span: span.start) - 1
        return index if index >= 0 and position < self.held[index].end else None

    def shared(self, plan: Plan) -> int:
        """Length, in spans, of the longest prefix of ``plan`` that the slot already holds."""
        pairs = zip(self.held, plan.spans, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0].same(pair[1]), pairs))

    def stays(self, plan: Plan) -> int:
        """Length, in spans, of the longest prefix of ``plan`` that the slot already holds and can extend.

        A recurrent state can't be rewound: the prefix is all that the slot holds, or it ends with a slice whose point
        is saved.
        """
        shared = self.shared(plan)
        if self.points is None:
            return shared
        # The last token is always evaluated, for its logits.
        evaluates = shared < len(plan.spans) or not plan.spans or plan.spans[-1].slice is not None
        if shared == len(self.held) and evaluates:
            return shared
        there = (each.slice is not None and self.points.there(each.slice) for each in plan.spans[:shared][::-1])
        return next((shared - index for index, found in enumerate(there) if found), 0)

    def known(self, plan: Plan, *, ends: bool = True) -> int:
        """Number of tokens of ``plan`` without a slice that the slot already holds, counted from the plan's start.

        If the prompt ``ends`` with this plan, its last token does not count: it is always evaluated, for its logits.
        """
        shared = self.shared(plan)
        count = sum(len(span.tokens) for span in plan.spans[:shared] if span.slice is None)
        if shared < min(len(plan.spans), len(self.held)):
            count += self.evaluated(shared, plan.spans[shared])
        return min(count, max(0, plan.n_tokens - plan.n_cached - ends))

    def evaluated(self, index: int, fresh: Span) -> int:
        """Number of leading tokens of a span to evaluate that the slot already holds at the same positions.

        Held slices count if their state equals that of their tokens evaluated there (``Trail.in_place``).

        Args:
            index: Index in ``held`` of the first span to compare.
            fresh: The span to evaluate.

        Returns:
            Number of tokens; 0 if ``fresh`` is a slice.
        """
        if fresh.slice:
            return 0
        trail, end = self._trail.of(self.held[:index]).copy(), fresh.start
        parts: list[Tokens] = []
        for span in self.held[index:]:
            if span.start != end or not trail.in_place(span):
                break
            parts.append(span.tokens)
            trail.add(span)
            end = span.end
        return common(joined(parts), fresh.tokens)

    def resumable(self, plan: Plan) -> Plan:
        """Plan of a recurrent model, with tokens to evaluate instead of the slices that can't be loaded.

        Of consecutive slices, those up to the last one with a saved point can be loaded.
        """
        assert self.points is not None
        done = self.stays(plan)
        spans: list[Span] = list(plan.spans[:done])
        run: list[Span] = []
        for span in [*plan.spans[done:], None]:
            if span is not None and span.slice:
                run.append(span)
                continue
            there = [index for index, each in enumerate(run) if each.slice and self.points.there(each.slice)]
            count = there[-1] + 1 if there else 0
            spans += run[:count]
            if run[count:]:
                spans.append(Span(run[count].start, joined([each.tokens for each in run[count:]])))
            spans += [] if span is None else [span]
            run = []
        return Plan(tuple(spans))

    def recognise(self, slice_: Slice) -> bool:
        """Replaces held tokens by ``slice_``, if the slot has evaluated the slice's tokens in the slice's context.

        Returns whether the slot holds the slice.
        """
        index = self._index(slice_.start)
        if index is None:
            return False
        trail, held = self._trail.of(self.held[:index]), self.held[index]
        begin = slice_.start - held.start
        if begin and held.slice is None:
            trail = trail.copy()
            trail.add(Span(held.start, held.tokens[:begin]))
        if trail.key != slice_.context_key:
            return False
        if held.slice is not None:
            return held.same(slice_.span)
        end = begin + len(slice_.tokens)
        if not np.array_equal(held.tokens[begin:end], slice_.tokens):
            return False
        parts = Span(held.start, held.tokens[:begin]), slice_.span, Span(slice_.end, held.tokens[end:])
        self.held[index : index + 1] = [part for part in parts if len(part.tokens)]
        return True

    def add(self, tokens: Tokens) -> None:
        """Records tokens that were evaluated after the slot's last token."""
        start = self.end
        if self.held and self.held[-1].slice is None:
            last = self.held.pop()
            start, tokens = last.start, np.concatenate([last.tokens, tokens])
        self.held.append(Span(start, tokens))
