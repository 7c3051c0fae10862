"""The service: answers for one engine, as the dialects need them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from secrets import token_hex
from typing import TypeVar

from fastapi import Request

from cpucache.engine import Engine, Metrics, Sampling, Stream
from cpucache.engine.request import Event
from cpucache.layout import Text
from cpucache.reuse import Reuse
from cpucache.server.admission import Admission
from cpucache.server.asked import Asked
from cpucache.server.background import Background
from cpucache.server.failures import Refusal
from cpucache.server.keeping import Keeper
from cpucache.server.metrics import ServerMetrics
from cpucache.server.records import Record
from cpucache.server.settings import ServerSettings
from cpucache.server.tenant import Tenant

T = TypeVar("T")
ANSWERING = ("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses")
"""Paths that answer prompts."""


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
        self.background = Background(settings.queue)
        self.keeper = Keeper(engine.store)
        self._tenants: dict[str, Tenant] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # One more than the engine answers at a time, so that the next is read ahead.
        self._admission = Admission(parallel + 1, settings.queue)

    def tenant(self, request: Request) -> Tenant:
        """Who asks. Called in the event loop."""
        namespace = getattr(request.state, "namespace", "")
        found = self._tenants.get(namespace)
        if found is None:
            engine = self.engine.within(namespace, isolate=self.settings.isolate) if namespace else self.engine
            found = self._tenants[namespace] = Tenant(engine, self.settings, self.background)
        return found

    @property
    def tenants(self) -> list[Tenant]:
        """Those who have asked for something."""
        return list(self._tenants.values())

    def close(self) -> None:
        """End what is done in the background, and let go of what is kept for a time."""
        self.background.close()
        self.keeper.close()

    # -- answers -----------------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def answer(
        self, request: Request, prompt: Asked, sampling: Sampling, max_tokens: int | None, *, use_cache: bool = True
    ) -> AsyncIterator[Reader]:
        """An answer whose first piece is there. When the block ends, or its client goes, so does the answer."""
        tenant = self.tenant(request)
        engine = tenant.engine
        known = min(self.engine.context.n_ctx, self.engine.model.n_ctx_train)
        room = max(1, min(max_tokens or self.settings.max_tokens, known - prompt.size))
        # Keys share a machine: whoever has many requests waits behind those who have few.
        key = request.headers.get("authorization") or request.headers.get("x-api-key") or ""
        settings = {"reuse": self.settings.reuse, **prompt.settings}
        record = self._recorded(request, prompt, use_cache=use_cache, reuse=settings["reuse"])
        async with self._admission.place(key, self.settings.timeout):
            self.metrics.waiting.set(self._admission.waiting)
            # A prompt may be a long text to be laid out, and looked up.
            stream = await asyncio.to_thread(
                engine.stream, prompt.prompt, max_tokens=room, sampling=sampling, use_cache=use_cache, **settings
            )
            reader = Reader(stream, asyncio.get_running_loop())
            self.metrics.running.inc()
            timer = asyncio.get_running_loop().call_later(self.settings.timeout, reader.expire)
            try:
                await while_connected(request, reader.begin())
                record.looked_up(stream.metrics)
                yield reader
            finally:
                timer.cancel()
                stream.stop()
                tenant.records.answered(record, stream)
                if prompt.marks:
                    task = asyncio.create_task(self._keep(engine, prompt, stream))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                self.metrics.running.dec()
                self.metrics.note(stream.metrics)

    def _recorded(self, request: Request, prompt: Asked, *, use_cache: bool, reuse: Reuse) -> Record:
        """The record of an answer to a request, which may have several."""
        records = request.state.records
        identity = request.state.id if not records else f"{request.state.id}-{len(records) + 1}"
        record = Record(identity, request.scope["path"], self.model, use_cache=use_cache, reuse=reuse)
        if isinstance(prompt.prompt, Text):
            record.prompt, record.roles = prompt.prompt.tokens, prompt.prompt.roles
        else:
            record.schema = True
        records.append(record)
        return self.tenant(request).records.begin(record)

    def ended(self, request: Request, status: int) -> Record | None:
        """Note the status of a request; gives the record of its answer, if one was asked for.

        One that was refused has a record, too.
        """
        records = request.state.records
        if not records and request.scope["path"] in ANSWERING and hasattr(request.state, "namespace"):
            records.append(Record(request.state.id, request.scope["path"], self.model, finish="refused"))
            self.tenant(request).records.begin(records[0])
        for record in records:
            record.status = status
            if record.finish == "running":
                record.finish = "interrupted"  # before it had a place
        return records[0] if records else None

    async def _keep(self, engine: Engine, prompt: Asked, stream: Stream) -> None:
        """Keep a prompt, as far as it was evaluated, up to each of its marks."""
        await asyncio.to_thread(stream.request.wait)
        for mark in prompt.marks:
            keys = await asyncio.to_thread(self._keys, engine, prompt, mark.position)
            self.keeper.keep(keys, mark.seconds)

    def _keys(self, engine: Engine, prompt: Asked, position: int) -> list[str]:
        """The slices that the first tokens of a prompt are answered from."""
        assert isinstance(prompt.prompt, Text)
        # The last token is evaluated in any case: one more than are kept.
        head = prompt.prompt.first(position + 1)
        plan = engine.plan(head, reuse=prompt.settings.get("reuse", self.settings.reuse))
        return [key for key in engine.workspace.keys(plan) if key in engine.store]

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
