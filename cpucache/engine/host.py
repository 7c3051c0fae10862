"""The host: a loaded model with its store and core, which engines, sessions and advice share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from cpucache.engine.ahead import Preparation
from cpucache.engine.core import Core
from cpucache.engine.namespaces import Namespaces
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
    """A loaded model, its KV cache and planner, and the core that owns the llama.cpp context."""

    model: Model
    template: ChatTemplate
    kv_cache: KVCache
    planner: Planner
    core: Core
    namespaces: Namespaces
    origin: Host | None = None
    """The host that this one is a namespace of. It is kept alive: its end closes the core."""

    @property
    def context(self) -> Context:
        """The llama.cpp context. Only the core's thread may use it."""
        return self.kv_cache.context

    @property
    def slices(self) -> Slices:
        """Builds slices of this model, with their keys."""
        return self.kv_cache.slices

    @property
    def store(self) -> Store:
        """The store that holds the slices, in memory and on disk."""
        return self.kv_cache.store

    def within(self, namespace: str, *, isolate: bool = False) -> Host:
        """Returns the host of a namespace, which has no schemas yet, see ``Engine.within``. Raises ``InputError``."""
        kv_cache = self.namespaces.within(self.kv_cache, namespace, isolate=isolate)
        return replace(self, kv_cache=kv_cache, planner=self.planner.within(kv_cache), origin=self)

    def do(
        self,
        task: Callable[[Slot, OnProgress], Task[T]],
        priority: Priority = Priority.ANSWER,
        progress: OnProgress | None = None,
    ) -> T:
        """Runs a task in a slot while no other request runs, and returns its result.

        Args:
            task: Called with the slot, and with a function that takes progress in tokens (done, total).
            priority: Priority of the request.
            progress: Called as ``progress(done, total)`` in this thread.

        Raises:
            CpucacheError: The engine has been closed. Errors of the task are raised as well.
        """

        def in_slot(request: Request[T]) -> Task[T]:
            with self.kv_cache.slot() as slot:
                return (yield from task(slot, request.progress))

        request = Request(in_slot, priority=priority)
        self.core.submit(request)
        return request.result(progress)

    def prepare(self, plan: Callable[[], Plan], label: str, *, n_tokens: int, save: bool, once: bool) -> Preparation:
        """Starts to evaluate a plan in the background, with the priority of a preparation.

        Args:
            plan: Returns the plan to evaluate, by the slices that exist when it is called.
            label: Label of its slices in the store, in place of a schema name.
            n_tokens: Length of the whole prompt, of which the plan is a prefix.
            save: Whether to save the fresh tokens of the last span as slices.
            once: Whether another request ends the preparation, instead of only interrupting it.
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
        """Empties the llama.cpp context, as after a restart. The store keeps its slices."""
        self.do(lambda slot, _: self.kv_cache.reset(slot))

    def warm_up(self) -> None:
        """Evaluates one token, so that the weights are in memory before the first prompt."""
        self.do(lambda slot, _: self.kv_cache.warm_up(slot, self.model.filler))
