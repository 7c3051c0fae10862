"""Conversations, with tools, rendered by the model's own chat template and tokenized.

The template renders marks instead of the texts. The text between marks is tokenized with control tokens, the texts
themselves without: no message can forge a turn.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, zip_longest
from typing import Any, Literal, TypeAlias

import numpy as np

from cpucache.errors import InputError
from cpucache.layout.sandbox import MOST, Given
from cpucache.layout.segment import RoleRun, Text
from cpucache.layout.template import ChatTemplate, template_environment
from cpucache.layout.turns import Turns
from cpucache.layout.vocabulary import Tokens, Vocabulary, joined
from cpucache.pml.tree import RoleName

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]
# Random, so that no text can contain a mark on purpose.
_NONCE = "".join(secrets.choice("ABCDEFGHIJKLMNOP") for _ in range(12))
_MARK = re.compile(rf"{_NONCE}x(\d+|[BE])Qx")
_BEGIN, _END = f"{_NONCE}xBQx", f"{_NONCE}xEQx"
_MODULES = 256
"""Maximum number of modules in a conversation."""
_REASONING = "reasoning"
"""Role of a mark that stands for the assistant's reasoning."""
_THINK = "<think>"
"""Tag before reasoning, in templates and in the models' answers."""
_SHORTEST = 128
"""Minimum length of a module, in characters. Evaluating a shorter one is as fast as a lookup."""
_PER_MESSAGE = 1 << 12
"""Budget that a template gets for each message and tool, in addition to ``MOST``."""
_TOOLS = (
    "You may call functions. Their signatures:\n<tools>\n{tools}\n</tools>\n"
    "To call one, answer with nothing but its name and arguments in these tags:\n"
    '<tool_call>\n{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


@dataclass(frozen=True)
class ToolCall:
    """Call of a function by the model."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


@dataclass(frozen=True)
class ChatMessage:
    """A message of a conversation."""

    role: Role
    text: str = ""
    calls: Sequence[ToolCall] = ()
    """Assistant only: the functions that it calls."""
    call: str = ""
    """Tool only: id of the call that it answers."""
    name: str = ""
    """Tool only: name of the tool."""
    reasoning: str = ""
    """Assistant only: its reasoning before the answer, which some templates keep."""


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. ``parameters`` is a JSON schema."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Returns the definition in the form that templates expect."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


class Conversations:
    """Renders conversations for one model.

    Args:
        vocabulary: Tokenizer and chat template of the model. Without a chat template, roles are plain text.
        template: The same chat template, split by role.
        remembered: Returns the token ids with which the model generated a text, or ``None`` if they are not known.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        template: ChatTemplate,
        remembered: Callable[[str], Tokens | None] = lambda _: None,
    ) -> None:
        self._vocabulary = vocabulary
        self._taken_apart = template
        self._remembered = remembered
        self._environment = template_environment(vocabulary.special_text("bos"), vocabulary.special_text("eos"))
        plain = self._environment.filters["tojson"]

        def to_json(value: Any, *args: Any, **options: Any) -> str:
            written = str(plain(value, *args, **options))
            return f"{_BEGIN}{written}{_END}" if isinstance(value, _Described) else written

        self._environment.filters["tojson"] = to_json
        source = vocabulary.chat_template
        self._template = self._environment.from_string(source) if source and not template.plain else None
        self._lock = threading.Lock()  # around the environment's budget

    def text(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        modules: Collection[str] = (),
        *,
        written: Sequence[ChatMessage] | None = None,
    ) -> Text:
        """Renders and tokenizes a conversation, followed by the text that opens the model's answer.

        If the template refuses the conversation, equivalent forms are tried: system messages joined to one at the start
        or moved into the first user message, and tools described in the system message.

        Args:
            messages: The conversation; at least one message.
            tools: Functions that the model may call. Their definitions are parts of the result.
            modules: Texts that are parts of the result wherever they occur in the messages.
            written: The same messages, with tool calls in the text as the model wrote them. Each form is tried with
                these messages before ``messages``.

        Raises:
            InputError: There is no message, there are too many modules, or the template refuses every form.
        """
        if not messages:
            raise InputError("messages: at least one message is needed")
        bos = self._vocabulary.bos
        if self._template is None:
            told = _told(messages if written is None else written, tools)
            parts = ([] if bos is None else [np.array([bos], np.int32)]) + self._plain(told)
            ends = np.cumsum([len(part) for part in parts]).tolist()
            begin = len(parts) - len(told) - 1  # the last part opens the answer
            runs = zip(told, [0, *ends][begin:], ends[begin:], strict=False)
            return Text(joined(parts), roles=tuple(RoleRun(each.role, *run) for each, *run in runs))
        problem: Exception | None = None
        within = sorted({text for each in modules if len(text := each.strip()) >= _SHORTEST}, key=len, reverse=True)
        if len(within) > _MODULES:
            raise InputError(
                f"messages: {_MODULES} parts of a conversation may be marked as modules, not {len(within)}"
            )
        forms = [_forms(messages, tools)] if written is None else [_forms(written, tools), _forms(messages, tools)]
        for attempt, described in (form for pair in zip_longest(*forms) for form in pair if form is not None):
            try:
                text, texts = self._render(attempt, described, within)
            except Exception as error:  # a template is a program and can fail in any way
                problem = error
                continue
            shown = {int(found) for found in _MARK.findall(text) if found.isdigit()}
            if shown >= {index for index, (_, needed) in enumerate(texts) if needed}:
                return self._tokenized(text, texts)
        reason = f": {problem}" if problem else ": it would leave out a part"
        raise InputError(f"the model's chat template does not accept this conversation{reason}")

    def _render(
        self, messages: Sequence[ChatMessage], tools: Sequence[Tool], modules: Sequence[str]
    ) -> tuple[str, list[tuple[_Text, bool]]]:
        """Returns the conversation with marks, the text of each mark, and whether that mark must occur."""
        assert self._template is not None
        texts: list[tuple[_Text, bool]] = []

        def mark(text: str, role: str = "", *, needed: bool = True, quoted: bool = False, named: bool = True) -> str:
            bare = text.strip()
            if not bare:
                return text
            marks = ""
            for part, module in _split(bare, modules if not quoted and named else ()):
                marks += f"{_NONCE}x{len(texts)}Qx"
                texts.append((_Text(part, role, quoted=quoted, module=module), needed))
            begin = text.index(bare)
            return f"{text[:begin]}{marks}{text[begin + len(bare) :]}"

        def guarded(value: Any) -> Any:
            """JSON value with marks instead of strings that contain control tokens."""
            if isinstance(value, str):
                return mark(value, quoted=True, needed=False) if self._forges(value) else value
            if isinstance(value, Mapping):
                return {guarded(key): guarded(each) for key, each in value.items()}
            return [guarded(each) for each in value] if isinstance(value, list | tuple) else value

        given: Given = Given()
        for message in messages:
            entry: dict[str, Any] = {
                "role": message.role,
                "content": mark(message.text, message.role),
            }
            if message.reasoning:
                entry["reasoning_content"] = mark(message.reasoning, _REASONING, needed=False)
            if message.calls:
                entry["tool_calls"] = [
                    {
                        "type": "function",
                        "id": guarded(call.id),
                        "function": {"name": guarded(call.name), "arguments": guarded(call.arguments)},
                    }
                    for call in message.calls
                ]
            if message.role == "tool":
                entry |= {"tool_call_id": guarded(message.call), "name": guarded(message.name)}
            given.append(entry)
        described = Given(
            _Described(
                type="function",
                function=_Described(
                    # Names must occur: they show whether the template renders tools at all.
                    name=mark(tool.name, named=False),
                    description=guarded(tool.description),
                    parameters=guarded(dict(tool.parameters)),
                ),
            )
            for tool in tools
        )
        size = len(json.dumps(described)) if described else 0
        with self._lock:
            self._environment.renew(MOST + _PER_MESSAGE * (len(messages) + len(tools)) + 16 * size)
            text = self._template.render(messages=given, tools=described or None, add_generation_prompt=True)
        return text, texts

    def _forges(self, text: str) -> bool:
        tokenize = self._vocabulary.tokenize
        return len(tokenize(text, special=True)) != len(tokenize(text))

    def _tokenized(self, text: str, marked: Sequence[tuple[_Text, bool]]) -> Text:
        pieces, texts = self._as_thought(_MARK.split(text), [each for each, _ in marked])
        bos = self._vocabulary.bos
        parts: list[Tokens] = []
        if bos is not None:
            parts.append(np.array([bos], np.int32))
            pieces[0] = pieces[0].removeprefix(self._vocabulary.special_text("bos"))
        size = begin = len(parts)
        modules: list[tuple[int, int]] = []
        roles: list[RoleRun] = []
        for index, piece in enumerate(pieces):
            if index % 2 and not piece.isdigit():
                if piece == "E":
                    modules.append((begin, size))
                    roles.append(RoleRun("tools", begin, size))
                begin = size
                continue
            each = texts[int(piece)] if index % 2 else None
            parts.append(self._vocabulary.tokenize(piece, special=True) if each is None else self._ids(each))
            size += len(parts[-1])
            if each and each.module:
                modules.append((size - len(parts[-1]), size))
            if each and each.role:
                role = "assistant" if each.role == _REASONING else each.role
                roles.append(RoleRun(role, size - len(parts[-1]), size))
        return Text(joined(parts), tuple(modules), roles=tuple(roles))

    def _as_thought(self, pieces: list[str], texts: list[_Text]) -> tuple[list[str], list[_Text]]:
        """Joins reasoning and the answer after it to one text if ``remembered`` knows their tokens."""
        for at in range(1, len(pieces) - 2, 2):
            first, second = (texts[int(piece)] if piece.isdigit() else None for piece in (pieces[at], pieces[at + 2]))
            if first is None or second is None or first.role != _REASONING or not second.said:
                continue
            before, thought = pieces[at - 1], first.text + pieces[at + 1] + second.text
            # Some templates open the answer with the tag; with others, the model generates it.
            for head in (before[before.rfind(_THINK) :] if _THINK in before else "", ""):
                if self._remembered(head + thought) is not None:
                    pieces[at - 1 : at + 3] = [before.removesuffix(head), str(len(texts)), "", str(len(texts) + 1)]
                    texts += [replace(second, text=head + thought), replace(second, text="")]
                    break
        return pieces, texts

    def _ids(self, text: _Text) -> Tokens:
        known = self._remembered(text.text) if text.said else None
        return self._vocabulary.tokenize(text.shown) if known is None else known

    def _plain(self, messages: Sequence[ChatMessage]) -> list[Tokens]:
        turns = Turns(self._taken_apart, self._vocabulary)
        roles: dict[str, RoleName] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "user"}
        return [*(turns.turn(roles[message.role], message.text) for message in messages), turns.answer()]


