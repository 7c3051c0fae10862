"""Fidelity: distance of a prompt with reuse from full prefill of the same tokens, for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cpucache.layout import Tokens
from cpucache.reuse import KVCache, Plan, Span
from cpucache.reuse.slot import Slot
from cpucache.reuse.way import forced
from cpucache.reuse.work import Task

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
WATCHED = 256
"""Maximum number of fresh tokens of a prompt that are compared: each takes two rows of logits ``[n_vocab]``."""


@dataclass(frozen=True)
class Truth:
    """Predictions of the model after full prefill."""

    answer: Tokens
    """Tokens of the greedy answer."""
    text: str
    ttft_ms: float
    asked: Tokens
    """The last fresh tokens of the prompt, at most ``WATCHED``."""
    log_probabilities: Floats
    """Log probabilities ``[n_asked + n_answer - 1, n_vocab]`` after each token except the last of the answer."""

    @property
    def targets(self) -> Tokens:
        """The predicted tokens ``[n_asked + n_answer - 1]``: ``asked`` from the second on, and the answer."""
        return np.concatenate([self.asked[1:], self.answer])


@dataclass(frozen=True)
class Distance:
    """Distance of predictions with reuse from those of full prefill, for each of ``Truth.targets``."""

    kl: Floats
    """Kullback-Leibler divergence KL(full prefill ‖ reuse) of the predictions, in nats."""
    agrees: Flags
    """Whether both predict the same token as the likeliest."""
    nll: Floats
    """Negative log-likelihood of the token with reuse minus that after full prefill, in nats."""
    asked: int
    """Number of leading targets that belong to the prompt."""
    text: str = ""
    """The answer with reuse."""
    ttft_ms: float = 0.0

    def summary(self) -> dict[str, float]:
        """Means over the answer and over the prompt's fresh tokens, and the summed ``nll`` of the answer."""
        answer, prompt = slice(self.asked, None), slice(0, self.asked)
        return {
            "kl_answer": _mean(self.kl[answer]),
            "kl_prompt": _mean(self.kl[prompt]),
            "top1_answer": _mean(self.agrees[answer]),
            "top1_prompt": _mean(self.agrees[prompt]),
            "nll_change": float(self.nll[answer].sum()),
        }

    def as_dict(self) -> dict[str, float]:
        """The summary and the TTFT, as ``--json`` prints them."""
        numbers = {name: round(value, 6) for name, value in self.summary().items()}
        return {**numbers, "ttft_ms": round(self.ttft_ms, 3)}

    @property
    def kl_mean(self) -> float:
        """Mean KL divergence over all targets, in nats."""
        return _mean(self.kl)


def log_probabilities(logits: Floats) -> Floats:
    """Log softmax of each row of ``logits`` ``[n_rows, n_vocab]``."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def between(wanted: Floats, found: Floats, targets: Tokens) -> tuple[Floats, Flags, Floats]:
    """The ``kl``, ``agrees`` and ``nll`` of a ``Distance``, from log probabilities ``[n_rows, n_vocab]``."""
    # Row by row, because temporary arrays of the full shape would double the memory.
    kl = np.array([np.exp(true) @ (true - other) for true, other in zip(wanted, found, strict=True)], np.float32)
    at = np.arange(len(targets)), targets
    agrees: Flags = found.argmax(axis=1) == wanted.argmax(axis=1)
    # Rounding can turn a divergence of zero negative.
    return np.maximum(kl, 0), agrees, wanted[at] - found[at]


def truth(
    kv_cache: KVCache, slot: Slot, plan: Plan, watched: int, answer: Sequence[int], text: str, ttft_ms: float
) -> Task[Truth]:
    """Evaluates a prompt and its answer by full prefill, and returns the predictions.

    Args:
        kv_cache: The llama.cpp context, and the store.
        slot: Slot of the evaluation.
        plan: Plan of the prompt, whose slices are not taken.
        watched: Number of tokens at the end of the prompt whose predictions are kept.
        answer: Tokens of the greedy answer of full prefill.
        text: Text of that answer.
        ttft_ms: TTFT of that answer in milliseconds.
    """
    tokens = np.array(answer, np.int32)
    rows = yield from forced(kv_cache, slot, _ending(plan.without_reuse(), watched), tokens[:-1])
    asked = plan.tokens[-watched:]
    # With an empty answer, the row after the prompt's last token has no target.
    return Truth(tokens, text, ttft_ms, asked, log_probabilities(rows[: watched - 1 + len(tokens)]))


def distance(kv_cache: KVCache, slot: Slot, plan: Plan, true: Truth, label: str = "") -> Task[Distance]:
    """Evaluates a plan with its slices, and returns its distance from ``true``.

    Args:
        kv_cache: The llama.cpp context, and the store.
        slot: Slot of the evaluation.
        plan: Plan of the prompt, which ends with the fresh tokens ``true.asked``.
        true: Predictions after full prefill of the same tokens.
        label: Label in the store of slices that are encoded for the prompt.
    """
    wanted = true.log_probabilities
    rows = yield from forced(kv_cache, slot, _ending(plan, len(true.asked)), true.answer[:-1], label)
    found = log_probabilities(rows[: len(wanted)])
    return Distance(*between(wanted, found, true.targets), asked=len(true.asked) - 1)


def _ending(plan: Plan, count: int) -> Plan:
    """The plan with its last ``count`` tokens, all fresh, as a separate span."""
    *before, last = plan.spans
    rest = len(last.tokens) - count
    if not rest:
        return plan
    parts = Span(last.start, last.tokens[:rest]), Span(last.start + rest, last.tokens[rest:])
    return replace(plan, spans=(*before, *parts))


def _mean(values: npt.NDArray[Any]) -> float:
    """Mean, or 0 of no values."""
    return float(values.mean()) if len(values) else 0.0
