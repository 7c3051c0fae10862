"""OpenAI's API: endpoints of chat completions and completions."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from cpucache.engine import Metrics, Sampling
from cpucache.engine.answer import TokenLogprobs
from cpucache.engine.sampling import sampling_of
from cpucache.errors import InputError
from cpucache.layout import Text
from cpucache.layout.conversation import ToolCall
from cpucache.server.answers import Said
from cpucache.server.asked import Asked
from cpucache.server.choice import openai_choice
from cpucache.server.events import COMMENT, event, streamed
from cpucache.server.openai_requests import CHOICES, ChatRequest, CompletionRequest, messages_of, modules_of, tools_of
from cpucache.server.service import Reader, Service, new_id, while_connected


def usage(metrics: Metrics) -> dict[str, Any]:
    """Token counts of an answer, in the shape of OpenAI's ``usage``."""
    return {
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.completion_tokens,
        "total_tokens": metrics.prompt_tokens + metrics.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": metrics.cached_tokens},
    }


def _total(readers: Sequence[Reader]) -> dict[str, Any]:
    """Token counts of several answers to one prompt, whose tokens count once."""
    first = usage(readers[0].stream.metrics)
    first["completion_tokens"] = sum(reader.stream.metrics.completion_tokens for reader in readers)
    first["total_tokens"] = first["prompt_tokens"] + first["completion_tokens"]
    return first


def _finish(metrics: Metrics, calls: Sequence[ToolCall] = ()) -> str:
    if calls:
        return "tool_calls"
    return "stop" if metrics.finish == "stop" else "length"


def _told_calls(calls: Sequence[ToolCall], *, numbered: bool = False) -> list[dict[str, Any]]:
    told = []
    for number, call in enumerate(calls):
        arguments = json.dumps(dict(call.arguments))
        each = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}
        told.append({"index": number, **each} if numbered else each)
    return told


def _delta(said: Said) -> dict[str, Any]:
    told = {"reasoning_content": said.reasoning, "content": said.text}
    return {name: text for name, text in told.items() if text}


