"""Conversations in the items of OpenAI's Responses API."""

from __future__ import annotations

from typing import Any

import pytest

from cpucache.layout.conversation import ChatMessage, ToolCall
from cpucache.server.responses import ResponsesRequest, conversation_of

USER = {"type": "message", "role": "user", "content": "Look."}
SAID = {"type": "message", "role": "assistant", "content": "I look."}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "A mill."}
LOOK = ToolCall("look", {}, "c1")


def thought(*texts: str) -> dict[str, Any]:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text} for text in texts]}


@pytest.mark.parametrize(
    ("items", "wanted"),
    [
        ([thought("Hm."), SAID, CALL], ChatMessage("assistant", "I look.", [LOOK], reasoning="Hm.")),
        ([SAID, thought("Hm."), CALL], ChatMessage("assistant", "I look.", [LOOK], reasoning="Hm.")),
        (
            [thought("Hm."), SAID, thought("So."), CALL],
            ChatMessage("assistant", "I look.", [LOOK], reasoning="Hm.\nSo."),
        ),
        (
            [thought("Hm."), CALL, thought("So."), CALL],
            ChatMessage("assistant", "", [LOOK, LOOK], reasoning="Hm.\nSo."),
        ),
        ([thought("Hm."), thought("So."), SAID], ChatMessage("assistant", "I look.", [], reasoning="Hm.\nSo.")),
        # Encrypted reasoning of another server has no text.
        (
            [thought("Hm."), {"type": "reasoning", "encrypted_content": "x"}, SAID],
            ChatMessage("assistant", "I look.", [], reasoning="Hm."),
        ),
    ],
    ids=["before", "between", "both", "calls", "two", "encrypted"],
)
def test_reasoning_stays_with_the_message_it_belongs_to(items: list[dict[str, Any]], wanted: ChatMessage) -> None:
    body = ResponsesRequest.model_validate({"input": [USER, *items, RESULT]})
    asked, said, result = conversation_of(body)
    assert said == wanted
    assert (asked.role, asked.reasoning, result.role, result.reasoning) == ("user", "", "tool", "")


def test_reasoning_belongs_to_no_message_of_the_user() -> None:
    body = ResponsesRequest.model_validate({"input": [USER, thought("Hm."), USER, CALL]})
    assert conversation_of(body)[-1] == ChatMessage("assistant", "", [LOOK])
