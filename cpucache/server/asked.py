"""The prompt of a request, as the engine takes it: a conversation, tokens or a PML prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field

from cpucache.errors import InputError
from cpucache.layout import Text
from cpucache.layout.conversation import ChatMessage, Tool
from cpucache.pml import parse_prompt
from cpucache.pml.tree import Prompt, RoleName, Turn
from cpucache.reuse import Fidelity, Level, Reuse


class Extension(BaseModel):
    """The field ``cpucache`` of a request, an extension of both APIs."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = None
    """A PML prompt for an uploaded schema. The request's messages are appended to it as turns."""
    arguments: dict[str, str] = Field(default_factory=dict)
    """Arguments for parameters directly under the schema, in addition to the attributes of the prompt."""
    fidelity: Level | None = None
    recompute: float | None = Field(None, ge=0, le=1)
    reuse: Reuse | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments for ``Engine.plan``: fidelity and reuse, where given. Raises ``InputError``."""
        said = self.fidelity is not None or self.recompute is not None
        given = {"fidelity": Fidelity.of(self.fidelity, self.recompute) if said else None, "reuse": self.reuse}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Mark:
    """The end of a prefix of a prompt whose slices are kept for a time."""

    position: int
    """Length of the prefix in tokens."""
    seconds: int
    """How long the slices are kept after the answer."""


@dataclass(frozen=True)
class Conversation:
    """Input of a chat template: messages, tools and the texts of messages that are reused as modules."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Tool] = ()
    modules: Collection[str] = ()


@dataclass(frozen=True)
class Asked:
    """A prompt to answer."""

    prompt: Text | Prompt
    size: int
    """Length of the prompt in tokens."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fidelity and reuse of the request, as keyword arguments for ``Engine.plan``."""
    marks: tuple[Mark, ...] = ()
    conversation: Conversation | None = None
    """The conversation that ``prompt`` was rendered from, if any."""


def prompt_of(extension: Extension, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> Prompt:
    """Returns the PML prompt of a request, with the messages appended as turns. Raises ``PMLError`` or ``InputError``.

    ``extension.prompt`` is always parsed as PML, never read as a file name.
    """
    prompt = parse_prompt(extension.prompt or "", file="cpucache.prompt")
    twice = sorted(prompt.arguments.keys() & extension.arguments.keys())
    if twice:
        raise InputError(f"cpucache.arguments: the prompt has the attribute '{twice[0]}' already; give it once")
    if tools:
        raise InputError("tools: not supported with a PML prompt; describe the tools in its schema")
    turns = []
    for message in messages:
        if message.role not in ("user", "assistant") or message.calls:
            raise InputError("messages: after a PML prompt, only text messages of user and assistant are allowed")
        turns.append(Turn(cast(RoleName, message.role), message.text, prompt.line))
    arguments = {**prompt.arguments, **extension.arguments}
    return replace(prompt, arguments=arguments, children=(*prompt.children, *turns))
