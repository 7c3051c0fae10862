"""The history of a conversation: the spans of its entries where they stand now, and what has left the context."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.reuse.slices import Slice, Slices, Span, Trail


class History:
    """Entries in order, each a few spans. The first ``fixed`` stay; those behind may leave, the oldest first.

    When some leave, the rest moves down, without being evaluated again: its states keep what they attended to
    (CachedAttention, section 3.4). Where a model's state can't be moved (``movable=False``) the rest becomes slices
    of its own, evaluated behind what is left.
    """

    def __init__(self, slices: Slices, *, movable: bool = True) -> None:
        self._slices = slices
        self._movable = movable
        self._entries: list[tuple[Span, ...]] = []
        self.fixed = 0
        self.left_out = 0
        """Entries that have left."""

    def __len__(self) -> int:
        return len(self._entries)

    def copy(self) -> History:
        """The same history, to go on with apart from this one."""
        other = copy.copy(self)
        other._entries = list(self._entries)
        return other

    @property
    def spans(self) -> list[Span]:
        """What is in the context, in order of position."""
        return [span for entry in self._entries for span in entry]

    @property
    def n_tokens(self) -> int:
        """Tokens in the context."""
        return sum(self.size(index) for index in range(len(self)))

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return next((entry[-1].end for entry in reversed(self._entries) if entry), 0)

    @property
    def slices(self) -> list[Slice]:
        """The slices in the context."""
        return [span.slice for span in self.spans if span.slice]

    def size(self, entry: int) -> int:
        """Tokens of an entry that are in the context."""
        return sum(len(span.tokens) for span in self._entries[entry])

    def add(self, spans: Iterable[Span]) -> None:
        """The next entry. Its spans stand behind all others."""
        self._entries.append(tuple(spans))

    def add_saved(self, spans: Sequence[Span]) -> None:
        """Adds the next entry, of spans as they were saved.

        An earlier entry whose slices are gone may have become other slices since then, at other positions. The spans
        move with it, and those that were exact are exact no more.
        """
        trail = Trail(self.spans)
        delta = trail.end - spans[0].start
        entry = []
        for span in (each.moved(delta) for each in spans):
            changed = span.relation == "exact" and not trail.in_place(span)
            entry.append(replace(span, relation="clean") if changed else span)
            trail.add(span)
        self.add(entry)

    def add_tokens(self, parts: Sequence[Tokens], module: str = "") -> list[Slice]:
        """The next entry, cut into slices as told; gives them."""
        spans = self.spans
        made: list[Slice] = []
        for part in parts:
            made.append(self._slices.make(spans, part, module))
            spans.append(made[-1].span)
        self.add(block.span for block in made)
        return made

    def leave_out(self, count: int) -> None:
        """Let the first ``count`` entries that are not fixed leave, those that have left already among them."""
        first = self.fixed + self.left_out
        leaving = range(first, self.fixed + count)
        kept = self._entries[self.fixed + count :]
        gone = [span for index in leaving for span in self._entries[index]]
        for index in leaving:
            self._entries[index] = ()
        self.left_out = max(self.left_out, count)
        if not gone:
            return
        if self._movable:
            # What stood right behind the gap closes up to what stands before it.
            follower = next((span for entry in kept for span in entry), None)
            delta = gone[0].start - (follower.start if follower else gone[0].start)
            self._entries[self.fixed + count :] = [tuple(span.moved(delta) for span in entry) for entry in kept]
        else:
            del self._entries[self.fixed + count :]
            for entry in kept:
                tokens = joined([span.tokens for span in entry])
                self.add(block.span for block in self._slices.cut(self.spans, tokens))
