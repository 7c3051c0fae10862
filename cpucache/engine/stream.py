"""A stream: an answer, as its caller reads it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from cpucache.engine.answer import Answer, TokenLogprobs
from cpucache.engine.host import Host
from cpucache.engine.reply import Metrics, Reply
from cpucache.engine.request import Request
from cpucache.reuse import OnProgress, Plan


class Stream:
    """Pieces of an answer, as an iterator; the prompt is evaluated when the first is asked for.

    From then on the answer goes its way, whether its pieces are read or not: a stream that is left half-read makes
    nobody wait for longer than the answer takes. ``stop`` and ``close`` end it, from any thread and in any state, and
    touch no other answer; so does forgetting the stream, and Ctrl-C while a piece is waited for. ``text`` and
    ``metrics`` hold what there is of it, also then (``metrics.finish`` is ``"interrupted"``).

    Args:
        host: Has the core that gives the answer.
        answer: Has not begun.
        n_tokens: Tokens of the prompt.
        progress: ``progress(done, total)`` is told about tokens evaluated before the first token of the answer, in the
            thread that reads the stream.
    """

    def __init__(self, host: Host, answer: Answer, n_tokens: int, progress: OnProgress | None = None) -> None:
        self._host = host
        self._answer = answer
        # One more, for the token that applies a shift.
        cells = min(n_tokens + answer.max_tokens + 1, host.context.n_ctx)
        self.request: Request[None] = Request(answer.task, cells=cells, label=answer.label)
        """What the core is given when the answer begins."""
        self._beginning = threading.Lock()
        self._progress = progress
        self._closed = False

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            self.begin()
            while not self._closed and (event := self.request.next()) is not None:
                if isinstance(event, str):
                    return event
                if self._progress:
                    self._progress(*event)
        except BaseException:
            self.close()
            raise
        raise StopIteration

    def __del__(self) -> None:
        self.request.cancel()

    def begin(self) -> None:
        """Have the prompt evaluated, without waiting for a piece. Nothing happens the second time."""
        with self._beginning:
            if self.request.begun:
                return
            if self._host.core.busy:
                self._wait_in_line()
            else:
                self._host.core.submit(self.request)

    def _wait_in_line(self) -> None:
        """Give the prompt to a core that is busy. What it needs is read into memory, and kept there, while it waits."""
        host, request = self._host, self.request
        keys = host.workspace.keys(self.planned())
        once = threading.Lock()

        def let_go() -> None:
            if once.acquire(blocking=False):
                host.store.let_go(keys)

        host.store.hold(keys)
        request.at_end = let_go
        accepted = False
        try:
            host.store.prefetch(keys)
            accepted = host.core.submit(request)
        finally:
            # It may have been cancelled before it knew what to let go.
            if not accepted:
                let_go()

    # -- the answer so far -------------------------------------------------------------------------------------------
    @property
    def text(self) -> str:
        """The text of the answer so far, whether its pieces have been read or not."""
        return self._answer.text

    @property
    def metrics(self) -> Metrics:
        """What the answer has taken so far."""
        return self._answer.metrics

    @property
    def tokens(self) -> list[int]:
        """The tokens of the answer so far."""
        return self._answer.tokens

    @property
    def evaluated(self) -> int:
        """How many of them have been evaluated: all but the last, or the last as well."""
        return self._answer.evaluated

    @property
    def plan(self) -> Plan:
        """The plan that was spliced; empty until the prompt has been evaluated."""
        return self._answer.plan

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of each token of the answer, if the sampling asks for them."""
        return self._answer.logprobs

    def planned(self) -> Plan:
        """The plan of the prompt by the slices that there are at the moment."""
        return self._answer.planned()

    # -- its end -----------------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """End the answer as soon as possible. What there is of it can still be read."""
        self.request.cancel()

    def close(self) -> None:
        """End the answer, and wait until it has ended. No more pieces come."""
        self._closed = True
        self.stop()
        self.request.wait()

    def reply(self) -> Reply:
        """The whole answer; what has not come yet is waited for."""
        for _ in self:
            pass
        return Reply(self.text, self.metrics)
