"""The splicer: builds the sequence of a plan in the context from slices and fresh tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, TypeAlias

import numpy as np

from cpucache.layout import Tokens
from cpucache.reuse.progress import Step
from cpucache.reuse.slices import Plan, Slice, Span, Trail
from cpucache.runtime import Context, Run
from cpucache.runtime.context import SEQUENCES, Bytes, Logits
from cpucache.runtime.rotation import Rotation, learn

TARGET = 0
"""The sequence that the model answers from."""
SCRATCH = 1
"""Where a single slice is loaded or saved."""
FREE = range(2, SEQUENCES)
"""For parking, and for encoding several slices side by side."""

State: TypeAlias = Callable[[Slice], Bytes]


class Refused(Exception):
    """llama.cpp does not take this slice's state: it is not what it should be."""

    def __init__(self, slice_: Slice) -> None:
        self.slice = slice_
        super().__init__(f"a slice of '{slice_.module or 'the schema'}' can't be loaded")


@dataclass
class Spliced:
    """What building a sequence took. Times in milliseconds."""

    loaded: int = 0
    """Tokens whose state was loaded."""
    kept: int = 0
    """Tokens that the context held already."""
    evaluated: int = 0
    splice_ms: float = 0.0
    prefill_ms: float = 0.0


class Splicer:
    """Owner of the ``TARGET`` sequence of a context.

    It knows what the target holds, so that the next plan only pays for where it differs (``kept``). Every other
    sequence is empty between calls. After an error or Ctrl-C the target is empty.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._held: list[Span] = []
        self.changes = 0
        """How often the target has been changed."""
        self._learnt = False
        self._rotation: Rotation | None = None

    def reset(self) -> None:
        """Empty the context."""
        self.changes += 1
        self._held = []
        self.context.clear()

    @property
    def end(self) -> int:
        """The position behind the last token of the target."""
        return self._held[-1].end if self._held else 0

    def prepare(self) -> None:
        """Learn from what the target holds how states are moved, so that the first prompt need not."""
        self._learn(self.context.save(TARGET))

    def splice(self, plan: Plan, state: State, progress: Step | None = None) -> Spliced:
        """Make the target hold ``plan``. ``state`` gives the saved state of a slice.

        Logits of the last token are there afterwards if the plan ends with fresh tokens. ``progress`` is told about
        tokens evaluated. Raises ``Refused``, ``ContextFull`` or ``KeyboardInterrupt``, with the target empty.
        """
        report = Spliced()
        started = time.perf_counter()
        self.changes += 1
        try:
            spans = self._keep(plan, report)
            report.splice_ms += _since(started)
            for group in _grouped(spans):
                self._join(group, state, report, progress)
            self._held = list(plan.spans)
        except BaseException:
            self.reset()
            raise
        return report

    def append(
        self, tokens: Tokens, progress: Step | None = None, *, logits: Literal["last", "all"] = "last"
    ) -> Logits | None:
        """Evaluate tokens behind the target's last, keeping the logits of the last of them, or giving all."""
        self.changes += 1
        try:
            start = self.end
            rows = self.context.decode([Run(TARGET, start, tokens)], logits=logits, progress=progress)
            if self._held and self._held[-1].slice is None:
                last = self._held.pop()
                start, tokens = last.start, np.concatenate([last.tokens, tokens])
            self._held.append(Span(start, tokens))
        except BaseException:
            self.reset()
            raise
        return rows

    def capture(self, slice_: Slice) -> Bytes | None:
        """The state of a slice whose tokens the target has evaluated: they count as the slice from then on.

        ``None`` when the target holds something else there, or before, or when the model's state has gone on since (a
        recurrent state is never that of earlier tokens).
        """
        if slice_.delta or not self._recognise(slice_):
            return None
        if self.context.model.recurrent:
            return self.context.save(TARGET) if slice_.end == self.end else None
        self.context.share(TARGET, SCRATCH, slice_.start, slice_.end)
        state = self.context.save(SCRATCH)
        self.context.remove(SCRATCH)
        return state

    def _recognise(self, slice_: Slice) -> bool:
        """Whether the target has evaluated the tokens of a slice behind its context."""
        index = next((i for i, held in enumerate(self._held) if held.start <= slice_.start < held.end), None)
        if index is None:
            return False
        trail, held = Trail(self._held[:index]), self._held[index]
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
        self._held[index : index + 1] = [part for part in parts if len(part.tokens)]
        return True

    def shared(self, plan: Plan) -> int:
        """Number of leading spans of ``plan`` that the target holds and can extend."""
        pairs = zip(self._held, plan.spans, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0].same(pair[1]), pairs))

    def _keep(self, plan: Plan, report: Spliced) -> list[Span]:
        """Cut the target back to what it shares with ``plan``; gives the spans that are still to come."""
        self._close_up(plan)
        shared = self.shared(plan)
        rest = list(plan.spans[shared:])
        end = plan.spans[shared - 1].end if shared else 0
        if rest and shared < len(self._held):
            common = _common(self._held[shared], rest[0])
            # The last token of all is evaluated in any case, for its logits.
            common = min(common, len(rest[0].tokens) - (len(rest) == 1))
            if common:
                rest[0] = Span(rest[0].start + common, rest[0].tokens[common:])
                end = rest[0].start
        elif not rest and plan.spans and plan.spans[-1].slice is None:
            last = plan.spans[-1]
            rest = [Span(last.end - 1, last.tokens[-1:])]
            end = last.end - 1
        if not self._cut(end):
            return list(plan.spans)
        report.kept = plan.n_tokens - sum(len(span.tokens) for span in rest)
        return rest

    def _close_up(self, plan: Plan) -> None:
        """Where ``plan`` leaves out what stands in the middle of the target, move the rest down in place.

        So a truncated conversation costs one rotation of keys: nothing is evaluated, and nothing loaded.
        """
        begin = self.shared(plan)
        if begin >= min(len(self._held), len(plan.spans)) or not self.context.can_shift or self.context.model.window:
            return
        gap, first = self._held[begin].start, plan.spans[begin]
        for index in range(begin + 1, len(self._held)):
            held = self._held[index]
            if held.slice is None or held.slice != first.slice:
                continue
            delta = first.start - held.start
            if delta < 0 and first.start >= gap:
                # A slice is what it is wherever it stands. Fresh tokens have seen what is leaving.
                staying = list(takewhile(lambda span: span.slice, self._held[index:]))
                if not staying:
                    return
                self.context.remove(TARGET, staying[-1].end)
                self.context.remove(TARGET, gap, held.start)
                self.context.shift(TARGET, delta, held.start)
                self._held[begin:] = [span.moved(delta) for span in staying]
            return

    def _cut(self, end: int) -> bool:
        """Drop the target's cells from position ``end`` on. False: everything had to go."""
        # Emptied even where it should be empty: Ctrl-C may have come within ``reset``.
        if end and end == self.end:
            return True
        # A sliding window's cells before ``end`` may be gone already, overwritten or never saved.
        if end == 0 or self.context.model.window or not self.context.remove(TARGET, end):
            self.reset()
            return False
        return True

    def _join(
        self,
        parts: Sequence[_Part],
        state: State,
        report: Spliced,
        progress: Step | None,
    ) -> None:
        """Load all slices of some parts, then join them to the target in turn, evaluating what is fresh between.

        Loaded before anything is evaluated, those that llama.cpp has to move all cost a single rotation of keys (it
        rotates every cell of the context, however few have moved).
        """
        started = time.perf_counter()
        for park, part in zip((TARGET, *FREE), parts, strict=False):
            # A recurrent state is that of all tokens up to its last.
            for span in part.slices[-1:] if self.context.model.recurrent else part.slices:
                self._load(span, park, state)
            report.loaded += sum(len(span.tokens) for span in part.slices)
        report.splice_ms += _since(started)
        for park, part in zip((TARGET, *FREE), parts, strict=False):
            if park != TARGET and part.slices:
                self.context.share(park, TARGET)
                self.context.remove(park)
            if part.fresh:
                started = time.perf_counter()
                run = Run(TARGET, part.fresh.start, part.fresh.tokens)
                self.context.decode([run], logits="last", progress=progress)
                report.evaluated += len(run.tokens)
                report.prefill_ms += _since(started)

    def _load(self, span: Span, sequence: int, state: State) -> None:
        assert span.slice is not None
        saved, start = state(span.slice), span.slice.start
        moved = self._moved(saved, span.delta) if span.delta else None
        if moved is not None:
            saved, start = moved, span.start
        # llama.cpp compares the shapes in the state's header with the model's, but takes whatever positions it finds.
        loaded = self.context.load(SCRATCH, saved)
        if not loaded or self.context.last_position(SCRATCH) != start + len(span.slice.tokens) - 1:
            raise Refused(span.slice)
        if not span.whole:
            self.context.remove(SCRATCH, start + len(span.tokens))
        if start != span.start:
            self.context.shift(SCRATCH, span.delta)
        self.context.share(SCRATCH, sequence)
        self.context.remove(SCRATCH)

    def _moved(self, state: Bytes, delta: int) -> Bytes | None:
        self._learn(state)
        return self._rotation.moved(state, delta) if self._rotation else None

    def _learn(self, state: Bytes) -> None:
        if not self._learnt:
            self._learnt = True
            self._rotation = learn(self.context, state)


