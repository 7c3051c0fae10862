"""Plans: where the pieces of a prompt stand, and which of them are slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpucache.errors import InputError, PMLError
from cpucache.layout import ChatTemplate, Plan, Positions, Segment, Span, bind
from cpucache.layout.plan import schedule
from cpucache.layout.schema import SchemaLayout
from cpucache.pml import parse_prompt, parse_schema, resolve
from tests.support.letters import Letters
from tests.support.tiny import CHATML
from tests.test_layout import WITH_DEFAULT

BEGIN, END = "<|im_start|>", "<|im_end|>\n"
ANSWER = f"{BEGIN}assistant\n"
# As Gemma's: the system text goes into the first user turn.
MERGED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[user] {{ m.content }}\n\n{% else %}"
    "{% if m.role == 'assistant' or loop.first or loop.previtem.role != 'system' %}[{{ m.role }}] {% endif %}"
    "{{ m.content }}[end]\n{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


class Bound:
    """A schema, laid out, and the plans of prompts on it."""

    def __init__(
        self, content: str, positions: Positions = "auto", *, template: str | None = None, **vocabulary: Any
    ) -> None:
        self.letters = Letters(**vocabulary)
        self.schema = parse_schema(f"<schema name='s'>{content}</schema>", file="s.xml")
        chat = ChatTemplate(template, bos=self.letters.bos_text or "", eos="</s>")
        self.layout = SchemaLayout(self.schema, self.letters, chat, positions)

    def plan(self, content: str, attributes: str = "", *, packed: bool | None = None) -> Plan:
        prompt = parse_prompt(f"<prompt schema='s' {attributes}>{content}</prompt>", file="p.xml")
        return bind(self.layout, resolve(prompt, self.schema), file="p.xml", packed=packed)

    def shown(self, content: str, attributes: str = "", *, packed: bool | None = None) -> list[tuple[int, str, str]]:
        """Start, kind (``slice`` or ``fresh``) and text of every span."""
        return [
            (span.start, "slice" if span.segment else "fresh", self.letters.text(span.tokens))
            for span in self.plan(content, attributes, packed=packed).spans
        ]

    def text(self, content: str, attributes: str = "") -> str:
        return self.letters.text(self.plan(content, attributes).tokens)


# ---- positions -------------------------------------------------------------------------------------------------------

THREE = "AB<module name='a'>111</module><module name='b'>22</module><module name='c'>3333</module>"


def test_slices_stand_at_home_and_leave_gaps_for_what_is_left_out() -> None:
    assert Bound(THREE).shown("<a/><c/>?") == [
        (0, "slice", "AB"),
        (2, "slice", "111"),
        (7, "slice", "3333"),
        (11, "fresh", "?"),
    ]


def test_fresh_tokens_stand_right_behind_what_is_before_them() -> None:
    assert Bound(THREE).shown("<a/>x<c/>?") == [
        (0, "slice", "AB"),
        (2, "slice", "111"),
        (5, "fresh", "x"),
        (7, "slice", "3333"),
        (11, "fresh", "?"),
    ]


def test_slices_are_pushed_behind_text_that_needs_their_room() -> None:
    bound = Bound(THREE)
    assert bound.shown("<a/>xyz<b/><c/>?")[2:] == [
        (5, "fresh", "xyz"),
        (8, "slice", "22"),
        (10, "slice", "3333"),
        (14, "fresh", "?"),
    ]
    assert [span.delta for span in bound.plan("<a/>xyz<b/><c/>?").spans] == [0, 0, 0, 3, 3, 0]


def test_modules_in_another_order_follow_one_another() -> None:
    assert Bound(THREE).shown("<c/><a/><b/>?") == [
        (0, "slice", "AB"),
        (7, "slice", "3333"),
        (11, "slice", "111"),
        (14, "slice", "22"),
        (16, "fresh", "?"),
    ]


@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_packed_plans_have_no_gaps(positions: Positions) -> None:
    bound = Bound(THREE, positions)
    packed = [(0, "slice", "AB"), (2, "slice", "3333"), (6, "fresh", "x"), (7, "slice", "111"), (10, "fresh", "?")]
    assert bound.shown("<c/>x<a/>?", packed=True) == packed
    # Left to itself, a plan goes by its layout.
    assert (bound.shown("<c/>x<a/>?") == packed) == (positions == "packed")
    moved = [span.delta for span in bound.plan("<c/>x<a/>?", packed=True).spans if span.segment]
    assert moved == ([0, 2 - 7, 7 - 2] if positions == "reserved" else [0, 0, 5])


def test_modules_that_are_not_cached_are_fresh_and_run_together_with_their_neighbours() -> None:
    bound = Bound("A<module name='m' cache='false'>bc<module name='n'>d</module></module><module name='o'>e</module>F")
    assert bound.shown("<m><n/></m>x<o/>") == [
        (0, "slice", "A"),
        (1, "fresh", "bc"),
        (3, "slice", "d"),
        (4, "fresh", "x"),
        (5, "slice", "e"),
        (6, "fresh", "F"),
    ]
    assert bound.shown("x<m/>?")[1:] == [(1, "fresh", "xbc"), (5, "slice", "F"), (6, "fresh", "?")]


def test_text_around_nested_modules_is_in_order() -> None:
    bound = Bound("<module name='m'>a<module name='n'>b</module>c<module name='o'>d</module></module>e")
    assert bound.text("<m><n/>x<o/>y</m>z") == "abcxdyez"
    assert bound.text("<m>x</m>") == "acxe"


# ---- the last token --------------------------------------------------------------------------------------------------


def test_the_last_token_of_all_is_fresh_for_its_logits() -> None:
    bound = Bound(THREE)
    plan = bound.plan("<a/>")
    assert bound.shown("<a/>") == [(0, "slice", "AB"), (2, "slice", "11"), (4, "fresh", "1")]
    assert plan.spans[1].segment is not None
    assert bound.letters.text(plan.spans[1].segment.tokens) == "111"
    assert (plan.n_cached, plan.n_tokens) == (4, 5)


def test_a_last_slice_of_one_token_is_fresh_right_behind_what_is_before() -> None:
    bound = Bound("A<module name='a'>111</module><module name='b'>2</module>")
    assert bound.shown("<b/>") == [(0, "slice", "A"), (1, "fresh", "2")]
    assert bound.shown("x<b/>") == [(0, "slice", "A"), (1, "fresh", "x2")]
    assert Bound("A").shown("") == [(0, "fresh", "A")]


def test_nothing_behind_the_last_slice_does_not_make_it_less_the_last() -> None:
    bound = Bound("<module name='m'>ab<parameter name='p' length='2'/></module>")
    assert bound.shown("<m p=''/>") == [(0, "slice", "a"), (1, "fresh", "b")]


# ---- arguments -------------------------------------------------------------------------------------------------------

GREETING = "<module name='m'>Hi <parameter name='who' length='4' scaffold='you'/>!</module><module name='n'>ok</module>"


@pytest.mark.parametrize("value", ["", "I", "Anna"])
def test_arguments_are_fresh_and_what_follows_stays_at_home(value: str) -> None:
    argument = [(3, "fresh", value)] if value else []
    assert Bound(GREETING).shown(f"<m who='{value}'/><n/>?") == [
        (0, "slice", "Hi "),
        *argument,
        (7, "slice", "!"),
        (8, "slice", "ok"),
        (10, "fresh", "?"),
    ]


def test_packed_arguments_leave_no_gap() -> None:
    assert Bound(GREETING, "packed").shown("<m who='I'/>?") == [
        (0, "slice", "Hi "),
        (3, "fresh", "I"),
        (4, "slice", "!"),
        (5, "fresh", "?"),
    ]


def test_an_argument_that_is_too_long_says_by_how_much() -> None:
    with pytest.raises(PMLError) as caught:
        Bound(f"\n\n{GREETING}").plan("\n<m who='Everyone'/>")
    assert str(caught.value) == (
        "p.xml:2: the argument for 'who' is 8 tokens long, 4 more than the 4 that the schema reserves (line 3)"
    )


def test_placeholders_are_never_part_of_a_prompt() -> None:
    plan = Bound(GREETING).plan("<m who='I'/>?")
    assert not any(segment.placeholder for segment in plan.segments)


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_a_user_turn_last_opens_the_answer() -> None:
    bound = Bound("<system>S</system>", template=CHATML)
    assert bound.shown("<user>U</user>") == [
        (0, "slice", f"{BEGIN}system\nS{END}"),
        (11, "fresh", f"{BEGIN}user\nU{END}{ANSWER}"),
    ]


def test_turns_follow_one_another() -> None:
    text = Bound("<system>S</system>", template=CHATML).text("<user>U</user><assistant>A</assistant><user>V</user>")
    assert text == f"{BEGIN}system\nS{END}{BEGIN}user\nU{END}{ANSWER}A{END}{BEGIN}user\nV{END}{ANSWER}"


def test_an_assistant_turn_last_is_gone_on_with() -> None:
    bound = Bound("<system>S</system>", template=CHATML)
    assert bound.text("<user>U</user><assistant>A</assistant>").endswith(f"{BEGIN}user\nU{END}{ANSWER}A")
    assert bound.text("<user>U</user><assistant/>").endswith(f"U{END}{ANSWER}")


def test_without_turns_the_text_goes_on_or_the_schemas_last_role_is_answered() -> None:
    assert Bound("A<module name='m'>b</module>", template=CHATML).text("<m/>") == "Ab"
    assert Bound("<user>U</user>", template=CHATML).text("") == (f"{BEGIN}user\nU{END}{ANSWER}")
    assert Bound("<user>U</user>", template=CHATML).text("and") == f"{BEGIN}user\nU{END}and"
    assert Bound("<assistant>A</assistant>", template=CHATML).text("") == f"{ANSWER}A{END}"


def test_the_first_turn_of_all_opens_the_template() -> None:
    only = Bound("<module name='m'>x</module>", template=WITH_DEFAULT)
    assert only.text("<user>U</user>") == f"{BEGIN}system\nBe kind.{END}{BEGIN}user\nU{END}{ANSWER}"
    assert only.text("<m/><user>U</user>") == f"x{BEGIN}user\nU{END}{ANSWER}"
    assert only.text("<user>U</user><assistant>A</assistant><user>V</user>").count("Be kind.") == 1


def test_the_beginning_of_text_is_there_once() -> None:
    bound = Bound("<module name='m'>x</module>", template="{{ bos_token }}" + CHATML, bos_text="<s>")
    assert bound.text("<user>U</user>") == f"<s>{BEGIN}user\nU{END}{ANSWER}"
    assert bound.text("<m/><user>U</user>") == f"<s>x{BEGIN}user\nU{END}{ANSWER}"
    assert bound.shown("<m/>") == [(0, "slice", "<s>"), (1, "fresh", "x")]


def test_templates_without_a_system_role_of_their_own() -> None:
    bound = Bound("<system>S<module name='m'>x</module></system>", template=MERGED, bos_text="<s>")
    assert bound.text("<m/><user>U</user>") == "<s>[user] Sx\n\nU[end]\n[assistant] "
    # Where no user turn follows, the turn that the system text was put in is closed.
    assert bound.text("<m/>") == "<s>[user] Sx\n\n[end]\n[assistant] "


def test_turns_do_not_read_control_tokens() -> None:
    bound = Bound("<system>S</system>", template=CHATML)
    forged = bound.plan("<user>&lt;|im_end|></user>")
    assert len(forged.tokens) == len(bound.plan("<user>U</user>").tokens) + len("<|im_end|>") - 1


def test_without_a_template_turns_are_lines() -> None:
    assert Bound("S").text("<user>U</user><assistant>A</assistant><user>V</user>") == "SU\nA\nV\n"


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_without_reuse_has_the_same_tokens_back_to_back() -> None:
    plan = Bound(THREE).plan("<c/>new<a/><user>?</user>")
    full = plan.without_reuse()
    assert np.array_equal(plan.tokens, full.tokens)
    assert [(span.start, span.segment) for span in full.spans] == [(0, None)]
    assert (full.n_tokens, full.n_cached, full.end) == (plan.n_tokens, 0, plan.n_tokens)
    assert plan.n_cached == len("AB3333111")
    assert plan.end == plan.spans[-1].end > full.end


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_an_empty_prompt_is_refused(bos: str | None) -> None:
    with pytest.raises(InputError, match=r"^p\.xml: the prompt is empty"):
        Bound("<module name='m'>x</module>", bos_text=bos).plan("")
    with pytest.raises(InputError, match="the prompt is empty"):
        Bound("<parameter name='p' length='1'/>", bos_text=bos).plan("", "p=''")


def test_schedule_of_nothing_is_empty() -> None:
    assert schedule([], packed=False) == Plan(())
    assert schedule([np.empty(0, np.int32)], packed=False) == Plan(())
    assert Plan(()).end == Plan(()).n_tokens == len(Plan(()).tokens) == 0


def test_a_span_may_use_the_beginning_of_its_segment() -> None:
    segment = Segment(np.arange(5, dtype=np.int32), 10, (), "m")
    assert (Span(12, segment.tokens[:3], segment).end, Span(12, segment.tokens[:3], segment).delta) == (15, 2)
    plan = schedule([segment, segment], packed=False)
    assert [(span.start, span.tokens.tolist(), span.segment) for span in plan.spans] == [
        (10, [0, 1, 2, 3, 4], segment),
        (15, [0, 1, 2, 3], segment),
        (19, [4], None),
    ]
