"""Reasoning that is left out of the history, by the client or by the model's template.

Elsewhere 48 tokens of an answer cost 2,018 in one report: everything after the first reasoning is read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.clients import CODING, TOOLS, Told, claude_code, codex, codex_user, open_webui, saying, user, why
from tests.support.serving import Served, until

THOUGHT = "The user wants to know about the house. " * 6 + "So I say where it is."
ANSWER = "It is behind the mill."
THINKING = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
CALLING = f'<think>\n{THOUGHT}\n</think>\n\n<tool_call>\n{{"name": "glob", "arguments": {{"path": "*"}}}}\n</tool_call>'
AROUND = 90
"""Tokens, which are bytes here, of a short message and the template around it."""


def openai_messages(served: Served, messages: list[Any], **more: Any) -> Told:
    return open_webui(served, messages, tools=TOOLS, **more)


def said_by_user(ask: Callable[..., Told], text: str) -> Any:
    return codex_user(text) if ask is codex else user(text)


def without_reasoning(said: list[Any]) -> list[Any]:
    """The answer as most clients send it back."""
    kept = []
    for each in said:
        if each.get("type") == "reasoning":
            continue
        content = each.get("content")
        if isinstance(content, list):
            content = [block for block in content if block["type"] != "thinking"]
        kept.append({**each, "content": content} if content is not None else each)
    return kept


def result_of(said: list[Any]) -> list[Any]:
    """What came of the call in an answer."""
    last = said[-1]
    if last.get("type") == "function_call":
        return [{"type": "function_call_output", "call_id": last["call_id"], "output": "a.py"}]
    if isinstance(last["content"], list):
        result = {"type": "tool_result", "tool_use_id": last["content"][-1]["id"], "content": "a.py"}
        return [{"role": "user", "content": [result]}]
    return [{"role": "tool", "tool_call_id": last["tool_calls"][0]["id"], "content": "a.py"}]


@pytest.mark.parametrize("ask", [claude_code, codex, openai_messages])
@pytest.mark.parametrize("sent", ["left out", "sent back"])
def test_what_the_template_keeps_is_put_back(ask: Callable[..., Told], sent: str, served: Served) -> None:
    """Between a call and its result, as in every agent."""
    asked = [said_by_user(ask, "List the files.")]
    with saying(served, CALLING):
        first = ask(served, asked)
    assert (first.text, first.reasoning) == ("", THOUGHT)
    said = without_reasoning(first.said) if sent == "left out" else first.said
    second = ask(served, [*asked, *said, *result_of(first.said)])
    assert second.evaluated < AROUND
    assert second.exact > first.size + len(THOUGHT)
    assert why(served, second) is None


def test_reasoning_between_an_answer_and_its_call(served: Served) -> None:
    """Items of a response give the same prompt as a chat completion."""
    call = {"name": "glob", "arguments": '{"path": "*"}'}
    said: dict[str, Any] = {"role": "assistant", "content": ANSWER, "reasoning_content": THOUGHT}
    said["tool_calls"] = [{"id": "c", "type": "function", "function": call}]
    asked = [{"role": "system", "content": CODING}, user("Look.")]
    result = {"role": "tool", "tool_call_id": "c", "content": "a.py"}
    chat = openai_messages(served, [*asked, said, result])
    items = [
        codex_user("Look."),
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": ANSWER}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": THOUGHT}]},
        {"type": "function_call", "call_id": "c", **call},
        {"type": "function_call_output", "call_id": "c", "output": "a.py"},
    ]
    response = codex(served, items)
    assert response.size == chat.size
    assert response.evaluated == 1


@pytest.mark.parametrize("ask", [claude_code, codex, openai_messages])
def test_what_the_template_leaves_out_costs_nothing_after_a_pause(ask: Callable[..., Told], served: Served) -> None:
    asked = [said_by_user(ask, "Where is the house?")]
    with saying(served, THINKING):
        first = ask(served, asked)
    assert (first.text, first.reasoning) == (ANSWER, THOUGHT)
    until(lambda: not served.service.background.busy)
    second = ask(served, [*asked, *without_reasoning(first.said), said_by_user(ask, "And who lives there?")])
    assert second.evaluated < AROUND
    assert second.size < first.size + len(THINKING)
    assert why(served, second) is None


def test_all_turns_of_a_tool_loop_are_ready_for_the_next_message(served: Served) -> None:
    """There the template leaves out what was thought in every turn since the user spoke last."""
    said: list[Any] = [user("List the files.")]
    for answer in (CALLING, CALLING.replace('"*"', '"*.py"'), THINKING):
        with saying(served, answer):
            told = open_webui(served, said, tools=TOOLS)
        said += told.said
        if answer is not THINKING:
            said += result_of(told.said)
    until(lambda: not served.service.background.busy)
    after = open_webui(served, [*said, user("Thanks. And now?")], tools=TOOLS)
    assert after.evaluated < AROUND


def test_without_a_pause_it_is_told(served: Served) -> None:
    asked = [user("Where is the house?")]
    served.service.background._limit = 0  # nothing is evaluated while idle
    with saying(served, THINKING):
        first = open_webui(served, asked)
    more = [user("And who lives there? " * 5), {"role": "assistant", "content": "Nobody."}, user("Why?")]
    second = open_webui(served, [*asked, *first.said, *more])
    found = why(served, second)
    assert found is not None and found["cause"] == "reasoning-left-out"
    assert "<think>" in found["known"] and ANSWER[:8] in found["sent"]


@pytest.mark.parametrize("sent", ["left out", "sent back", "in the text"])
def test_a_template_that_keeps_all(sent: str, keeping: Served) -> None:
    asked = [user("Where is the house?")]
    with saying(keeping, THINKING):
        first = open_webui(keeping, asked)
    (said,) = first.said
    said = {
        "left out": said,
        "sent back": {**said, "reasoning_content": THOUGHT},
        "in the text": {**said, "content": THINKING},
    }[sent]
    second = open_webui(keeping, [*asked, said, user("And who lives there?")])
    assert second.evaluated < AROUND
    assert second.exact > first.size + len(THOUGHT)


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_separated_from_the_answer(stream: bool, served: Served) -> None:
    asked: Any = [user("Where is the house?")]
    with saying(served, THINKING):
        if stream:
            with served.anthropic.messages.stream(model="m", max_tokens=400, messages=asked) as events:
                message = events.get_final_message()
        else:
            message = served.anthropic.messages.create(model="m", max_tokens=400, messages=asked)
        if stream:
            with served.openai.responses.create(model="m", input=asked, stream=True) as kinds:
                told = list(kinds)
            response = told[-1].response
            deltas = [each.delta for each in told if each.type == "response.reasoning_text.delta"]
            assert "".join(deltas) == THOUGHT
        else:
            response = served.openai.responses.create(model="m", input=asked)
        answer = served.openai.chat.completions.create(model="m", messages=asked)
    thinking, text = message.content
    assert (thinking.thinking, text.text) == (THOUGHT, ANSWER)
    reasoning, said = response.output
    assert reasoning.content[0].text == THOUGHT and said.content[0].text == ANSWER
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == len(served.engine.model.tokenize(THOUGHT))
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.reasoning_content == THOUGHT
