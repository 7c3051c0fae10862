"""Parts of a compiled prompt function: nodes of a schema, and the conditions under which a call includes them.

A call evaluates only the expressions kept here; the function itself is never run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import Any, TypeAlias

from cpucache.authoring.writing import joined
from cpucache.pml.tree import Module, Parameter, Role, RoleName, SchemaNode, Text, Union


class Expression:
    """An expression of a function. Tracebacks of its errors name the line in the function's file."""

    def __init__(self, node: ast.expr, file: str) -> None:
        self._node = node
        self._file = file

    @cached_property
    def _code(self) -> CodeType:
        return compile(ast.fix_missing_locations(ast.Expression(self._node)), self._file, "eval")

    def value(self, names: dict[str, Any]) -> Any:
        """Returns the value of the expression with these ``names``."""
        return eval(self._code, names)


@dataclass(frozen=True, eq=False)
class Field:
    """A parameter, and the expression of its argument."""

    parameter: Parameter
    expression: Expression


@dataclass(frozen=True, eq=False)
class Tagged:
    """Parts inside a role tag."""

    role: RoleName
    parts: tuple[Part, ...]
    line: int


@dataclass(frozen=True, eq=False)
class Arm:
    """One branch of ``if`` or ``match``.

    ``name``: name of its module; empty if the branch has no text. ``when``: condition of ``if`` and ``elif``.
    """

    name: str
    parts: tuple[Part, ...]
    when: Expression | None
    line: int


@dataclass(frozen=True, eq=False)
class Branches:
    """``if``, ``elif`` and ``else``: the first arm whose condition holds is taken."""

    arms: tuple[Arm, ...]
    line: int

    def taken(self, names: dict[str, Any]) -> Arm | None:
        """Returns the arm that a call takes, or ``None``."""
        return next((arm for arm in self.arms if arm.when is None or arm.when.value(names)), None)


class Match:
    """``match``. A statement with the same patterns, whose cases only assign their number, finds the case."""

    _FOUND = "__case__"

    def __init__(self, arms: tuple[Arm, ...], statement: ast.Match, file: str) -> None:
        self.arms = arms
        self.line = statement.lineno
        self._statement = statement
        self._file = file

    @cached_property
    def _code(self) -> CodeType:
        cases = [
            ast.match_case(
                case.pattern, case.guard, [ast.Assign([ast.Name(self._FOUND, ast.Store())], ast.Constant(at))]
            )
            for at, case in enumerate(self._statement.cases)
        ]
        statement = ast.copy_location(ast.Match(self._statement.subject, cases), self._statement)
        return compile(ast.fix_missing_locations(ast.Module([statement], [])), self._file, "exec")

    def taken(self, names: dict[str, Any]) -> Arm | None:
        """Returns the arm that a call takes, or ``None``. Adds the names that its pattern captures to ``names``."""
        names.pop(self._FOUND, None)
        exec(self._code, names)
        found = names.pop(self._FOUND, None)
        return None if found is None else self.arms[found]


@dataclass(frozen=True, eq=False)
class Always:
    """A module that every call includes unless the function has returned. ``constants``: values of names in it."""

    name: str
    parts: tuple[Part, ...]
    constants: dict[str, Any]
    line: int


@dataclass(frozen=True, eq=False)
class Call:
    """A call of another prompt function, whose parts are a module.

    ``names``: returns the values of the names that the other function can read, without the arguments of this call.
    ``arguments``: expressions of these arguments.
    """

    name: str
    parts: tuple[Part, ...]
    names: Callable[[], dict[str, Any]]
    arguments: dict[str, Expression]
    line: int


@dataclass(frozen=True, eq=False)
class Set:
    """An assignment of the value of ``expression`` to ``name``."""

    name: str
    expression: Expression


@dataclass(frozen=True, eq=False)
class End:
    """``return``."""


Part: TypeAlias = Text | Field | Tagged | Branches | Match | Always | Call | Set | End


def has_text(parts: Sequence[Part]) -> bool:
    """Whether parts stand for at least one node of the schema."""
    return bool(nodes(parts))


def nodes(parts: Sequence[Part]) -> list[SchemaNode]:
    """Returns the nodes of the schema that parts stand for."""
    return joined(node for part in parts if (node := _node(part)) is not None)


def _node(part: Part) -> SchemaNode | None:
    if isinstance(part, Text):
        return part
    if isinstance(part, Field):
        return part.parameter
    if isinstance(part, Tagged):
        return Role(part.role, _inside(part.parts), part.line)
    if isinstance(part, Always | Call):
        return Module(part.name, _inside(part.parts), True, part.line) if part.name else None
    if isinstance(part, Branches | Match):
        modules = tuple(Module(arm.name, _inside(arm.parts), True, arm.line) for arm in part.arms if arm.name)
        return Union(modules, None, part.line) if len(modules) > 1 else modules[0] if modules else None
    return None


def _inside(parts: Sequence[Part]) -> tuple[SchemaNode, ...]:
    return tuple(nodes(parts))
