"""Server-sent events."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from cpucache.server.failures import body_of, refusal_of
from cpucache.server.service import while_connected

_log = logging.getLogger("cpucache.server")


def event(data: Mapping[str, Any]) -> str:
    """Text of a server-sent event. Its name is the ``type`` in ``data``, if there is one."""
    name = f"event: {data['type']}\n" if "type" in data else ""
    return f"{name}data: {json.dumps(data)}\n\n"


async def streamed(request: Request, pieces: AsyncIterator[str | dict[str, str]]) -> StreamingResponse:
    """Returns a response that streams events, as soon as the first token has been generated.

    The first item of ``pieces`` is a dict of response headers, the others are events. An error before the first item
    is raised, so that its HTTP status can still be sent. A later error is sent as an event.
    """
    headers = await while_connected(request, pieces.__anext__())
    assert isinstance(headers, dict)

    async def body() -> AsyncIterator[str]:
        try:
            async for piece in pieces:
                assert isinstance(piece, str)
                yield piece
        except Exception as error:
            refusal = refusal_of(error)
            if refusal.status == 500:
                _log.exception("a stream failed")
            yield event(body_of(refusal, request.scope["path"]))
        finally:
            await pieces.aclose()  # type: ignore[attr-defined]

    return StreamingResponse(body(), media_type="text/event-stream", headers={**headers, "Cache-Control": "no-store"})
