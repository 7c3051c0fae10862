"""The workspace: one llama.cpp context, one store, and the slices that go between them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np

from cpucache.errors import CpucacheError, ModelError
from cpucache.layout import Tokens
from cpucache.reuse.encoder import Encoder, effort
from cpucache.reuse.progress import OnProgress, Step, counting
from cpucache.reuse.reports import Encoded, Made, Prefill, Spliced
from cpucache.reuse.slices import Plan, Slice, Slices
from cpucache.reuse.slot import Points, Slot
from cpucache.reuse.splicer import Refused, Splicer
from cpucache.reuse.work import Task, Work
from cpucache.runtime import Context
from cpucache.runtime.context import Bytes, Logits
from cpucache.store import SliceInfo, Store

T = TypeVar("T")
_FEW = 128
"""Tokens to evaluate, at most, for missing slices to go into one batch with what stands behind them."""
_FUTILE = 20  # attempts to get at slices none of which got any further than the one before


class _Gone(Exception):
    """A slice that was there is not any more: found damaged, or evicted by another process."""


class Workspace:
    """Gets plans into a llama.cpp context, making on the way what slices are missing.

    Raises ``ModelError`` for plans with slices when the model's state can't be spliced (recurrent models, absolute
    positions).
    """

    def __init__(self, context: Context, store: Store, slices: Slices, slots: int = 1) -> None:
        self.context = context
        self.store = store
        self.slices = slices
        slices.recurrent = context.model.recurrent
        self._splicer = Splicer(context, slots)
        self._encoder = Encoder(self._splicer, slices)
        self.prefill_rate: float | None = None
        """Tokens evaluated in a second, as last measured over 32 tokens or more, or a few at first."""

    def within(self, slices: Slices) -> Workspace:
        """The same context and store, for the slices of a namespace."""
        other = copy.copy(self)
        other.slices = slices
        slices.recurrent = self.slices.recurrent
        other._encoder = Encoder(self._splicer, slices)
        return other

    @contextmanager
    def slot(self, plan: Plan | None = None) -> Iterator[Slot]:
        """A slot of one's own: of those that are idle, the one that holds most of ``plan``."""
        slot = self._splicer.take(plan or Plan(()), self.slices.state_format, self.points)
        try:
            yield slot
        finally:
            slot.busy = False

    @property
    def points(self) -> Points:
        """The recurrent states that there are."""
        return Points(self.slices.point, lambda slice_: self.slices.point(slice_).key in self.store)

    # -- slices ------------------------------------------------------------------------------------------------------
    def keys(self, plan: Plan) -> list[str]:
        """The keys of the slices that a plan is spliced from."""
        return [slice_.key for slice_ in self.loaded(plan.slices)]

    def loaded(self, slices: Sequence[Slice]) -> Sequence[Slice]:
        """Consecutive slices, and what else is loaded with them: the recurrent state behind the last."""
        point = self.slices.point(slices[-1]) if slices and self.slices.recurrent else None
        return [*slices, point] if point and point.key in self.store else slices

    def missing(self, slices: Iterable[Slice], held: Collection[Slice] = ()) -> list[Slice]:
        """Those of ``slices`` that the store lacks, and what of their contexts is needed to make them, in order.

        Those ``held`` count as had. Raises ``_Gone`` for one that can't be made here.
        """
        needed: dict[Slice, None] = {}
        had = set(held)

        def add(slice_: Slice) -> None:
            if slice_ in needed or slice_ in had:
                return
            if slice_.key in self.store:
                had.add(slice_)
                return
            if slice_.context is None:
                raise _Gone
            for other in slice_.needs:
                add(other)
            needed[slice_] = None

        last: Slice | None = None
        for last in slices:
            add(last)
        if last and self.slices.recurrent and last not in held and self.slices.point(last).key not in self.store:
            needed[last] = None
        return list(needed)

    def encode(
        self,
        slot: Slot,
        slices: Iterable[Slice],
        schema: str = "",
        progress: OnProgress | None = None,
        *,
        report: Encoded | None = None,
        wait: bool = True,
    ) -> Task[Encoded]:
        """Make the slices that are missing among ``slices``.

        Args:
            slot: Where they are evaluated.
            slices: Each of those that can be made, or is there.
            schema: What they are listed under.
            progress: Told about tokens evaluated.
            report: Is added to, and given back.
            wait: Whether to wait for slices that another process is making, up to the store's patience.
        """
        slices = list(slices)
        report = Encoded() if report is None else report
        report.wanted += slices
        states: dict[Slice, Bytes] = {}

        def make() -> Task[None]:
            missing = self.missing(slices, states)
            steps = counting(progress, effort(missing))
            yield from self._make(slot, missing, (), (), states, schema, report, steps, wait=wait)

        # Slices of one schema do not push one another out.
        with self.store.using(slice_.key for slice_ in slices):
            yield from self._mending(make, states)
        self._know(slices)
        return report

    def _make(
        self,
        slot: Slot,
        missing: list[Slice],
        wanted: Collection[Slice],
        held: Collection[Slice],
        states: dict[Slice, Bytes],
        schema: str,
        report: Encoded,
        progress: Step | None,
        *,
        wait: bool = True,
    ) -> Task[None]:
        """Encode ``missing``; adds to ``states`` those ``wanted``, as far as they were made here.

        Those ``held`` lie in the slot, where they will be found.
        What another process is making already is waited for, up to the store's patience, if at all.
        """
        if not missing:
            return
        self._check_can_be_made(missing)
        self.store.missed(len(missing))
        started = waiting = time.monotonic()
        # Kept at hand besides the wanted: contexts of what comes later. A small store may drop any of them for what is
        # made now.
        first = missing[:1] if self.slices.recurrent else missing
        keep = {*wanted, *(other for slice_ in first for other in slice_.needs)}
        for slice_ in keep.difference(missing, held):
            self._held(states, slice_)

        def made(each: Made) -> None:
            self._keep(each, schema)
            report.add(each)
            if each.slice in keep:
                states[each.slice] = each.state

        todo = missing
        while todo:
            mine = self._claimed(todo)
            if not mine and not wait:
                break
            if not mine and time.monotonic() - waiting > self.store.patience:
                mine = todo
            try:
                yield from self._encoder.encode(slot, mine, partial(self._held, states), made, progress)
            finally:
                self.store.release(map(self._claim, mine))
            if not mine:
                yield Work([])
            done = set(mine)
            left = [slice_ for slice_ in todo if slice_ not in done and slice_.key not in self.store]
            waiting = waiting if len(left) == len(todo) else time.monotonic()
            todo = left
        report.seconds += time.monotonic() - started

    def _claimed(self, slices: list[Slice]) -> list[Slice]:
        """Those of ``slices`` that this process is to make now: nobody else is at them, and their contexts exist."""
        mine: dict[Slice, None] = {}
        elsewhere: set[Slice] = set()
        for slice_ in slices:
            ready = elsewhere.isdisjoint(slice_.needs)
            if ready and self.store.claim(self._claim(slice_)):
                mine[slice_] = None
            elif slice_.key not in self.store:
                elsewhere.add(slice_)
        return list(mine)

    def _claim(self, slice_: Slice) -> str:
        """The key that is claimed for making a slice, or the recurrent state behind one that is there."""
        again = self.slices.recurrent and slice_.key in self.store
        return self.slices.point(slice_).key if again else slice_.key

    def _keep(self, made: Made, schema: str) -> None:
        slice_ = made.slice
        self.store.put(slice_.key, made.state, slice_.tokens, self._info(slice_, schema, made.seconds))

    def _know(self, slices: Iterable[Slice]) -> None:
        """Let slices be found by their content that may have been made in another namespace."""
        for slice_ in slices if self.slices.shared else ():
            if slice_.key in self.store:
                self.store.know(slice_.key, self._info(slice_))

    def _info(self, slice_: Slice, schema: str = "", seconds: float = 0.0) -> SliceInfo:
        """The account of a slice."""
        return SliceInfo(
            fingerprint=self.slices.fingerprint,
            model=self.context.model.path.stem,
            schema=schema,
            module=slice_.module,
            tokens=len(slice_.tokens),
            start=slice_.start,
            state_format=self.slices.state_format,
            context=slice_.context_key,
            seconds=seconds,
            content=self.slices.content(slice_.tokens),
            sees=b"".join(slice_.sees).hex(),
            sees_tokens=slice_.sees_tokens,
        )

    def _held(self, states: dict[Slice, Bytes], slice_: Slice) -> Bytes:
        """The state of a slice, kept at hand in ``states`` from then on. Raises ``_Gone``."""
        if slice_ not in states:
            state = self.store.get(slice_.key)
            if state is None:
                raise _Gone
            states[slice_] = state
        return states[slice_]

    def _check_can_be_made(self, slices: Iterable[Slice]) -> None:
        """What attends to everything before it is made where it stands, with any model. The rest has to be moved."""
        if not self.context.can_shift and not all(slice_.chained for slice_ in slices):
            raise self._rigid()

    def _check_can_be_spliced(self, plan: Plan) -> None:
        if self.context.can_shift:
            return
        for span in plan.spans:
            if span.slice and (span.relation != "exact" or span.delta or not span.whole):
                raise self._rigid()

    def _rigid(self) -> ModelError:
        model = self.context.model
        kind = "keeps a recurrent state" if model.recurrent else "ties what it knows to absolute positions"
        return ModelError(
            f"{model.path.name}: a {model.architecture} model {kind}, so that modules can't be spliced into it; "
            "use --fidelity high, which reuses whole combinations of them, or --no-cache (use_cache=False)"
        )

    # -- prompts -----------------------------------------------------------------------------------------------------
    def prefill(
        self,
        slot: Slot,
        plan: Callable[[], Plan],
        schema: str = "",
        progress: OnProgress | None = None,
        *,
        fresh: bool = False,
        ends: bool = True,
    ) -> Task[tuple[Plan, Prefill]]:
        """Get a plan into a slot, with logits of its last token; gives the plan and what it took.

        Args:
            slot: The one that answers.
            plan: Gives the plan by the slices that there are. It is asked again when a slice turns out to be gone or
                unusable.
            schema: What slices made on the way are listed under.
            progress: Told about tokens evaluated.
            fresh: Take nothing from any slot, so that every token without a slice is evaluated.
            ends: The prompt ends here. Otherwise no logits are wanted, and the last token is like any other.
        """
        encoded = Encoded()
        states: dict[Slice, Bytes] = {}
        known = counted = 0

        def splice() -> Task[tuple[Plan, Plan, Spliced]]:
            nonlocal known, counted
            planned = plan()
            if not fresh:
                self._capture_held(slot, planned, schema)
            self._check_can_be_spliced(planned)
            with self.store.using(self.keys(planned)):
                shared = 0 if fresh else slot.shared(planned)
                if self.slices.recurrent and shared < len(slot.held):
                    shared = 0  # its state has gone on
                held = {span.slice for span in planned.spans[:shared] if span.slice}
                wanted = [slice_ for slice_ in planned.slices if slice_ not in held]
                missing = self.missing([*wanted, *planned.besides], states.keys() | held)
                last = [] if fresh else self._last(slot, planned, missing)
                missing = missing[: len(missing) - len(last)]
                wanted = [slice_ for slice_ in wanted if slice_ not in last]
                placed = planned.evaluating(len(last))
                known = 0 if fresh else self._splicer.known(placed, slot.owner, ends=ends)
                told = counting(progress, effort(missing) + placed.n_tokens - placed.n_cached)

                def step(count: int) -> None:
                    nonlocal counted
                    counted += count
                    if told:
                        told(count)

                yield from self._make(slot, missing, wanted, held, states, schema, encoded, step)
                with self.store.quiet():
                    state = partial(self._held, states)
                    spliced = yield from self._splicer.splice(slot, placed, state, step, fresh=fresh, ends=ends)
                self.capture(slot, last, schema)
                encoded.tokens += sum(len(slice_.tokens) for slice_ in last)
                return planned, placed, spliced

        planned, placed, spliced = yield from self._mending(splice, states)
        self._know(planned.slices)
        made = sum(len(span.tokens) for span in planned.spans if span.slice in encoded.made)
        # What stands before slices made on the way was evaluated with them.
        evaluated = made + max(spliced.evaluated, placed.n_tokens - placed.n_cached - known)
        if self.slices.recurrent:
            # So are tokens between the recurrent state that was gone on from and them.
            evaluated = max(evaluated, min(counted, planned.n_tokens))
        self._learn_rate(encoded.tokens + spliced.evaluated, encoded.seconds + spliced.prefill_ms / 1000)
        return planned, Prefill.of(planned, evaluated, encoded, spliced)

    def _mending(self, action: Callable[[], Task[T]], states: dict[Slice, Bytes]) -> Task[T]:
        """Do ``action``; slices that turn out to be unusable are made again, each of them once.

        So are those that go before they are had, as often as that happens: what is in ``states`` by then is kept, so
        that each attempt gets further than the one before.
        """
        refused: set[Slice] = set()
        had, futile = -1, 0
        while True:
            try:
                return (yield from action())
            except _Gone:
                futile = futile + 1 if len(states) == had else 0
                had = len(states)
                if futile == _FUTILE:
                    raise CpucacheError(
                        "slices are evicted faster than they are made; give the store more room"
                    ) from None
            except Refused as error:
                if error.slice in refused:
                    raise CpucacheError(f"{error}, not even when made anew; check the store's disk") from error
                refused.add(error.slice)
                states.pop(error.slice, None)
                self.store.discard(error.slice.key)

    def _learn_rate(self, tokens: int, seconds: float) -> None:
        if seconds > 0 and tokens >= (8 if self.prefill_rate is None else 32):
            self.prefill_rate = tokens / seconds

    def capture(self, slot: Slot, slices: Iterable[Slice], schema: str = "") -> int:
        """Save what a slot holds of ``slices``, evaluated where they stand.

        Gives how many bytes there were. Writing goes on in the background.
        """
        taken = 0
        for slice_ in slices:
            state = self._splicer.capture(slot, slice_)
            if state is not None:
                # What making it again would take.
                seconds = len(slice_.tokens) / (self.prefill_rate or 100.0)
                self._keep(Made(slice_, state, seconds), schema)
                taken += state.nbytes
                if self.slices.recurrent and slice_.end == slot.end:
                    state = self._splicer.capture_point(slot)
                    self._keep(Made(self.slices.point(slice_), state, seconds), schema)
                    taken += state.nbytes
        return taken

    def _last(self, slot: Slot, plan: Plan, missing: Sequence[Slice]) -> list[Slice]:
        """The missing slices right before the tokens that end a plan, if little of them is to be evaluated.

        Evaluated together with these tokens, and saved then, they cost no batch of their own.
        """
        if self.slices.recurrent or not plan.spans or plan.spans[-1].slice:
            return []
        last: list[Slice] = []
        start = plan.spans[-1].start
        for span, slice_ in zip(reversed(plan.spans[:-1]), reversed(missing), strict=False):
            here = span.slice == slice_ and span.whole and span.end == start and not (span.delta or slice_.delta)
            if not here or span.relation != "exact":
                break
            last.insert(0, slice_)
            start = span.start
        while last:
            placed = plan.evaluating(len(last))
            if len(placed.spans[-1].tokens) - slot.known(placed) <= _FEW:
                break
            del last[0]
        return last

    def _capture_held(self, slot: Slot, plan: Plan, schema: str) -> None:
        """Save the slices of a plan that are missing, and whose tokens a slot has evaluated where they stand."""
        if self.slices.recurrent or not any(span.slice is None for span in slot.held):
            return
        held = {span.slice for span in slot.held}
        there = (slice_ for slice_ in plan.slices if slice_ not in held and slice_.end <= slot.end)
        self.capture(slot, [slice_ for slice_ in there if slice_.key not in self.store], schema)

    def append(self, slot: Slot, tokens: Tokens) -> Task[None]:
        """Evaluate tokens of an answer behind all that a slot holds, with logits of the last."""
        return self._splicer.append(slot, tokens)

    def forced(
        self, slot: Slot, plan: Plan, tokens: Tokens, schema: str = "", progress: OnProgress | None = None
    ) -> Task[Logits]:
        """Logits behind each token of the plan's last span, which is fresh, and behind each of ``tokens`` after it.

        One row for each, a vocabulary long: what the model would say next if this is how it went on.
        """
        *before, last = plan.spans
        yield from self.prefill(slot, lambda: Plan(tuple(before)), schema, progress)
        rows = yield from self._splicer.rows(slot, np.concatenate([last.tokens, tokens]))
        return np.stack(rows)

    def warm_up(self, slot: Slot, token: int) -> Task[None]:
        """Do once what the first prompt would otherwise pay for. Leaves the slot empty."""
        self._splicer.reset(slot)
        yield from self._splicer.append(slot, np.array([token], np.int32))
        self._splicer.prepare(slot)
        self._splicer.reset(slot)

    def reset(self, slot: Slot) -> Task[None]:
        """Empty a slot. The store keeps its slices."""
        self._splicer.reset(slot)
        yield from ()
