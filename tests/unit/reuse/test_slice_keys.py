"""The key of a slice names what the slice attended to, however that text was cut."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpucache.reuse import Slice, Slices, Span
from cpucache.reuse.slices import GrowingTrail, Trail
from tests.support.cutting import every
from tests.support.meaning import Meanings
from tests.support.tries import tries
from tests.support.workbench import Tokens

quick = tries(150)
SLICES = Slices("model", "format", every())


def array(tokens: list[int]) -> Tokens:
    return np.array(tokens, np.int32)


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=3).map(array)


@st.composite
def contexts(draw: st.DrawFn, depth: int = 0) -> list[Span]:
    """Spans in order: tokens to evaluate and slices, moved or not, whole or cut, with gaps here and there."""
    spans: list[Span] = []
    for _ in range(draw(st.integers(0, 3 if depth < 2 else 1))):
        end = spans[-1].end if spans else 0
        at = end + draw(st.sampled_from([0, 0, 0, 1]))
        kind = draw(st.sampled_from(["fresh", "after this", "moved", "other"]))
        tokens = draw(TOKENS)
        if kind == "fresh":
            spans.append(Span(at, tokens))
            continue
        before = draw(contexts(depth + 1)) if kind == "other" and depth < 2 else spans
        first = before[-1].end if before else 0
        slice_ = SLICES.create(before, tokens, start=first + (kind == "moved"))
        spans.append(Span(at, tokens[: draw(st.integers(1, len(tokens)))], slice_))
    return spans


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    before = draw(contexts())
    end = before[-1].end if before else 0
    return SLICES.create(before, draw(TOKENS), start=end + draw(st.integers(0, 1)))


@quick
@given(st.lists(slices(), min_size=2, max_size=6))
def test_two_slices_have_the_same_key_if_and_only_if_they_are_the_same(drawn: list[Slice]) -> None:
    known = Meanings()
    keys = {slice_.key for slice_ in drawn}
    accounts = {known.account(slice_) for slice_ in drawn}
    pairs = {(slice_.key, known.account(slice_)) for slice_ in drawn}
    assert len(keys) == len(accounts) == len(pairs)


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_a_key_does_not_depend_on_how_text_was_cut_or_what_of_it_was_saved(
    text: list[int], data: st.DataObject
) -> None:
    def cut() -> list[Span]:
        edges = sorted(data.draw(st.sets(st.integers(1, len(text)), max_size=6)) | {0, len(text)})
        spans: list[Span] = []
        for begin, end in itertools.pairwise(edges):
            tokens = array(text[begin:end])
            slice_ = SLICES.create(spans, tokens)
            spans.append(data.draw(st.sampled_from([slice_.span, Span(begin, tokens)])))
        return spans

    one, other = Trail(cut()), Trail(cut())
    assert (one.key, one.end, one.exact) == (other.key, len(text), True)


@quick
@given(contexts(), st.data())
def test_whatever_changes_in_a_context_changes_the_key(spans: list[Span], data: st.DataObject) -> None:
    if not spans:
        return
    at = data.draw(st.integers(0, len(spans) - 1))
    span = spans[at]
    tokens = span.tokens.copy()
    tokens[data.draw(st.integers(0, len(tokens) - 1))] += 5
    fresh = [*spans[:at], Span(span.start, tokens), *spans[at + 1 :]]
    moved = [*spans[:at], *(each.moved(1) for each in spans[at:])]
    keys = {Trail(each).key for each in (spans, fresh, moved, spans[:at])}
    assert len(keys) == 4
    # Models and formats have keys of their own.
    each_kind = (SLICES, Slices("other", "format", every()), Slices("model", "other", every()))
    assert len({each.create(spans, tokens).key for each in each_kind}) == 3


@quick
@given(st.lists(contexts(), min_size=1, max_size=3), st.data())
def test_a_growing_trail_is_that_of_the_spans_whatever_it_held_before(
    drawn: list[list[Span]], data: st.DataObject
) -> None:
    growing = GrowingTrail()
    for _ in range(data.draw(st.integers(1, 6))):
        spans = data.draw(st.sampled_from(drawn))
        spans = spans[: data.draw(st.integers(0, len(spans)))]
        other = growing.copy()
        for found in (growing.of(spans), other.of(spans)):
            expected = Trail(spans)
            assert (found.key, found.end, found.exact) == (expected.key, expected.end, expected.exact)
            assert (list(found.attends_to), found.n_tokens) == (list(expected.attends_to), expected.n_tokens)