class OpenAI:
    """The endpoints of OpenAI's API, without Responses.

    Args:
        service: Answers the requests.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter(tags=["OpenAI"])
        self.router.post("/v1/chat/completions", response_model=None)(self.chat)
        self.router.post("/v1/completions", response_model=None)(self.complete)

    # -- chat --------------------------------------------------------------------------------------------------------
    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        service = self._service
        messages, tools = messages_of(body.messages), tools_of(body.tools, body.tool_choice)
        modules = modules_of(each.get("content") for each in body.messages)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        sampling = await asyncio.to_thread(body.sampling, logprobs)
        tenant = service.tenant(request)
        forced = openai_choice(body.tool_choice, tools, several=body.parallel_tool_calls is not False)
        sampling = await asyncio.to_thread(tenant.sampling, sampling, forced)
        prompt = await asyncio.to_thread(tenant.asked, messages, tools, modules, body.cpucache)
        most = body.max_completion_tokens or body.max_tokens
        names = [tool.name for tool in tools]
        identity = new_id("chatcmpl-")
        count = body.n or 1
        head = {"id": identity, "created": int(time.time()), "model": service.model}
        if body.stream:
            if count > 1:
                raise InputError("n: must be 1 for a stream")
            shown = body.stream_options is not None and body.stream_options.include_usage
            pieces = self._chat_events(request, prompt, sampling, most, names, head, body.cache_prompt, shown)
            return await streamed(request, pieces, COMMENT)

        async def whole(number: int) -> tuple[Reader, dict[str, Any]]:
            chosen = varied(sampling, number)
            async with service.answer(request, prompt, chosen, most, use_cache=body.cache_prompt) as reader:
                parser = tenant.parser(prompt, names)
                async for piece in reader.pieces():
                    parser.feed(piece)
                parser.finish()
            text = parser.text
            message: dict[str, Any] = {"role": "assistant", "content": text or None if parser.calls else text}
            if parser.reasoning:
                message["reasoning_content"] = parser.reasoning
            if parser.calls:
                message["tool_calls"] = _told_calls(parser.calls)
            tenant.remember(parser, reader.stream, prompt)
            choice = {"index": number, "message": message, "logprobs": self._chat_logprobs(reader)}
            return reader, {**choice, "finish_reason": _finish(reader.stream.metrics, parser.calls)}

        done = await while_connected(request, _together([whole(number) for number in range(count)]))
        readers = [reader for reader, _ in done]
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice for _, choice in done], "usage": _total(readers)},
            headers=service.facts(readers[0].stream.metrics),
        )

    async def _chat_events(
        self,
        request: Request,
        prompt: Asked,
        sampling: Sampling,
        most: int | None,
        names: Sequence[str],
        head: dict[str, Any],
        use_cache: bool,
        shown: bool,
    ) -> AsyncGenerator[str | dict[str, str]]:
        """Yields the response headers, then the chunks of the answer; with ``shown``, also its usage."""
        service = self._service
        tenant = service.tenant(request)

        def chunk(delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
            choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
            usages = {"usage": None} if shown else {}
            return event({**head, "object": "chat.completion.chunk", "choices": [choice], **usages})

        async with service.answer(request, prompt, sampling, most, use_cache=use_cache) as reader:
            yield service.facts(reader.stream.metrics)
            yield chunk({"role": "assistant", "content": ""})
            parser = tenant.parser(prompt, names)
            told = 0
            async for piece in reader.pieces():
                said = parser.feed(piece)
                if any(said):
                    end = len(reader.stream.tokens)
                    logprobs = self._chat_logprobs(reader, told, end)
                    told = end
                    yield chunk(_delta(said), logprobs=logprobs)
            rest = parser.finish()
            if any(rest):
                yield chunk(_delta(rest), logprobs=self._chat_logprobs(reader, told))
            if parser.calls:
                yield chunk({"tool_calls": _told_calls(parser.calls, numbered=True)})
        tenant.remember(parser, reader.stream, prompt)
        yield chunk({}, _finish(reader.stream.metrics, parser.calls))
        if shown:
            totals = usage(reader.stream.metrics)
            yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": totals})
        yield "data: [DONE]\n\n"

    def _chat_logprobs(self, reader: Reader, begin: int = 0, end: int | None = None) -> dict[str, Any] | None:
        found = reader.stream.logprobs[begin : len(reader.stream.tokens) if end is None else end]
        if not found:
            return None

        def told(token: int, logprob: float) -> dict[str, Any]:
            piece = self._service.engine.model.piece(token)
            return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}

        content = [
            {**told(each.token, each.logprob), "top_logprobs": [told(*one) for one in each.top]} for each in found
        ]
        return {"content": content}

    # -- text --------------------------------------------------------------------------------------------------------
    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continues texts or tokens, without a chat template."""
        service = self._service
        prompts = await asyncio.to_thread(self._prompts, body.prompt)
        sampling = await asyncio.to_thread(body.sampling, body.logprobs)
        count = body.n or 1
        if len(prompts) * count > CHOICES:
            raise InputError(f"prompt, n: a request may have at most {CHOICES} answers")
        head = {"id": new_id("cmpl-"), "created": int(time.time()), "model": service.model, "object": "text_completion"}
        if body.stream:
            if len(prompts) * count > 1:
                raise InputError("prompt, n: a stream must have one prompt and one answer")
            return await streamed(request, self._text_events(request, prompts[0], sampling, body, head), COMMENT)

        async def whole(number: int) -> tuple[Reader, dict[str, Any]]:
            text_asked, chosen = prompts[number // count], varied(sampling, number % count)
            asked = Asked(text_asked, len(text_asked.tokens))
            async with service.answer(request, asked, chosen, body.max_tokens, use_cache=body.cache_prompt) as reader:
                text = "".join([piece async for piece in reader.pieces()])
            if body.echo:
                text = service.engine.model.text(text_asked.tokens) + text
            choice = {"index": number, "text": text, "logprobs": self._text_logprobs(reader)}
            return reader, {**choice, "finish_reason": _finish(reader.stream.metrics)}

        done = await while_connected(request, _together([whole(number) for number in range(len(prompts) * count)]))
        readers = [reader for reader, _ in done]
        totals = _total(readers)
        totals["prompt_tokens"] = sum(len(prompt.tokens) for prompt in prompts)
        totals["total_tokens"] = totals["prompt_tokens"] + totals["completion_tokens"]
        return JSONResponse(
            {**head, "choices": [choice for _, choice in done], "usage": totals},
            headers=service.facts(readers[0].stream.metrics),
        )

    async def _text_events(
        self, request: Request, prompt: Text, sampling: Sampling, body: CompletionRequest, head: dict[str, Any]
    ) -> AsyncGenerator[str | dict[str, str]]:
        """Yields the response headers, then the chunks of the answer."""
        service = self._service
        shown = body.stream_options is not None and body.stream_options.include_usage

        def chunk(text: str, finish: str | None = None) -> str:
            return event({**head, "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish}]})

        asked = Asked(prompt, len(prompt.tokens))
        async with service.answer(request, asked, sampling, body.max_tokens, use_cache=body.cache_prompt) as reader:
            yield service.facts(reader.stream.metrics)
            if body.echo:
                yield chunk(service.engine.model.text(prompt.tokens))
            async for piece in reader.pieces():
                yield chunk(piece)
        yield chunk("", _finish(reader.stream.metrics))
        if shown:
            yield event({**head, "choices": [], "usage": usage(reader.stream.metrics)})
        yield "data: [DONE]\n\n"

    def _prompts(self, prompt: str | list[int] | list[str] | list[list[int]]) -> list[Text]:
        planner = self._service.engine.planner
        single = isinstance(prompt, str) or all(isinstance(each, int) for each in prompt)
        given: list[Any] = [prompt] if single else list(prompt)
        if len(given) > CHOICES:
            raise InputError(f"prompt: a request may have at most {CHOICES} prompts, not {len(given):,}")
        return [
            Text(planner.tokens_of(each) if isinstance(each, str) else planner.checked_tokens(each)) for each in given
        ]

    def _text_logprobs(self, reader: Reader) -> dict[str, Any] | None:
        found = reader.stream.logprobs[: len(reader.stream.tokens)]
        if not found:
            return None
        model = self._service.engine.model

        def text(token: int) -> str:
            return model.piece(token).decode("utf-8", "replace")

        def top(each: TokenLogprobs) -> dict[str, float]:
            return {text(token): logprob for token, logprob in each.top}

        return {
            "tokens": [text(each.token) for each in found],
            "token_logprobs": [each.logprob for each in found],
            "top_logprobs": [top(each) for each in found],
        }


def varied(sampling: Sampling, number: int) -> Sampling:
    """Returns the sampling of one of several answers to a prompt. A given seed is increased by ``number``."""
    if sampling.seed is None or not number:
        return sampling
    return sampling_of(sampling, seed=(sampling.seed + number) % 2**32)


async def _together(answers: Sequence[Any]) -> list[tuple[Reader, dict[str, Any]]]:
    tasks = [asyncio.ensure_future(answer) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
