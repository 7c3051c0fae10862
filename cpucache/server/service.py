"""The service: answers requests with one engine, for all APIs."""

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
from cpucache.server.access import shown_key
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
"""Paths of the endpoints that answer prompts."""


class Reader:
    """Passes an answer from the core's thread to one event loop.

    Args:
        stream: The answer, not begun yet.
        loop: The event loop that reads.
    """

    def __init__(self, stream: Stream, loop: asyncio.AbstractEventLoop) -> None:
        self.stream = stream
        self.expired = False
        """Whether the answer was stopped because it took too long."""
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        stream.request.listen(self._put)

    def _put(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody reads the answer
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def begin(self) -> None:
        """Submits the prompt to the core and waits for the first piece of the answer, or its end."""
        await asyncio.to_thread(self.stream.begin)
        self._first = await self._next()

    def expire(self) -> None:
        """Stops an answer that has taken too long."""
        self.expired = True
        self.stream.stop()

    async def pieces(self) -> AsyncIterator[str]:
        """Yields the pieces of the answer. Raises the error that ended it, ``TimeoutError`` if it expired."""
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
        engine: The engine. The caller closes it.
        settings: Limits and options of the server.
        parallel: Number of requests that the engine answers at the same time.
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
        # One more than the engine answers at a time, so that the next prompt is laid out meanwhile.
        self._admission = Admission(parallel + 1, settings.queue)

    def tenant(self, request: Request) -> Tenant:
        """Returns the tenant of a request, created on its first request. Must be called in the event loop."""
        namespace = getattr(request.state, "namespace", "")
        found = self._tenants.get(namespace)
        if found is None:
            engine = self.engine.within(namespace, isolate=self.settings.isolate) if namespace else self.engine
            found = self._tenants[namespace] = Tenant(engine, self.settings, self.background)
        return found

    @property
    def tenants(self) -> list[Tenant]:
        """All tenants that have sent a request."""
        return list(self._tenants.values())

    def close(self) -> None:
        """Cancels background jobs and releases the slices that are held for a time."""
        self.background.close()
        self.keeper.close()

    # -- answers -----------------------------------------------------------------------------------------------------
    @asynccontextmanager
    async def answer(
        self, request: Request, prompt: Asked, sampling: Sampling, max_tokens: int | None, *, use_cache: bool = True
    ) -> AsyncIterator[Reader]:
        """Starts an answer and waits for its first piece. The answer is stopped when the ``async with`` block ends.

        Args:
            request: The HTTP request. Its connection is watched until the first piece.
            prompt: The prompt to answer.
            sampling: How tokens are sampled.
            max_tokens: Tokens of the answer at most; ``None``: the server's default.
            use_cache: Whether slices may be reused.

        Yields:
            The answer, whose first piece has arrived.

        Raises:
            Refusal: Too many requests wait (429), or the client has disconnected (499).
            TimeoutError: The request waited, or its first piece took, longer than ``settings.timeout``.
        """
        tenant = self.tenant(request)
        engine = tenant.engine
        known = min(self.engine.context.n_ctx, self.engine.model.n_ctx_train)
        room = max(1, min(max_tokens or self.settings.max_tokens, known - prompt.size))
        settings = {"reuse": self.settings.reuse, **prompt.settings}
        record = self._recorded(request, prompt, use_cache=use_cache, reuse=settings["reuse"])
        # Requests are admitted in turn by key: many requests of one key must not delay the others.
        async with self._admission.place(shown_key(request), self.settings.timeout):
            self.metrics.waiting.set(self._admission.waiting)
            # In a thread: the layout and lookup of a long prompt take time.
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
                    task = asyncio.create_task(self._save_answer(engine, prompt, stream))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
                self.metrics.running.dec()
                self.metrics.note(stream.metrics)

    def _recorded(self, request: Request, prompt: Asked, *, use_cache: bool, reuse: Reuse) -> Record:
        """Adds a record for one answer to a request. Further answers to it get an id with a number."""
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
        """Sets the status of a request's records when it has ended, and returns the first, if any.

        A refused request to an answering path gets a record too.
        """
        records = request.state.records
        if not records and request.scope["path"] in ANSWERING and hasattr(request.state, "namespace"):
            records.append(Record(request.state.id, request.scope["path"], self.model, finish="refused"))
            self.tenant(request).records.begin(records[0])
        for record in records:
            record.status = status
            if record.finish == "running":
                record.finish = "interrupted"  # it ended before it was admitted
        return records[0] if records else None

    async def _save_answer(self, engine: Engine, prompt: Asked, stream: Stream) -> None:
        """Keeps the slices of a prompt up to each of its marks. Waits until the answer has been saved."""
        await asyncio.to_thread(stream.request.wait)
        for mark in prompt.marks:
            keys = await asyncio.to_thread(self._keys, engine, prompt, mark.position)
            self.keeper.keep(keys, mark.seconds)

    def _keys(self, engine: Engine, prompt: Asked, position: int) -> list[str]:
        """Keys of the slices in the store that cover the first ``position`` tokens of a prompt."""
        assert isinstance(prompt.prompt, Text)
        # A plan never takes the last token from a slice, so it gets one token more than is kept.
        head = prompt.prompt.first(position + 1)
        plan = engine.plan(head, reuse=prompt.settings.get("reuse", self.settings.reuse))
        return [key for key in engine.kv_cache.keys(plan) if key in engine.store]

    def facts(self, metrics: Metrics) -> dict[str, str]:
        """Response header with the prompt's tokens by relation and the TTFT in milliseconds."""
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
    """Awaits ``waiting`` while the client is connected. Otherwise cancels it and raises ``Refusal`` (499)."""
    task = asyncio.ensure_future(waiting)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=0.25)
            if not task.done() and await request.is_disconnected():
                raise Refusal(499, "the client has disconnected")
        return await task
    finally:
        task.cancel()


def new_id(prefix: str) -> str:
    """Returns a random id for a request or a part of its answer."""
    return f"{prefix}{token_hex(12)}"
