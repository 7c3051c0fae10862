"""What clients are told when something fails, each in the shape of its dialect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from cpucache.errors import ContextFull, CpucacheError
from cpucache.runtime import Batch
from cpucache.server.responses import _written
from cpucache.server.settings import ServerSettings
from tests.support.pace import slow
from tests.support.serving import Served, serving, until
from tests.support.sessions import plain_spoken

Tiny = Callable[..., Path]

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens")
OWN = ("/v1/schemas", "/v1/schemas/x/encode", "/v1/cache/prepare", "/tokenize", "/apply-template")
HELLO: Any = [{"role": "user", "content": "Hello"}]


def body(path: str, text: str = "Hello", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    whole = {"model": "any", "messages": messages, "input": text, "prompt": text, "max_tokens": 20}
    if path == "/v1/schemas":
        return {"text": text, **more}
    return {**whole, "max_output_tokens": 20, "content": text, **more}


@pytest.fixture
def served(tiny: Tiny, tmp_path: Path) -> Iterator[Served]:
    with serving(plain_spoken(tiny("llama")), tmp_path, settings=ServerSettings(max_body=1 << 20)) as running:
        yield running


def check_shape(path: str, reply: httpx.Response, status: int) -> str:
    """Whether a failure is told as the clients of a path expect it; gives the message."""
    assert reply.status_code == status, reply.text
    told = reply.json()
    if path.startswith("/v1/messages"):
        kinds = {400: "invalid_request_error", 413: "request_too_large", 401: "authentication_error"}
        assert told["type"] == "error"
        assert set(told["error"]) == {"type", "message"}
        assert told["error"]["type"] == kinds[status]
    else:
        kinds = {400: "invalid_request_error", 413: "invalid_request_error", 401: "authentication_error"}
        assert set(told["error"]) == {"message", "type", "param", "code"}
        assert told["error"]["type"] == kinds[status]
    message: str = told["error"]["message"]
    assert "Traceback" not in message and "/site-packages" not in message
    return message


@pytest.mark.parametrize("path", [*PATHS, *OWN])
def test_size_and_depth(path: str, served: Served) -> None:
    json_ = {"content-type": "application/json"}
    large = json.dumps(body(path, "y" * (1 << 20))).encode()
    assert "1 MiB" in check_shape(path, served.http.post(path, content=large, headers=json_), 413)
    deep = b'{"messages": ' + b"[" * 100_000
    check_shape(path, served.http.post(path, content=deep, headers=json_), 400)
    nested: dict[str, Any] = {}
    for _ in range(400):
        nested = {"a": nested, "type": "text"}
    for name in ("messages", "input", "tools", "system"):
        reply = served.http.post(path, json={**body(path), name: [nested]})
        assert reply.status_code < 500, reply.text
    # What no page of another site can send without being asked: anything but JSON.
    reply = served.http.post(path, content=json.dumps(body(path)), headers={"content-type": "text/plain"})
    check_shape(path, reply, 400)
    assert served.http.post(PATHS[0], json=body(PATHS[0])).status_code == 200


@pytest.mark.parametrize("path", [*PATHS[:4], "/v1/cache/prepare"])
def test_prompts_that_do_not_fit(path: str, served: Served) -> None:
    for streams in (False, True):
        message = check_shape(path, served.http.post(path, json=body(path, "y" * 9000, stream=streams)), 400)
        assert "tokens long" in message or "characters exceed" in message


@pytest.mark.parametrize("path", [*PATHS, *OWN, "/metrics", "/v1/models", "/openapi.json"])
def test_no_page_of_another_site_reads_anything(path: str, served: Served) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:3000"):
        asks = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "x-api-key",
        }
        for reply in (
            served.http.options(path, headers=asks),
            served.http.post(path, json=body(path), headers={"Origin": origin}),
            served.http.get(path, headers={"Origin": origin}),
        ):
            assert not [name for name in reply.headers if name.startswith("access-control")]
        assert served.http.options(path, headers=asks).status_code in (404, 405)
    evil = served.http.post(path, json=body(path), headers={"Host": "evil.example"})
    assert "evil.example" in check_shape(path, evil, 400)


# ---- while an answer is on its way -----------------------------------------------------------------------------------
@pytest.fixture
def failing(served: Served) -> Served:
    """A server whose model fails at the fourth step of one token.

    At temperature 0, the model says only letters, so that an answer has as many tokens as it may have. A sampled answer
    may end before the fourth.
    """
    evaluate, steps = served.engine.context.evaluate, 0

    def failing(batch: Batch, *arguments: Any) -> None:
        nonlocal steps
        steps += batch.size == 1
        if steps == 4:
            steps = 0
            raise CpucacheError("the memory has gone")
        evaluate(batch, *arguments)

    served.engine.context.evaluate = failing  # type: ignore[method-assign, assignment]
    return served


def test_a_response_that_fails_says_so_in_an_event(failing: Served) -> None:
    asked: Any = {"model": "any", "input": "Hello", "max_output_tokens": 20, "temperature": 0}
    with failing.openai.responses.create(stream=True, **asked) as stream:
        events = list(stream)
    assert [each.sequence_number for each in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.id == events[0].response.id
    assert last.response.status == "failed"
    assert last.response.error is not None
    assert (last.response.error.code, last.response.error.message) == ("server_error", "the memory has gone")
    assert any(each.type == "response.output_text.delta" for each in events)
    # Whole, it is an error.
    with pytest.raises(openai.InternalServerError, match="the memory has gone"):
        failing.openai.responses.create(**asked)
    until(failing.idle)


def test_the_other_streams_say_so_in_their_own_way(failing: Served) -> None:
    asked: Any = {"model": "any", "messages": HELLO, "stream": True, "max_tokens": 20}
    with (
        pytest.raises(openai.APIError, match="the memory has gone"),
        failing.openai.chat.completions.create(temperature=0, **asked) as chat,
    ):
        list(chat)
    with (
        pytest.raises(anthropic.APIStatusError, match="the memory has gone"),
        failing.anthropic.messages.create(extra_body={"temperature": 0}, **asked) as messages,
    ):
        list(messages)
    until(failing.idle)


def test_a_response_whose_client_goes_ends_at_once(served: Served) -> None:
    slow(served.engine, 0.02)
    asked = body("/v1/responses", stream=True, max_output_tokens=1500, temperature=0)
    with served.http.stream("POST", "/v1/responses", json=asked) as reply:
        for line in reply.iter_lines():
            if "output_text.delta" in line:
                break
        else:
            pytest.fail("the answer has ended by itself")
    until(served.idle, 5)
    assert served.service._admission._free == 3
    with pytest.raises(openai.BadRequestError) as refused:
        served.openai.responses.create(model="any", input="y" * 9000)
    assert refused.value.code == "context_length_exceeded"


def test_generators_are_closed_with_those_around_them() -> None:
    """Not by whoever collects what is left over."""
    closed: list[str] = []

    async def events() -> Any:
        try:
            yield {"x-cpucache": "exact=0"}
            while True:
                yield {"type": "response.created", "response": {"id": "1"}}
        finally:
            closed.append("events")

    async def reading() -> None:
        written = _written(events())
        await anext(written)
        await anext(written)
        await written.aclose()
        assert closed == ["events"]

    asyncio.run(reading())


def test_errors_of_every_kind_have_a_code() -> None:
    async def events() -> Any:
        yield {}
        yield {"type": "response.created", "response": {"id": "1"}}
        raise ContextFull("too long")

    async def read() -> list[Any]:
        return [each async for each in _written(events())]

    last = json.loads(asyncio.run(read())[-1].split("data: ", 1)[1])
    assert last["response"]["error"] == {"code": "context_length_exceeded", "message": "too long"}
