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


def rewritten(
    prompt: Prompt | None, messages: Sequence[Mapping[str, object]] | None, text: str | None
) -> list[dict[str, Any]]:
    """A prompt as it may be once its last text has been written, in the forms that ``Engine.plan`` takes."""
    if prompt is not None:
        *before, last = prompt.children or (Turn("user", "", prompt.line),)
        if not isinstance(last, Turn | tree.Text):
            before, last = [*before, last], tree.Text("", prompt.line)
        return [
            {"prompt": replace(prompt, children=(*before, replace(last, text=each)))} for each in continued(last.text)
        ]
    if messages:
        *former, message = messages
        content = message["content"]
        return [{"messages": [*former, {**message, "content": each}]} for each in continued(str(content))]
    return [] if text is None else [{"text": each} for each in continued(text)]
