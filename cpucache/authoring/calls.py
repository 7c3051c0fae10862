"""Which prompt function a call inside another one means."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cpucache.authoring.constants import Constants
from cpucache.authoring.function import UNKNOWN, Function, constant


class Definition:
    """A function that is a prompt. ``name``: of its schema. ``is_static``: it takes no object, though in a class."""

    def __init__(self, function: Function, name: str, *, is_static: bool) -> None:
        self.function = function
        self.name = name
        self.is_static = is_static


class Method:
    """A definition as an attribute of a class (``receiver`` is ``None``) or of an object."""

    def __init__(self, definition: Definition, receiver: Any, owner: type) -> None:
        self.function = definition.function
        self.name = definition.name
        self.receiver = receiver
        self.owner = owner


@dataclass(frozen=True)
class Callee:
    """A function to be compiled.

    ``name``: of its schema. ``owner``: the class that it is found in. ``receiver``: what gives the object that it is
    called on. ``constants``: arguments that are known.
    """

    function: Function
    name: str
    owner: type | None = None
    receiver: ast.expr | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)

    def called(self, constants: Mapping[str, Any], defaults: Mapping[str, Any]) -> Callee:
        """The same with arguments that are constants, some of them left out."""
        known = {name: value for name, each in defaults.items() if (value := constant(each)) is not UNKNOWN}
        return replace(self, constants={**known, **constants})

    @property
    def self(self) -> str | None:
        """The argument that is the object, in a method."""
        return next(iter(self.function.signature.parameters), None) if self.owner is not None else None


def callee_of(node: ast.expr, caller: Callee, constants: Constants) -> Callee | None:
    """The prompt function that ``node`` names inside ``caller``; ``None`` if it names something else."""
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == caller.self:
            owner = caller.owner
        else:
            around = constants.object(node.value)
            owner = None if around is UNKNOWN or isinstance(around, type) else type(around)
        if owner is not None and (found := inspect.getattr_static(owner, node.attr, None)) is not None:
            definition = definition_of(found)
            if isinstance(definition, Definition):
                receiver = None if definition.is_static else node.value
                return Callee(definition.function, definition.name, owner, receiver)
    found = definition_of(constants.object(node))
    if isinstance(found, Method):
        receiver = (
            None if found.receiver is None else ast.copy_location(ast.Attribute(node, "receiver", ast.Load()), node)
        )
        return Callee(found.function, found.name, found.owner, receiver)
    return Callee(found.function, found.name) if isinstance(found, Definition) else None


def definition_of(found: Any) -> Definition | Method | None:
    """The prompt function in an object, under other decorators as well."""
    while not isinstance(found, Definition | Method):
        if isinstance(found, staticmethod):
            found = found.__func__
        elif hasattr(found, "__wrapped__") and callable(found):
            found = found.__wrapped__
        else:
            return None
    return found
