"""Capabilities of a model's memory: whether saved states can be moved, truncated and extended.

Other packages ask here, by operation, instead of testing for architectures.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpucache.runtime.model import Model


@dataclass(frozen=True)
class Memory:
    """Operations that a model's saved state allows.

    The defaults are those of a pure attention model, which keeps one cell for each token and allows all operations.
    """

    moves: bool = True
    """Whether states can be shifted to other positions and spliced after other text."""
    points: bool = False
    """Whether the model keeps a recurrent state of all tokens, which can be extended only where it was saved."""
    window: int = 0
    """Sliding window of the layers that have one, in tokens; 0: every layer attends to all tokens."""

    @classmethod
    def of(cls, model: Model, *, shifts: bool) -> Memory:
        """Memory of ``model``. ``shifts``: whether llama.cpp can move its cells (``llama_memory_can_shift``)."""
        # llama_memory_can_shift is true of recurrent memory as well, whose state cannot be moved.
        return cls(shifts and model.relative and not model.recurrent, model.recurrent, model.window)

    @property
    def cuts(self) -> bool:
        """Whether a sequence or state can be truncated and then extended.

        With a sliding window, the cells that the next token attends to must still exist: see ``Context.whole``.
        """
        return not self.points

    @property
    def fixed(self) -> str:
        """Why states cannot be moved, as the end of a sentence about the model; empty if they can."""
        if self.moves:
            return ""
        return "keeps a recurrent state" if self.points else "has states that depend on absolute positions"
