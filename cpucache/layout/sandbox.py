"""The environment that chat templates run in: they are programs, and their authors are not trusted.

Jinja's own sandbox separates a template from the rest of the process. This one also bounds its work. A template spends
from a budget for each value that it reads or creates, by size, and for each round of a loop. It therefore ends soon, at
the same point on every machine, and creates no large values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST = 1 << 19
"""Default budget of a template, in characters and elements. The templates of well-known models spend a few thousand."""
LONGEST = 1 << 18
"""Maximum length of a template, in characters."""
_ROUND = 8
"""Cost of each round of a loop and each call of a macro or block, in addition to the text in it."""
_LARGEST = 10_000
"""Largest number that a filter or function accepts, as it may be a width."""
_LOOKED_AT = (nodes.Name, nodes.Getattr, nodes.Getitem, nodes.List, nodes.Tuple, nodes.Dict, nodes.Concat)
_FORMATS = ("do_format", "format", "format_map")
_WIDTH = re.compile(r"\*|\d{4}")


class Given(list[Any]):
    """A list that the caller passes to a template. Reading it costs 1; its elements are charged when read."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox with a budget for what is rendered in it. Raises ``jinja2.TemplateError`` once the budget is spent."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self.spend, **options)
        self._spent = 0
        self._budget = MOST
        self.filters = {name: self.bounded(each) for name, each in self.filters.items()} | {"_spend": self.spend}
        # lipsum generates long texts.
        del self.globals["lipsum"]

    def renew(self, budget: int) -> None:
        """Resets the amount spent to 0 and sets the budget."""
        self._spent, self._budget = 0, budget

    def spend(self, value: Any) -> Any:
        """Charges a value to the budget, by its size, and returns the value."""
        todo = [value]
        while todo:
            each = todo.pop()
            self._pay(1)
            if isinstance(each, (str, bytes, range)):
                self._pay(len(each))
            elif isinstance(each, int):
                self._pay(each.bit_length() // 8)
            elif isinstance(each, Mapping):
                todo += [*each.keys(), *each.values()]
            elif isinstance(each, Namespace):
                todo.append(object.__getattribute__(each, "_Namespace__attrs"))
            elif isinstance(each, (list, tuple, set, frozenset)) and not isinstance(each, Given):
                todo += each
        return value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as the base class does
        # The sandbox wraps str.format and format_map: unwrap them to charge the format string.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        function = wraps(__obj, assigned=["__name__"], updated=[])(partial(super().call, __context, __obj))
        return __self._within(function, (owner, *args, *kwargs.values()), args, kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _demand(abs(right) < 64)
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                _demand(not isinstance(other, int) or not hasattr(one, "__len__") or len(one) * other < MOST)
        if operator == "%" and isinstance(left, str):
            _demand(not _WIDTH.search(left))
        return self.spend(super().call_binop(context, operator, left, right))

    def bounded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wraps a filter so that its arguments and its result are charged to the budget."""

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            return self._within(function, (*args, *kwargs.values()), args, kwargs)

        return bounded

    def _within(self, function: Callable[..., Any], given: tuple[Any, ...], args: Any, kwargs: Any) -> Any:
        """Calls a function and charges its arguments and result. Refuses arguments that could make the result large."""
        for each in given:
            self.spend(each)
            _demand(not isinstance(each, (int, float)) or abs(each) <= _LARGEST)
        # Sizes multiply where one text replaces each part of another. Widths in formats also create long texts.
        texts = [each for each in given if isinstance(each, str)]
        _demand(math.prod(len(each) + 1 for each in texts) < MOST * 8)
        _demand(getattr(function, "__name__", "") not in _FORMATS or not any(map(_WIDTH.search, texts)))
        return self.spend(function(*args, **kwargs))

    def _pay(self, cost: int) -> None:
        self._spent += cost
        _demand(self._spent <= self._budget)

    def _round(self, text: int) -> str:
        self._pay(_ROUND + text)
        return ""

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        _demand(len(source) <= LONGEST)
        tree: nodes.Template = _Paying().visit(super()._parse(source, name, filename))
        return tree


class _Paying(NodeTransformer):
    """Adds the calls that charge the budget to a template's syntax tree."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)):
            text = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
            node.body.insert(0, self._statement(node, text))
        if isinstance(node, _LOOKED_AT) and getattr(node, "ctx", "load") == "load":
            return nodes.Filter(node, "_spend", [], [], None, None, lineno=node.lineno, environment=node.environment)
        return node

    def _statement(self, node: nodes.Node, text: int) -> nodes.Node:
        place = {"lineno": node.lineno, "environment": node.environment}
        paying = nodes.EnvironmentAttribute("_round", **place)
        return nodes.ExprStmt(nodes.Call(paying, [nodes.Const(text, **place)], [], None, None, **place), **place)


def _demand(fulfilled: bool) -> None:
    if not fulfilled:
        raise jinja2.TemplateError("the template needs too much time or memory")
