"""Operations of a model's memory: which states can be moved, shortened and extended.

Every room that has to know asks here, by what it is about to do.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpucache.runtime.model import Model


@dataclass(frozen=True)
class Memory:
    """Operations on the state that a model keeps of a text.

    A model of attention keeps a cell for each token, and everything can be done with cells: all defaults are its.
    """

    moves: bool = True
    """Whether states can be moved to other positions, after other text than they were evaluated after."""
    points: bool = False
    """Whether the model has a recurrent state of all tokens, so that a sequence extends only from saved points."""
    window: int = 0
    """Tokens that some layers attend to at most, the nearest; 0: every layer attends to all tokens."""

    @classmethod
    def of(cls, model: Model, *, shifts: bool) -> Memory:
        """The memory of a model. ``shifts``: whether llama.cpp can move its cells (``llama_memory_can_shift``)."""
        # That is true of recurrent memory too, which has positions to count but none to move.
        return cls(shifts and model.relative and not model.recurrent, model.recurrent, model.window)

    @property
    def cuts(self) -> bool:
        """Whether tokens can be removed from the end of a sequence or a state, and the rest be extended.

        With a window, as long as the tokens within the window of the next token are present (``Context.whole``).
        """
        return not self.points

    @property
    def fixed(self) -> str:
        """Why states can't be moved, as the end of a sentence about the model; empty where they can."""
        if self.moves:
            return ""
        return "keeps a recurrent state" if self.points else "ties what it knows to absolute positions"
