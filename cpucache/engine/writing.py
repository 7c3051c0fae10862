"""Prompts that are still being written: how they may go on, and which of their tokens are certain."""

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
# What may stand behind a blank: in many vocabularies a digit takes the blank in front of it into its token no more than
# a line break does, and a letter does.
_WORDS = ("1", "A")
_BLANKS = ("\nA", " A")


def written(text: str) -> str:
    """What of a text that is being written will stay as it is: all up to its last blank."""
    last = _LAST_BLANK.search(text)
    return text[: last.end()] if last else ""


def continued(text: str) -> list[str]:
    """Ways in which a text that is being written may go on behind its last blank."""
    head = written(text)
    return [head + each for each in (*_WORDS, *(_BLANKS if head and head == text else ()))]


def certain(tokens: Tokens, others: Sequence[Tokens]) -> int:
    """How many tokens a prompt begins with, however the text in it goes on.

    Args:
        tokens: Of the prompt with the text as it is.
        others: Of the prompt with the text as it may be.
    """
    return min((common(tokens, other) for other in others), default=len(tokens))


def rewritten(prompt: Any, text: str | None) -> list[tuple[Any, str | None]]:
    """A prompt, and text to go on with, as they may be once the last text has been written.

    Args:
        prompt: A parsed prompt, a message, messages, or tokens, which stay as they are.
        text: Text to go on with.
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
