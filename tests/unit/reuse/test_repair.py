"""What is recomputed: within the budget, whole modules, and first those that the question points to."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from cpucache.reuse import Repair
from tests.support.letters import Letters
from tests.support.tries import tries

WORDS = ("river", "bridge", "market", "winter", "baker", "lantern", "harbour", "meadow")
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)
modules = st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=6)


def chosen(parts: Sequence[Sequence[str]], question: str, budget: int) -> set[int]:
    """What is recomputed of modules that consist of these texts, with a token for each letter."""
    letters = Letters()
    tokens = [[letters.tokenize(text) for text in part] for part in parts]
    return Repair(letters.text).choose(tokens, [letters.tokenize(question)], budget)


def size(part: Sequence[str]) -> int:
    return sum(map(len, part))


@tries(100)
@given(modules, texts, st.integers(1, 200))
def test_the_budget_holds_but_for_a_first_module_of_twice_its_size(
    parts: list[list[str]], question: str, budget: int
) -> None:
    found = chosen(parts, question, budget)
    total = sum(size(parts[number]) for number in found)
    assert total <= (2 * budget if len(found) == 1 else budget)
    if min(map(size, parts)) <= 2 * budget:
        assert found, "there was room for one"
    if sum(map(size, parts)) <= budget:
        assert found == set(range(len(parts)))


@tries(100)
@given(
    st.lists(st.sampled_from(WORDS[1:]), min_size=2, max_size=6), st.integers(0, 5), st.sampled_from(["{}", "The {}?"])
)
def test_the_module_that_has_the_words_of_the_question_comes_first(words: list[str], index: int, question: str) -> None:
    """Wherever it stands, and however the question writes them."""
    parts = [[f"of {word:>10} here"] for word in words]
    index %= len(parts)
    budget = size(parts[index])
    parts[index] = ["Lake"]
    assert chosen(parts, question.format("LAKE"), budget) == {index}


@tries(100)
@given(st.integers(0, 3), st.integers(0, 3))
def test_a_word_that_every_module_has_tells_nothing(index: int, other: int) -> None:
    """One that a single module has decides."""
    parts = [["harbour, river"] for _ in range(4)]
    parts[index] = ["a long meadow "]
    assert chosen(parts, "The harbour, the river, a meadow?", size(parts[0])) == {index}
    # Asked again with another question, nothing of the first is left.
    assert chosen([*parts[other:], *parts[:other]], "meadow", size(parts[0])) == {(index - other) % 4}


@tries(100)
@given(modules, texts, st.integers(1, 100))
def test_how_a_module_is_cut_into_texts_decides_nothing(parts: list[list[str]], question: str, budget: int) -> None:
    whole = [[" ".join(part)] for part in parts]
    cut = [[text + " " for text in part[:-1]] + part[-1:] for part in parts]
    assert chosen(whole, question, budget) == chosen(cut, question, budget)
