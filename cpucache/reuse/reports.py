"""Reports: costs of encoding slices and of answering a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from cpucache.reuse.slices import Plan, Relation, Slice
from cpucache.runtime.context import Bytes

Finish: TypeAlias = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class NewSlice:
    """An encoded slice with its state, and its share of the batch's evaluation time, in seconds."""

    slice: Slice
    state: Bytes
    seconds: float


@dataclass
class Encoded:
    """Counts of slices, tokens and bytes encoded, and the time taken in seconds."""

    slices: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    new: set[Slice] = field(default_factory=set, repr=False)
    wanted: list[Slice] = field(default_factory=list, repr=False)
    """Slices that were requested, encoded now or saved before."""

    def add(self, new: NewSlice) -> None:
        """Adds an encoded slice to the counts."""
        self.slices += 1
        self.tokens += len(new.slice.tokens)
        self.bytes += new.state.nbytes
        self.new.add(new.slice)


@dataclass
class Metrics:
    """Counts of tokens, and times in milliseconds."""

    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were not evaluated for it: spliced from slices, or left in the context."""
    fresh_tokens: int = 0
    """Tokens of the prompt that were evaluated: new text, missing slices, and what was recomputed."""
    encoded_tokens: int = 0
    """Tokens evaluated to encode missing slices (0 from the second time on)."""
    exact_tokens: int = 0
    """Cached tokens whose state is that of full prefill."""
    clean_tokens: int = 0
    """Cached tokens from clean slices: evaluated after a part of the text before them."""
    related_tokens: int = 0
    """Cached tokens from related slices: evaluated after other text of the schema."""
    foreign_tokens: int = 0
    """Cached tokens from foreign slices: evaluated after text of other prompts."""
    recomputed_tokens: int = 0
    """Tokens of slices that were evaluated again."""
    completion_tokens: int = 0
    ttft_ms: float = 0.0
    """Time to first token: everything from the call to the first token of the answer."""
    encode_ms: float = 0.0
    """Part of ``ttft_ms``: encoding missing slices."""
    splice_ms: float = 0.0
    """Part of ``ttft_ms``: loading slices into the llama.cpp context."""
    prefill_ms: float = 0.0
    """Part of ``ttft_ms``: evaluating fresh tokens."""
    total_ms: float = 0.0
    save_ms: float = 0.0
    """Time to copy new state out of the llama.cpp context after the first token; a background thread writes it."""
    left_out_tokens: int = 0
    """In a session: tokens of old turns that left the context to make room for this turn."""
    recompute_ms: float = 0.0
    """Estimated time to evaluate the turns after the left-out ones again, from the measured prefill speed."""
    finish: Finish = "stop"
    stop: str = ""
    """Stop text that ended the answer, if any."""

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        return (self.total_ms - self.ttft_ms) / max(1, self.completion_tokens - 1)

    def note(self, plan: Plan, evaluated: int) -> None:
        """Sets the token counts for a prompt that the llama.cpp context holds.

        Args:
            plan: The plan that was spliced.
            evaluated: Number of its tokens that were evaluated.
        """
        cached = {relation: plan.count(relation) for relation in get_args(Relation) if relation != "exact"}
        exact = plan.n_tokens - evaluated - sum(cached.values())
        first = next((index for index, span in enumerate(plan.spans) if span.relation != "exact"), None)
        if first is not None:
            # Reused tokens evaluated after such a slice are no closer to full prefill than the slice.
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
