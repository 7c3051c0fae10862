"""Calls that clients ask for: forced by a grammar, in the form that the model's template has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cpucache.layout import ChatTemplate
from cpucache.layout.conversation import ChatMessage, Conversations, Tool, ToolCall
from cpucache.runtime import Sampling
from cpucache.runtime.grammar import CallForm
from cpucache.server.choice import BARE, LIST, TAGS, Forced, form_of
from cpucache.server.toolcalls import ToolParser
from tests.support.letters import Letters
from tests.support.serving import Served, serving
from tests.support.toolchat import CHATML, TOOLS

Tiny = Callable[..., Path]

CITY = {"type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"]}
COUNT = {"type": "object", "properties": {"count": {"enum": [1, 22]}}, "required": ["count"]}
FUNCTIONS = {"get_weather": CITY, "roll_dice": COUNT}
ASKED: list[Any] = [{"role": "user", "content": "How is the weather?"}]
WARM: dict[str, Any] = {"model": "any", "temperature": 1.2, "max_tokens": 400}
OPENAI: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in FUNCTIONS.items()
]
ANTHROPIC: list[Any] = [{"name": name, "input_schema": schema} for name, schema in FUNCTIONS.items()]
MISTRAL = (
    "{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have nine letters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    "{% endfor %}]{{ eos_token }}{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    # A model that says anything whatsoever.
    with serving(tiny("llama"), tmp_path_factory.mktemp("served")) as running:
        yield running


def right(name: str, arguments: dict[str, Any]) -> bool:
    """Whether a call follows its function's schema."""
    (key,) = FUNCTIONS[name]["required"]
    allowed: Any = FUNCTIONS[name]["properties"]
    return set(arguments) == {key} and arguments[key] in allowed[key]["enum"]


def test_openai_s_choices(served: Served) -> None:
    named = {"type": "function", "function": {"name": "roll_dice"}}
    for seed in range(3):
        for choice, more in (("required", {}), ("required", {"parallel_tool_calls": False}), (named, {})):
            answer = served.openai.chat.completions.create(
                messages=ASKED,
                tools=OPENAI,
                tool_choice=choice,
                seed=seed,
                **more,
                **WARM,
            )
            (only,) = answer.choices
            calls = only.message.tool_calls or []
            assert only.finish_reason == "tool_calls"
            assert all(right(call.function.name, json.loads(call.function.arguments)) for call in calls)
            assert len(calls) == 1 or (choice == "required" and not more)
            assert choice == "required" or calls[0].function.name == "roll_dice"
            assert not only.message.content
    free = served.openai.chat.completions.create(messages=ASKED, tools=OPENAI, tool_choice="auto", seed=1, **WARM)
    assert free.choices[0].message.tool_calls is None


def test_a_forced_call_is_streamed(served: Served) -> None:
    with served.openai.chat.completions.create(
        messages=ASKED, tools=OPENAI, tool_choice="required", seed=4, stream=True, **WARM
    ) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    told = [each for delta in deltas for each in delta.tool_calls or ()]
    assert told
    assert all(right(each.function.name, json.loads(each.function.arguments)) for each in told)
    assert not "".join(delta.content or "" for delta in deltas)


def test_anthropic_s_choices(served: Served) -> None:
    for choice in ({"type": "any"}, {"type": "tool", "name": "get_weather"}):
        answer = served.anthropic.messages.create(
            model="any",
            messages=ASKED,
            max_tokens=400,
            tools=ANTHROPIC,
            tool_choice=choice,
            extra_body={"temperature": 0.9},
        )
        assert answer.stop_reason == "tool_use"
        assert answer.content
        for use in answer.content:
            assert use.type == "tool_use" and right(use.name, use.input)
        assert choice["type"] == "any" or [use.name for use in answer.content] == ["get_weather"]


def test_a_response_s_choice(served: Served) -> None:
    tools: list[Any] = [{"type": "function", "strict": None, **each["function"]} for each in OPENAI]
    for choice in ("required", {"type": "function", "name": "roll_dice"}):
        answer = served.openai.responses.create(
            model="any",
            input="Roll.",
            tools=tools,
            tool_choice=choice,
            max_output_tokens=400,
        )
        assert answer.output
        for call in answer.output:
            assert call.type == "function_call" and right(call.name, json.loads(call.arguments))
        assert choice == "required" or [call.name for call in answer.output] == ["roll_dice"]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/chat/completions", {"tool_choice": "required"}, "no tools to call"),
        ("/v1/chat/completions", {"tools": OPENAI, "tool_choice": "always"}, "must be auto, none, required"),
        (
            "/v1/chat/completions",
            {"tools": OPENAI, "tool_choice": {"type": "function", "function": {"name": "fly"}}},
            "no tool is named 'fly'",
        ),
        (
            "/v1/chat/completions",
            {"tools": OPENAI, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "can't both be a call and follow a grammar",
        ),
        ("/v1/messages", {"tool_choice": {"type": "any"}, "max_tokens": 9}, "no tools to call"),
        ("/v1/messages", {"tools": ANTHROPIC, "tool_choice": {"type": "x"}, "max_tokens": 9}, "must be auto, any"),
        ("/v1/messages", {"tools": ANTHROPIC, "tool_choice": {"type": "tool"}, "max_tokens": 9}, "no tool is named"),
    ],
)
def test_choices_that_are_refused(path: str, body: dict[str, Any], reason: str, served: Served) -> None:
    reply = served.http.post(path, json={"model": "any", "messages": ASKED, **body})
    assert reply.status_code == 400
    assert reason in reply.json()["error"]["message"]


