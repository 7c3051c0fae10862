"""Slots: what a sequence of the llama.cpp context holds, and how much of a plan that is."""

from __future__ import annotations

from collections.abc import Callable
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import common, joined
from cpucache.reuse.slices import Plan, Slice, Span, Trail


class Points(NamedTuple):
    """The recurrent states that there are, by the slices that they stand behind."""

    of: Callable[[Slice], Slice]
    """The recurrent state behind a slice, as a slice of no tokens."""
    there: Callable[[Slice], bool]
    """Whether there is one behind a slice."""


class Slot:
    """A sequence of the llama.cpp context that an answer is given in, and the spans that the sequence holds."""

    def __init__(self, sequence: int) -> None:
        self.sequence = sequence
        self.held: list[Span] = []
        self.busy = False
        """Whether a task uses it."""
        self.points: Points | None = None
        """The recurrent states that there are for it."""
        self.owner = ""
        """Whose text it holds: what others hold is not reused."""
        self.index = -1
        """Index in the last batch of the logits of its last token."""

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.held[-1].end if self.held else 0

    def shared(self, plan: Plan) -> int:
        """Number of leading spans of ``plan`` that the slot holds and can extend."""
        pairs = zip(self.held, plan.spans, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0].same(pair[1]), pairs))

    def stays(self, plan: Plan) -> int:
        """Number of leading spans of ``plan`` that the slot holds and that can be gone on from.

        Where there are points, that is all that it holds, or it is to be taken back to a slice with a point behind it.
        """
        shared = self.shared(plan)
        if self.points is None:
            return shared
        # The last token is evaluated in any case, for its logits.
        evaluates = shared < len(plan.spans) or not plan.spans or plan.spans[-1].slice is not None
        if shared == len(self.held) and evaluates:
            return shared
        there = (each.slice is not None and self.points.there(each.slice) for each in plan.spans[:shared][::-1])
        return next((shared - index for index, found in enumerate(there) if found), 0)

    def known(self, plan: Plan) -> int:
        """Leading tokens of ``plan`` without a slice that the slot holds; never the last of all, evaluated anyway."""
        shared = self.shared(plan)
        count = sum(len(span.tokens) for span in plan.spans[:shared] if span.slice is None)
        if shared < min(len(plan.spans), len(self.held)):
            count += self.evaluated(shared, plan.spans[shared])
        return min(count, max(0, plan.n_tokens - plan.n_cached - 1))

    def evaluated(self, index: int, fresh: Span) -> int:
        """Number of leading tokens of a fresh span that the slot's spans from ``index`` on hold at its position.

        A slice counts where it is what its tokens would be, evaluated there.
        """
        if fresh.slice:
            return 0
        trail, end = Trail(self.held[:index]), fresh.start
        parts: list[Tokens] = []
        for span in self.held[index:]:
            if span.start != end or not trail.in_place(span):
                break
            parts.append(span.tokens)
            trail.add(span)
            end = span.end
        return common(joined(parts), fresh.tokens)

    def resumable(self, plan: Plan) -> Plan:
        """The plan of a recurrent model, with tokens to evaluate in the place of slices that one can't go on from.

        Slices can be loaded up to one with a recurrent state behind it.
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
        """Whether the slot has evaluated the tokens of a slice behind its context: they count as the slice then."""
        index = next((i for i, held in enumerate(self.held) if held.start <= slice_.start < held.end), None)
        if index is None:
            return False
        trail, held = Trail(self.held[:index]), self.held[index]
        begin = slice_.start - held.start
        if begin and held.slice is None:
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
        """Note tokens that were evaluated behind its last."""
        start = self.end
        if self.held and self.held[-1].slice is None:
            last = self.held.pop()
            start, tokens = last.start, np.concatenate([last.tokens, tokens])
        self.held.append(Span(start, tokens))
