"""Properties of the lookup, over random schemas, prompts drawn from them, and stores that prompts have filled."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

from cpucache.layout import Bound, NewText, Positions, Segment
from cpucache.pml.tree import Schema
from cpucache.reuse import Fidelity, Plan, Slice, Span, asked
from cpucache.reuse.refine import exact_slices
from tests.support.drawn import changed, letters, prompts, schemas, split, texts_of
from tests.support.meaning import Meanings, spelt
from tests.support.prompting import Prompting, planning, written
from tests.support.tiny import CHATML
from tests.support.tries import tries

PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
quick = tries(100, phases=PHASES)
POSITIONS = st.sampled_from(["reserved", "packed"])
FIDELITIES = st.sampled_from([Fidelity(), Fidelity(0.1), Fidelity(0.5), Fidelity(exact=True)])


@contextmanager
def desk_of(schema: Schema, positions: Positions, draw: st.DataObject) -> Iterator[Prompting]:
    template = draw.draw(st.sampled_from([None, CHATML]))
    with planning(schema, positions, letters=letters(), template=template) as desk:
        yield desk


def bound_of(desk: Prompting, draw: st.DataObject):  # type: ignore[no-untyped-def]
    return desk.bound(*split(draw.draw(prompts(desk.layout.schema))))


def allowed(desk: Prompting, module: str) -> list[tuple[int, ...]]:
    """The texts of the schema that a slice of a module's text may have attended to."""
    texts = texts_of(desk.layout)
    if desk.layout.schema.anchor == "none":
        return [tokens for path, _, tokens in texts if path == module]
    isolating = next((isolated for path, isolated, _ in texts if path == module), "")
    if not isolating:
        return [tokens for _, _, tokens in texts]
    around = ["", *(isolating[:at] for at, letter in enumerate(isolating) if letter == ".")]
    return [tokens for path, isolated, tokens in texts if path in around or isolated == isolating]


def wrong(
    desk: Prompting, plan: Plan, pieces: list[tuple[int, ...]], known: Meanings, *, anywhere: bool
) -> list[tuple[Span, str]]:
    """The spans of a plan that may not be, and why."""
    found: list[tuple[Span, str]] = []
    end = 0
    for number, span in enumerate(plan.spans):
        if span.start < end or not len(span.tokens):
            found.append((span, "empty, or upon the one before"))
        end = span.end
        if span.slice is None:
            continue
        if span.tokens.tolist() != span.slice.tokens[: len(span.tokens)].tolist():
            found.append((span, "other tokens than its slice"))
        slice_ = span.slice
        tokens = [int(token) for each in plan.spans[:number] for token in each.tokens]
        exact = known.context_of(slice_) == tuple(enumerate(tokens)) and span.start == slice_.start == len(tokens)
        if span.relation == "exact" and not exact:
            found.append((span, "not exact"))
        if exact:
            continue
        # Arguments and other new text of this prompt, as far as they stand before it.
        new = [piece for piece in pieces if len(piece)]
        limited = allowed(desk, slice_.module)
        anyone = len(limited) == len(texts_of(desk.layout)) and desk.layout.schema.anchor != "none"
        if anywhere and anyone:
            continue
        words = [*limited, *new] if anyone else limited
        if span.relation == "foreign" or not all(spelt(run, words) for run in known.attended(slice_)):
            found.append((span, "attended to what it may not"))
    return found


def keep(desk: Prompting, slices: list[Slice], known: Meanings) -> None:
    """Saves slices, and all slices that they need."""
    for slice_ in slices:
        if slice_.context is not None and slice_.key not in known.found:
            keep(desk, slice_.needs, known)
            known.found[slice_.key] = slice_
            desk.pretend([slice_])


