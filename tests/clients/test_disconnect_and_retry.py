"""Clients that go before the answer is complete, and ask again: what was evaluated is kept. Elsewhere it is not."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx

from tests.support.clients import CODING, counted, open_webui, user
from tests.support.serving import Served, until
from tests.support.sessions import message

ASKED = [{"role": "system", "content": CODING}, user(message(1, 200))]
BODY: dict[str, Any] = {"model": "local", "messages": ASKED, "temperature": 0, "stream": True, "max_tokens": 1500}


def test_after_the_first_token(served: Served) -> None:
    with served.http.stream("POST", "/v1/chat/completions", json=BODY) as reply:
        first = counted(reply.headers)
        next(reply.iter_lines())
    until(served.idle)
    again = open_webui(served, ASKED)
    assert first.evaluated == first.size == again.size
    assert again.evaluated == 1


def test_while_the_prompt_is_evaluated(served: Served) -> None:
    def there() -> int:
        """Tokens of the prompt that the server has slices of."""
        return served.engine.plan(messages=ASKED).count("exact")

    body = json.dumps(BODY).encode()
    address = httpx.URL(served.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((address.host, address.port or 80)) as line:
        line.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        until(lambda: there() > 0)
    kept = there()
    until(served.idle)
    again = open_webui(served, ASKED)
    assert again.exact >= kept > 0
    assert again.evaluated == again.size - again.exact


def test_a_request_that_is_sent_twice_at_once(served: Served) -> None:
    """A client that does not wait for its own retry."""
    with served.http.stream("POST", "/v1/chat/completions", json=BODY) as reply:
        next(reply.iter_lines())
        again = open_webui(served, ASKED)
    assert again.evaluated == 1
    until(served.idle)
