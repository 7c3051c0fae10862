"""An answer under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict

import numpy as np

from cpucache.engine.reply import Metrics, Reply
from cpucache.engine.text import TextStream
from cpucache.errors import InputError
from cpucache.reuse import OnProgress, Plan, Workspace
from cpucache.runtime import Sampler, Sampling


class Stream:
    """Pieces of an answer, as an iterator; the prompt is evaluated when the first is asked for.

    ``text`` and ``metrics`` hold what has come so far, also after Ctrl-C (``metrics.finish`` is then
    ``"interrupted"``). An engine answers one prompt at a time: other threads wait until a stream has ended, and in its
    own thread, which alone may iterate it, a stream ends where the next one begins.
    """

    def __init__(
        self,
        workspace: Workspace,
        plan: Callable[[], Plan],
        sampling: Sampling,
        *,
        max_tokens: int,
        started: float,
        turn: Callable[[Stream], AbstractContextManager[None]],
        schema: str = "",
        use_cache: bool = True,
        progress: OnProgress | None = None,
        at_start: Callable[[Stream], None] | None = None,
        at_first: Callable[[Stream], None] | None = None,
        at_end: Callable[[Stream], None] | None = None,
    ) -> None:
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens!r}: must be a number of at least 1")
        self.text = ""
        self.tokens: list[int] = []
        """The tokens of the answer so far."""
        self.evaluated = 0
        """How many of them the context holds: all but the last, or the last as well."""
        self.metrics = Metrics(model=workspace.context.model.path.stem)
        self._workspace = workspace
        self.planned = plan if use_cache else lambda: plan().without_reuse()
        """Plans the prompt by the slices that there are at the moment."""
        self.plan = Plan(())
        """The plan that was spliced; empty until the prompt has been evaluated."""
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._started = started
        self._turn = turn
        self._schema = schema
        self._use_cache = use_cache
        self._progress = progress
        self._at_start = at_start
        self._at_first = at_first
        self._at_end = at_end
        self._stopping = False
        self._pieces = self._run()

    def __iter__(self) -> Iterator[str]:
        return self._pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """End the answer here."""
        self._pieces.close()

    def stop(self) -> None:
        """End the answer as soon as possible. May be called from another thread, or while a signal is handled."""
        self._stopping = True
        self._workspace.context.cancel()

    def reply(self) -> Reply:
        """The whole answer; what has not come yet is waited for."""
        for _ in self._pieces:
            pass
        return Reply(self.text, self.metrics)

    def _run(self) -> Generator[str, None, None]:
        with self._turn(self):
            yield from self._answer()

    def _answer(self) -> Iterator[str]:
        metrics, context = self.metrics, self._workspace.context
        metrics.finish = "interrupted"
        sampler = Sampler(self._sampling, context.model)
        out = TextStream(self._sampling.stop)
        try:
            if self._at_start:
                self._timed(self._at_start)
            self.plan, prefill = self._workspace.prefill(
                self.planned, self._schema, self._evaluated, fresh=not self._use_cache
            )
            for name, value in asdict(prefill).items():
                setattr(metrics, name, value)
            sampler.accept(self.plan.tokens)
            positions = max(context.model.n_ctx_train, self.plan.end + 1) - self.plan.end
            room = min(self._max_tokens, context.n_ctx - metrics.prompt_tokens, positions)
            try:
                while not self._stopping:
                    token = context.sample(sampler)
                    if not metrics.ttft_ms:
                        metrics.ttft_ms = self._elapsed()
                    if context.model.ends_generation(token):
                        metrics.finish = "stop"
                        break
                    self.tokens.append(token)
                    metrics.completion_tokens += 1
                    yield from self._say(out.feed(context.model.piece(token)))
                    if out.stopped:
                        metrics.finish = "stop"
                        break
                    if metrics.completion_tokens >= room:
                        metrics.finish = "length"
                        break
                    self._first()
                    self._workspace.append(np.array([token], np.int32))
                    self.evaluated += 1
                yield from self._say(out.finish())
            finally:
                metrics.total_ms = self._elapsed()
                if metrics.ttft_ms:
                    self._first()
                    if self._at_end:
                        self._timed(self._at_end)
        finally:
            metrics.total_ms = self._elapsed()
            sampler.close()

    def _evaluated(self, done: int, total: int) -> None:
        # ``stop`` may have come while nothing was being evaluated.
        if self._stopping:
            raise KeyboardInterrupt
        if self._progress:
            self._progress(done, total)

    def _first(self) -> None:
        """Once, when the first token has been handed over: nothing that is done here delays it."""
        at_first, self._at_first = self._at_first, None
        if at_first:
            self._timed(at_first)

    def _timed(self, hook: Callable[[Stream], None]) -> None:
        started = time.perf_counter()
        hook(self)
        self.metrics.save_ms += (time.perf_counter() - started) * 1000

    def _say(self, text: str) -> Iterator[str]:
        if text:
            self.text += text
            yield text

    def _elapsed(self) -> float:
        return (time.perf_counter() - self._started) * 1000
