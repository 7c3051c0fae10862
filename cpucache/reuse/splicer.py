"""The splicer: builds the sequence of a plan in the context from slices and fresh tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Literal, TypeAlias

import numpy as np

from cpucache.layout import Plan, Segment, Span
from cpucache.reuse.progress import Step
from cpucache.runtime import Context, Run
from cpucache.runtime.context import SEQUENCES, Bytes, Logits
from cpucache.runtime.model import Tokens

TARGET = 0
"""The sequence that the model answers from."""
SCRATCH = 1
"""Where a single slice is loaded or saved."""
FREE = range(2, SEQUENCES)
"""For parking and for encoding several segments at once."""

State: TypeAlias = Callable[[Segment], Bytes]


class Refused(Exception):
    """llama.cpp does not take this slice's state: it is not what it should be."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        super().__init__(f"a slice of '{segment.module or 'the schema'}' can't be loaded")


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

    def reset(self) -> None:
        """Empty the context."""
        self._held = []
        self.context.clear()

    @property
    def end(self) -> int:
        """The position behind the last token of the target."""
        return self._held[-1].end if self._held else 0

    def splice(self, plan: Plan, state: State, progress: Step | None = None) -> Spliced:
        """Make the target hold ``plan``. ``state`` gives the saved state of a segment.

        Logits of the last token are there afterwards if the plan ends with fresh tokens. ``progress`` is told about
        tokens evaluated. Raises ``Refused``, ``ContextFull`` or ``KeyboardInterrupt``, with the target empty.
        """
        report = Spliced()
        started = time.perf_counter()
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
        try:
            start = self.end
            rows = self.context.decode([Run(TARGET, start, tokens)], logits=logits, progress=progress)
            if self._held and self._held[-1].segment is None:
                last = self._held.pop()
                start, tokens = last.start, np.concatenate([last.tokens, tokens])
            self._held.append(Span(start, tokens))
        except BaseException:
            self.reset()
            raise
        return rows

    def capture(self, segment: Segment) -> Bytes | None:
        """The state of a segment that the target holds as fresh tokens: they count as its slice from then on.

        ``None`` when it does not: other tokens stand there, or something else than the segment's context before them,
        or the model's state has gone on since (a recurrent one is never that of earlier tokens).
        """
        if not self._recognise((*segment.context, segment.span)):
            return None
        if self.context.model.recurrent:
            return self.context.save(TARGET) if segment.end == self.end else None
        self.context.share(TARGET, SCRATCH, segment.home, segment.end)
        state = self.context.save(SCRATCH)
        self.context.remove(SCRATCH)
        return state

    def _recognise(self, spans: Sequence[Span]) -> bool:
        """Whether the target begins with ``spans``; fresh tokens evaluated behind a slice's context count as its."""
        left = list(self._held)
        for index, span in enumerate(spans):
            if not left:
                return False
            held = left.pop(0)
            if not _same(held, span):
                if not _evaluated(held, span, spans[:index]):
                    return False
                if held.end > span.end:
                    left.insert(0, Span(span.end, held.tokens[len(span.tokens) :]))
        self._held = [*spans, *left]
        return True

    def shared(self, plan: Plan) -> int:
        """How many spans at the head of ``plan`` the target holds as they can be gone on from."""
        spans = plan.spans
        count = sum(1 for _ in takewhile(lambda pair: _same(*pair), zip(self._held, spans, strict=False)))
        # What is renewed sees the slices before it as they are saved, which renewed ones among them no longer are.
        begin = next((index for index in range(count, 0, -1) if not spans[index - 1].segment), 0)
        behind = takewhile(lambda span: span.segment, spans[count:])
        if any(span.renewed for span in spans[begin:count]) and any(span.renewed for span in behind):
            return begin
        return count

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
        elif not rest and plan.spans and plan.spans[-1].segment is None:
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
            if held.segment is None or held.segment is not first.segment:
                continue
            delta = first.start - held.start
            if delta < 0 and first.start >= gap:
                # A slice is what it is wherever it stands. Fresh tokens have seen what is leaving.
                staying = list(takewhile(lambda span: span.segment and not span.renewed, self._held[index:]))
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
        stretches: Sequence[Stretch],
        state: State,
        report: Spliced,
        progress: Step | None,
    ) -> None:
        """Load all slices of some stretches, then join them to the target in turn, evaluating what is fresh between.

        Loaded before anything is evaluated, the moved ones among them all cost a single rotation of keys (llama.cpp
        rotates every cell of the context, however few have moved).
        """
        started = time.perf_counter()
        for park, stretch in zip((TARGET, *FREE), stretches, strict=False):
            # A recurrent state is that of all tokens up to its last.
            for span in stretch.slices[-1:] if self.context.model.recurrent else stretch.slices:
                self._load(span, park, state)
            report.loaded += sum(len(span.tokens) for span in stretch.slices)
        report.splice_ms += _since(started)
        for park, stretch in zip((TARGET, *FREE), stretches, strict=False):
            if park != TARGET and stretch.slices:
                self.context.share(park, TARGET)
                self.context.remove(park)
            self._renew(stretch.slices, FREE[len(stretches) :], report, progress)
            if stretch.fresh:
                started = time.perf_counter()
                run = Run(TARGET, stretch.fresh.start, stretch.fresh.tokens)
                self.context.decode([run], logits="last", progress=progress)
                report.evaluated += len(run.tokens)
                report.prefill_ms += _since(started)

    def _renew(self, slices: Sequence[Span], spare: Sequence[int], report: Spliced, progress: Step | None) -> None:
        """Evaluate afresh what is to be renewed of slices that lie in the target, all of it side by side.

        Each run of tokens sees everything before it as it is saved, other runs included: so that one evaluation serves
        all, which costs little more than a single token does.
        """
        runs = [Run(0, span.start + begin, span.tokens[begin:end]) for span in slices for begin, end in span.renewed]
        if not runs:
            return
        started = time.perf_counter()
        *places, done = spare
        for batch in (runs[first : first + len(places)] for first in range(0, len(runs), len(places))):
            placed = [replace(run, sequence=sequence) for run, sequence in zip(batch, places, strict=False)]
            for run in placed:
                self.context.share(TARGET, run.sequence, 0, run.start)
            self.context.decode(placed, progress=progress)
            for run in placed:
                self.context.share(run.sequence, done, run.start, run.start + len(run.tokens))
                self.context.remove(run.sequence)
                report.evaluated += len(run.tokens)
                report.loaded -= len(run.tokens)
        for run in runs:
            self.context.remove(TARGET, run.start, run.start + len(run.tokens))
        self.context.share(done, TARGET)
        self.context.remove(done)
        report.prefill_ms += _since(started)

    def _load(self, span: Span, sequence: int, state: State) -> None:
        assert span.segment is not None
        # llama.cpp compares the shapes in the state's header with the model's, but takes whatever positions it finds.
        loaded = self.context.load(SCRATCH, state(span.segment))
        if not loaded or self.context.last_position(SCRATCH) != span.segment.end - 1:
            raise Refused(span.segment)
        if not span.whole:
            self.context.remove(SCRATCH, span.segment.home + len(span.tokens))
        if span.delta:
            self.context.shift(SCRATCH, span.delta)
        self.context.share(SCRATCH, sequence)
        self.context.remove(SCRATCH)


