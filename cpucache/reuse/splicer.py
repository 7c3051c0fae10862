"""The splicer: builds the sequence of a plan in the llama.cpp context from slices and fresh tokens."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TypeAlias

import numpy as np

from cpucache.layout import Tokens
from cpucache.reuse.plan import Plan, Slice, Span
from cpucache.reuse.progress import Step
from cpucache.reuse.reports import Metrics
from cpucache.reuse.slot import Points, Slot
from cpucache.reuse.work import Task, Work
from cpucache.runtime import Context, Run
from cpucache.runtime.context import SEQUENCES, Bytes, Logits
from cpucache.runtime.rotation import Rotation, learn
from cpucache.stages import stage

SLOTS = SEQUENCES // 2
"""Maximum number of slots of a llama.cpp context."""
_ROWS = 16  # maximum size, in tokens, of a batch that keeps all logits

_log = logging.getLogger("cpucache.reuse")
State: TypeAlias = Callable[[Slice], Bytes]
"""Returns the saved state of a slice."""


class Refused(Exception):
    """Raised when llama.cpp rejects the saved state of a slice, or the loaded state has the wrong positions."""

    def __init__(self, slice_: Slice) -> None:
        self.slice = slice_
        super().__init__(f"a slice of '{slice_.module or 'the schema'}' can't be loaded")


class Splicer:
    """Owner of the slots of a llama.cpp context.

    A slot keeps its cells between plans, so that the next plan costs only what differs. All sequences other than slots
    are empty between calls. A task that fails empties its slot; a task that is closed keeps what it has evaluated.

    Args:
        context: The llama.cpp context that loads slices and evaluates tokens.
        slots: Number of answers that can be decoded concurrently, at most ``SLOTS``.
    """

    def __init__(self, context: Context, slots: int = 1) -> None:
        self.context = context
        self.slots = [Slot(sequence) for sequence in range(slots)]
        self.scratch = slots
        """The sequence in which single slices are loaded and saved."""
        self.free = range(slots + 1, SEQUENCES)
        """Sequences that hold loaded parts until they are joined, or several slices encoded in one batch."""
        self._learnt = False
        self._rotation: Rotation | None = None

    def take(self, plan: Plan, owner: str = "", points: Points | None = None) -> Slot:
        """Returns the idle slot of ``owner`` that shares the most spans with ``plan``, and marks it busy.

        If every idle slot belongs to another owner, one of them is emptied and assigned to ``owner``. All other idle
        slots are emptied: llama.cpp masks the cells of other sequences but does not skip them, so that they would slow
        every evaluation.

        Args:
            plan: The plan that the slot will hold.
            owner: Whose text the slot may already hold; the text of other owners is never reused.
            points: The recurrent states available; ignored for models without any.
        """
        idle = [slot for slot in self.slots if not slot.busy]
        taken = max(idle, key=lambda slot: slot.shared(plan) if slot.owner == owner else -1)
        if taken.owner != owner:
            _log.debug("slot %d holds text of another owner, and is emptied", taken.sequence)
            self.reset(taken)
            taken.owner = owner
        taken.busy = True
        taken.points = points if self.context.memory.points else None
        for slot in idle:
            if slot is not taken and slot.held:
                _log.debug("slot %d, which is idle, is emptied: its cells would slow evaluation", slot.sequence)
                self.reset(slot)
        return taken

    def known(self, plan: Plan, owner: str, *, ends: bool = True) -> int:
        """Greatest ``Slot.known`` among the slots of ``owner``: tokens without a slice that need no evaluation."""
        return max((slot.known(plan, ends=ends) for slot in self.slots if slot.owner == owner), default=0)

    def reset(self, slot: Slot) -> None:
        """Empties a slot, and all sequences other than slots."""
        slot.held = []
        if not any(other.held for other in self.slots):
            self.context.clear()
            return
        for sequence in (slot.sequence, self.scratch, *self.free):
            self.context.remove(sequence)

    def prepare(self, slot: Slot) -> None:
        """Learns the key rotation of the model from a slot's state, so that the first prompt does not pay for it."""
        self._learn(self.context.save(slot.sequence))

    def splice(
        self,
        slot: Slot,
        plan: Plan,
        state: State,
        metrics: Metrics | None = None,
        *,
        fresh: bool = False,
        ends: bool = True,
    ) -> Splicing:
        """Loads the slices of a plan into the llama.cpp context; ``prefill`` then completes the plan in the slot.

        Nothing may be evaluated between the two calls. After an exception the slot is empty.

        Args:
            slot: The slot to fill; it keeps the cells that it shares with ``plan``.
            plan: The plan that the slot will hold.
            state: Returns the saved state of a slice.
            metrics: Receives the milliseconds taken, in ``splice_ms``.
            fresh: Whether to reuse nothing that a slot holds.
            ends: Whether the prompt ends with the plan, so that the logits of its last token are needed.

        Returns:
            The state of the splice, for ``prefill``.

        Raises:
            Refused: llama.cpp rejects the state of a slice.
            ContextFull: The llama.cpp context has too few free cells.
        """
        metrics = metrics or Metrics()
        started = time.perf_counter()
        wanted = plan
        if slot.points and not fresh:
            plan = slot.resumable(plan)
        try:
            if fresh:
                self.reset(slot)
            spans = list(plan.spans) if fresh else self._retain(slot, plan, state, ends=ends)
            groups = _grouped(spans, len(self.free))
            splicing = Splicing(slot, wanted, plan, groups, state, metrics)
            if groups:
                self._load_group(splicing, groups[0])
        except BaseException:
            self.reset(slot)
            raise
        metrics.splice_ms += _since(started)
        return splicing

    def prefill(self, splicing: Splicing, progress: Step | None = None) -> Task[int]:
        """Completes a plan in its slot: joins the loaded slices and evaluates fresh tokens, in position order.

        Returns the number of tokens evaluated. If the plan ends with fresh tokens, the logits of the last one can be
        read afterwards. ``progress`` is called with the tokens of each batch. Raises ``Refused`` or ``ContextFull``,
        with the slot empty.
        """
        slot, plan = splicing.slot, splicing.plan
        evaluated = 0
        try:
            for number, group in enumerate(splicing.groups):
                if number:
                    started = time.perf_counter()
                    self._load_group(splicing, group)
                    splicing.metrics.splice_ms += _since(started)
                evaluated += yield from self._join(splicing, group, progress)
            slot.held = list(plan.spans)
            if plan is not splicing.wanted:
                for slice_ in splicing.wanted.slices:
                    slot.recognise(slice_)
        except GeneratorExit:
            # Closed during an evaluation: the next plan can reuse the tokens evaluated so far.
            self._keep_evaluated(slot, plan)
            raise
        except BaseException:
            self.reset(slot)
            raise
        return evaluated

    def build(
        self, slot: Slot, plan: Plan, state: State, progress: Step | None = None, metrics: Metrics | None = None
    ) -> Task[int]:
        """Runs ``splice`` and ``prefill``; returns the number of tokens evaluated.

        ``metrics`` receives the milliseconds taken, in ``splice_ms`` and ``prefill_ms``.
        """
        return (yield from self.prefill(self.splice(slot, plan, state, metrics), progress))

    def _keep_evaluated(self, slot: Slot, plan: Plan) -> None:
        """Sets a slot's spans to the part of ``plan`` in its sequence, and empties all sequences other than slots."""
        end = self.context.last_position(slot.sequence) + 1
        slot.held = [span for span in plan.spans if span.end <= end]
        rest = plan.spans[len(slot.held)] if len(slot.held) < len(plan.spans) else None
        if rest is not None and rest.slice is None and rest.start < end:
            slot.held.append(Span(rest.start, rest.tokens[: end - rest.start]))
        for sequence in (self.scratch, *self.free):
            self.context.remove(sequence)

    def append(self, slot: Slot, tokens: Tokens) -> Task[None]:
        """Evaluates tokens of an answer at the end of a slot, with logits of the last one."""
        try:
            slot.index = yield Work([Run(slot.sequence, slot.end, tokens)], logits="last", answers=True)
        except BaseException:
            self.reset(slot)
            raise
        slot.add(tokens)

    def rows(self, slot: Slot, tokens: Tokens) -> Task[list[Logits]]:
        """Evaluates tokens at the end of a slot; returns the logits of each."""
        found: list[Logits] = []
        for begin in range(0, len(tokens), _ROWS):
            part = tokens[begin : begin + _ROWS]
            try:
                first = yield Work([Run(slot.sequence, slot.end, part)], logits="all")
            except BaseException:
                self.reset(slot)
                raise
            slot.add(part)
            found += [self.context.logits(first + index) for index in range(len(part))]
        return found

    def capture(self, slot: Slot, slice_: Slice) -> Bytes | None:
        """Returns the state of a slice whose tokens a slot has evaluated; the slot then holds them as this slice.

        Returns ``None`` if the slice is saved with a shift, if the slot holds other tokens at its position or before
        it, or if llama.cpp has overwritten cells of its sliding window.
        """
        if slice_.delta or not slot.recognise(slice_):
            return None
        self.context.remove(self.scratch)
        self.context.share(slot.sequence, self.scratch, slice_.start, slice_.end)
        state = self.context.save(self.scratch) if self._whole(self.scratch, [slice_.span]) else None
        self.context.remove(self.scratch)
        return state

    def capture_point(self, slot: Slot) -> Bytes:
        """Returns the recurrent state at the end of a slot."""
        return self.context.save_point(slot.sequence)

    def _retain(self, slot: Slot, plan: Plan, state: State, *, ends: bool) -> list[Span]:
        """Removes the cells of a slot that it does not share with ``plan``; returns the spans to load or evaluate."""
        self._adopt(slot, plan)
        self._close_up(slot, plan)
        stays = slot.stays(plan)
        rest = list(plan.spans[stays:])
        end = plan.spans[stays - 1].end if stays else 0
        if slot.points:
            if end and end < slot.end:
                # A recurrent state can't be rolled back: load the earlier one; ``_cut`` removes the cells after it.
                self._load_point(slot.points, slot.sequence, plan.spans[stays - 1], state)
        elif rest and stays < len(slot.held):
            common = slot.evaluated(stays, rest[0])
            # The last token of a prompt is always evaluated, for its logits.
            common = min(common, len(rest[0].tokens) - (ends and len(rest) == 1))
            if common:
                end = rest[0].start + common
                rest[:1] = [Span(end, rest[0].tokens[common:])] if common < len(rest[0].tokens) else []
        elif ends and not rest and plan.spans and plan.spans[-1].slice is None:
            last = plan.spans[-1]
            rest = [Span(last.end - 1, last.tokens[-1:])]
            end = last.end - 1
        if not self._cut(slot, end):
            return list(plan.spans)
        return rest

    def _adopt(self, slot: Slot, plan: Plan) -> None:
        """Shares the cells of the owner's slot with the longest prefix of ``plan``, if longer than this slot's."""
        if not self.context.memory.cuts:
            return
        other = max((each for each in self.slots if each.owner == slot.owner), key=lambda each: each.shared(plan))
        shared = other.shared(plan)
        if shared > slot.shared(plan):
            self.reset(slot)
            slot.held = list(plan.spans[:shared])
            self.context.share(other.sequence, slot.sequence, 0, slot.end)
            if not self._whole(slot.sequence, slot.held):
                self.reset(slot)

    def _close_up(self, slot: Slot, plan: Plan) -> None:
        """Shifts slices of a slot to lower positions in place where ``plan`` leaves out the spans before them.

        A truncated conversation thus costs one rotation of keys, without any load or evaluation.
        """
        begin = slot.shared(plan)
        if begin >= min(len(slot.held), len(plan.spans)) or not self.context.memory.moves:
            return
        # Slots may share cells, and a shift would move them in the other slot, too.
        if any(other.held for other in self.slots if other is not slot):
            return
        gap, first = slot.held[begin].start, plan.spans[begin]
        for index in range(begin + 1, len(slot.held)):
            held = slot.held[index]
            if held.slice is None or held.slice != first.slice:
                continue
            delta = first.start - held.start
            if delta < 0 and first.start >= gap:
                # Slices can be shifted to any position. Fresh tokens attended to the spans that are removed.
                staying = list(takewhile(lambda span: span.slice, slot.held[index:]))
                if not staying:
                    return
                self.context.remove(slot.sequence, staying[-1].end)
                self.context.remove(slot.sequence, gap, held.start)
                with stage("shift"):
                    self.context.shift(slot.sequence, delta, held.start)
                slot.held[begin:] = [span.moved(delta) for span in staying]
                if not self._whole(slot.sequence, slot.held):
                    self.reset(slot)
            return

    def _cut(self, slot: Slot, end: int) -> bool:
        """Removes a slot's cells from position ``end`` on; returns whether the rest stays (else the slot is empty)."""
        # With ``end`` 0 even an empty slot is reset: an exception may have interrupted an earlier ``reset``.
        if end and end == slot.end:
            return True
        held = [replace(span, tokens=span.tokens[: end - span.start]) for span in slot.held if span.start < end]
        if end == 0 or not self.context.remove(slot.sequence, end) or not self._whole(slot.sequence, held):
            self.reset(slot)
            return False
        return True

    def _whole(self, sequence: int, spans: Sequence[Span]) -> bool:
        """Whether a sequence still has all cells of its spans that the next token can attend to.

        llama.cpp may overwrite cells that have left a sliding window, even while other cells are free.
        """
        if not self.context.memory.window:
            return True
        end = spans[-1].end
        first = end - self.context.memory.window
        inside = (span.end - max(span.start, first) for span in spans if span.end > first)
        return self.context.whole(sequence, end, sum(inside))

    def _load_group(self, splicing: Splicing, parts: Sequence[_Part]) -> None:
        """Loads all slices of some parts, each part into its own sequence.

        All slices are loaded before anything is evaluated, so that llama.cpp applies all shifts in one rotation of
        keys: a rotation always covers every cell of the llama.cpp context, however few were shifted.
        """
        slot, state = splicing.slot, splicing.state
        window = self.context.memory.window
        for park, part in zip((slot.sequence, *self.free), parts, strict=False):
            for span in part.slices:
                left = 0 < window <= part.slices[-1].end - span.end
                with stage("load"):
                    self._load(slot, span, park, state, left=left)
            if slot.points and part.slices:
                with stage("load"):
                    self._load_point(slot.points, park, part.slices[-1], state)

    def _join(self, splicing: Splicing, parts: Sequence[_Part], progress: Step | None) -> Task[int]:
        """Appends loaded parts to a slot, and evaluates their fresh tokens; returns the number of tokens evaluated."""
        slot = splicing.slot
        evaluated = 0
        for park, part in zip((slot.sequence, *self.free), parts, strict=False):
            if park != slot.sequence and part.slices:
                self.context.share(park, slot.sequence)
                self.context.remove(park)
            if part.fresh and len(part.fresh.tokens):
                started = time.perf_counter()
                run = Run(slot.sequence, part.fresh.start, part.fresh.tokens)
                slot.index = yield Work([run], logits="last", progress=progress)
                evaluated += len(run.tokens)
                splicing.metrics.prefill_ms += _since(started)
        return evaluated

    def _load(self, slot: Slot, span: Span, sequence: int, state: State, *, left: bool) -> None:
        """Adds the slice of a span to a sequence: from another slot, or from its saved state, shifted if needed.

        If the whole slice lies before the window of the next token (``left``), the cells of window layers are not
        loaded: attention would mask but not skip them.
        """
        assert span.slice is not None
        if self._borrow(slot, span, sequence, left=left):
            return
        saved, start = state(span.slice), span.slice.start
        moved = self._moved(saved, span.delta) if span.delta else None
        if moved is not None:
            saved, start = moved, span.start
        count = len(span.slice.tokens)
        bare = self.context.without_windows(saved, count) if left else None
        loaded = self.context.load(self.scratch, saved if bare is None else bare)
        if loaded and bare is None:
            # llama_state_seq_set_data checks shapes against the model, but accepts any positions.
            # With recurrent states, ``last_position`` is only valid once ``_load_point`` has loaded one.
            loaded = slot.points is not None or self.context.last_position(self.scratch) == start + count - 1
            loaded = loaded and self._whole(self.scratch, [span.slice.span.moved(start - span.slice.start)])
        if not loaded:
            raise Refused(span.slice)
        if not span.whole:
            self.context.remove(self.scratch, start + len(span.tokens))
        if start != span.start:
            with stage("shift"):
                self.context.shift(self.scratch, span.delta)
        self.context.share(self.scratch, sequence)
        self.context.remove(self.scratch)

    def _load_point(self, points: Points, sequence: int, span: Span, state: State) -> None:
        """Loads the recurrent state saved at the end of a span's slice."""
        assert span.slice is not None
        point = points.of(span.slice)
        if not self.context.load_point(sequence, state(point)) or self.context.last_position(sequence) != span.end - 1:
            raise Refused(point)

    def _borrow(self, slot: Slot, span: Span, sequence: int, *, left: bool) -> bool:
        """Shares the cells of a slot that holds the same slice at the same position; returns whether one does."""
        if not self.context.memory.cuts:
            return False
        owner = next((each for each in self.slots if each is not slot and each.holds(span)), None)
        if owner is None:
            return False
        self.context.share(owner.sequence, self.scratch, span.start, span.end)
        whole = left or self._whole(self.scratch, [span])
        if whole:
            self.context.share(self.scratch, sequence)
        self.context.remove(self.scratch)
        return whole

    def _moved(self, state: Bytes, delta: int) -> Bytes | None:
        """A state with its keys rotated by ``delta`` positions; ``None`` if only llama.cpp can shift it."""
        with stage("shift"):
            self._learn(state)
            return self._rotation.moved(state, delta) if self._rotation else None

    def _learn(self, state: Bytes) -> None:
        if not self._learnt:
            self._learnt = True
            self._rotation = learn(self.context, state)


