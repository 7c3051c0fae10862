"""The host: a model that is loaded, and what engines, sessions and advice stand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cpucache.engine.ahead import Preparation
from cpucache.engine.core import Core
from cpucache.engine.planner import Planner
from cpucache.engine.reply import Prepared
from cpucache.engine.request import Priority, Request
from cpucache.layout import ChatTemplate
from cpucache.reuse import KVCache, Metrics, OnProgress, Plan, Slices
from cpucache.reuse.slot import Slot
from cpucache.reuse.way import answer
from cpucache.reuse.work import Task
from cpucache.runtime import Context, Model
from cpucache.store import Store

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Host:
    """A model that is loaded, its store, and the core that owns its llama.cpp context."""

    model: Model
    template: ChatTemplate
    kv_cache: KVCache
    planner: Planner
    core: Core

    @property
    def context(self) -> Context:
        """The llama.cpp context. Only the core's thread may use it."""
        return self.kv_cache.context

    @property
    def slices(self) -> Slices:
        """Makes slices of this model."""
        return self.kv_cache.slices

    @property
    def store(self) -> Store:
        """Where slices are kept."""
        return self.kv_cache.store

    def do(
        self,
        task: Callable[[Slot, OnProgress], Task[T]],
        priority: Priority = Priority.ANSWER,
        progress: OnProgress | None = None,
    ) -> T:
        """Run a task on the core, in a slot and with nothing beside it; gives what it returns.

        ``progress(done, total)`` is called in this thread with what the task tells of its progress.
        """

        def in_slot(request: Request[T]) -> Task[T]:
            with self.kv_cache.slot() as slot:
                return (yield from task(slot, request.progress))

        request = Request(in_slot, priority=priority)
        self.core.submit(request)
        return request.result(progress)

    def prepare(self, plan: Callable[[], Plan], label: str, *, n_tokens: int, save: bool, once: bool) -> Preparation:
        """Begin to evaluate a plan ahead.

        Args:
            plan: Plans what is evaluated, by the slices that there are at the moment.
            label: What its slices are listed under.
            n_tokens: Of the prompt that it is the beginning of.
            save: Save what is in no slice yet, once it has been evaluated.
            once: It ends where another request takes its place.
        """
        kv_cache = self.kv_cache

        def saved(slot: Slot, planned: Plan) -> Task[None]:
            *before, last = planned.spans
            if save and last.slice is None:
                kv_cache.capture(slot, self.slices.cut(before, last.tokens), label)
            yield from ()

        def task(request: Request[Prepared]) -> Task[Prepared]:
            metrics = Metrics()
            if plan().spans:
                yield from answer(
                    kv_cache, plan, saved, label=label, progress=request.progress, metrics=metrics, ends=False
                )
            return Prepared(n_tokens, metrics.cached_tokens, metrics.fresh_tokens)

        request = Request(task, priority=Priority.PREPARE, once=once)
        self.core.submit(request)
        return Preparation(request)

    def forget(self) -> None:
        """Empty the llama.cpp context, as it is after a restart. The store keeps its slices."""
        self.do(lambda slot, _: self.kv_cache.reset(slot))

    def warm_up(self) -> None:
        """Evaluate one token, so that the first prompt does not pay for reading the weights in, and the like."""
        self.do(lambda slot, _: self.kv_cache.warm_up(slot, self.model.filler))
