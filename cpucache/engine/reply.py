"""What an answer comes with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cpucache.reuse.reports import Metrics

__all__ = ["Metrics", "Prepared", "Reply"]


@dataclass(frozen=True)
class Prepared:
    """What it took to evaluate a prompt ahead."""

    prompt_tokens: int
    cached_tokens: int
    """Those that were there: of a PML prompt, all tokens of the slices that it takes."""
    evaluated_tokens: int
    """Those that were evaluated."""


@dataclass
class Reply:
    """An answer."""

    text: str
    metrics: Metrics

    def as_dict(self) -> dict[str, Any]:
        """The object that ``run --json`` prints."""
        numbers = {
            name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self.metrics).items()
        }
        return {"text": self.text, **numbers}
