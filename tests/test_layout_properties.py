"""Properties of layouts and plans, over random schemas and prompts drawn from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cpucache.layout import ChatTemplate, Plan, Positions, SchemaLayout, bind
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.tree import (
    ANCHORS,
    Argument,
    Included,
    Module,
    NewText,
    Prompt,
    RoleEnd,
    RoleStart,
    Scaffold,
    Schema,
    Scope,
    Text,
    Turn,
    Union,
    modules_of,
    parts,
)
from tests.support.letters import Letters
from tests.support.oracle import Oracle
from tests.support.tiny import CHATML
from tests.test_pml_properties import choose, scopes, write

quick = settings(max_examples=150, deadline=None)

BEGIN, END = "<|im_start|>", "<|im_end|>\n"
TURNS = st.sampled_from(["", "<user>go</user>", "<user>go</user><assistant>we</assistant>", "<assistant/>"])


@dataclass
class Case:
    letters: Letters
    layout: SchemaLayout
    prompt: Prompt
    included: Included
    chatml: bool

    def plan(self, packed: bool | None = None) -> Plan:
        return bind(self.layout, self.included, packed=packed)

    def relaid(self) -> SchemaLayout:
        return laid(self.layout.schema, self.letters, self.chatml, self.layout.positions)


def laid(schema: Any, letters: Letters, chatml: bool, positions: Positions) -> SchemaLayout:
    return SchemaLayout(schema, letters, ChatTemplate(CHATML if chatml else None), positions)


def without_parameters(nodes: list) -> list:
    """The same scope with no parameters in it, where any text must be allowed to be long."""
    kept: list = []
    for kind, *rest in nodes:
        if kind in ("role", "module"):
            kept.append((kind, *rest[:-1], without_parameters(rest[-1])))
        elif kind == "union":
            kept.append((kind, without_parameters(rest[0]), rest[1]))
        elif kind == "text":
            kept.append((kind, *rest))
    return kept


@st.composite
def sets(draw: st.DrawFn, schema: Schema) -> Scaffold | None:
    """A scaffold set, of any modules that may be in one."""

    def members(scope: Scope) -> list[Module]:
        found: list[Module] = []
        for node in parts(scope):
            others = [node] if isinstance(node, Module) else list(node.members) if isinstance(node, Union) else []
            if isinstance(node, Union) and node.scaffold is not None:
                others = [member for member in others if member.name == node.scaffold]
            others = [module for module in others if module.cache]
            if others and draw(st.integers(0, 3)):
                found.append(draw(st.sampled_from(others)))
                found += members(found[-1])
        return found

    modules = members(schema)
    return Scaffold(tuple(modules), 1) if len(modules) > 1 else None


@st.composite
def cases(draw: st.DrawFn, positions: tuple[Positions, ...] = ("reserved", "packed")) -> Case:
    nodes = draw(scopes())
    # With 16 characters to a token, scaffolds and arguments are one token long and fit any parameter.
    size = draw(st.sampled_from([1, 3, 16]))
    content = "".join(map(write, nodes if size == 16 else without_parameters(nodes)))
    schema = parse_schema(f"<schema name='s'>x{content}</schema>")
    scaffolds = [drawn for _ in range(draw(st.integers(0, 3))) if (drawn := draw(sets(schema)))]
    schema = replace(schema, scaffolds=tuple(scaffolds), anchor=draw(st.sampled_from(ANCHORS)))
    letters = Letters(size=size, n_ctx_train=100_000, bos_text=draw(st.sampled_from([None, "<s>"])))
    chatml = draw(st.booleans())
    chosen = choose(draw, schema)
    prompt = parse_prompt(f"<prompt schema='s'{chosen.attributes}>{chosen.content}{draw(TURNS)}</prompt>")
    layout = laid(schema, letters, chatml, draw(st.sampled_from(positions)))
    return Case(letters, layout, prompt, resolve(prompt, schema), chatml)


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
@given(cases(), st.sampled_from([None, False, True]))
def test_spans_are_in_order_and_end_in_a_fresh_token(case: Case, packed: bool | None) -> None:
    plan = case.plan(packed)
    end, fresh = 0, False
    for span in plan.spans:
        assert len(span.tokens) > 0
        if span.segment is None:
            assert not fresh, "two fresh spans that could be one"
            assert span.start == end
        elif case.layout.packed if packed is None else packed:
            assert span.start == end
        else:
            # At home, or pushed no further than needed.
            assert span.start == max(end, span.segment.home)
        end, fresh = span.end, span.segment is None
    assert fresh
    assert plan.end == end


@quick
@given(cases())
def test_counts_add_up_and_slices_are_whole(case: Case) -> None:
    plan = case.plan()
    fresh = sum(len(span.tokens) for span in plan.spans if span.segment is None)
    assert plan.n_cached + fresh == plan.n_tokens == len(plan.tokens)
    slices = [span for span in plan.spans if span.segment is not None]
    assert plan.segments == [span.segment for span in slices]
    assert len(set(plan.segments)) == len(plan.segments)
    for index, span in enumerate(slices):
        assert span.segment is not None
        assert span.segment.cache
        assert not span.segment.placeholder
        assert span.segment in case.layout.segments
        cut = len(span.segment.tokens) - len(span.tokens)
        assert cut == 0 or (cut == 1 and index == len(slices) - 1 and plan.spans[-2:][0] is span)
        assert np.array_equal(span.tokens, span.segment.tokens[: len(span.tokens)])


def inside(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def stand_ins(scope: Scope, path: str) -> set[str]:
    """The paths of the scaffolds of a scope's unions, and of the scaffolds within these."""
    found: set[str] = set()
    for union in (node for node in parts(scope) if isinstance(node, Union)):
        for member in union.members:
            if member.name == union.scaffold:
                member_path = inside(path, member.name)
                found |= {member_path} | stand_ins(member, member_path)
    return found


