"""A LangChain chat model against the server: messages, streams, tools, and what a second turn costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.clients import CODING, TOOLS, saying
from tests.support.serving import Served

pytest.importorskip("langchain_openai")

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI

CALLING = '<tool_call>\n{"name": "glob", "arguments": {"path": "*"}}\n</tool_call>'
AROUND = 90


@pytest.fixture
def model(served: Served) -> Iterator[ChatOpenAI]:
    yield ChatOpenAI(
        model="local",
        base_url=f"{served.url}/v1",
        api_key="none",  # type: ignore[arg-type]
        temperature=0,
        max_tokens=16,  # type: ignore[call-arg]
        max_retries=0,
    )


def evaluated(answer: Any) -> int:
    """Tokens of the prompt that were evaluated, as LangChain tells."""
    usage = answer.usage_metadata
    return int(usage["input_tokens"] - usage["input_token_details"]["cache_read"])


def test_a_chat(model: ChatOpenAI, served: Served) -> None:
    asked = [SystemMessage(CODING), HumanMessage("What is new?")]
    first = model.invoke(asked)
    assert (
        first.content
        == served.engine.generate(
            messages=[{"role": "system", "content": CODING}, {"role": "user", "content": "What is new?"}], max_tokens=16
        ).text
    )
    second = model.invoke([*asked, first, HumanMessage("And what is old?")])
    assert evaluated(second) < AROUND
    assert second.response_metadata["finish_reason"] == "length"


def test_a_stream(model: ChatOpenAI) -> None:
    asked = [SystemMessage(CODING), HumanMessage("What is new?")]
    whole = model.invoke(asked)
    pieces = list(model.stream(asked, stream_usage=True))
    assert len(pieces) > 2
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert sum(evaluated(piece) for piece in pieces if piece.usage_metadata) == 1


def test_a_tool(model: ChatOpenAI, served: Served) -> None:
    knowing = model.bind_tools([{"type": "function", "function": each} for each in TOOLS])
    asked: list[Any] = [HumanMessage("List the files.")]
    with saying(served, CALLING):
        first = knowing.invoke(asked)
    assert isinstance(first, AIMessage)
    (call,) = first.tool_calls
    assert (call["name"], call["args"]) == ("glob", {"path": "*"})
    second = knowing.invoke([*asked, first, ToolMessage("a.py", tool_call_id=call["id"])])
    assert evaluated(second) < AROUND
