"""Fidelity: how far a cached prompt is from the same tokens evaluated without reuse, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cpucache.layout import Tokens
from cpucache.reuse import Plan, Span, Workspace
from cpucache.reuse.slot import Slot
from cpucache.reuse.way import forced
from cpucache.reuse.work import Task

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
WATCHED = 256
"""Fresh tokens of a prompt that are looked at, at most: each costs a row of logits, twice."""


@dataclass(frozen=True)
class Truth:
    """What the model says without reuse."""

    answer: Tokens
    """Its answer, greedy."""
    text: str
    ttft_ms: float
    asked: Tokens
    """The fresh tokens that the prompt ends with, at most ``WATCHED``."""
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
    agrees: Flags
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

    def as_dict(self) -> dict[str, float]:
        """The summary and the time to first token, for ``--json``."""
        numbers = {name: round(value, 6) for name, value in self.summary().items()}
        return {**numbers, "ttft_ms": round(self.ttft_ms, 3)}

    @property
    def kl_mean(self) -> float:
        """Over all tokens."""
        return _mean(self.kl)


def log_probabilities(logits: Floats) -> Floats:
    """Of rows of logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def between(wanted: Floats, found: Floats, targets: Tokens) -> tuple[Floats, Flags, Floats]:
    """``Distance``'s divergence, agreement and change of likelihood for rows of log probabilities."""
    # Row by row: a vocabulary is long, and what stands between is as large again as all of them.
    kl = np.array([np.exp(true) @ (true - other) for true, other in zip(wanted, found, strict=True)], np.float32)
    at = np.arange(len(targets)), targets
    agrees: Flags = found.argmax(axis=1) == wanted.argmax(axis=1)
    # Rounding may take what is nothing below nothing.
    return np.maximum(kl, 0), agrees, wanted[at] - found[at]


def truth(
    workspace: Workspace, slot: Slot, plan: Plan, watched: int, answer: Sequence[int], text: str, ttft_ms: float
) -> Task[Truth]:
    """What is said without reuse behind the last tokens of ``plan``, so many ``watched``, and along ``answer``."""
    tokens = np.array(answer, np.int32)
    rows = yield from forced(workspace, slot, _ending(plan.without_reuse(), watched), tokens[:-1])
    asked = plan.tokens[-watched:]
    # Behind the last token of all stands nothing to be predicted, when the answer is empty.
    return Truth(tokens, text, ttft_ms, asked, log_probabilities(rows[: watched - 1 + len(tokens)]))


def distance(workspace: Workspace, slot: Slot, plan: Plan, true: Truth, label: str = "") -> Task[Distance]:
    """How far ``plan``, with its slices, is from the truth. It ends with the tokens asked, all of them fresh."""
    wanted = true.log_probabilities
    rows = yield from forced(workspace, slot, _ending(plan, len(true.asked)), true.answer[:-1], label)
    found = log_probabilities(rows[: len(wanted)])
    return Distance(*between(wanted, found, true.targets), asked=len(true.asked) - 1)


def _ending(plan: Plan, count: int) -> Plan:
    """The same plan, with the last ``count`` tokens in a span of their own."""
    *before, last = plan.spans
    rest = len(last.tokens) - count
    if not rest:
        return plan
    parts = Span(last.start, last.tokens[:rest]), Span(last.start + rest, last.tokens[rest:])
    return replace(plan, spans=(*before, *parts))


def _mean(values: npt.NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else 0.0
