"""Expressions of Jinja: names for them, and the values of constant ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

_SIGNS = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}


def said(node: nodes.Node) -> str:
    """Returns an expression in words, from which a name can be derived."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Const):
        return str(node.value)
    if isinstance(node, nodes.Getattr):
        return f"{said(node.node)}.{node.attr}"
    if isinstance(node, nodes.Getitem):
        return f"{said(node.node)}.{said(node.arg)}"
    if isinstance(node, nodes.Not):
        return f"not {said(node.node)}"
    if isinstance(node, nodes.And | nodes.Or):
        return f"{said(node.left)} {'and' if isinstance(node, nodes.And) else 'or'} {said(node.right)}"
    if isinstance(node, nodes.Compare):
        return " ".join((said(node.expr), *(f"{_SIGNS[each.op]} {said(each.expr)}" for each in node.ops)))
    if isinstance(node, nodes.Test):
        of = said(node.node)
        return of if node.name == "defined" else f"not {of}" if node.name == "undefined" else f"{of} {node.name}"
    if isinstance(node, nodes.Filter | nodes.Call) and node.node is not None:
        return said(node.node)
    return " ".join(filter(None, map(said, node.iter_child_nodes())))


class Known:
    """Names of a template that have constant values at the point that is being converted."""

    def __init__(self, environment: jinja2.Environment) -> None:
        self._environment = environment
        self._values: dict[str, Any] = {}

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Limits names that are bound inside the block to the block."""
        outer = dict(self._values)
        try:
            yield
        finally:
            self._values = outer

    def bind(self, target: nodes.Node, value: Any) -> dict[str, Any] | None:
        """Binds the names of ``target`` to a value. Returns them, or ``None`` if the value does not fit."""
        if isinstance(target, nodes.Name):
            bound = {target.name: value}
        elif isinstance(target, nodes.Tuple) and isinstance(value, list | tuple) and len(value) == len(target.items):
            parts = [self.bind(each, part) for each, part in zip(target.items, value, strict=True)]
            bound = {name: part for each in parts if each for name, part in each.items()}
        else:
            return None
        self._values.update(bound)
        return bound

    def forget(self, target: nodes.Node) -> None:
        """Forgets the values of the names of ``target``."""
        for name in target.find_all(nodes.Name):
            self._values.pop(name.name, None)
        if isinstance(target, nodes.Name):
            self._values.pop(target.name, None)

    def loop(self, at: int, count: int) -> None:
        """Binds Jinja's ``loop`` for item ``at``, counted from 0, of ``count``."""
        self._values["loop"] = {
            "index": at + 1,
            "index0": at,
            "revindex": count - at,
            "revindex0": count - at - 1,
            "first": not at,
            "last": at == count - 1,
            "length": count,
        }

    def value(self, node: nodes.Node) -> tuple[bool, Any]:
        """Returns whether the value of an expression is known, and the value."""
        try:
            constant = _Filled(self._values).visit(deepcopy(node))
            return True, constant.as_const(nodes.EvalContext(self._environment))
        except Exception:  # whatever the error, the value is not known before the template is rendered
            return False, None


class _Filled(NodeTransformer):
    """Replaces names by constants with their values."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def visit_Name(self, node: nodes.Name) -> nodes.Node:  # noqa: N802 - Jinja calls it by this name
        return nodes.Const(self._values[node.name]) if node.name in self._values else node
