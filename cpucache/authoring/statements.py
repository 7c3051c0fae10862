"""Properties of a function's statements that follow from their syntax only."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from cpucache.authoring.writing import slug

Ends: TypeAlias = Literal["never", "maybe", "always"]
"""Whether a block ends its function with ``return``."""
_INSTEAD = {
    ast.While: "the text of a `while` loop is not known before a call: loop over a constant collection with `for`",
    ast.AsyncFor: "the items of `async for` are not known before a call: loop over a constant collection with `for`",
    ast.AsyncWith: "`async with` can't be compiled: leave it out",
    ast.Try: "the text of `try` is not known before a call: compute the value earlier, and pass it as an argument",
    ast.Break: "`break` can't be compiled: put an `if` around the text that is left out",
    ast.Continue: "`continue` can't be compiled: put an `if` around the text that is left out",
    ast.FunctionDef: "a function inside a prompt: define it outside, with @cpucache.prompt, and call it here",
    ast.AsyncFunctionDef: "a function inside a prompt: define it outside, with @cpucache.prompt, and call it here",
    ast.ClassDef: "a class inside a prompt: define it outside",
    ast.Import: "an import inside a prompt: import outside the function",
    ast.ImportFrom: "an import inside a prompt: import outside the function",
    ast.Raise: "`raise` can't be compiled: check arguments before the call",
    ast.Assert: "`assert` can't be compiled: check arguments before the call",
    ast.Global: "a prompt can't change variables outside: pass values as arguments",
    ast.Nonlocal: "a prompt can't change variables outside: pass values as arguments",
    ast.Delete: "`del` can't be compiled: leave it out",
}


def instead(statement: ast.stmt) -> str:
    """Returns why a prompt function can't hold a statement, and what to write instead."""
    usual = "this statement can't be compiled: write strings, and pass values as arguments"
    return _INSTEAD.get(type(statement), usual)


def stored(tree: ast.AST) -> dict[str, int]:
    """Returns the names that a function assigns, with the number of assignments."""
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        elif isinstance(node, ast.MatchAs | ast.MatchStar):
            name = node.name
        elif isinstance(node, ast.MatchMapping):
            name = node.rest
        if name:
            found[name] = found.get(name, 0) + 1
    return found


def chain(statement: ast.If, otherwise: Sequence[ast.stmt]) -> list[tuple[ast.expr | None, Sequence[ast.stmt], int]]:
    """Returns the arms of ``if``: condition (``None``: ``else``), statements and line.

    ``otherwise``: statements of the ``else`` arm if ``if`` has none.
    """
    arms: list[tuple[ast.expr | None, Sequence[ast.stmt], int]] = []
    while True:
        arms.append((statement.test, statement.body, statement.lineno))
        match statement.orelse:
            case [ast.If() as following]:
                statement = following
            case []:
                return [*arms, (None, otherwise, otherwise[0].lineno)] if otherwise else arms
            case body:
                return [*arms, (None, body, body[0].lineno)]


def ends_without_else(statement: ast.If) -> bool:
    """Whether ``if`` has no ``else``, and each of its arms ends the function."""
    arms = chain(statement, ())
    return arms[-1][0] is not None and all(_ends(body) for _, body, _ in arms)


def _ends(body: Sequence[ast.stmt]) -> bool:
    """Whether a block always ends the function."""
    last = body[-1]
    if isinstance(last, ast.If):
        arms = chain(last, ())
        return arms[-1][0] is None and all(_ends(inner) for _, inner, _ in arms)
    return isinstance(last, ast.Return) or (isinstance(last, ast.With) and _ends(last.body))


def ended_by(ends: Sequence[Ends], complete: bool) -> Ends:
    """Returns whether a choice ends the function. ``complete``: one of the arms is always taken."""
    if complete and all(end == "always" for end in ends):
        return "always"
    return "never" if all(end == "never" for end in ends) else "maybe"


def is_nothing(node: ast.expr | None) -> bool:
    """Whether an expression is the literal ``None``."""
    return isinstance(node, ast.Constant) and node.value is None


def takes_all(case: ast.match_case) -> bool:
    """Whether a case of ``match`` holds for every subject."""
    return isinstance(case.pattern, ast.MatchAs) and case.pattern.pattern is None and case.guard is None


def is_plain(case: ast.match_case) -> bool:
    """Whether the subject by itself decides if a case holds."""
    known = (ast.MatchValue, ast.MatchSingleton, ast.MatchOr, ast.MatchAs, ast.Constant, ast.UnaryOp, ast.USub)
    nodes = list(ast.walk(case.pattern))
    return (
        case.guard is None
        and all(isinstance(node, known) for node in nodes)
        and not any(isinstance(node, ast.MatchAs) and node.name for node in nodes)
    )


def names_of(target: ast.expr) -> list[str]:
    """Returns the names that an assignment to ``target`` binds."""
    return [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]


def item_name(bound: dict[str, Any]) -> str:
    """Returns a name for the module of an item, from its first text, or else from its first value."""
    texts = ((name, value) for name, value in bound.items() if isinstance(value, str) and value.strip())
    name, value = next(texts, next(iter(bound.items())))
    return slug(str(value), otherwise=name)
