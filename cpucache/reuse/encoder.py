"""The encoder: evaluates segments in the sight of their context, moves them home, and saves them as slices."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from cpucache.layout import Plan, Segment, Span
from cpucache.reuse.progress import Step
from cpucache.reuse.splicer import FREE, SCRATCH, TARGET, Splicer, State
from cpucache.runtime import Run
from cpucache.runtime.context import Bytes
from cpucache.runtime.model import Tokens

# Tokens evaluated before their slices are saved and their cells freed. Segments that are evaluated side by side are
# only masked from one another, not skipped, so larger waves cost more than the rotation of keys that they save.
_WAVE = 2048
# Tokens of short segments that are evaluated in one go.
_BATCH = 256


@dataclass(frozen=True)
class Stretch:
    """Segments that are evaluated in one go, each behind the one before: it sees that one, or is led by it."""

    segments: tuple[Segment, ...]

    @property
    def tokens(self) -> Tokens:
        """What is evaluated: the lead of the first, and all of theirs."""
        return np.concatenate([self.first.lead, *(segment.tokens for segment in self.segments)])

    @property
    def first(self) -> Segment:
        """The one that the others follow."""
        return self.segments[0]

    @property
    def scattered(self) -> tuple[Segment, ...]:
        """Those that go home another way than the first does: they lead one another, and stand elsewhere."""
        return tuple(segment for segment in self.segments if segment.delta != self.first.delta)

    def parts(self, room: int) -> Iterator[Stretch]:
        """It, or where it is too long for so many cells or for the sequences there are, one part after the other: what
        is led may be parted anywhere."""
        part: list[Segment] = []
        cells = scattered = 0
        for segment in self.segments:
            apart = bool(part) and segment.delta != part[0].delta
            full = cells + len(segment.tokens) > room or 1 + scattered + apart > len(FREE)
            if part and len(segment.lead) and full:
                yield Stretch(tuple(part))
                part, cells, scattered, apart = [], 0, 0, False
            cells += len(segment.tokens) + (0 if part else len(segment.lead))
            scattered += apart
            part.append(segment)
        yield Stretch(tuple(part))


@dataclass(frozen=True)
class Made:
    """A segment with its state, and the seconds that evaluating it took: its share of the batch."""

    segment: Segment
    state: Bytes
    seconds: float


class Encoder:
    """Makes slices in the splicer's context."""

    def __init__(self, splicer: Splicer) -> None:
        self._splicer = splicer
        self._context = splicer.context

    def encode(self, segments: Iterable[Segment], state: State, progress: Step | None = None) -> Iterator[Made]:
        """Evaluate segments, yielding each with its state as soon as there is one.

        Contexts come first: a segment's context must be among ``segments``, or known to ``state``. Several stretches
        with the same context share a batch (15 to 35% faster for short modules), and all that were moved share one
        rotation of keys. ``progress`` is told about tokens evaluated.
        """
        scattered = False
        for context, stretches in _by_context(segments):
            sight = Plan(context)
            if len(stretches) == 1 and not (stretches[0].first.delta or len(stretches[0].segments[-1].lead)):
                yield from self._extend(sight, stretches[0].segments, state, progress)
                continue
            scattered = True
            for wave in self._waves(sight, stretches):
                self._splicer.splice(sight, state)
                try:
                    yield from self._evaluate(wave, progress)
                except BaseException:
                    self._splicer.reset()
                    raise
        if scattered:
            # What lies in one piece loads faster.
            self._splicer.reset()

    def _extend(self, sight: Plan, segments: Sequence[Segment], state: State, progress: Step | None) -> Iterator[Made]:
        """Evaluate segments that each follow the one before where their context lies already, and leave them there.

        What is finished is given away before more is evaluated, so that it is saved meanwhile, and Ctrl-C loses little.
        """
        spans = list(sight.spans)
        for batch in self._batches(segments):
            started = time.perf_counter()
            tokens = np.concatenate([segment.tokens for segment in batch])
            # The context may hold the first of these tokens already.
            self._splicer.splice(Plan((*spans, Span(batch[0].home, tokens))), state, progress)
            seconds = (time.perf_counter() - started) / len(tokens)
            for segment in batch:
                captured = self._splicer.capture(segment)
                assert captured is not None, "a segment just evaluated behind its context"
                yield Made(segment, captured, seconds * len(segment.tokens))
            spans += [segment.span for segment in batch]

    def _batches(self, segments: Sequence[Segment]) -> Iterator[list[Segment]]:
        batch: list[Segment] = []
        for segment in segments:
            batch.append(segment)
            # A recurrent state must be saved before it goes on.
            if self._context.model.recurrent or sum(len(segment.tokens) for segment in batch) >= _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch

    def _waves(self, sight: Plan, stretches: Sequence[Stretch]) -> Iterator[list[Stretch]]:
        # One cell stays free for the token that applies a shift.
        room = self._context.n_ctx - sight.n_tokens - 1
        wave: list[Stretch] = []
        cells = places = 0
        for stretch in chain.from_iterable(each.parts(room) for each in stretches):
            size, needed = len(stretch.tokens), 1 + len(stretch.scattered)
            if wave and (cells + size > min(room, _WAVE) or places + needed > len(FREE)):
                yield wave
                wave, cells, places = [], 0, 0
            wave.append(stretch)
            cells += size
            places += needed
        if wave:
            yield wave

    def _evaluate(self, wave: Sequence[Stretch], progress: Step | None) -> Iterator[Made]:
        context = self._context
        free = iter(FREE)
        placed = [(next(free), stretch) for stretch in wave]
        for sequence, _ in placed:
            context.share(TARGET, sequence)
        runs = [Run(sequence, stretch.first.context_end, stretch.tokens) for sequence, stretch in placed]
        started = time.perf_counter()
        context.decode(runs, progress=progress)
        seconds = (time.perf_counter() - started) / sum(len(run.tokens) for run in runs)
        apart: list[tuple[int, tuple[Segment, ...]]] = []
        for sequence, stretch in placed:
            for segment in stretch.scattered:
                own, end = next(free), segment.start + len(segment.tokens)
                context.share(sequence, own, segment.start, end)
                context.remove(sequence, segment.start, end)
                apart.append((own, (segment,)))
            if stretch.first.start:
                context.remove(sequence, 0, stretch.first.start)
            apart.append((sequence, tuple(each for each in stretch.segments if each.delta == stretch.first.delta)))
        for sequence, (first, *_) in apart:
            if first.delta:
                context.shift(sequence, first.delta)
        if any(first.delta for _, (first, *_) in apart):
            # Shifts are applied by the next evaluation, whatever it is of.
            context.decode([Run(SCRATCH, 0, np.array([context.model.filler], np.int32))])
            context.remove(SCRATCH)
        for sequence, segments in apart:
            for segment in segments:
                context.share(sequence, SCRATCH, segment.home, segment.end)
                state = context.save(SCRATCH)
                context.remove(SCRATCH)
                yield Made(segment, state, seconds * len(segment.tokens))
            context.remove(sequence)


