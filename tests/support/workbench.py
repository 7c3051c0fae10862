"""KV caches over tiny models, plans built by hand, and the logits that plain evaluation gives for these.

The truth comes from a context of its own: every run of tokens is evaluated directly at the positions where the plan
wants it, so that nothing is ever saved, loaded or moved there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cpucache.engine.request import Request
from cpucache.engine.scheduler import Job
from cpucache.layout.vocabulary import joined
from cpucache.reuse import KVCache, Metrics, OnProgress, Plan, Slice, Slices, Span
from cpucache.reuse.slot import Slot
from cpucache.reuse.way import answer, nothing
from cpucache.reuse.work import Task
from cpucache.runtime import Batch, Context, KVType, Memory, Model, Run
from cpucache.store import Store
from tests.support.cutting import every
from tests.support.tiny import BYTES

T = TypeVar("T")
Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]

# A key that is moved is rounded twice, at a precision of its type. Nothing is rounded under ALiBi, where positions are
# in the mask only. A mistake of one position shows as 0.2 and more under RoPE, as 0.006 under ALiBi.
TOLERANCE: dict[KVType, float] = {"f32": 1e-3, "f16": 5e-3, "q8_0": 0.1}
TOLERANCE_ALIBI = 2e-3

PLENTY = 1 << 30
"""A RAM budget that nothing here exceeds."""
SLICES = Slices("model", "format", every())
"""Creates the slices of a bench. Each bench has one model, and a store that no other model uses."""


def some_tokens(n: int, seed: int = 0) -> Tokens:
    """Random bytes as tokens."""
    return np.random.default_rng(seed).integers(BYTES, BYTES + 256, n).astype(np.int32)


def tolerance(arch: str, kv_type: KVType) -> float:
    """The largest ``distance`` that rounding explains."""
    return TOLERANCE_ALIBI if arch == "mpt" else TOLERANCE[kv_type]


def cut(tokens: Tokens, *indices: int) -> list[Tokens]:
    """The parts of tokens between these indices."""
    return np.split(tokens, indices)


@contextmanager
def opened(path: Path, kv_type: KVType = "f32", *, n_ctx: int = 1024) -> Iterator[Context]:
    """A context of a model of its own."""
    with Model(path) as model:
        # One thread: on a busy machine two that wait for one another at every node of so small a graph take ages.
        context = Context(model, n_ctx=n_ctx, kv_type=kv_type, n_threads=1)
        try:
            yield context
        finally:
            context.close()


def drive(context: Context, task: Task[T]) -> T:
    """Run a task to its end with nothing beside it; gives what it returns."""
    job = Job(Request(lambda _: task))
    job.start()
    while not job.ended:
        work = job.work
        try:
            while work.runs:
                batch = Batch()
                work.fill(batch, context.n_batch)
                context.evaluate(batch)
                if work.progress:
                    work.progress(batch.size)
        except BaseException as error:
            job.fail(error)
        else:
            job.go_on()
    return job.result  # type: ignore[no-any-return]


class Desk(KVCache):
    """A KV cache of one slot whose tasks are run at once, by whoever asks for them."""

    @property
    def only(self) -> Slot:
        slot = self.splicer.slots[0]
        slot.points = self.points if self.context.memory.points else None
        return slot

    def encode(self, slices: Iterable[Slice], *arguments: Any, **settings: Any) -> Any:  # type: ignore[override]
        return drive(self.context, super().encode(self.only, slices, *arguments, **settings))

    def prefill(self, plan: Callable[[], Plan], label: str = "", **settings: Any) -> tuple[Plan, Metrics]:
        """Get a plan into the slot; gives it, and what it took."""
        metrics = Metrics()
        way = answer(self, plan, nothing, slot=self.only, label=label, metrics=metrics, **settings)
        return drive(self.context, way), metrics

    def append(self, tokens: Tokens) -> None:  # type: ignore[override]
        drive(self.context, super().append(self.only, tokens))

    def reset(self) -> None:  # type: ignore[override]
        drive(self.context, super().reset(self.only))


@dataclass
class Bench:
    """A KV cache, and a second context for the truth."""

    kv_cache: Desk
    truth: Context

    def prefill(self, plan: Plan, progress: OnProgress | None = None, *, fresh: bool = False) -> Metrics:
        """What it took to get ``plan`` into the llama.cpp context."""
        spent: Metrics = self.kv_cache.prefill(lambda: plan, progress=progress, fresh=fresh)[1]
        return spent

    def logits(self, plan: Plan) -> Logits:
        """Those of the last token of ``plan``, through slices."""
        self.prefill(plan)
        return self.kv_cache.context.logits()

    def full(self, tokens: Tokens) -> Logits:
        """Those of the last of ``tokens``, by full prefill in one go."""
        self.truth.clear()
        self.truth.decode([Run(0, 0, tokens)], logits="last")
        return self.truth.logits()

    def expected(self, plan: Plan) -> Logits:
        """Those of the last token of ``plan``, each slice evaluated at its position, after its context.

        For slices whose contexts are plain text, evaluated one token after the other.
        """
        self.truth.clear()
        # What matters is how far tokens are from one another: all stand so far on that every context fits before them.
        lift = max(0, 0, *(s.slice.context[-1].end - s.start for s in plan.spans if s.slice and s.slice.context))
        for span in plan.spans:
            if span.slice is None:
                self.truth.decode([Run(0, span.start + lift, span.tokens)], logits="last")
                continue
            context = span.slice.context
            assert context is not None, "found in the store: nobody knows its context"
            start = span.start + lift
            # As the slice was moved away from its context, so is the context moved here.
            back = start - (context[-1].end if context else 0)
            for each in (*(before.moved(back) for before in context), Span(start, span.tokens)):
                self.truth.decode([Run(1, each.start, each.tokens)])
            self.truth.remove(1, 0, start)
            self.truth.share(1, 0)
            self.truth.remove(1)
        return self.truth.logits()


@contextmanager
def bench(
    path: Path,
    kv_type: KVType = "f32",
    *,
    folder: Path | None = None,
    ram_budget: int = PLENTY,
    n_ctx: int = 1024,
) -> Iterator[Bench]:
    """A bench over the model at ``path``; ``folder`` and ``ram_budget`` are the store's."""
    with opened(path, kv_type, n_ctx=n_ctx) as context, opened(path, kv_type, n_ctx=n_ctx) as truth:
        store = Store(folder, ram_budget=ram_budget)
        try:
            yield Bench(Desk(context, store, SLICES), truth)
        finally:
            store.close()