def test_schemas_with_references_of_the_same_name(served: Served) -> None:
    """As those that pydantic writes; and one that no grammar can follow."""
    first = {**CITY, "properties": {"city": {"$ref": "#/$defs/Item"}}, "$defs": CITY["properties"]}
    first["$defs"] = {"Item": CITY["properties"]["city"]}  # type: ignore[index]
    second = {**COUNT, "properties": {"count": {"$ref": "#/$defs/Item"}}}
    second["$defs"] = {"Item": {"$ref": "#/$defs/Deeper"}, "Deeper": COUNT["properties"]["count"]}  # type: ignore[index]
    odd = {"type": "object", "properties": {"a": {"$ref": "http://elsewhere/x"}}}
    for schemas, fine in (({"get_weather": first, "roll_dice": second}, right), ({"odd": odd}, lambda *_: True)):
        tools = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in schemas.items()]
        for seed in range(4):
            body = {"messages": ASKED, "tools": tools, "tool_choice": "required", "seed": seed, **WARM}
            reply = served.http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            (only,) = reply.json()["choices"]
            assert only["finish_reason"] in ("tool_calls", *(["length"] if "odd" in schemas else []))
            for call in only["message"].get("tool_calls", []):
                assert fine(call["function"]["name"], json.loads(call["function"]["arguments"]))


# ---- forms -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "form"), [(TOOLS, TAGS), (CHATML, TAGS), (None, TAGS), (MISTRAL, LIST), (LLAMA, BARE)]
)
def test_calls_are_written_as_the_template_has_them(template: str | None, form: CallForm, served: Served) -> None:
    letters = Letters(n_ctx_train=1 << 20, chat_template=template)
    assert form_of(Conversations(letters, ChatTemplate(template)), letters.text) == form
    # The text that the grammar forces is what is parsed.
    tools = tuple(Tool(name, "", schema) for name, schema in FUNCTIONS.items())
    for seed in range(3):
        sampling = Forced(tools, several=True).of(Sampling(temperature=1.2, seed=seed), form)
        text = served.engine.generate(text="x", max_tokens=400, sampling=sampling).text
        parser = ToolParser(FUNCTIONS)
        assert "".join([*(parser.feed(letter) for letter in text), parser.finish()]) == "", text
        assert parser.calls
        assert all(right(call.name, dict(call.arguments)) for call in parser.calls)


def test_an_answer_sent_back_does_not_change_the_form_of_a_strict_template() -> None:
    """How the answer was written is taken where the template takes it; else the call, in the template's own form."""
    strict = MISTRAL.replace(
        "{% elif m.tool_calls %}",
        "{% elif m.role == 'tool' %}{% if not messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('a result without a call') }}{% endif %}[RESULT]{{ m.content }}{% elif m.tool_calls %}",
    )
    call = ToolCall("get_weather", {"city": "Ulm"}, "abcdefghi")
    said = [
        ChatMessage("user", "Hi"),
        ChatMessage("assistant", "", [call]),
        ChatMessage("tool", "Rain.", call="abcdefghi"),
    ]
    written = [said[0], ChatMessage("assistant", '[{"name":"get_weather", "arguments":{"city":"Ulm"}}]'), said[2]]

    def told(template: str) -> str:
        letters = Letters(n_ctx_train=1 << 20, chat_template=template)
        conversations = Conversations(letters, ChatTemplate(template))
        return letters.text(conversations.text(said, written=written).tokens)

    assert '[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "Ulm"}, "id": "abcdefghi"}]' in told(strict)
    assert "[RESULT]Rain." in told(strict)
    # One that asks for nothing gets it as it was written.
    lax = strict.replace("{% if not messages[loop.index0 - 1].tool_calls %}", "{% if false %}")
    assert '[{"name":"get_weather", "arguments":{"city":"Ulm"}}]' in told(lax)
    assert "[RESULT]Rain." in told(lax)
