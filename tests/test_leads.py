"""Leads: modules encoded in the sight of the end of what stands before them in the schema, used where it does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpucache.engine import Engine
from cpucache.engine.tuning import DEFAULT, Fidelity
from cpucache.errors import InputError
from cpucache.layout import ChatTemplate, Plan, SchemaLayout, Span, bind
from cpucache.layout.lead import LEAD
from cpucache.layout.segment import Segment
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.runtime import Run
from tests.support.letters import Letters
from tests.support.sessions import engine
from tests.support.workbench import bench, distance, segment, some_tokens, tolerance

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
        # Behind short ones, what is before them, as far as nothing is missing.
        ("<a/><c/><d/>", 14, {"c": "First, aaaa.", "d": "aa.Other cccc."}),
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


def test_every_level_but_the_exact_one_has_leads(tiny: TinyModel, tmp_path: Path) -> None:
    modules = "<module name='a'>" + "abcdefgh " * 10 + "</module><module name='b'>here</module>"

    def lead(running: Engine, **settings: Any) -> int:
        *_, last = running.plan("<prompt schema='s'><a/><b/>So?</prompt>", **settings).segments
        return len(last.lead)

    with engine(tiny("llama"), tmp_path, fidelity=DEFAULT) as running:
        running.add_schema(parse_schema(f"<schema name='s'>{modules}</schema>"))
        assert lead(running) == lead(running, fidelity="fast") == lead(running, link_tokens=1) == LEAD
        assert lead(running, lead_tokens=5) == lead(running, fidelity="balanced", lead_tokens=5) == 5
        assert lead(running, lead_tokens=0) == lead(running, fidelity="high") == 0
        # Schemas share what has seen nothing of any of them.
        running.add_schema(parse_schema(f"<schema name='s' anchor='none'>{modules}</schema>"))
        assert lead(running) == 0
    with engine(tiny("llama"), tmp_path, fidelity=Fidelity(lead_tokens=3)) as running:
        running.add_schema(parse_schema(f"<schema name='s'>{modules}</schema>"))
        assert lead(running) == 3
        assert lead(running, fidelity="fast") == LEAD


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


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3", "falcon", "mpt"])
@pytest.mark.parametrize("moved", [0, 7])
def test_a_led_slice_is_evaluated_behind_its_lead(arch: str, moved: int, tiny: TinyModel) -> None:
    """Against the same tokens evaluated in one go, all of it in the sight of the lead that stands there."""
    root, lead, own, asked = (some_tokens(count, seed) for seed, count in enumerate((9, 5, 11, 4)))
    with bench(tiny(arch)) as b:
        anchor = segment(root)
        led = Segment(own, anchor.end + moved, (anchor.span,), "m", lead=lead)
        behind = Segment(asked, led.end, (anchor.span, led.span), "m")
        last = some_tokens(3, 9)
        plan = Plan((anchor.span, led.span, behind.span, Span(behind.end, last)))
        b.workspace.prefill(plan)
        got = b.workspace.context.last_logits()
        truth = b.truth
        truth.decode([Run(1, 0, np.concatenate([root, lead, own]))])
        truth.remove(1, 0, len(root) + len(lead))
        truth.shift(1, led.home - len(root) - len(lead))
        truth.decode([Run(0, 0, root)])
        truth.share(1, 0)
        truth.remove(1)
        truth.decode([Run(0, led.end, np.concatenate([asked, last]))], logits="last")
        assert distance(got, truth.last_logits()) < tolerance(arch, "f32")
        # A slice without the lead is another one.
        apart = Segment(own, led.home, (anchor.span,), "m")
        assert b.workspace.key(apart) != b.workspace.key(led)
        other = Segment(own, led.home, (anchor.span,), "m", lead=lead[::-1].copy())
        assert b.workspace.key(other) != b.workspace.key(led)