def planning() -> KVCache:
    """A KV cache to plan with and nothing else: it has no llama.cpp context, and no slice has been encoded."""
    context: Any = SimpleNamespace(memory=Memory())
    return KVCache(context, Store(None, ram_budget=PLENTY), SLICES)


def slice_of(tokens: Tokens, context: Sequence[Slice] = (), *, start: int | None = None) -> Slice:
    """A slice to be encoded after ``context``; its position is right after the context unless ``start`` is given."""
    return SLICES.create([other.span for other in context], tokens, start=start)


def chain(parts: Sequence[Tokens]) -> list[Slice]:
    """Slices one after the other from position 0; the context of each is all slices before it."""
    slices: list[Slice] = []
    for part in parts:
        slices.append(slice_of(part, slices))
    return slices


def plan_of(*pieces: Slice | Tokens | tuple[Slice, int]) -> Plan:
    """Slices where they were saved, or at the position they come with, and fresh tokens after what precedes them."""
    spans: list[Span] = []
    end = 0
    for piece in pieces:
        if isinstance(piece, Slice):
            spans.append(piece.span)
        elif isinstance(piece, tuple):
            spans.append(Span(piece[1], piece[0].tokens, piece[0]))
        else:
            spans.append(Span(end, piece))
        end = spans[-1].end
    return Plan(tuple(spans))


def scheduled(pieces: Sequence[Slice | Tokens], *, packed: bool = False) -> Plan:
    """Slices at their saved positions or after what precedes them, or ``packed`` back to back; the last token fresh."""
    spans: list[Span] = []
    end = 0
    for index, piece in enumerate(pieces):
        fresh = piece if not isinstance(piece, Slice) else piece.tokens[:0]
        if isinstance(piece, Slice):
            size = len(piece.tokens) - (index == len(pieces) - 1)
            fresh = piece.tokens[size:]
            if size:
                spans.append(Span(end if packed else max(end, piece.start), piece.tokens[:size], piece))
                end = spans[-1].end
        if len(fresh):
            if spans and spans[-1].slice is None:
                before = spans.pop()
                fresh, end = joined([before.tokens, fresh]), before.start
            spans.append(Span(end, fresh))
            end = spans[-1].end
    return Plan(tuple(spans))


def distance(one: Logits, other: Logits) -> float:
    """The root mean square of what two rows of logits differ by. Their own standard deviation is about 2."""
    return float(np.sqrt(np.mean((one - other) ** 2)))
