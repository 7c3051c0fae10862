"""Calls of prompt functions: the prompt that the arguments of a call select."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cpucache.authoring.parts import Always, Branches, Call, End, Field, Match, Part, Set, Tagged
from cpucache.authoring.writing import impossible
from cpucache.errors import InputError
from cpucache.pml.tree import Prompt, Reference


@dataclass
class _Chosen:
    """A module that a call includes, or the schema, with its arguments."""

    name: str
    arguments: dict[str, str] = field(default_factory=dict)
    children: list[Reference] = field(default_factory=list)

    def reference(self) -> Reference:
        """The module as a prompt references it."""
        return Reference(self.name, self.arguments, tuple(self.children), 1)


def chosen(name: str, parts: Sequence[Part], names: dict[str, Any]) -> Prompt:
    """Returns the prompt of a call for the schema ``name``.

    Conditions and fields are evaluated with ``names``, to which the values that the function assigns are added. Raises
    ``InputError`` for an argument with a character that PML can't hold, and whatever the function's expressions raise.
    """
    root = _Chosen(name)
    _Calling(names).scope(parts, root)
    return Prompt(name, root.arguments, tuple(root.children), f"<prompt {name}>", 1)


class _Calling:
    """One call of a prompt function. ``_ended``: whether the call has reached a ``return``."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._names = names
        self._ended = False

    def scope(self, parts: Sequence[Part], into: _Chosen) -> None:
        """Adds what a call includes of ``parts`` to the module ``into``."""
        for part in parts:
            if self._ended:
                return
            self._part(part, into)

    def _part(self, part: Part, into: _Chosen) -> None:
        if isinstance(part, Field):
            into.arguments[part.parameter.name] = self._filled(part)
        elif isinstance(part, Tagged):
            self.scope(part.parts, into)
        elif isinstance(part, Branches | Match):
            if arm := part.taken(self._names):
                self._module(arm.name, arm.parts, into)
        elif isinstance(part, Always):
            self._names.update(part.constants)
            self._module(part.name, part.parts, into)
        elif isinstance(part, Call):
            arguments = {name: value.value(self._names) for name, value in part.arguments.items()}
            inner = _Chosen(part.name)
            _Calling(part.names() | arguments).scope(part.parts, inner)
            into.children.append(inner.reference())
        elif isinstance(part, Set):
            self._names[part.name] = part.expression.value(self._names)
        elif isinstance(part, End):
            self._ended = True

    def _module(self, name: str, parts: Sequence[Part], into: _Chosen) -> None:
        inner = _Chosen(name) if name else into
        self.scope(parts, inner)
        if name:
            into.children.append(inner.reference())

    def _filled(self, field: Field) -> str:
        text = str(field.expression.value(self._names))
        if char := impossible(text):
            raise InputError(
                f"the argument '{field.parameter.name}' contains {char}, which PML can't contain: remove it"
            )
        return text
