"""Marks in Anthropic's requests: ``cache_control`` says up to which block a prompt is kept, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel

from cpucache.errors import InputError

Body = TypeVar("Body", bound=BaseModel)
SECONDS = {"5m": 300, "1h": 3600}
_MOST = 4  # as in Anthropic's API


def marked(body: Body) -> list[tuple[Body, int]]:
    """Returns, for each mark, the request up to the marked block, and seconds to keep it. Raises ``InputError``.

    All marks in tools become one mark after the system text: the chat template decides whether tools or system text
    come first. The longest time among these marks applies. Each of them counts towards the limit.
    """
    given: Any = body
    nothing: dict[str, Any] = {"messages": []}
    found: list[tuple[Body, int]] = []
    tools = [seconds for tool in given.tools or () if (seconds := _seconds(tool, "tools"))]
    if tools:
        found.append((body.model_copy(update=nothing), max(tools)))
    for number, seconds in _blocks(given.system, "system"):
        found.append((body.model_copy(update={**nothing, "system": given.system[: number + 1]}), seconds))
    for index, message in enumerate(given.messages):
        for number, seconds in _blocks(message.get("content"), f"messages.{index}"):
            content = message["content"][: number + 1]
            cut = [*given.messages[:index], {**message, "content": content}]
            found.append((body.model_copy(update={"messages": cut}), seconds))
    count = len(found) - bool(tools) + len(tools)
    if count > _MOST:
        raise InputError(f"cache_control: a request may have at most {_MOST} marks, not {count}")
    return found


def _blocks(content: Any, where: str) -> Iterator[tuple[int, int]]:
    for number, block in enumerate(content if isinstance(content, list) else ()):
        seconds = _seconds(block, where)
        if seconds:
            yield number, seconds


def _seconds(block: Any, where: str) -> int:
    control = block.get("cache_control") if isinstance(block, dict) else None
    # The same field marks modules, which are reused at any position; see ``modules_of``.
    if not isinstance(control, dict) or control.get("type") == "module":
        return 0
    ttl = control.get("ttl") or "5m"
    if control.get("type") != "ephemeral" or ttl not in SECONDS:
        raise InputError(
            f'{where}: cache_control must be {{"type": "ephemeral", "ttl": "5m" or "1h"}}, or of type "module"'
        )
    return SECONDS[ttl]