# Few draws bring a prompt to a segment whose slices are all of other prompts: a lookup that takes them was found after
# 70 to 360.
@tries(500, phases=PHASES)
@given(schemas(), POSITIONS, st.data())
def test_no_prompt_takes_what_attended_to_text_of_another(
    schema: Schema, positions: Positions, data: st.DataObject
) -> None:
    """Nor what attended to other modules, where it may not, nor to an older version of the schema."""
    known = Meanings()
    with desk_of(schema, positions, data) as first:
        second = first.with_schema(changed(schema, data.draw(st.sampled_from(["e", "Root", "blue"])), "xyz"))
        if data.draw(st.booleans()):
            keep(first, first.reading(), known)
        for _ in range(data.draw(st.integers(1, 4))):
            desk = data.draw(st.sampled_from([first, second]))
            bound = bound_of(desk, data)
            anywhere = data.draw(st.booleans())
            reuse = "anywhere" if anywhere else "schema"
            plan = desk.plan(bound, data.draw(FIDELITIES), reuse=reuse, packed=data.draw(st.booleans()))
            pieces = [tuple(piece.tokens.tolist()) for piece in bound.pieces]
            assert wrong(desk, plan, pieces, known, anywhere=anywhere) == []
            if data.draw(st.booleans()):
                keep(desk, plan.slices, known)
            if data.draw(st.booleans()):
                keep(desk, exact_slices(asked(bound), desk.kv_cache.slices), known)


def closes(span: Span, bound: Bound) -> bool:
    """Whether a span is the short closing text of a schema, which is evaluated with the question at any level."""
    end = [piece for piece in bound.pieces if len(piece.tokens)][-1]
    # The last token of all is evaluated in any case.
    spliced = (each for each in reversed(bound.pieces) if each is not end or len(each.tokens) > 1)
    last = next(each for each in spliced if isinstance(each, Segment) and each.cache)
    texts = (last.tokens, last.tokens[:-1])
    return not last.module and len(span.tokens) <= 16 and any(np.array_equal(span.tokens, text) for text in texts)


@quick
@given(schemas(), POSITIONS, st.data())
def test_a_prompt_of_encoded_modules_evaluates_its_new_tokens(
    schema: Schema, positions: Positions, data: st.DataObject
) -> None:
    """Any selection and order, any members and arguments; besides, the tokens that may be recomputed."""
    with desk_of(schema, positions, data) as desk:
        desk.pretend(desk.reading())
        for _ in range(3):
            bound = bound_of(desk, data)
            cached = sum(len(piece.tokens) for piece in bound.pieces if isinstance(piece, Segment) and piece.cache)
            last = [piece for piece in bound.pieces if len(piece.tokens)][-1]
            cached -= isinstance(last, Segment) and last.cache
            share = data.draw(st.sampled_from([0, 0.1, 0.5, 1]))
            plan = desk.plan(bound, Fidelity(share), packed=data.draw(st.sampled_from([None, True])))
            assert not any(span.missing for span in plan.spans)
            assert plan.count("foreign") == 0
            evaluated = [span for span in plan.spans if span.slice is None and not span.recomputed]
            assert {span.why for span in evaluated} <= {"new text", 'cache="false"', "the last token"}
            # New text that happens to be a module's, right where the schema has it, is taken from the slice of that.
            new = sum(len(piece.tokens) for piece in bound.pieces if isinstance(piece, NewText))
            new -= sum(len(span.tokens) for span in evaluated if span.why == "new text")
            assert plan.n_cached + plan.n_recomputed == cached + new
            again = [span for span in plan.spans if span.recomputed and not closes(span, bound)]
            # Of the first module there is more than the budget, or nothing at all.
            assert sum(len(span.tokens) for span in again) <= 2 * math.ceil(share * cached)


