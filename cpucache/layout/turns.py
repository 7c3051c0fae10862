"""Turns: messages as tokens, with what the chat template puts around each."""

from __future__ import annotations

from cpucache.layout.template import ChatTemplate
from cpucache.layout.vocabulary import Tokens, Vocabulary, joined
from cpucache.pml.tree import RoleName


class Turns:
    """Tokenizes messages in the order in which they come.

    ``role`` is the role before, if any; ``begun`` tells whether any text stands before. A turn of the assistant stays
    open: the model may go on with it, and the next turn ends it.
    """

    def __init__(self, template: ChatTemplate, vocabulary: Vocabulary) -> None:
        self._template = template
        self._vocabulary = vocabulary
        self.role: RoleName | None = None
        self.begun = False
        self.open = False
        """A turn of the assistant is waiting to be continued."""

    def turn(self, role: RoleName, text: str) -> Tokens:
        """A message, and the end of the one before if that is still open."""
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
        """Returns the tokens that begin the model's answer, which is then the open turn of the assistant."""
        header = self._special("" if self.open else self._template.generation(self.role))
        self.role, self.open = "assistant", True
        return header

    def close(self) -> Tokens:
        """Tokens that end an open turn of the assistant."""
        end = self._special(self._template.end("assistant") if self.open else "")
        self.open = False
        return end

    def _special(self, text: str) -> Tokens:
        return self._vocabulary.tokenize(text, special=True)