def visible_modules(scope: Scope, path: str, around: set[str]) -> dict[str, set[str]]:
    """The paths of the modules that each module's text may see: those around it, itself, and stand-ins beside it."""
    seen = around | {path} | stand_ins(scope, path)
    visible = {path: seen}
    for name, module in modules_of(scope).items():
        visible |= visible_modules(module, inside(path, name), seen)
    return visible


@quick
@given(cases())
def test_contexts_are_earlier_segments_that_lie_before(case: Case) -> None:
    earlier: set[Any] = set()
    for segment in case.layout.segments:
        assert len(segment.tokens) > 0
        assert earlier.issuperset(segment.sees)
        earlier.add(segment)
        end = 0
        for span in segment.context:
            assert span.segment and span.whole
            assert span.start == end if case.layout.packed else span.start >= end and not span.delta
            end = span.end
        assert segment.context_end == segment.home if case.layout.packed else segment.context_end <= segment.home
        # What is in sight has seen nothing that is not, and less than this segment: so it can be made before.
        sight = {id(seen.tokens) for seen in segment.sees}
        assert len(sight) == len(segment.sees)
        for seen in segment.sees:
            assert sight >= {id(other.tokens) for other in seen.sees}
            assert len(seen.sees) < len(segment.sees)


@quick
@given(cases())
def test_segments_see_what_their_anchor_lets_them(case: Case) -> None:
    visible = visible_modules(case.layout.schema, "", set())
    for segment in case.layout.apart:
        modules = {seen.module for seen in segment.sees}
        assert modules <= visible[segment.module]
        if case.layout.schema.anchor == "ancestors":
            # Each context is that of its last segment, and this segment: so contexts make a tree.
            assert not segment.context or segment.sees == (*segment.sees[-1].sees, segment.sees[-1])
        elif segment.module:
            assert all(module == segment.module or module.startswith(f"{segment.module}.") for module in modules)
    assert all(segment.end <= case.layout.length for segment in case.layout.apart)


