"""What a plan must give, computed in NumPy: the judge is told the context of each slice, and evaluates that.

No rule by which slices are chosen is repeated here. The state of a slice is that of its tokens, which attend to
the states of the spans of its context, at positions right after the last of these, and are moved to the start of the
slice. A plan holds the states of its spans at their positions in the plan. Tokens without a slice, recomputed ones
among them, are evaluated at their positions in the plan, and attend to all before them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cpucache.reuse import KVCache, Plan, Slice, Span
from cpucache.reuse.reports import NewSlice
from tests.support.reference import KV, Floats, ReferenceLlama, causal


class Oracle:
    """The judge of the slices that one KV cache saves."""

    def __init__(self, reference: ReferenceLlama, kv_cache: KVCache) -> None:
        self._reference = reference
        self._states: dict[str, KV] = {}
        self.saved: dict[str, Slice] = {}
        """Every slice that the KV cache has saved since, by key: a slice that is found in the store does not hold its
        context."""
        save = kv_cache._save

        def noting(new: NewSlice, schema: str) -> None:
            self.saved[new.slice.key] = new.slice
            save(new, schema)

        kv_cache._save = noting  # type: ignore[method-assign]

    def logits(self, plan: Plan) -> Floats:
        """Those of the last token of a plan, which ends in a token without a slice."""
        *before, last = plan.spans
        assert last.slice is None
        rows = self._evaluated(last.tokens.tolist(), last.start, *self._held(before))[0]
        final: Floats = rows[-1]
        return final

    def full(self, plan: Plan) -> Floats:
        """Those of the last token, by evaluating all tokens from the first to the last."""
        rows: Floats = self._reference.evaluate(plan.tokens.tolist(), range(plan.n_tokens), causal(plan.n_tokens))
        final: Floats = rows[-1]
        return final

    def _held(self, spans: Iterable[Span]) -> tuple[KV | None, list[int]]:
        """What spans hold, and at which positions."""
        state: KV | None = None
        positions: list[int] = []
        for span in spans:
            if span.slice is None:
                part = self._evaluated(span.tokens.tolist(), span.start, state, positions)[1]
            else:
                part = self._state(span.slice)[: len(span.tokens)]
            state = part if state is None else KV.concat([state, part])
            positions += range(span.start, span.end)
        return state, positions

    def _state(self, slice_: Slice) -> KV:
        if slice_.key not in self._states:
            known = slice_ if slice_.context is not None else self.saved[slice_.key]
            assert known.context is not None
            start = known.context[-1].end if known.context else 0
            self._states[slice_.key] = self._evaluated(known.tokens.tolist(), start, *self._held(known.context))[1]
        return self._states[slice_.key]

    def _evaluated(self, tokens: list[int], start: int, state: KV | None, positions: list[int]) -> tuple[Floats, KV]:
        return self._reference.forward(
            tokens,
            range(start, start + len(tokens)),
            cache=state,
            cache_positions=np.array(positions),
            visible=causal(len(tokens), before=len(positions)),
        )
