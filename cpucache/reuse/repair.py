"""Repair: which tokens of spliced slices are evaluated afresh, within a budget.

A module as a whole, evaluated in sight of all that stands before it, brings an answer nearer to full prefill if the
answer is in it; single tokens here and there do not (bench/RESULTS.md). The module is found as search engines find it:
by the words that it shares with the prompt's new text.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

from cpucache.layout import Tokens
from cpucache.reuse.slices import Runs, Slice, Span

_WORD = re.compile(r"\w+")


class Repair:
    """Chooses what to recompute by the words of the question.

    A word counts for the more, the fewer modules have it (inverse document frequency).

    Args:
        text: Gives the text of tokens.
    """

    def __init__(self, text: Callable[[Tokens], str]) -> None:
        self._text = text
        self._known: WeakKeyDictionary[Slice, frozenset[str]] = WeakKeyDictionary()

    def choose(self, spans: Sequence[Span], budget: int) -> dict[Span, Runs]:
        """The runs of each span to evaluate afresh, ``budget`` tokens in all: the most relevant module from its
        beginning on, then others as far as they fit as a whole.

        Only slices that are not exact are considered, and none that is made for this plan. The question is the tokens
        of the plan that are evaluated in any case.
        """
        modules: dict[str, list[Span]] = {}
        for span in spans:
            if span.slice and span.relation != "exact" and not span.made:
                modules.setdefault(span.slice.module, []).append(span)
        runs: dict[Span, Runs] = {}
        for module in self._ranked(modules, [span.tokens for span in spans if span.slice is None]):
            if runs and sum(len(span.tokens) for span in modules[module]) > budget:
                continue
            for span in modules[module]:
                size = min(len(span.tokens), budget)
                budget -= size
                if size:
                    runs[span] = ((0, size),)
        return runs

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
        words = self._known.get(slice_)
        if words is None:
            words = self._known[slice_] = self._words_of(slice_.tokens)
        return words

    def _words_of(self, tokens: Tokens) -> frozenset[str]:
        return frozenset(_WORD.findall(self._text(tokens).casefold()))
