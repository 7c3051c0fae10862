"""Constant expressions, whose values are known when a prompt function is compiled."""

from __future__ import annotations

import ast
import builtins
from typing import Any

from cpucache.authoring.function import UNKNOWN, Function, constant, same

_PURE = ("range", "enumerate", "zip", "sorted", "reversed", "len", "min", "max", "sum", "abs", "round")
_TYPES = ("str", "int", "float", "bool", "list", "tuple", "dict")
KNOWN = frozenset({*_PURE, *_TYPES})
"""Builtin functions that a constant expression may call."""
_REFUSED = (ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom, ast.Lambda)
_IN_ANY_ORDER = ("sorted", "len", "min", "max")
"""Functions whose value does not depend on the order of a set."""
_SEARCHES = (ast.In, ast.NotIn)
_SET_OPERATIONS = (ast.BitOr, ast.BitAnd, ast.BitXor, ast.Sub)
_MOST = 10_000  # items of a loop


class Constants:
    """Constant names of one function while it is compiled.

    ``own``: names that the function itself binds; they hide the same names outside. ``values``: values of the constant
    ones among these. ``used``: outside names that were read: function, name and value.
    """

    def __init__(self, function: Function, own: set[str], values: dict[str, Any]) -> None:
        self._function = function
        self._own = own
        self.values = values
        self.used: list[tuple[Function, str, Any]] = []

    def name(self, name: str) -> Any:
        """Returns the value of a name, or ``UNKNOWN``. Adds a constant name outside the function to ``used``."""
        if name in self.values or name in self._own:
            return self.values.get(name, UNKNOWN)
        value = constant(self._function.find(name))
        if value is not UNKNOWN:
            self.used.append((self._function, name, value))
        return value

    def object(self, node: ast.expr) -> Any:
        """Returns the object of an outside name or of an attribute of a module or class, or ``UNKNOWN``."""
        if isinstance(node, ast.Name):
            return UNKNOWN if node.id in self._own else self._function.find(node.id)
        if isinstance(node, ast.Attribute):
            around = self.object(node.value)
            if type(around).__name__ in ("module", "type"):
                return getattr(around, node.attr, UNKNOWN)
        return UNKNOWN

    def value(self, node: ast.expr) -> Any:
        """Returns the value of an expression, or ``UNKNOWN``. Raises whatever evaluating the expression raises."""
        if isinstance(node, ast.Constant):
            return constant(node.value)
        if _is_set(node):
            return UNKNOWN
        names: dict[str, Any] = {"__builtins__": {}}
        inner: set[str] = set()
        loaded: list[str] = []
        for each in ast.walk(node):
            if isinstance(each, _REFUSED) or _depends_on_hashes(each):
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
        """Returns the items of a loop; ``None`` if the items, or the order of a set, may differ between processes."""
        value = self.value(node)
        if value is UNKNOWN or isinstance(value, set | frozenset):
            return None
        items = []
        for item in value:
            items.append(constant(item))
            if len(items) > _MOST or items[-1] is UNKNOWN:
                return None
        return items


def _depends_on_hashes(node: ast.AST) -> bool:
    """Whether a part of ``node`` may have a value that differs from process to process.

    The order of a set's elements differs: they can be counted, sorted and searched, and nothing else.
    """
    if isinstance(node, ast.Attribute):
        return node.attr.startswith("_")  # such as "text".__hash__()
    if isinstance(node, ast.Compare):
        parts = [part for part, sign in zip(node.comparators, node.ops, strict=True) if not isinstance(sign, _SEARCHES)]
        return any(map(_is_set, [node.left, *parts]))
    if isinstance(node, ast.Call):
        in_any_order = isinstance(node.func, ast.Name) and node.func.id in _IN_ANY_ORDER and not node.keywords
        return not in_any_order and any(map(_is_set, ast.iter_child_nodes(node)))
    return any(map(_is_set, ast.iter_child_nodes(node)))


def _is_set(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, _SET_OPERATIONS):
        # Sets among the operands are refused by themselves.
        return any(map(_is_view, (node.left, node.right)))
    return isinstance(node, ast.Set | ast.SetComp)


def _is_view(node: ast.AST) -> bool:
    """Whether ``node`` calls ``keys`` or ``items``, whose values act as sets."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("keys", "items")


def changed(used: list[tuple[Function, str, Any]]) -> bool:
    """Whether any of the outside names ``used`` has another value now."""
    return any(not same(value, constant(function.find(name))) for function, name, value in used)
