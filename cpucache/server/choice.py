"""Tool choice: which calls an answer must contain, and how the model writes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpucache.engine import Sampling
from cpucache.errors import InputError
from cpucache.layout import Tokens
from cpucache.layout.conversation import ChatMessage, Conversations, Tool, ToolCall
from cpucache.runtime.grammar import CallForm, calls_grammar

TAGS = CallForm(begin="<tool_call>\n", end="\n</tool_call>", between="\n")
"""Form of Qwen, Hermes and many others; also of templates without tools, which are then described in a message."""
LIST = CallForm(head="[TOOL_CALLS][", between=", ", tail="]")
"""Form of Mistral."""
BARE = CallForm(arguments="parameters")
"""Form of Llama: one call and no text around it."""
_PROBE = "probeQx"
_log = logging.getLogger("cpucache.server")


def form_of(conversations: Conversations, read: Callable[[Tokens], str]) -> CallForm:
    """Form in which a model writes calls, found by rendering a call with its chat template.

    ``read`` returns the text of tokens.
    """
    asked = ChatMessage("user", "x")
    calling = ChatMessage("assistant", "", [ToolCall(_PROBE, {"x": "y"}, "abcdefghi")])
    try:
        text = read(conversations.text([asked, calling], [Tool(_PROBE)]).tokens)
    except InputError:
        return TAGS
    # The tool's last occurrence is the call; an earlier one is its definition.
    before, _, after = text.rpartition(_PROBE)
    if "<tool_call>" in before:
        return TAGS
    if "[TOOL_CALLS]" in before:
        return LIST
    return BARE if '"parameters"' in after else TAGS


@dataclass(frozen=True)
class Forced:
    """The calls that an answer must contain."""

    tools: tuple[Tool, ...]
    """Tools that may be called."""
    several: bool = False
    """Whether the answer may contain more than one call."""

    def of(self, sampling: Sampling, form: CallForm) -> Sampling:
        """Returns ``sampling`` with a grammar of these calls. Raises ``InputError`` if it has a grammar already."""
        if sampling.grammar:
            raise InputError("tool_choice: an answer can't both be a call and follow a grammar or a JSON schema")
        functions = {tool.name: tool.parameters for tool in self.tools}
        try:
            return replace(sampling, grammar=calls_grammar(functions, form, several=self.several))
        except InputError as error:
            _log.info(
                "arguments of calls may be any JSON, because their schemas can't be turned into a grammar: %s", error
            )
            loose: dict[str, Mapping[str, Any]] = {name: {"type": "object"} for name in functions}
            return replace(sampling, grammar=calls_grammar(loose, form, several=self.several))


def openai_choice(choice: str | dict[str, Any] | None, tools: Sequence[Tool], *, several: bool) -> Forced | None:
    """Returns the calls that OpenAI's ``tool_choice`` forces, or ``None``. Raises ``InputError``.

    Chat completions nest the name of a function in ``function``, responses do not.
    """
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        return _any_of(tools, several=several)
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function")
        return _named((function if isinstance(function, dict) else choice).get("name"), tools)
    raise InputError("tool_choice: must be auto, none, required, or a function with its name")


def anthropic_choice(choice: dict[str, Any] | None, tools: Sequence[Tool]) -> Forced | None:
    """Returns the calls that Anthropic's ``tool_choice`` forces, or ``None``. Raises ``InputError``."""
    kind = (choice or {}).get("type", "auto")
    if choice is None or kind in ("auto", "none"):
        return None
    if kind == "any":
        return _any_of(tools, several=not choice.get("disable_parallel_tool_use"))
    if kind == "tool":
        return _named(choice.get("name"), tools)
    raise InputError("tool_choice.type: must be auto, any, tool or none")


def _any_of(tools: Sequence[Tool], *, several: bool) -> Forced:
    if not tools:
        raise InputError("tool_choice: there are no tools to call")
    return Forced(tuple(tools), several)


def _named(name: Any, tools: Sequence[Tool]) -> Forced:
    found = [tool for tool in tools if tool.name == name]
    if not found:
        raise InputError(f"tool_choice: no tool is named {name!r:.100}")
    return Forced(tuple(found[:1]))
