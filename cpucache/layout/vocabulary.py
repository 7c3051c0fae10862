"""The tokenizer interface that layout needs. ``runtime.Model`` implements it; any class with these members will do."""

from __future__ import annotations

from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int32]


class Vocabulary(Protocol):
    """The tokenizer and the few facts about a model that decide a layout."""

    @property
    def n_ctx_train(self) -> int:
        """Context length that the model was trained on, in tokens."""

    @property
    def bos(self) -> int | None:
        """Id of the token that begins every text; ``None`` if the model uses none."""

    @property
    def filler(self) -> int:
        """Id of the token that pads a parameter while its schema is encoded."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's chat template; ``None`` if the model has none."""

    def tokenize(self, text: str, *, special: bool = False) -> Tokens:
        """Token ids of ``text``. Control tokens are recognised only if ``special`` is true."""

    def special_text(self, name: str) -> str:
        """Text of the token called ``name`` (``bos`` or ``eos``), as chat templates write it."""


def empty() -> Tokens:
    """Returns an empty token array."""
    return np.empty(0, np.int32)


def joined(parts: list[Tokens]) -> Tokens:
    """Concatenation of ``parts``."""
    return np.concatenate(parts).astype(np.int32, copy=False) if parts else empty()


def common(one: Tokens, other: Tokens) -> int:
    """Length of the longest common prefix, in tokens."""
    count = min(len(one), len(other))
    differing = np.flatnonzero(one[:count] != other[:count])
    return int(differing[0]) if len(differing) else count
