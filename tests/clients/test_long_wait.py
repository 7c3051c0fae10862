"""Prompts that are evaluated for longer than clients and proxies wait without a sign of the server."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from cpucache.server import events
from tests.support.clients import CODING, user
from tests.support.pace import slow
from tests.support.serving import Served, until
from tests.support.sessions import message

ASKED = [{"role": "system", "content": CODING}, user(message(1, 200))]
CHAT: dict[str, Any] = {"model": "local", "messages": ASKED, "temperature": 0, "stream": True, "max_tokens": 4}
MESSAGES: dict[str, Any] = {**CHAT, "system": CODING, "messages": ASKED[1:]}


@pytest.fixture
def patient(served: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """A server whose evaluations take half a second each, and that gives a sign more often than that."""
    monkeypatch.setattr(events, "PATIENCE", 0.1)
    slow(served.engine, 0.5)
    return served


def test_a_chat_gets_comments_until_the_first_token(patient: Served) -> None:
    with patient.http.stream("POST", "/v1/chat/completions", json=CHAT) as reply:
        assert reply.status_code == 200
        # Sent before the prompt was evaluated, and so without the counts of its relations.
        assert "x-cpucache" not in reply.headers
        lines = [line for line in reply.iter_lines() if line]
    waited = [line.startswith(":") for line in lines]
    count = waited.index(False)
    assert count > 1
    assert not any(waited[count:])
    assert lines[-1] == "data: [DONE]"
    told = list(patient.openai.chat.completions.create(**CHAT, stream_options={"include_usage": True}))
    assert told[-1].usage.prompt_tokens_details.cached_tokens > 500


def test_messages_get_pings_until_the_first_token(patient: Served) -> None:
    with patient.http.stream("POST", "/v1/messages", json=MESSAGES) as reply:
        names = [line.removeprefix("event: ") for line in reply.iter_lines() if line.startswith("event: ")]
    assert names.index("message_start") > 1
    assert set(names[: names.index("message_start")]) == {"ping"}
    with patient.anthropic.messages.stream(
        model="any", max_tokens=4, messages=[user(message(2, 200))], system=CODING
    ) as stream:
        final = stream.get_final_message()
    assert final.usage.output_tokens == 4
    assert final.content[0].text == stream.get_final_text()


def test_an_error_after_the_wait_is_an_event(patient: Served) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a defect")

    patient.engine.context.sample = broken  # type: ignore[method-assign, assignment]
    with patient.http.stream("POST", "/v1/chat/completions", json=CHAT) as reply:
        assert reply.status_code == 200
        told = [json.loads(line.removeprefix("data: ")) for line in reply.iter_lines() if line.startswith("data: ")]
    assert [each["error"]["message"] for each in told] == ["the server failed; see its log"]


def test_who_goes_while_waiting_ends_the_request(patient: Served) -> None:
    with (
        pytest.raises(httpx.ReadTimeout),
        patient.http.stream("POST", "/v1/chat/completions", json=CHAT, timeout=0.1) as reply,
    ):
        list(reply.iter_lines())
    with patient.http.stream("POST", "/v1/chat/completions", json=CHAT) as reply:
        next(reply.iter_lines())
        assert not patient.idle()
    until(patient.idle)
    assert patient.http.get("/health").status_code == 200


def test_a_quick_answer_says_how_much_it_reused(served: Served) -> None:
    with served.http.stream("POST", "/v1/chat/completions", json=CHAT) as reply:
        assert "x-cpucache" in reply.headers
        assert not [line for line in reply.iter_lines() if line.startswith(":")]
