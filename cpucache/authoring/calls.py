"""Calls inside prompt functions: which prompt function such a call refers to."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cpucache.authoring.constants import Constants
from cpucache.authoring.function import UNKNOWN, Function, constant


class Definition:
    """A prompt function as it was defined. ``name``: name of its schema. ``is_static``: it is a ``staticmethod``."""

    def __init__(self, function: Function, name: str, *, is_static: bool) -> None:
        self.function = function
        self.name = name
        self.is_static = is_static


class Method:
    """A definition as an attribute of a class (``receiver`` is ``None``) or of an object. ``owner``: the class."""

    def __init__(self, definition: Definition, receiver: Any, owner: type) -> None:
        self.function = definition.function
        self.name = definition.name
        self.receiver = receiver
        self.owner = owner


@dataclass(frozen=True)
class Callee:
    """A prompt function to be compiled.

    ``name``: name of its schema. ``owner``: class in which the function was found. ``receiver``: expression of the
    object that the method is called on. ``constants``: values of the arguments that are known before a call.
    """

    function: Function
    name: str
    owner: type | None = None
    receiver: ast.expr | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)

    def called(self, constants: Mapping[str, Any], defaults: Mapping[str, Any]) -> Callee:
        """Returns the callee with the constant arguments of one call, and with constant defaults for omitted ones."""
        known = {name: value for name, each in defaults.items() if (value := constant(each)) is not UNKNOWN}
        return replace(self, constants={**known, **constants})

    @property
    def self(self) -> str | None:
        """Name of the first parameter of a method, which holds the object; ``None`` for a plain function."""
        return next(iter(self.function.signature.parameters), None) if self.owner is not None else None


def callee_of(node: ast.expr, caller: Callee, constants: Constants) -> Callee | None:
    """Returns the prompt function that ``node`` refers to inside ``caller``; ``None`` if it is something else."""
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == caller.self:
            owner = caller.owner
        else:
            around = constants.object(node.value)
            owner = None if around is UNKNOWN or isinstance(around, type) else type(around)
        if owner is not None and (found := inspect.getattr_static(owner, node.attr, None)) is not None:
            definition = definition_of(found)
            if isinstance(definition, Definition):
                # ``staticmethod`` may be on either side of the decorator.
                if definition.is_static or isinstance(found, staticmethod):
                    return Callee(definition.function, definition.name)
                return Callee(definition.function, definition.name, owner, node.value)
    found = definition_of(constants.object(node))
    if isinstance(found, Method):
        receiver = (
            None if found.receiver is None else ast.copy_location(ast.Attribute(node, "receiver", ast.Load()), node)
        )
        return Callee(found.function, found.name, found.owner, receiver)
    return Callee(found.function, found.name) if isinstance(found, Definition) else None


def definition_of(found: Any) -> Definition | Method | None:
    """Returns the prompt function in an object, under other decorators too; ``None`` if there is none."""
    while not isinstance(found, Definition | Method):
        if isinstance(found, staticmethod):
            found = found.__func__
        elif hasattr(found, "__wrapped__") and callable(found):
            found = found.__wrapped__
        else:
            return None
    return found
