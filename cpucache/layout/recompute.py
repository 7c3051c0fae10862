"""Which tokens of slices to evaluate afresh, when a share of them may be: those that the question is about.

CacheBlend picks the tokens whose keys and values are furthest from what they should be, layer by layer. llama.cpp's
public interface evaluates whole tokens or none, and a few tokens here and there bring answers no nearer, however they
are picked. What does is a module as a whole, in the sight of all before it: the one that the answer is in. It is found
as search engines find it. bench/RESULTS.md has what was tried and what was measured.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

from cpucache.layout.refresh import Reused, Rule
from cpucache.layout.segment import Runs, Segment
from cpucache.layout.vocabulary import Tokens

_WORD = re.compile(r"\w+")


class Relevance:
    """Ranks the modules of a prompt by the words that they share with its new text.

    A word counts for the more the fewer modules have it (inverse document frequency). ``text`` gives that of tokens.
    """

    def __init__(self, text: Callable[[Tokens], str]) -> None:
        self._text = text
        self._known: WeakKeyDictionary[Segment, frozenset[str]] = WeakKeyDictionary()

    def rule(self, share: float) -> Rule:
        """So large a share (0 to 1) of all tokens that are not exact: of the most relevant module from its beginning
        on, then of the next."""

        def choose(reused: Sequence[Reused], new: Sequence[Tokens]) -> dict[Segment, Runs]:
            modules: dict[str, list[Reused]] = {}
            for each in reused:
                modules.setdefault(each.segment.module, []).append(each)
            left = math.ceil(share * sum(each.size for each in reused))
            runs: dict[Segment, Runs] = {}
            for module in self._ranked(modules, new):
                for each in modules[module]:
                    size = min(each.size, left)
                    left -= size
                    runs[each.segment] = ((0, size),)
            return runs

        return choose

    def _ranked(self, modules: dict[str, list[Reused]], new: Iterable[Tokens]) -> list[str]:
        asked = {word for tokens in new for word in self._words_of(tokens)}
        words = {
            module: asked & set().union(*(self._words(each.segment) for each in parts))
            for module, parts in modules.items()
        }
        found = Counter(word for shared in words.values() for word in shared)
        value = {
            module: sum(math.log((len(modules) + 1) / found[word]) for word in shared)
            for module, shared in words.items()
        }
        return sorted(modules, key=lambda module: -value[module])

    def _words(self, segment: Segment) -> frozenset[str]:
        words = self._known.get(segment)
        if words is None:
            words = self._known[segment] = self._words_of(segment.tokens)
        return words

    def _words_of(self, tokens: Tokens) -> frozenset[str]:
        return frozenset(_WORD.findall(self._text(tokens).casefold()))
