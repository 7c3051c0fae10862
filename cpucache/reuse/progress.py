"""Progress of long evaluations, reported through callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int], object]
"""Called with the number of tokens evaluated so far, and their total."""
Step: TypeAlias = Callable[[int], None]
"""Called with the number of tokens of each batch."""


def counting(progress: OnProgress | None, total: int) -> Step | None:
    """Returns a callback that adds up batches and passes the sum to ``progress``; calls ``progress(0, total)`` at once.

    Returns ``None`` without a ``progress``, or if ``total`` is 0.
    """
    if progress is None or not total:
        return None
    done = 0

    def step(count: int) -> None:
        nonlocal done
        # The token evaluated to apply a shift is not part of ``total``, so the sum could exceed it.
        done = min(total, done + count)
        progress(done, total)

    progress(0, total)
    return step
