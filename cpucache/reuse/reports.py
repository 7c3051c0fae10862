"""Reports: counts and times of encoding slices, and of answering a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from cpucache.reuse.plan import Plan, Relation, Slice
from cpucache.runtime.context import Bytes

Finish: TypeAlias = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True)
class NewSlice:
    """A newly evaluated slice, its state, and its share of the seconds that its batch took."""

    slice: Slice
    state: Bytes
    seconds: float


@dataclass
class Encoded:
    """Numbers of slices, tokens and bytes that were encoded, and the seconds that it took, failed attempts included."""

    slices: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    new: set[Slice] = field(default_factory=set, repr=False)
    missed: set[Slice] = field(default_factory=set, repr=False)
    """The slices that encoding was begun for, because the store lacked them."""
    wanted: list[Slice] = field(default_factory=list, repr=False)
    """The slices that were requested, whether encoded now or already in the store."""

    def add(self, new: NewSlice) -> None:
        """Counts a newly encoded slice."""
        self.slices += 1
        self.tokens += len(new.slice.tokens)
        self.bytes += new.state.nbytes
        self.new.add(new.slice)


@dataclass
class Metrics:
    """Token counts and times of one answer; times are in milliseconds."""

    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of the prompt that were not evaluated for it: spliced from slices, or still held by the slot."""
    fresh_tokens: int = 0
    """Tokens of the prompt that were evaluated: new text, missing slices, and recomputed tokens."""
    encoded_tokens: int = 0
    """Tokens of missing slices that were encoded (0 from the second time on)."""
    exact_tokens: int = 0
    """Cached tokens whose state is that of full prefill."""
    clean_tokens: int = 0
    """Cached tokens whose slice attended to only a part of the text before them."""
    related_tokens: int = 0
    """Cached tokens whose slice attended to other text of the schema."""
    foreign_tokens: int = 0
    """Cached tokens whose slice attended to text of other prompts."""
    recomputed_tokens: int = 0
    """Tokens that were evaluated although a slice of them exists."""
    completion_tokens: int = 0
    ttft_ms: float = 0.0
    """Time to first token (TTFT): from the call to the first token of the answer."""
    encode_ms: float = 0.0
    """Part of the TTFT that encoded missing slices."""
    splice_ms: float = 0.0
    """Part of the TTFT that spliced slices."""
    prefill_ms: float = 0.0
    """Part of the TTFT that evaluated fresh tokens."""
    total_ms: float = 0.0
    save_ms: float = 0.0
    """Time to copy new state out of the llama.cpp context, after the first token; disk writes run in the background."""
    left_out_tokens: int = 0
    """In a session: tokens of old turns that left the context to make room for this turn."""
    recompute_ms: float = 0.0
    """Estimated time to evaluate the later turns again, at the measured prefill rate; they were moved instead."""
    finish: Finish = "stop"
    stop: str = ""
    """The stop text that ended the answer, or an empty string."""

    @property
    def tpot_ms(self) -> float:
        """Time per output token after the first."""
        return (self.total_ms - self.ttft_ms) / max(1, self.completion_tokens - 1)

    def note(self, plan: Plan, evaluated: int) -> None:
        """Sets the token counts from a prompt that was built in the llama.cpp context.

        Args:
            plan: The plan that was spliced.
            evaluated: Number of its tokens that were evaluated.
        """
        cached = {relation: plan.count(relation) for relation in get_args(Relation) if relation != "exact"}
        exact = plan.n_tokens - evaluated - sum(cached.values())
        first = next((index for index, span in enumerate(plan.spans) if span.relation != "exact"), None)
        if first is not None:
            # Held tokens that were evaluated after such a slice attended to it: they are no more exact than the slice.
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
