"""What would bring a cached prompt nearer to the uncached one, measured: recomputing, and refining."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import median
from time import perf_counter
from typing import Any

from cpucache.engine.answer import Answer
from cpucache.engine.fidelity import WATCHED, Distance, Truth, distance, truth
from cpucache.engine.host import Host
from cpucache.engine.planner import Question
from cpucache.engine.stream import Stream
from cpucache.errors import ContextFull
from cpucache.reuse import Encoded, Fidelity
from cpucache.runtime import Sampling

SHARES = (0.1, 0.2)
"""The shares of the spliced tokens that recomputing is tried with."""
_TIMES = 3  # runs of each that the time to first token is the median of
OnTrial = Callable[[int, int, str], object]
"""Told how many trials are done, of how many, and what is tried next."""


@dataclass(frozen=True)
class Trial:
    """One way of answering the prompt, against the answer without reuse."""

    change: str
    """What was done, as a person would do it; empty: nothing."""
    distance: Distance
    bytes: int = 0
    """What it adds to the store."""

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"change": self.change, **self.distance.as_dict(), "bytes": self.bytes}


@dataclass(frozen=True)
class FidelityReport:
    """How far a cached prompt is from the uncached one."""

    truth: Truth
    pieces: list[str]
    """The text of each token that is predicted: the prompt's fresh ones after the first, then the answer's."""
    now: Trial
    """As the prompt is answered now."""
    trials: list[Trial]
    """What was tried, the one that brings the most for its time first."""

    def gain(self, trial: Trial) -> float:
        """Nats that a change brings back, on average over all tokens."""
        return self.now.distance.kl_mean - trial.distance.kl_mean

    def worth(self, trial: Trial) -> float:
        """Nats that a change brings back, for each millisecond that it costs.

        A tenth of the time that it takes now, and a millisecond, are within what runs differ by, and cost the same.
        """
        return self.gain(trial) / max(1.0, self.now.distance.ttft_ms / 10, self.delay_ms(trial))

    def delay_ms(self, trial: Trial) -> float:
        """By how much later the first token comes."""
        return trial.distance.ttft_ms - self.now.distance.ttft_ms

    @property
    def best(self) -> Trial | None:
        """The change that brings the most for its time, if any brings a tenth of the way back."""
        least = self.now.distance.kl_mean / 10
        return next((trial for trial in self.trials if self.gain(trial) > least), None)

    def as_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
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
    """Answer a prompt without reuse and with it, and, to ``advise``, with one change at a time.

    Slices that only a change needs do not stay in the store. Raises ``ContextFull``.

    Args:
        host: The model.
        asked: Gives the prompt with a fidelity; with its own for ``None``.
        max_tokens: Tokens of the answer that are compared.
        advise: Whether changes are tried.
        progress: Told about the trials.
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
        host.workspace,
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
    true = host.do(lambda slot, _: truth(host.workspace, slot, plan, watched, stream.tokens, reply.text, ttft_ms))
    say(1, "as it is")
    _encode(host, question)
    now = _try(host, question, true, "", max_tokens)
    trials = []
    for done, (change, other) in enumerate(changes, 2):
        say(done, change)
        # What is recomputed takes cells besides. A change for which there are none is no advice.
        with suppress(ContextFull):
            trials.append(_try(host, asked(other), true, change, 1))
    say(len(changes) + 2, "")
    pieces = [host.model.text([token], special=True) for token in true.targets.tolist()]
    report = FidelityReport(true, pieces, now, trials)
    trials.sort(key=report.worth, reverse=True)
    return report


def _encode(host: Host, question: Question) -> Encoded:
    wanted = question.plan().wanted
    return host.do(lambda slot, _: host.workspace.encode(slot, wanted, question.label))


def _try(host: Host, question: Question, true: Truth, change: str, max_tokens: int) -> Trial:
    made = _encode(host, question)
    try:
        times: list[float] = []
        text = ""
        for last in reversed(range(_TIMES)):
            host.forget()
            answer = Answer(
                host.workspace,
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
        found = host.do(lambda slot, _: distance(host.workspace, slot, plan, true, question.label))
    finally:
        for slice_ in made.made:
            host.store.discard(slice_.key)
    return Trial(change, replace(found, text=text, ttft_ms=median(times)), made.bytes)
