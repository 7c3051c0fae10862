"""The scheduler: which requests run, and how many tokens of each go into the next batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from cpucache.engine.request import Priority, Request
from cpucache.reuse.work import Work
from cpucache.runtime import Batch

HELD_UP = 2.0
"""How long a chunk of a prefill may take while answers run, in steps that evaluate nothing but a token of each."""
_FIRST = 16  # tokens of a chunk while it is not known how fast they are
_SMALLEST = 4
_WEIGHT = 0.2  # of the newest measurement in an average


class Job:
    """A request that runs: its task, step by step."""

    def __init__(self, request: Request[Any]) -> None:
        self.request = request
        self._task = request.task(request)
        self.work = Work([])
        """What it wants evaluated next."""
        self.ended = False
        self.result: Any = None

    def start(self) -> None:
        """Go on to the first work. Raises what the task raises."""
        self._go(lambda: next(self._task))

    def go_on(self) -> None:
        """Go on, when its work has been evaluated, to the next, or the end. Raises what the task raises."""
        self._go(lambda: self._task.send(self.work.index))

    def fail(self, error: BaseException) -> None:
        """Tell the task that its work can't be evaluated. Raises what the task raises, usually ``error``."""
        self._go(lambda: self._task.throw(error))

    def close(self) -> None:
        """End the task where it is."""
        self.ended = True
        self._task.close()

    def _go(self, step: Callable[[], Work]) -> None:
        try:
            self.work = step()
        except StopIteration as end:
            self.ended, self.result = True, end.value
        except BaseException:
            self.ended = True
            raise


class Scheduler:
    """Puts requests in order.

    Any number of answers run side by side, as far as there are slots and cells for them, and one prefill: a chunk of it
    goes into each batch, small enough that the answers are not held up.

    Args:
        slots: Requests that run at a time, at most.
        cells: Cells of the llama.cpp context.
        batch: Tokens of a batch, at most.
    """

    def __init__(self, slots: int, cells: int, batch: int) -> None:
        self._slots = slots
        self._cells = cells
        self._batch = batch
        self.waiting: dict[Priority, deque[Request[Any]]] = {priority: deque() for priority in Priority}
        self.prefill: Job | None = None
        """The request whose prompt is being evaluated."""
        self.answers: list[Job] = []
        """Those whose answers are on their way."""
        self._token_seconds: dict[int, float] = {0: 0.0}
        self._rate: float | None = None

    @property
    def running(self) -> list[Job]:
        """The requests that run."""
        return [*self.answers, *([self.prefill] if self.prefill else [])]

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running) or any(self.waiting.values())

    @property
    def count(self) -> int:
        """How many requests run or wait."""
        return len(self.running) + sum(map(len, self.waiting.values()))

    @property
    def due(self) -> Request[Any] | None:
        """The request whose turn it is, whether there are cells for it or not."""
        if self.prefill or len(self.answers) >= self._slots:
            return None
        return next((queue[0] for queue in self.waiting.values() if queue), None)

    def add(self, request: Request[Any], *, first: bool = False) -> None:
        """Let a request wait, behind the others of its priority or as the first of them."""
        queue = self.waiting[request.priority]
        if first:
            queue.appendleft(request)
        else:
            queue.append(request)

    def overtaken(self) -> Job | None:
        """The job that has to make way for a waiting request of a higher priority."""
        job = self.prefill
        higher = job and any(self.waiting[each] for each in Priority if each < job.request.priority)
        return job if higher else None

    def next(self) -> Request[Any] | None:
        """The request that may begin now, which waits no longer."""
        request = self.due
        if request is None or not self._fits(request):
            return None
        return self.waiting[request.priority].popleft()

    def _fits(self, request: Request[Any]) -> bool:
        if not self.answers:
            return True
        if request.cells is None:
            return False
        taken = [job.request.cells for job in self.answers]
        return all(taken) and sum(cells or 0 for cells in taken) + request.cells <= self._cells

    def advance(self, job: Job) -> None:
        """Note what has become of a job that went on: its answer has begun, or it has ended."""
        if job.ended:
            self.drop(job)
        elif job is self.prefill and job.work.answers:
            self.prefill = None
            self.answers.append(job)

    def drop(self, job: Job) -> None:
        """Forget a job."""
        if job is self.prefill:
            self.prefill = None
        else:
            self.answers.remove(job)

    def fill(self, batch: Batch) -> tuple[list[Job], int]:
        """Fill a batch: a token of each answer, and a chunk of the prefill. Gives whose, and the size of the chunk."""
        for job in self.answers:
            job.work.fill(batch, self._batch)
        if self.prefill is None:
            return list(self.answers), 0
        return self.running, self.prefill.work.fill(batch, self._chunk() - batch.size)

    def _chunk(self) -> int:
        """Tokens of the next batch."""
        if not self.answers:
            return self._batch
        step = self._token_seconds.get(len(self.answers))
        size = _FIRST if step is None or self._rate is None else int(HELD_UP * step * self._rate)
        return min(self._batch, len(self.answers) + max(_SMALLEST, size))

    def learn(self, chunk: int, seconds: float) -> None:
        """Note how long a batch took: a token of each answer, and a ``chunk`` of the prefill."""
        answers = len(self.answers)
        if answers and not chunk:
            self._token_seconds[answers] = _averaged(self._token_seconds.get(answers), seconds)
        elif chunk and seconds > self._token_seconds.get(answers, seconds):
            self._rate = _averaged(self._rate, chunk / (seconds - self._token_seconds[answers]))


def _averaged(average: float | None, value: float) -> float:
    return value if average is None else (1 - _WEIGHT) * average + _WEIGHT * value
