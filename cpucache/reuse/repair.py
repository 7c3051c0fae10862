"""Repair: which slices of a plan are evaluated afresh, within a budget.

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
from cpucache.reuse.slices import Slice, Span

_WORD = re.compile(r"\w+")
_KNOWN = 10_000  # slices whose words are remembered


class Repair:
    """Chooses what to recompute by the words of the question.

    A word counts for the more, the fewer modules have it (inverse document frequency).

    Args:
        text: Gives the text of tokens.
    """

    def __init__(self, text: Callable[[Tokens], str]) -> None:
        self._text = text
        self._known: dict[str, frozenset[str]] = {}

    def choose(self, spans: Sequence[Span], budget: int) -> set[Span]:
        """The spans to evaluate afresh: those of the most relevant modules, ``budget`` tokens in all.

        The first module may take twice the budget, since less than a module is of no use. Only slices that are not
        exact are considered. The question is the tokens of the plan that are
        evaluated in any case.
        """
        modules: dict[str, list[Span]] = {}
        for span in spans:
            if span.slice and span.relation != "exact":
                modules.setdefault(span.slice.module, []).append(span)
        chosen: set[Span] = set()
        for module in self._ranked(modules, [span.tokens for span in spans if span.slice is None]):
            size = sum(len(span.tokens) for span in modules[module])
            if size <= (budget if chosen else 2 * budget):
                chosen.update(modules[module])
                budget = max(0, budget - size)
        return chosen

    def _ranked(self, modules: dict[str, list[Span]], new: Iterable[Tokens]) -> list[str]:
        asked = {word for tokens in new for word in self._words_of(tokens)}
        words = {
            module: asked & set().union(*(self._words(span.slice) for span in parts if span.slice))
            for module, parts in modules.items()
        }
        found = Counter(word for shared in words.values() for word in shared)
        value = {
            module: sum(math.log((len(modules) + 1) / found[word]) for word in shared)
            for module, shared in words.items()
        }
        return sorted(modules, key=lambda module: -value[module])

    def _words(self, slice_: Slice) -> frozenset[str]:
        words = self._known.get(slice_.key)
        if words is None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            words = self._known[slice_.key] = self._words_of(slice_.tokens)
        return words

    def _words_of(self, tokens: Tokens) -> frozenset[str]:
        return frozenset(_WORD.findall(self._text(tokens).casefold()))
