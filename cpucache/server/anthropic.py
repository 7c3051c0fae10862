"""Anthropic's API: messages."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from cpucache.engine import Metrics, Sampling
from cpucache.engine.sampling import sampling_of
from cpucache.errors import InputError
from cpucache.layout import Text, Tokens
from cpucache.layout.conversation import ChatMessage, Role, Tool, ToolCall
from cpucache.layout.vocabulary import common
from cpucache.server.answers import Said
from cpucache.server.asked import Asked, Extension, Mark
from cpucache.server.choice import anthropic_choice
from cpucache.server.events import event, streamed
from cpucache.server.marks import SECONDS, marked
from cpucache.server.openai_requests import modules_of
from cpucache.server.service import Service, new_id, while_connected
from cpucache.server.tenant import Tenant

_BILLING = "x-anthropic-billing-header:"
"""Beginning of the block that Claude Code sends before its system text. The rest of it differs in every request."""
_THINKING = {"type": "thinking", "thinking": "", "signature": ""}
"""A block of reasoning. Its signature is empty: this server signs nothing."""
_log = logging.getLogger("cpucache.server")


class CountRequest(BaseModel):
    """A request to count the tokens of a conversation."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    cpucache: Extension | None = None


class MessagesRequest(CountRequest):
    """A request to answer a conversation."""

    max_tokens: int = Field(ge=1, le=1 << 30)
    stream: bool = False
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    stop_sequences: list[str] | None = None

    def sampling(self) -> Sampling:
        """How tokens are sampled. The default temperature is 1, as in Anthropic's API, and not ``Engine``'s."""
        return sampling_of(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=[text for text in self.stop_sequences or () if text],
        )


def messages_of(body: CountRequest) -> list[ChatMessage]:
    """Returns the messages of a request, the system text first. Raises ``InputError``."""
    messages = []
    system = _system(body.system)
    if system:
        messages.append(ChatMessage("system", system))
    names: dict[str, str] = {}
    for number, each in enumerate(body.messages):
        where, role = f"messages.{number}", each.get("role")
        # Claude Code sends reminders as messages of the system between the others.
        if role not in ("user", "assistant", "system"):
            raise InputError(f"{where}.role: must be user, assistant or system, not {role!r}")
        texts: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCall] = []
        results: list[ChatMessage] = []
        for block in _blocks(each.get("content"), where):
            kind = block.get("type")
            if kind == "text":
                texts.append(_text(block, where))
            elif kind == "tool_use" and role == "assistant":
                call = _call(block, where)
                names[call.id] = call.name
                calls.append(call)
            elif kind == "tool_result" and role == "user":
                identity = str(block.get("tool_use_id") or "")
                said = "\n".join(_text(part, where) for part in _blocks(block.get("content") or "", where))
                results.append(ChatMessage("tool", said, call=identity, name=names.get(identity, "")))
            elif kind == "thinking" and role == "assistant":
                thoughts.append(str(block.get("thinking") or ""))
            elif kind not in ("thinking", "redacted_thinking"):
                raise InputError(f"{where}.content: this model accepts text only, not a block of type {kind!r}")
        messages += results
        if texts or calls or not results:
            text, thought = "\n".join(texts), "\n".join(filter(None, thoughts))
            messages.append(ChatMessage(cast(Role, role), text, calls, reasoning=thought))
    return messages


def _system(given: str | list[dict[str, Any]] | None) -> str:
    """Returns the system text of a request, without billing headers: they would change every prompt at its start."""
    blocks = _blocks(given or "", "system")
    texts = [_text(block, "system") for block in blocks]
    kept = [text for text in texts if not text.startswith(_BILLING)]
    if len(kept) < len(texts):
        _tell_of_billing()
    return "\n\n".join(text for text in kept if text)


@cache
def _tell_of_billing() -> None:
    """Logs, once in a process, that billing headers are left out."""
    _log.info("billing headers, which are new in every request, are left out of system texts")


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise InputError(f"{where}.content: must be text or a list of blocks")
    return content


def _text(block: dict[str, Any], where: str) -> str:
    if block.get("type") != "text" or not isinstance(block.get("text"), str):
        raise InputError(f"{where}: this model accepts text only, not a block of type {block.get('type')!r}")
    return str(block["text"])


