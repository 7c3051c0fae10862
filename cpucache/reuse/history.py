"""The history of a conversation: the spans of its entries at their current positions, and which have left."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import joined
from cpucache.reuse.plan import Slice, Span
from cpucache.reuse.slices import GrowingTrail, Slices, Trail


class History:
    """Entries in order, each a few spans. The first ``fixed`` entries stay; later ones may leave, the oldest first.

    When entries leave, the later ones move down without being evaluated again: their states keep what they attended
    to (CachedAttention, section 3.4). Where a model's state can't be moved (``movable=False``), the later entries are
    cut into new slices, to be evaluated after the entries that remain.
    """

    def __init__(self, slices: Slices, *, movable: bool = True) -> None:
        self._slices = slices
        self._movable = movable
        self._entries: list[tuple[Span, ...]] = []
        self._trail = GrowingTrail()
        self.fixed = 0
        self.left_out = 0
        """Number of entries that have left the context."""

    def __len__(self) -> int:
        return len(self._entries)

    def copy(self) -> History:
        """Independent copy of this history."""
        other = copy.copy(self)
        other._entries = list(self._entries)
        other._trail = self._trail.copy()
        return other

    @property
    def spans(self) -> list[Span]:
        """Spans in the context, in order of position."""
        return [span for entry in self._entries for span in entry]

    @property
    def trail(self) -> Trail:
        """Trail of the spans in the context. The next call may change it: copy it before adding to it."""
        return self._trail.of(self.spans)

    @property
    def n_tokens(self) -> int:
        """Number of tokens in the context."""
        return sum(self.size(index) for index in range(len(self)))

    @property
    def end(self) -> int:
        """Position after the last token."""
        return next((entry[-1].end for entry in reversed(self._entries) if entry), 0)

    @property
    def slices(self) -> list[Slice]:
        """Slices in the context, in order of position."""
        return [span.slice for span in self.spans if span.slice]

    def size(self, entry: int) -> int:
        """Number of tokens of an entry that are in the context; 0 if the entry has left."""
        return sum(len(span.tokens) for span in self._entries[entry])

    def add(self, spans: Iterable[Span]) -> None:
        """Adds the next entry. Its spans must come after all others."""
        self._entries.append(tuple(spans))

    def add_saved(self, spans: Sequence[Span]) -> None:
        """Adds the next entry, of spans as they were saved.

        An earlier entry whose slices were lost may have been cut into other slices since, at other positions. The
        spans are moved to follow it. Exact spans whose context has changed become clean.
        """
        trail = self.trail.copy()
        delta = trail.end - spans[0].start
        entry = []
        for span in (each.moved(delta) for each in spans):
            changed = span.relation == "exact" and not trail.in_place(span)
            entry.append(replace(span, relation="clean") if changed else span)
            trail.add(span)
        self.add(entry)

    def add_tokens(self, parts: Sequence[Tokens], module: str = "") -> list[Slice]:
        """Adds the next entry, one slice for each of ``parts``, and returns these slices."""
        ends = np.cumsum([len(part) for part in parts]).tolist()
        added = self._slices.cut(self.spans, joined(list(parts)), module, ends=ends, trail=self.trail)
        self.add(slice_.span for slice_ in added)
        return added

    def leave_out(self, count: int) -> None:
        """Removes entries from the context until the first ``count`` after the fixed ones have left."""
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
            # The first remaining entry moves to where the gap began.
            follower = next((span for entry in kept for span in entry), None)
            delta = gone[0].start - (follower.start if follower else gone[0].start)
            self._entries[self.fixed + count :] = [tuple(span.moved(delta) for span in entry) for entry in kept]
        else:
            del self._entries[self.fixed + count :]
            for entry in kept:
                tokens = joined([span.tokens for span in entry])
                module = next((span.slice.module for span in entry if span.slice), "")
                cut = self._slices.cut(self.spans, tokens, module, trail=self.trail)
                self.add(slice_.span for slice_ in cut)
