"""Strings that are statements of a function, as text: one line each; triple-quoted strings are dedented."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import TypeAlias

Pieces: TypeAlias = list[str | ast.FormattedValue]
_SPACE = " \t\r\n"
_FIELD = "\0"
"""Character that stands for a field while a text is dedented. PML can't hold it."""


def pieces_of(node: ast.Constant | ast.JoinedStr, *, triple_quoted: bool) -> Pieces:
    """Returns the texts and fields of a string that is a statement by itself.

    The string is a line of the prompt: a newline is appended unless the string ends in white space. A triple-quoted
    string of several lines is dedented by the indentation that its lines share; a blank first or last line is dropped.
    An empty string has no pieces.
    """
    values: Sequence[ast.expr] = node.values if isinstance(node, ast.JoinedStr) else [node]
    fields = [value for value in values if isinstance(value, ast.FormattedValue)]
    text = "".join(_FIELD if isinstance(value, ast.FormattedValue) else _string(value) for value in values)
    if not text:
        return []
    text = _moved(text) if triple_quoted and "\n" in text else line(text)
    pieces: Pieces = []
    for at, piece in enumerate(text.split(_FIELD)):
        if at:
            pieces.append(fields[at - 1])
        if piece:
            pieces.append(piece)
    return pieces


def line(text: str) -> str:
    """Returns a text with a newline appended, unless the text is empty or ends in white space."""
    return text if not text or text[-1] in _SPACE else f"{text}\n"


def has_nul(node: ast.Constant | ast.JoinedStr) -> bool:
    """Whether a string holds U+0000, which ``pieces_of`` would take for a field."""
    return any(isinstance(each, ast.Constant) and _FIELD in str(each.value) for each in ast.walk(node))


def _string(node: ast.expr) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


def _moved(text: str) -> str:
    first, *rest = text.split("\n")
    indents = [each[: len(each) - len(each.lstrip(" \t"))] for each in rest if each.strip()]
    margin = next((indent for indent in sorted(indents) if all(each.startswith(indent) for each in indents)), "")
    lines = [each.removeprefix(margin) if each.strip() else "" for each in rest]
    if first.strip():
        lines.insert(0, first)
    if not rest[-1].strip():
        lines.pop()
    return "".join(f"{each}\n" for each in lines)
