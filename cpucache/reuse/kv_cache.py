"""The KV cache: moves slices between one llama.cpp context and one store, and encodes missing slices."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from cpucache.errors import ModelError
from cpucache.layout import Tokens
from cpucache.reuse.attempts import Attempts, Gone
from cpucache.reuse.encoder import Encoder, tokens_to_evaluate
from cpucache.reuse.plan import Plan, Slice
from cpucache.reuse.progress import OnProgress, Step, counting
from cpucache.reuse.reports import Encoded, NewSlice
from cpucache.reuse.slices import Slices
from cpucache.reuse.slot import Points, Slot
from cpucache.reuse.splicer import Splicer
from cpucache.reuse.work import Task, Work
from cpucache.runtime import Context
from cpucache.runtime.context import Bytes
from cpucache.store import SliceInfo, Store

_log = logging.getLogger("cpucache.reuse")
_FEW = 128
"""Most tokens to evaluate when missing slices share a batch with the tokens after them."""
_LOOKED_FOR = 60.0  # seconds without a look after which the time of waiting for a slice is forgotten


class KVCache:
    """Supplies the slices of plans for one llama.cpp context: finds, encodes, and saves them.

    Args:
        context: The llama.cpp context.
        store: Where slices are saved.
        slices: Creates slices and their keys; its ``memory`` is set from the context.
        slots: Number of requests that can be answered at the same time.

    Models whose state can't be moved (recurrent state, absolute positions) take exact slices only: other plans raise
    ``ModelError``.
    """

    def __init__(self, context: Context, store: Store, slices: Slices, slots: int = 1) -> None:
        self.context = context
        self.store = store
        self.slices = slices
        slices.memory = context.memory
        self.splicer = Splicer(context, slots)
        """Owns the slots and all other sequences of the llama.cpp context."""
        self._encoder = Encoder(self.splicer, slices)
        self.prefill_rate: float | None = None
        """Tokens evaluated per second, as last measured over 32 tokens or more (the first time, over 8 or more)."""
        self._waits: dict[str, tuple[float, float]] = {}
        """Keys of slices that tasks wait for another process to encode, with the times of the first and the last look.
        The times outlive the tasks: a task that makes way for others starts over, and waits on."""

    def within(self, slices: Slices) -> KVCache:
        """Returns a KV cache that shares this one's context and store, for the slices of a namespace."""
        other = copy.copy(self)
        other.slices = slices
        slices.memory = self.slices.memory
        other._encoder = Encoder(self.splicer, slices)
        return other

    @contextmanager
    def slot(self) -> Iterator[Slot]:
        """Reserves a slot during a block."""
        slot = self.take(Plan(()))
        try:
            yield slot
        finally:
            slot.busy = False

    def take(self, plan: Plan) -> Slot:
        """Returns the idle slot that holds the most spans of ``plan``, and marks it busy."""
        return self.splicer.take(plan, self.slices.state_format, self.points)

    def attempts(self) -> Attempts:
        """New attempts at an operation that needs slices."""
        return Attempts(self.store)

    @property
    def points(self) -> Points:
        """Access to the recurrent states in the store."""
        return Points(self.slices.point, lambda slice_: self.slices.point(slice_).key in self.store)

    # -- slices ------------------------------------------------------------------------------------------------------
    def keys(self, plan: Plan) -> list[str]:
        """Keys of everything in the store that is loaded to splice a plan."""
        return [slice_.key for slice_ in self.loaded(plan.slices)]

    def loaded(self, slices: Sequence[Slice]) -> Sequence[Slice]:
        """Consecutive slices, and the recurrent state after the last one, if it is saved: they are loaded together."""
        point = self.slices.point(slices[-1]) if slices and self.slices.memory.points else None
        return [*slices, point] if point and point.key in self.store else slices

    def missing(self, slices: Iterable[Slice], held: Collection[Slice] = ()) -> list[Slice]:
        """Slices that the store lacks, each after the missing slices of its context.

        For a recurrent model, the last slice is also missing if the recurrent state after it is.

        Args:
            slices: The slices that are needed.
            held: Slices that are not missing although the store may lack them.

        Raises:
            Gone: A missing slice was found in the store, and so has no spans to encode it from.
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
                raise Gone
            for other in slice_.needs:
                add(other)
            needed[slice_] = None

        last: Slice | None = None
        for last in slices:
            add(last)
        if last and self.slices.memory.points and last not in held and self.slices.point(last).key not in self.store:
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
        """Encodes the slices that the store lacks among ``slices``.

        Args:
            slot: Slot to evaluate them in.
            slices: The slices that are needed; each must have a context or exist in the store.
            schema: Name of the schema that the store lists them under.
            progress: Called with the number of tokens evaluated and their total.
            report: Report to add to; a new one by default.
            wait: Whether to wait for slices that another process is encoding, up to ``Store.patience`` seconds.

        Returns:
            ``report``.

        Raises:
            ModelError: The model's state can't be moved, and a missing slice would have to be.
            CpucacheError: The slices are evicted or refused again and again.
        """
        slices = list(slices)
        report = Encoded() if report is None else report
        report.wanted += slices
        attempts = self.attempts()
        # Slices of one schema must not evict one another.
        with self.store.using(slice_.key for slice_ in slices):
            for attempt in attempts:
                with attempt:
                    missing = self.missing(slices, attempts.states)
                    steps = counting(progress, tokens_to_evaluate(missing))
                    yield from self.encode_missing(
                        slot, missing, (), (), attempts.states, schema, report, steps, wait=wait
                    )
        self.know(slices)
        return report

    def encode_missing(
        self,
        slot: Slot,
        missing: Sequence[Slice],
        wanted: Collection[Slice],
        held: Collection[Slice],
        states: dict[Slice, Bytes],
        schema: str,
        report: Encoded,
        progress: Step | None,
        *,
        wait: bool = True,
    ) -> Task[None]:
        """Encodes missing slices, except those that another process is encoding.

        Args:
            slot: Slot to evaluate them in.
            missing: The slices to encode, contexts first.
            wanted: Slices whose states are added to ``states`` if they are encoded here.
            held: Slices that the slot holds, which need no state.
            states: States kept in memory; read and extended.
            schema: Name of the schema that the store lists the slices under.
            report: Report to add to.
            progress: Called with the number of tokens of each batch.
            wait: Whether to wait for slices that another process is encoding. After ``Store.patience`` seconds
                without progress they are encoded here.

        Raises:
            Gone: A slice of a context has disappeared from the store.
            ModelError: The model's state can't be moved, and a slice would have to be.
        """
        if not missing:
            return
        self._check_can_be_encoded(missing)
        # Contexts of later slices are kept in memory too: a small store may evict any of them for the slices encoded
        # now.
        first = missing[:1] if self.slices.memory.points else missing
        keep = {*wanted, *(other for slice_ in first for other in slice_.needs)}
        for slice_ in keep.difference(missing, held):
            self.state(states, slice_)

        def save(each: NewSlice) -> None:
            self._save(each, schema)
            report.add(each)
            if each.slice in keep:
                states[each.slice] = each.state

        todo, told = list(missing), 0
        while todo:
            mine = self._claimed(todo)
            if not mine and not wait:
                break
            if not mine and self._waited(todo) > self.store.patience:
                _log.info(
                    "encoding slices that another process has not encoded in %.0f s: %d", self.store.patience, len(todo)
                )
                mine = todo
            if mine or told != len(todo):
                self._tell(mine, todo)
                told = len(todo)
            # A slice of an attempt before may be encoded again.
            self.store.missed(len(set(mine) - report.missed))
            report.missed.update(mine)
            started = time.monotonic()
            try:
                yield from self._encoder.encode(slot, mine, lambda slice_: self.state(states, slice_), save, progress)
            finally:
                report.seconds += time.monotonic() - started
                self.store.release(map(self._claim, mine))
            if not mine:
                yield Work([])
            done = set(mine)
            left = [slice_ for slice_ in todo if slice_ not in done and slice_.key not in self.store]
            if len(left) < len(todo):
                self._progressed(todo)
            todo = left

    def _tell(self, mine: Sequence[Slice], todo: Sequence[Slice]) -> None:
        """Logs which slices are encoded now, or how many are waited for."""
        if not mine:
            _log.debug("waiting for slices that another process is encoding: %d", len(todo))
        elif _log.isEnabledFor(logging.INFO):
            modules = ", ".join(dict.fromkeys(slice_.module or "(text)" for slice_ in mine))
            _log.info("encoding missing slices: %d, of %d tokens: %s", len(mine), tokens_to_evaluate(mine), modules)

    def _waited(self, slices: Iterable[Slice]) -> float:
        """Seconds that all of these slices have been waited for, without progress."""
        now = time.monotonic()
        # Those that nobody has looked for lately were found, or are no longer wanted.
        self._waits = {key: times for key, times in self._waits.items() if now - times[1] < _LOOKED_FOR}
        for slice_ in slices:
            begun, _ = self._waits.get(slice_.key, (now, now))
            self._waits[slice_.key] = begun, now
        return now - max(self._waits[slice_.key][0] for slice_ in slices)

    def _progressed(self, slices: Iterable[Slice]) -> None:
        """Lets the time of waiting for slices begin anew, since one of them has been encoded."""
        for slice_ in slices:
            self._waits.pop(slice_.key, None)

    def _claimed(self, slices: Sequence[Slice]) -> list[Slice]:
        """Claims the slices to encode here now: no other process has claimed them, or a slice of their contexts."""
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
        """Key to claim before encoding: the slice's, or, if the slice exists, that of the recurrent state after it."""
        again = self.slices.memory.points and slice_.key in self.store
        return self.slices.point(slice_).key if again else slice_.key

    def _save(self, new: NewSlice, schema: str) -> None:
        slice_ = new.slice
        self.store.put(slice_.key, new.state, slice_.tokens, self._info(slice_, schema, new.seconds))

    def know(self, slices: Iterable[Slice]) -> None:
        """Lets slices that another namespace may have saved be found by their content in this one."""
        for slice_ in slices if self.slices.shared else ():
            if slice_.key in self.store:
                self.store.know(slice_.key, self._info(slice_))

    def _info(self, slice_: Slice, schema: str = "", seconds: float = 0.0) -> SliceInfo:
        """Description of a slice, as the store keeps it."""
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
            attends_to=b"".join(slice_.attends_to).hex(),
            attended_tokens=slice_.attended_tokens,
        )

    def state(self, states: dict[Slice, Bytes], slice_: Slice) -> Bytes:
        """Returns the state of a slice from ``states``, or else the store. Raises ``Gone`` if both lack it."""
        if slice_ not in states:
            state = self.store.get(slice_.key)
            if state is None:
                raise Gone
            states[slice_] = state
        return states[slice_]

    def _check_can_be_encoded(self, slices: Iterable[Slice]) -> None:
        """Raises ``ModelError`` if a slice has to be moved (it is not ``chained``) and the model's state can't be."""
        if not self.context.memory.moves and not all(slice_.chained for slice_ in slices):
            raise self._rigid()

    def check_can_be_spliced(self, plan: Plan) -> None:
        """Raises ``ModelError`` if the model's state can't be moved or cut, and a plan needs that."""
        memory = self.context.memory
        for span in () if memory.moves else plan.spans:
            if span.slice and (span.relation != "exact" or span.delta or not (span.whole or memory.cuts)):
                raise self._rigid()

    def _rigid(self) -> ModelError:
        model = self.context.model
        return ModelError(
            f"{model.path.name}: a {model.architecture} model {self.context.memory.fixed}, so modules can't be "
            "spliced; use --fidelity high, which reuses whole combinations of modules, or --no-cache "
            "(use_cache=False)"
        )

    # -- the slots ---------------------------------------------------------------------------------------------------
    def learn_rate(self, tokens: int, seconds: float) -> None:
        """Updates ``prefill_rate`` from ``tokens`` evaluated in ``seconds``, unless they are too few."""
        if seconds > 0 and tokens >= (8 if self.prefill_rate is None else 32):
            self.prefill_rate = tokens / seconds

    def capture(self, slot: Slot, slices: Iterable[Slice], schema: str = "") -> int:
        """Saves those of ``slices`` whose tokens the slot has evaluated at their positions.

        Disk writes run in the background. Returns the number of bytes of their states.
        """
        taken = 0
        for slice_ in slices:
            state = self.splicer.capture(slot, slice_)
            if state is not None:
                # Estimated cost of encoding the slice again.
                seconds = len(slice_.tokens) / (self.prefill_rate or 100.0)
                self._save(NewSlice(slice_, state, seconds), schema)
                taken += state.nbytes
                if self.slices.memory.points and slice_.end == slot.end:
                    state = self.splicer.capture_point(slot)
                    self._save(NewSlice(self.slices.point(slice_), state, seconds), schema)
                    taken += state.nbytes
        return taken

    def last(self, slot: Slot, plan: Plan, missing: Sequence[Slice]) -> list[Slice]:
        """Claims the missing slices directly before the last tokens of a plan, if few tokens have to be evaluated.

        They are evaluated in one batch with these tokens and saved afterwards, so they cost no batch of their own.

        Args:
            slot: Slot that the plan will be spliced into.
            plan: The plan, ending with tokens to evaluate.
            missing: Missing slices of the plan, in order.

        Returns:
            The claimed slices, in order.
        """
        if self.slices.memory.points or not plan.spans or plan.spans[-1].slice:
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
            evaluating = plan.evaluating(len(last))
            if len(evaluating.spans[-1].tokens) - slot.known(evaluating) <= _FEW:
                break
            del last[0]
        for index in reversed(range(len(last))):
            # A slice that another process is encoding is waited for in ``encode_missing``, and so are those before it.
            if not self.store.claim(last[index].key):
                return last[index + 1 :]
        return last

    def capture_held(self, slot: Slot, plan: Plan, schema: str) -> None:
        """Saves the missing slices of a plan whose tokens the slot has already evaluated at their positions."""
        if self.slices.memory.points or not any(span.slice is None for span in slot.held):
            return
        held = {span.slice for span in slot.held}
        there = (slice_ for slice_ in plan.slices if slice_ not in held and slice_.end <= slot.end)
        self.capture(slot, [slice_ for slice_ in there if slice_.key not in self.store], schema)

    def append(self, slot: Slot, tokens: Tokens) -> Task[None]:
        """Evaluates tokens of an answer after all that a slot holds, and keeps the logits of the last."""
        return self.splicer.append(slot, tokens)

    def warm_up(self, slot: Slot, token: int) -> Task[None]:
        """Evaluates one token and learns how states are moved, so that the first prompt need not. Empties the slot."""
        self.splicer.reset(slot)
        yield from self.splicer.append(slot, np.array([token], np.int32))
        self.splicer.prepare(slot)
        self.splicer.reset(slot)

    def reset(self, slot: Slot) -> Task[None]:
        """Empties a slot. The store keeps its slices."""
        self.splicer.reset(slot)
        yield from ()
