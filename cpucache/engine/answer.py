"""An answer: the task that evaluates a prompt and chooses token after token."""

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
from cpucache.reuse import Plan, Slice, Workspace
from cpucache.reuse.slot import Slot
from cpucache.reuse.way import answer
from cpucache.reuse.work import Task
from cpucache.runtime import Sampler, Sampling
from cpucache.runtime.context import Logits
from cpucache.stages import current, stage

_log = logging.getLogger("cpucache.engine")
Hook: TypeAlias = "Callable[[Answer], None]"


class TokenLogprobs(NamedTuple):
    """How likely a token was, and which were the likeliest."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """Tokens and their log probabilities, the likeliest first."""


class Answer:
    """An answer to a prompt, as far as it has come.

    Args:
        workspace: Where it is given.
        plan: Plans the prompt by the slices that there are at the moment.
        sampling: How tokens are chosen.
        max_tokens: Tokens of the answer at most.
        started: When it was asked for, by ``time.perf_counter``.
        label: What slices made on the way are listed under.
        use_cache: ``False`` evaluates the same tokens from the first to the last.
        at_start: Called before anything is evaluated, by the core's thread like all of these.
        at_first: Called when the first token has been handed out.
        at_end: Called when the answer ends, complete or not, if it has a first token.
    """

    def __init__(
        self,
        workspace: Workspace,
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
            raise InputError(f"sampling is a Sampling, such as Sampling(temperature=0.7), not {sampling!r:.80}")
        self.text = ""
        self.tokens: list[int] = []
        """The tokens of the answer so far."""
        self.evaluated = 0
        """How many of them the llama.cpp context holds: all but the last, or the last as well."""
        self.saved = 0
        """Tokens of the prompt's last span that a hook has saved."""
        self.logprobs: list[TokenLogprobs] = []
        """Of each token of the answer so far, if the sampling asks for them."""
        self.metrics = Metrics(model=workspace.context.model.path.stem, finish="interrupted")
        self.plan = Plan(())
        """The plan that was spliced; empty until the prompt has been evaluated."""
        self.planned = plan if use_cache else lambda: plan().without_reuse()
        """Plans the prompt by the slices that there are at the moment."""
        self._workspace = workspace
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
        """Save what its slot holds of ``slices``; gives how many bytes that is. For the hooks."""
        assert self._slot is not None, "called by a hook"
        return self._workspace.capture(self._slot, slices, label)

    def task(self, request: Request[None]) -> Task[None]:
        """Give the answer, telling ``request`` its pieces, until it ends or the request is cancelled."""
        sampler = Sampler(self._sampling, self._workspace.context.model)
        try:
            if self._at_start:
                self._timed(self._at_start)
            yield from answer(
                self._workspace,
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
        """Choose token after token behind a prompt that has been evaluated."""
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
        context, metrics = self._workspace.context, self.metrics
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
            yield from self._workspace.append(slot, np.array([token], np.int32))
            self.evaluated += 1
        self._say(out.finish(), request)

    def _say(self, text: str, request: Request[None]) -> None:
        if text:
            self.text += text
            request.tell(text)

    def _first(self) -> None:
        """Once, when the first token has been handed out: nothing that is done here delays it."""
        at_first, self._at_first = self._at_first, None
        if at_first:
            self._timed(at_first)

    def _timed(self, hook: Hook) -> None:
        started = time.perf_counter()
        hook(self)
        self.metrics.save_ms += (time.perf_counter() - started) * 1000

    def _elapsed(self) -> float:
        return (time.perf_counter() - self._started) * 1000


def _logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    shifted = logits.astype(np.float64) - logits.max()
    all_ = shifted - np.log(np.exp(shifted).sum())
    top = np.argsort(all_)[::-1][:count]
    return TokenLogprobs(token, float(all_[token]), [(int(each), float(all_[each])) for each in top])
