"""Writing in the background, so that saving never delays an answer."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

_log = logging.getLogger(__name__)
Job = TypeVar("Job")


class Writer(Generic[Job]):
    """Jobs by key, done one after the other by a thread of its own, in the order in which they came.

    At most ``limit`` bytes wait: a caller with more has to wait itself, so that a fast evaluation can't fill the memory
    with what a slow disk has not taken yet. ``write`` does a job, ``idle`` is called whenever there is nothing left to
    do. What either of them raises is logged, and the thread goes on with the next job. The thread starts with the first
    job and does not keep a program from ending; call ``close`` for what still waits.
    """

    def __init__(self, write: Callable[[str, Job], None], idle: Callable[[], None], *, limit: int) -> None:
        self._write = write
        self._idle = idle
        self._limit = limit
        self._jobs: OrderedDict[str, tuple[Job, int]] = OrderedDict()
        self._doing: str | None = None
        self._waiting = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._poked = False
        self._quiet = 0
        self._pressed = 0  # callers that wait for room

    def __contains__(self, key: str) -> bool:
        return key in self._jobs

    def get(self, key: str) -> Job | None:
        """The job of this key, if it has not been done yet."""
        with self._changed:
            found = self._jobs.get(key)
            return found[0] if found else None

    def put(self, key: str, job: Job, size: int) -> None:
        """Have a job done. Waits while too much is waiting already."""
        with self._changed:
            if key in self._jobs:
                return
            while self._jobs and self._waiting + size > self._limit and not self._closing:
                self._pressed += 1
                self._changed.notify_all()
                self._changed.wait()
                self._pressed -= 1
            self._jobs[key] = (job, size)
            self._waiting += size
            self._awake()

    def drop(self, key: str) -> None:
        """Have a job not done after all. Waits for the end of one that is under way."""
        with self._changed:
            self._pressed += 1
            self._changed.notify_all()
            while self._doing == key:
                self._changed.wait()
            self._pressed -= 1
            dropped = self._jobs.pop(key, None)
            if dropped is not None:
                self._waiting -= dropped[1]
                self._changed.notify_all()

    def wake(self) -> None:
        """Have ``idle`` called soon, though nothing is to be written."""
        with self._changed:
            self._poked = True
            self._awake()

    def _awake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cpucache-writer", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Meanwhile, a job that calls ``give_way`` stands still, unless a caller of ``put`` is waiting for it."""
        with self._changed:
            self._quiet += 1
        try:
            yield
        finally:
            with self._changed:
                self._quiet -= 1
                self._changed.notify_all()

    def give_way(self) -> None:
        """For a job to call now and then: comes back when nobody wants it ``paused``."""
        with self._changed:
            while self._quiet and not self._pressed and not self._closing:
                self._changed.wait()

    def flush(self) -> None:
        """Wait until everything has been done."""
        with self._changed:
            self._pressed += 1
            self._changed.notify_all()
            while self._jobs:
                self._changed.wait()
            self._pressed -= 1

    def close(self) -> None:
        """Do what is waiting, and end the thread. A later job starts another."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            thread.join()
        with self._changed:
            self._thread = None
            self._closing = False

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._jobs or self._poked or self._closing):
                    self._changed.wait()
                job = next(iter(self._jobs.items()), None)
                if job is None and not self._poked:
                    return
                self._poked = False
                self._doing = job[0] if job else None
            if job is not None:
                key, (what, size) = job
                try:
                    self._write(key, what)
                except Exception as error:
                    _log.warning("%s was not written (%s: %s)", key, type(error).__name__, error)
                    _log.debug("where that happened", exc_info=True)
                finally:
                    with self._changed:
                        # Only now: until a slice lies in its file, it is found here.
                        del self._jobs[key]
                        self._doing = None
                        self._waiting -= size
                        self._changed.notify_all()
            if not self._jobs:
                try:
                    self._idle()
                except Exception as error:
                    _log.warning("what was used could not be noted (%s: %s)", type(error).__name__, error)
                    _log.debug("where that happened", exc_info=True)
