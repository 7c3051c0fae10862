"""Results of requests: a reply with its metrics, and the token counts of a preparation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cpucache.reuse.reports import Metrics

__all__ = ["Metrics", "Prepared", "Reply"]


@dataclass(frozen=True)
class Prepared:
    """Token counts of a prompt that was evaluated ahead."""

    prompt_tokens: int
    """Tokens of the whole prompt."""
    cached_tokens: int
    """Tokens that came from slices or were in the llama.cpp context already."""
    evaluated_tokens: int
    """Tokens that were evaluated."""


@dataclass
class Reply:
    """A complete answer."""

    text: str
    """Text of the answer, without the stop string that ended it."""
    metrics: Metrics
    """Token counts, and times in milliseconds."""

    def as_dict(self) -> dict[str, Any]:
        """The object that ``run --json`` prints."""
        numbers = {
            name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(self.metrics).items()
        }
        return {"text": self.text, **numbers}
