"""Scores of answers against values worked out by hand, and how sure they are."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from cpucache.bench.accuracy import summarise
from cpucache.bench.plot import new_figure
from cpucache.bench.results import Answer
from cpucache.bench.scores import accuracy, exact_match, f1, normalised, paired_interval, rouge_l, rouge_scorer
from cpucache.errors import InputError


def test_answers_are_normalised() -> None:
    assert normalised(" The  Cat's\n hat, an (old) one. ") == "cats hat old one"


@pytest.mark.parametrize(
    ("answer", "right", "score"),
    [
        ("The red house!", ["red house"], 1.0),
        # Two of three words are right, and two of four are found: 2 * 2 / (3 + 4).
        ("big red house", ["red house by sea"], 4 / 7),
        # A word counts as often as it is there.
        ("red red red", ["red red house sea"], 4 / 7),
        ("blue", ["red", "a blue house"], 2 / 3),
        ("", ["red"], 0.0),
        ("the", ["a"], 0.0),
    ],
)
def test_f1(answer: str, right: list[str], score: float) -> None:
    assert f1(answer, right) == pytest.approx(score)


def test_exact_match() -> None:
    assert exact_match("The U.S.A.", ["France", "usa"]) == 1
    assert exact_match("the usa today", ["France", "usa"]) == 0


def test_rouge_l() -> None:
    # The longest common subsequence is "the cat on mat": 4 of 5 words of one, 4 of 6 of the other.
    assert rouge_l("the cat lay on mat", ["nothing", "the cat sat on the mat"]) == pytest.approx(8 / 11)
    assert rouge_l("", ["the cat"]) == 0


def test_accuracy() -> None:
    choices = ("a place", "a person", "a person of note")
    assert accuracy("It is a person.", ["a person"], choices) == 1
    assert accuracy("a person or a place", ["a person"], choices) == 0.5
    assert accuracy("a place", ["a person"], choices) == 0
    # The longer choice contains the shorter one, which thus is not named by it.
    assert accuracy("a person of note", ["a person of note"], choices) == 1
    assert accuracy("An A, surely", ["A"], ("A", "B")) == 1
    assert accuracy("BAD", ["A"], ("A", "B")) == 0


def test_the_interval_of_what_is_the_same_is_nothing() -> None:
    assert paired_interval([0.1, 0.9, 0.4], [0.1, 0.9, 0.4]) == (0, 0, 0)


def test_the_interval_is_of_differences_of_pairs() -> None:
    draw = np.random.default_rng(5)
    others = draw.uniform(0, 100, 400)

    # However much the values differ among themselves, each is 3 above the other of its pair.
    assert paired_interval((others + 3).tolist(), others.tolist()) == pytest.approx((3, 3, 3))
    noisy = paired_interval((others + 3 + draw.normal(0, 2, 400)).tolist(), others.tolist())
    assert noisy.mean == pytest.approx(3, abs=0.3)
    # The standard error is 2 / sqrt(400).
    assert noisy.high - noisy.low == pytest.approx(2 * 1.96 * 0.1, rel=0.1)
    assert noisy.low < noisy.mean < noisy.high
    one, other = others.tolist(), others[::-1].tolist()
    assert paired_interval(one, other) == paired_interval(one, other)


def test_the_summary_is_of_means_medians_and_pairs() -> None:
    def answers(variant: str, *values: tuple[float, float]) -> list[Answer]:
        return [
            Answer(line, variant, "", {"f1": score}, ttft, 1, 1, 0, again_ms=30, floor_ms=20, kl=score, same=score > 0)
            for line, (score, ttft) in enumerate(values)
        ]

    full, cached = summarise(
        {
            "full": answers("full", (0.5, 1000), (1.0, 3000), (0.0, 1200)),
            "fast": answers("fast", (0.0, 110), (0.5, 120), (1.0, 300)),
        }
    )

    assert (full.n, full.scores, full.gains, full.ttft_to_full) == (3, {"f1": 0.5}, {}, None)
    assert (cached.scores, cached.ttft.median) == ({"f1": 0.5}, 120)
    # Medians of the quotients of each question.
    assert cached.ttft_to_full == pytest.approx(0.11)
    assert (cached.ttft_to_floor, cached.again_to_floor) == (6, 1.5)
    assert (cached.kl, cached.kl_median, cached.same) == pytest.approx((0.5, 0.5, 2 / 3))
    assert full.ttft_to_floor is None
    gain = cached.as_dict()["scores"]["f1"]
    # The worst and the best resample take one question three times.
    assert gain == {"mean": 50.0, "difference": 0.0, "low": -50.0, "high": 100.0}


@pytest.mark.parametrize(
    ("package", "what"), [("rouge_score.rouge_scorer", "ROUGE-L"), ("matplotlib.figure", "drawing")]
)
def test_a_package_that_is_missing_is_named(package: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    rouge_scorer.cache_clear()
    with pytest.raises(InputError, match=rf"{what} needs another package: pip install 'cpucache\[bench\]'"):
        rouge_scorer() if what == "ROUGE-L" else new_figure(Path("a.png"))
