"""Telling a caller how far a long evaluation is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int], object]
"""Called with the tokens evaluated so far, and how many there will be."""
Step: TypeAlias = Callable[[int], None]
"""Called with the tokens of each batch."""


def counting(progress: OnProgress | None, total: int) -> Step | None:
    """The steps of ``progress``, which is told at once that there are ``total`` tokens to come."""
    if progress is None or not total:
        return None
    done = 0

    def step(count: int) -> None:
        nonlocal done
        # The token that applies a shift counts nowhere: not to run over the end.
        done = min(total, done + count)
        progress(done, total)

    progress(0, total)
    return step
