"""OpenAI's API: requests, and their messages and tools as the engine takes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field

from cpucache.engine import Sampling
from cpucache.engine.sampling import sampling_of
from cpucache.errors import InputError
from cpucache.layout.conversation import ChatMessage, Role, Tool, ToolCall
from cpucache.runtime.grammar import ANY_JSON, grammar_of
from cpucache.server.asked import Extension

CHOICES = 16
"""Number of answers to one request at most."""


class _Given(BaseModel):
    """Base of request bodies. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class ResponseFormat(_Given):
    """The format of an answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] | None = None


class StreamOptions(_Given):
    """Options of a streamed answer."""

    include_usage: bool = False


class _Common(_Given):
    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1 << 30)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=1 << 20)
    min_p: float | None = Field(None, ge=0, lt=1)
    repeat_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=CHOICES)
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    """A GBNF grammar, as in the API of llama-server."""
    cache_prompt: bool = True
    """``false``: the whole prompt is evaluated, and nothing is reused. As in the API of llama-server."""

    def sampling(self, logprobs: int | None) -> Sampling:
        """How tokens are sampled. The default temperature is 1, as in OpenAI's API, and not ``Engine``'s."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return sampling_of(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            seed=None if self.seed is None else self.seed % 2**32,
            stop=[text for text in texts if text],
            grammar=self._grammar(),
            logprobs=logprobs,
        )

    def _grammar(self) -> str:
        asked = self.response_format
        if self.grammar or asked is None or asked.type == "text":
            return self.grammar or ""
        if asked.type == "json_object":
            return ANY_JSON
        schema = (asked.json_schema or {}).get("schema")
        if not isinstance(schema, dict):
            raise InputError("response_format.json_schema.schema: an object is expected")
        return grammar_of(schema)


class ChatRequest(_Common):
    """A request to answer a conversation."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 30)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    cpucache: Extension | None = None


class CompletionRequest(_Common):
    """A request to continue texts or tokens."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False


def messages_of(given: Sequence[dict[str, Any]]) -> list[ChatMessage]:
    """Returns the messages of a request in OpenAI's format. Raises ``InputError``."""
    names: dict[str, str] = {}
    messages = []
    for number, each in enumerate(given):
        where = f"messages[{number}]"
        role = each.get("role")
        role = "system" if role == "developer" else role
        if role not in get_args(Role):
            raise InputError(f"{where}.role: must be system, developer, user, assistant or tool, not {role!r}")
        calls = [_call(call, f"{where}.tool_calls") for call in _list(each.get("tool_calls"), f"{where}.tool_calls")]
        names |= {call.id: call.name for call in calls}
        identity = str(each.get("tool_call_id") or "")
        reasoning = each.get("reasoning_content")
        messages.append(
            ChatMessage(
                cast(Role, role),
                text_of(each.get("content"), where),
                calls,
                identity,
                names.get(identity, str(each.get("name") or "")) if role == "tool" else "",
                reasoning if isinstance(reasoning, str) else "",
            )
        )
    return messages


def text_of(content: Any, where: str) -> str:
    """Returns the text of a message's content. Raises ``InputError``, whose text begins with ``where``."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise InputError(f"{where}.content: must be text or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise InputError(f"{where}.content: this model accepts text only, not a part of type {kind!r}")
        texts.append(text)
    return "\n".join(texts)


def modules_of(contents: Iterable[Any]) -> list[str]:
    """Texts of the content parts that a client marked as modules, which are reused at any position."""
    return [
        part["text"]
        for content in contents
        if isinstance(content, list)
        for part in content
        if isinstance(part, dict) and isinstance(part.get("text"), str) and _marked(part.get("cache_control"))
    ]


def _marked(control: Any) -> bool:
    return isinstance(control, dict) and control.get("type") == "module"


def _list(value: Any, where: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise InputError(f"{where}: a list of objects is expected")
    return value


def _call(value: dict[str, Any], where: str) -> ToolCall:
    function = value.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a function with a name is expected")
    return ToolCall(function["name"], _arguments(function.get("arguments"), where), str(value.get("id") or ""))


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """Arguments of a call. Most clients send them as JSON text, some as a JSON object."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except ValueError as error:
            raise InputError(f"{where}: arguments are not JSON: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: arguments must be an object")
    return value or {}


def tools_of(given: Sequence[dict[str, Any]] | None, choice: str | dict[str, Any] | None) -> list[Tool]:
    """Returns the tools of a request in OpenAI's format, none if ``choice`` is ``"none"``. Raises ``InputError``."""
    if choice == "none":
        return []
    tools = []
    for number, each in enumerate(given or ()):
        function = each.get("function") if each.get("type", "function") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(f"tools[{number}]: a function with a name is expected")
        parameters = function.get("parameters")
        description = function.get("description")
        tools.append(
            Tool(
                function["name"],
                description if isinstance(description, str) else "",
                parameters if isinstance(parameters, dict) else {},
            )
        )
    return tools
