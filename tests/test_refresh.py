"""Link tokens and recomputed ones: spliced logits against a forward pass in NumPy under the mask that they imply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.engine import Engine
from cpucache.engine.tuning import DEFAULT, LEVELS, Fidelity, Tuning
from cpucache.errors import InputError
from cpucache.layout import ChatTemplate, Plan, Positions, Refresh, SchemaLayout, Segment, bind
from cpucache.layout.lead import LEAD
from cpucache.layout.recompute import Relevance
from cpucache.layout.refresh import Reused
from cpucache.layout.segment import Runs
from cpucache.layout.vocabulary import Tokens
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.reuse import Workspace
from cpucache.runtime import KVType
from cpucache.store import Store
from tests.support.oracle import Oracle
from tests.support.reference import ReferenceLlama, causal
from tests.support.sessions import engine, said
from tests.support.workbench import PLENTY, distance, opened, tolerance
from tests.test_layout import Letters, lay
from tests.test_modular_reuse import ASK, CASES, TOLERANCE, Case
from tests.test_sights import SETS, UNANCHORED

TinyModel = Callable[..., Path]
Choose = Callable[[list[int]], list[int]]

MANY = 40
"""Modules that are more than a context has sequences."""
CROWD = Case(
    "Root. " + "".join(f"<module name='m{n}'>{n}: the number {n * n} </module>" for n in range(MANY)),
    (
        ("", "".join(f"<m{n}/>" for n in range(MANY)) + ASK),
        # Fresh text between them makes many stretches.
        ("", "".join(f"<m{n}/> {n} " for n in range(0, MANY, 2)) + ASK),
        ("", "".join(f"<m{n}/>{' and ' * (n == 20)}" for n in range(MANY)) + ASK),
    ),
)


def check_logits(
    path: Path,
    case: Case,
    link: int,
    choose: Choose = lambda tokens: [],
    *,
    kv_type: KVType = "f32",
    positions: Positions = "reserved",
) -> None:
    """Every prompt of ``case``, one after the other on one workspace, against the oracle."""
    reference = ReferenceLlama(path)
    with opened(path, kv_type, n_ctx=2048) as context:
        model = context.model
        schema = parse_schema(f"<schema name='s' {case.attributes}>{case.schema}</schema>")
        layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template), positions)
        oracle = Oracle(schema, model, packed=positions == "packed")
        workspace = Workspace(context, Store(None, ram_budget=PLENTY), "model")

        def rule(reused: Sequence[Reused], new: Sequence[Tokens]) -> dict[Segment, Runs]:
            return {each.segment: tuple((at, at + 1) for at in choose(each.segment.tokens.tolist())) for each in reused}

        for attributes, content in case.prompts:
            included = resolve(parse_prompt(f"<prompt schema='s' {attributes}>{content}</prompt>"), schema)
            plan = bind(layout, included, packed=True, refresh=Refresh(link, {}, rule))
            found = oracle.renewed(included, lambda run: link, choose)
            assert plan.tokens.tolist() == [token for (_, tokens, _), _ in found for token in tokens]
            assert [start for span in plan.spans for start in range(span.start, span.end)] == list(range(plan.n_tokens))
            renewed = sum(len(each) for _, each in found)
            assert plan.n_cached == sum(len(tokens) for (_, tokens, run), _ in found if run) - renewed
            spent = workspace.prefill(plan)
            assert spent.cached_tokens <= plan.n_tokens
            expected = oracle.renewed_logits(reference, found).astype(np.float32)
            assert distance(context.last_logits(), expected) < TOLERANCE[kv_type], (attributes, content)
            # Nothing that lay in the context before makes a difference.
            workspace.reset()
            spent = workspace.prefill(plan)
            assert spent.cached_tokens == plan.n_cached
            assert distance(context.last_logits(), expected) < TOLERANCE[kv_type], (attributes, content)


# ---- against the model in NumPy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("link", [1, 4, 12])
def test_link_tokens(name: str, link: int, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CASES[name], link)


@pytest.mark.parametrize("link", [1, 5])
@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_link_tokens_in_other_sights(link: int, positions: Positions, tiny: TinyModel) -> None:
    for case in (*SETS.values(), *UNANCHORED.values()):
        check_logits(tiny("llama"), case, link, positions=positions)


@pytest.mark.parametrize("name", ["siblings", "nesting", "parameters", "roles"])
def test_link_tokens_with_bos(name: str, tiny: TinyModel) -> None:
    check_logits(tiny("llama", add_bos=True), CASES[name], 3)


@pytest.mark.parametrize("name", ["siblings", "nesting", "unions", "parameters", "another order"])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_link_tokens_with_smaller_keys(name: str, kv_type: KVType, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CASES[name], 3, kv_type=kv_type)


@pytest.mark.parametrize("link", [2, 30])
def test_more_modules_than_sequences(link: int, tiny: TinyModel) -> None:
    check_logits(tiny("llama"), CROWD, link)


RULES: dict[str, Choose] = {
    "here and there": lambda tokens: [at for at, token in enumerate(tokens) if token % 3 == 0],
    "all of some": lambda tokens: list(range(len(tokens) if tokens[0] % 2 else 0)),
    "the end": lambda tokens: list(range(len(tokens) - 4, len(tokens))) if len(tokens) > 4 else [],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("link", [0, 3])
def test_recomputed_tokens(rule: str, link: int, tiny: TinyModel) -> None:
    for name in ("siblings", "text between modules", "nesting", "parameters", "unions", "another order", "roles"):
        check_logits(tiny("llama"), CASES[name], link, RULES[rule])


# ---- what the rule chooses -------------------------------------------------------------------------------------------

PLACES = (
    "Root. <module name='a'>The harbour of Lisbon is large.</module><module name='b'>Kyoto has temples, and Kyoto has "
    "gardens.<module name='in'>The gardens are quiet.</module></module><module name='c'>The river of Porto is "
    "deep.</module><module name='d'>The river of Basel is deep.</module> So much for the places."
)
WHOLE = "<prompt schema='s'><a/><b><in/></b><c/><d/>{}</prompt>"


def chosen(question: str, share: float, content: str = PLACES, prompt: str = WHOLE) -> list[tuple[str, int]]:
    """What is renewed or evaluated afresh of which modules, and how many characters of it."""
    layout = lay(content, n_ctx_train=8192)
    included = resolve(parse_prompt(prompt.format(question)), layout.schema)
    vocabulary = layout.vocabulary
    assert isinstance(vocabulary, Letters)
    found: dict[str, int] = {}

    def rule(reused: Sequence[Reused], new: Sequence[Tokens]) -> Mapping[Segment, Runs]:
        assert not any(each.exact for each in reused)
        runs = Relevance(vocabulary.text).rule(share)(reused, new)
        for segment, ((begin, end),) in runs.items():
            assert begin == 0
            found[segment.module] = found.get(segment.module, 0) + end
        return runs

    plan = bind(layout, included, refresh=Refresh(rule=rule))
    assert plan.n_cached == bind(layout, included).n_cached - sum(found.values())
    return [(module, count) for module, count in found.items() if count]


def test_the_module_that_the_question_is_about_comes_first_from_its_beginning() -> None:
    assert chosen("How deep is the river in Basel?", 0.1) == [("d", 15)]
    assert chosen("How deep is the RIVER in PORTO?", 0.1) == [("c", 15)]
    # A word that few modules have says more than many that most have.
    assert chosen("Is the Kyoto?", 0.1) == [("b", 15)]
    # Then the next, as far as it goes.
    assert chosen("How deep is the river in Basel?", 0.3) == [("d", 27), ("c", 16)]
    assert chosen("How deep is the river in Basel?", 0.3)[0][1] == len("The river of Basel is deep.")
    # Of modules that share as much, the first; a module has the text around what is nested in it.
    assert chosen("Where are gardens?", 0.1) == [("b.in", 15)]


def test_all_of_it_is_all_of_it_and_what_has_seen_everything_before_it_is_no_part_of_it() -> None:
    everything = chosen("Basel?", 1)
    # The first module stands right behind what it has seen.
    assert {module for module, _ in everything} == {"b", "b.in", "c", "d", ""}
    assert chosen("Basel?", 0.5, prompt="<prompt schema='s'><a/>{}</prompt>") == [("", 12)]
    assert chosen("", 0.2)


def test_nothing_in_common_is_the_first_that_have_not_seen_what_stands_before_them() -> None:
    assert chosen("?", 0.1) == [("b", 15)]


# ---- where reuse ends ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["siblings", "text between modules", "nesting", "unions", "parameters", "roles"])
def test_link_tokens_as_many_as_there_are_is_full_prefill(name: str, tiny: TinyModel) -> None:
    path = tiny("llama")
    reference = ReferenceLlama(path)
    case = CASES[name]
    with opened(path) as context:
        model = context.model
        schema = parse_schema(f"<schema name='s'>{case.schema}</schema>")
        layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template))
        workspace = Workspace(context, Store(None, ram_budget=PLENTY), "model")
        for attributes, content in case.prompts:
            included = resolve(parse_prompt(f"<prompt schema='s' {attributes}>{content}</prompt>"), schema)
            plan = bind(layout, included, packed=True, refresh=Refresh(1000))
            # Slices that have seen all before them are as good as new.
            seen: list[Segment] = []
            for segment in plan.segments:
                assert list(segment.sees) == seen
                seen.append(segment)
            assert plan.n_cached == sum(len(span.tokens) for span in plan.spans if span.segment)
            workspace.prefill(plan)
            full = reference.evaluate(plan.tokens.tolist(), range(plan.n_tokens), causal(plan.n_tokens))[-1]
            assert distance(context.last_logits(), full.astype(np.float32)) < TOLERANCE["f32"]


def test_link_tokens_as_many_as_a_module_has_evaluate_it_afresh(tiny: TinyModel) -> None:
    """The module is new text then, whatever becomes of those around it."""
    with opened(tiny("llama")) as context:
        model = context.model
        text = "here another one."
        modules = f"<module name='a'>the first, </module><module name='b' link='99'>{text}</module>"
        schema = parse_schema(f"<schema name='s'>Root. {modules}</schema>")
        layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template), "packed")

        def plan(content: str, refresh: Refresh | None) -> Plan:
            included = resolve(parse_prompt(f"<prompt schema='s'>{content}</prompt>"), schema)
            return bind(layout, included, refresh=refresh)

        workspace = Workspace(context, Store(None, ram_budget=PLENTY), "model")
        linked = plan("<a/><b/> So?", Tuning().refresh(layout, Relevance(model.text)))
        assert [span.segment.module if span.segment else None for span in linked.spans] == ["", "a", None]
        workspace.prefill(linked)
        got = context.last_logits()
        workspace.reset()
        fresh = plan("<a/> So?", None)
        tokens = np.concatenate([model.tokenize(text), fresh.spans[-1].tokens])
        workspace.prefill(Plan((*fresh.spans[:-1], type(fresh.spans[-1])(fresh.spans[-1].start, tokens))))
        assert distance(got, context.last_logits()) < TOLERANCE["f32"]


# ---- who says how much -----------------------------------------------------------------------------------------------

LINKED = """<schema name='s' {attributes}>Root text of it. <module name='a' link='5'>the first module of all
<module name='in'>inside of it </module></module><module name='b'>here another one with text </module>
<union><module name='c' link='0'>and one that stays as it is</module></union></schema>"""
ALL = "<prompt schema='s'><a><in/></a><b/><c/><user>So?</user></prompt>"


def renewed(running: Engine, **settings: object) -> dict[str, int]:
    """How many tokens of each module of the prompt are renewed."""
    found: dict[str, int] = {}
    for span in running.plan(ALL, **settings).spans:  # type: ignore[arg-type]
        if span.segment:
            found[span.segment.module] = found.get(span.segment.module, 0) + span.n_renewed
    return found


def test_a_module_counts_before_the_call_the_call_before_the_schema_the_schema_before_the_level(
    tiny: TinyModel, tmp_path: Path
) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        running.add_schema(parse_schema(LINKED.format(attributes="link='3'")))
        # Its own number goes for what is inside a module, too, whose first text has seen all before it.
        assert renewed(running) == {"": 0, "a": 0, "a.in": 0, "b": 3, "c": 0}
        assert renewed(running, link_tokens=7) == {"": 0, "a": 0, "a.in": 0, "b": 7, "c": 0}
        assert renewed(running, link_tokens=0) == {"": 0, "a": 0, "a.in": 0, "b": 0, "c": 0}
        assert renewed(running, fidelity="fast", lead_tokens=0) == {"": 0, "a": 0, "a.in": 0, "b": 3, "c": 0}
        # A lead that is all that stands before it leaves nothing to link.
        assert renewed(running, fidelity="fast") == {"": 0, "a": 0, "a.in": 0, "b": 0, "c": 0}
        running.add_schema(parse_schema(LINKED.format(attributes="anchor='none'")))
        assert renewed(running, fidelity="fast") == {"": 0, "a": 5, "a.in": 5, "b": 0, "c": 0}
        assert renewed(running, link_tokens=2) == {"": 0, "a": 5, "a.in": 5, "b": 2, "c": 0}
        assert renewed(running, fidelity="fast", link_tokens=1)["b"] == 1
        # All have seen one another: there is nothing to renew.
        assert not any(renewed(running, fidelity="high", link_tokens=1).values())
        # Nothing in it asks for a module, so that these are the first.
        assert renewed(running, recompute=0.25)["a"] > 5


def test_where_nothing_is_renewed_positions_are_the_schema_s(tiny: TinyModel, tmp_path: Path) -> None:
    modules = "".join(f"<module name='{name}'>text {name * 40}</module>" for name in "abc")
    with engine(tiny("llama"), tmp_path) as running:
        layout = running.add_schema(parse_schema(f"<schema name='s'>Root.{modules}</schema>"))
        assert Tuning().refresh(layout, running.planner.relevance) is None

        def starts(prompt: str, **settings: Any) -> list[int]:
            return [span.start for span in running.plan(f"<prompt schema='s'>{prompt}?</prompt>", **settings).spans]

        homes = [segment.home for segment in layout.segments]
        # Whatever stands behind a gap has a gap to be evaluated behind.
        assert starts("<a/><c/>", fidelity="fast")[:3] == [homes[0], homes[1], homes[3]]
        assert starts("<a/><c/>", link_tokens=1)[:3] == [homes[0], homes[1], homes[2]]
        assert starts("<c/>", link_tokens=1)[:2] == [homes[0], homes[3]]
        assert starts("<a/><b/><c/>")[:4] == homes


def test_levels() -> None:
    schema = parse_schema("<schema name='s' link='3'>x</schema>")
    assert Fidelity().tuning(schema) == Fidelity(DEFAULT).tuning(schema)
    assert Fidelity("fast").tuning(schema) == Tuning(LEAD, link_tokens=3)
    assert Fidelity("balanced", 8, recompute=0).tuning(schema) == Tuning(8, link_tokens=3)
    assert Fidelity("high", link_tokens=0, recompute=0.5).tuning(schema) == Tuning(recompute=0.5, exact=True)
    # A call without a level changes what is usual, a call with one replaces it.
    usual = Fidelity("balanced", lead_tokens=5)
    assert Fidelity(recompute=0.5).over(usual) == Fidelity("balanced", 5, recompute=0.5)
    assert Fidelity().over(usual) == usual
    assert Fidelity("fast").over(usual) == Fidelity("fast")
    plain = parse_schema("<schema name='s'>x</schema>")
    assert [Fidelity(level).tuning(plain) for level in LEVELS] == list(LEVELS.values())
    assert [(level.lead_tokens, level.recompute > 0, level.exact) for level in LEVELS.values()] == [
        *[(LEAD, False, False), (LEAD, True, False), (0, False, True)]
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"link_tokens": -1}, "link_tokens=-1: must be 0 or more"),
        ({"recompute": -0.1}, "recompute=-0.1: must be a share, from 0 to 1"),
        ({"recompute": 1.1}, "recompute=1.1: must be a share"),
        ({"recompute": float("nan")}, "recompute=nan: must be a share"),
        ({"fidelity": "best"}, "fidelity='best': must be one of fast, balanced, high"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, object], message: str, tiny: TinyModel, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        running.add_schema(parse_schema(LINKED.format(attributes="")))
        for call in (running.plan, running.stream, running.fidelity):
            with pytest.raises(InputError, match=message):
                call(ALL, **settings)  # type: ignore[operator]


# ---- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_session_that_begins_with_linked_modules_is_found_again(arch: str, tiny: TinyModel, tmp_path: Path) -> None:
    model = tiny(arch)
    schema = parse_schema(LINKED.format(attributes="link='3' anchor='none'"))
    with engine(model, tmp_path) as running:
        running.add_schema(schema)
        alone = said(running, running.stream(ALL, max_tokens=4))
        with running.session("s", prompt=ALL) as session:
            first = said(running, session.stream(max_tokens=4))
            assert any(span.renewed for span in first.stream.plan.spans)
            assert distance(first.rows[0], alone.rows[0]) < tolerance(arch, "f32")
            keys = session.keys
        # The same prompt, once more.
        running.session("s", prompt=ALL).close()
    rows = []
    for name in ("kept", "made again"):
        with engine(model, tmp_path) as running, running.session("s") as session:
            assert session.keys == keys
            if name == "made again":
                for key in keys:
                    running.store.discard(key)
            answer = said(running, session.regenerate(max_tokens=4) if rows else session.stream("And?", max_tokens=4))
            if name == "kept":
                metrics = answer.stream.metrics
                links = sum(span.n_renewed for span in answer.stream.plan.spans)
                assert (metrics.encoded_tokens, links > 0) == (0, True)
                assert metrics.cached_tokens == first.stream.plan.n_tokens + first.stream.evaluated - links
                keys = session.keys
            rows.append(answer.rows[0])
    assert distance(*rows) < tolerance(arch, "f32")
