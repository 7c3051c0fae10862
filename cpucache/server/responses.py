"""OpenAI's Responses API, stateless: a client sends the whole conversation with each request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from cpucache.engine import Metrics, Sampling
from cpucache.engine.sampling import sampling_of
from cpucache.errors import InputError
from cpucache.layout.conversation import ChatMessage, Tool, ToolCall
from cpucache.runtime.grammar import ANY_JSON, grammar_of
from cpucache.server.answers import AnswerParser, Said
from cpucache.server.asked import Asked, Extension
from cpucache.server.choice import openai_choice
from cpucache.server.events import event, streamed
from cpucache.server.failures import refusal_of
from cpucache.server.openai_requests import messages_of, modules_of, text_of, tools_of
from cpucache.server.service import Reader, Service, new_id, while_connected

_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded", 503: "server_is_overloaded"}
_log = logging.getLogger("cpucache.server")


class ResponsesRequest(BaseModel):
    """A request for a response. Unknown fields are ignored. ``check`` refuses fields that need stored state."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    stream: bool = False
    max_output_tokens: int | None = Field(None, ge=1, le=1 << 30)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    cpucache: Extension | None = None

    def sampling(self) -> Sampling:
        """How tokens are sampled. The default temperature is 1, as in OpenAI's API. Raises ``InputError``."""
        form = (self.text or {}).get("format") or {}
        kind = form.get("type", "text") if isinstance(form, dict) else "text"
        grammar = ""
        if kind == "json_object":
            grammar = ANY_JSON
        elif kind == "json_schema":
            if not isinstance(form.get("schema"), dict):
                raise InputError("text.format.schema: an object is expected")
            grammar = grammar_of(form["schema"])
        temperature = 1.0 if self.temperature is None else self.temperature
        return sampling_of(temperature=temperature, top_p=self.top_p, grammar=grammar)

    def check(self) -> None:
        """Raises ``InputError`` if the request refers to stored state, or asks for a background response."""
        for name in ("previous_response_id", "conversation", "background"):
            if getattr(self, name):
                raise InputError(f"{name}: this server keeps no responses; send the whole conversation as input")


def conversation_of(body: ResponsesRequest) -> list[ChatMessage]:
    """Returns the messages of a request, its instructions first. Raises ``InputError``.

    Reasoning is attached to the assistant's message or call right after it. A call is added to an assistant's message
    right before it, if there is one. Reasoning between the two is added to that message's reasoning: chat templates
    take the reasoning of a message as one text, before its text and calls.
    """
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    messages = [] if not body.instructions else [ChatMessage("system", body.instructions)]
    names: dict[str, str] = {}
    thought = ""
    for number, item in enumerate(items):
        where, kind = f"input[{number}]", item.get("type", "message")
        if kind == "reasoning":
            thought = _joined(thought, _thought(item))
            continue
        reasoning, thought = thought, ""
        if kind == "message":
            role = item.get("role")
            given = {"role": role, "content": text_of(item.get("content"), where)}
            messages += messages_of([{**given, "reasoning_content": reasoning} if role == "assistant" else given])
        elif kind == "function_call":
            call = _call(item, where)
            names[call.id] = call.name
            last = messages[-1] if messages else None
            if last is not None and last.role == "assistant":
                messages[-1] = replace(last, calls=[*last.calls, call], reasoning=_joined(last.reasoning, reasoning))
            else:
                messages.append(ChatMessage("assistant", "", [call], reasoning=reasoning))
        elif kind == "function_call_output":
            identity = str(item.get("call_id") or "")
            said = text_of(item.get("output"), where)
            messages.append(ChatMessage("tool", said, call=identity, name=names.get(identity, "")))
        else:
            raise InputError(f"{where}: this server does not support items of type {kind!r}")
    return messages


def _thought(item: dict[str, Any]) -> str:
    """Text of a reasoning item. Encrypted reasoning of another server has no text."""
    parts = item.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return _joined(*(text for text in texts if isinstance(text, str)))


def _joined(*texts: str) -> str:
    """Texts of reasoning as one, each on lines of its own."""
    return "\n".join(filter(None, texts))


def _call(item: dict[str, Any], where: str) -> ToolCall:
    try:
        arguments = json.loads(item.get("arguments") or "{}")
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}.arguments: JSON text is expected") from error
    name = item.get("name")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise InputError(f"{where}: a function_call needs a name, and an object as its arguments")
    return ToolCall(name, arguments, str(item.get("call_id") or ""))


def functions_of(body: ResponsesRequest) -> list[Tool]:
    """Returns the functions among the tools of a request. Tools of other types are ignored. Raises ``InputError``."""
    functions = [{"type": "function", "function": each} for each in body.tools or () if each.get("type") == "function"]
    return tools_of(functions, body.tool_choice)


def usage(metrics: Metrics, reasoning: int = 0) -> dict[str, Any]:
    """Token counts of an answer, in the shape of the API's ``usage``. ``reasoning`` is in tokens."""
    return {
        "input_tokens": metrics.prompt_tokens,
        "input_tokens_details": {"cached_tokens": metrics.cached_tokens},
        "output_tokens": metrics.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": metrics.prompt_tokens + metrics.completion_tokens,
    }


