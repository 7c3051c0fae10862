"""The encoder: evaluates slices behind their contexts, moves them to their positions, and gives their states."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.reuse.progress import Step
from cpucache.reuse.reports import Made
from cpucache.reuse.slices import Plan, Slice, Slices, Span
from cpucache.reuse.slot import Slot
from cpucache.reuse.splicer import Splicer, State
from cpucache.reuse.work import Task, Work
from cpucache.runtime import Run

# Tokens evaluated side by side before their slices are saved and their cells freed. Runs of one batch are only masked
# from one another, not skipped, so larger batches cost more than the rotation of keys that they save.
_BATCH = 512
# Tokens evaluated in place before what is finished is given away.
_STEP = 256
# Tokens of a long message between two recurrent states that are saved.
_APART = 1024
_HEADER = 16  # tokens of what opens an answer
_SHORT = 64  # tokens behind a recurrent state that is saved, which are evaluated again rather than followed by another


OnMade: TypeAlias = Callable[[Made], None]
"""Told about each slice as soon as there is one."""


@dataclass(eq=False)
class _Run:
    """Slices that are evaluated one behind the other, with nothing but tokens to evaluate between them."""

    slices: list[Slice]

    @property
    def first(self) -> Slice:
        return self.slices[0]

    @property
    def tokens(self) -> Tokens:
        """What is evaluated behind the context of the first slice."""
        last = self.slices[-1]
        between = (last.context or ())[len(self.first.context or ()) :]
        return joined([*(span.tokens for span in between), last.tokens])

    def goes_on_with(self, slice_: Slice) -> bool:
        """Whether a slice is evaluated behind these."""
        last = self.slices[-1]
        at = len(last.context or ())
        context = slice_.context or ()
        if slice_.delta or last.delta or len(context) <= at or context[at].slice != last:
            return False
        # The last slice may have been put behind something else than its context.
        pairs = zip(context, (*(last.context or ()), last.span), strict=False)
        alike = all(one is other or one.same(other) for one, other in pairs)
        return alike and not any(span.slice for span in context[at + 1 :])


class Encoder:
    """Makes slices in the slots of a splicer.

    Args:
        splicer: Evaluates them.
        slices: Says where recurrent states are saved.
    """

    def __init__(self, splicer: Splicer, slices: Slices) -> None:
        self._splicer = splicer
        self._slices = slices
        self._context = splicer.context

    def encode(
        self, slot: Slot, slices: Iterable[Slice], state: State, made: OnMade, progress: Step | None = None
    ) -> Task[None]:
        """Evaluate slices in a slot, telling ``made`` about each as soon as there is one.

        Contexts come first: the slices of a context must be among ``slices``, or known to ``state``. Several short runs
        with the same context share a batch (15 to 35% faster), and all that are moved share one rotation of keys.
        ``progress`` is told about tokens evaluated.
        """
        scattered = False
        for runs in _by_context(slices):
            context = Plan(runs[0].first.context or ())
            # One cell stays free for the token that applies a shift.
            room = min(_BATCH, self._context.n_ctx - context.n_tokens - 1)
            short = [run for run in runs if len(run.tokens) <= room and self._context.memory.moves]
            beside = len(short) > 1 or any(run.first.delta for run in short)
            batches = list(_batches(short, room, len(self._splicer.free) - 1)) if beside else []
            placed = {run for batch in batches for run in batch}
            batches += [[run] for run in runs if run.first.delta and run not in placed]
            for batch in batches:
                scattered = True
                yield from self._splicer.build(slot, context, state)
                yield from self._side_by_side(slot, batch, made, progress)
            for run in runs:
                if run not in placed and not run.first.delta:
                    yield from self._in_place(slot, run, state, made, progress)
        if scattered:
            # What lies in one piece loads faster.
            self._splicer.reset(slot)

    def _in_place(self, slot: Slot, run: _Run, state: State, made: OnMade, progress: Step | None) -> Task[None]:
        """Evaluate slices where they stand, and leave them there.

        What is finished is given away before more is evaluated, so that it is saved meanwhile, and Ctrl-C loses little.
        """
        point: Made | None = None
        points = self._points(run.slices)
        try:
            for batch in self._steps(run.slices, points):
                started = time.perf_counter()
                tokens = _Run(batch).tokens
                # The slot may hold the first of these tokens already.
                plan = Plan((*(batch[0].context or ()), Span(batch[0].start, tokens)))
                yield from self._splicer.build(slot, plan, state, progress)
                seconds = (time.perf_counter() - started) / len(tokens)
                lost: list[Slice] = []
                for slice_ in batch:
                    captured = self._splicer.capture(slot, slice_)
                    if captured is None:
                        lost.append(slice_)
                    else:
                        made(Made(slice_, captured, seconds * len(slice_.tokens)))
                assert len(batch) > 1 or not lost, "a slice just evaluated behind its context"
                for slice_ in lost:
                    # It has left a sliding window, and been overwritten by what was evaluated with it.
                    yield from self._in_place(slot, _Run([slice_]), state, made, progress)
                last = batch[-1]
                if self._slices.memory.points:
                    point = Made(self._slices.point(last), self._splicer.capture_point(slot), seconds * len(tokens))
                    if last in points:
                        made(point)
                        point = None
        except BaseException:
            # What was evaluated before an interruption can be gone on from.
            if point:
                made(point)
            raise

    def _points(self, slices: Sequence[Slice]) -> set[Slice]:
        """The slices behind which the recurrent state is saved.

        The last, those at the ends of messages (but of very short ones), and one now and then in between.
        """
        if not self._slices.memory.points:
            return set()
        points = {slices[-1]}
        # The end of the first message, which is what others have in common, counts however short it is.
        since = _SHORT if slices[0].start == 0 else 0
        for slice_ in slices:
            since += len(slice_.tokens)
            # Behind the last message stands what opens the answer, and the last of the points.
            inside = slice_.end < slices[-1].end - _HEADER
            message = since >= _SHORT and inside and self._slices.cuts.ends_message(slice_.tokens)
            if message or slice_.start // _APART != slice_.end // _APART:
                points.add(slice_)
                since = 0
        return points

    def _steps(self, slices: Sequence[Slice], points: Collection[Slice]) -> Iterator[list[Slice]]:
        step: list[Slice] = []
        for slice_ in slices:
            step.append(slice_)
            # A recurrent state must be saved before it goes on.
            if slice_ in points or sum(len(each.tokens) for each in step) >= _STEP:
                yield step
                step = []
        if step:
            yield step

    def _side_by_side(self, slot: Slot, batch: Sequence[_Run], made: OnMade, progress: Step | None) -> Task[None]:
        """Evaluate runs behind what a slot holds, each in a sequence of its own."""
        try:
            yield from self._beside(slot, batch, made, progress)
        except BaseException:
            self._splicer.reset(slot)
            raise

    def _beside(self, slot: Slot, batch: Sequence[_Run], made: OnMade, progress: Step | None) -> Task[None]:
        context, scratch = self._context, self._splicer.scratch
        # Answers may be saved through the scratch sequence while this waits for an evaluation.
        spare, *free = self._splicer.free
        placed = list(zip(free, batch, strict=False))
        for sequence, _ in placed:
            context.share(slot.sequence, sequence)
        runs = [Run(sequence, run.first.start - run.first.delta, run.tokens) for sequence, run in placed]
        started = time.perf_counter()
        yield Work(list(runs), progress=progress)
        seconds = (time.perf_counter() - started) / sum(len(run.tokens) for run in runs)
        for (sequence, run), evaluated in zip(placed, runs, strict=True):
            if evaluated.start:
                context.remove(sequence, 0, evaluated.start)
            if run.first.delta:
                context.shift(sequence, run.first.delta)
        if any(run.first.delta for run in batch):
            # Shifts are applied by the next evaluation, whatever it is of.
            yield Work([Run(spare, 0, np.array([context.model.filler], np.int32))])
            context.remove(spare)
        for sequence, run in placed:
            for slice_ in run.slices:
                context.share(sequence, scratch, slice_.start, slice_.end)
                state = context.save(scratch)
                context.remove(scratch)
                made(Made(slice_, state, seconds * len(slice_.tokens)))
            context.remove(sequence)


def _batches(runs: Sequence[_Run], room: int, free: int) -> Iterator[list[_Run]]:
    batch: list[_Run] = []
    cells = 0
    for run in runs:
        size = len(run.tokens)
        if batch and (cells + size > room or len(batch) == free):
            yield batch
            batch, cells = [], 0
        batch.append(run)
        cells += size
    if batch:
        yield batch


def _by_context(slices: Iterable[Slice]) -> list[list[_Run]]:
    """Runs of slices grouped by the context that their first ones share; what needs others comes behind them."""
    groups: dict[str, list[_Run]] = {}
    # The run that each slice ends at the moment.
    ending: dict[Slice, _Run] = {}
    for slice_ in slices:
        before = next((span.slice for span in reversed(slice_.context or ()) if span.slice), None)
        run = ending.pop(before) if before in ending and ending[before].goes_on_with(slice_) else None
        if run is None:
            run = _Run([])
            groups.setdefault(slice_.context_key, []).append(run)
        run.slices.append(slice_)
        ending[slice_] = run
    return list(groups.values())


def effort(slices: Iterable[Slice]) -> int:
    """How many tokens are evaluated to make these slices, at least."""
    return sum(len(run.tokens) for runs in _by_context(slices) for run in runs)