@quick
@given(cases())
def test_sets_add_to_sight_what_their_modules_hold(case: Case) -> None:
    layout = case.layout
    apart = {id(segment.tokens): segment for segment in layout.apart}
    place_of = {id(segment.tokens): index for index, segment in enumerate(layout.apart)}
    for scaffold in layout.scaffolds:
        mine = {id(segment.tokens) for segment in (*scaffold.segment_at.values(), *scaffold.segments)}
        for segment in scaffold.segments:
            old = apart[id(segment.tokens)]
            assert (segment.module, segment.cache, segment.placeholder) == (old.module, old.cache, old.placeholder)
            assert layout.packed or segment.home == old.home
            new, before = ([id(seen.tokens) for seen in each.sees] for each in (segment, old))
            assert set(before) < set(new) or (set(before) == set(new) and set(segment.sees) != set(old.sees))
            assert sorted(new, key=place_of.__getitem__) == new
            added = set(new) - set(before)
            assert all(each in mine or apart[each].placeholder for each in added)


@quick
@given(cases())
def test_sets_do_not_change_what_is_read(case: Case) -> None:
    apart = bind(case.layout, case.included, scaffolds=False)
    assert set(apart.segments) <= set(case.layout.apart)
    assert np.array_equal(apart.tokens, case.plan().tokens)


@quick
@given(cases(positions=("reserved",)))
def test_reserved_homes_never_overlap_but_among_members_of_a_union(case: Case) -> None:
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
            return extent.own
        assert extent.own + inside == extent.end - extent.start
        return int(extent.end - extent.start)

    assert check(case.layout.extent) == case.layout.length


@quick
@given(cases())
def test_binding_and_laying_are_deterministic(case: Case) -> None:
    plan, again = case.plan(), case.plan()
    assert [(span.start, span.segment) for span in plan.spans] == [(span.start, span.segment) for span in again.spans]
    assert np.array_equal(plan.tokens, again.tokens)
    other = case.relaid()
    other_plan = bind(other, case.included)
    assert [(span.start, span.tokens.tolist(), span.delta) for span in other_plan.spans] == [
        (span.start, span.tokens.tolist(), span.delta) for span in plan.spans
    ]
    assert [
        (segment.module, segment.home, segment.tokens.tolist(), [seen.home for seen in segment.sees])
        for segment in other.segments
    ] == [
        (segment.module, segment.home, segment.tokens.tolist(), [seen.home for seen in segment.sees])
        for segment in case.layout.segments
    ]


@quick
@given(cases())
def test_positions_do_not_change_what_is_read(case: Case) -> None:
    other: Positions = "packed" if case.layout.positions == "reserved" else "reserved"
    layout = laid(case.layout.schema, case.letters, case.chatml, other)
    assert np.array_equal(bind(layout, case.included).tokens, case.plan().tokens)
    assert np.array_equal(case.plan(packed=True).tokens, case.plan().tokens)


@quick
@given(cases())
def test_sights_are_those_of_the_oracle(case: Case) -> None:
    assume(case.chatml)
    layout = case.layout
    oracle = Oracle(layout.schema, case.letters, packed=layout.packed)  # type: ignore[arg-type]
    runs = [run for run in oracle.runs if run.tokens]
    number = {run: index for index, run in enumerate(runs)}
    assert [(run.tokens, run.home) for run in runs] == [(each.tokens.tolist(), each.home) for each in layout.apart]
    apart = {id(segment.tokens): index for index, segment in enumerate(layout.apart)}
    for modules, segments in [((), layout.apart), *((each.modules, each.segments) for each in layout.scaffolds)]:
        for segment in segments:
            seen = oracle.seen_by(runs[apart[id(segment.tokens)]], frozenset(modules))
            assert [number[run] for run in seen if run.tokens] == [apart[id(other.tokens)] for other in segment.sees]
