"""Answers that come back: as text that tokenizes otherwise, with the JSON of their calls written in another way.

Elsewhere 244 of 267 tokens are read again in one report. Here the ids that this server produced are used.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from tests.support.clients import TOOLS, claude_code, codex, codex_user, open_webui, saying, user, why
from tests.support.serving import Served

ANSWER = "In the other house, where the rain is on the roof and the wind is at the door."
ARGUMENTS = {"path": "src/ä.py"}
CALLING = 'One moment.\n<tool_call>\n{"name": "read_file",  "arguments": {"path":"src/ä.py"}}\n</tool_call>'
AROUND = 80
"""Tokens, which are bytes here, of a short message and the template around it."""


def test_an_answer_of_odd_tokens(served: Served) -> None:
    asked = [user("Where is it? " * 20)]
    with saying(served, ANSWER):
        first = open_webui(served, asked, temperature=2, seed=7)
    assert first.text == ANSWER
    told = served.service.tenants[0].records.list()[0]
    # The test is of no use where the model has written the tokens into which the tokenizer cuts its answer.
    assert not np.array_equal(told.answer, served.engine.model.tokenize(ANSWER)[: len(told.answer)])
    second = open_webui(served, [*asked, *first.said, user("And then?")])
    assert second.exact >= first.size + len(told.answer)
    assert second.evaluated < AROUND
    assert why(served, second) is None


@pytest.mark.parametrize("edited", [ANSWER.replace("rain", "snow"), ANSWER.replace(" ", "  ")])
def test_an_answer_that_is_another(edited: str, served: Served) -> None:
    asked = [user("Where is it? " * 20)]
    with saying(served, ANSWER):
        open_webui(served, asked)
    said = [{"role": "assistant", "content": edited}]
    second = open_webui(served, [*asked, *said, user("And then?")])
    assert len(ANSWER) / 3 < second.evaluated < AROUND + len(edited)
    found = why(served, second)
    assert found is not None
    assert found["cause"] == ("answer-rewritten" if "rain" in edited else "message-changed")
    assert 0 < found["evaluated"] <= second.evaluated and found["seconds"] > 0


def test_a_call_from_claude_code(served: Served) -> None:
    asked = [user("What is in src?")]
    with saying(served, CALLING):
        first = claude_code(served, asked)
    text, use = first.said[0]["content"]
    assert (text["text"], use["name"], use["input"]) == ("One moment.", "read_file", ARGUMENTS)
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": [{"type": "text", "text": "It is empty."}]}
    second = claude_code(served, [*asked, *first.said, {"role": "user", "content": [result]}])
    assert second.evaluated < AROUND
    assert why(served, second) is None


def test_a_call_from_codex(served: Served) -> None:
    asked = [codex_user("What is in src?")]
    with saying(served, CALLING):
        first = codex(served, asked)
    call = first.said[-1]
    assert (call["name"], json.loads(call["arguments"])) == ("read_file", ARGUMENTS)
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "It is empty."}
    second = codex(served, [*asked, *first.said, result])
    assert second.evaluated < AROUND
    assert why(served, second) is None


@pytest.mark.parametrize(
    "written", [json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, ensure_ascii=False, indent=2), ARGUMENTS]
)
def test_a_call_from_others(written: Any, served: Served) -> None:
    asked = [user("What is in src?")]
    with saying(served, CALLING):
        first = open_webui(served, asked, tools=TOOLS)
    (said,) = first.said
    said["tool_calls"][0]["function"]["arguments"] = written
    result = {"role": "tool", "tool_call_id": said["tool_calls"][0]["id"], "content": "It is empty."}
    second = open_webui(served, [*asked, said, result], tools=TOOLS)
    assert second.evaluated < AROUND
    assert why(served, second) is None


def test_a_call_that_nobody_remembers(served: Served) -> None:
    """As after a restart: the call is written as the template does, which costs the call, and is told."""
    asked = [user("What is in src?")]
    with saying(served, CALLING):
        first = claude_code(served, asked)
    served.service.tenants[0].forget()
    use = first.said[0]["content"][1]
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "It is empty. " * 5}
    second = claude_code(served, [*asked, *first.said, {"role": "user", "content": [result]}])
    assert AROUND < second.evaluated < AROUND + len(CALLING) + 65
    found = why(served, second)
    assert found is not None and found["cause"] == "answer-rewritten"
