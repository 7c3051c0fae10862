"""What an answer comes with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Finish: TypeAlias = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class Prepared:
    """What it took to evaluate a prompt ahead."""

    prompt_tokens: int
    cached_tokens: int
    """Those that were there: of a PML prompt, all tokens of the slices that it takes."""
    evaluated_tokens: int
    """Those that were evaluated."""


@dataclass
class Metrics:
    """Counts of tokens, and times in milliseconds from the call on."""

    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were not evaluated for it: spliced from slices, or left in the context."""
    fresh_tokens: int = 0
    """Tokens of the prompt that were evaluated: new text, missing slices, and what was recomputed."""
    encoded_tokens: int = 0
    """Tokens evaluated to make slices that were missing (0 from the second time on)."""
    exact_tokens: int = 0
    """Cached tokens whose state is that of full prefill."""
    clean_tokens: int = 0
    """Cached tokens that were evaluated behind a part of what stands before them."""
    related_tokens: int = 0
    """Cached tokens that were evaluated behind other text of the schema."""
    foreign_tokens: int = 0
    """Cached tokens that were evaluated behind text of other prompts."""
    recomputed_tokens: int = 0
    """Tokens of slices that were evaluated afresh."""
    completion_tokens: int = 0
    ttft_ms: float = 0.0
    """Time to first token: everything from the call to the first token of the answer."""
    encode_ms: float = 0.0
    """Part of it that made missing slices."""
    splice_ms: float = 0.0
    """Part of it that put slices into the context."""
    prefill_ms: float = 0.0
    """Part of it that evaluated fresh tokens."""
    total_ms: float = 0.0
    save_ms: float = 0.0
    """Time that it took to take new state out of the context, after the first token; writing goes on in the background.
    """
    left_out_tokens: int = 0
    """In a session: tokens of old turns that had to leave the context for this one."""
    recompute_ms: float = 0.0
    """What evaluating the turns behind them again would have taken, going by how fast prompts are evaluated here."""
    finish: Finish = "stop"
    stop: str = ""
    """The text to stop at that ended the answer, if one did."""

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        return (self.total_ms - self.ttft_ms) / max(1, self.completion_tokens - 1)


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
