"""Expressions whose value is known when a function is compiled, for all they are made of is constant."""

from __future__ import annotations

import ast
import builtins
from typing import Any

from cpucache.authoring.function import UNKNOWN, Function, constant, same

_PURE = ("range", "enumerate", "zip", "sorted", "reversed", "len", "min", "max", "sum", "abs", "round")
_TYPES = ("str", "int", "float", "bool", "list", "tuple", "dict")
KNOWN = frozenset({*_PURE, *_TYPES})
"""The functions of Python that a constant expression may call."""
_REFUSED = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Lambda)
_MOST = 10_000  # items of a collection


class Constants:
    """What is constant in one function while it is compiled.

    ``own``: what the function itself names, which hides what is outside. ``values``: of these, the constant ones.
    ``used``: the names outside that something was made of, with what they stood for.
    """

    def __init__(self, function: Function, own: set[str], values: dict[str, Any]) -> None:
        self._function = function
        self._own = own
        self.values = values
        self.used: list[tuple[Function, str, Any]] = []

    def name(self, name: str) -> Any:
        """The value of a name, or ``UNKNOWN``."""
        if name in self.values or name in self._own:
            return self.values.get(name, UNKNOWN)
        value = constant(self._function.find(name))
        if value is not UNKNOWN:
            self.used.append((self._function, name, value))
        return value

    def object(self, node: ast.expr) -> Any:
        """What is called or entered: a name outside, or an attribute of a module. ``UNKNOWN`` for all else."""
        if isinstance(node, ast.Name):
            return UNKNOWN if node.id in self._own else self._function.find(node.id)
        if isinstance(node, ast.Attribute):
            around = self.object(node.value)
            if type(around).__name__ in ("module", "type"):
                return getattr(around, node.attr, UNKNOWN)
        return UNKNOWN

    def value(self, node: ast.expr) -> Any:
        """The value of an expression, or ``UNKNOWN``. Raises what evaluating it raises."""
        if isinstance(node, ast.Constant):
            return constant(node.value)
        names: dict[str, Any] = {"__builtins__": {}}
        inner: set[str] = set()
        loaded: list[str] = []
        for each in ast.walk(node):
            if isinstance(each, _REFUSED):
                return UNKNOWN
            if isinstance(each, ast.Name):
                inner.add(each.id) if isinstance(each.ctx, ast.Store) else loaded.append(each.id)
        for name in loaded:
            if name in inner:
                continue
            is_known = name in KNOWN and name not in self._own and self._function.find(name) is getattr(builtins, name)
            value = getattr(builtins, name) if is_known else self.name(name)
            if value is UNKNOWN:
                return UNKNOWN
            names[name] = value
        return eval(compile(ast.fix_missing_locations(ast.Expression(node)), self._function.file, "eval"), names)

    def items(self, node: ast.expr) -> list[Any] | None:
        """What a loop goes through, if that is constant and has an order that is the same in every process."""
        value = self.value(node)
        if value is UNKNOWN or isinstance(value, set | frozenset):
            return None
        items = []
        for item in value:
            items.append(constant(item))
            if len(items) > _MOST or items[-1] is UNKNOWN:
                return None
        return items


def changed(used: list[tuple[Function, str, Any]]) -> bool:
    """Whether any of the names outside stands for something else by now."""
    return any(not same(value, constant(function.find(name))) for function, name, value in used)
