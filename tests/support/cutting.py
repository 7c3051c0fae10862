"""Cuts at equal distances, for tests that are not about where text is cut."""

from __future__ import annotations

from dataclasses import dataclass

from cpucache.layout import Tokens


@dataclass(frozen=True)
class every:  # noqa: N801 - said like a function
    """Segments of ``size`` tokens; the last may be shorter."""

    size: int = 256

    def __call__(self, tokens: Tokens, *, part: bool = False) -> list[int]:
        return [*range(self.size, len(tokens), self.size), len(tokens)] if len(tokens) else []

    def ends_message(self, tokens: Tokens) -> bool:
        return False
