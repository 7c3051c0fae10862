"""Repair: selects the slices of a plan to recompute, within a budget.

Recomputing a whole module that contains the answer brings the result closer to full prefill. Recomputing a part of a
module lowers quality, so modules are recomputed as a whole or not at all (bench/RESULTS.md). Modules are ranked by the
words that they share with the new text of the prompt.
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
    """Selects parts to recompute by the words of the question, weighted by inverse document frequency.

    Args:
        text: Returns the text of tokens.
    """

    def __init__(self, text: Callable[[Tokens], str]) -> None:
        self._text = text
        self._known: dict[bytes, frozenset[str]] = {}

    def choose(self, parts: Sequence[Sequence[Tokens]], new: Iterable[Tokens], budget: int) -> set[int]:
        """Returns the indices of the parts to recompute: the most relevant ones that fit the budget.

        The first part may take twice the budget, since part of a module is never recomputed.

        Args:
            parts: Each as the tokens of its slices.
            new: Tokens that are evaluated in any case: the question.
            budget: Maximum number of tokens to recompute.
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
