"""The service: answers for one engine, as the dialects need them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from secrets import token_hex
from typing import TypeVar

import numpy as np
from fastapi import Request

from cpucache.engine import Engine, Metrics, Sampling, Stream
from cpucache.engine.request import Event
from cpucache.layout import Text, Tokens
from cpucache.layout.conversation import ChatMessage, Conversations, Tool
from cpucache.server.admission import Admission
from cpucache.server.failures import Refusal
from cpucache.server.metrics import ServerMetrics
from cpucache.server.settings import ServerSettings

T = TypeVar("T")
_REMEMBERED = 4096
"""Answers whose tokens are remembered."""
_log = logging.getLogger("cpucache.server")


class Reader:
    """An answer on its way to a client, for one event loop."""

    def __init__(self, stream: Stream, loop: asyncio.AbstractEventLoop) -> None:
        self.stream = stream
        self.expired = False
        """Whether it has taken longer than it may."""
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        stream.request.listen(self._put)

    def _put(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop has been closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def begin(self) -> None:
        """Give the prompt to the core, and wait for the first piece, or the end."""
        await asyncio.to_thread(self.stream.begin)
        self._first = await self._next()

    def expire(self) -> None:
        """End it: it has taken too long."""
        self.expired = True
        self.stream.stop()

    async def pieces(self) -> AsyncIterator[str]:
        """The pieces of the answer."""
        piece = self._first
        while piece is not None:
            yield piece
            piece = await self._next()

    async def _next(self) -> str | None:
        while True:
            event = await self._events.get()
            if event is None:
                if self.stream.request.error is not None:
                    raise self.stream.request.error
                if self.expired:
                    raise TimeoutError
                return None
            if isinstance(event, str):
                return event


class Service:
    """Answers requests with an engine.

    Args:
        engine: Belongs to the caller, who closes it.
        settings: What clients may do.
        parallel: Requests that the engine answers at a time.
    """

    def __init__(self, engine: Engine, settings: ServerSettings, parallel: int) -> None:
        self.engine = engine
        self.settings = settings
        self.model = engine.model.path.stem
        self.metrics = ServerMetrics(engine)
        self.conversations = Conversations(engine.model, engine.host.template, self._ids_of)
        # One more than the engine answers at a time, so that the next is read ahead.
        self._admission = Admission(parallel + 1, settings.queue)
        self._said: OrderedDict[str, tuple[str, Tokens]] = OrderedDict()

    # -- prompts -----------------------------------------------------------------------------------------------------
    def text(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = (), modules: Collection[str] = ()) -> Text:
        """A conversation, ready to be answered. What this server has said itself is taken as it was said.

        Tool definitions, and ``modules`` in messages, may be reused wherever they stand.
        """
        if self.settings.sorted_tools:
            tools = sorted(tools, key=lambda tool: tool.name)
        return self.conversations.text([self._as_said(message) for message in messages], tools, modules)

    def tokens(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> Tokens:
        """The tokens of a conversation."""
        return self.text(messages, tools).tokens

    def _as_said(self, message: ChatMessage) -> ChatMessage:
        known = self._said.get(_identity(message)) if message.role == "assistant" else None
        return message if known is None else replace(message, text=known[0], calls=())

    def _ids_of(self, text: str) -> Tokens | None:
        known = self._said.get(_identity(ChatMessage("assistant", text)))
        return None if known is None or known[0].strip() != text else known[1]

    def remember(self, message: ChatMessage, stream: Stream) -> None:
        """Note how an answer was written, to find it again when the client sends it back."""
        text = stream.text
        ids = np.array(stream.tokens, np.int32)
        # Where a text to stop at was cut off, the tokens say more than the text.
        if text != text.strip() or not text or self.engine.model.text(ids) != text:
            return
        for key in (_identity(message), _identity(ChatMessage("assistant", text))):
            self._said[key] = (text, ids)
            self._said.move_to_end(key)
        while len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)

    # -- answers -----------------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def answer(
        self, request: Request, prompt: Text, sampling: Sampling, max_tokens: int | None, *, use_cache: bool = True
    ) -> AsyncIterator[Reader]:
        """An answer whose first piece is there. When the block ends, or its client goes, so does the answer."""
        known = min(self.engine.context.n_ctx, self.engine.model.n_ctx_train)
        room = max(1, min(max_tokens or self.settings.max_tokens, known - len(prompt.tokens)))
        # Keys share a machine: whoever has many requests waits behind those who have few.
        key = request.headers.get("authorization") or request.headers.get("x-api-key") or ""
        async with self._admission.place(key, self.settings.timeout):
            self.metrics.waiting.set(self._admission.waiting)
            stream = self.engine.stream(
                tokens=prompt, max_tokens=room, sampling=sampling, use_cache=use_cache, reuse=self.settings.reuse
            )
            reader = Reader(stream, asyncio.get_running_loop())
            self.metrics.running.inc()
            timer = asyncio.get_running_loop().call_later(self.settings.timeout, reader.expire)
            try:
                await while_connected(request, reader.begin())
                yield reader
            finally:
                timer.cancel()
                stream.stop()
                self.metrics.running.dec()
                self.metrics.note(stream.metrics)

    def facts(self, metrics: Metrics) -> dict[str, str]:
        """Headers that tell what an answer was made of."""
        counts = {
            "exact": metrics.exact_tokens,
            "clean": metrics.clean_tokens,
            "related": metrics.related_tokens,
            "foreign": metrics.foreign_tokens,
            "evaluated": metrics.fresh_tokens,
        }
        told = ", ".join(f"{name}={count}" for name, count in counts.items())
        return {"x-cpucache": f"{told}, ttft_ms={metrics.ttft_ms:.0f}"}


async def while_connected(request: Request, waiting: Awaitable[T]) -> T:
    """Wait, as long as the client does. Raises ``Refusal`` when it has gone."""
    task = asyncio.ensure_future(waiting)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if not task.done() and await request.is_disconnected():
                raise Refusal(499, "the client has gone")
        return await task
    finally:
        task.cancel()


def new_id(prefix: str) -> str:
    """An id for a request or a part of its answer."""
    return f"{prefix}{token_hex(12)}"


def _identity(message: ChatMessage) -> str:
    """What an answer is known by, however its JSON is written."""
    calls = [[call.name, call.arguments] for call in message.calls]
    return json.dumps([message.text.strip(), calls], sort_keys=True, ensure_ascii=False)
