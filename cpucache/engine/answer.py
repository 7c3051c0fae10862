"""An answer: the task that evaluates a prompt and samples the tokens of its answer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from cpucache.engine.reply import Metrics
from cpucache.engine.request import Request
from cpucache.engine.text import TextStream
from cpucache.errors import InputError
from cpucache.reuse import KVCache, Plan, Slice
from cpucache.reuse.slot import Slot
from cpucache.reuse.way import answer
from cpucache.reuse.work import Task
from cpucache.runtime import Sampler, Sampling
from cpucache.runtime.context import Logits
from cpucache.stages import current, stage

_log = logging.getLogger("cpucache.engine")
Hook: TypeAlias = "Callable[[Answer], None]"


class TokenLogprobs(NamedTuple):
    """Log probability of a token of the answer, and the likeliest tokens in its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """Token ids and their log probabilities, the likeliest first."""


class Answer:
    """The answer to a prompt so far, and the task that continues it. The core's thread calls all hooks.

    Args:
        kv_cache: The llama.cpp context, and the store.
        plan: Returns the plan of the prompt, by the slices that exist when it is called.
        sampling: Choice of tokens.
        max_tokens: Maximum length of the answer, in tokens.
        started: Time of the call, by ``time.perf_counter``, from which ``ttft_ms`` and ``total_ms`` count.
        label: Label in the store of slices that are encoded for the prompt, in place of a schema name.
        use_cache: Whether to reuse slices and slots; ``False`` evaluates every token of the prompt.
        at_start: Called before the first evaluation.
        at_first: Called after the first token has been handed out.
        at_end: Called when an answer with at least one sampled token ends, complete or not.

    Raises:
        InputError: ``max_tokens`` or ``sampling`` is not valid.
    """

    def __init__(
        self,
        kv_cache: KVCache,
        plan: Callable[[], Plan],
        sampling: Sampling,
        *,
        max_tokens: int,
        started: float,
        label: str = "",
        use_cache: bool = True,
        at_start: Hook | None = None,
        at_first: Hook | None = None,
        at_end: Hook | None = None,
    ) -> None:
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise InputError(f"max_tokens={max_tokens!r}: must be a number of at least 1")
        if not isinstance(sampling, Sampling):
            raise InputError(f"sampling must be a Sampling, such as Sampling(temperature=0.7), not {sampling!r:.80}")
        self.text = ""
        self.tokens: list[int] = []
        """The tokens of the answer so far."""
        self.evaluated = 0
        """Number of these tokens that the llama.cpp context holds: all, or all but the last."""
        self.saved = 0
        """Number of leading tokens of the prompt's last span that a hook has saved."""
        self.logprobs: list[TokenLogprobs] = []
        """Log probabilities of each sampled token, if ``Sampling.logprobs`` is set."""
        self.metrics = Metrics(model=kv_cache.context.model.path.stem, finish="interrupted")
        self.plan = Plan(())
        """The plan that was spliced; empty until the prompt has been evaluated."""
        self.planned = plan if use_cache else lambda: plan().without_reuse()
        """Returns the plan of the prompt, by the slices that exist when it is called."""
        self._kv_cache = kv_cache
        self._slot: Slot | None = None
        self._sampling = sampling
        self.max_tokens = max_tokens
        self._started = started
        self.label = label
        self._use_cache = use_cache
        self._at_start = at_start
        self._at_first = at_first
        self._at_end = at_end

    def capture(self, slices: Iterable[Slice], label: str) -> int:
        """Saves those of ``slices`` that the slot holds; returns their size in bytes. Only hooks may call it."""
        assert self._slot is not None, "called by a hook"
        return self._kv_cache.capture(self._slot, slices, label)

    def task(self, request: Request[None]) -> Task[None]:
        """Evaluates the prompt, and passes pieces of the answer to ``request`` until either ends."""
        sampler = Sampler(self._sampling, self._kv_cache.context.model)
        try:
            if self._at_start:
                self._timed(self._at_start)
            yield from answer(
                self._kv_cache,
                self.planned,
                partial(self._decode, sampler, request),
                label=self.label,
                progress=request.progress,
                metrics=self.metrics,
                fresh=not self._use_cache,
            )
        finally:
            self._slot = None
            metrics = self.metrics
            metrics.total_ms = self._elapsed()
            sampler.close()
            _log.info(
                "%s: %d of %d tokens from the cache, first token after %.1f ms, %d tokens in %.1f ms (%s)",
                *(self.label, metrics.cached_tokens, metrics.prompt_tokens, metrics.ttft_ms),
                *(metrics.completion_tokens, metrics.total_ms, metrics.finish),
            )

    def _decode(self, sampler: Sampler, request: Request[None], slot: Slot, plan: Plan) -> Task[None]:
        """Samples the answer after the prompt has been evaluated, and calls the hooks."""
        self._slot, self.plan = slot, plan
        sampler.accept(plan.tokens)
        try:
            yield from self._tokens(sampler, request, slot)
        finally:
            self.metrics.total_ms = self._elapsed()
            if self.metrics.ttft_ms:
                self._first()
                if self._at_end:
                    self._timed(self._at_end)

    def _tokens(self, sampler: Sampler, request: Request[None], slot: Slot) -> Task[None]:
        """Samples and evaluates tokens until the model, a stop string, a limit or a cancellation ends the answer."""
        context, metrics = self._kv_cache.context, self.metrics
        out = TextStream(self._sampling.stops)
        positions = max(context.model.n_ctx_train, self.plan.end + 1) - self.plan.end
        room = min(self.max_tokens, context.n_ctx - metrics.prompt_tokens, positions)
        while True:
            with stage("sample"):
                token = context.sample(sampler, slot.index)
            if not metrics.ttft_ms:
                metrics.ttft_ms = self._elapsed()
                if profile := current():
                    profile.note_first()
            if self._sampling.logprobs is not None:
                self.logprobs.append(_logprobs(context.logits(slot.index), token, self._sampling.logprobs))
            if context.model.ends_generation(token):
                metrics.finish = "stop"
                break
            self.tokens.append(token)
            metrics.completion_tokens += 1
            self._say(out.feed(context.model.piece(token)), request)
            if out.stopped:
                metrics.finish, metrics.stop = "stop", out.stopped
                break
            if metrics.completion_tokens >= room:
                metrics.finish = "length"
                break
            self._first()
            if request.cancelled:
                break
            yield from self._kv_cache.append(slot, np.array([token], np.int32))
            self.evaluated += 1
        self._say(out.finish(), request)

    def _say(self, text: str, request: Request[None]) -> None:
        """Appends a piece to the answer, and passes it to the caller."""
        if text:
            self.text += text
            request.tell(text)

    def _first(self) -> None:
        """Calls ``at_first`` once, only after the first token has been handed out, so as not to delay it."""
        at_first, self._at_first = self._at_first, None
        if at_first:
            self._timed(at_first)

    def _timed(self, hook: Hook) -> None:
        """Calls a hook, and adds its time to ``save_ms``."""
        started = time.perf_counter()
        hook(self)
        self.metrics.save_ms += (time.perf_counter() - started) * 1000

    def _elapsed(self) -> float:
        """Milliseconds since the call."""
        return (time.perf_counter() - self._started) * 1000


def _logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Log softmax of ``logits`` ``[n_vocab]`` for ``token``, and for the ``count`` likeliest tokens."""
    shifted = logits.astype(np.float64) - logits.max()
    all_ = shifted - np.log(np.exp(shifted).sum())
    top = np.argsort(all_)[::-1][:count]
    return TokenLogprobs(token, float(all_[token]), [(int(each), float(all_[each])) for each in top])
