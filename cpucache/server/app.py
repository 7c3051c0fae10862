"""The application: every endpoint, and the checks that run before them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from cpucache.engine import Engine
from cpucache.errors import CpucacheError, InputError
from cpucache.server.access import Keys
from cpucache.server.anthropic import Anthropic
from cpucache.server.failures import Refusal, response_of
from cpucache.server.logs import log_request
from cpucache.server.openai import OpenAI
from cpucache.server.openai_requests import messages_of, tools_of
from cpucache.server.prepare import Prepare
from cpucache.server.requests import Requests
from cpucache.server.responses import Responses
from cpucache.server.schemas import Schemas
from cpucache.server.service import Service, new_id
from cpucache.server.settings import ServerSettings
from cpucache.server.web import PATHS, add_page

_OPEN = ("/health", *PATHS)
"""Paths that need no key."""
_log = logging.getLogger("cpucache.server")


class TokenizeRequest(BaseModel):
    """A text to tokenize."""

    content: str
    add_special: bool = False
    """Whether the model's BOS token is put before the text, if the model has one."""
    parse_special: bool = False
    """Whether control tokens in the text are read as such, not as plain characters."""


class DetokenizeRequest(BaseModel):
    """Token ids to turn into text."""

    tokens: list[int] = Field(max_length=1 << 20)


class TemplateRequest(BaseModel):
    """A conversation to render with the model's chat template."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def create_app(engine: Engine, settings: ServerSettings, *, parallel: int = 1) -> FastAPI:
    """Builds the HTTP application over an engine.

    Args:
        engine: Answers the requests. The caller closes it.
        settings: Limits and options of the server.
        parallel: Number of requests that the engine answers at the same time.
    """
    service = Service(engine, settings, parallel)
    app = FastAPI(title="cpucache", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.state.service = service
    app.include_router(OpenAI(service).router)
    app.include_router(Responses(service).router)
    app.include_router(Anthropic(service).router)
    app.include_router(Schemas(service).router)
    app.include_router(Prepare(service).router)
    app.include_router(Requests(service).router)
    _add_plain_endpoints(app, service)
    add_page(app)
    for kind in (CpucacheError, Refusal, RequestValidationError, HTTPException, TimeoutError):
        app.add_exception_handler(kind, _failed)
    app.add_middleware(_Gate, service=service)
    return app


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return response_of(error, request)


def _add_plain_endpoints(app: FastAPI, service: Service) -> None:
    engine = service.engine
    model = engine.model

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Reports that the server is ready. It does not listen before the model is loaded."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        text = await asyncio.to_thread(service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/cache")
    async def cache() -> dict[str, Any]:
        """Contents of the store for all API keys together: bytes against budgets, and slices found and not found."""
        return {"object": "cache", **asdict(await asyncio.to_thread(engine.store.account))}

    def described() -> dict[str, Any]:
        room = min(engine.context.n_ctx, model.n_ctx_train)
        return {"id": service.model, "object": "model", "created": 0, "owned_by": "cpucache", "context_length": room}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that this server answers with."""
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{name}", response_model=None)
    async def one_model(name: str) -> dict[str, Any]:
        """The model by its name."""
        if name != service.model:
            raise Refusal(404, f"no model '{name}': this server answers with '{service.model}'", code="model_not_found")
        return described()

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, list[int]]:
        """The tokens of a text."""
        ids = (await asyncio.to_thread(model.tokenize, body.content, special=body.parse_special)).tolist()
        return {"tokens": [model.bos, *ids] if body.add_special and model.bos is not None else ids}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of tokens."""
        if body.tokens:
            engine.planner.checked_tokens(body.tokens)
        return {"content": await asyncio.to_thread(model.text, body.tokens, special=True)}

    @app.post("/apply-template")
    async def apply_template(body: TemplateRequest, request: Request) -> dict[str, str]:
        """The text of a conversation as the model's chat template renders it."""
        messages, tools = messages_of(body.messages), tools_of(body.tools, None)
        text = await asyncio.to_thread(service.tenant(request).text, messages, tools)
        return {"prompt": await asyncio.to_thread(model.text, text.tokens, special=True)}

    @app.post("/v1/embeddings", response_model=None)
    async def embeddings() -> None:
        """Always answers 501: the model generates text and computes no embeddings."""
        raise Refusal(501, "this server does not compute embeddings")


class _Gate:
    """ASGI middleware before every endpoint: checks host, body size and API key, and logs and counts each request."""

    def __init__(self, app: Any, service: Service) -> None:
        self._app = app
        self._service = service
        self._settings = service.settings
        self._keys = Keys(service.settings.api_keys)

    async def __call__(self, scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        identity = new_id("req_")
        request.state.id, request.state.records = identity, []
        status = 500
        begun = False
        refused: Refusal | None = None

        async def sending(message: Any) -> None:
            nonlocal status, begun
            if refused is not None and not begun:
                return  # the endpoint's answer to a truncated body: 413 is sent instead
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                message["headers"] = [*message["headers"], (b"x-request-id", identity.encode())]
            # A client that does not read must not block another request for longer than the request timeout.
            await asyncio.wait_for(send(message), self._settings.timeout)

        taken = 0

        async def receiving() -> Any:
            nonlocal taken, refused
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._settings.max_body:
                refused = self._too_large()
                return {"type": "http.request", "body": b"", "more_body": False}
            return message

        try:
            self._check(request)
            await self._app(scope, receiving, sending)
            if refused is not None and not begun:
                raise refused
        except Exception as error:
            if begun:
                raise
            refused = None
            if not isinstance(error, Refusal | InputError):
                _log.exception("%s %s failed", identity, request.scope["path"])
            await response_of(error, request)(scope, receive, sending)
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self._service.metrics.requests.labels(path, str(status)).inc()
            record = self._service.ended(request, status)
            log_request(request, status, record)

    def _too_large(self) -> Refusal:
        return Refusal(413, f"a request may have at most {self._settings.max_body >> 20} MiB")

    def _check(self, request: Request) -> None:
        """Sets the namespace of a request. Raises ``Refusal`` for an unknown host, a large body or a wrong key."""
        name = request.headers.get("host", "").rsplit("]", 1)
        host = f"{name[0]}]" if len(name) == 2 else name[0].split(":", 1)[0]
        if self._settings.hosts and host.lower() not in self._settings.hosts:
            raise Refusal(400, f"Host {host!r} is not a name of this server; add it with --allow-host")
        length = request.headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._settings.max_body:
            raise self._too_large()
        if request.scope["path"] not in _OPEN:
            request.state.namespace = self._keys.check(request)
