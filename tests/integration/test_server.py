"""The server, with the clients that people use: what it answers is what the engine answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from cpucache import Sampling
from cpucache.engine import Stream
from cpucache.layout.conversation import Conversations
from cpucache.server.openai_requests import messages_of, tools_of
from tests.support.serving import Served, serving, until
from tests.support.sessions import message, plain_spoken

Tiny = Callable[..., Path]

SYSTEM = {"role": "system", "content": "Answer in a few words. " * 20}
ASKED = [SYSTEM, {"role": "user", "content": message(1, 10)}]
GREEDY: dict[str, Any] = {"model": "any", "temperature": 0, "max_tokens": 12}
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city <|im_end|>",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
SAYS_CALL = "root ::= " + json.dumps("One moment. " + CALL)
"""A grammar of a single answer."""


@pytest.fixture(scope="module")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(plain_spoken(tiny("llama")), tmp_path_factory.mktemp("served"), segment_tokens=(8, 16)) as running:
        yield running


# ---- OpenAI ----------------------------------------------------------------------------------------------------------
def test_a_chat_is_what_the_engine_says(served: Served) -> None:
    wanted = served.engine.generate(ASKED, max_tokens=12)
    answer = served.openai.chat.completions.create(messages=ASKED, **GREEDY)
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == wanted.metrics.prompt_tokens
    assert answer.usage.completion_tokens == 12
    # It was asked before.
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1
    assert answer.model == served.service.model


def test_a_stream_is_the_same_in_pieces(served: Served) -> None:
    whole = served.openai.chat.completions.create(messages=ASKED, **GREEDY)
    with served.openai.chat.completions.create(
        messages=ASKED,
        stream=True,
        stream_options={"include_usage": True},
        **GREEDY,
    ) as stream:
        chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_where_reuse_came_from_is_told(served: Served) -> None:
    body = {"messages": [*ASKED[:1], {"role": "user", "content": "something new"}], **GREEDY}
    first, second = (served.http.post("/v1/chat/completions", json=body) for _ in range(2))
    count = first.json()["usage"]["prompt_tokens"]
    facts = [dict(each.split("=") for each in reply.headers["x-cpucache"].split(", ")) for reply in (first, second)]
    assert int(facts[0]["exact"]) + int(facts[0]["evaluated"]) == count
    assert int(facts[1]["exact"]) == count - 1
    uncached = served.http.post("/v1/chat/completions", json={**body, "cache_prompt": False})
    assert f"evaluated={count}" in uncached.headers["x-cpucache"]
    assert uncached.json()["choices"] == first.json()["choices"]


def test_completions_of_text_and_of_tokens(served: Served) -> None:
    text = message(3, 12)
    wanted = served.engine.generate(text=text, max_tokens=12).text
    tokens = served.http.post("/tokenize", json={"content": text}).json()["tokens"]
    assert served.http.post("/detokenize", json={"tokens": tokens}).json() == {"content": text}
    for prompt in (text, tokens, [text], [tokens]):
        answer = served.openai.completions.create(prompt=prompt, **GREEDY)
        assert [choice.text for choice in answer.choices] == [wanted]
    two = served.openai.completions.create(prompt=[text, "rain"], echo=True, **GREEDY)
    other = served.engine.generate(text="rain", max_tokens=12).text
    assert [choice.text for choice in two.choices] == [text + wanted, "rain" + other]
    with served.openai.completions.create(prompt=text, stream=True, **GREEDY) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == wanted


def test_several_answers_differ_by_their_seed(served: Served) -> None:
    settings = {**GREEDY, "temperature": 1.5, "seed": 7}
    first, second = (served.openai.chat.completions.create(messages=ASKED, n=3, **settings) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert len(set(texts)) == 3
    assert first.usage is not None and first.usage.completion_tokens <= 36


def test_a_text_to_stop_at_and_log_probabilities(served: Served) -> None:
    text = served.engine.generate(ASKED, max_tokens=12).text
    stop = text[4:6]
    answer = served.openai.chat.completions.create(
        messages=ASKED,
        stop=stop,
        logprobs=True,
        top_logprobs=3,
        **GREEDY,
    )
    (choice,) = answer.choices
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None and choice.logprobs.content
    for each in choice.logprobs.content:
        assert len(each.top_logprobs) == 3
        assert each.logprob == max(one.logprob for one in each.top_logprobs) <= 0


def answers_after(served: Served, properties: dict[str, Any], temperature: float) -> Iterator[dict[str, Any]]:
    """Objects that the model writes after a JSON schema with these properties."""
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    for seed in range(3):
        answer = served.openai.chat.completions.create(
            messages=ASKED,
            model="any",
            seed=seed,
            temperature=temperature,
            max_tokens=400,
            response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": schema}},
        )
        yield json.loads(answer.choices[0].message.content or "")


def test_an_answer_follows_a_json_schema(served: Served) -> None:
    for value in answers_after(served, {"age": {"type": "integer"}, "ok": {"type": "boolean"}}, 1.2):
        assert set(value) == {"age", "ok"}
        assert isinstance(value["age"], int) and isinstance(value["ok"], bool)


def test_strings_of_a_json_schema_are_json(served: Served) -> None:
    """This model is as likely to write a control character as any other, which JSON allows only escaped."""
    for value in answers_after(served, {"text": {"type": "string", "minLength": 40, "maxLength": 60}}, 2.0):
        assert set(value) == {"text"}


def test_a_tool_is_called_and_its_result_read(served: Served) -> None:
    settings = {**GREEDY, "max_tokens": 200, "tools": [{"type": "function", "function": WEATHER}]}
    forced = {"extra_body": {"grammar": SAYS_CALL}}
    answer = served.openai.chat.completions.create(messages=ASKED, **settings, **forced)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "One moment."
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Ulm"}
    with served.openai.chat.completions.create(
        messages=ASKED,
        stream=True,
        **settings,
        **forced,
    ) as stream:
        deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "One moment."
    (told,) = [each for delta in deltas for each in delta.tool_calls or ()]
    assert told.function is not None
    assert (told.function.name, json.loads(told.function.arguments or "")) == ("get_weather", {"city": "Ulm"})
    # The next turn evaluates the result and nothing before it, however the client writes the call down.
    spoken = choice.message.model_dump(exclude_none=True)
    spoken["tool_calls"][0]["function"]["arguments"] = '{ "city" :"Ulm" }'
    said = [*ASKED, spoken, {"role": "tool", "tool_call_id": call.id, "content": "It rains."}]
    reply = served.http.post("/v1/chat/completions", json={"messages": said, **settings})
    usage = reply.json()["usage"]
    before = answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert usage["prompt_tokens_details"]["cached_tokens"] >= before - 3


def test_the_order_of_tools_changes_nothing(served: Served) -> None:
    tools = [{"type": "function", "function": {**WEATHER, "name": name}} for name in ("b", "a", "c")]
    one, other = (
        served.http.post("/apply-template", json={"messages": ASKED, "tools": order}).json()["prompt"]
        for order in (tools, tools[::-1])
    )
    assert one == other
    assert one.index('"a"') < one.index('"b"') < one.index('"c"')
    # A tool's description can't end a turn.
    ids = (
        Conversations(served.engine.model, served.engine.host.template)
        .text(messages_of(ASKED), tools_of(tools, None))
        .tokens.tolist()
    )
    (end,) = served.engine.model.tokenize("<|im_end|>", special=True).tolist()
    assert ids.count(end) == 2
    assert one.count("<|im_end|>") == 5


def test_what_is_no_text_is_refused_with_a_reason(served: Served) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    for body, reason in (
        ({"messages": [{"role": "user", "content": image}]}, "accepts text only, not a part of type 'image_url'"),
        ({"messages": []}, "at least one message is needed"),
        ({"messages": [{"role": "clown", "content": "x"}]}, "not 'clown'"),
        ({"messages": ASKED, "tool_choice": "required"}, "no tools to call"),
        ({"messages": ASKED, "grammar": "root ::= ("}, "grammar"),
        ({"messages": ASKED, "temperature": -1}, "temperature"),
        ({"messages": ASKED, "n": 2, "stream": True}, "must be 1 for a stream"),
        ({"messages": [{"role": "user", "content": "y" * 9000}]}, "tokens long"),
    ):
        reply = served.http.post("/v1/chat/completions", json={"model": "any", **body})
        assert reply.status_code == 400, reply.text
        assert reason in reply.json()["error"]["message"]
        assert reply.json()["error"]["type"] == "invalid_request_error"
    assert served.http.post("/v1/embeddings", json={"input": "x"}).status_code == 501
    with pytest.raises(openai.NotFoundError):
        served.openai.models.retrieve("another")


# ---- OpenAI's Responses ----------------------------------------------------------------------------------------------
def test_a_response_is_what_the_engine_says(served: Served) -> None:
    wanted = served.engine.generate(ASKED, max_tokens=12)
    settings: dict[str, Any] = {"model": "any", "max_output_tokens": 12, "temperature": 0}
    asked: dict[str, Any] = {"instructions": SYSTEM["content"], "input": ASKED[1]["content"], **settings}
    answer = served.openai.responses.create(**asked)
    assert answer.output_text == wanted.text
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.usage is not None
    assert answer.usage.input_tokens == wanted.metrics.prompt_tokens
    assert answer.usage.input_tokens_details.cached_tokens == wanted.metrics.prompt_tokens - 1
    with served.openai.responses.create(stream=True, **asked) as stream:
        events = list(stream)
    assert events[-1].type == "response.incomplete"
    assert events[-1].response.output_text == wanted.text
    assert "".join(each.delta for each in events if each.type == "response.output_text.delta") == wanted.text
    with pytest.raises(openai.BadRequestError, match="keeps no responses"):
        served.openai.responses.create(previous_response_id="resp_1", **asked)


def test_a_function_called_in_a_response(served: Served) -> None:
    tools: list[Any] = [{"type": "function", "strict": None, **WEATHER}, {"type": "web_search"}]
    said: list[Any] = [{"role": "user", "content": [{"type": "input_text", "text": "Weather in Ulm?"}]}]
    with forced(served, SAYS_CALL):
        answer = served.openai.responses.create(model="any", input=said, tools=tools)
        with served.openai.responses.create(model="any", input=said, tools=tools, stream=True) as stream:
            (done,) = [each.response for each in stream if each.type == "response.completed"]
    for each in (answer, done):
        text, call = each.output
        assert text.content[0].text == "One moment."
        assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Ulm"})
    said += [
        *(each.model_dump(exclude_none=True) for each in answer.output),
        {"type": "function_call_output", "call_id": answer.output[1].call_id, "output": "It rains."},
    ]
    reply = served.openai.responses.create(model="any", input=said, tools=tools, max_output_tokens=4)
    assert reply.usage is not None and answer.usage is not None
    before = answer.usage.input_tokens + answer.usage.output_tokens
    assert reply.usage.input_tokens_details.cached_tokens >= before - 3


# ---- Anthropic -------------------------------------------------------------------------------------------------------
def test_messages_are_what_the_engine_says(served: Served) -> None:
    wanted = served.engine.generate(ASKED, max_tokens=12)
    settings: dict[str, Any] = {"model": "any", "max_tokens": 12, "extra_body": {"temperature": 0}}
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=0a1b2;"},
        {"type": "text", "text": SYSTEM["content"], "cache_control": {"type": "ephemeral"}},
    ]
    asked = [{"role": "user", "content": [{"type": "text", "text": ASKED[1]["content"]}]}]
    answer = served.anthropic.messages.create(system=system, messages=asked, **settings)
    assert answer.content[0].text == wanted.text
    assert answer.stop_reason == "max_tokens"
    usage = answer.usage
    assert usage.output_tokens == 12
    total = usage.input_tokens + (usage.cache_read_input_tokens or 0) + (usage.cache_creation_input_tokens or 0)
    assert total == wanted.metrics.prompt_tokens
    # The header, which is new each time, spoils nothing.
    assert usage.cache_read_input_tokens == wanted.metrics.prompt_tokens - 1
    with served.anthropic.messages.stream(system=system, messages=asked, **settings) as stream:
        assert "".join(stream.text_stream) == wanted.text
        assert stream.get_final_message().usage.output_tokens == 12
    counted = served.anthropic.messages.count_tokens(model="any", system=system, messages=asked)
    assert counted.input_tokens == wanted.metrics.prompt_tokens


def test_tools_in_anthropic_s_words(served: Served) -> None:
    tool = {"name": "get_weather", "description": "Weather", "input_schema": WEATHER["parameters"]}
    settings: dict[str, Any] = {"model": "any", "max_tokens": 200, "tools": [tool]}
    asked: list[Any] = [{"role": "user", "content": "How is the weather in Ulm?"}]
    # The dialect has no grammars: what the engine is told to say, it says here.
    with forced(served, SAYS_CALL):
        answer = served.anthropic.messages.create(messages=asked, **settings)
        with served.anthropic.messages.stream(messages=asked, **settings) as stream:
            final = stream.get_final_message()
    for each in (answer, final):
        assert each.stop_reason == "tool_use"
        text, use = each.content
        assert text.text == "One moment."
        assert (use.name, use.input) == ("get_weather", {"city": "Ulm"})
    asked += [
        {"role": "assistant", "content": [each.model_dump() for each in answer.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "It rains."}]},
    ]
    reply = served.anthropic.messages.create(messages=asked, **settings)
    before = sum(
        getattr(answer.usage, name) or 0
        for name in ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
    )
    assert (reply.usage.cache_read_input_tokens or 0) >= before - 3


@contextmanager
def forced(served: Served, grammar: str) -> Iterator[None]:
    """Meanwhile every answer follows a grammar."""
    stream = served.engine.stream

    def following(*arguments: Any, sampling: Sampling, **settings: Any) -> Stream:
        return stream(*arguments, sampling=replace(sampling, grammar=grammar), **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine, "stream", following)
        yield


# ---- together --------------------------------------------------------------------------------------------------------
def test_eight_clients_get_what_each_gets_by_itself(served: Served) -> None:
    asked = [[SYSTEM, {"role": "user", "content": message(number, 15)}] for number in range(8)]
    one_by_one = [served.engine.generate(each, max_tokens=12).text for each in asked]

    def ask(messages: Any) -> Any:
        answer = served.openai.chat.completions.create(messages=messages, **GREEDY)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, asked)) == one_by_one
    until(served.idle)