@dataclass(frozen=True)
class Stretch:
    """Slices that stand next to one another, and the fresh tokens behind them."""

    slices: tuple[Span, ...]
    fresh: Span | None


def _grouped(spans: Sequence[Span]) -> list[list[Stretch]]:
    """The stretches of a plan, in groups that can be parked in the free sequences at once."""
    stretches: list[Stretch] = []
    slices: list[Span] = []
    for span in spans:
        if span.segment:
            slices.append(span)
        else:
            stretches.append(Stretch(tuple(slices), span))
            slices = []
    if slices:
        stretches.append(Stretch(tuple(slices), None))
    # Half of the free sequences stay free, for what is renewed.
    size = len(FREE) // 2
    return [stretches[begin : begin + size] for begin in range(0, len(stretches), size)]


def _same(one: Span, other: Span) -> bool:
    return (
        one.segment is other.segment
        and one.start == other.start
        and one.renewed == other.renewed
        and len(one.tokens) == len(other.tokens)
        and (one.segment is not None or bool(np.array_equal(one.tokens, other.tokens)))
    )


def _evaluated(held: Span, span: Span, before: Sequence[Span]) -> bool:
    """Whether fresh tokens, evaluated behind ``before``, begin with a slice as it is evaluated."""
    return (
        held.segment is None
        and span.segment is not None
        and span.whole
        and not len(span.segment.lead)
        and held.start == span.start == span.segment.home
        and np.array_equal(held.tokens[: len(span.tokens)], span.tokens)
        and len(span.segment.context) == len(before)
        and all(map(_same, before, span.segment.context))
    )


def _common(one: Span, other: Span) -> int:
    """Leading tokens that two fresh spans at the same position have in common."""
    if one.segment or other.segment or one.start != other.start:
        return 0
    count = min(len(one.tokens), len(other.tokens))
    differing = np.flatnonzero(one.tokens[:count] != other.tokens[:count])
    return int(differing[0]) if len(differing) else count


def _since(started: float) -> float:
    return (time.perf_counter() - started) * 1000
