"""Fidelity: how closely an answer must match full prefill, and how much may be recomputed for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from cpucache.errors import InputError

Level: TypeAlias = Literal["fast", "balanced", "high"]
Reuse: TypeAlias = Literal["exact", "schema", "anywhere"]
"""Slices that a prompt may use.

``exact``: slices whose context is all text before them in the prompt. ``schema``: also slices that attended only to
text of its schema. ``anywhere``: also foreign slices.
"""
REUSES: tuple[Reuse, ...] = ("exact", "schema", "anywhere")


@dataclass(frozen=True)
class Fidelity:
    """Treatment of slices whose context differs from the text before them in a prompt.

    Args:
        recompute: Share (0 to 1) of the spliced tokens to recompute before the first token, in slices that are not
            exact.
        exact: Whether to use exact slices only. Segments without one are evaluated and saved.

    Raises:
        InputError: ``recompute`` is not a number from 0 to 1, or is given together with ``exact``.
    """

    recompute: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.recompute, bool) or not isinstance(self.recompute, int | float):
            raise InputError(f"recompute={self.recompute!r}: must be a share, from 0 to 1")
        if not 0 <= self.recompute <= 1:
            raise InputError(f"recompute={self.recompute}: must be a share, from 0 to 1")
        if self.exact and self.recompute:
            raise InputError(f"recompute={self.recompute} with exact slices only: there is nothing to recompute")

    @staticmethod
    def of(
        fidelity: Level | Fidelity | None = None, recompute: float | None = None, *, usual: Fidelity | None = None
    ) -> Fidelity:
        """Returns the fidelity that a caller asks for.

        Args:
            fidelity: A level, or a ``Fidelity``.
            recompute: Share (0 to 1) of spliced tokens to recompute, instead of ``fidelity``.
            usual: The fidelity if neither is given; by default that of the level ``DEFAULT``.

        Raises:
            InputError: The level is unknown, the share is invalid, or both arguments are given.
        """
        if fidelity is not None and recompute is not None:
            raise InputError("give a fidelity or a share to recompute, not both: a fidelity decides what is recomputed")
        if recompute is not None:
            return Fidelity(recompute)
        if fidelity is None:
            return usual or LEVELS[DEFAULT]
        if isinstance(fidelity, Fidelity):
            return fidelity
        if fidelity not in LEVELS:
            raise InputError(f"fidelity={fidelity!r}: must be one of {', '.join(LEVELS)}")
        return LEVELS[fidelity]


# Chosen from the measurements in bench/RESULTS.md.
LEVELS: dict[Level, Fidelity] = {
    "fast": Fidelity(),
    "balanced": Fidelity(recompute=0.1),
    "high": Fidelity(exact=True),
}
DEFAULT: Level = "fast"
