"""A background thread for writing, so that saving never delays an answer."""

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
    """Jobs by key, done in order by one background thread.

    The thread starts with the first job. It is a daemon thread: call ``close`` before the program ends to have waiting
    jobs done. Exceptions of ``write`` and ``idle`` are logged, and the thread continues with the next job.

    Args:
        write: Does a job, given its key.
        idle: Called whenever no job is left.
        limit: Bytes of jobs that may wait. ``put`` blocks beyond it, so that fast evaluation can't fill the memory with
            states that a slow disk has not taken yet.
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
        self._woken = False
        self._pauses = 0
        self._pressed = 0  # callers that wait for a job to end: these override `paused`

    def __contains__(self, key: str) -> bool:
        return key in self._jobs

    def get(self, key: str) -> Job | None:
        """Job of this key, ``None`` once it is done."""
        with self._changed:
            found = self._jobs.get(key)
            return found[0] if found else None

    def put(self, key: str, job: Job, size: int) -> None:
        """Adds a job of ``size`` bytes, unless its key is waiting already. Blocks while there is no room."""
        with self._changed:
            if key in self._jobs:
                return
            while self._jobs and self._waiting + size > self._limit and not self._closing:
                with self._pressing():
                    self._changed.wait()
            self._jobs[key] = (job, size)
            self._waiting += size
            self._awake()

    def drop(self, key: str) -> None:
        """Removes a job, if it is waiting. Blocks until it has ended, if it is running."""
        with self._changed:
            with self._pressing():
                while self._doing == key:
                    self._changed.wait()
            dropped = self._jobs.pop(key, None)
            if dropped is not None:
                self._waiting -= dropped[1]
                self._changed.notify_all()

    @contextmanager
    def _pressing(self) -> Iterator[None]:
        """Lets the running job continue during a block, even while the writer is ``paused``."""
        self._pressed += 1
        self._changed.notify_all()
        try:
            yield
        finally:
            self._pressed -= 1

    def wake(self) -> None:
        """Has ``idle`` called soon, even without a job."""
        with self._changed:
            self._woken = True
            self._awake()

    def _awake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cpucache-writer", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Blocks ``give_way``, and so the running job, during a block; not while a caller waits for a job to end."""
        with self._changed:
            self._pauses += 1
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                self._changed.notify_all()

    def give_way(self) -> None:
        """Called by jobs regularly: blocks while the writer is ``paused``."""
        with self._changed:
            while self._pauses and not self._pressed and not self._closing:
                self._changed.wait()

    def flush(self) -> None:
        """Blocks until all jobs are done."""
        with self._changed, self._pressing():
            while self._jobs:
                self._changed.wait()

    def close(self) -> None:
        """Does the waiting jobs and ends the thread. A later job starts another."""
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
        """Loop of the thread; ends after ``close``, once no job waits."""
        while True:
            with self._changed:
                while not (self._jobs or self._woken or self._closing):
                    self._changed.wait()
                job = next(iter(self._jobs.items()), None)
                if job is None and not self._woken:
                    return
                self._woken = False
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
                        # Only now: until the slice has its file, `get` must find it here.
                        del self._jobs[key]
                        self._doing = None
                        self._waiting -= size
                        self._changed.notify_all()
            if not self._jobs:
                try:
                    self._idle()
                except Exception as error:
                    _log.warning("uses of slices could not be recorded (%s: %s)", type(error).__name__, error)
                    _log.debug("where that happened", exc_info=True)
