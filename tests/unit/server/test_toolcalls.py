"""Tool calls in answers: found in every shape that models write, however the text comes in pieces."""

from __future__ import annotations

import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.server.toolcalls import ToolParser
from tests.support.tries import tries

ARGUMENTS = {"city": "Ulm", "days": [1, 2], "note": 'a "quoted" { brace'}
OBJECT = json.dumps({"name": "weather", "arguments": ARGUMENTS})
OTHER = json.dumps({"name": "time", "parameters": {}})
CALLS = [
    f"<tool_call>\n{OBJECT}\n</tool_call>",
    f"<tool_call>{OBJECT}",
    OBJECT,
    f"  \n{OBJECT}\n",
    f"```json\n{OBJECT}\n```",
    f"[TOOL_CALLS] [{OBJECT}]",
    f"<|python_tag|>{OBJECT}",
    json.dumps({"name": "weather", "arguments": json.dumps(ARGUMENTS)}),
]
HARD = {
    '<tool_call>{"name": "weather", "arguments": {"a": "</tool_call> <tool_call>"}}</tool_call>': {
        "a": "</tool_call> <tool_call>"
    },
    '{"name": "weather", "arguments": null}': {},
    '{"name": "weather", "arguments": {"a": [1e999, -1e999, 0.5]}}': {
        "a": [sys.float_info.max, -sys.float_info.max, 0.5]
    },
    '<tool_call>{"name": "weather", "arguments": {"a": "one\n\ttwo"}}</tool_call>': {"a": "one\n\ttwo"},
}
TEXTS = [
    "It rains.",
    "a < b, and {x} is a set",
    '{"name": "someone", "age": 3}',
    "```python\nprint()\n```",
    "<tool_call>no JSON</tool_call>",
    '{"name": "weather", "arguments": {"a": NaN}}',
    '{"name": "weather", "arguments": ' + "[" * 100_000,
    "<tool_cal",
    "[TOOL_",
    " \n",
    "",
]


def parsed(text: str, sizes: list[int], names: tuple[str, ...] = ("weather", "time")) -> tuple[str, ToolParser]:
    """The text that is given out, and the parser, when ``text`` comes in pieces of these sizes."""
    parser, said, at = ToolParser(names), "", 0
    for size in [*sizes, len(text)]:
        said += parser.feed(text[at : at + size])
        at += size
    return said + parser.finish(), parser


pieces = st.lists(st.integers(1, 12), max_size=30)


@tries(100)
@given(call=st.sampled_from(CALLS), before=st.sampled_from(["", "One moment. ", "Let me see:\n\n"]), sizes=pieces)
def test_a_call_is_found(call: str, before: str, sizes: list[int]) -> None:
    if before and not call.startswith(("<tool_call>", "[TOOL_CALLS]")):
        return
    said, parser = parsed(before + call, sizes)
    assert said == before.rstrip()
    (found,) = parser.calls
    assert (found.name, found.arguments) == ("weather", ARGUMENTS)
    assert found.id.startswith("call_")


@pytest.mark.parametrize("text", HARD)
def test_arguments_may_hold_anything(text: str) -> None:
    said, parser = parsed(text, [5, 9])
    (found,) = parser.calls
    assert (said, found.arguments) == ("", HARD[text])
    # Clients read arguments as JSON.
    json.dumps(found.arguments, allow_nan=False)


@pytest.mark.parametrize(
    "text",
    [f"<tool_call>{OBJECT}</tool_call>\n<tool_call>{OTHER}</tool_call>", f"[TOOL_CALLS] [{OBJECT}, {OTHER}]"],
)
@tries(100)
@given(sizes=pieces)
def test_several_calls_are_found(text: str, sizes: list[int]) -> None:
    _, parser = parsed(text, sizes)
    assert [call.name for call in parser.calls] == ["weather", "time"]
    assert len({call.id for call in parser.calls}) == 2


@tries(100)
@given(text=st.sampled_from(TEXTS), sizes=pieces)
def test_what_is_no_call_is_text(text: str, sizes: list[int]) -> None:
    said, parser = parsed(text, sizes)
    assert (said, parser.calls) == (text, [])


@tries(100)
@given(text=st.sampled_from([*CALLS, *TEXTS]), sizes=pieces)
def test_without_tools_everything_is_text(text: str, sizes: list[int]) -> None:
    parser = ToolParser(())
    at, said = 0, []
    for size in sizes:
        said.append(parser.feed(text[at : at + size]))
        assert said[-1] == text[at : at + size]
        at += size
    assert "".join(said) + parser.feed(text[at:]) + parser.finish() == text


@tries(100)
@given(text=st.sampled_from(CALLS))
def test_a_tool_that_there_is_not_is_text(text: str) -> None:
    said, parser = parsed(text, [], ("another",))
    assert (said, parser.calls) == (text, [])


def test_text_is_given_out_as_soon_as_it_can_t_be_a_call() -> None:
    parser = ToolParser(("weather",))
    assert parser.feed("It rains") == "It rains"
    assert parser.feed(" <to") == ""
    assert parser.feed("day>") == " <today>"
    assert parser.feed("now\n<tool_call>") == "now"
    assert parser.feed("{") == ""
