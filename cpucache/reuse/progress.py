"""Progress reports of long evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

OnProgress: TypeAlias = Callable[[int, int], object]
"""Called with the number of tokens evaluated so far, and the total."""
Step: TypeAlias = Callable[[int], None]
"""Called with the number of tokens of each batch."""


def counting(progress: OnProgress | None, total: int) -> Step | None:
    """Returns a ``Step`` that sums up tokens for ``progress``, and calls ``progress`` with (0, ``total``) at once."""
    if progress is None or not total:
        return None
    done = 0

    def step(count: int) -> None:
        nonlocal done
        # The token that applies a shift is not part of the total: don't exceed it.
        done = min(total, done + count)
        progress(done, total)

    progress(0, total)
    return step
