"""Reports: what it took to encode slices, and to answer a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from cpucache.reuse.slices import Plan, Relation, Slice
from cpucache.runtime.context import Bytes

Finish: TypeAlias = Literal["stop", "length", "interrupted"]


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

    def note(self, plan: Plan, evaluated: int) -> None:
        """Count the tokens of a prompt that lies in the llama.cpp context.

        Args:
            plan: The plan that was spliced.
            evaluated: How many of its tokens were evaluated.
        """
        cached = {relation: plan.count(relation) for relation in get_args(Relation) if relation != "exact"}
        exact = plan.n_tokens - evaluated - sum(cached.values())
        first = next((index for index, span in enumerate(plan.spans) if span.relation != "exact"), None)
        if first is not None:
            # What was evaluated behind such a slice, and was kept, is no nearer to full prefill than the slice.
            kept = max(0, exact - sum(len(span.tokens) for span in plan.spans[:first]))
            exact -= kept
            cached[plan.spans[first].relation] += kept
        self.prompt_tokens = plan.n_tokens
        self.cached_tokens = plan.n_tokens - evaluated
        self.fresh_tokens = evaluated
        self.exact_tokens = exact
        self.clean_tokens = cached["clean"]
        self.related_tokens = cached["related"]
        self.foreign_tokens = cached["foreign"]
        self.recomputed_tokens = plan.n_recomputed
