"""Unfinished prompts: possible continuations, and the leading tokens that no continuation changes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cpucache.layout import Tokens
from cpucache.layout.vocabulary import common
from cpucache.pml import tree
from cpucache.pml.tree import Prompt, Turn

_LAST_BLANK = re.compile(r"\s(?=\S*\Z)")
# Samples of text after a blank. In many vocabularies a letter joins the blank before it in one token; a digit or a line
# break does not.
_WORDS = ("1", "A")
_BLANKS = ("\nA", " A")


def written(text: str) -> str:
    """The prefix of an unfinished text that counts as final: everything up to its last blank, included."""
    last = _LAST_BLANK.search(text)
    return text[: last.end()] if last else ""


def continued(text: str) -> list[str]:
    """Samples of how an unfinished text may continue after its last blank."""
    head = written(text)
    return [head + each for each in (*_WORDS, *(_BLANKS if head and head == text else ()))]


def certain(tokens: Tokens, others: Sequence[Tokens]) -> int:
    """Number of leading tokens that an unfinished prompt shares with all of its possible continuations.

    Args:
        tokens: Tokens of the prompt as it stands.
        others: Tokens of the prompt with each possible continuation.
    """
    return min((common(tokens, other) for other in others), default=len(tokens))


def rewritten(prompt: Any, text: str | None) -> list[tuple[Any, str | None]]:
    """Possible continuations of an unfinished prompt, each as a prompt and a plain text, one of them ``None``.

    Args:
        prompt: Parsed prompt, message, or list of messages. Tokens have no continuations.
        text: Plain text instead of a prompt.
    """
    if text is not None:
        return [(None, each) for each in continued(text)]
    if isinstance(prompt, str):
        return [(each, None) for each in continued(prompt)]
    if isinstance(prompt, Prompt):
        *before, last = prompt.children or (Turn("user", "", prompt.line),)
        if not isinstance(last, Turn | tree.Text):
            before, last = [*before, last], tree.Text("", prompt.line)
        return [(replace(prompt, children=(*before, replace(last, text=each))), None) for each in continued(last.text)]
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[-1], Mapping):
        *former, message = prompt
        return [([*former, {**message, "content": each}], None) for each in continued(str(message["content"]))]
    return []
