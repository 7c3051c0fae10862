"""Properties of layouts and plans, over random schemas and prompts drawn from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpucache.layout import Bound, ChatTemplate, Positions, SchemaLayout, Segment, bind
from cpucache.layout.segment import LONGEST
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.tree import ANCHORS, Argument, Included, NewText, RoleEnd, RoleStart, Text, Turn
from cpucache.reuse import Fidelity, Lookup, Plan, Repair
from tests.support.documents import choose, scopes, write
from tests.support.letters import Letters
from tests.support.tiny import CHATML
from tests.support.tries import tries
from tests.support.workbench import planning

quick = tries(100)

BEGIN, END = "<|im_start|>", "<|im_end|>\n"
TURNS = st.sampled_from(["", "<user>go</user>", "<user>go</user><assistant>we</assistant>", "<assistant/>"])


@dataclass
class Case:
    letters: Letters
    layout: SchemaLayout
    included: Included
    chatml: bool

    @cached_property
    def bound(self) -> Bound:
        return bind(self.layout, self.included)

    def plan(self, fidelity: Fidelity | None = None, *, packed: bool = False) -> Plan:
        """Plans the prompt while no slice exists."""
        lookup = Lookup(planning(), Repair(self.letters.text))
        return lookup.plan(self.bound, fidelity or Fidelity(), packed=packed)


def laid(schema: Any, letters: Letters, chatml: bool, positions: Positions) -> SchemaLayout:
    return SchemaLayout(schema, letters, ChatTemplate(CHATML if chatml else None), positions)


def without_parameters(nodes: list[Any]) -> list[Any]:
    """The same scope with no parameters in it, where any text must be allowed to be long."""
    kept: list[Any] = []
    for kind, *rest in nodes:
        if kind in ("role", "module"):
            kept.append((kind, *rest[:-1], without_parameters(rest[-1])))
        elif kind == "union":
            kept.append((kind, without_parameters(rest[0]), rest[1]))
        elif kind == "text":
            kept.append((kind, *rest))
    return kept


@st.composite
def cases(draw: st.DrawFn, positions: tuple[Positions, ...] = ("reserved", "packed")) -> Case:
    nodes = draw(scopes())
    # With 16 characters to a token, scaffolds and arguments are one token long and fit any parameter.
    size = draw(st.sampled_from([1, 3, 16]))
    content = "".join(map(write, nodes if size == 16 else without_parameters(nodes)))
    schema = parse_schema(f"<schema name='s'>x{content}</schema>")
    schema = replace(schema, anchor=draw(st.sampled_from(ANCHORS)))
    letters = Letters(size=size, n_ctx_train=100_000, bos_text=draw(st.sampled_from([None, "<s>"])))
    chatml = draw(st.booleans())
    chosen = choose(draw, schema)
    prompt = parse_prompt(f"<prompt schema='s'{chosen.attributes}>{chosen.content}{draw(TURNS)}</prompt>")
    layout = laid(schema, letters, chatml, draw(st.sampled_from(positions)))
    return Case(letters, layout, resolve(prompt, schema), chatml)


def written(case: Case) -> str:
    """The text of a prompt, by a walk through its tree."""
    text = case.letters.bos_text or ""
    answered = True
    open_answer = False

    def walk(included: Included) -> None:
        nonlocal text, answered, open_answer
        for item in included.items:
            if isinstance(item, Included):
                walk(item)
            elif isinstance(item, Text | NewText):
                text, answered = text + item.text, True
            elif isinstance(item, Argument):
                text += item.value
            elif isinstance(item, RoleStart):
                text += f"{BEGIN}{item.node.role}\n" if case.chatml else ""
                answered = item.node.role == "assistant"
            elif isinstance(item, RoleEnd):
                text += END if case.chatml else "\n"
                answered = item.node.role == "assistant"
            elif isinstance(item, Turn):
                text += f"{BEGIN}{item.role}\n{item.text}" if case.chatml else item.text
                answered = open_answer = item.role == "assistant"
                if not open_answer:
                    text += END if case.chatml else "\n"

    walk(case.included)
    return text if answered or not case.chatml else f"{text}{BEGIN}assistant\n"


@quick
@given(cases())
def test_a_plan_holds_every_token_of_its_prompt_once_and_in_order(case: Case) -> None:
    plan = case.plan()
    assert case.letters.text(plan.tokens) == written(case)
    assert case.letters.text(plan.without_reuse().tokens) == written(case)


@quick
@given(cases(), st.booleans())
def test_spans_are_in_order_and_end_in_a_fresh_token(case: Case, packed: bool) -> None:
    plan = case.plan(packed=packed)
    reserved = {id(segment.tokens): segment.reserved for segment in case.layout.segments}
    end, before = 0, None
    for span in plan.spans:
        assert len(span.tokens) > 0
        if span.slice is None:
            assert before != (span.module, span.why), "two fresh spans that could be one"
            assert span.start == end
        elif case.layout.packed or packed:
            assert span.start == end
        else:
            # Where the schema has it, or pushed no further than needed.
            start = reserved[id(span.slice.tokens)]
            assert start is not None
            assert span.start == max(end, start)
        end, before = span.end, None if span.slice else (span.module, span.why)
    assert plan.spans[-1].slice is None
    assert plan.end == end


@quick
@given(cases())
def test_counts_add_up_and_slices_are_whole(case: Case) -> None:
    plan = case.plan()
    fresh = sum(len(span.tokens) for span in plan.spans if span.slice is None)
    assert plan.n_cached + fresh == plan.n_tokens == len(plan.tokens) == case.bound.n_tokens
    slices = [span for span in plan.spans if span.slice is not None]
    cached = {id(segment.tokens) for segment in case.layout.segments if segment.cache}
    assert plan.slices == [span.slice for span in slices]
    for index, span in enumerate(slices):
        assert span.slice is not None
        assert id(span.slice.tokens) in cached
        left = len(span.slice.tokens) - len(span.tokens)
        assert left == 0 or (left == 1 and index == len(slices) - 1 and plan.spans[-2] is span)
        assert np.array_equal(span.tokens, span.slice.tokens[: len(span.tokens)])


@quick
@given(cases())
def test_segments_and_placeholders_are_the_text_of_the_schema(case: Case) -> None:
    pieces = case.bound.pieces
    assert {piece.id for piece in pieces if isinstance(piece, Segment)} <= case.layout.texts
    assert all(0 < len(segment.tokens) <= LONGEST for segment in case.layout.segments)
    for segment in case.layout.segments:
        limit = case.layout.may_attend_to(segment)
        if case.layout.schema.anchor == "none":
            assert limit is not None
        assert limit is None or segment.id in limit <= case.layout.texts


@quick
@given(cases(positions=("reserved",)))
def test_reserved_positions_never_overlap_but_among_members_of_a_union(case: Case) -> None:
    def check(extent: Any) -> int:
        inside = 0
        for child in extent.children:
            assert extent.start <= child.start <= child.end <= extent.end
            inside += check(child)
        if extent.kind == "union":
            assert {child.start for child in extent.children} == {extent.start}
            inside = max(child.end for child in extent.children) - extent.start
        if extent.kind == "parameter":
            assert extent.end - extent.start == extent.own
            return int(extent.own)
        assert extent.own + inside == extent.end - extent.start
        return int(extent.end - extent.start)

    assert check(case.layout.extent) == case.layout.length


@quick
@given(cases())
def test_binding_and_laying_are_deterministic(case: Case) -> None:
    layout = laid(case.layout.schema, case.letters, case.chatml, case.layout.positions)
    other = Case(case.letters, layout, case.included, case.chatml)
    plans = [
        [(span.start, span.tokens.tolist(), span.slice.key if span.slice else None) for span in each.plan().spans]
        for each in (case, case, other)
    ]
    assert plans[0] == plans[1] == plans[2]
    assert [(segment.module, segment.reserved, segment.id) for segment in layout.segments] == [
        (segment.module, segment.reserved, segment.id) for segment in case.layout.segments
    ]


@quick
@given(cases())
def test_positions_do_not_change_what_is_read(case: Case) -> None:
    other: Positions = "packed" if case.layout.positions == "reserved" else "reserved"
    layout = laid(case.layout.schema, case.letters, case.chatml, other)
    assert np.array_equal(Case(case.letters, layout, case.included, case.chatml).plan().tokens, case.plan().tokens)
    assert np.array_equal(case.plan(packed=True).tokens, case.plan().tokens)


@quick
@given(cases(), st.sampled_from([Fidelity(recompute=1), Fidelity(recompute=0.3), Fidelity(exact=True)]))
def test_fidelity_does_not_change_what_is_read(case: Case, fidelity: Fidelity) -> None:
    plan = case.plan(fidelity)
    assert np.array_equal(plan.tokens, case.plan().tokens)
    assert plan.end == plan.n_tokens, "what is recomputed can't be evaluated after a gap"
    assert plan.exact or not fidelity.exact