def effort(segments: Iterable[Segment]) -> int:
    """How many tokens are evaluated to make slices of these: their own, and leads."""
    return sum(len(stretch.tokens) for _, stretches in _by_context(segments) for stretch in stretches)


def _by_context(segments: Iterable[Segment]) -> list[tuple[tuple[Span, ...], list[Stretch]]]:
    """Stretches of segments grouped by the context that they share; what needs others comes behind them, as before."""
    groups: dict[tuple[Span, ...], list[Stretch]] = {}
    run: list[Segment] = []

    def close() -> None:
        if run:
            groups.setdefault(run[0].context, []).append(Stretch(tuple(run)))
            run.clear()

    for segment in segments:
        if run and not _follows(run, segment):
            # What sees the one before it may lead others that don't.
            leading = [run.pop()] if len(run) > 1 and _follows(run[-1:], segment) else []
            close()
            run += leading
        run.append(segment)
    close()
    return list(groups.items())


def _follows(run: Sequence[Segment], segment: Segment) -> bool:
    """Whether a segment is evaluated behind these with nothing between, as it must be."""
    first, last = run[0], run[-1]
    if len(segment.lead):
        before = np.concatenate([first.lead, *(each.tokens for each in run)])
        return segment.context == last.context == first.context and np.array_equal(segment.lead, before)
    # A segment sees those before it at home, and not their lead: they must be evaluated there, and without any.
    return (
        not (len(first.lead) or len(last.lead) or first.delta)
        and segment.context == (*last.context, last.span)
        and segment.home == last.end
    )
