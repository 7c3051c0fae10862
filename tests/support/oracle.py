"""What a plan must give, computed in NumPy: the judge is told the context of each slice, and evaluates that.

No rule by which slices are chosen is repeated here. The state of a slice is that of its tokens, evaluated in sight of
what the spans of its context hold, right behind the last of them, and moved to where the slice starts. What a plan
holds is the states of its spans where the plan puts them. Tokens without a slice, recomputed ones among them, are
evaluated there, in sight of all before them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cpucache.reuse import Plan, Slice, Span, Workspace
from cpucache.reuse.reports import Made
from tests.support.reference import KV, Floats, ReferenceLlama, causal


class Oracle:
    """The judge of the slices that one workspace makes."""

    def __init__(self, reference: ReferenceLlama, workspace: Workspace) -> None:
        self._reference = reference
        self._states: dict[str, KV] = {}
        self.made: dict[str, Slice] = {}
        """Every slice that the workspace has made since, by key: one that is found in the store does not know what it
        was evaluated behind."""
        keep = workspace._keep

        def noting(made: Made, schema: str) -> None:
            self.made[made.slice.key] = made.slice
            keep(made, schema)

        workspace._keep = noting  # type: ignore[method-assign]

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
        places: list[int] = []
        for span in spans:
            if span.slice is None:
                part = self._evaluated(span.tokens.tolist(), span.start, state, places)[1]
            else:
                part = self._state(span.slice)[: len(span.tokens)]
            state = part if state is None else KV.concat([state, part])
            places += range(span.start, span.end)
        return state, places

    def _state(self, slice_: Slice) -> KV:
        if slice_.key not in self._states:
            known = slice_ if slice_.context is not None else self.made[slice_.key]
            assert known.context is not None
            start = known.context[-1].end if known.context else 0
            self._states[slice_.key] = self._evaluated(known.tokens.tolist(), start, *self._held(known.context))[1]
        return self._states[slice_.key]

    def _evaluated(self, tokens: list[int], start: int, state: KV | None, places: list[int]) -> tuple[Floats, KV]:
        return self._reference.forward(
            tokens,
            range(start, start + len(tokens)),
            cache=state,
            cache_positions=np.array(places),
            visible=causal(len(tokens), before=len(places)),
        )
