"""Turns: messages as tokens, each with the text that the chat template puts around it."""

from __future__ import annotations

from cpucache.layout.template import ChatTemplate
from cpucache.layout.vocabulary import Tokens, Vocabulary, joined
from cpucache.pml.tree import RoleName


class Turns:
    """Tokenizes the messages of one prompt in order.

    ``role`` is the role of the previous turn, if any. ``begun`` is true once the prompt holds any text. An assistant
    turn stays open, so that the model can continue it; the next turn ends it.
    """

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self._template = template
        self._vocabulary = vocabulary
        self.role: RoleName | None = None
        self.begun = False
        self.open = False
        """Whether the last turn is an assistant turn that has not ended."""

    def turn(self, role: RoleName, text: str) -> Tokens:
        """Tokens of a message, after the end of the previous turn if that is still open."""
        start = self._template.start(role, previous=self.role, first=not self.begun)
        if not self.begun and self._vocabulary.bos is not None:
            start = start.removeprefix(self._vocabulary.special_text("bos"))
        parts = [self.close(), self._special(start), self._vocabulary.tokenize(text)]
        self.role, self.begun = role, True
        if role == "assistant":
            self.open = True
        else:
            parts.append(self._special(self._template.end(role)))
        return joined(parts)

    def answer(self) -> Tokens:
        """Tokens that open an assistant turn for the model's answer; none if one is already open."""
        header = self._special("" if self.open else self._template.generation(self.role))
        self.role, self.open = "assistant", True
        return header

    def close(self) -> Tokens:
        """Tokens that end the open assistant turn; none if no turn is open."""
        end = self._special(self._template.end("assistant") if self.open else "")
        self.open = False
        return end

    def _special(self, text: str) -> Tokens:
        return self._vocabulary.tokenize(text, special=True)
