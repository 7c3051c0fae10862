"""Background work: jobs that encode or prefill ahead of time, one after the other, while no answer is running."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from cpucache.errors import CpucacheError
from cpucache.reuse import OnProgress
from cpucache.server.failures import Refusal

State: TypeAlias = Literal["waiting", "running", "done", "failed", "cancelled"]
_log = logging.getLogger("cpucache.server")


class _Cancelled(Exception):
    pass


class Job:
    """A unit of background work with its state and result.

    Args:
        work: Does the work and returns the result. It must call its argument to report progress.
        at_end: Called in the background thread when the job has ended, also after a failure or cancellation.
    """

    def __init__(self, work: Callable[[OnProgress], Any], at_end: Callable[[], None] | None = None) -> None:
        self.state: State = "waiting"
        self.result: Any = None
        self.error: Exception | None = None
        self._work = work
        self._at_end = at_end

    @property
    def active(self) -> bool:
        """Whether the job waits or runs."""
        return self.state in ("waiting", "running")

    def cancel(self) -> None:
        """Cancels the job: at once if it waits, else when the work next reports progress."""
        if self.active:
            self.state = "cancelled"

    def run(self) -> None:
        """Does the work in the calling thread. Errors are kept in ``error``, not raised."""
        if self.state == "waiting":
            self.state = "running"
            try:
                self.result = self._work(self._progress)
                self.state = "done" if self.state == "running" else self.state
            except _Cancelled:
                pass
            except Exception as error:
                self.error = error
                self.state = "failed" if self.state == "running" else self.state
                if not isinstance(error, CpucacheError):
                    _log.exception("work in the background failed")
        if self._at_end:
            self._at_end()

    def _progress(self, _done: int, _total: int) -> None:
        if self.state == "cancelled":
            raise _Cancelled


class Background:
    """Runs jobs in order in a thread of its own, which ends when the queue is empty.

    Args:
        limit: Number of jobs that may wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: deque[Job] = deque()
        self._lock = threading.Lock()
        self._running: Job | None = None
        self._thread: threading.Thread | None = None

    def add(self, job: Job) -> Job:
        """Queues a job and returns it. Raises ``Refusal`` (429) if ``limit`` jobs wait already."""
        with self._lock:
            if len(self._jobs) >= self._limit:
                raise Refusal(429, f"{self._limit} jobs are waiting already; try again later", retry_after=5)
            self._jobs.append(job)
            if self._thread is None:
                # A daemon: it may wait for an engine that is closed already, and must not keep the process alive.
                self._thread = threading.Thread(target=self._run, name="cpucache-background", daemon=True)
                self._thread.start()
        return job

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return self._thread is not None

    def close(self) -> None:
        """Cancels all jobs."""
        with self._lock:
            for job in [*self._jobs, *([self._running] if self._running else [])]:
                job.cancel()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._running = self._thread = None
                    return
                self._running = job = self._jobs.popleft()
            job.run()
