"""The core: one thread that owns the llama.cpp context and runs the requests of all other threads."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from cpucache.engine.request import Priority, Request
from cpucache.engine.scheduler import Job, Scheduler
from cpucache.errors import ContextFull, CpucacheError
from cpucache.runtime import Batch, Context, Stopped
from cpucache.stages import profiled

PAUSE = 1.0
"""Seconds without a request after which the engine counts as idle."""
WRITING = 30.0
"""The same after the preparation of an unfinished prompt, whose tokens stay in the llama.cpp context for that time."""
_POLL = 0.05  # seconds between checks for slices that another process is encoding
_log = logging.getLogger("cpucache.engine")


class Core:
    """Runs requests step by step. Each step evaluates one batch: a token of every answer, and a chunk of one prefill.

    Args:
        context: The llama.cpp context, which only the core's thread uses until ``close`` has returned.
        slots: Maximum number of requests that run at the same time.
        idle: Called after ``PAUSE`` seconds without a request; returns a request to run, or ``None``.
    """

    def __init__(self, context: Context, slots: int, idle: Callable[[], Request[Any] | None] | None = None) -> None:
        self._context = context
        self._scheduler = Scheduler(slots, context.n_ctx, context.n_batch)
        self._idle = idle
        self._idle_at: float | None = time.monotonic() + PAUSE
        """Time at which the engine counts as idle; ``None`` once the request of ``idle`` has been started."""
        self._inbox: list[Request[Any]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._told: Request[Any] | None = None
        """The request that was last logged as waiting for cells, so that each is logged once."""
        self._thread = threading.Thread(target=self._run, name="cpucache-core", daemon=True)
        self._thread.start()

    # -- for any thread ----------------------------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """Whether a request that is submitted now may have to wait."""
        return bool(self._inbox) or self._scheduler.busy

    def submit(self, request: Request[Any]) -> bool:
        """Puts a request into the queue. Returns false for one that was submitted or cancelled before.

        Raises ``CpucacheError`` when the engine has been closed.
        """
        with self._changed:
            if self._closing:
                raise CpucacheError("the engine has been closed")
            if not request.begin():
                return False
            self._inbox.append(request)
            self._changed.notify()
            return True

    def close(self) -> None:
        """Cancels all requests, and waits until they have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- the loop ----------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        while self._receive():
            self._make_way()
            self._begin()
            if self._scheduler.running:
                self._step()
        self._end_all()

    def _receive(self) -> bool:
        """Moves new requests to the scheduler; waits for one when there is no work. Returns false to end the thread."""
        with self._changed:
            while not (self._inbox or self._closing or self._scheduler.busy):
                due = self._due()
                if due is not None and due <= 0:
                    self._idle_at = None
                    self._refine()
                else:
                    self._changed.wait(due)
            for request in self._inbox:
                if self._scheduler.busy:
                    _log.info("%s waits; running or waiting before it: %d", request.label, self._scheduler.count)
                self._scheduler.add(request)
            self._inbox.clear()
            return not self._closing

    def _due(self) -> float | None:
        """Seconds until the engine counts as idle; ``None`` without any work for that time."""
        return None if self._idle is None or self._idle_at is None else self._idle_at - time.monotonic()

    def _refine(self) -> None:
        """Starts the request of ``idle``, if it returns one."""
        try:
            request = self._idle() if self._idle else None
        except Exception:  # all requests depend on this thread, which must not end
            _log.exception("finding work for idle time failed")
            request = None
        if request is None:
            self._idle_at = time.monotonic() + PAUSE
        elif request.begin():
            self._scheduler.add(request)

    def _make_way(self) -> None:
        """Ends cancelled requests, and interrupts a prefill that must make way for another request."""
        for queue in self._scheduler.waiting.values():
            for request in [each for each in queue if each.cancelled]:
                queue.remove(request)
                self._end(request)
        job = self._scheduler.prefill
        if job and job.request.cancelled:
            self._close(job)
            self._end(job.request)
        elif job := self._scheduler.overtaken():
            _log.info("%s is interrupted by another request", job.request.label)
            self._close(job)
            if job.request.once:
                job.request.cancelled = True
                self._end(job.request)
            else:
                self._scheduler.add(job.request, first=not job.waits)

    def _end(self, request: Request[Any]) -> None:
        """Ends a request whose task was not completed."""
        request.end()
        self._idle_at = time.monotonic() + PAUSE

    def _begin(self) -> None:
        """Starts the next request, if slots and cells allow."""
        request = self._scheduler.next()
        if request is None:
            due = self._scheduler.due
            if due is not None and due is not self._told:
                self._told = due
                _log.info("%s waits for cells of the context, which running answers use", due.label)
            return
        _log.debug("%s begins", request.label)
        job = self._scheduler.prefill = Job(request)
        self._go(job, job.start)

    def _step(self) -> None:
        """Evaluates one batch, and resumes every task whose work has been evaluated."""
        scheduler = self._scheduler
        works = {job: list(job.work.runs) for job in scheduler.running}
        batch = Batch()
        jobs, chunk = scheduler.fill(batch)
        started = time.perf_counter()
        try:
            if batch.size:
                self._context.evaluate(batch, None if scheduler.answers else self._stop)
            else:
                self._wait()
        except (Stopped, ContextFull) as error:
            # llama.cpp evaluated no token of the batch, so each job gets its tokens back.
            for job in jobs:
                job.work.runs = works[job]
            if isinstance(error, ContextFull):
                # Cells for answers are reserved when they start: the prefill took too many.
                self._fail(scheduler.prefill or jobs[-1], error)
            return
        except CpucacheError as error:
            for job in jobs:
                self._fail(job, error)
            return
        took = time.perf_counter() - started
        scheduler.learn(chunk, took)
        for job in jobs:
            if job.request.profile is not None:
                job.request.profile.add("decode", took)
            work = job.work
            if work.progress and chunk and job is scheduler.prefill:
                work.progress(chunk)
            if not work.runs and not (job is scheduler.prefill and job.request.cancelled):
                self._go(job, job.go_on)

    def _stop(self) -> bool:
        """Whether to stop the batch of a prefill that runs by itself: cancelled, or a more urgent request waits."""
        job = self._scheduler.prefill
        if job is None:
            return False
        urgent = any(request.priority < job.request.priority for request in self._inbox)
        return job.request.cancelled or self._closing or urgent

    def _wait(self) -> None:
        """Waits a moment for another process, when no task has tokens to evaluate."""
        with self._changed:
            if not (self._inbox or self._closing):
                self._changed.wait(_POLL)

    # -- progress of a request ---------------------------------------------------------------------------------------
    def _go(self, job: Job, step: Callable[[], None]) -> None:
        """Resumes a job. An error of its task ends the request, whose caller gets the error."""
        request = job.request
        try:
            with nullcontext() if request.profile is None else profiled(request.profile):
                step()
        except ContextFull as error:
            nothing_frees_cells = len(self._scheduler.running) == 1 or request.cells is None
            if nothing_frees_cells or job is not self._scheduler.prefill:
                request.end(error=error)
            else:
                # Encoding missing slices took more cells than were reserved: the request starts over by itself.
                _log.info("%s: the context is full; it starts again when no other request runs", request.label)
                request.cells = None
                self._scheduler.add(request, first=True)
        except BaseException as error:  # all requests depend on this thread, which must not end
            _log.debug("%s failed", request.label, exc_info=True)
            request.end(error=error)
        else:
            if job.ended:
                request.end(job.result)
        self._scheduler.advance(job)
        if request.priority < Priority.REFINE and job.ended:
            self._idle_at = time.monotonic() + (WRITING if request.once else PAUSE)

    def _fail(self, job: Job, error: CpucacheError) -> None:
        """Raises an error in the task of a job."""
        self._go(job, lambda: job.fail(error))

    def _close(self, job: Job) -> None:
        """Closes the task of a job, in any state, and frees its slot."""
        try:
            job.close()
        except Exception:
            _log.exception("closing a cancelled request failed")
        self._scheduler.drop(job)

    def _end_all(self) -> None:
        """Cancels every request. Running answers end with their text so far."""
        scheduler = self._scheduler
        waiting = [request for queue in scheduler.waiting.values() for request in queue]
        for request in [*waiting, *(job.request for job in scheduler.running)]:
            request.cancelled = True
        self._make_way()
        while scheduler.running:
            self._step()
