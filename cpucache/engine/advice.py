"""Advice: measures which setting brings the answer with reuse closer to that of full prefill, and its cost in TTFT."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

from cpucache.engine.answer import Answer
from cpucache.engine.encoding import encode
from cpucache.engine.fidelity import WATCHED, Distance, Truth, distance, truth
from cpucache.engine.host import Host
from cpucache.engine.planner import Question
from cpucache.engine.stream import Stream
from cpucache.errors import ContextFull
from cpucache.reuse import Fidelity
from cpucache.runtime import Sampling

SHARES = (0.1, 0.2)
"""Values of ``recompute`` (shares of the spliced tokens) that are tried."""
_TIMES = 3  # runs of each trial; its TTFT is their median
OnTrial = Callable[[int, int, str], object]
"""Called with the number of trials done, the number in total, and the name of the next one."""


@dataclass(frozen=True)
class Trial:
    """One setting for the prompt, compared with full prefill."""

    change: str
    """The change as command-line options or a command; empty for the current setting."""
    distance: Distance
    bytes: int = 0
    """Size of the slices that the setting adds to the store, in bytes."""

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        return {"change": self.change, **self.distance.as_dict(), "bytes": self.bytes}


@dataclass(frozen=True)
class FidelityReport:
    """Distance of a prompt with reuse from full prefill, now and with other settings."""

    truth: Truth
    pieces: list[str]
    """Text of each predicted token: the fresh tokens of the prompt from the second on, then the answer."""
    now: Trial
    """The current setting."""
    trials: list[Trial]
    """Other settings, by ``worth`` in descending order."""

    def gain(self, trial: Trial) -> float:
        """Reduction of the mean KL divergence by a trial, in nats for each token."""
        return self.now.distance.kl_mean - trial.distance.kl_mean

    def worth(self, trial: Trial) -> float:
        """Gain of a trial for each millisecond of additional TTFT.

        Delays below a millisecond, or below a tenth of the current TTFT, are noise: all of them count the same.
        """
        return self.gain(trial) / max(1.0, self.now.distance.ttft_ms / 10, self.delay_ms(trial))

    def delay_ms(self, trial: Trial) -> float:
        """Additional TTFT of a trial in milliseconds."""
        return trial.distance.ttft_ms - self.now.distance.ttft_ms

    @property
    def best(self) -> Trial | None:
        """The first trial that removes more than a tenth of the mean KL divergence, if there is one."""
        least = self.now.distance.kl_mean / 10
        return next((trial for trial in self.trials if self.gain(trial) > least), None)

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints."""
        now = self.now.distance
        return {
            "uncached": {"text": self.truth.text, "ttft_ms": round(self.truth.ttft_ms, 3)},
            "cached": {"text": now.text, **now.as_dict()},
            "tokens": [
                {
                    "text": piece,
                    "of": "prompt" if at < now.asked else "answer",
                    "kl": round(kl, 6),
                    "top1": agrees,
                    "nll_change": round(nll, 6),
                }
                for at, (piece, kl, agrees, nll) in enumerate(
                    zip(self.pieces, now.kl.tolist(), now.agrees.tolist(), now.nll.tolist(), strict=True)
                )
            ],
            "advice": [trial.as_dict() for trial in self.trials],
        }


def examine(
    host: Host,
    asked: Callable[[Fidelity | None], Question],
    *,
    max_tokens: int,
    advise: bool,
    progress: OnTrial | None = None,
) -> FidelityReport:
    """Answers a prompt by full prefill, with its current setting, and with one changed setting at a time.

    Slices encoded for a trial leave the store after it.

    Args:
        host: Model, store and core.
        asked: Returns the question with a given fidelity; with its own for ``None``.
        max_tokens: Maximum length, in tokens, of the answer that is compared.
        advise: Whether to try changed settings.
        progress: Called before each trial, and at the end.

    Returns:
        Distances for each token, and the trials.

    Raises:
        ContextFull: The prompt and ``max_tokens`` do not fit the llama.cpp context.
    """
    question = asked(None)
    fidelity = question.fidelity
    question.check_fits(host.context.n_ctx, host.model.n_ctx_train, max_tokens)
    changes: list[tuple[str, Fidelity]] = []
    if advise and not fidelity.exact and not (question.bound is None and question.plan().exact):
        changes += [(f"--recompute {share}", Fidelity(share)) for share in SHARES if share > fidelity.recompute]
        exact = "--reuse exact" if question.bound is None else "--fidelity high, or cpucache encode --refine"
        changes.append((exact, Fidelity(exact=True)))

    def say(done: int, what: str) -> None:
        if progress:
            progress(done, len(changes) + 2, what)

    say(0, "without reuse")
    host.warm_up()
    answer = Answer(
        host.kv_cache,
        question.plan,
        Sampling(),
        max_tokens=max_tokens,
        started=perf_counter(),
        label=question.label,
        use_cache=False,
    )
    stream = Stream(host, answer, question.n_tokens)
    reply = stream.reply()
    plan = question.plan()
    watched = min(WATCHED, len(plan.spans[-1].tokens))

    ttft_ms = reply.metrics.ttft_ms
    true = host.do(lambda slot, _: truth(host.kv_cache, slot, plan, watched, stream.tokens, reply.text, ttft_ms))
    say(1, "as it is")
    encode(host, question.plan().wanted, question.label)
    now = _try(host, question, true, "", max_tokens)
    trials = []
    for done, (change, other) in enumerate(changes, 2):
        say(done, change)
        # Recomputed tokens take additional cells. A setting that does not fit can't be recommended.
        with suppress(ContextFull):
            trials.append(_try(host, asked(other), true, change, 1))
    say(len(changes) + 2, "")
    pieces = [host.model.text([token], special=True) for token in true.targets.tolist()]
    report = FidelityReport(true, pieces, now, trials)
    trials.sort(key=report.worth, reverse=True)
    return report


def _try(host: Host, question: Question, true: Truth, change: str, max_tokens: int) -> Trial:
    """Measures the TTFT of a prompt with empty slots, and its distance from ``true``."""
    encoded = encode(host, question.plan().wanted, question.label)
    try:
        times: list[float] = []
        text = ""
        for last in reversed(range(_TIMES)):
            host.forget()
            answer = Answer(
                host.kv_cache,
                question.plan,
                Sampling(),
                max_tokens=1 if last else max_tokens,
                started=perf_counter(),
                label=question.label,
            )
            stream = Stream(host, answer, question.n_tokens)
            text = stream.reply().text
            times.append(stream.metrics.ttft_ms)
        plan = question.plan()
        found = host.do(lambda slot, _: distance(host.kv_cache, slot, plan, true, question.label))
    finally:
        for slice_ in encoded.new:
            host.store.discard(slice_.key)
    return Trial(change, replace(found, text=text, ttft_ms=median(times)), encoded.bytes)
