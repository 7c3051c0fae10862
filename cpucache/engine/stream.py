"""A stream: the iterator that callers read an answer from."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from cpucache.engine.answer import Answer, TokenLogprobs
from cpucache.engine.host import Host
from cpucache.engine.reply import Metrics, Reply
from cpucache.engine.request import Request
from cpucache.reuse import OnProgress, Plan


class Stream:
    """An iterator over the pieces of an answer. The prompt is evaluated when the first piece is requested.

    From then on the answer continues to its end, whether its pieces are read or not, so a stream that is read only in
    part delays other requests no longer than the answer takes.

    ``stop`` and ``close`` end the answer, from any thread and in any state, without effect on other answers. The answer
    also ends when the stream is garbage-collected, and on Ctrl-C while the caller waits for a piece. ``text`` and
    ``metrics`` hold the answer so far, also afterwards; ``metrics.finish`` is then ``"interrupted"``.

    Args:
        host: Host whose core evaluates the answer.
        answer: Answer that has not started.
        n_tokens: Length of the prompt in tokens.
        progress: Called as ``progress(done, total)``, in tokens evaluated before the first token of the answer, by the
            thread that reads the stream.
    """

    def __init__(self, host: Host, answer: Answer, n_tokens: int, progress: OnProgress | None = None) -> None:
        self._host = host
        self._answer = answer
        # The extra cell is for the token that applies a shift.
        cells = min(n_tokens + answer.max_tokens + 1, host.context.n_ctx)
        self.request: Request[None] = Request(answer.task, cells=cells, label=answer.label)
        """The request that ``begin`` submits to the core."""
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
        """Submits the prompt for evaluation without waiting for a piece. Further calls have no effect."""
        with self._beginning:
            if self.request.begun:
                return
            if self._host.core.busy:
                self._wait_in_line()
            else:
                self._host.core.submit(self.request)

    def _wait_in_line(self) -> None:
        """Submits the prompt to a busy core; meanwhile its slices are read into memory and protected from eviction."""
        host, request = self._host, self.request
        keys = host.kv_cache.keys(self.planned())
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
            # A request cancelled before ``at_end`` was set does not call it.
            if not accepted:
                let_go()

    # -- the answer so far -------------------------------------------------------------------------------------------
    @property
    def text(self) -> str:
        """The text of the answer so far, including pieces that have not been read."""
        return self._answer.text

    @property
    def metrics(self) -> Metrics:
        """Token counts, and times in milliseconds, so far."""
        return self._answer.metrics

    @property
    def tokens(self) -> list[int]:
        """The tokens of the answer so far."""
        return self._answer.tokens

    @property
    def evaluated(self) -> int:
        """Number of these tokens that have been evaluated: all, or all but the last."""
        return self._answer.evaluated

    @property
    def plan(self) -> Plan:
        """The plan that was spliced; empty until the prompt has been evaluated."""
        return self._answer.plan

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Log probabilities of each sampled token so far, if ``Sampling.logprobs`` is set."""
        return self._answer.logprobs

    def planned(self) -> Plan:
        """The plan of the prompt, by the slices that exist now."""
        return self._answer.planned()

    # -- end of the answer -------------------------------------------------------------------------------------------
    def stop(self) -> None:
        """Ends the answer as soon as possible. Pieces that exist by then can still be read."""
        self.request.cancel()

    def close(self) -> None:
        """Ends the answer, and waits until it has ended. The stream returns no more pieces."""
        self._closed = True
        self.stop()
        self.request.wait()

    def reply(self) -> Reply:
        """Reads the remaining pieces, and returns the whole answer."""
        for _ in self:
            pass
        return Reply(self.text, self.metrics)
