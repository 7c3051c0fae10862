"""What a slot holds, and that finding it takes time in proportion to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cpucache.layout import Tokens
from cpucache.reuse.history import History
from cpucache.reuse.plan import Span
from cpucache.reuse.slices import Slices, Trail
from cpucache.reuse.slot import Slot

COUNT = 300


def tokens(number: int) -> Tokens:
    return np.arange(5 * number, 5 * number + 5, dtype=np.int32)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """``added()`` gives the number of spans that have been hashed since the last call."""
    count = 0
    add = Trail.add

    def counted(self: Trail, span: Span) -> None:
        nonlocal count
        count += 1
        add(self, span)

    def since() -> int:
        nonlocal count
        found, count = count, 0
        return found

    monkeypatch.setattr(Trail, "add", counted)
    return since


def test_many_slices_are_recognised_in_one_pass(added: Callable[[], int]) -> None:
    """As after a turn with a recurrent model, which evaluates in one run what the plan has as slices."""
    slices = Slices("model", "format")
    parts = [tokens(number) for number in range(COUNT)]
    wanted = slices.cut((), np.concatenate(parts), ends=[5 * number for number in range(1, COUNT + 1)])
    slot = Slot(0)
    slot.held = [Span(0, np.concatenate([*parts, tokens(COUNT)]))]
    added()

    assert all(slot.recognise(slice_) for slice_ in wanted)
    assert [span.slice for span in slot.held] == [*wanted, None]
    assert all(slot.recognise(slice_) for slice_ in wanted), "again, from the first on"
    assert not slot.recognise(slices.create(slot.held, tokens(0)))
    assert added() < 4 * COUNT


def test_a_conversation_is_read_in_one_pass(added: Callable[[], int]) -> None:
    slices = Slices("model", "format")
    history, again = History(slices), History(slices)
    saved = [history.add_tokens([tokens(number)]) for number in range(COUNT)]

    for entry in saved:
        again.add_saved([slice_.span for slice_ in entry])

    assert [span.slice for span in again.spans] == history.slices
    assert {span.relation for span in again.spans} == {"exact"}
    assert added() < 8 * COUNT


def test_what_a_slot_holds() -> None:
    """By content and position, also with unused positions between spans."""
    slices = Slices("model", "format")
    first, second = (slices.create((), tokens(number)) for number in range(2))
    slot = Slot(0)
    slot.held = [first.span, replace(second.span, start=9), Span(14, tokens(2))]

    assert all(slot.holds(span) for span in (first.span, second.span.moved(9), Span(14, tokens(2))))
    assert not any(slot.holds(span) for span in (second.span, first.span.moved(9), first.span.moved(5)))
    assert not any(slot.holds(Span(start, tokens(2))) for start in (0, 7, 13, 15, 19))
    assert not Slot(1).holds(first.span)
