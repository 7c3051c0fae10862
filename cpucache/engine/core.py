"""The core: one thread that owns a llama.cpp context, and runs the requests of all others."""

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
"""Seconds without a request after which the machine counts as idle."""
_POLL = 0.05  # seconds between looks at what another process is making
_log = logging.getLogger("cpucache.engine")


class Core:
    """Runs requests, each step in one batch: a token of every answer, and a chunk of one prefill.

    Args:
        context: Used by this thread alone, until ``close`` has returned.
        slots: Requests that run at a time, at most.
        idle: Asked for a request when nothing has been asked for ``PAUSE`` seconds.
    """

    def __init__(self, context: Context, slots: int, idle: Callable[[], Request[Any] | None] | None = None) -> None:
        self._context = context
        self._scheduler = Scheduler(slots, context.n_ctx, context.n_batch)
        self._idle = idle
        self._idle_at: float | None = time.monotonic() + PAUSE
        """When the machine counts as idle; ``None``: what there was to do then has been done."""
        self._idling: Request[Any] | None = None
        self._inbox: list[Request[Any]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._told: Request[Any] | None = None
        """The request of which the log says that it waits for cells."""
        self._thread = threading.Thread(target=self._run, name="cpucache-core", daemon=True)
        self._thread.start()

    # -- for any thread ----------------------------------------------------------------------------------------------
    @property
    def busy(self) -> bool:
        """Whether a request that comes now may have to wait."""
        return bool(self._inbox) or self._scheduler.busy

    def submit(self, request: Request[Any]) -> bool:
        """Give a request to the core. False: it has been cancelled. Raises ``CpucacheError``."""
        with self._changed:
            if self._closing:
                raise CpucacheError("the engine has been closed")
            if not request.begin():
                return False
            self._inbox.append(request)
            self._changed.notify()
            return True

    def close(self) -> None:
        """Cancel all requests, and wait until they have ended."""
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
        """Take the requests that have come; without any, and nothing else to do, wait for one. False: end."""
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
        """Seconds until the machine counts as idle."""
        return None if self._idle is None or self._idle_at is None else self._idle_at - time.monotonic()

    def _refine(self) -> None:
        try:
            request = self._idle() if self._idle else None
        except Exception:  # this thread lives on
            _log.exception("what to do when idle can't be told")
            request = None
        if request is None:
            self._idle_at = time.monotonic() + PAUSE
        elif request.begin():
            self._idling = request
            self._scheduler.add(request)

    def _make_way(self) -> None:
        """End what has been cancelled, and put aside what a request of higher priority overtakes."""
        for queue in self._scheduler.waiting.values():
            for request in [each for each in queue if each.cancelled]:
                queue.remove(request)
                self._end(request)
        job = self._scheduler.prefill
        if job and job.request.cancelled:
            self._close(job)
            self._end(job.request)
        elif job := self._scheduler.overtaken():
            _log.info("%s makes way for a request of higher priority", job.request.label)
            self._close(job)
            if job.request is self._idling:
                self._end(job.request)
            else:
                self._scheduler.add(job.request, first=True)

    def _end(self, request: Request[Any]) -> None:
        """End a request that did not run to its end."""
        request.end()
        self._idle_at = time.monotonic() + PAUSE

    def _begin(self) -> None:
        """Begin the next request, if one may."""
        request = self._scheduler.next()
        if request is None:
            due = self._scheduler.due
            if due is not None and due is not self._told:
                self._told = due
                _log.info("%s waits for cells of the context, which the answers under way take", due.label)
            return
        _log.debug("%s begins", request.label)
        job = self._scheduler.prefill = Job(request)
        self._go(job, job.start)

    def _step(self) -> None:
        """Evaluate one batch, and let those go on whose work is done."""
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
            # None of it has been evaluated.
            for job in jobs:
                job.work.runs = works[job]
            if isinstance(error, ContextFull):
                # Answers have cells of their own: what took too many is the prefill.
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
        """Whether a lone prefill is to be stopped: it is cancelled, or has to make way."""
        job = self._scheduler.prefill
        if job is None:
            return False
        urgent = any(request.priority < job.request.priority for request in self._inbox)
        return job.request.cancelled or self._closing or urgent

    def _wait(self) -> None:
        """Wait for another process."""
        with self._changed:
            if not (self._inbox or self._closing):
                self._changed.wait(_POLL)

    # -- what becomes of a request -----------------------------------------------------------------------------------
    def _go(self, job: Job, step: Callable[[], None]) -> None:
        """Let a job go on. What it raises is its caller's."""
        request = job.request
        try:
            with nullcontext() if request.profile is None else profiled(request.profile):
                step()
        except ContextFull as error:
            alone = len(self._scheduler.running) == 1 or request.cells is None
            if alone or job is not self._scheduler.prefill:
                request.end(error=error)
            else:
                # Making slices that were missing took more cells than the prompt has: it begins again, alone.
                _log.info("%s: the context is full; it begins again with nothing beside it", request.label)
                request.cells = None
                self._scheduler.add(request, first=True)
        except BaseException as error:  # whatever it is, this thread lives on
            _log.debug("%s failed", request.label, exc_info=True)
            request.end(error=error)
        else:
            if job.ended:
                request.end(job.result)
        self._scheduler.advance(job)
        if request.priority < Priority.REFINE and job.ended:
            self._idle_at = time.monotonic() + PAUSE

    def _fail(self, job: Job, error: CpucacheError) -> None:
        self._go(job, lambda: job.fail(error))

    def _close(self, job: Job) -> None:
        """End a task where it is."""
        try:
            job.close()
        except Exception:
            _log.exception("a request failed when it was cancelled")
        self._scheduler.drop(job)

    def _end_all(self) -> None:
        """Cancel every request. Answers end with what there is of them."""
        scheduler = self._scheduler
        waiting = [request for queue in scheduler.waiting.values() for request in queue]
        for request in [*waiting, *(job.request for job in scheduler.running)]:
            request.cancelled = True
        self._make_way()
        while scheduler.running:
            self._step()
