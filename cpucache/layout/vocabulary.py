"""The part of a model that layout depends on: its tokens. ``runtime.Model`` has these members."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int32]


class Vocabulary(Protocol):
    """The tokenizer and the few facts about a model that decide a layout."""

    @property
    def n_ctx_train(self) -> int:
        """The longest position that the model was trained on, plus one."""

    @property
    def bos(self) -> int | None:
        """The token that begins every text, ``None`` when the model wants none."""

    @property
    def filler(self) -> int:
        """The token that stands in for an argument not yet known."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's chat template."""

    def tokenize(self, text: str, *, special: bool = False) -> Tokens:
        """Ids of a piece of text; control tokens are recognised only with ``special``."""

    def special_text(self, name: str) -> str:
        """Text of the ``bos`` or ``eos`` token in templates."""


def empty() -> Tokens:
    """No tokens."""
    return np.empty(0, np.int32)


def joined(parts: list[Tokens]) -> Tokens:
    """Token arrays one behind the other."""
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else empty()


def common(one: Tokens, other: Tokens) -> int:
    """Number of tokens that both begin with."""
    count = min(len(one), len(other))
    differing = np.flatnonzero(one[:count] != other[:count])
    return int(differing[0]) if len(differing) else count