class _Described(dict[str, Any]):
    """Part of a tool's definition; a class of its own, so that ``tojson`` puts marks around it."""


def _split(text: str, modules: Sequence[str]) -> list[tuple[str, bool]]:
    """Splits a text at its modules; each part has a flag for modules. Earlier ``modules`` take precedence."""
    parts = [(text, False)]
    for module in modules:
        found: list[tuple[str, bool]] = []
        for part, is_module in parts:
            if is_module or len(part) < len(module):
                found.append((part, is_module))
                continue
            first, *rest = part.split(module)
            found.append((first, False))
            for each in rest:
                found += [(module, True), (each, False)]
        parts = [(part, is_module) for part, is_module in found if part]
    return parts


@dataclass(frozen=True)
class _Text:
    """Text that a mark stands for."""

    text: str
    role: str
    """Role of the message; empty for a part of a tool's definition or of a call."""
    quoted: bool
    """Whether it is inside a JSON string."""
    module: bool
    """Whether it is a module, which may be reused at any position."""

    @property
    def said(self) -> bool:
        """Whether it is content of an assistant message."""
        return self.role == "assistant"

    @property
    def shown(self) -> str:
        return json.dumps(self.text, ensure_ascii=False)[1:-1] if self.quoted else self.text


def _forms(
    messages: Sequence[ChatMessage], tools: Sequence[Tool]
) -> list[tuple[Sequence[ChatMessage], Sequence[Tool]]]:
    """Forms of a conversation, the most faithful first; the first is the conversation unchanged."""
    joint = _joined_system(messages)
    forms = [(messages, tools), (joint, tools), (_alternating(_by_user(joint)), tools)]
    if tools or any(message.calls or message.role == "tool" for message in messages):
        told = _told(messages, tools)
        forms += [(_joined_system(told), ()), (_alternating(_by_user(_joined_system(told))), ())]
    return forms


