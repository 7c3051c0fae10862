"""The encoder: evaluates slices in their contexts, moves them to their positions, and reports their states."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.reuse.plan import Plan, Slice, Span
from cpucache.reuse.progress import Step
from cpucache.reuse.reports import Metrics, NewSlice
from cpucache.reuse.slices import Slices
from cpucache.reuse.slot import Slot
from cpucache.reuse.splicer import Splicer, State
from cpucache.reuse.work import Task, Work
from cpucache.runtime import Run

# Most tokens evaluated side by side before their slices are saved and their cells freed. Cells of the other runs in a
# batch are masked, not skipped, so larger batches cost more than the rotation of keys that they save.
_BATCH = 512
# Tokens evaluated in place before finished slices are reported.
_STEP = 256
# Distance, in tokens, between saved recurrent states inside a long message.
_BETWEEN_POINTS = 1024
_HEADER = 16  # most tokens of the header that starts an answer
_SHORT = 64  # least tokens between a saved recurrent state and one at the end of a message


OnNewSlice: TypeAlias = Callable[[NewSlice], None]
"""Called with each slice as soon as its state is captured."""


@dataclass(eq=False)
class _Run:
    """Slices evaluated in one sequence, with only tokens to evaluate between them."""

    slices: list[Slice]

    @property
    def first(self) -> Slice:
        return self.slices[0]

    @property
    def tokens(self) -> Tokens:
        """Tokens to evaluate after the context of the first slice."""
        last = self.slices[-1]
        between = (last.context or ())[len(self.first.context or ()) :]
        return joined([*(span.tokens for span in between), last.tokens])

    def goes_on_with(self, slice_: Slice) -> bool:
        """Whether the context of ``slice_`` is that of the last slice, the last slice, and only tokens to evaluate."""
        last = self.slices[-1]
        at = len(last.context or ())
        context = slice_.context or ()
        if slice_.delta or last.delta or len(context) <= at or context[at].slice != last:
            return False
        # In this context, the last slice may follow other text than it attended to.
        pairs = zip(context, (*(last.context or ()), last.span), strict=False)
        alike = all(one is other or one.same(other) for one, other in pairs)
        return alike and not any(span.slice for span in context[at + 1 :])


class Encoder:
    """Encodes slices in the slots of a splicer.

    Args:
        splicer: Builds contexts and evaluates tokens.
        slices: Returns the points, and decides after which slices recurrent states are saved.
    """

    def __init__(self, splicer: Splicer, slices: Slices) -> None:
        self._splicer = splicer
        self._slices = slices
        self._context = splicer.context

    def encode(
        self, slot: Slot, slices: Iterable[Slice], state: State, on_slice: OnNewSlice, progress: Step | None = None
    ) -> Task[None]:
        """Evaluates slices in a slot.

        Several short runs with the same context share a batch (15 to 35% faster), and all runs of a batch that are
        moved share one rotation of keys.

        Args:
            slot: The slot that holds the contexts; its contents are replaced.
            slices: The slices to encode, in order: slices of a context come before the slices that need them.
            state: Returns the saved state of a slice of a context.
            on_slice: Called with each new slice as soon as its state is captured.
            progress: Called with the number of tokens of each batch.
        """
        scattered = False
        for runs in _by_context(slices):
            context = Plan(runs[0].first.context or ())
            # One cell stays free for the token that applies a shift.
            room = min(_BATCH, self._context.n_ctx - context.n_tokens - 1)
            short = [run for run in runs if len(run.tokens) <= room and self._context.memory.moves]
            beside = len(short) > 1 or any(run.first.delta for run in short)
            batches = list(_batches(short, room, len(self._splicer.free) - 1)) if beside else []
            batched = {run for batch in batches for run in batch}
            batches += [[run] for run in runs if run.first.delta and run not in batched]
            for batch in batches:
                scattered = True
                yield from self._splicer.build(slot, context, state)
                yield from self._side_by_side(slot, batch, on_slice, progress)
            for run in runs:
                if run not in batched and not run.first.delta:
                    yield from self._in_place(slot, run, state, on_slice, progress)
        if scattered:
            # An empty slot leaves free cells in one piece, and contiguous cells load faster.
            self._splicer.reset(slot)

    def _in_place(self, slot: Slot, run: _Run, state: State, on_slice: OnNewSlice, progress: Step | None) -> Task[None]:
        """Evaluates slices at their positions in the slot, which keeps them.

        Finished slices are reported before more tokens are evaluated: they are saved meanwhile, and Ctrl-C loses
        little.
        """
        point: NewSlice | None = None
        points = self._points(run.slices)
        try:
            for batch in self._steps(run.slices, points):
                tokens = _Run(batch).tokens
                # The slot may hold the first of these tokens already, or lack tokens of the context.
                plan = Plan((*(batch[0].context or ()), Span(batch[0].start, tokens)))
                metrics = Metrics()
                evaluated = yield from self._splicer.build(slot, plan, state, progress, metrics)
                seconds = metrics.prefill_ms / 1000 / evaluated
                lost: list[Slice] = []
                for slice_ in batch:
                    captured = self._splicer.capture(slot, slice_)
                    if captured is None:
                        lost.append(slice_)
                    else:
                        on_slice(NewSlice(slice_, captured, seconds * len(slice_.tokens)))
                assert len(batch) > 1 or not lost, "the state of a slice can be saved right after its evaluation"
                for slice_ in lost:
                    # Its cells have left the sliding window and were overwritten by the tokens evaluated after it.
                    yield from self._in_place(slot, _Run([slice_]), state, on_slice, progress)
                last = batch[-1]
                if self._slices.memory.points:
                    point = NewSlice(self._slices.point(last), self._splicer.capture_point(slot), seconds * len(tokens))
                    if last in points:
                        on_slice(point)
                        point = None
        except BaseException:
            # The next prompt can extend the tokens evaluated before an interruption.
            if point:
                on_slice(point)
            raise

    def _points(self, slices: Sequence[Slice]) -> set[Slice]:
        """Slices after which the recurrent state is saved.

        These are the last slice, the slices that end a message ``_SHORT`` tokens or more after the previous point, and
        one about every ``_BETWEEN_POINTS`` tokens in between.
        """
        if not self._slices.memory.points:
            return set()
        points = {slices[-1]}
        # Prompts often share only their first message, so its end counts however short it is.
        since = _SHORT if slices[0].start == 0 else 0
        for slice_ in slices:
            since += len(slice_.tokens)
            # Only the header of the answer follows the last message, and the last slice is a point anyway.
            inside = slice_.end < slices[-1].end - _HEADER
            message = since >= _SHORT and inside and self._slices.cuts.ends_message(slice_.tokens)
            if message or slice_.start // _BETWEEN_POINTS != slice_.end // _BETWEEN_POINTS:
                points.add(slice_)
                since = 0
        return points

    def _steps(self, slices: Sequence[Slice], points: Collection[Slice]) -> Iterator[list[Slice]]:
        step: list[Slice] = []
        for slice_ in slices:
            step.append(slice_)
            # A recurrent state must be saved before further tokens change it.
            if slice_ in points or sum(len(each.tokens) for each in step) >= _STEP:
                yield step
                step = []
        if step:
            yield step

    def _side_by_side(
        self, slot: Slot, batch: Sequence[_Run], on_slice: OnNewSlice, progress: Step | None
    ) -> Task[None]:
        """Evaluates runs after the context that a slot holds, each run in its own sequence."""
        try:
            yield from self._beside(slot, batch, on_slice, progress)
        except BaseException:
            self._splicer.reset(slot)
            raise

    def _beside(self, slot: Slot, batch: Sequence[_Run], on_slice: OnNewSlice, progress: Step | None) -> Task[None]:
        context, scratch = self._context, self._splicer.scratch
        # Nothing may stay in the scratch sequence across an evaluation: other tasks may save through it meanwhile.
        spare, *free = self._splicer.free
        pairs = list(zip(free, batch, strict=False))
        for sequence, _ in pairs:
            context.share(slot.sequence, sequence)
        runs = [Run(sequence, run.first.start - run.first.delta, run.tokens) for sequence, run in pairs]
        started = time.perf_counter()
        yield Work(list(runs), progress=progress)
        seconds = (time.perf_counter() - started) / sum(len(run.tokens) for run in runs)
        for (sequence, run), evaluated in zip(pairs, runs, strict=True):
            if evaluated.start:
                context.remove(sequence, 0, evaluated.start)
            if run.first.delta:
                context.shift(sequence, run.first.delta)
        if any(run.first.delta for run in batch):
            # llama_memory_seq_add only records a shift; the next llama_decode applies it, so any token will do.
            yield Work([Run(spare, 0, np.array([context.model.filler], np.int32))])
            context.remove(spare)
        for sequence, run in pairs:
            for slice_ in run.slices:
                context.share(sequence, scratch, slice_.start, slice_.end)
                state = context.save(scratch)
                context.remove(scratch)
                on_slice(NewSlice(slice_, state, seconds * len(slice_.tokens)))
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
    """Runs of slices, grouped by the context of their first slices. A run follows the runs that it needs."""
    groups: dict[str, list[_Run]] = {}
    # For each slice that is the last of a run so far: that run.
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


def tokens_to_evaluate(slices: Iterable[Slice]) -> int:
    """Least number of tokens to evaluate to encode these slices."""
    return sum(len(run.tokens) for runs in _by_context(slices) for run in runs)
