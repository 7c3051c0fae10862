"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from cpucache.server.failures import body_of, refusal_of
from cpucache.server.service import while_connected

PATIENCE = 15.0
"""Seconds without a token after which a stream tells its client that the prompt is still being evaluated."""
COMMENT = ": the prompt is being evaluated\n\n"
"""A comment, which readers of server-sent events pass over."""
_log = logging.getLogger("cpucache.server")


def event(data: Mapping[str, Any]) -> str:
    """Text of a server-sent event. Its name is the ``type`` in ``data``, if there is one."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data)}\n\n"


async def streamed(request: Request, pieces: AsyncGenerator[str | dict[str, str]], idle: str = "") -> StreamingResponse:
    """Returns a response that streams events: once the first token has been generated, or after ``PATIENCE``.

    The first item of ``pieces`` is a dict of response headers, the others are events. An error before the response
    begins is raised, so that its HTTP status can still be sent. A later error is sent as an event.

    Args:
        request: The request of the client.
        pieces: The headers, then the events. Closed when the client disconnects.
        idle: Text that is sent each ``PATIENCE`` seconds while a long prompt is evaluated: many clients and proxies
            give up if they get nothing for minutes. A response that begins with it lacks the headers of ``pieces``.
            If empty, the response never begins before the first token.
    """
    first = asyncio.ensure_future(while_connected(request, pieces.__anext__()))
    try:
        await asyncio.wait([first], timeout=PATIENCE if idle else None)
        headers = first.result() if first.done() else {}
    except BaseException:
        first.cancel()
        raise
    assert isinstance(headers, dict)

    async def body() -> AsyncIterator[str]:
        try:
            while not first.done():
                yield idle
                await asyncio.wait([first], timeout=PATIENCE)
            first.result()
            async for piece in pieces:
                assert isinstance(piece, str)
                yield piece
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                _log.exception("a stream failed")
            yield event(body_of(refusal, request.scope["path"]))
        finally:
            if not first.done():
                first.cancel()
                await asyncio.wait([first])
            await pieces.aclose()

    return StreamingResponse(body(), media_type="text/event-stream", headers={**headers, "Cache-Control": "no-store"})