@dataclass(frozen=True)
class _Part:
    """A run of slices, and the fresh tokens after it."""

    slices: tuple[Span, ...]
    fresh: Span | None


@dataclass(frozen=True)
class Splicing:
    """A plan between ``splice`` and ``prefill``: the slices of its first group are loaded, but not joined yet."""

    slot: Slot
    wanted: Plan
    """The plan passed to ``splice``."""
    plan: Plan
    """``wanted``, with tokens to evaluate instead of slices that have no recurrent state after them."""
    groups: list[list[_Part]]
    state: State
    metrics: Metrics


def _grouped(spans: Sequence[Span], free: int) -> list[list[_Part]]:
    """Cuts spans into parts, in groups of at most one more than the number of ``free`` sequences."""
    parts: list[_Part] = []
    slices: list[Span] = []
    for span in spans:
        if span.slice:
            slices.append(span)
            continue
        last = parts[-1].fresh if parts and not slices else None
        if last and last.end == span.start:
            # One batch is faster than two.
            parts[-1] = _Part(parts[-1].slices, Span(last.start, np.concatenate([last.tokens, span.tokens])))
        else:
            parts.append(_Part(tuple(slices), span))
            slices = []
    if slices:
        parts.append(_Part(tuple(slices), None))
    size = 1 + free
    return [parts[begin : begin + size] for begin in range(0, len(parts), size)]


def _since(started: float) -> float:
    """Milliseconds since ``started``, in seconds of ``time.perf_counter``."""
    return (time.perf_counter() - started) * 1000
