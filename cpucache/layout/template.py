"""The model's own chat template, split into the text before and after the content of each role.

A template is a Jinja program that renders whole conversations, but modules need its parts. It is therefore rendered
with marks as messages; the text between the marks is what the template adds. This does not depend on how the template
is written.
"""

from __future__ import annotations

import contextlib
import json
import re
from datetime import date
from itertools import takewhile
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from cpucache.layout.sandbox import BoundedEnvironment
from cpucache.pml.tree import RoleName

# Letters only, so that a template that trims or escapes messages does not change them.
_MARKS = {"system": "SystemMarkQx", "user": "UserMarkQx", "assistant": "AssistantMarkQx", "again": "AgainMarkQx"}


# A fixed date: slices of a prompt that holds today's date could not be reused tomorrow. Llama 3's template falls back
# on this one.
_DATE = date(2024, 7, 26)
# Maximum length of a conversation of marks, in characters. No template adds as much text to its messages.
_LONGEST = 1 << 16
# The first half of a control token, such as ``<|end`` or ``[IN``.
_HALF_TOKEN = re.compile(r"[<\[][^<>\[\]\s]*$")


class ChatTemplate:
    """Text that the chat template puts before and after each role's content, and before the model's answer.

    ``source`` is the Jinja text from the GGUF. If it is ``None`` or cannot be split, ``plain`` is true and roles are
    plain text: each adds only a line break after its content.

    The system text starts the first user turn if the template puts it there (Gemma, Mistral) or refuses system
    messages. Other changes that a template makes to messages (omitting earlier reasoning, moving the system text to
    the last turn) are not reproduced: the text of a module cannot depend on the rest of the prompt.
    """

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        self.plain = True
        self._generation = ""
        self._first = {"system": "", "user": "", "assistant": ""}
        self._start = dict(self._first)
        self._end = dict.fromkeys(self._first, "\n")
        self._user_after_system = ""
        self._end_system = ""
        if source:
            with contextlib.suppress(_Unusable):
                self._take_apart(_Renderer(source, bos, eos), bos)

    def start(self, role: RoleName, *, previous: RoleName | None, first: bool) -> str:
        """Text before the content of ``role``.

        ``previous`` is the role of the turn before. ``first`` means that the turn opens the prompt: it then gets the
        beginning of the template as well, for example a default system text.
        """
        if first:
            return self._first[role]
        if role == "user" and previous == "system":
            return self._user_after_system
        return self._start[role]

    def end(self, role: RoleName) -> str:
        """Text after the content of ``role``."""
        return self._end[role]

    def generation(self, previous: RoleName | None) -> str:
        """Text that opens the model's answer after a turn of ``previous``."""
        return (self._end_system if previous == "system" else "") + self._generation

    def _take_apart(self, render: _Renderer, bos: str) -> None:
        before_user, after_user = _around(render("user"), "user")
        after_user_open = _around(render("user", generation=True), "user")[1]
        end_user = _shared(after_user, after_user_open)
        generation = after_user_open[len(end_user) :]

        between, after = _around(_around(render("user", "assistant", "again"), "user")[1], "assistant")
        between_turns = _around(after, "again")[0]
        # Templates may end the last message differently: the common prefix of both endings belongs to the role.
        end_assistant = _shared(_around(render("user", "assistant"), "assistant")[1], between_turns)
        start_assistant = between.removeprefix(end_user) if between.startswith(end_user) else generation
        start_user = between_turns[len(end_assistant) :]

        try:
            before_system, after_system = _around(render("system", "user"), "system")
            joint = _around(after_system, "user")[0]
            # ``bos`` is removed where it only opens the text, and kept where the template begins every turn with it.
            start_system = before_system if start_user.startswith(bos) else before_system.removeprefix(bos)
        except _Unusable:
            before_system, start_system, joint = before_user, start_user, "\n\n"
        separate = bool(start_user) and joint.endswith(start_user)

        self.plain = False
        self._generation = generation
        self._first = {"system": before_system, "user": before_user, "assistant": start_assistant}
        self._start = {"system": start_system, "user": start_user, "assistant": start_assistant}
        self._end = {
            "system": joint.removesuffix(start_user) if separate else joint,
            "user": end_user,
            "assistant": end_assistant,
        }
        self._user_after_system = start_user if separate else ""
        self._end_system = "" if separate else end_user


class _Unusable(Exception):
    """The template fails, or leaves out, repeats or changes the content of its messages."""


def _around(text: str, mark: str) -> tuple[str, str]:
    parts = text.split(_MARKS[mark])
    if len(parts) != 2:
        raise _Unusable
    return parts[0], parts[1]


def _shared(one: str, other: str) -> str:
    """Longest common prefix of both texts, without the first half of a control token at its end."""
    size = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return one[:size] if size in (len(one), len(other)) else _HALF_TOKEN.sub("", one[:size])


class _Generation(Extension):
    """Renders the content of ``{% generation %}``, a tag that marks training targets, unchanged."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_environment(bos: str, eos: str) -> BoundedEnvironment:
    """Jinja environment that chat templates expect, with limits on what a template may do."""
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    # As in transformers, for which templates are written: keys keep their order, and characters are not escaped.
    environment.filters["tojson"] = environment.bounded(_to_json)
    environment.globals.update(
        raise_exception=_raise,
        strftime_now=_DATE.strftime,
        bos_token=bos,
        eos_token=eos,
        tools=None,
        documents=None,
    )
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Renderer:
    """Renders conversations of marks in the environment that chat templates expect.

    Raises ``_Unusable`` for any exception of the template, which is a program and can fail in any way.
    """

    def __init__(self, source: str, bos: str, eos: str) -> None:
        environment = template_environment(bos, eos)
        try:
            self._template = environment.from_string(source)
        except Exception as error:
            raise _Unusable from error

    def __call__(self, *marks: str, generation: bool = False) -> str:
        messages = [{"role": "user" if mark == "again" else mark, "content": _MARKS[mark]} for mark in marks]
        try:
            text = self._template.render(messages=messages, add_generation_prompt=generation)
        except Exception as error:
            raise _Unusable from error
        if len(text) > _LONGEST:
            raise _Unusable
        return text


def _raise(message: str) -> Any:
    raise jinja2.TemplateError(message)
