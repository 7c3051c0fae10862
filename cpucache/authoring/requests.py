"""Recorded requests, in OpenAI's or Anthropic's form, as runs of text."""

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
"""Where logs keep a request inside an entry."""
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
    """A paragraph of a message, or a definition of a tool. ``label``: what it can be named after."""

    role: RoleName
    text: str
    label: str = ""


@dataclass(frozen=True)
class Recorded:
    """One request: its messages, each by its units; definitions of tools stand in the first one."""

    where: str
    messages: tuple[tuple[Unit, ...], ...]

    @property
    def units(self) -> list[Unit]:
        """All units, in order."""
        return [unit for message in self.messages for unit in message]


def recorded(path: Path) -> list[Recorded]:
    """The requests in a ``.json`` or ``.jsonl`` file. Raises ``InputError``."""
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
        raise InputError(f"{path}: no request in it: an object with messages, as OpenAI's or Anthropic's API takes it")
    return found


def _values(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """The JSON values of a file, with their lines where each line is one."""
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
    """The requests in a value: one, a list of them, a list of messages, or what a log keeps around one."""
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
    """The messages of a request as units; what is no text is passed over."""
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
    """The text of a content: as it is, or of its blocks, those in results of tools included."""
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
    """The definition of a tool as chat templates write it: JSON on a line, in OpenAI's form."""
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
