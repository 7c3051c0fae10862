"""What a prompt function is compiled into: nodes of a schema, with what decides in a call whether they are included.

Nothing of a function is run but the expressions kept here, and these only in a call.
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
    """An expression of a function, evaluated by names. What it raises has its place in the function's file."""

    def __init__(self, node: ast.expr, file: str) -> None:
        self._node = node
        self._file = file

    @cached_property
    def _code(self) -> CodeType:
        return compile(ast.fix_missing_locations(ast.Expression(self._node)), self._file, "eval")

    def value(self, names: dict[str, Any]) -> Any:
        """What it gives."""
        return eval(self._code, names)


@dataclass(frozen=True, eq=False)
class Field:
    """A parameter, and the expression that fills it."""

    parameter: Parameter
    expression: Expression


@dataclass(frozen=True, eq=False)
class Tagged:
    """What stands inside a role tag."""

    role: RoleName
    parts: tuple[Part, ...]
    line: int


@dataclass(frozen=True, eq=False)
class Arm:
    """A branch. ``name``: of its module, empty where there is nothing to be a module. ``when``: ``None`` for else."""

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
        """The arm of a call."""
        return next((arm for arm in self.arms if arm.when is None or arm.when.value(names)), None)


class Match:
    """``match``: which case holds is found by a statement with the same patterns, whose cases only say so."""

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
        """The arm of a call. What its pattern captures is added to ``names``."""
        names.pop(self._FOUND, None)
        exec(self._code, names)
        found = names.pop(self._FOUND, None)
        return None if found is None else self.arms[found]


@dataclass(frozen=True, eq=False)
class Always:
    """A module that every call includes, unless the function has ended. ``constants``: names that have values in it."""

    name: str
    parts: tuple[Part, ...]
    constants: dict[str, Any]
    line: int


@dataclass(frozen=True, eq=False)
class Call:
    """A call of another prompt function, whose parts are a module.

    ``names`` gives what its names stand for besides its arguments. ``arguments``: each by its expression.
    """

    name: str
    parts: tuple[Part, ...]
    names: Callable[[], dict[str, Any]]
    arguments: dict[str, Expression]
    line: int


@dataclass(frozen=True, eq=False)
class Set:
    """A value kept under a name."""

    name: str
    expression: Expression


@dataclass(frozen=True, eq=False)
class End:
    """``return``."""


Part: TypeAlias = Text | Field | Tagged | Branches | Match | Always | Call | Set | End


def has_text(parts: Sequence[Part]) -> bool:
    """Whether parts leave anything in the schema."""
    return bool(nodes(parts))


def nodes(parts: Sequence[Part]) -> list[SchemaNode]:
    """The nodes of a schema that parts stand for."""
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