class Responses:
    """The endpoint of OpenAI's Responses API.

    Args:
        service: Answers the requests.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter(tags=["OpenAI"])
        self.router.post("/v1/responses", response_model=None)(self.respond)

    async def respond(self, body: ResponsesRequest, request: Request) -> Response:
        """Answers a conversation."""
        body.check()
        tools = functions_of(body)
        items = body.input if isinstance(body.input, list) else []
        modules = modules_of(item.get("content") for item in items)
        tenant = self._service.tenant(request)
        forced = openai_choice(body.tool_choice, tools, several=body.parallel_tool_calls is not False)
        prompt = await asyncio.to_thread(tenant.asked, conversation_of(body), tools, modules, body.cpucache)
        sampling = await asyncio.to_thread(body.sampling)
        sampling = await asyncio.to_thread(tenant.sampling, sampling, forced)
        events = self._events(request, prompt, body, sampling, [tool.name for tool in tools])
        if body.stream:
            # Codex ends a stream without an event for five minutes, and waits longer for one to begin.
            return await streamed(request, _written(events))
        return await while_connected(request, self._whole(events))

    async def _whole(self, events: AsyncGenerator[dict[str, Any]]) -> JSONResponse:
        async with aclosing(events):
            headers = await anext(events)
            told = [each async for each in events]
        return JSONResponse(told[-1]["response"], headers=headers)

    async def _events(
        self, request: Request, prompt: Asked, body: ResponsesRequest, sampling: Sampling, names: Sequence[str]
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yields the response headers, then the events of a response. The last event has the whole response."""
        service = self._service
        number = 0

        def numbered(kind: str, **data: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": kind, "sequence_number": number - 1, **data}

        response: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": service.model,
            "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "instructions": body.instructions,
            "error": None,
            "incomplete_details": None,
            "metadata": {},
            "temperature": body.temperature,
            "top_p": body.top_p,
        }
        item = {"id": new_id("msg_"), "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
        thinking = {"id": new_id("rs_"), "type": "reasoning", "status": "in_progress", "summary": [], "content": []}
        tenant = service.tenant(request)
        output: list[dict[str, Any]] = []
        async with service.answer(request, prompt, sampling, body.max_output_tokens) as reader:
            yield service.facts(reader.stream.metrics)
            yield numbered("response.created", response=response)
            yield numbered("response.in_progress", response=response)
            parser = tenant.parser(prompt, names)
            thought = text = ""
            async for said in _said(parser, reader):
                if said.reasoning and not thought:
                    yield numbered("response.output_item.added", output_index=0, item=thinking)
                if said.reasoning:
                    thought += said.reasoning
                    told = {"item_id": thinking["id"], "output_index": 0, "content_index": 0}
                    yield numbered("response.reasoning_text.delta", **told, delta=said.reasoning)
                if said.text and thought and not output:
                    for each in _thoughts_end(thinking, thought, output):
                        yield numbered(**each)
                if said.text and not text:
                    place["output_index"] = len(output)
                    yield numbered("response.output_item.added", output_index=len(output), item=item)
                    yield numbered("response.content_part.added", **place, part=_part(""))
                if said.text:
                    text += said.text
                    yield numbered("response.output_text.delta", **place, delta=said.text, logprobs=[])
        metrics = reader.stream.metrics
        if thought and not output:
            for each in _thoughts_end(thinking, thought, output):
                yield numbered(**each)
        if text:
            whole = {**item, "status": "completed", "content": [_part(text)]}
            yield numbered("response.output_text.done", **place, text=text, logprobs=[])
            yield numbered("response.content_part.done", **place, part=_part(text))
            yield numbered("response.output_item.done", output_index=len(output), item=whole)
            output.append(whole)
        for index, call in enumerate(parser.calls, len(output)):
            arguments = json.dumps(dict(call.arguments))
            asked = {"id": new_id("fc_"), "type": "function_call", "call_id": call.id, "name": call.name}
            begun = {**asked, "arguments": "", "status": "in_progress"}
            yield numbered("response.output_item.added", output_index=index, item=begun)
            told = {"item_id": asked["id"], "output_index": index}
            yield numbered("response.function_call_arguments.delta", **told, delta=arguments)
            yield numbered("response.function_call_arguments.done", **told, arguments=arguments, name=call.name)
            done = {**asked, "arguments": arguments, "status": "completed"}
            yield numbered("response.output_item.done", output_index=index, item=done)
            output.append(done)
        tenant.remember(parser, reader.stream, prompt)
        cut = metrics.finish != "stop" and not parser.calls
        response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": output,
            "usage": usage(metrics, len(tenant.engine.model.tokenize(thought))),
        }
        yield numbered("response.incomplete" if cut else "response.completed", response=response)


async def _said(parser: AnswerParser, reader: Reader) -> AsyncIterator[Said]:
    """Yields reasoning and text as the parser separates them."""
    async for piece in reader.pieces():
        yield parser.feed(piece)
    yield parser.finish()


def _thoughts_end(item: dict[str, Any], thought: str, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the reasoning to ``output`` as its first item, and returns the events that end it."""
    content = [{"type": "reasoning_text", "text": thought}]
    output.append({**item, "status": "completed", "content": content})
    told = {"item_id": item["id"], "output_index": 0, "content_index": 0, "text": thought}
    done = {"kind": "response.output_item.done", "output_index": 0, "item": output[0]}
    return [{"kind": "response.reasoning_text.done", **told}, done]


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def _written(events: AsyncGenerator[dict[str, Any]]) -> AsyncGenerator[str | dict[str, str]]:
    """Yields the response headers, then the events as text. An error after the headers becomes ``response.failed``."""
    response: dict[str, Any] = {}
    number = 0
    async with aclosing(events):
        yield await anext(events)
        try:
            async for each in events:
                response, number = each.get("response", response), number + 1
                yield event(each)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                _log.exception("a response failed")
            told = {"code": refusal.code or _CODES.get(refusal.status, "server_error"), "message": refusal.message}
            failed = {**response, "status": "failed", "error": told}
            yield event({"type": "response.failed", "sequence_number": number, "response": failed})