def _call(block: dict[str, Any], where: str) -> ToolCall:
    name, arguments = block.get("name"), block.get("input")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise InputError(f"{where}: a tool_use needs a name, and an object as its input")
    return ToolCall(name, arguments, str(block.get("id") or ""))


def tools_of(body: CountRequest) -> list[Tool]:
    """Returns the tools of a request, none if ``tool_choice`` is ``none``. Raises ``InputError``."""
    if (body.tool_choice or {}).get("type") == "none":
        return []
    tools = []
    for number, each in enumerate(body.tools or ()):
        name, parameters, description = each.get("name"), each.get("input_schema"), each.get("description")
        if not isinstance(name, str) or not name:
            raise InputError(f"tools.{number}.name: a name is expected")
        tools.append(
            Tool(
                name,
                description if isinstance(description, str) else "",
                parameters if isinstance(parameters, dict) else {},
            )
        )
    return tools


def asked_of(tenant: Tenant, body: CountRequest) -> Asked:
    """Returns the prompt of a request, with the marks up to which it is kept. Raises ``PMLError`` or ``InputError``."""
    messages, tools = messages_of(body), tools_of(body)
    modules = modules_of([body.system, *(each.get("content") for each in body.messages)])
    asked = tenant.asked(messages, tools, modules, body.cpucache)
    if not isinstance(asked.prompt, Text):
        return asked
    tokens = asked.prompt.tokens

    def begun(other: CountRequest) -> Tokens:
        head = messages_of(other)
        # Chat templates may refuse a conversation without a message of the user.
        rest = [] if any(message.role == "user" for message in head) else [ChatMessage("user", "?")]
        return tenant.text([*head, *rest], tools, modules).tokens

    marks = tuple(
        Mark(len(tokens) if other.messages == body.messages else common(tokens, begun(other)), seconds)
        for other, seconds in marked(body)
    )
    text = replace(asked.prompt, edges=tuple(sorted({mark.position for mark in marks})))
    return replace(asked, prompt=text, marks=marks)


def usage(metrics: Metrics, prompt: Asked) -> dict[str, Any]:
    """Token counts of an answer, in the shape of Anthropic's ``usage``.

    Evaluated tokens that were saved count as written to the cache. Those up to the last mark of one hour count as
    written for an hour, the others as written for five minutes.
    """
    read, encoded = metrics.cached_tokens, metrics.encoded_tokens
    hour = max((mark.position for mark in prompt.marks if mark.seconds > SECONDS["5m"]), default=0)
    longer = min(encoded, max(0, hour - read))
    return {
        "input_tokens": metrics.fresh_tokens - encoded,
        "cache_read_input_tokens": read,
        "cache_creation_input_tokens": encoded,
        "cache_creation": {"ephemeral_5m_input_tokens": encoded - longer, "ephemeral_1h_input_tokens": longer},
        "output_tokens": metrics.completion_tokens,
    }


def _event(kind: str, **data: Any) -> str:
    return event({"type": kind, **data})


