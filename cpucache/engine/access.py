"""Access to the context: one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from cpucache.engine.stream import Stream
from cpucache.reuse import Workspace

Step = TypeVar("Step")


class Access:
    """The right to use a context. One thread has it at a time, and at most one stream runs.

    A stream keeps the right from its first piece to its end. In its own thread it ends where something else begins.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._lock = threading.RLock()
        self._running: Stream | None = None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Use the context: other threads wait, and an unfinished stream of this thread ends."""
        with self._lock:
            self._end_running()
            yield

    @contextmanager
    def streaming(self, stream: Stream) -> Iterator[None]:
        """Use the context for ``stream``. What it needs is read into memory, and kept, while it waits."""
        store = self._workspace.store
        keys: list[str] = []
        if not self._lock.acquire(blocking=False):
            keys = self._workspace.keys(stream.planned())
            with store.using(keys):
                store.prefetch(keys)
                self._lock.acquire()
        try:
            with store.using(keys), self.alone():
                self._running = stream
                yield
        finally:
            if self._running is stream:
                self._running = None
            self._lock.release()

    def stepwise(self, steps: Iterator[Step], *, wait: bool = True) -> Iterator[Step]:
        """Go through ``steps``, each alone with the context; without ``wait``, until another thread uses it."""
        while self._lock.acquire(blocking=wait):
            try:
                with self.alone():
                    step = next(steps)
            except StopIteration:
                return
            finally:
                self._lock.release()
            yield step

    def end(self) -> None:
        """End an unfinished stream of this thread. One of another thread goes on."""
        if self._lock.acquire(blocking=False):
            try:
                self._end_running()
            finally:
                self._lock.release()

    def _end_running(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()
