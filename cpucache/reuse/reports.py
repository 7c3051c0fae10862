"""Reports: what it took to encode slices, to build a sequence, and to get a prompt into the llama.cpp context."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from cpucache.reuse.slices import Plan, Relation, Slice
from cpucache.runtime.context import Bytes


@dataclass(frozen=True)
class Made:
    """A slice with its state, and the seconds that evaluating it took: its share of the batch."""

    slice: Slice
    state: Bytes
    seconds: float


@dataclass
class Encoded:
    """What was encoded, and how long it took."""

    slices: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    made: set[Slice] = field(default_factory=set, repr=False)
    wanted: list[Slice] = field(default_factory=list, repr=False)
    """The slices that were asked for, made now or there before."""

    def add(self, made: Made) -> None:
        """Count a slice that was made."""
        self.slices += 1
        self.tokens += len(made.slice.tokens)
        self.bytes += made.state.nbytes
        self.made.add(made.slice)


@dataclass
class Spliced:
    """What building a sequence took. Times in milliseconds."""

    loaded: int = 0
    """Tokens whose state was loaded."""
    kept: int = 0
    """Tokens that the context held already."""
    evaluated: int = 0
    splice_ms: float = 0.0
    prefill_ms: float = 0.0


@dataclass
class Prefill:
    """What it took to get a prompt into the llama.cpp context. Times in milliseconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens that were not evaluated: spliced, or in the context already."""
    fresh_tokens: int = 0
    """Tokens that were evaluated: new text, missing slices, and what was recomputed."""
    encoded_tokens: int = 0
    """Tokens evaluated to make slices that were missing."""
    exact_tokens: int = 0
    """Cached tokens whose state is that of full prefill."""
    clean_tokens: int = 0
    related_tokens: int = 0
    foreign_tokens: int = 0
    recomputed_tokens: int = 0
    """Tokens of slices that were evaluated afresh."""
    encode_ms: float = 0.0
    splice_ms: float = 0.0
    prefill_ms: float = 0.0

    @classmethod
    def of(cls, plan: Plan, evaluated: int, encoded: Encoded, spliced: Spliced) -> Prefill:
        """What it took to get ``plan`` there.

        Args:
            plan: The plan that was spliced.
            evaluated: How many of its tokens were evaluated.
            encoded: What was encoded for it.
            spliced: What building the sequence took.
        """
        cached = {relation: plan.count(relation) for relation in get_args(Relation) if relation != "exact"}
        exact = plan.n_tokens - evaluated - sum(cached.values())
        first = next((index for index, span in enumerate(plan.spans) if span.relation != "exact"), None)
        if first is not None:
            # What was evaluated behind such a slice, and was kept, is no nearer to full prefill than the slice.
            kept = max(0, exact - sum(len(span.tokens) for span in plan.spans[:first]))
            exact -= kept
            cached[plan.spans[first].relation] += kept
        return cls(
            prompt_tokens=plan.n_tokens,
            cached_tokens=plan.n_tokens - evaluated,
            fresh_tokens=evaluated,
            encoded_tokens=encoded.tokens,
            exact_tokens=exact,
            clean_tokens=cached["clean"],
            related_tokens=cached["related"],
            foreign_tokens=cached["foreign"],
            recomputed_tokens=plan.n_recomputed,
            encode_ms=encoded.seconds * 1000,
            splice_ms=spliced.splice_ms,
            prefill_ms=spliced.prefill_ms,
        )
