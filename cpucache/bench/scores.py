"""How good answers are, measured as LongBench does, and how sure that is."""

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
    """Lower case, without punctuation and articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of words, against whichever right answer it is the highest for."""
    return max(_f1(normalised(answer).split(), normalised(each).split()) for each in right)


def _f1(answer: list[str], right: list[str]) -> float:
    common = (Counter(answer) & Counter(right)).total()
    return 2 * common / (len(answer) + len(right)) if common else 0.0


def exact_match(answer: str, right: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, normalised; else 0."""
    return float(normalised(answer) in {normalised(each) for each in right})


def rouge_l(answer: str, right: Sequence[str]) -> float:
    """ROUGE-L's F measure: the longest common subsequence of words, against whichever right answer is nearest.

    Raises ``InputError`` when the package that measures it is not installed.
    """
    scorer = rouge_scorer()
    return max(float(scorer.score(each, answer)["rougeL"].fmeasure) for each in right)


@cache
def rouge_scorer() -> Any:
    """What measures ROUGE. Raises ``InputError`` when it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise InputError("ROUGE-L needs another package: pip install 'cpucache[bench]'") from None
    return RougeScorer(["rougeL"])


def accuracy(answer: str, right: Sequence[str], choices: Sequence[str]) -> float:
    """1 if of all ``choices`` the answer names the right one; shared when it names several, 0 when not the right one.

    A choice that is part of the right one's own words does not count as named.
    """
    named = [choice for choice in choices if re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", answer)]
    scores = [0.0]
    for each in right:
        if each in named:
            scores.append(1 / sum(other == each or other not in each for other in named))
    return max(scores)


class Interval(NamedTuple):
    """A mean, and the range that it lies in with 95% confidence."""

    mean: float
    low: float
    high: float


def paired_interval(values: Sequence[float], others: Sequence[float], seed: int = 0) -> Interval:
    """By how much ``values`` exceed ``others`` on average, each compared with the other of the same question.

    The interval is that of a percentile bootstrap with 10,000 resamples of the questions.
    """
    differences = np.subtract(values, others)
    draw = np.random.default_rng(seed)
    size = len(differences)
    means = [differences[draw.integers(0, size, size)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, (2.5, 97.5))
    return Interval(float(differences.mean()), float(low), float(high))
