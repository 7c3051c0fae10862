"""Fidelity: how far a cached prompt is from the same tokens evaluated without reuse, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cpucache.layout import Plan, Span
from cpucache.layout.vocabulary import Tokens
from cpucache.reuse import Workspace

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Truth:
    """What the model says without reuse."""

    answer: Tokens
    """Its answer, greedy."""
    text: str
    ttft_ms: float
    asked: Tokens
    """The fresh tokens that the prompt ends with."""
    log_probabilities: Floats
    """Of shape (asked + answer - 1, vocabulary): behind each token but the answer's last."""

    @property
    def targets(self) -> Tokens:
        """The tokens that are predicted: those asked after the first, and the answer."""
        return np.concatenate([self.asked[1:], self.answer])


@dataclass(frozen=True)
class Distance:
    """Cached from uncached, for each token that is predicted: first the prompt's fresh ones, then the answer's."""

    kl: Floats
    """Kullback-Leibler divergence in nats: of what is said with reuse from what is said without."""
    agrees: npt.NDArray[np.bool_]
    """Whether both think the same token the likeliest."""
    nll: Floats
    """By how much the token is less likely with reuse: the change of its negative log-likelihood, in nats."""
    asked: int
    """How many of the tokens belong to the prompt."""
    text: str = ""
    """The cached answer."""
    ttft_ms: float = 0.0

    def summary(self) -> dict[str, float]:
        """Means over the answer and over the prompt's fresh tokens, and the answer's whole change of likelihood."""
        answer, prompt = slice(self.asked, None), slice(0, self.asked)
        return {
            "kl_answer": _mean(self.kl[answer]),
            "kl_prompt": _mean(self.kl[prompt]),
            "top1_answer": _mean(self.agrees[answer]),
            "top1_prompt": _mean(self.agrees[prompt]),
            "nll_change": float(self.nll[answer].sum()),
        }

    @property
    def kl_mean(self) -> float:
        """Over all tokens."""
        return _mean(self.kl)


def log_probabilities(logits: Floats) -> Floats:
    """Of rows of logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def uncached(plan: Plan) -> Plan:
    """The same tokens without reuse, the fresh ones at the end apart."""
    *_, last = plan.spans
    before = plan.tokens[: plan.n_tokens - len(last.tokens)]
    spans = (Span(0, before), Span(len(before), last.tokens)) if len(before) else (Span(0, last.tokens),)
    return Plan(spans, exact=True)


def truth(workspace: Workspace, plan: Plan, answer: Sequence[int], text: str, ttft_ms: float) -> Truth:
    """What is said without reuse behind the fresh tokens at the end of ``plan`` and along ``answer``."""
    tokens = np.array(answer, np.int32)
    asked = plan.spans[-1].tokens
    rows = workspace.forced(uncached(plan), tokens[:-1])
    # Behind the last token of all stands nothing to be predicted, when the answer is empty.
    return Truth(tokens, text, ttft_ms, asked, log_probabilities(rows[: len(asked) - 1 + len(tokens)]))


def distance(
    workspace: Workspace, plan: Plan, true: Truth, label: str = "", *, text: str = "", ttft_ms: float = 0.0
) -> Distance:
    """How far ``plan``, with its slices, is from the truth."""
    wanted = true.log_probabilities
    # More may be fresh at the end of the plan than there: what is renewed entirely is part of it.
    behind = len(true.asked) + max(0, len(true.answer) - 1)
    rows = log_probabilities(workspace.forced(plan, true.answer[:-1], label)[-behind:][: len(wanted)])
    kl: Floats = (np.exp(wanted) * (wanted - rows)).sum(axis=1)
    at = np.arange(len(rows)), true.targets
    return Distance(
        kl=np.maximum(kl, 0),
        agrees=rows.argmax(axis=1) == wanted.argmax(axis=1),
        nll=wanted[at] - rows[at],
        asked=len(true.asked) - 1,
        text=text,
        ttft_ms=ttft_ms,
    )


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0
