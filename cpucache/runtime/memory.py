"""What a model's memory can do: which states can be moved, cut back, and gone on from.

Every room that has to know asks here, by what it is about to do.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpucache.runtime.model import Model


@dataclass(frozen=True)
class Memory:
    """What can be done with what a model keeps of a text.

    A model of attention keeps a cell for each token, and everything can be done with cells: all defaults are its.
    """

    moves: bool = True
    """Whether states can be put at other positions, behind other text than they were evaluated behind."""
    points: bool = False
    """Whether a recurrent state, of all tokens together, belongs to the cells: one goes on only where it was saved."""
    window: int = 0
    """Tokens that some layers look back on at most, which forget what is further away; 0: every layer sees all."""

    @classmethod
    def of(cls, model: Model, *, shifts: bool) -> Memory:
        """The memory of a model. ``shifts``: whether llama.cpp can move its cells (``llama_memory_can_shift``)."""
        # That is true of recurrent memory too, which has positions to count but none to move.
        return cls(shifts and model.relative and not model.recurrent, model.recurrent, model.window)

    @property
    def cuts(self) -> bool:
        """Whether tokens can be taken off the end of a sequence or a state, and the rest be gone on from.

        With a window, as long as what the next token looks back on is there: ``Context.whole`` tells.
        """
        return not self.points

    @property
    def fixed(self) -> str:
        """Why states can't be moved, as the end of a sentence about the model; empty where they can."""
        if self.moves:
            return ""
        return "keeps a recurrent state" if self.points else "ties what it knows to absolute positions"
