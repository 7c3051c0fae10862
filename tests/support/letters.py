"""A vocabulary for tests of layout: tokens are as long as the test wants, control tokens are in angle brackets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from cpucache.layout.vocabulary import Tokens

FILLER = "\N{LOW LINE}"
_CONTROL = re.compile(r"(<\|?[a-z_]+\|?>|</s>)")


@dataclass
class Letters:
    """One token for every ``size`` characters, and for every control token where these are recognised.

    ``bos``: the text of the token that begins every text, if any.
    """

    size: int = 1
    n_ctx_train: int = 4096
    bos_text: str | None = None
    chat_template: str | None = None
    _ids: dict[str, int] = field(default_factory=dict)

    @property
    def bos(self) -> int | None:
        return None if self.bos_text is None else self._id(self.bos_text)

    @property
    def filler(self) -> int:
        return self._id(FILLER)

    def tokenize(self, text: str, *, special: bool = False) -> Tokens:
        parts = _CONTROL.split(text) if special else [text]
        pieces = [
            piece
            for index, part in enumerate(parts)
            for piece in ([part] if index % 2 else [part[at : at + self.size] for at in range(0, len(part), self.size)])
        ]
        return np.array([self._id(piece) for piece in pieces], np.int32)

    def special_text(self, name: str) -> str:
        return {"bos": self.bos_text or "", "eos": "</s>"}[name]

    def text(self, tokens: Tokens) -> str:
        """What was tokenized."""
        pieces = list(self._ids)
        return "".join(pieces[token] for token in tokens)

    def _id(self, piece: str) -> int:
        return self._ids.setdefault(piece, len(self._ids))
