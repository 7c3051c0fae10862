"""A selection of modules as somebody picks them: what can be picked, and the prompt that results."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.authoring.writing import write_prompt
from cpucache.cli.selection import Row, Selection
from cpucache.errors import InputError
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.canonical import canonical, meaning
from cpucache.pml.tree import Module
from tests.support.tries import tries

SCHEMA = parse_schema(
    """
<schema name="trip">
  <parameter name="days" length="4" scaffold="two"/>
  <module name="kyoto">Kyoto.<module name="temples">Temples.</module><module name="food">Food.</module></module>
  <union>
    <module name="train">By train, <parameter name="class" length="4"/> class.</module>
    <module name="bus">By bus.</module>
  </union>
  <module name="budget">Cheap.</module>
</schema>
"""
)


def row(selection: Selection, name: str) -> Row:
    return next(each for each in selection.rows() if each.node.name == name)


def listed(selection: Selection) -> list[tuple[str, int, bool]]:
    return [(each.node.name, each.depth, each.picked) for each in selection.rows()]


def test_modules_within_a_module_are_listed_once_it_is_picked() -> None:
    selection = Selection(SCHEMA)
    assert [name for name, _, _ in listed(selection)] == ["days", "kyoto", "train", "bus", "budget"]
    selection.toggle(row(selection, "kyoto"))
    assert listed(selection)[1:4] == [("kyoto", 0, True), ("temples", 1, False), ("food", 1, False)]
    selection.toggle(row(selection, "food"))
    assert selection.names == ["kyoto", "kyoto.food"]
    selection.toggle(row(selection, "kyoto"))
    assert selection.names == []


def test_one_member_of_a_union_is_picked_at_most() -> None:
    selection = Selection(SCHEMA)
    selection.toggle(row(selection, "train"))
    assert row(selection, "class").kind == "parameter"
    selection.toggle(row(selection, "bus"))
    assert selection.names == ["bus"]
    selection.toggle(row(selection, "bus"))
    assert selection.names == []


def test_modules_stand_in_the_order_of_the_schema_whenever_they_were_picked() -> None:
    selection = Selection(SCHEMA)
    for name in ("budget", "bus", "kyoto"):
        selection.toggle(row(selection, name))
    assert [child.name for child in selection.prompt("Where?").children[:-1]] == ["kyoto", "bus", "budget"]  # type: ignore[union-attr]


def test_a_prompt_is_what_the_selection_begins_with() -> None:
    given_prompt = parse_prompt(
        "<prompt schema='trip' days='five'><budget/><kyoto><food/></kyoto><user>How far is it?</user></prompt>"
    )
    selection = Selection(SCHEMA, given_prompt)
    assert selection.draft == "How far is it?"
    assert row(selection, "days").value == "five"
    again = selection.prompt(selection.draft)
    assert [child.name for child in again.children[:-1]] == ["budget", "kyoto"]  # type: ignore[union-attr]
    assert again.arguments == {"days": "five"}
    # A module that is picked as well stands before those that follow it in the schema.
    selection.toggle(row(selection, "train"))
    selection.give(row(selection, "class"), "first")
    train = selection.prompt("?").children[0]
    assert (train.name, train.arguments) == ("train", {"class": "first"})  # type: ignore[union-attr]


LINES = st.text(st.sampled_from(" \t\n\r<>&\"'a]é"), max_size=8)


@tries(100)
@given(st.lists(st.integers(0, 20), max_size=30), LINES, LINES)
def test_whatever_is_picked_can_be_asked_and_written(presses: list[int], question: str, value: str) -> None:
    """No order of key presses gives a prompt that the schema refuses, and each changes the row that was meant."""
    selection = Selection(SCHEMA)
    for press in presses:
        rows = selection.rows()
        chosen = rows[press % len(rows)]
        before = chosen.picked
        selection.toggle(chosen)
        assert chosen.picked is (isinstance(chosen.node, Module) and not before)
        if not row(selection, "days").value:
            selection.give(row(selection, "days"), "one")
    if "train" in selection.names:
        selection.give(row(selection, "class"), f"first{value}")
    resolve(selection.prompt("Where?"), SCHEMA)
    for asked in (question, None):
        prompt = selection.prompt(asked)
        assert meaning(parse_prompt(write_prompt(prompt))) == meaning(prompt)


TEXTS = ("<kyoto>In spring.<food/> And\n\n  <temples/></kyoto> and <budget/>\nso on", " a <budget/>", "a]]&gt;b")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("space", ["", " xml:space='preserve'"])
def test_text_and_turns_of_a_prompt_are_written_as_they_are(text: str, space: str) -> None:
    turns = "<system>Be kind.</system><user> Hi &amp; bye\n\n</user><assistant/><user>What?</user>"
    prompt = parse_prompt(f"<prompt schema='trip' days='&#10;two &lt; &quot;3&quot;'{space}>{text}{turns}</prompt>")
    written = write_prompt(prompt)
    assert meaning(parse_prompt(written)) == meaning(prompt)
    assert canonical(written, file="written") == written
    selection = Selection(SCHEMA, prompt)
    assert selection.draft == "What?"
    assert meaning(parse_prompt(write_prompt(selection.prompt("What?")))) == meaning(selection.prompt("What?"))


def test_what_pml_can_t_hold_is_no_prompt() -> None:
    with pytest.raises(InputError, match="the prompt contains U\\+0007, which PML can't contain"):
        write_prompt(Selection(SCHEMA).prompt("ring\a"))
