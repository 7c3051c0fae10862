"""The host: a model that is loaded, and what engines, sessions and advice stand on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cpucache.engine.core import Core
from cpucache.engine.planner import Planner
from cpucache.engine.request import Priority, Request
from cpucache.layout import ChatTemplate
from cpucache.reuse import OnProgress, Slices, Workspace
from cpucache.reuse.slot import Slot
from cpucache.reuse.work import Task
from cpucache.runtime import Context, Model
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

    def forget(self) -> None:
        """Empty the llama.cpp context, as it is after a restart. The store keeps its slices."""
        self.do(lambda slot, _: self.workspace.reset(slot))

    def warm_up(self) -> None:
        """Evaluate one token, so that the first prompt does not pay for reading the weights in, and the like."""
        self.do(lambda slot, _: self.workspace.warm_up(slot, self.model.filler))
