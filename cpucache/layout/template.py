"""The model's own chat template, taken apart into what stands before and behind the text of each role.

A template is a Jinja program that renders whole conversations. Modules need its pieces: so it is rendered around marks,
and what stands between the marks is what the template adds. Any model's template works this way, whatever it is written
like.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cpucache.pml.tree import RoleName

# Letters only, so that a template which trims or escapes its messages leaves them alone.
_MARKS = {"system": "SystemMarkQx", "user": "UserMarkQx", "assistant": "AssistantMarkQx", "again": "AgainMarkQx"}


class ChatTemplate:
    """Text before and behind each role's content, and ``generation``, which opens the model's answer.

    ``source`` is the Jinja text from the GGUF; ``None``, or a template that can't be taken apart, gives plain text:
    roles add nothing but a line break behind their content (``plain`` is true then).

    Templates that merge the system text into the first user turn (Gemma, Mistral), and those that refuse it, get it at
    the head of that turn.
    """

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "") -> None:
        self.plain = True
        self.generation = ""
        self._first = {"system": "", "user": "", "assistant": ""}
        self._start = dict(self._first)
        self._end = dict.fromkeys(self._first, "\n")
        self._user_after_system = ""
        if source:
            # A template that refuses marks, or loses them, is no use: the roles stay plain.
            with contextlib.suppress(jinja2.TemplateError, _Unusable, TypeError, ValueError, KeyError):
                self._take_apart(_Renderer(source, bos, eos), bos)

    def start(self, role: RoleName, *, previous: RoleName | None, first: bool) -> str:
        """What stands before the content of ``role``; ``first``: nothing stands before it in the whole prompt.

        ``previous`` is the role before it. A first turn has what the template begins with, for example its default
        system text.
        """
        if first:
            return self._first[role]
        if role == "user" and previous == "system":
            return self._user_after_system
        return self._start[role]

    def end(self, role: RoleName) -> str:
        """What stands behind the content of ``role``."""
        return self._end[role]

    def _take_apart(self, render: _Renderer, bos: str) -> None:
        before_user, behind_user = _around(render("user"), "user")
        behind_user_open = _around(render("user", generation=True), "user")[1]
        end_user = os.path.commonprefix([behind_user, behind_user_open])
        generation = behind_user_open[len(end_user) :]

        between, behind = _around(_around(render("user", "assistant", "again"), "user")[1], "assistant")
        between_turns = _around(behind, "again")[0]
        # Templates may end the last message of all differently: what both have in common belongs to the role.
        end_assistant = os.path.commonprefix([_around(render("user", "assistant"), "assistant")[1], between_turns])
        start_assistant = between.removeprefix(end_user) if between.startswith(end_user) else generation
        start_user = between_turns[len(end_assistant) :]

        try:
            before_system, behind_system = _around(render("system", "user"), "system")
            joint = _around(behind_system, "user")[0]
        except (jinja2.TemplateError, _Unusable):
            before_system, joint = before_user, "\n\n"
        separate = bool(start_user) and joint.endswith(start_user)

        self.plain = False
        self.generation = generation
        self._first = {"system": before_system, "user": before_user, "assistant": start_assistant}
        self._start = {
            "system": before_system.removeprefix(bos) if separate else start_user,
            "user": start_user,
            "assistant": start_assistant,
        }
        self._end = {
            "system": joint.removesuffix(start_user) if separate else joint,
            "user": end_user,
            "assistant": end_assistant,
        }
        self._user_after_system = start_user if separate else ""


class _Unusable(Exception):
    """The template leaves out or changes the content of its messages."""


def _around(text: str, mark: str) -> tuple[str, str]:
    before, found, behind = text.partition(_MARKS[mark])
    if not found:
        raise _Unusable
    return before, behind


class _Renderer:
    """Renders conversations of marks, in the environment that templates are written for."""

    def __init__(self, source: str, bos: str, eos: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        # No ``strftime_now``: a prompt with today's date in it would never be found in the cache tomorrow. Templates
        # that use it check for it and have a fixed date instead.
        self._template = environment.from_string(source)
        self._constants = {"bos_token": bos, "eos_token": eos}

    def __call__(self, *marks: str, generation: bool = False) -> str:
        messages = [{"role": "user" if mark == "again" else mark, "content": _MARKS[mark]} for mark in marks]
        return self._template.render(messages=messages, add_generation_prompt=generation, **self._constants)


def _raise(message: str) -> Any:
    raise jinja2.TemplateError(message)
