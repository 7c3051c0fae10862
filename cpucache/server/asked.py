"""What a request asks for, as the engine takes it; with a PML prompt in it, or without."""

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
    """The field ``cpucache`` of a request: what no other server has."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = None
    """A PML prompt, on a schema that was uploaded. The request's messages are appended to it, as turns."""
    arguments: dict[str, str] = Field(default_factory=dict)
    """Arguments for parameters directly under the schema, besides those that the prompt has as attributes."""
    fidelity: Level | None = None
    recompute: float | None = Field(None, ge=0, le=1)
    reuse: Reuse | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What it says of fidelity and reuse, as ``Engine.plan`` takes it. Raises ``InputError``."""
        said = self.fidelity is not None or self.recompute is not None
        given = {"fidelity": Fidelity.of(self.fidelity, self.recompute) if said else None, "reuse": self.reuse}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Mark:
    """A place in a prompt up to which it is kept."""

    position: int
    """Tokens before it."""
    seconds: int


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given."""

    messages: Sequence[ChatMessage]
    tools: Sequence[Tool] = ()
    modules: Collection[str] = ()


@dataclass(frozen=True)
class Asked:
    """A prompt to be answered."""

    prompt: Text | Prompt
    size: int
    """Its tokens."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What it says of fidelity and reuse."""
    marks: tuple[Mark, ...] = ()
    conversation: Conversation | None = None
    """What was rendered, where it was one."""


def prompt_of(extension: Extension, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> Prompt:
    """The PML prompt of a request, with its messages as turns behind it. Raises ``PMLError`` or ``InputError``.

    Text is parsed, and never taken for the name of a file.
    """
    prompt = parse_prompt(extension.prompt or "", file="cpucache.prompt")
    twice = sorted(prompt.arguments.keys() & extension.arguments.keys())
    if twice:
        raise InputError(f"cpucache.arguments: the prompt has '{twice[0]}' as an attribute already")
    if tools:
        raise InputError("tools: a PML prompt has none; write what they are into its schema")
    turns = []
    for message in messages:
        if message.role not in ("user", "assistant") or message.calls:
            raise InputError("messages: behind a PML prompt stand text messages of user and assistant only")
        turns.append(Turn(cast(RoleName, message.role), message.text, prompt.line))
    arguments = {**prompt.arguments, **extension.arguments}
    return replace(prompt, arguments=arguments, children=(*prompt.children, *turns))