class Anthropic:
    """The endpoints of Anthropic's API.

    Args:
        service: Answers the requests.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter(tags=["Anthropic"])
        self.router.post("/v1/messages", response_model=None)(self.messages)
        self.router.post("/v1/messages/count_tokens", response_model=None)(self.count)

    async def count(self, body: CountRequest, request: Request) -> dict[str, int]:
        """Counts the tokens of the prompt that /v1/messages would answer. Nothing is evaluated."""
        asked = await asyncio.to_thread(asked_of, self._service.tenant(request), body)
        return {"input_tokens": asked.size}

    async def messages(self, body: MessagesRequest, request: Request) -> Response:
        """Answers a conversation."""
        service = self._service
        tools = tools_of(body)
        tenant = service.tenant(request)
        prompt = await asyncio.to_thread(asked_of, tenant, body)
        forced = anthropic_choice(body.tool_choice, tools)
        sampling = await asyncio.to_thread(tenant.sampling, body.sampling(), forced)
        names = [tool.name for tool in tools]
        if body.stream:
            pieces = self._events(request, prompt, sampling, body.max_tokens, names)
            return await streamed(request, pieces, _event("ping"))
        return await while_connected(request, self._whole(request, prompt, sampling, body.max_tokens, names))

    async def _whole(
        self, request: Request, prompt: Asked, sampling: Sampling, most: int, names: Sequence[str]
    ) -> JSONResponse:
        """Returns the whole answer, when it has ended."""
        service = self._service
        tenant = service.tenant(request)
        async with service.answer(request, prompt, sampling, most) as reader:
            parser = tenant.parser(prompt, names)
            async for piece in reader.pieces():
                parser.feed(piece)
            parser.finish()
        tenant.remember(parser, reader.stream, prompt)
        metrics = reader.stream.metrics
        content = [{**_THINKING, "thinking": parser.reasoning}] if parser.reasoning else []
        content += [{"type": "text", "text": parser.text}] if parser.text or not parser.calls else []
        content += [_used(call, dict(call.arguments)) for call in parser.calls]
        reason, sequence = _stopped(metrics, parser.calls)
        told = {"stop_reason": reason, "stop_sequence": sequence, "usage": usage(metrics, prompt)}
        return JSONResponse({**self._head(), "content": content, **told}, headers=service.facts(metrics))

    async def _events(
        self, request: Request, prompt: Asked, sampling: Sampling, most: int, names: Sequence[str]
    ) -> AsyncGenerator[str | dict[str, str]]:
        """Yields the response headers, then the events of the answer."""
        service = self._service
        tenant = service.tenant(request)
        async with service.answer(request, prompt, sampling, most) as reader:
            metrics = reader.stream.metrics
            yield service.facts(metrics)
            begun = {
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {**usage(metrics, prompt), "output_tokens": 0},
            }
            yield _event("message_start", message={**self._head(), "content": [], **begun})
            yield _event("ping")
            parser = tenant.parser(prompt, names)
            blocks = _Blocks()
            async for piece in reader.pieces():
                for told in blocks.events(parser.feed(piece)):
                    yield told
            for told in blocks.events(parser.finish()):
                yield told
        for told in blocks.close():
            yield told
        for number, call in enumerate(parser.calls, blocks.index):
            yield _event("content_block_start", index=number, content_block=_used(call, {}))
            written = json.dumps(dict(call.arguments))
            delta = {"type": "input_json_delta", "partial_json": written}
            yield _event("content_block_delta", index=number, delta=delta)
            yield _event("content_block_stop", index=number)
        tenant.remember(parser, reader.stream, prompt)
        reason, sequence = _stopped(metrics, parser.calls)
        ended = {"stop_reason": reason, "stop_sequence": sequence}
        yield _event("message_delta", delta=ended, usage=usage(metrics, prompt))
        yield _event("message_stop")

    def _head(self) -> dict[str, Any]:
        return {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": self._service.model}


class _Blocks:
    """The content blocks of a streamed answer: reasoning, then text."""

    def __init__(self) -> None:
        self.index = 0
        self._open = ""

    def events(self, said: Said) -> list[str]:
        """Returns the events that report a piece. A block is opened where none of its kind is open."""
        told = self._told("thinking", said.reasoning, {"type": "thinking_delta", "thinking": said.reasoning})
        return told + self._told("text", said.text, {"type": "text_delta", "text": said.text})

    def close(self) -> list[str]:
        """Returns the event that ends the open block; none if no block is open."""
        ended = [_event("content_block_stop", index=self.index)] if self._open else []
        self.index += bool(self._open)
        self._open = ""
        return ended

    def _told(self, kind: str, said: str, delta: dict[str, str]) -> list[str]:
        if not said:
            return []
        told = []
        if self._open != kind:
            told = self.close()
            self._open = kind
            begun = _THINKING if kind == "thinking" else {"type": "text", "text": ""}
            told.append(_event("content_block_start", index=self.index, content_block=begun))
        return [*told, _event("content_block_delta", index=self.index, delta=delta)]


def _used(call: ToolCall, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _stopped(metrics: Metrics, calls: Sequence[ToolCall]) -> tuple[str, str | None]:
    if calls:
        return "tool_use", None
    if metrics.finish != "stop":
        return "max_tokens", None
    return ("stop_sequence", metrics.stop) if metrics.stop else ("end_turn", None)
