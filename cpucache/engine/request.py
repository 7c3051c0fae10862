"""Requests: tasks for the core, and what their callers are told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import IntEnum
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from cpucache.errors import CpucacheError
from cpucache.reuse import OnProgress
from cpucache.reuse.work import Task
from cpucache.stages import current

T = TypeVar("T")
Event: TypeAlias = "str | tuple[int, int] | None"
"""A piece of an answer, progress in tokens (done, total), or ``None``: the request has ended."""


class Priority(IntEnum):
    """What is served first. A request of ``ANSWER`` takes the place of one below it, which begins again later."""

    ANSWER = 0
    ENCODE = 1
    REFINE = 2


class Request(Generic[T]):
    """A task for the core.

    The core's thread runs the task, and tells the request about pieces, progress and the end. Any thread may wait for
    these, or cancel the request: whether it waits, runs or has ended, no other request is touched.

    Args:
        task: Makes the task, and makes it anew where the request has to begin again.
        cells: Cells of the llama.cpp context that it needs at most; ``None``: all, so that it runs alone.
        priority: What is served first.
        label: What the log calls it.
    """

    def __init__(
        self,
        task: Callable[[Request[T]], Task[T]],
        *,
        cells: int | None = None,
        priority: Priority = Priority.ANSWER,
        label: str = "",
    ) -> None:
        self.task = task
        self.label = label or Priority(priority).name.lower()
        self.cells = cells
        self.priority = priority
        self.profile = current()
        """Told where its time goes, if anybody asked."""
        self.cancelled = False
        """Whether it is to end as soon as possible."""
        self.begun = False
        """Whether the core has been given it."""
        self.at_end: Callable[[], None] | None = None
        """Called when it has ended."""
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._put: Callable[[Event], None] = self._events.put
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    # -- for the core, and its thread --------------------------------------------------------------------------------
    def begin(self) -> bool:
        """Note that the core has been given it. False: it was given before, or cancelled."""
        with self._lock:
            if self.begun or self.cancelled:
                return False
            self.begun = True
            return True

    def tell(self, piece: str) -> None:
        """Hand out a piece of an answer."""
        self._put(piece)

    def progress(self, done: int, total: int) -> None:
        """Hand out progress in tokens."""
        self._put((done, total))

    def end(self, result: T | None = None, error: BaseException | None = None) -> None:
        """Note that it has ended, in whatever way, once."""
        self._result, self._error = result, error
        if self.at_end:
            self.at_end()
        self._ended.set()
        self._put(None)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Have events given to ``listener``, in the core's thread, instead of to ``next``. Before it begins."""
        self._put = listener

    # -- for callers -------------------------------------------------------------------------------------------------
    def cancel(self) -> None:
        """Make it end as soon as possible: within one step of the core."""
        with self._lock:
            self.cancelled = True
            if not self.begun:
                self.begun = True
                self.end()

    def next(self) -> Event:
        """The next event; ``None`` for ever after the end. Raises, once, what the task raised."""
        event = self._events.get()
        if event is None:
            self._events.put(None)
            error, self._error = self._error, None
            if error is not None:
                raise error
        return event

    @property
    def error(self) -> BaseException | None:
        """What the task raised, if it has ended so and nobody was told."""
        return self._error

    def wait(self) -> None:
        """Wait until it has ended. Returns at once for one that the core was never given."""
        if self.begun:
            self._ended.wait()

    def result(self, progress: OnProgress | None = None) -> T:
        """What the task returns, when it has ended. ``progress(done, total)`` is called in this thread.

        Where waiting is interrupted, for example by Ctrl-C, the request is cancelled. Raises what the task raised, and
        ``CpucacheError`` when it was cancelled.
        """
        try:
            while (event := self.next()) is not None:
                if progress and isinstance(event, tuple):
                    progress(*event)
        except BaseException:
            self.cancel()
            self.wait()
            raise
        if self.cancelled and self._result is None:
            raise CpucacheError("cancelled: the engine has been closed")
        return self._result  # type: ignore[return-value]