@dataclass(frozen=True)
class _Part:
    """Slices that stand next to one another, and the fresh tokens behind them."""

    slices: tuple[Span, ...]
    fresh: Span | None


def _grouped(spans: Sequence[Span]) -> list[list[_Part]]:
    """The parts of a plan, in groups that can be parked in the free sequences at once."""
    parts: list[_Part] = []
    slices: list[Span] = []
    for span in spans:
        if span.slice:
            slices.append(span)
            continue
        last = parts[-1].fresh if parts and not slices else None
        if last and last.end == span.start:
            # One evaluation is faster than two.
            parts[-1] = _Part(parts[-1].slices, Span(last.start, np.concatenate([last.tokens, span.tokens])))
        else:
            parts.append(_Part(tuple(slices), span))
            slices = []
    if slices:
        parts.append(_Part(tuple(slices), None))
    size = 1 + len(FREE)
    return [parts[begin : begin + size] for begin in range(0, len(parts), size)]


def _common(one: Span, other: Span) -> int:
    """Leading tokens that two fresh spans at the same position have in common."""
    if one.slice or other.slice or one.start != other.start:
        return 0
    count = min(len(one.tokens), len(other.tokens))
    differing = np.flatnonzero(one.tokens[:count] != other.tokens[:count])
    return int(differing[0]) if len(differing) else count


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
