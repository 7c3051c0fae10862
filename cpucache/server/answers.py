"""Answers, separated into reasoning, text and tool calls while the model writes them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from cpucache.layout.conversation import ChatMessage, ToolCall
from cpucache.server.toolcalls import ToolParser

OPEN, CLOSE = "<think>", "</think>"
"""Tags around a model's reasoning, which it writes before its answer."""


class Said(NamedTuple):
    """Reasoning and text that a piece of an answer completes."""

    reasoning: str = ""
    text: str = ""


class AnswerParser:
    """Separates reasoning, text and calls, piece by piece.

    Reasoning is between ``<think>`` and ``</think>`` at the beginning of an answer. It is returned without the tags
    and without white space at either end. White space before the text that follows it is dropped too.

    Args:
        names: Names of the tools that may be called.
        thinking: Whether the prompt itself ends with the opening tag.
    """

    def __init__(self, names: Collection[str] = (), *, thinking: bool = False) -> None:
        self.reasoning = ""
        self.text = ""
        self._tools = ToolParser(names)
        self._held = ""
        self._begun = thinking
        self._thinking = thinking
        self._strip = thinking
        """Whether white space that comes next is dropped."""

    @property
    def calls(self) -> Sequence[ToolCall]:
        """The calls. Empty until ``finish``."""
        return self._tools.calls

    @property
    def message(self) -> ChatMessage:
        """The answer so far."""
        return ChatMessage("assistant", self.text, self.calls, reasoning=self.reasoning)

    def feed(self, piece: str) -> Said:
        """Takes a piece of the answer. Returns the reasoning and text that can't be part of a tag or call any more."""
        self._held += piece
        if not self._begun:
            head = self._held.lstrip()
            if len(head) < len(OPEN) and OPEN.startswith(head):
                return Said()
            self._begun = True
            self._thinking = self._strip = head.startswith(OPEN)
            self._held = head.removeprefix(OPEN) if self._thinking else self._held
        reasoning = self._thought() if self._thinking else ""
        text = "" if self._thinking else self._answered()
        return self._noted(reasoning, text)

    def finish(self) -> Said:
        """Returns the rest, after the last piece. Reasoning without a closing tag stays reasoning."""
        rest, self._held = self._held, ""
        if self._thinking:
            return self._noted(rest.strip() if self._strip else rest.rstrip(), "")
        return self._noted("", self._tools.feed(rest) + self._tools.finish())

    def _noted(self, reasoning: str, text: str) -> Said:
        self.reasoning += reasoning
        self.text += text
        return Said(reasoning, text)

    def _thought(self) -> str:
        """Takes the reasoning from the held text, up to where a closing tag may begin."""
        self._drop_space()
        at = self._held.find(CLOSE)
        if at >= 0:
            thought, self._held = self._held[:at].rstrip(), self._held[at + len(CLOSE) :]
            self._thinking, self._strip = False, True
            return thought
        keep = max(size for size in range(len(CLOSE)) if self._held.endswith(CLOSE[:size]))
        thought = self._held[: len(self._held) - keep].rstrip()
        self._held = self._held[len(thought) :]
        return thought

    def _answered(self) -> str:
        self._drop_space()
        held, self._held = self._held, ""
        return self._tools.feed(held) if held else ""

    def _drop_space(self) -> None:
        if self._strip:
            self._held = self._held.lstrip()
            self._strip = not self._held


def answer_of(raw: str) -> str:
    """Returns the answer after the reasoning in a model's output. Calls stay in the text as the model wrote them."""
    _, tag, rest = raw.partition(CLOSE)
    return rest.lstrip() if tag else raw


def separated(message: ChatMessage) -> ChatMessage:
    """Returns a message with its reasoning moved out of its text, if a client sent back both as one text.

    Messages of other roles are returned unchanged.
    """
    if message.role != "assistant" or not message.text.lstrip().startswith(OPEN) or CLOSE not in message.text:
        return message
    parser = AnswerParser()
    parser.feed(message.text)
    parser.finish()
    reasoning = message.reasoning or parser.reasoning
    return ChatMessage(message.role, parser.text, message.calls, message.call, message.name, reasoning)
