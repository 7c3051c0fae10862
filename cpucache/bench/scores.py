"""Scores of answers, as LongBench (Bai et al. 2023, arXiv:2308.14508) computes them, and confidence intervals."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from cpucache.errors import InputError

RESAMPLES = 10_000

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Returns a text in lower case, without punctuation and articles, with one space between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, right: Sequence[str]) -> float:
    """Returns the harmonic mean of the words' precision and recall; the highest of all right answers counts."""
    return max(_f1(normalised(answer).split(), normalised(each).split()) for each in right)


def _f1(answer: list[str], right: list[str]) -> float:
    common = (Counter(answer) & Counter(right)).total()
    return 2 * common / (len(answer) + len(right)) if common else 0.0


def exact_match(answer: str, right: Sequence[str]) -> float:
    """Returns 1 if the answer, normalised, equals a right answer; else 0."""
    return float(normalised(answer) in {normalised(each) for each in right})


def rouge_l(answer: str, right: Sequence[str]) -> float:
    """Returns ROUGE-L's F measure (Lin 2004): the longest common subsequence of words; the best right answer counts.

    Raises ``InputError`` if ``rouge_score`` is not installed.
    """
    scorer = rouge_scorer()
    return max(float(scorer.score(each, answer)["rougeL"].fmeasure) for each in right)


@cache
def rouge_scorer() -> Any:
    """Returns the scorer of ROUGE-L. Raises ``InputError`` if ``rouge_score`` is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE-L needs another package: pip install 'cpucache[bench]'") from None
    return RougeScorer(["rougeL"])


def accuracy(answer: str, right: Sequence[str], choices: Sequence[str]) -> float:
    """Returns 1 / n if the answer names n of the ``choices``, the right one among them; else 0.

    A choice that is part of the right one's text does not count as named.
    """
    named = [choice for choice in choices if re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", answer)]
    scores = [0.0]
    for each in right:
        if each in named:
            scores.append(1 / sum(other == each or other not in each for other in named))
    return max(scores)


class Interval(NamedTuple):
    """A mean with its 95% confidence interval."""

    mean: float
    low: float
    high: float


def paired_interval(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Interval:
    """Returns the mean difference between ``values`` and ``others``, which are in the same order of questions.

    The interval is that of a percentile bootstrap with 10,000 resamples of the questions.
    """
    differences = np.subtract(values, others)
    draw = np.random.default_rng(seed)
    size = len(differences)
    means = [differences[draw.integers(0, size, size)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(differences.mean()), float(low), float(high))
