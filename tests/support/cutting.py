"""Cuts at equal distances, for tests that are not about where text is cut."""

from __future__ import annotations

from cpucache.layout import Tokens
from cpucache.reuse.slices import Cutting


def every(size: int = 256) -> Cutting:
    """Segments of ``size`` tokens; the last may be shorter."""

    def cuts(tokens: Tokens, *, part: bool = False) -> list[int]:
        return [*range(size, len(tokens), size), len(tokens)] if len(tokens) else []

    return cuts
