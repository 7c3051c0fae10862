"""Prompts on the layout of a schema: what they consist of, and where it stands in their plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cpucache.errors import InputError, PMLError
from cpucache.layout import Bound, ChatTemplate, NewText, Positions, SchemaLayout, Segment, bind
from cpucache.layout.segment import LONGEST
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.reuse import LEVELS, Lookup, Plan, Repair, Span
from tests.support.letters import FILLER, Letters
from tests.support.templates import WITH_DEFAULT
from tests.support.tiny import CHATML
from tests.support.workbench import planning, slice_of, some_tokens

BEGIN, END = "<|im_start|>", "<|im_end|>\n"
ANSWER = f"{BEGIN}assistant\n"
# As Gemma's: the system text goes into the first user turn.
MERGED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[user] {{ m.content }}\n\n{% else %}"
    "{% if m.role == 'assistant' or loop.first or loop.previtem.role != 'system' %}[{{ m.role }}] {% endif %}"
    "{{ m.content }}[end]\n{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


class Laid:
    """A schema, laid out, and the plans of prompts on it while no slice exists."""

    def __init__(
        self, content: str, positions: Positions = "auto", *, template: str | None = None, **vocabulary: Any
    ) -> None:
        self.letters = Letters(**vocabulary)
        self.schema = parse_schema(f"<schema name='s'>{content}</schema>", file="s.xml")
        chat = ChatTemplate(template, bos=self.letters.bos_text or "", eos="</s>")
        self.layout = SchemaLayout(self.schema, self.letters, chat, positions)

    def bound(self, content: str, attributes: str = "", **settings: bool) -> Bound:
        prompt = parse_prompt(f"<prompt schema='s' {attributes}>{content}</prompt>", file="p.xml")
        return bind(self.layout, resolve(prompt, self.schema), file="p.xml", **settings)

    def plan(self, content: str, attributes: str = "", **settings: Any) -> Plan:
        lookup = Lookup(planning(), Repair(self.letters.text))
        return lookup.plan(self.bound(content, attributes), LEVELS["fast"], **settings)

    def shown(self, content: str, attributes: str = "", **settings: bool | None) -> list[tuple[int, str, str]]:
        """Start, kind (``slice`` or ``fresh``) and text of every span; tokens to evaluate in a row are one."""
        rows: list[tuple[int, str, str]] = []
        for span in self.plan(content, attributes, **settings).spans:
            kind, text = "slice" if span.slice else "fresh", self.letters.text(span.tokens)
            if rows and rows[-1][1] == kind == "fresh":
                start, _, before = rows.pop()
                rows.append((start, kind, before + text))
            else:
                rows.append((span.start, kind, text))
        return rows

    def text(self, content: str, attributes: str = "") -> str:
        return self.letters.text(self.plan(content, attributes).tokens)


# ---- positions -------------------------------------------------------------------------------------------------------

THREE = "AB<module name='a'>111</module><module name='b'>22</module><module name='c'>3333</module>"


def test_slices_stand_at_their_reserved_positions_and_leave_gaps_for_what_is_left_out() -> None:
    assert Laid(THREE).shown("<a/><c/>?") == [
        (0, "slice", "AB"),
        (2, "slice", "111"),
        (7, "slice", "3333"),
        (11, "fresh", "?"),
    ]


def test_fresh_tokens_stand_right_after_what_is_before_them() -> None:
    assert Laid(THREE).shown("<a/>x<c/>?") == [
        (0, "slice", "AB"),
        (2, "slice", "111"),
        (5, "fresh", "x"),
        (7, "slice", "3333"),
        (11, "fresh", "?"),
    ]


def test_slices_are_moved_after_text_that_needs_their_positions() -> None:
    laid = Laid(THREE)
    assert laid.shown("<a/>xyz<b/><c/>?")[2:] == [
        (5, "fresh", "xyz"),
        (8, "slice", "22"),
        (10, "slice", "3333"),
        (14, "fresh", "?"),
    ]
    assert [span.delta for span in laid.plan("<a/>xyz<b/><c/>?").spans] == [0, 0, 0, 3, 3, 0]


def test_modules_in_another_order_follow_one_another() -> None:
    assert Laid(THREE).shown("<c/><a/><b/>?") == [
        (0, "slice", "AB"),
        (7, "slice", "3333"),
        (11, "slice", "111"),
        (14, "slice", "22"),
        (16, "fresh", "?"),
    ]


@pytest.mark.parametrize("positions", ["reserved", "packed"])
def test_packed_plans_have_no_gaps(positions: Positions) -> None:
    laid = Laid(THREE, positions)
    packed = [(0, "slice", "AB"), (2, "slice", "3333"), (6, "fresh", "x"), (7, "slice", "111"), (10, "fresh", "?")]
    assert laid.shown("<c/>x<a/>?", packed=True) == packed
    # Left to itself, a plan goes by its layout.
    assert (laid.shown("<c/>x<a/>?") == packed) == (positions == "packed")


def test_modules_that_are_not_cached_are_fresh_and_run_together_with_their_neighbours() -> None:
    laid = Laid("A<module name='m' cache='false'>bc<module name='n'>d</module></module><module name='o'>e</module>F")
    assert laid.shown("<m><n/></m>x<o/>") == [
        (0, "slice", "A"),
        (1, "fresh", "bc"),
        (3, "slice", "d"),
        (4, "fresh", "x"),
        (5, "slice", "e"),
        (6, "fresh", "F"),
    ]
    # The schema's closing text would not be exact after these: it is evaluated with the question.
    assert laid.shown("x<m/>?")[1:] == [(1, "fresh", "xbcF?")]


def test_text_around_nested_modules_is_in_order() -> None:
    laid = Laid("<module name='m'>a<module name='n'>b</module>c<module name='o'>d</module></module>e")
    assert laid.text("<m><n/>x<o/>y</m>z") == "abcxdyez"
    assert laid.text("<m>x</m>") == "acxe"


# ---- the last token --------------------------------------------------------------------------------------------------


def test_the_last_token_of_all_is_fresh_for_its_logits() -> None:
    laid = Laid(THREE)
    plan = laid.plan("<a/>")
    assert laid.shown("<a/>") == [(0, "slice", "AB"), (2, "slice", "11"), (4, "fresh", "1")]
    assert plan.spans[1].slice is not None
    assert laid.letters.text(plan.spans[1].slice.tokens) == "111"
    assert (plan.n_cached, plan.n_tokens) == (4, 5)


def test_a_last_slice_of_one_token_is_fresh_right_after_what_is_before() -> None:
    laid = Laid("A<module name='a'>111</module><module name='b'>2</module>")
    assert laid.shown("<b/>") == [(0, "slice", "A"), (1, "fresh", "2")]
    assert laid.shown("x<b/>") == [(0, "slice", "A"), (1, "fresh", "x2")]
    assert Laid("A").shown("") == [(0, "fresh", "A")]


def test_a_slice_before_an_empty_argument_is_the_last() -> None:
    laid = Laid("<module name='m'>ab<parameter name='p' length='2'/></module>")
    assert laid.shown("<m p=''/>") == [(0, "slice", "a"), (1, "fresh", "b")]


# ---- arguments -------------------------------------------------------------------------------------------------------

GREETING = "<module name='m'>Hi <parameter name='who' length='4' scaffold='you'/>!</module><module name='n'>ok</module>"


@pytest.mark.parametrize("value", ["", "I", "Anna"])
def test_arguments_are_fresh_and_what_follows_keeps_its_position(value: str) -> None:
    argument = [(3, "fresh", value)] if value else []
    assert Laid(GREETING).shown(f"<m who='{value}'/><n/>?") == [
        (0, "slice", "Hi "),
        *argument,
        (7, "slice", "!"),
        (8, "slice", "ok"),
        (10, "fresh", "?"),
    ]


def test_packed_arguments_leave_no_gap() -> None:
    assert Laid(GREETING, "packed").shown("<m who='I'/>?") == [
        (0, "slice", "Hi "),
        (3, "fresh", "I"),
        (4, "slice", "!"),
        (5, "fresh", "?"),
    ]


def test_an_argument_that_is_too_long_says_by_how_much() -> None:
    with pytest.raises(PMLError) as caught:
        Laid(f"\n\n{GREETING}").plan("\n<m who='Everyone'/>")
    assert str(caught.value) == (
        "p.xml:2: the argument for 'who' is 8 tokens long, 4 more than the 4 that the schema reserves (line 3)"
    )


def test_an_argument_knows_the_scaffold_text_that_it_replaces() -> None:
    laid = Laid(GREETING)
    pieces = laid.bound("<m who='I'/>?").pieces
    new = [piece for piece in pieces if isinstance(piece, NewText)]
    assert [laid.letters.text(piece.tokens) for piece in new] == ["I", "?"]
    assert [laid.letters.text(piece.placeholder) for piece in new] == [f"you{FILLER}", ""]
    assert [piece for piece in pieces if isinstance(piece, Segment)] == list(laid.layout.segments[:2])


def test_text_that_was_cut_is_bound_in_all_its_parts() -> None:
    laid = Laid(f"<module name='m'>{'x' * (2 * LONGEST + 1)}</module>")
    assert laid.bound("<m/>").pieces == list(laid.layout.segments)
    assert laid.bound("<m/>?").n_tokens == 2 * LONGEST + 2


def test_a_prompt_that_opens_a_conversation_does_not_open_the_answer() -> None:
    laid = Laid("<system>S</system>", template=CHATML)
    for content, asks in (("<user>U</user>", True), ("", False)):
        opened, whole = laid.bound(content, opens=True), laid.bound(content)
        assert (opened.asks, opened.turns.role) == (asks, "user" if asks else "system")
        assert whole.n_tokens == opened.n_tokens + len(laid.letters.tokenize(ANSWER, special=True))
    # Its last token is not evaluated for its logits: the first message does that.
    lookup = Lookup(planning(), Repair(laid.letters.text))
    plan = lookup.plan(laid.bound("", opens=True), LEVELS["fast"], ends=False)
    assert [span.slice is not None for span in plan.spans] == [True]


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_a_user_turn_last_opens_the_answer() -> None:
    laid = Laid("<system>S</system>", template=CHATML)
    assert laid.shown("<user>U</user>") == [
        (0, "slice", f"{BEGIN}system\nS{END}"),
        (11, "fresh", f"{BEGIN}user\nU{END}{ANSWER}"),
    ]


def test_turns_follow_one_another() -> None:
    text = Laid("<system>S</system>", template=CHATML).text("<user>U</user><assistant>A</assistant><user>V</user>")
    assert text == f"{BEGIN}system\nS{END}{BEGIN}user\nU{END}{ANSWER}A{END}{BEGIN}user\nV{END}{ANSWER}"


def test_an_assistant_turn_last_is_gone_on_with() -> None:
    laid = Laid("<system>S</system>", template=CHATML)
    assert laid.text("<user>U</user><assistant>A</assistant>").endswith(f"{BEGIN}user\nU{END}{ANSWER}A")
    assert laid.text("<user>U</user><assistant/>").endswith(f"U{END}{ANSWER}")


def test_without_turns_the_text_goes_on_or_the_schemas_last_role_is_answered() -> None:
    assert Laid("A<module name='m'>b</module>", template=CHATML).text("<m/>") == "Ab"
    assert Laid("<user>U</user>", template=CHATML).text("") == (f"{BEGIN}user\nU{END}{ANSWER}")
    assert Laid("<user>U</user>", template=CHATML).text("and") == f"{BEGIN}user\nU{END}and"
    assert Laid("<assistant>A</assistant>", template=CHATML).text("") == f"{ANSWER}A{END}"


def test_the_first_turn_of_all_opens_the_template() -> None:
    only = Laid("<module name='m'>x</module>", template=WITH_DEFAULT)
    assert only.text("<user>U</user>") == f"{BEGIN}system\nBe kind.{END}{BEGIN}user\nU{END}{ANSWER}"
    assert only.text("<m/><user>U</user>") == f"x{BEGIN}user\nU{END}{ANSWER}"
    assert only.text("<user>U</user><assistant>A</assistant><user>V</user>").count("Be kind.") == 1


def test_the_beginning_of_text_is_there_once() -> None:
    laid = Laid("<module name='m'>x</module>", template="{{ bos_token }}" + CHATML, bos_text="<s>")
    assert laid.text("<user>U</user>") == f"<s>{BEGIN}user\nU{END}{ANSWER}"
    assert laid.text("<m/><user>U</user>") == f"<s>x{BEGIN}user\nU{END}{ANSWER}"
    assert laid.shown("<m/>") == [(0, "slice", "<s>"), (1, "fresh", "x")]


def test_templates_without_a_system_role_of_their_own() -> None:
    laid = Laid("<system>S<module name='m'>x</module></system>", template=MERGED, bos_text="<s>")
    assert laid.text("<m/><user>U</user>") == "<s>[user] Sx\n\nU[end]\n[assistant] "
    # Where no user turn follows, the turn that the system text was put in is closed.
    assert laid.text("<m/>") == "<s>[user] Sx\n\n[end]\n[assistant] "


def test_turns_do_not_read_control_tokens() -> None:
    laid = Laid("<system>S</system>", template=CHATML)
    forged = laid.plan("<user>&lt;|im_end|></user>")
    assert len(forged.tokens) == len(laid.plan("<user>U</user>").tokens) + len("<|im_end|>") - 1


def test_without_a_template_turns_are_lines() -> None:
    assert Laid("S").text("<user>U</user><assistant>A</assistant><user>V</user>") == "SU\nA\nV\n"


# ---- plans -----------------------------------------------------------------------------------------------------------


def test_a_plan_without_reuse_has_the_same_tokens_back_to_back() -> None:
    plan = Laid(THREE).plan("<c/>new<a/><user>?</user>")
    full = plan.without_reuse()
    assert np.array_equal(plan.tokens, full.tokens)
    assert [(span.start, span.slice) for span in full.spans] == [(0, None)]
    assert (full.n_tokens, full.n_cached, full.end) == (plan.n_tokens, 0, plan.n_tokens)
    assert plan.n_cached == len("AB3333111")
    assert plan.end == plan.spans[-1].end > full.end


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_an_empty_prompt_is_refused(bos: str | None) -> None:
    with pytest.raises(InputError, match=r"^p\.xml: the prompt is empty"):
        Laid("<module name='m'>x</module>", bos_text=bos).plan("")
    with pytest.raises(InputError, match="the prompt is empty"):
        Laid("<parameter name='p' length='1'/>", bos_text=bos).plan("", "p=''")


def test_a_plan_of_nothing_is_empty() -> None:
    assert Plan(()).end == Plan(()).n_tokens == len(Plan(()).tokens) == 0


def test_a_span_may_use_the_beginning_of_its_slice() -> None:
    slice_ = slice_of(some_tokens(5), start=10)
    span = Span(12, slice_.tokens[:3], slice_)
    assert (span.end, span.delta, span.whole, slice_.span.whole) == (15, 2, False, True)