@quick
@given(schemas(), POSITIONS, st.data())
def test_a_miss_is_paid_once(schema: Schema, positions: Positions, data: st.DataObject) -> None:
    """What one prompt has paid for, no other pays for, wherever it stands there; arguments or not."""
    paid: set[Segment] = set()
    with desk_of(schema, positions, data) as desk:
        for _ in range(4):
            bound = bound_of(desk, data)
            plan = desk.plan(bound, Fidelity(data.draw(st.sampled_from([0, 0.1]))))
            used = [piece for piece in bound.pieces if isinstance(piece, Segment) and piece.cache]
            had = {(each.module, each.tokens.tobytes()) for each in paid}
            for span in plan.spans:
                if span.missing and span.slice is not None:
                    assert (span.slice.module, span.slice.tokens.tobytes()) not in had, span
            desk.pretend(plan.wanted)
            end = [piece for piece in bound.pieces if len(piece.tokens)][-1]
            # Of a text of one token that a prompt ends with, no slice is saved.
            paid.update(each for each in used if each is not end or len(each.tokens) > 1)


@quick
@given(schemas(), POSITIONS, st.data())
def test_what_was_refined_is_exact(schema: Schema, positions: Positions, data: st.DataObject) -> None:
    with desk_of(schema, positions, data) as desk:
        desk.pretend(desk.reading())
        bound = bound_of(desk, data)
        level = data.draw(st.sampled_from([Fidelity(0.3), Fidelity(exact=True)]))
        before = desk.plan(bound, level)
        desk.pretend(exact_slices(asked(bound), desk.kv_cache.slices))
        plan = desk.plan(bound, level)
        assert plan.exact and not any(span.missing or span.recomputed for span in plan.spans)
        assert plan.tokens.tolist() == before.tokens.tolist()


def test_arguments_of_other_prompts_are_foreign() -> None:
    """A slice that attended to another argument is taken on request only."""
    schema = written("Root. <parameter name='p' length='4'/> tail <module name='m'>green leaves</module>")
    with planning(schema, letters=letters()) as desk:
        desk.pretend(exact_slices(asked(desk.bound("<m/>", "p='a'")), desk.kv_cache.slices))
        bound = desk.bound("<m/>go", "p='bcd'")

        default, anywhere = desk.plan(bound), desk.plan(bound, reuse="anywhere")

        assert [span.relation for span in anywhere.spans if span.slice] == ["exact", "foreign", "foreign"]
        assert default.count("foreign") == 0
        missing = [span.slice.module for span in default.spans if span.slice and span.missing]
        assert missing == ["", "m"], "evaluated for this prompt, instead of what attended to the other argument"


def test_an_older_version_of_the_schema_is_foreign() -> None:
    old = written("<module name='a'>the blue sea</module><module name='b'>green leaves</module>")
    with planning(old, letters=letters()) as desk:
        desk.pretend(desk.reading())
        new = desk.with_schema(written("<module name='a'>the red sea!</module><module name='b'>green leaves</module>"))

        default, anywhere = new.plan("<b/>go"), new.plan("<b/>go", reuse="anywhere")

        assert [span.relation for span in anywhere.spans if span.slice] == ["foreign"]
        assert [span.missing for span in default.spans if span.slice] == [True]


@pytest.mark.parametrize("attribute", ["isolate", "anchor"])
def test_what_is_isolated_takes_no_slice_that_attended_to_another_module(attribute: str) -> None:
    """Not even on request: a slice of the same text that attended to other modules lies in the store."""
    inside = "Root. <module name='a'>the blue sea</module><module name='b' {}>green leaves</module>"
    isolated = inside.format("isolate='true'" if attribute == "isolate" else "")
    with planning(written(inside.format("")), letters=letters()) as open_to_all:
        open_to_all.pretend(open_to_all.reading())
        desk = open_to_all.with_schema(written(isolated, "anchor='none'" if attribute == "anchor" else ""))

        for reuse in ("schema", "anywhere"):
            (of_b,) = [
                span for span in desk.plan("<b/>go", reuse=reuse).spans if span.slice and span.slice.module == "b"
            ]
            assert of_b.missing
            assert of_b.slice is not None and of_b.slice.attended_tokens == (2 if attribute == "isolate" else 0)
