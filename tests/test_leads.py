"""Leads: modules encoded in the sight of the end of what stands before them in the schema, used where it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.engine import Engine
from cpucache.engine.tuning import DEFAULT, Fidelity
from cpucache.errors import InputError
from cpucache.layout import ChatTemplate, Plan, Positions, SchemaLayout, Span, bind
from cpucache.layout.lead import LEAD, SHORT
from cpucache.layout.plan import schedule
from cpucache.layout.segment import Segment
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.reuse.encoder import effort
from cpucache.reuse.splicer import FREE
from cpucache.runtime import Run
from tests.support.letters import Letters
from tests.support.sessions import engine
from tests.support.workbench import Bench, Logits, bench, distance, segment, some_tokens, tolerance

TinyModel = Callable[..., Path]

LETTERS = Letters()
UNIONS = """Root. <module name='a'>First, aaaa.</module>
<union><module name='b'>One bbbb.</module><module name='c'>Other cccc.</module></union>
<union><module name='d'>Third dddd.</module><module name='e'>Fourth eeee.</module></union>
<module name='f'>Last.</module>"""


def lay(inside: str, attributes: str = "") -> SchemaLayout:
    schema = parse_schema(f"<schema name='s' {attributes}>{inside}</schema>")
    return SchemaLayout(schema, LETTERS, ChatTemplate(None), "reserved")


def led_by(segments: Iterable[Segment]) -> list[tuple[str, str]]:
    """Their modules, each with the text of its lead."""
    return [(each.module, LETTERS.text(each.lead)) for each in segments]


# ---- which modules have one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lead", "expected"),
    [
        ("<a/><b/><e/><f/>", 4, {"b": "aaa.", "e": "bbb.", "f": "eee."}),
        # Whatever is left out parts what is beside it.
        ("<a/><f/>", 4, {}),
        ("<b/><d/>", 4, {"d": "bbb."}),
        # So do new text, and another order.
        ("<a/> and <b/><d/>", 4, {"d": "bbb."}),
        ("<d/><b/>", 4, {}),
        # Behind short ones, what is before them, as far as nothing is missing. Of members of unions, the nearest.
        ("<a/><c/><d/><f/>", 9, {"c": "st, aaaa.", "d": "st, aaaa.Other cccc.", "f": "ird dddd."}),
        ("<a/><c/><d/>", 14, {"c": "First, aaaa.", "d": "aa.Other cccc."}),
        ("<a/><c/><d/><f/>", 14, {"c": "First, aaaa.", "d": "aa.Other cccc.", "f": "Third dddd."}),
        ("<c/><d/>", 14, {"d": "Other cccc."}),
        ("<a/><b/>", 0, {}),
    ],
)
def test_a_module_is_led_by_what_the_schema_has_before_it(content: str, lead: int, expected: dict[str, str]) -> None:
    layout = lay(UNIONS)
    included = resolve(parse_prompt(f"<prompt schema='s'>{content} So?</prompt>"), layout.schema)
    plan = bind(layout, included, lead=lead)
    assert {module: text for module, text in led_by(plan.segments) if text} == expected
    assert bind(layout, included, lead=lead).segments == plan.segments, "the same objects"


NESTED = """Root. <module name='a'>First.</module>
<module name='h'>Head: <module name='b'>Bbb.</module><module name='c'>Ccc.</module>tail.</module>"""


@pytest.mark.parametrize(
    ("content", "lead", "expected"),
    [
        # What it sees leads it, too, where something stands before that.
        (
            "<a/><h><b/><c/></h>",
            6,
            [("h", "First."), ("h.b", "First.Head: "), ("h.c", "First.Head: Bbb."), ("h", "b.Ccc.")],
        ),
        ("<h><b/><c/></h>", 6, [("h.c", "Bbb."), ("h", "b.Ccc.")]),
        # It does so as a whole, or not at all.
        ("<a/><h><b/><c/></h>", 3, [("h", "st."), ("h.c", "Bbb."), ("h", "cc.")]),
    ],
)
def test_a_lead_goes_back_beyond_what_is_seen(content: str, lead: int, expected: list[tuple[str, str]]) -> None:
    layout = lay(NESTED)
    included = resolve(parse_prompt(f"<prompt schema='s'>{content} So?</prompt>"), layout.schema)
    segments = bind(layout, included, lead=lead).segments
    assert [(module, text) for module, text in led_by(segments) if text] == expected
    for each in segments:
        # What leads it is not in its context besides.
        assert not any(LETTERS.text(seen.tokens) in LETTERS.text(each.lead) for seen in each.sees)


ROW = "Root. " + "".join(f"<module name='{name}'>{name * 40}</module>" for name in "abcdef")


def test_long_leads_are_complete_or_short() -> None:
    layout = lay(ROW)

    def leads(content: str, count: int) -> list[str]:
        modules = "".join(f"<{name}/>" for name in content)
        included = resolve(parse_prompt(f"<prompt schema='s'>{modules} So?</prompt>"), layout.schema)
        _, *segments = bind(layout, included, lead=count).segments
        return [LETTERS.text(each.lead) for each in segments]

    a, b, c, d = (name * 40 for name in "abcd")
    assert leads("abcde", 100) == ["", a, a + b, a + b + c, a + b + c + d]
    assert leads("abcde", 40) == ["", a, b, b + c, d]
    # Whatever lacks something of that has a short one, and the same one whatever else is left out.
    assert leads("acde", 100) == ["", "", c, d[-SHORT:]]
    assert leads("acde", 40) == ["", "", c, d]
    # An eighth of 300 is.
    assert leads("acde", 300) == ["", "", c, d[-37:]]
    assert leads("bcde", 100) == ["", b[-SHORT:], b[-SHORT:] + c, d[-SHORT:]]


def test_modules_have_few_leads_however_many_combinations_there_are() -> None:
    layout = lay(ROW)
    made: set[Segment] = set(layout.leads.segments(100))
    for count in range(7):
        for content in combinations("abcdef", count):
            modules = "".join(f"<{name}/>" for name in content)
            included = resolve(parse_prompt(f"<prompt schema='s'>{modules} So?</prompt>"), layout.schema)
            made.update(bind(layout, included, lead=100).segments)
    for name in "abcdef":
        assert len([each for each in made if each.module == name]) <= 4


def test_an_argument_is_where_a_lead_begins() -> None:
    """Nothing is missing there: no schema foresees it."""
    layout = lay(
        "Root. <module name='m'>To <parameter name='p' length='4'/>" + "x" * 50 + "</module><module name='n'>y</module>"
    )
    included = resolve(parse_prompt("<prompt schema='s'><m p='us'/><n/> So?</prompt>"), layout.schema)
    assert [len(each.lead) for each in bind(layout, included, lead=100).segments] == [0, 0, 0, 50]


def test_every_level_but_the_exact_one_has_leads(tiny: TinyModel, tmp_path: Path) -> None:
    before = "abcdefgh " * 10
    modules = f"<module name='a'>{before}</module><module name='b'>here</module>"

    def lead(running: Engine, **settings: Any) -> int:
        *_, last = running.plan("<prompt schema='s'><a/><b/>So?</prompt>", **settings).segments
        return len(last.lead)

    with engine(tiny("llama"), tmp_path, fidelity=DEFAULT) as running:
        running.add_schema(parse_schema(f"<schema name='s'>{modules}</schema>"))
        whole = len(running.model.tokenize(before))
        assert lead(running) == lead(running, fidelity="fast") == lead(running, link_tokens=1) == whole
        assert lead(running, lead_tokens=5) == lead(running, fidelity="balanced", lead_tokens=5) == 5
        assert lead(running, lead_tokens=0) == lead(running, fidelity="high") == 0
        # Schemas share what has seen nothing of any of them.
        running.add_schema(parse_schema(f"<schema name='s' anchor='none'>{modules}</schema>"))
        assert lead(running) == 0
    with engine(tiny("llama"), tmp_path, fidelity=Fidelity(lead_tokens=3)) as running:
        running.add_schema(parse_schema(f"<schema name='s'>{modules}</schema>"))
        assert lead(running) == 3
        assert lead(running, fidelity="fast") == whole


def test_modules_of_a_scaffold_set_have_none() -> None:
    modules = "".join(f"<module name='{name}'>{name * 4}</module>" for name in "abc")
    layout = lay(f"Root. {modules}<scaffold modules='a b'/>")
    root, a, _, c = layout.apart
    ((woven,),) = (scaffold.segments for scaffold in layout.scaffolds)
    *before, last = layout.leads.led([root, a, woven, c], 6)
    assert before == [root, a, woven]
    assert isinstance(last, Segment)
    assert LETTERS.text(last.lead) == "aabbbb"


def test_what_is_encoded_ahead() -> None:
    assert sorted(led_by(lay(UNIONS).leads.segments(3))) == [
        *[("b", "aa."), ("c", "aa."), ("d", "bb."), ("e", "cc."), ("f", "dd."), ("f", "ee.")]
    ]
    assert lay(UNIONS).leads.segments(0) == []
    assert lay(UNIONS, "anchor='none'").leads.segments(3) == []


def test_no_prompt_waits_for_what_has_been_encoded(tiny: TinyModel, tmp_path: Path) -> None:
    how: dict[str, Any] = {"fidelity": "fast"}
    with engine(tiny("llama"), tmp_path) as running:
        running.add_schema(parse_schema(f"<schema name='s'>{UNIONS}</schema>"))
        running.encode("s", lead_tokens=LEAD)
        for content in ("<a/><b/><d/><f/>", "<a/><c/><e/><f/>", "<a/><f/>", "<c/>"):
            reply = running.generate(f"<prompt schema='s'>{content}<user>So?</user></prompt>", max_tokens=1, **how)
            assert reply.metrics.encoded_tokens == 0, content
        assert running.encode("s", lead_tokens=LEAD).slices == 0
        # Of two unions, only members at the same place were foreseen.
        reply = running.generate("<prompt schema='s'><c/><d/>?</prompt>", max_tokens=1, **how)
        assert reply.metrics.encoded_tokens == len(running.model.tokenize("Third dddd."))


def test_fewer_than_none(tiny: TinyModel, tmp_path: Path) -> None:
    with engine(tiny("llama"), tmp_path) as running:
        running.add_schema(parse_schema("<schema name='s'>x</schema>"))
        with pytest.raises(InputError, match="lead_tokens=-1: must be 0 or more"):
            running.plan("<prompt schema='s'>?</prompt>", lead_tokens=-1)
    with pytest.raises(InputError, match="fidelity='low': must be one of fast, balanced, high"):
        Engine(tiny("llama"), fidelity="low")  # type: ignore[arg-type]


# ---- what they do ----------------------------------------------------------------------------------------------------


archs = pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "falcon", "mpt"])


def expected(b: Bench, plan: Plan) -> Logits:
    """Logits of a plan of a first slice, led ones and fresh text: each evaluated with its lead, then moved."""
    root, *led, last = plan.spans
    truth = b.truth
    truth.clear()
    truth.decode([Run(0, 0, root.tokens)])
    for span in led:
        assert span.segment is not None
        lead = span.segment.lead
        truth.decode([Run(1, 0, np.concatenate([root.tokens, lead, span.tokens]))])
        truth.remove(1, 0, root.end + len(lead))
        truth.shift(1, span.start - root.end - len(lead))
        truth.decode([Run(2, 0, root.tokens[:1])])
        truth.remove(2)
        truth.share(1, 0)
        truth.remove(1)
    truth.decode([Run(0, last.start, last.tokens)], logits="last")
    return truth.last_logits()


@archs
@pytest.mark.parametrize("moved", [0, 7])
def test_a_led_slice_is_evaluated_behind_its_lead(arch: str, moved: int, tiny: TinyModel) -> None:
    """Against the same tokens evaluated in one go, all of it in the sight of the lead that stands there."""
    root, lead, own, last = (some_tokens(count, seed) for seed, count in enumerate((9, 5, 11, 4)))
    with bench(tiny(arch)) as b:
        anchor = segment(root)
        led = Segment(own, anchor.end + moved, (anchor.span,), "m", lead=lead)
        plan = Plan((anchor.span, led.span, Span(led.end, last)))
        assert distance(b.logits(plan), expected(b, plan)) < tolerance(arch, "f32")
        # A slice without the lead is another one.
        apart = Segment(own, led.home, (anchor.span,), "m")
        assert b.workspace.key(apart) != b.workspace.key(led)
        other = Segment(own, led.home, (anchor.span,), "m", lead=lead[::-1].copy())
        assert b.workspace.key(other) != b.workspace.key(led)


@archs
def test_what_sees_a_led_slice(arch: str, tiny: TinyModel) -> None:
    root, lead, own, more, last = (some_tokens(count, seed) for seed, count in enumerate((9, 5, 11, 4, 3)))
    with bench(tiny(arch)) as b:
        anchor = segment(root)
        led = Segment(own, anchor.end + 7, (anchor.span,), "m", lead=lead)
        behind = Segment(more, led.end, (anchor.span, led.span), "m")
        plan = Plan((anchor.span, led.span, behind.span, Span(behind.end, last)))
        as_fresh = Plan((anchor.span, led.span, Span(led.end, np.concatenate([more, last]))))
        assert distance(b.logits(plan), expected(b, as_fresh)) < tolerance(arch, "f32")


def row(count: int, root: Segment, *, packed: bool) -> list[Segment]:
    """Modules one behind the other, each led by all of those before it."""
    text = some_tokens(6 * count, 5)
    return [
        Segment(text[at : at + 6], root.end + (0 if packed else at), (root.span,), f"m{at}", lead=text[:at])
        for at in range(0, len(text), 6)
    ]


@archs
@pytest.mark.parametrize("packed", [False, True])
def test_modules_that_lead_one_another_are_evaluated_in_one_go(arch: str, packed: bool, tiny: TinyModel) -> None:
    """More of them than a context has sequences; the last ones, too, when the first are in the store already."""
    root = segment(some_tokens(9))
    modules = row(2 * len(FREE) + 5, root, packed=packed)
    told: list[tuple[int, int]] = []
    with bench(tiny(arch)) as b:
        few = modules[: len(FREE)]
        b.workspace.encode([root, *few], progress=lambda done, total: told.append((done, total)))
        assert told[-1] == (9 + 6 * len(few),) * 2, "every token once"
        b.workspace.encode(modules)
        for some in (modules[:3], modules[len(FREE) - 1 : len(FREE) + 2], modules[-2:]):
            plan = schedule([root, *some, some_tokens(4, 2)], packed=packed)
            assert distance(b.logits(plan), expected(b, plan)) < tolerance(arch, "f32")


def test_a_stretch_may_be_longer_than_the_context(tiny: TinyModel) -> None:
    root = segment(some_tokens(9))
    modules = row(14, root, packed=True)
    with bench(tiny("llama"), n_ctx=64) as b:
        room = [each for each in modules if each.cells < 64]
        assert len(room) < len(modules)
        b.workspace.encode(room)
        for each in (room[0], room[-1]):
            plan = schedule([root, each, some_tokens(4, 2)], packed=True)
            assert distance(b.logits(plan), expected(b, plan)) < tolerance("llama", "f32")


@pytest.mark.parametrize("size", [3, 20, 70, 300])
@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_encoding_takes_half_as_long_again(size: int, positions: Positions) -> None:
    modules = "".join(f"<module name='m{number}'>{number:0{size}}</module>" for number in range(60))
    schema = parse_schema(f"<schema name='s'>Root. {modules}</schema>")
    layout = SchemaLayout(schema, Letters(n_ctx_train=1 << 20), ChatTemplate(None), positions)
    lead = 40
    led = layout.leads.segments(lead)
    assert effort(led) <= 1.5 * 60 * size + lead
    for number, each in enumerate(led, 1):
        assert min(lead, number * size) <= len(each.lead) <= 3 * lead


def test_what_does_not_fit_the_context_is_left_out_ahead(tiny: TinyModel, tmp_path: Path) -> None:
    modules = "".join(f"<module name='{name}'>" + f"{name}bc " * 12 + "</module>" for name in "defg")
    with engine(tiny("llama"), tmp_path, n_ctx=64) as running:
        running.add_schema(parse_schema(f"<schema name='s'>{modules}</schema>"))
        longest = max(each.cells for each in running.planner.layout("s").leads.segments(48))
        assert longest >= 64
        assert running.encode("s", lead_tokens=48).slices >= 4
        assert running.encode("s", lead_tokens=48).slices == 0


@pytest.mark.parametrize("positions", ["reserved", "packed"])
@pytest.mark.parametrize("schema", [ROW, NESTED], ids=["in a row", "nested"])
def test_a_prompt_in_the_order_of_the_schema_is_exact(
    schema: str, positions: Positions, tiny: TinyModel, tmp_path: Path
) -> None:
    """As far as leads go. Nothing of it is evaluated afresh, whatever is asked for."""
    names = "abcdef" if schema == ROW else "ah"
    content = "".join(f"<{name}/>" for name in names).replace("<h/>", "<h><b/><c/></h>")
    prompt = f"<prompt schema='s'>{content}<user>And so?</user></prompt>"
    with engine(tiny("llama"), tmp_path, positions=positions) as running:
        running.add_schema(parse_schema(f"<schema name='s'>{schema}</schema>"))
        workspace = running.workspace
        plan = running.plan(prompt, lead_tokens=200)
        assert running.plan(prompt, lead_tokens=200, link_tokens=3, recompute=0.5).n_cached == plan.n_cached
        workspace.prefill(plan)
        led = workspace.context.last_logits()
        workspace.prefill(plan.without_reuse(), fresh=True)
        assert distance(led, workspace.context.last_logits()) < tolerance("llama", "f16")
        # Without leads, or with something missing, it is not.
        assert running.plan(prompt, lead_tokens=0, link_tokens=3).n_cached < plan.n_cached
        workspace.prefill(running.plan(prompt, lead_tokens=0))
        apart = workspace.context.last_logits()
        workspace.prefill(plan.without_reuse(), fresh=True)
        assert distance(apart, workspace.context.last_logits()) > 5 * tolerance("llama", "f16")
        gap = prompt.replace("<b/>", "")
        linked = running.plan(gap, lead_tokens=200, link_tokens=3)
        assert linked.n_cached < running.plan(gap, lead_tokens=200).n_cached
