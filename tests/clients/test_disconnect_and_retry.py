"""Clients that go before the answer is complete, and ask again: what was evaluated is kept. Elsewhere it is not."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

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

    with httpx.Client(base_url=served.url, timeout=60) as client, pytest.raises(httpx.TimeoutException):
        client.post("/v1/chat/completions", json=BODY, timeout=httpx.Timeout(60, read=0.3))
    until(served.idle)
    kept = there()
    again = open_webui(served, ASKED)
    assert again.exact >= kept
    assert again.evaluated == again.size - again.exact
    assert again.exact > 0 or kept == 0


def test_a_request_that_is_sent_twice_at_once(served: Served) -> None:
    """A client that does not wait for its own retry."""
    with served.http.stream("POST", "/v1/chat/completions", json=BODY) as reply:
        next(reply.iter_lines())
        again = open_webui(served, ASKED)
    assert again.evaluated == 1
    until(served.idle)
