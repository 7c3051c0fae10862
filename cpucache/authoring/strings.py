"""Bare strings of a function as pieces of text: a line each, in which triple-quoted ones are moved to the left."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import TypeAlias

Pieces: TypeAlias = list[str | ast.FormattedValue]
_SPACE = " \t\r\n"
_FIELD = "\0"
"""What stands for a field while a text is moved. It can't stand in PML itself."""


def pieces_of(node: ast.Constant | ast.JoinedStr, *, triple_quoted: bool) -> Pieces:
    """The texts and fields of a string that stands by itself.

    It is a line of the prompt: a newline follows, unless it ends in white space as it is written. A triple-quoted one
    is moved to the left by the indentation that its lines share, and begins and ends with its first and last line of
    text. An empty string gives nothing.
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
    """A text with a newline behind it, unless it is empty or ends in white space."""
    return text if not text or text[-1] in _SPACE else f"{text}\n"


def has_nul(node: ast.Constant | ast.JoinedStr) -> bool:
    """Whether a string holds the character that nothing else can be told from."""
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