def _joined_system(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Joins the system messages at the start to one and turns later ones into user messages."""
    head: list[str] = []
    rest: list[ChatMessage] = []
    for message in messages:
        if message.role != "system":
            rest.append(message)
        elif rest:
            rest.append(ChatMessage("user", message.text))
        else:
            head.append(message.text)
    return [*([ChatMessage("system", "\n\n".join(head))] if head else []), *rest]


def _by_user(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Moves the system message into the first user message."""
    if messages[0].role != "system":
        return list(messages)
    text, rest = messages[0].text, list(messages[1:])
    if rest and rest[0].role == "user":
        return [ChatMessage("user", f"{text}\n\n{rest[0].text}"), *rest[1:]]
    return [ChatMessage("user", text), *rest]


def _alternating(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Joins consecutive messages of one role."""
    merged: list[ChatMessage] = []
    for role, group in groupby(messages, key=lambda message: message.role):
        each = list(group)
        if len(each) == 1 or role == "tool" or any(message.calls for message in each):
            merged += each
        else:
            merged.append(ChatMessage(role, "\n\n".join(message.text for message in each)))
    return merged


def _told(messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
    """Writes tools, calls and their results as message text, for templates without tools."""
    told: list[ChatMessage] = []
    if tools:
        listed = "\n".join(json.dumps(tool.as_dict(), ensure_ascii=False) for tool in tools)
        told.append(ChatMessage("system", _TOOLS.format(tools=listed)))
    for message in messages:
        if message.role == "tool":
            told.append(ChatMessage("user", f"<tool_response>\n{message.text}\n</tool_response>"))
        elif message.calls:
            calls = (
                json.dumps({"name": call.name, "arguments": dict(call.arguments)}, ensure_ascii=False)
                for call in message.calls
            )
            parts = [message.text, *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
            told.append(ChatMessage("assistant", "\n".join(part for part in parts if part)))
        else:
            told.append(message)
    return told
