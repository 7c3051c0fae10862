"""Preparing: prompts prefilled ahead of time, without an answer."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from cpucache.engine.reply import Prepared
from cpucache.errors import InputError
from cpucache.layout import Text
from cpucache.reuse import OnProgress
from cpucache.server import anthropic
from cpucache.server.asked import Asked, Conversation, Extension
from cpucache.server.background import Job
from cpucache.server.failures import Refusal
from cpucache.server.openai_requests import messages_of, modules_of, tools_of
from cpucache.server.service import Service, while_connected
from cpucache.server.tenant import Tenant


class PrepareRequest(BaseModel):
    """A conversation in the format of OpenAI's chat completions or Anthropic's messages, or a PML prompt."""

    model_config = ConfigDict(extra="ignore")

    model: str = ""
    messages: list[dict[str, Any]] = []
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    cpucache: Extension | None = None

    @property
    def anthropic(self) -> bool:
        """Whether the request is in Anthropic's format: it has ``system``, or blocks or tools that OpenAI's lacks."""
        blocks = [block for message in self.messages for block in _list(message.get("content"))]
        kinds = ("tool_use", "tool_result", "thinking")
        return (
            self.system is not None
            or any("input_schema" in tool for tool in self.tools or ())
            or any(isinstance(block, dict) and block.get("type") in kinds for block in blocks)
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


class Prepare:
    """The endpoint that prefills prompts ahead of time.

    Args:
        service: Has the engine and the background thread.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.router = APIRouter(tags=["Cache"])
        self.router.post("/v1/cache/prepare")(self.prepare)

    async def prepare(self, body: PrepareRequest, request: Request) -> dict[str, Any]:
        """Prefills a prompt while no answer is running. Returns how many of its tokens were cached and evaluated."""
        service = self._service
        tenant = service.tenant(request)
        asked = await asyncio.to_thread(_asked, tenant, body)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def work(progress: OnProgress) -> Prepared:
            return tenant.engine.prepare(asked.prompt, **asked.settings).result(progress)

        def at_end() -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for the job
                loop.call_soon_threadsafe(ended.set)

        job = service.background.add(Job(work, at_end))
        try:
            await while_connected(request, asyncio.wait_for(ended.wait(), service.settings.timeout))
        finally:
            job.cancel()
        if job.error is not None:
            raise job.error
        prepared: Prepared | None = job.result
        if prepared is None:  # cancelled by ``Background.close``
            raise Refusal(503, "the server is shutting down; try again later", retry_after=5)
        request.state.records.append(tenant.records.prepared(request.state.id, asked, prepared, service.model))
        return {
            "object": "cache.prepared",
            "prompt_tokens": asked.size,
            "cached_tokens": prepared.cached_tokens,
            "evaluated_tokens": prepared.evaluated_tokens,
        }


def _asked(tenant: Tenant, body: PrepareRequest) -> Asked:
    """Returns the prompt to prefill: a PML prompt, or a conversation up to the beginning of the next message."""
    if body.anthropic:
        given = anthropic.CountRequest(messages=body.messages, system=body.system, tools=body.tools)
        messages, tools = anthropic.messages_of(given), anthropic.tools_of(given)
    else:
        messages, tools = messages_of(body.messages), tools_of(body.tools, None)
    modules = modules_of([body.system, *(each.get("content") for each in body.messages)])
    asked = tenant.asked(messages, tools, modules, body.cpucache) if messages or body.cpucache else None
    if asked is not None and not isinstance(asked.prompt, Text):
        return asked
    if not messages and not tools:
        raise InputError("messages, system, tools: at least one is needed")
    if messages and messages[-1].role in ("user", "tool"):
        assert asked is not None
        return asked  # the next message is the answer: its header is included
    # The user's next message is unknown: only tokens that do not depend on it are evaluated.
    settings = {} if body.cpucache is None else body.cpucache.settings
    return tenant.following(Conversation(messages, tools, modules), settings)
