"""Syntax trees of functions that were written in a file, in a notebook, or at Python's interactive prompt."""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TypeAlias

from cpucache.errors import PMLError

Def: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
_PROMPT = "<stdin>"
"""File name of lines typed at Python's prompt, up to 3.12. From 3.13 on ``inspect`` finds the lines."""
_REMEMBERED = 2_000  # lines of history that are searched


@dataclass(frozen=True)
class Written:
    """Source of a function. ``lines``: lines of the function, by line number in the file."""

    file: str
    tree: Def
    lines: dict[int, str]

    def is_triple_quoted(self, node: ast.expr) -> bool:
        """Whether a string literal is written in triple quotes."""
        line = self.lines.get(node.lineno, "").encode()[node.col_offset :].decode(errors="replace")
        return line.lstrip("rRfFuU")[:3] in ('"""', "'''")


def typed(function: FunctionType) -> list[str] | None:
    """Returns the lines of a function that was typed at Python's prompt, from its history; ``None`` for others."""
    readline = sys.modules.get("readline")
    code = function.__code__
    if readline is None or code.co_filename != _PROMPT:
        return None
    count = readline.get_current_history_length()
    history = [readline.get_history_item(at) or "" for at in range(max(1, count - _REMEMBERED), count + 1)]
    heads = (f"def {code.co_name}(", f"async def {code.co_name}(")
    start = max((at for at, line in enumerate(history) if line.startswith(heads)), default=None)
    if start is None:
        return None
    while start and history[start - 1].startswith("@"):
        start -= 1
    lines = [f"{line}\n" for line in history[start:]]
    return lines if _is_of(lines, code) else None


def _is_of(lines: list[str], code: CodeType) -> bool:
    """Whether these lines compile to the code of the function."""
    try:
        module = compile("".join(lines), _PROMPT, "exec")
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(each, CodeType) and each.co_code == code.co_code for each in module.co_consts)


def written(function: FunctionType, lines: list[str] | None = None) -> Written:
    """Returns the source of a function. ``lines``: its lines, if the caller knows them already.

    Raises ``PMLError`` for a lambda, and if the source can't be read or is no longer that of the function.
    """
    code = function.__code__
    file, start = code.co_filename, 1
    if code.co_name == "<lambda>":
        raise PMLError("a prompt function needs a name: write it with def", file=file, line=code.co_firstlineno)
    if lines is None:
        try:
            lines, start = inspect.getsourcelines(code)
        except (OSError, TypeError) as error:
            reason = (
                f"the source of '{code.co_name}' can't be read here: define it in a file, in a notebook, or at a "
                "prompt that keeps its history"
            )
            raise PMLError(reason, file=file, line=code.co_firstlineno) from error
    text = "".join(lines)
    # A function inside a class or function stays indented: dedenting it would change its multi-line strings.
    inner = text[:1] in (" ", "\t")
    # Empty lines before the function keep its line numbers.
    before = "\n" * (start - 1)
    try:
        tree = ast.parse(before[:-1] + "if 1:\n" + text if inner else before + text)
    except SyntaxError as error:
        changed = f"the source of '{code.co_name}' has changed since the function was loaded: load it again"
        raise PMLError(changed, file=file, line=code.co_firstlineno) from error
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
            return Written(file, node, {start + at: line for at, line in enumerate(lines)})
    raise PMLError(
        f"the source of '{code.co_name}' has changed since the function was loaded: load it again",
        file=file,
        line=start,
    )
