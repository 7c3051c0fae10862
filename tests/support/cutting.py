"""Cuts at equal distances, for tests that are not about where text is cut."""

from __future__ import annotations

from collections.abc import Callable

from cpucache.layout import Tokens


def every(size: int = 256) -> Callable[[Tokens], list[int]]:
    """Segments of ``size`` tokens; the last may be shorter."""

    def cuts(tokens: Tokens) -> list[int]:
        return [*range(size, len(tokens), size), len(tokens)] if len(tokens) else []

    return cuts
