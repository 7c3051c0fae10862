"""Histories: whatever is added and leaves, everything stands where it should and attended to what it should."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.reuse import History, Slice, Slices, Span
from tests.support.cutting import every
from tests.support.tries import tries
from tests.support.workbench import slice_of, some_tokens


@dataclass
class Oracle:
    """The same in lists of token ids."""

    fixed: int
    entries: list[list[int]] = field(default_factory=list)
    left_out: int = 0

    def leave_out(self, count: int) -> None:
        for index in range(self.fixed + self.left_out, self.fixed + count):
            self.entries[index] = []
        self.left_out = max(self.left_out, count)

    @property
    def tokens(self) -> list[int]:
        return [token for entry in self.entries for token in entry]


def tokens(span: Span) -> list[int]:
    found: list[int] = span.tokens.tolist()
    return found


def slices(size: int = 256) -> Slices:
    return Slices("model", "format", every(size))


def attended(slice_: Slice) -> list[int]:
    return [token for span in slice_.context or () for token in tokens(span)]


adding = st.lists(st.integers(1, 4), max_size=3).map(lambda sizes: ("add", sizes))
leaving = st.integers(0, 5).map(lambda count: ("leave", count))
steps = st.lists(st.one_of(adding, adding, leaving, st.just(("copy", None))), max_size=20)


@tries(300)
@given(st.integers(0, 2), steps, st.booleans(), st.integers(1, 3))
def test_any_history_is_what_lists_say(fixed: int, steps: list[tuple[str, Any]], movable: bool, size: int) -> None:
    oracle = Oracle(fixed)
    history = History(slices(size), movable=movable)
    history.fixed = fixed
    seen: dict[Slice, list[int]] = {}
    for number, (what, value) in enumerate(steps):
        if what == "add":
            before = oracle.tokens
            parts = [some_tokens(n, seed=97 * number + i) for i, n in enumerate(value)]
            added = history.add_tokens(parts, "here")
            assert [slice_.tokens.tolist() for slice_ in added] == [part.tolist() for part in parts]
            for slice_ in added:
                seen[slice_] = list(before)
                before += slice_.tokens.tolist()
            oracle.entries.append([token for part in parts for token in part.tolist()])
        elif what == "leave":
            count = min(value, len(oracle.entries) - fixed)
            if count >= 0:
                history.leave_out(count)
                oracle.leave_out(count)
        else:
            # What becomes of a copy does not change the original.
            copy = history.copy()
            copy.add_tokens([some_tokens(3, seed=number)])
            copy.leave_out(max(0, len(copy) - fixed))
        assert len(history) == len(oracle.entries)
        assert history.left_out == oracle.left_out
        assert history.n_tokens == len(oracle.tokens)
        assert [history.size(index) for index in range(len(history))] == [len(entry) for entry in oracle.entries]
        # Whatever has left, no position is without a token, and none has two.
        spans = history.spans
        assert [token for span in spans for token in tokens(span)] == oracle.tokens
        assert [span.start for span in spans] == np.cumsum([0, *(len(span.tokens) for span in spans)])[:-1].tolist()
        assert history.end == len(oracle.tokens)
        assert history.slices == [span.slice for span in spans]
        for span in spans:
            assert span.slice is not None
            if movable:
                # The slice is still the one that was added, and its context is the text that preceded it then.
                assert attended(span.slice) == seen[span.slice]
                assert span.slice.start == len(seen[span.slice])
                assert span.delta <= 0
            else:
                # The slice was created for its position, and its context is the text that precedes it now.
                assert span.delta == 0
                assert span.slice.chained
                assert len(span.tokens) <= max(size, 4)


def test_the_same_history_twice_is_the_same_slices() -> None:
    shared = slices()
    parts = [some_tokens(5, seed=i) for i in range(6)]

    def built() -> History:
        history = History(shared)
        history.fixed = 1
        for index, part in enumerate(parts):
            if index == 4:
                history.leave_out(2)
            history.add_tokens([part])
        return history

    one, two = built(), built()
    assert one.slices == two.slices
    # What came later attended to a shorter text, so it is another slice than without the gap.
    whole = History(shared)
    for part in parts:
        whole.add_tokens([part])
    assert whole.slices[:4] == [*one.slices[:1], *whole.slices[1:3], one.slices[1]]
    assert whole.slices[4] != one.slices[2]


def test_positions_left_out_of_what_is_fixed_stay_so() -> None:
    """A PML prompt may leave modules out, and their positions empty."""
    first, second = (slice_of(some_tokens(4, seed=i), start=start) for i, start in enumerate((0, 10)))
    history = History(slices())
    history.fixed = 1
    history.add([first.span, second.span])
    one, two, three = (history.add_tokens([some_tokens(3, seed=i)])[0] for i in range(2, 5))
    assert [slice_.start for slice_ in (one, two, three)] == [14, 17, 20]
    history.leave_out(1)
    assert [(span.start, span.slice) for span in history.spans] == [(0, first), (10, second), (14, two), (17, three)]
    history.leave_out(2)
    assert [(span.start, span.slice) for span in history.spans] == [(0, first), (10, second), (14, three)]
    history.leave_out(3)
    assert history.end == 14
    assert history.add_tokens([some_tokens(2)])[0].start == 14


@pytest.mark.parametrize("movable", [True, False])
def test_leaving_twice_is_leaving_once(movable: bool) -> None:
    def history(*counts: int) -> History:
        built = History(slices(), movable=movable)
        for index in range(6):
            built.add_tokens([some_tokens(2 + index, seed=index)])
        for count in counts:
            built.leave_out(count)
        return built

    one, two, three = history(4), history(1, 3, 4), history(4, 2, 4)
    assert one.left_out == two.left_out == three.left_out == 4
    shapes = [[(span.start, tokens(span)) for span in each.spans] for each in (one, two, three)]
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_saved_entry_is_exact_only_after_the_text_that_it_was_saved_after() -> None:
    some = some_tokens(12)
    first, second = slices(4), History(slices(4))
    before = History(first)
    before.add_tokens([some[:4]])
    saved = [slice_.span for slice_ in first.cut(before.spans, some[4:])]

    before.add_saved(saved)
    assert [span.relation for span in before.spans] == ["exact"] * 3

    second.add_tokens([some[:2], some[6:12]])
    second.add_saved(saved)
    assert [span.relation for span in second.spans[-2:]] == ["clean"] * 2
    assert [span.start for span in second.spans[-2:]] == [8, 12]
