"""Repair: chooses the modules of a plan to recompute, within a budget of tokens.

Recomputing the module that contains the answer brings the result closer to full prefill. Recomputing only a part of a
module does more harm than good, so that modules are recomputed whole or not at all (bench/RESULTS.md). Modules are
ranked like documents in a search engine: by the words that they share with the new text of the prompt.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from cpucache.layout import Tokens
from cpucache.store import text_id

_WORD = re.compile(r"\w+")
_KNOWN = 10_000  # maximum number of texts whose words are cached


class Repair:
    """Chooses what to recompute by the words of the question.

    Each shared word is weighted by its inverse document frequency: the fewer modules contain it, the more it counts.

    Args:
        text: Returns the text of tokens.
    """

    def __init__(self, text: Callable[[Tokens], str]) -> None:
        self._text = text
        self._known: dict[bytes, frozenset[str]] = {}

    def choose(self, parts: Sequence[Sequence[Tokens]], new: Iterable[Tokens], budget: int) -> set[int]:
        """Returns the indices of the parts to recompute: the most relevant ones that fit into ``budget``.

        The first part chosen may be up to twice as long as the budget, since a part is only recomputed whole.

        Args:
            parts: The modules or segments to choose from, each as the tokens of its slices.
            new: The tokens that are evaluated anyway: the question.
            budget: Number of tokens to recompute.
        """
        chosen: set[int] = set()
        for number in self._ranked(parts, new):
            size = sum(map(len, parts[number]))
            if size <= (budget if chosen else 2 * budget):
                chosen.add(number)
                budget = max(0, budget - size)
        return chosen

    def _ranked(self, parts: Sequence[Sequence[Tokens]], new: Iterable[Tokens]) -> list[int]:
        """Indices of all parts, the most relevant first."""
        asked = {word for tokens in new for word in self._words_of(tokens)}
        words = [asked & set().union(*map(self._words, part)) for part in parts]
        found = Counter(word for shared in words for word in shared)
        value = [sum(math.log((len(parts) + 1) / found[word]) for word in shared) for shared in words]
        return sorted(range(len(parts)), key=lambda number: -value[number])

    def _words(self, tokens: Tokens) -> frozenset[str]:
        """``_words_of``, cached."""
        identity = text_id(tokens)
        words = self._known.get(identity)
        if words is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            words = self._known[identity] = self._words_of(tokens)
        return words

    def _words_of(self, tokens: Tokens) -> frozenset[str]:
        """The case-folded words of a text."""
        return frozenset(_WORD.findall(self._text(tokens).casefold()))
