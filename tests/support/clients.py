"""Requests as the clients send them that people use, and the token counts of answers by relation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest

from cpucache import Sampling
from cpucache.engine import Stream
from tests.support.serving import Served
from tests.support.sessions import message

QWEN = (
    "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}"
    "# Tools\n\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(query=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' or m.role == 'system' and not loop.first %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if m.reasoning_content and loop.index0 > ns.query %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{% if m.content or not loop.first %}\n{% endif %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response><|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Tools, calls and reasoning as in Qwen 3: what was thought is kept until the user speaks again."""
KEEPING = QWEN.replace("loop.index0 > ns.query", "true")
"""A template that keeps all that was thought."""

CODING = "You are a coding agent. Work in small steps, and say what you do.\n" + "\n".join(
    message(number, 12) for number in range(100, 108)
)
"""A system text."""


def tool(name: str) -> dict[str, Any]:
    """A function with its description, as a JSON schema."""
    about = f"{name}: {message(len(name), 8)}"
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
    return {"name": name, "description": about, "parameters": parameters}


TOOLS = [tool(name) for name in ("read_file", "edit", "glob")]


@dataclass
class Told:
    """An answer as a client gets it, and its token counts by relation."""

    id: str
    """Its ``x-request-id``."""
    exact: int
    spliced: int
    """Tokens of slices that were not exact."""
    evaluated: int
    text: str = ""
    reasoning: str = ""
    said: list[dict[str, Any]] = field(default_factory=list)
    """What the client sends back in its next request."""

    @property
    def size(self) -> int:
        """Tokens of the prompt."""
        return self.exact + self.spliced + self.evaluated


def counted(headers: Mapping[str, str]) -> Told:
    """Token counts of an answer by relation, from the headers of its response."""
    facts = dict(each.split("=") for each in headers["x-cpucache"].split(", "))
    spliced = sum(int(facts[kind]) for kind in ("clean", "related", "foreign"))
    return Told(headers["x-request-id"], int(facts["exact"]), spliced, int(facts["evaluated"]))


def why(served: Served, told: Told) -> dict[str, Any] | None:
    """Why a request was no hit, as the server tells."""
    reply = served.http.get(f"/v1/requests/{told.id}")
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] | None = reply.json()["why"]
    return found


def _events(reply: httpx.Response) -> Iterator[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    for line in reply.text.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


# ---- Claude Code -----------------------------------------------------------------------------------------------------
def claude_code(
    served: Served, messages: Sequence[dict[str, Any]], *, system: str = CODING, cch: str = "00000", **more: Any
) -> Told:
    """A turn of Claude Code: its billing header first, marks after the system text and the last message."""
    marked = {"cache_control": {"type": "ephemeral"}}
    *before, last = messages
    content = last["content"] if isinstance(last["content"], list) else [{"type": "text", "text": last["content"]}]
    body = {
        "model": "claude-sonnet-4-5",
        "max_tokens": 32,
        "temperature": 0,
        "stream": True,
        "metadata": {"user_id": "user_0_account__session_0"},
        "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1; cc_entrypoint=cli; cch={cch};"},
            {"type": "text", "text": system, **marked},
        ],
        "messages": [*before, {**last, "content": [*content[:-1], {**content[-1], **marked}]}],
        "tools": [
            {"name": each["name"], "description": each["description"], "input_schema": each["parameters"]}
            for each in TOOLS
        ],
        **more,
    }
    headers = {"anthropic-version": "2023-06-01", "user-agent": "claude-cli/2.1.0 (external, cli)", "x-app": "cli"}
    reply = served.http.post("/v1/messages?beta=true", json=body, headers=headers)
    blocks: list[dict[str, Any]] = []
    written = ""
    for event in _events(reply):
        if event["type"] == "content_block_start":
            blocks.append(dict(event["content_block"]))
            written = ""
        elif event["type"] == "content_block_delta":
            delta = event["delta"]
            for name in ("text", "thinking"):
                if name in delta:
                    blocks[-1][name] += delta[name]
            written += delta.get("partial_json", "")
        elif event["type"] == "content_block_stop" and written:
            blocks[-1]["input"] = json.loads(written)
    told = counted(reply.headers)
    told.text = "".join(block.get("text", "") for block in blocks)
    told.reasoning = "".join(block.get("thinking", "") for block in blocks)
    told.said = [{"role": "assistant", "content": blocks}]
    return told


# ---- Codex -----------------------------------------------------------------------------------------------------------
def codex(served: Served, items: Sequence[dict[str, Any]], *, system: str = CODING, **more: Any) -> Told:
    """A turn of Codex: the whole conversation as items, each time."""
    body = {
        "model": "gpt-5-codex",
        "instructions": system,
        "input": list(items),
        "tools": [*({"type": "function", "strict": False, **each} for each in TOOLS), {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-session",
        "temperature": 0,
        "max_output_tokens": 32,
        **more,
    }
    reply = served.http.post(
        "/v1/responses", json=body, headers={"user-agent": "codex_cli_rs/0.50.0", "session_id": "1"}
    )
    last = list(_events(reply))[-1]["response"]
    told = counted(reply.headers)
    told.said = last["output"]
    for item in last["output"]:
        said = "".join(part["text"] for part in item.get("content") or ())
        if item["type"] == "reasoning":
            told.reasoning += said
        elif item["type"] == "message":
            told.text += said
    return told


def codex_user(text: str) -> dict[str, Any]:
    """What the user says, as Codex sends it."""
    return {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}


# ---- Open WebUI, and others that speak chat completions --------------------------------------------------------------
def open_webui(
    served: Served, messages: Sequence[dict[str, Any]], *, tools: Sequence[dict[str, Any]] = (), **more: Any
) -> Told:
    """A turn of Open WebUI."""
    body: dict[str, Any] = {
        "model": "local",
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "max_tokens": 32,
        "messages": list(messages),
        **more,
    }
    if tools:
        body["tools"] = [{"type": "function", "function": each} for each in tools]
    reply = served.http.post("/v1/chat/completions", json=body)
    told = counted(reply.headers)
    calls: list[dict[str, Any]] = []
    for event in _events(reply):
        for choice in event["choices"]:
            delta = choice["delta"]
            told.text += delta.get("content") or ""
            told.reasoning += delta.get("reasoning_content") or ""
            calls += delta.get("tool_calls") or []
    said: dict[str, Any] = {"role": "assistant", "content": told.text}
    if calls:
        said["tool_calls"] = [{name: each[name] for name in ("id", "type", "function")} for each in calls]
    told.said = [said]
    return told


def user(text: str) -> dict[str, Any]:
    """What the user says."""
    return {"role": "user", "content": text}


@contextmanager
def saying(served: Served, text: str) -> Iterator[None]:
    """Meanwhile the model answers just that, token by token as it likes: no dialect but one can say so itself."""
    stream = served.engine.stream

    def following(*arguments: Any, sampling: Sampling, **settings: Any) -> Stream:
        told = replace(sampling, grammar="root ::= " + json.dumps(text, ensure_ascii=False))
        return stream(*arguments, sampling=told, **{**settings, "max_tokens": 400})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(served.engine, "stream", following)
        yield
