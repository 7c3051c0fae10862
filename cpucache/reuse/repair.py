"""Repair: which slices of a plan are evaluated again, within a budget.

A module as a whole, evaluated behind all that stands before it, brings an answer nearer to full prefill if the answer
is in it. A part of a module does more harm than good, so that modules are recomputed whole or not at all
(bench/RESULTS.md). They are found as search engines find them: by the words that they share with the prompt's new text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from cpucache.layout import Tokens
from cpucache.store import text_id

_WORD = re.compile(r"\w+")
_KNOWN = 10_000  # texts whose words are remembered


class Repair:
    """Chooses what to recompute by the words of the question.

    A word counts for the more, the fewer modules have it (inverse document frequency).

    Args:
        text: Gives the text of tokens.
    """

    def __init__(self, text: Callable[[Tokens], str]) -> None:
        self._text = text
        self._known: dict[bytes, frozenset[str]] = {}

    def choose(self, parts: Sequence[Sequence[Tokens]], new: Iterable[Tokens], budget: int) -> set[int]:
        """The parts to evaluate again, by their numbers: the most relevant, ``budget`` tokens in all.

        The first may take twice the budget, since less than a part is of no use.

        Args:
            parts: Each as the tokens of its slices.
            new: What is evaluated in any case: the question.
            budget: Tokens to evaluate at most.
        """
        chosen: set[int] = set()
        for number in self._ranked(parts, new):
            size = sum(map(len, parts[number]))
            if size <= (budget if chosen else 2 * budget):
                chosen.add(number)
                budget = max(0, budget - size)
        return chosen

    def _ranked(self, parts: Sequence[Sequence[Tokens]], new: Iterable[Tokens]) -> list[int]:
        asked = {word for tokens in new for word in self._words_of(tokens)}
        words = [asked & set().union(*map(self._words, part)) for part in parts]
        found = Counter(word for shared in words for word in shared)
        value = [sum(math.log((len(parts) + 1) / found[word]) for word in shared) for shared in words]
        return sorted(range(len(parts)), key=lambda number: -value[number])

    def _words(self, tokens: Tokens) -> frozenset[str]:
        identity = text_id(tokens)
        words = self._known.get(identity)
        if words is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            words = self._known[identity] = self._words_of(tokens)
        return words

    def _words_of(self, tokens: Tokens) -> frozenset[str]:
        return frozenset(_WORD.findall(self._text(tokens).casefold()))
