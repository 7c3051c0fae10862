"""What spans hold, spelt out: two contexts are the same if and only if their meanings are equal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from cpucache.reuse import Slice, Span

Words = frozenset[tuple[int, ...]]


@dataclass
class Meanings:
    """Meanings of spans; slices that were found in a store are looked up in ``found``, by key."""

    found: dict[str, Slice] = field(default_factory=dict)
    _contexts: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    _attended: dict[str, Words] = field(default_factory=dict)

    def of(self, spans: Iterable[Span]) -> tuple[Any, ...]:
        """Each token with its position, as far as its state is what evaluating the tokens one by one gives; other
        slices with the meaning of their contexts."""
        found: list[Any] = []
        end = 0
        for span in spans:
            if not len(span.tokens):
                continue
            slice_ = span.slice
            if slice_ is None or (span.start == end == slice_.start and self.context_of(slice_) == tuple(found)):
                found += zip(range(span.start, span.end), span.tokens.tolist(), strict=True)
            else:
                found.append((span.start, len(span.tokens), self.account(slice_)))
            end = span.end
        return tuple(found)

    def context_of(self, slice_: Slice) -> tuple[Any, ...]:
        """The meaning of the context of a slice."""
        if slice_.key not in self._contexts:
            self._contexts[slice_.key] = self.of(self._context(slice_))
        return self._contexts[slice_.key]

    def account(self, slice_: Slice) -> tuple[Any, ...]:
        """What the key of a slice names, besides the model."""
        return slice_.start, tuple(slice_.tokens.tolist()), self.context_of(slice_)

    def attended(self, slice_: Slice) -> Words:
        """Every run of tokens that a slice attended to, at whatever remove."""
        if slice_.key not in self._attended:
            found: set[tuple[int, ...]] = set()
            for span in self._context(slice_):
                found.add(tuple(span.tokens.tolist()))
                if span.slice is not None:
                    found |= {tuple(span.slice.tokens.tolist())} | self.attended(span.slice)
            self._attended[slice_.key] = frozenset(found)
        return self._attended[slice_.key]

    def _context(self, slice_: Slice) -> tuple[Span, ...]:
        known = slice_ if slice_.context is not None else self.found[slice_.key]
        assert known.context is not None
        return known.context


def spelt(tokens: tuple[int, ...], words: Iterable[tuple[int, ...]]) -> bool:
    """Whether tokens are some of ``words``, one after another."""
    words = [word for word in set(words) if word]
    reached = {0}
    for at in range(len(tokens)):
        if at in reached:
            reached |= {at + len(word) for word in words if tokens[at : at + len(word)] == word}
    return len(tokens) in reached
