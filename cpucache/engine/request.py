"""Requests: tasks for the core, and the events that their callers receive."""

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
    """Priority of a request, the smallest number first.

    A request interrupts the prefill of one of lower priority, which starts over later or, with ``once``, ends.
    """

    ANSWER = 0
    ENCODE = 1
    PREPARE = 2
    REFINE = 3


class Request(Generic[T]):
    """A task for the core.

    The core's thread runs the task and hands out its events: pieces, progress, and the end. Any thread may wait for
    events, or cancel the request in any state; no other request is affected.

    Args:
        task: Builds the task; called again when the request has to start over.
        cells: Maximum number of cells of the llama.cpp context that it takes. With ``None``, which means all cells, no
            other request runs at the same time.
        priority: Priority in the queue.
        once: Whether the request ends when another one interrupts it, instead of starting over later.
        label: Name of the request in the log.
    """

    def __init__(
        self,
        task: Callable[[Request[T]], Task[T]],
        *,
        cells: int | None = None,
        priority: Priority = Priority.ANSWER,
        once: bool = False,
        label: str = "",
    ) -> None:
        self.task = task
        self.label = label or Priority(priority).name.lower()
        self.cells = cells
        self.priority = priority
        self.once = once
        self.profile = current()
        """The profile that collects the time of each stage, if the caller has started one."""
        self.cancelled = False
        """Whether the request should end as soon as possible."""
        self.begun = False
        """Whether the request has been submitted to the core, or cancelled before that."""
        self.at_end: Callable[[], None] | None = None
        """Called when the request ends."""
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._put: Callable[[Event], None] = self._events.put
        self._progress: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._result: T | None = None
        self._error: BaseException | None = None

    # -- for the core, and its thread --------------------------------------------------------------------------------
    def begin(self) -> bool:
        """Marks the request as submitted. Returns false for one that was submitted or cancelled before."""
        with self._lock:
            if self.begun or self.cancelled:
                return False
            self.begun = True
            return True

    def tell(self, piece: str) -> None:
        """Hands out a piece of an answer."""
        self._put(piece)

    def progress(self, done: int, total: int) -> None:
        """Hands out progress in tokens, if it has changed. A task that starts over repeats what it has told."""
        if (done, total) != self._progress:
            self._progress = (done, total)
            self._put(self._progress)

    def end(self, result: T | None = None, error: BaseException | None = None) -> None:
        """Ends the request with a result, an error, or neither. Called once."""
        self._result, self._error = result, error
        if self.at_end:
            self.at_end()
        self._ended.set()
        self._put(None)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Sends events to ``listener``, in the core's thread, instead of to ``next``. Call it before ``begin``."""
        self._put = listener

    # -- for callers -------------------------------------------------------------------------------------------------
    def cancel(self) -> None:
        """Ends the request as soon as possible, within one step of the core."""
        with self._lock:
            self.cancelled = True
            if not self.begun:
                self.begun = True
                self.end()

    def next(self) -> Event:
        """Waits for the next event; returns ``None`` always after the end. Raises the error of the task once."""
        event = self._events.get()
        if event is None:
            self._events.put(None)
            error, self._error = self._error, None
            if error is not None:
                raise error
        return event

    @property
    def ended(self) -> bool:
        """Whether the request has ended, complete or not."""
        return self._ended.is_set()

    @property
    def error(self) -> BaseException | None:
        """The error of the task, if ``next`` has not raised it yet."""
        return self._error

    def wait(self) -> None:
        """Waits until the request has ended. Returns at once if it was never submitted."""
        if self.begun:
            self._ended.wait()

    def result(self, progress: OnProgress | None = None) -> T:
        """Waits for the end, and returns the result of the task. ``progress(done, total)`` is called in this thread.

        An interruption of the wait, such as Ctrl-C, cancels the request. Raises the error of the task, and
        ``CpucacheError`` when the request was cancelled or another one ended it.
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
            raise CpucacheError("cancelled: the engine has been closed, or another request has replaced this one")
        return self._result  # type: ignore[return-value]
