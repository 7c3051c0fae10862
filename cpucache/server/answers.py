"""Answers, separated while they are written: what the model thought, what it says, what it calls."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from cpucache.layout.conversation import ChatMessage, ToolCall
from cpucache.server.toolcalls import ToolParser

OPEN, CLOSE = "<think>", "</think>"
"""What models put around what they think, before they answer."""


class Said(NamedTuple):
    """What a piece of an answer makes certain."""

    reasoning: str = ""
    text: str = ""


class AnswerParser:
    """Separates reasoning, text and calls, piece by piece.

    Reasoning is what stands between tags at the very beginning. It comes without the tags, and without white space at
    either end; so does the text behind it.

    Args:
        names: The tools that there are.
        thinking: The prompt ends with the opening tag already.
    """

    def __init__(self, names: Collection[str] = (), *, thinking: bool = False) -> None:
        self.reasoning = ""
        self.text = ""
        self._tools = ToolParser(names)
        self._held = ""
        self._begun = thinking
        self._thinking = thinking
        self._strip = thinking
        """Whether white space that comes next is left out."""

    @property
    def calls(self) -> Sequence[ToolCall]:
        """The calls, when the answer has ended."""
        return self._tools.calls

    @property
    def message(self) -> ChatMessage:
        """The answer so far."""
        return ChatMessage("assistant", self.text, self.calls, reasoning=self.reasoning)

    def feed(self, piece: str) -> Said:
        """What a piece makes certain."""
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
        """The rest. Reasoning that was cut short is reasoning still."""
        rest, self._held = self._held, ""
        if self._thinking:
            return self._noted(rest.strip() if self._strip else rest.rstrip(), "")
        return self._noted("", self._tools.feed(rest) + self._tools.finish())

    def _noted(self, reasoning: str, text: str) -> Said:
        self.reasoning += reasoning
        self.text += text
        return Said(reasoning, text)

    def _thought(self) -> str:
        """The reasoning that is held, as far as it is certain."""
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
    """The answer in what a model wrote, calls as it wrote them: what stands behind its reasoning."""
    _, tag, rest = raw.partition(CLOSE)
    return rest.lstrip() if tag else raw


def separated(message: ChatMessage) -> ChatMessage:
    """A message of the assistant's with what it thought taken out of its text, where both were sent as one."""
    if message.role != "assistant" or not message.text.lstrip().startswith(OPEN) or CLOSE not in message.text:
        return message
    parser = AnswerParser()
    parser.feed(message.text)
    parser.finish()
    reasoning = message.reasoning or parser.reasoning
    return ChatMessage(message.role, parser.text, message.calls, message.call, message.name, reasoning)
