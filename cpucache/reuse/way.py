"""The stages of a prompt: plan, look up, splice, prefill, decode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TypeVar

import numpy as np

from cpucache.layout import Tokens
from cpucache.reuse.encoder import tokens_to_evaluate
from cpucache.reuse.kv_cache import KVCache
from cpucache.reuse.plan import Plan, Slice
from cpucache.reuse.progress import OnProgress, counting
from cpucache.reuse.reports import Encoded, Metrics
from cpucache.reuse.slot import Slot
from cpucache.reuse.work import Task
from cpucache.runtime.context import Logits
from cpucache.stages import stage

T = TypeVar("T")
_log = logging.getLogger("cpucache.reuse")


def answer(
    kv_cache: KVCache,
    plan: Callable[[], Plan],
    decode: Callable[[Slot, Plan], Task[T]],
    *,
    slot: Slot | None = None,
    label: str = "",
    progress: OnProgress | None = None,
    metrics: Metrics | None = None,
    fresh: bool = False,
    ends: bool = True,
) -> Task[T]:
    """Runs all stages of a prompt; every prompt is answered through this task.

    Args:
        kv_cache: Provides the llama.cpp context and the store.
        plan: Returns the plan from the slices in the store. Called again if a slice is evicted or unusable.
        decode: Called with the slot and its plan; the logits of the slot's last token can be read.
        slot: The slot for the prompt; by default the idle one that shares the most spans with the plan.
        label: The name under which the store lists slices saved for this prompt.
        progress: Called with the number of tokens evaluated, and their total.
        metrics: Receives the times and token counts of the prompt.
        fresh: Whether to reuse nothing that a slot holds, so that every token without a slice is evaluated.
        ends: Whether the prompt ends with the plan. If not, the logits of the last token are not needed.

    Returns:
        The result of ``decode``.
    """
    with _Filling(kv_cache, slot, label, progress, metrics or Metrics(), fresh=fresh, ends=ends) as filling:
        for attempt in filling.attempts:
            with attempt:
                planned = plan()
                with filling.look_up(planned):
                    yield from filling.splice()
                    yield from filling.prefill()
        return (yield from decode(filling.slot, planned))


def nothing(_: Slot, plan: Plan) -> Task[Plan]:
    """A ``decode`` for ``answer`` that decodes nothing and returns the plan."""
    yield from ()
    return plan


def forced(kv_cache: KVCache, slot: Slot, plan: Plan, tokens: Tokens, label: str = "") -> Task[Logits]:
    """Returns the logits after each token of the plan's last span and after each of ``tokens``, by teacher forcing.

    Args:
        kv_cache: Provides the llama.cpp context and the store.
        slot: The slot that evaluates the tokens.
        plan: The plan of the prompt; its last span is fresh.
        tokens: The continuation to evaluate after the plan.
        label: The name under which the store lists slices saved for this prompt.

    Returns:
        Logits ``[n_last_span + n_tokens, n_vocab]``; each row predicts the token after its own.
    """
    *before, last = plan.spans

    def rows(slot: Slot, _: Plan) -> Task[Logits]:
        return np.stack((yield from kv_cache.splicer.rows(slot, np.concatenate([last.tokens, tokens]))))

    return answer(kv_cache, lambda: Plan(tuple(before)), rows, slot=slot, label=label)


class _Filling:
    """The stages of ``answer`` before ``decode``: fills a slot with a plan."""

    def __init__(
        self,
        kv_cache: KVCache,
        slot: Slot | None,
        label: str,
        progress: OnProgress | None,
        metrics: Metrics,
        *,
        fresh: bool,
        ends: bool,
    ) -> None:
        self.attempts = kv_cache.attempts()
        self._kv_cache = kv_cache
        self._given = slot
        self._slot = slot
        self._label = label
        self._progress = progress
        self._metrics = metrics
        self._fresh = fresh
        self._ends = ends
        self._encoded = Encoded()
        self._counted = 0

    def __enter__(self) -> _Filling:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._slot is not None and self._given is None:
            self._slot.busy = False

    @property
    def slot(self) -> Slot:
        """The slot; set by the first ``look_up``."""
        assert self._slot is not None
        return self._slot

    @contextmanager
    def look_up(self, plan: Plan) -> Iterator[None]:
        """Finds what the slot holds and the store lacks of a plan. Its slices are not evicted until the exit."""
        kv_cache = self._kv_cache
        with stage("look up"):
            kv_cache.check_can_be_spliced(plan)
            slot = self._slot = self._slot or kv_cache.take(plan)
            if not self._fresh:
                kv_cache.capture_held(slot, plan, self._label)
            keys = kv_cache.keys(plan)
        with ExitStack() as self._until:
            self._until.enter_context(kv_cache.store.using(keys))
            with stage("look up"):
                stays = 0 if self._fresh else slot.stays(plan)
                self._held = {span.slice for span in plan.spans[:stays] if span.slice}
                wanted = [slice_ for slice_ in plan.slices if slice_ not in self._held]
                had = self.attempts.states.keys() | self._held
                missing = kv_cache.missing([*wanted, *plan.besides], had)
                # Missing slices that are evaluated with the end of the prompt.
                self._last = [] if self._fresh else kv_cache.last(slot, plan, missing)
                self._until.callback(kv_cache.store.release, [slice_.key for slice_ in self._last])
                self._missing: Sequence[Slice] = missing[: len(missing) - len(self._last)]
                self._wanted = [slice_ for slice_ in wanted if slice_ not in self._last]
                self._spliced = plan.evaluating(len(self._last))
                known = 0 if self._fresh else kv_cache.splicer.known(self._spliced, slot.owner, ends=self._ends)
                self._known = known
            self._plan = plan
            self._tell()
            fresh = self._spliced.n_tokens - self._spliced.n_cached
            self._told = counting(self._progress, tokens_to_evaluate(self._missing) + fresh)
            yield

    def _step(self, count: int) -> None:
        """Counts evaluated tokens, and reports progress."""
        self._counted += count
        if self._told:
            self._told(count)

    def _tell(self) -> None:
        """Logs the source of each span of the plan, and the reason for it."""
        plan = self._plan
        if _log.isEnabledFor(logging.INFO):
            here = sum(len(slice_.tokens) for slice_ in self._held)
            _log.info(
                "%s: %d tokens: %d from slices (%d of them in the context), %d to evaluate; slices missing: %d",
                *(self._label or "a prompt", plan.n_tokens, plan.n_cached, here, plan.n_tokens - plan.n_cached),
                len(self._missing),
            )
        if _log.isEnabledFor(logging.DEBUG):
            for span in plan.spans:
                taken = f"{span.relation} slice {span.slice.key[:8]}" if span.slice else "evaluated"
                module = span.slice.module if span.slice else span.module
                why = f": {span.why}" if span.why else ""
                _log.debug("  %d..%d %s %s%s", span.start, span.end, module or "(text)", taken, why)

    def splice(self) -> Task[None]:
        """Encodes the missing slices, then starts the splice of the plan, see ``Splicer.splice``."""
        kv_cache, states = self._kv_cache, self.attempts.states
        yield from kv_cache.encode_missing(
            self.slot, self._missing, self._wanted, self._held, states, self._label, self._encoded, self._step
        )
        self._until.enter_context(kv_cache.store.paused())
        self._splicing = kv_cache.splicer.splice(
            self.slot,
            self._spliced,
            lambda slice_: kv_cache.state(states, slice_),
            self._metrics,
            fresh=self._fresh,
            ends=self._ends,
        )

    def prefill(self) -> Task[None]:
        """Evaluates the fresh tokens, saves slices evaluated among them, and completes the metrics."""
        kv_cache, plan, encoded = self._kv_cache, self._plan, self._encoded
        before = self._metrics.prefill_ms
        spent = yield from kv_cache.splicer.prefill(self._splicing, self._step)
        kv_cache.capture(self.slot, self._last, self._label)
        encoded.tokens += sum(len(slice_.tokens) for slice_ in self._last)
        kv_cache.know(plan.slices)
        in_place = sum(len(span.tokens) for span in plan.spans if span.slice in encoded.new)
        # Encoding a missing slice may already have evaluated the fresh tokens before it, which ``spent`` leaves out.
        evaluated = in_place + max(spent, self._spliced.n_tokens - self._spliced.n_cached - self._known)
        if kv_cache.slices.memory.points:
            # Encoding also evaluates the tokens between the loaded recurrent state and a missing slice.
            evaluated = max(evaluated, min(self._counted, plan.n_tokens))
        seconds = (self._metrics.prefill_ms - before) / 1000
        kv_cache.learn_rate(encoded.tokens + spent, encoded.seconds + seconds)
        self._metrics.note(plan, evaluated)
        self._metrics.encoded_tokens = encoded.tokens
        self._metrics.encode_ms = encoded.seconds * 1000
