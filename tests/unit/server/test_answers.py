"""Answers separated: reasoning, text and calls, however the text comes in pieces."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.layout.conversation import ChatMessage
from cpucache.server.answers import CLOSE, OPEN, AnswerParser, answer_of, separated
from tests.support.tries import tries

CALL = f"<tool_call>\n{json.dumps({'name': 'look', 'arguments': {}})}\n</tool_call>"
THOUGHT = "First I look < at it,\n\nthen I </say> so."
pieces = st.lists(st.integers(1, 12), max_size=40)


def parsed(text: str, sizes: list[int], *, thinking: bool = False) -> AnswerParser:
    """The parser when ``text`` has come in pieces of these sizes; what it gave out is what it has."""
    parser, at = AnswerParser(["look"], thinking=thinking), 0
    reasoning = said = ""
    for size in [*sizes, len(text)]:
        found = parser.feed(text[at : at + size])
        reasoning, said, at = reasoning + found.reasoning, said + found.text, at + size
    rest = parser.finish()
    assert (reasoning + rest.reasoning, said + rest.text) == (parser.reasoning, parser.text)
    return parser


@tries(100)
@given(
    sizes=pieces,
    before=st.sampled_from(["", "\n", " \n "]),
    space=st.sampled_from(["", "\n", "\n\n"]),
    answer=st.sampled_from(["It is so.", "<think>", "a\n\nb "]),
    call=st.booleans(),
    opened=st.booleans(),
)
def test_reasoning_text_and_calls(
    sizes: list[int], before: str, space: str, answer: str, call: bool, opened: bool
) -> None:
    head = "" if opened else before + OPEN
    text = f"{head}{space}{THOUGHT}{space}{CLOSE}{space}{answer}" + (CALL if call else "")
    parser = parsed(text, sizes, thinking=opened)
    assert parser.reasoning == THOUGHT
    assert parser.text == (answer.rstrip() if call else answer)
    assert [each.name for each in parser.calls] == ["look"] * call
    assert answer_of(text) == answer + (CALL if call else "")


@tries(100)
@given(sizes=pieces, text=st.text("<think>/ \nab", max_size=30))
def test_without_reasoning_nothing_changes(sizes: list[int], text: str) -> None:
    parser = parsed(text, sizes)
    if not text.lstrip().startswith(OPEN):
        assert (parser.reasoning, parser.text) == ("", text)


@pytest.mark.parametrize("text", [f"{OPEN}\nI am not", f"{OPEN}I am not\n"])
@tries(100)
@given(sizes=pieces)
def test_reasoning_that_is_cut_short(text: str, sizes: list[int]) -> None:
    parser = parsed(text, sizes)
    assert (parser.reasoning, parser.text) == ("I am not", "")


def test_a_message_that_has_both_is_separated() -> None:
    message = ChatMessage("assistant", f"{OPEN}\nHm.\n{CLOSE}\n\nYes.")
    assert separated(message) == ChatMessage("assistant", "Yes.", (), reasoning="Hm.")
    for other in (ChatMessage("user", message.text), ChatMessage("assistant", "Yes."), ChatMessage("assistant", OPEN)):
        assert separated(other) is other
