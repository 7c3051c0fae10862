"""The host: a model that is loaded, and what engines, sessions and advice stand on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from cpucache.engine.ahead import Preparation
from cpucache.engine.answer import Answer, Hook
from cpucache.engine.core import Core
from cpucache.engine.planner import Planner
from cpucache.engine.reply import Prepared
from cpucache.engine.request import Priority, Request
from cpucache.engine.stream import Stream
from cpucache.layout import ChatTemplate
from cpucache.reuse import OnProgress, Plan, Slices, Workspace
from cpucache.reuse.slot import Slot
from cpucache.reuse.work import Task
from cpucache.runtime import Context, Model, Sampling
from cpucache.store import Store

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Host:
    """A model that is loaded, its store, and the core that owns its llama.cpp context."""

    model: Model
    template: ChatTemplate
    workspace: Workspace
    planner: Planner
    core: Core

    @property
    def context(self) -> Context:
        """The llama.cpp context. Only the core's thread may use it."""
        return self.workspace.context

    @property
    def slices(self) -> Slices:
        """Makes slices of this model."""
        return self.workspace.slices

    @property
    def store(self) -> Store:
        """Where slices are kept."""
        return self.workspace.store

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
            with self.workspace.slot() as slot:
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
        workspace = self.workspace

        def task(request: Request[Prepared]) -> Task[Prepared]:
            planned = plan()
            if not planned.spans:
                return Prepared(n_tokens, 0, 0)
            with workspace.slot(planned) as slot:
                done, took = yield from workspace.prefill(slot, plan, label, request.progress, ends=False)
                *before, last = done.spans
                if save and last.slice is None:
                    workspace.capture(slot, self.slices.cut(before, last.tokens), label)
            return Prepared(n_tokens, took.cached_tokens, took.fresh_tokens)

        request = Request(task, priority=Priority.PREPARE, once=once)
        self.core.submit(request)
        return Preparation(request)

    def answer(
        self,
        plan: Callable[[], Plan],
        sampling: Sampling,
        *,
        max_tokens: int,
        started: float,
        label: str,
        n_tokens: int,
        use_cache: bool = True,
        progress: OnProgress | None = None,
        at_start: Hook | None = None,
        at_first: Hook | None = None,
        at_end: Hook | None = None,
    ) -> Stream:
        """The answer to a plan. The settings are those of ``Answer``.

        ``n_tokens``: of the prompt. ``progress(done, total)`` is told about tokens evaluated before the first token of
        the answer, in the thread that reads the stream.
        """
        answer = Answer(
            self.workspace,
            plan,
            sampling,
            max_tokens=max_tokens,
            started=started,
            label=label,
            use_cache=use_cache,
            at_start=at_start,
            at_first=at_first,
            at_end=at_end,
        )
        # One more, for the token that applies a shift.
        request = Request(answer.task, cells=min(n_tokens + max_tokens + 1, self.context.n_ctx))
        return Stream(answer, request, partial(self._begin, answer, request), progress)

    def _begin(self, answer: Answer, request: Request[None]) -> None:
        if not self.core.busy:
            self.core.submit(request)
            return
        # What it needs is read into memory, and kept there, while it waits.
        store, keys = self.store, self.workspace.keys(answer.planned())
        once = threading.Lock()

        def let_go() -> None:
            if once.acquire(blocking=False):
                store.let_go(keys)

        store.hold(keys)
        request.at_end = let_go
        accepted = False
        try:
            store.prefetch(keys)
            accepted = self.core.submit(request)
        finally:
            # It may have been cancelled before it knew what to let go.
            if not accepted:
                let_go()

    def forget(self) -> None:
        """Empty the llama.cpp context, as it is after a restart. The store keeps its slices."""
        self.do(lambda slot, _: self.workspace.reset(slot))

    def warm_up(self) -> None:
        """Evaluate one token, so that the first prompt does not pay for reading the weights in, and the like."""
        self.do(lambda slot, _: self.workspace.warm_up(slot, self.model.filler))
