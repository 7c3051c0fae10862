"""Other sights than the ancestors': scaffold sets, and modules anchored on nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cpucache.errors import PMLError
from cpucache.layout import ChatTemplate, Plan, Positions, SchemaLayout, bind
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.reuse import Workspace
from cpucache.store import Store
from tests.support.reference import KV, ReferenceLlama, causal
from tests.support.workbench import PLENTY, distance, opened
from tests.test_layout import lay, shown, text
from tests.test_modular_reuse import ASK, CASES, TOLERANCE, Case, check_logits

TinyModel = Callable[..., Path]

# ---- what is in sight ------------------------------------------------------------------------------------------------

SET = (
    "R<module name='a'>1<module name='n'>2</module>3</module>S<module name='b'>4<parameter name='p' length='2' "
    "scaffold='pq'/>5</module><module name='c'>6<module name='m'>7</module>8</module><module name='d'>9</module>"
)


def added(content: str, positions: Positions = "reserved", attributes: str = "") -> list[list[tuple[str, int, str]]]:
    """Text, home and sight of what each scaffold set adds."""
    layout = lay(content, positions, attributes=attributes)
    return [
        [
            (text(layout, segment), segment.home, "".join(text(layout, seen) for seen in segment.sees))
            for segment in scaffold.segments
        ]
        for scaffold in layout.scaffolds
    ]


def test_modules_of_a_scaffold_see_those_before_them() -> None:
    assert added("<scaffold modules='c a b'/>" + SET) == [
        [
            ("S", 4, "R13"),
            ("4", 5, "R13S"),
            ("pq", 6, "R13S4"),
            ("5", 8, "R13S4pq"),
            ("6", 9, "R13S4pq5"),
            ("7", 10, "R13S4pq56"),
            ("8", 11, "R13S4pq56"),
        ]
    ]


def test_what_a_scaffold_adds_stands_behind_what_it_sees_when_packed() -> None:
    layout = lay("<scaffold modules='a b c'/>" + SET, "packed")
    (scaffold,) = layout.scaffolds
    assert [(text(layout, segment), segment.home) for segment in scaffold.segments] == [
        *[("S", 3), ("4", 4), ("pq", 5), ("5", 7), ("6", 8), ("7", 9), ("8", 9)]
    ]
    for segment in scaffold.segments:
        assert segment.home == segment.context_end
        assert [span.start for span in segment.context] == list(
            np.cumsum([0, *(len(span.tokens) for span in segment.context[:-1])])
        )


def test_segments_of_scaffolds_come_last_and_the_others_are_as_without() -> None:
    layout = lay("<scaffold modules='a b'/><scaffold modules='b a c'/>" + SET, "reserved")
    plain = lay(SET, "reserved")
    assert shown(layout)[: len(plain.segments)] == shown(plain)
    assert layout.segments[: len(layout.apart)] == layout.apart
    assert [len(scaffold.modules) for scaffold in layout.scaffolds] == [3, 2]
    three, two = layout.scaffolds
    # They begin alike.
    assert three.segments[:4] == two.segments
    assert layout.segments[len(layout.apart) :] == three.segments


def test_text_of_a_module_that_sees_no_other_is_the_schema_s_own() -> None:
    layout = lay("<scaffold modules='a b'/>" + SET)
    (scaffold,) = layout.scaffolds
    shared = [segment for segment in scaffold.segment_at.values() if segment in layout.apart]
    assert "".join(text(layout, segment) for segment in shared) == "123"


def test_nested_modules_of_a_scaffold_are_seen_and_others_are_not() -> None:
    assert added("<scaffold modules='a a.n c c.m'/>" + SET) == [
        [("3", 3, "R12"), ("S", 4, "R123"), ("6", 9, "R123S"), ("7", 10, "R123S6"), ("8", 11, "R123S67")]
    ]


def test_the_member_of_a_union_stands_for_it_in_a_scaffold() -> None:
    union = "<union><module name='x'>12</module><module name='y'>345</module></union>T<module name='z'>6</module>"
    assert added("<scaffold modules='x z'/>" + union) == [[("T", 3, "12"), ("6", 4, "12T")]]
    seen = union.replace("<union>", "<union scaffold='x'>")
    # It was seen already, and has seen nothing new itself.
    assert added("<scaffold modules='x z'/>" + seen) == [[]]
    assert added("<scaffold modules='a z'/><module name='a'>0</module>" + seen) == [[("T", 4, "012"), ("6", 5, "012T")]]


def test_anchored_on_nothing_modules_see_themselves_alone() -> None:
    layout = lay(SET.replace("2<", "2<parameter name='q' length='1' scaffold='x'/>2<"), attributes="anchor='none'")
    assert [(row[1], row[2], "".join(row[3])) for row in shown(layout)] == [
        *[("R", 0, ""), ("1", 1, ""), ("2", 2, ""), ("x", 3, "2"), ("2", 4, "2x"), ("3", 5, "1"), ("S", 6, "R")],
        *[("4", 7, ""), ("pq", 8, "4"), ("5", 10, "4pq"), ("6", 11, ""), ("7", 12, ""), ("8", 13, "6"), ("9", 14, "")],
    ]
    packed = lay(SET, "packed", attributes="anchor='none'")
    assert [(row[1], row[2]) for row in shown(packed)] == [
        *[("R", 0), ("1", 0), ("2", 0), ("3", 1), ("S", 1), ("4", 0), ("pq", 1), ("5", 3)],
        *[("6", 0), ("7", 0), ("8", 1), ("9", 0)],
    ]


@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_anchored_on_nothing_the_schema_s_text_sees_stand_ins_as_ever(positions: Positions) -> None:
    content = "R<union scaffold='x'><module name='x'>12</module><module name='y'>3</module></union>T"
    layout = lay(content, positions, attributes="anchor='none'")
    behind = layout.segments[-1]
    assert ["".join(row[3]) for row in shown(layout)] == ["", "", "", "R12"]
    assert (behind.home, [span.start for span in behind.context]) == (3, [0, 1])


@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_anchored_on_nothing_modules_of_a_scaffold_see_one_another(positions: Positions) -> None:
    (rows,) = added("<scaffold modules='a c'/>" + SET, positions, "anchor='none'")
    # What is nested sees the module of the set around it, too.
    assert [(row[0], row[2]) for row in rows] == [("2", "1"), ("6", "13"), ("7", "136"), ("8", "136")]


def test_a_scaffold_longer_than_the_model_holds_is_refused_by_name() -> None:
    modules = "".join(f"<module name='{name}'>{name * 9}</module>" for name in "abcd")
    content = f"x{modules}\n<scaffold modules='b a'/>\n<scaffold modules='a b d'/>"
    assert lay(content, n_ctx_train=28).positions == "packed"
    with pytest.raises(PMLError) as caught:
        lay(content, n_ctx_train=27)
    assert str(caught.value) == (
        "s.xml:3: the scaffold of 'a', 'b', 'd' needs 28 tokens with what its modules see, the model holds 27: "
        "name fewer modules"
    )


# ---- which state a prompt takes --------------------------------------------------------------------------------------

FOUR = "R" + "".join(f"<module name='{name}'>{name * 2}</module>" for name in "abcd") + "<module name='e'/>"


@pytest.mark.parametrize(
    ("sets", "prompt", "seen"),
    [
        (["a c"], "<a/><c/>", ["", "R", "Raa"]),
        (["a c"], "<a/><b/><c/>", ["", "R", "R", "Raa"]),
        (["a c"], "<a/> new <b/><c/> and new", ["", "R", "R", "Raa"]),
        (["a c"], "<c/><a/>", ["", "R", "R"]),
        (["a c"], "<b/><c/>", ["", "R", "R"]),
        (["a b c"], "<a/><c/>", ["", "R", "R"]),
        (["a b c"], "<b/><d/><c/>", ["", "R", "R", "R"]),
        (["a b", "b c d"], "<a/><b/><c/><d/>", ["", "R", "R", "Rbb", "Rbbcc"]),
        (["a b", "b c d"], "<a/><b/><d/>", ["", "R", "Raa", "R"]),
        (["b c", "a b"], "<a/><b/><c/>", ["", "R", "R", "Rbb"]),
        (["a b", "b c"], "<a/><b/><c/>", ["", "R", "Raa", "Rbb"]),
        (["a b", "c d"], "<a/><b/><c/><d/>", ["", "R", "Raa", "R", "Rcc"]),
        (["a b", "c d"], "<c/><a/><d/><b/>", ["", "R", "R", "Rcc", "Raa"]),
        (["a e b"], "<a/><b/>", ["", "R", "R"]),
        (["a e b"], "<a/><b/><e/>", ["", "R", "Raa"]),
        (["a e b"], "<e/><a/><b/>", ["", "R", "R"]),
    ],
)
def test_a_prompt_with_a_whole_set_in_order_takes_its_states(sets: list[str], prompt: str, seen: list[str]) -> None:
    scaffolds = "".join(f"<scaffold modules='{modules}'/>" for modules in sets)
    layout = lay(FOUR + scaffolds)

    def sights(plan: Plan) -> list[str]:
        return ["".join(text(layout, other) for other in segment.sees) for segment in plan.segments]

    included = resolve(parse_prompt(f"<prompt schema='s'>{prompt}<user>?</user></prompt>"), layout.schema)
    assert sights(bind(layout, included)) == seen
    apart = bind(layout, included, scaffolds=False)
    assert set(apart.segments) <= set(layout.apart)
    assert np.array_equal(apart.tokens, bind(layout, included).tokens)


def test_reserved_positions_stay_what_they_are_in_a_set() -> None:
    layout = lay(FOUR + "<scaffold modules='a c'/>")
    included = resolve(parse_prompt("<prompt schema='s'><a/><c/><user>?</user></prompt>"), layout.schema)
    for packed, starts in ((None, [0, 1, 5, 7]), (True, [0, 1, 3, 5])):
        assert [span.start for span in bind(layout, included, packed=packed).spans] == starts


# ---- against the model in NumPy --------------------------------------------------------------------------------------

UNANCHORED = {
    name: Case(CASES[name].schema, CASES[name].prompts, "anchor='none'")
    for name in (
        *("siblings", "text between modules", "nesting", "a union with a scaffold", "scaffolds within scaffolds"),
        *("parameters", "cache='false'", "roles"),
    )
}

SETS = {
    "two of three": Case(
        "<scaffold modules='a c'/>" + CASES["text between modules"].schema,
        (("", "<a/><b/><c/>" + ASK), ("", "<a/><c/>" + ASK), ("", "<b/><c/>" + ASK), ("", "<a/> new <c/>")),
    ),
    "another order": Case(
        "<scaffold modules='b a'/>" + CASES["another order"].schema,
        (("", "<c/><b/><a/>" + ASK), ("", "<a/><c/><b/>" + ASK), ("", "<c/><a/><b/>" + ASK)),
    ),
    "overlapping": Case(
        "Root. <scaffold modules='a b'/><scaffold modules='b c d'/><scaffold modules='c d'/><module name='a'>the first "
        "module, </module><module name='b'>here another one.</module> Text. <module name='c'>and it ends</module>"
        "<module name='d'> with this.</module>",
        (
            ("", "<a/><b/><c/><d/>" + ASK),
            ("", "<a/><b/><d/>" + ASK),
            ("", "<a/><c/><d/>" + ASK),
            ("", "<b/><c/><d/>"),
        ),
    ),
    "all kinds of content": Case(
        "<system>Root. <module name='a'>To <parameter name='p' length='9' scaffold='them'/>: <union scaffold='x'>"
        "<module name='x'>ex </module><module name='y'>why <module name='n'>nested </module></module></union>go."
        "</module><module name='b'>one <module name='m'>in it </module>more</module></system><user>Between. <union>"
        "<module name='u'>This, <parameter name='q' length='4'/></module><module name='v'>that is longer</module>"
        "</union></user><module name='w'>left out</module><scaffold modules='a b u'/><scaffold modules='b v a'/>",
        (
            ("", "<a p='her'><x/></a><b><m/></b><u q='so'/><w/>" + ASK),
            ("", "<a p='nobody'><y><n/></y></a><b/><v/>" + ASK),
            ("", "<a p=''/><b><m/></b><v/>"),
            ("", "<a p='me'/><u q=''/>" + ASK),
        ),
    ),
    "nested modules": Case(
        CASES["nesting"].schema + "<scaffold modules='a a.b a.c e'/><scaffold modules='a.b a.b.d a'/>",
        CASES["nesting"].prompts,
    ),
    "the scaffold of a union": Case(
        CASES["a union with a scaffold"].schema + "<scaffold modules='b m'/>",
        CASES["a union with a scaffold"].prompts,
    ),
    "instead of the scaffold of a union": Case(
        "Root. <union scaffold='x'><module name='x'>The one </module><module name='y'>Or the other thing </module>"
        "</union>goes on <module name='a'>with a module</module>. <scaffold modules='y a'/>",
        (("", "<y/><a/>" + ASK), ("", "<x/><a/>" + ASK), ("", "<y/>" + ASK), ("", "<a/>" + ASK)),
    ),
}
SETS_UNANCHORED = {name: Case(case.schema, case.prompts, "anchor='none'") for name, case in SETS.items()}
PLACED = pytest.mark.parametrize(
    ("positions", "packed"),
    [("reserved", None), ("packed", None), ("reserved", True)],
    ids=["reserved", "packed", "packed from reserved"],
)


@PLACED
@pytest.mark.parametrize("cases", [UNANCHORED, SETS, SETS_UNANCHORED], ids=["unanchored", "sets", "sets, unanchored"])
def test_spliced_logits(cases: dict[str, Case], positions: Positions, packed: bool | None, tiny: TinyModel) -> None:
    for case in cases.values():
        for ahead in (False, True):
            check_logits(tiny("llama"), case, positions=positions, packed=packed, ahead=ahead)


def test_spliced_logits_with_bos(tiny: TinyModel) -> None:
    for case in (*SETS.values(), *SETS_UNANCHORED.values()):
        check_logits(tiny("llama", add_bos=True), case)


ALL = {
    "side by side": (
        "<scaffold modules='a b c'/>Root. <module name='a'>the first module, </module><module name='b'>here another "
        "one </module><module name='c'>and it ends.</module>",
        "<a/><b/><c/>",
    ),
    "nested, and with a parameter": (
        "Root. <module name='a'>Outer, <module name='n'>inner </module>outer again </module><module name='b'>of "
        "<parameter name='p' length='5' scaffold='12345'/> it </module><union><module name='u'>short</module><module "
        "name='v'>a longer one</module></union><scaffold modules='a.n b a u'/>",
        "<a><n/></a><b p='12345'/><u/>",
    ),
    "with the schema's own text between and behind": (
        "<system>Root. <module name='a'>the first module, </module> and <module name='b'>here another one </module> "
        "to end with</system>As I said. <scaffold modules='a b'/>",
        "<a/><b/>",
    ),
    "a member instead of the scaffold of its union": (
        "Root. <union scaffold='x'><module name='x'>The one </module><module name='y'>Or another </module></union>goes "
        "on <module name='a'>with a module.</module><scaffold modules='y a'/>",
        "<y/><a/>",
    ),
    "anchored on nothing": (
        "<module name='a'>the first module, </module><module name='b'>here another one.</module>"
        "<scaffold modules='a b'/>",
        "<a/><b/>",
    ),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_a_scaffold_of_all_modules_is_full_prefill(name: str, positions: Positions, tiny: TinyModel) -> None:
    path = tiny("llama")
    content, chosen = ALL[name]
    anchor = "none" if name.startswith("anchored") else "ancestors"
    with opened(path) as context:
        model = context.model
        schema = parse_schema(f"<schema name='s' anchor='{anchor}'>{content}</schema>")
        layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template), positions)
        included = resolve(parse_prompt(f"<prompt schema='s'>{chosen}{ASK}</prompt>"), schema)
        workspace = Workspace(context, Store(None, ram_budget=PLENTY), "model")
        plan = bind(layout, included, packed=True)
        n = plan.n_tokens
        full = ReferenceLlama(path).evaluate(plan.tokens.tolist(), range(n), causal(n))[-1].astype(np.float32)
        workspace.prefill(plan)
        assert plan.n_cached > 0.5 * n
        assert distance(context.last_logits(), full) < TOLERANCE["f32"]
        workspace.prefill(bind(layout, included, packed=True, scaffolds=False))
        assert distance(context.last_logits(), full) > 0.05


@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_anchored_on_nothing_a_module_is_what_it_is_alone(positions: Positions, tiny: TinyModel) -> None:
    """Each module evaluated with nothing before it, from position 0, in NumPy."""
    path = tiny("llama")
    reference = ReferenceLlama(path)
    with opened(path) as context:
        model = context.model
        content = "<module name='a'>one, </module><module name='b'>two, </module>"
        schema = parse_schema(f"<schema name='s' anchor='none'>Root. {content}</schema>")
        layout = SchemaLayout(schema, model, ChatTemplate(model.chat_template), positions)
        plan = bind(layout, resolve(parse_prompt("<prompt schema='s'><a/><b/>so?</prompt>"), schema))
        Workspace(context, Store(None, ram_budget=PLENTY), "model").prefill(plan)
        *parts, asked = [model.tokenize(part).tolist() for part in ("Root. ", "one, ", "two, ", "so?")]
        state = KV.concat([reference.kv(part, range(len(part)), causal(len(part))) for part in parts])
        before = len(state)
        logits, _ = reference.forward(
            asked,
            range(before, before + len(asked)),
            visible=causal(len(asked), before=before),
            cache=state,
            cache_positions=range(before),
        )
        assert distance(context.last_logits(), logits[-1].astype(np.float32)) < TOLERANCE["f32"]


def test_anchored_on_nothing_equal_modules_of_two_schemas_share_a_slice(tiny: TinyModel) -> None:
    """If they stand at the same position: the text before them may be another."""
    with opened(tiny("llama")) as context:
        workspace = Workspace(context, Store(None, ram_budget=PLENTY), "model")

        def keys(name: str, root: str, anchor: str, positions: Positions = "reserved") -> list[str]:
            schema = parse_schema(
                f"<schema name='{name}' anchor='{anchor}'>{root}<module name='{name}'>shared <parameter name='p' "
                "length='3'/> text<module name='n'>nested</module></module></schema>"
            )
            layout = SchemaLayout(schema, context.model, ChatTemplate(None), positions)
            return [workspace.key(segment) for segment in layout.segments if segment.module]

        one = keys("one", "One.", "none")
        assert len(one) == len(set(one)) == 4
        assert one == keys("two", "Two.", "none")
        assert set(one).isdisjoint(keys("three", "Three.", "none")), "at home elsewhere"
        assert keys("one", "One.", "none", "packed") == keys("three", "Three.", "none", "packed")
        assert set(keys("one", "One.", "ancestors")).isdisjoint(keys("two", "Two.", "ancestors"))
