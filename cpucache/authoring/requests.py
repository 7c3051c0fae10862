"""Recorded requests, in the format of OpenAI's or Anthropic's API, as units of text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpucache.errors import InputError
from cpucache.pml.limits import Limits, TooLarge, read_regular
from cpucache.pml.tree import RoleName

_WRAPPED = ("request", "body", "json", "kwargs")
"""Keys under which logs keep a request inside an entry."""
_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_ROLES: dict[str, RoleName] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "tool": "user",
    "function": "user",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Unit:
    """A paragraph of a message, or the definition of a tool. ``label``: source of a module name; may be empty."""

    role: RoleName
    text: str
    label: str = ""


@dataclass(frozen=True)
class Recorded:
    """One request. ``messages``: units of each message; the first "message" holds the tool definitions."""

    where: str
    messages: tuple[tuple[Unit, ...], ...]

    @property
    def units(self) -> list[Unit]:
        """All units of the request, in order."""
        return [unit for message in self.messages for unit in message]


def recorded(path: Path) -> list[Recorded]:
    """Returns the requests in a ``.json`` or ``.jsonl`` file.

    Raises ``InputError`` if the file can't be read, or holds no request.
    """
    try:
        text = read_regular(path, Limits().sources).decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error}") from error
    except TooLarge as error:
        raise InputError(f"{path}: {error.strerror}: divide it into several files") from error
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror}") from error
    found: list[Recorded] = []
    for line, value in _values(path, text):
        where = f"{path}:{line}" if line else str(path)
        for request in _requests(value):
            found.append(Recorded(where, tuple(_messages(request, where))))
    if not found:
        raise InputError(
            f"{path}: it contains no request: an object with messages, as in OpenAI's or Anthropic's API, is expected"
        )
    return found


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yields the JSON values of a file with their lines; line 0 if the whole file is one value."""
    try:
        yield 0, json.loads(text)
        return
    except ValueError as error:
        lines = [(at, line) for at, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) < 2 and path.suffix != ".jsonl":
            raise InputError(f"{path}: not JSON: {error}") from error
    for at, line in lines:
        try:
            yield at, json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{at}: not JSON: {error}") from error


def _requests(value: Any) -> Iterator[dict[str, Any]]:
    """Yields the requests in a value: a request, a list of requests, a list of messages, or an entry of a log."""
    if isinstance(value, list):
        if value and all(isinstance(each, dict) and "role" in each for each in value):
            yield {"messages": value}
        else:
            for each in value:
                yield from _requests(each)
    elif isinstance(value, dict):
        if isinstance(value.get("messages"), list):
            yield value
            return
        for name in _WRAPPED:
            inner = value.get(name)
            if isinstance(inner, str) and inner.lstrip().startswith("{"):
                try:
                    inner = json.loads(inner)
                except ValueError:
                    continue
            if isinstance(inner, dict | list):
                yield from _requests(inner)


def _messages(request: dict[str, Any], where: str) -> Iterator[tuple[Unit, ...]]:
    """Yields the messages of a request as units. Content other than text is skipped."""
    tools = request.get("tools")
    yield tuple(_tool(tool) for tool in (tools if isinstance(tools, list) else ()) if isinstance(tool, dict))
    yield _units("system", _text(request.get("system")))
    for number, message in enumerate(request["messages"]):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in _ROLES:
            raise InputError(f"{where}: messages[{number}]: expected an object with a role and content")
        yield _units(_ROLES[role], _text(message.get("content")))


def _units(role: RoleName, text: str) -> tuple[Unit, ...]:
    return tuple(Unit(role, part.strip()) for part in _PARAGRAPH.split(text) if part.strip())


def _text(content: Any) -> str:
    """Text of a message's content: of a string, or of all blocks, tool results included."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    texts = []
    for block in content:
        if isinstance(block, str):
            texts.append(block)
        elif isinstance(block, dict):
            inner = block.get("text") if isinstance(block.get("text"), str) else _text(block.get("content"))
            texts.append(str(inner))
    return "\n\n".join(filter(None, texts))


def _tool(tool: dict[str, Any]) -> Unit:
    """Definition of a tool as chat templates write it: one line of JSON, in OpenAI's format."""
    given = tool.get("function")
    function = given if isinstance(given, dict) else tool
    name = str(function.get("name") or tool.get("type") or "tool")
    definition = {
        "name": name,
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or function.get("input_schema") or {},
    }
    written = json.dumps({"type": "function", "function": definition}, ensure_ascii=False)
    return Unit("system", written, f"tool-{name}")
