"""The scheduler: decides which requests run, and how many tokens of each go into the next batch."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from cpucache.engine.request import Priority, Request
from cpucache.reuse.work import Work
from cpucache.runtime import Batch

HELD_UP = 2.0
"""Time limit for a chunk of a prefill beside running answers, in steps that evaluate one token for each answer."""
_FIRST = 16  # tokens of a chunk before the rate of the prefill is known
_SMALLEST = 4  # tokens of a chunk, however slow the prefill is
AHEAD = 64
"""Tokens of a batch of a preparation. A request that interrupts it loses no more work than that."""
WAITS = 0.5
"""Seconds after its start at which a prefill that only waits for another process makes way for other requests."""
_WEIGHT = 0.2  # of the newest measurement in an average


class Job:
    """A running request, with its task and the tokens that the task wants evaluated."""

    def __init__(self, request: Request[Any]) -> None:
        self.request = request
        self.started = time.monotonic()
        self._task = request.task(request)
        self.work = Work([])
        """Tokens to evaluate before the task is resumed."""
        self.ended = False
        self.result: Any = None

    @property
    def waits(self) -> bool:
        """Whether the task only waits for another process: it has no tokens to evaluate."""
        return not self.work.runs

    def start(self) -> None:
        """Runs the task up to its first work. Raises errors of the task."""
        self._go(lambda: next(self._task))

    def go_on(self) -> None:
        """Resumes the task after its work has been evaluated, up to its next work or its end. Raises its errors."""
        self._go(lambda: self._task.send(self.work.index))

    def fail(self, error: BaseException) -> None:
        """Raises ``error`` in the task, whose work can't be evaluated. Raises errors of the task, usually ``error``."""
        self._go(lambda: self._task.throw(error))

    def close(self) -> None:
        """Closes the task at its current step."""
        self.ended = True
        self._task.close()

    def _go(self, step: Callable[[], Work]) -> None:
        """Sets ``work`` to the result of ``step``, or ``result`` and ``ended`` when the task has ended."""
        try:
            self.work = step()
        except StopIteration as end:
            self.ended, self.result = True, end.value
        except BaseException:
            self.ended = True
            raise


class Scheduler:
    """Orders requests by priority, and shares batches among those that run.

    As many answers run at the same time as slots and cells allow, and one prefill. Each batch gets a chunk of the
    prefill, small enough not to delay the answers much (``HELD_UP``).

    Args:
        slots: Maximum number of requests that run at the same time.
        cells: Cells of the llama.cpp context.
        batch: Maximum number of tokens of a batch.
    """

    def __init__(self, slots: int, cells: int, batch: int) -> None:
        self._slots = slots
        self._cells = cells
        self._batch = batch
        self.waiting: dict[Priority, deque[Request[Any]]] = {priority: deque() for priority in Priority}
        self.prefill: Job | None = None
        """The request whose prompt is being evaluated."""
        self.answers: list[Job] = []
        """The requests whose prompts have been evaluated and whose answers are being decoded."""
        self._token_seconds: dict[int, float] = {0: 0.0}
        self._rate: float | None = None

    @property
    def running(self) -> list[Job]:
        """The requests that run, the prefill last."""
        return [*self.answers, *([self.prefill] if self.prefill else [])]

    @property
    def busy(self) -> bool:
        """Whether any request runs or waits."""
        return bool(self.running) or any(self.waiting.values())

    @property
    def count(self) -> int:
        """Number of requests that run or wait."""
        return len(self.running) + sum(map(len, self.waiting.values()))

    @property
    def due(self) -> Request[Any] | None:
        """The first waiting request, if no prefill runs and a slot is free; cells are not checked."""
        if self.prefill or len(self.answers) >= self._slots:
            return None
        return next((queue[0] for queue in self.waiting.values() if queue), None)

    def add(self, request: Request[Any], *, first: bool = False) -> None:
        """Adds a request to the queue of its priority, at the end or, with ``first``, at the front."""
        queue = self.waiting[request.priority]
        if first:
            queue.appendleft(request)
        else:
            queue.append(request)

    def overtaken(self) -> Job | None:
        """The prefill, if it must make way for a request in the queue.

        It must for one of higher priority, and, if it only waits for another process, for one of its own priority.
        """
        job = self.prefill
        if job is None:
            return None
        higher = any(self.waiting[each] for each in Priority if each < job.request.priority)
        beside = self.waiting[job.request.priority]
        idles = job.waits and time.monotonic() - job.started >= WAITS
        return job if higher or (idles and beside and self._fits(beside[0])) else None

    def next(self) -> Request[Any] | None:
        """Removes the request that may start now from its queue, and returns it; ``None`` if none may start."""
        request = self.due
        if request is None or not self._fits(request):
            return None
        return self.waiting[request.priority].popleft()

    def _fits(self, request: Request[Any]) -> bool:
        """Whether the cells suffice for a request beside the running answers. By itself, every request may start."""
        if not self.answers:
            return True
        if request.cells is None:
            return False
        taken = [job.request.cells for job in self.answers]
        return all(taken) and sum(cells or 0 for cells in taken) + request.cells <= self._cells

    def advance(self, job: Job) -> None:
        """Updates the lists for a job that was resumed: its answer may have started, or it may have ended."""
        if job.ended:
            self.drop(job)
        elif job is self.prefill and job.work.answers:
            self.prefill = None
            self.answers.append(job)

    def drop(self, job: Job) -> None:
        """Removes a job that has ended."""
        if job is self.prefill:
            self.prefill = None
        else:
            self.answers.remove(job)

    def fill(self, batch: Batch) -> tuple[list[Job], int]:
        """Fills a batch with a token of each answer and a chunk of the prefill.

        Returns the jobs that have tokens in it, and the size of the chunk in tokens.
        """
        for job in self.answers:
            job.work.fill(batch, self._batch)
        if self.prefill is None:
            return list(self.answers), 0
        return self.running, self.prefill.work.fill(batch, self._chunk() - batch.size)

    def _chunk(self) -> int:
        """Maximum size of the next batch in tokens, the tokens of answers included."""
        if not self.answers:
            ahead = self.prefill is not None and self.prefill.request.priority is Priority.PREPARE
            return min(AHEAD, self._batch) if ahead else self._batch
        step = self._token_seconds.get(len(self.answers))
        size = _FIRST if step is None or self._rate is None else int(HELD_UP * step * self._rate)
        return min(self._batch, len(self.answers) + max(_SMALLEST, size))

    def learn(self, chunk: int, seconds: float) -> None:
        """Updates the measured rates by the time of a batch: a token of each answer, and ``chunk`` prefill tokens."""
        answers = len(self.answers)
        if answers and not chunk:
            self._token_seconds[answers] = _averaged(self._token_seconds.get(answers), seconds)
        elif chunk and seconds > self._token_seconds.get(answers, seconds):
            self._rate = _averaged(self._rate, chunk / (seconds - self._token_seconds[answers]))


def _averaged(average: float | None, value: float) -> float:
    """Exponential moving average after a new value."""
    return value if average is None else (1 - _WEIGHT) * average + _WEIGHT * value
