"""Workspaces over tiny models, plans built by hand, and what they must give by plain evaluation.

The truth comes from a context of its own: every run of tokens is evaluated directly at the positions where the plan
wants it, so that nothing is ever saved, loaded or moved there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpucache.layout import Plan, Segment, Span
from cpucache.reuse import Workspace
from cpucache.runtime import Context, KVType, Model, Run
from cpucache.store import Store
from tests.support.tiny import BYTES

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]

# A key that is moved is rounded twice, at a precision of its type. Nothing is rounded under ALiBi, where positions are
# in the mask alone. A mistake of one position shows as 0.2 and more under RoPE, as 0.006 under ALiBi.
TOLERANCE: dict[KVType, float] = {"f32": 1e-3, "f16": 5e-3, "q8_0": 0.1}
TOLERANCE_ALIBI = 2e-3

PLENTY = 1 << 30
"""A RAM budget that nothing here exceeds."""


def some_tokens(n: int, seed: int = 0) -> Tokens:
    """Random bytes as tokens."""
    return np.random.default_rng(seed).integers(BYTES, BYTES + 256, n).astype(np.int32)


def tolerance(arch: str, kv_type: KVType) -> float:
    """The largest ``distance`` that rounding explains."""
    return TOLERANCE_ALIBI if arch == "mpt" else TOLERANCE[kv_type]


def cut(tokens: Tokens, *places: int) -> list[Tokens]:
    """The parts between these places."""
    return np.split(tokens, places)


@contextmanager
def opened(path: Path, kv_type: KVType = "f32", *, n_ctx: int = 1024) -> Iterator[Context]:
    """A context of a model of its own."""
    with Model(path) as model:
        # One thread: on a busy machine two that wait for one another at every node of so small a graph take ages.
        context = Context(model, n_ctx=n_ctx, kv_type=kv_type, n_threads=1)
        try:
            yield context
        finally:
            context.close()


@dataclass
class Bench:
    """A workspace, and a second context for the truth."""

    workspace: Workspace
    truth: Context

    def logits(self, plan: Plan) -> Logits:
        """Those of the last token of ``plan``, through slices."""
        self.workspace.prefill(plan)
        return self.workspace.context.last_logits()

    def full(self, tokens: Tokens) -> Logits:
        """Those of the last of ``tokens``, by full prefill in one go."""
        self.truth.clear()
        self.truth.decode([Run(0, 0, tokens)], logits="last")
        return self.truth.last_logits()

    def expected(self, plan: Plan) -> Logits:
        """Those of the last token of ``plan``, each slice evaluated where it stands, right behind its context.

        For slices whose contexts, all together, stand at consecutive positions from 0.
        """
        self.truth.clear()
        for span in plan.spans:
            if span.segment is None:
                self.truth.decode([Run(0, span.start, span.tokens)], logits="last")
                continue
            sight = [segment.tokens for segment in span.segment.sees]
            before = sum(len(tokens) for tokens in sight)
            assert before == span.segment.context_end, "a gap in the context"
            # What matters is how far the tokens are from one another, so the context may begin anywhere, but not below
            # 0: a slice that stands too near to the start for its context to fit before it can't be evaluated so.
            self.truth.decode([Run(1, span.start - before, np.concatenate([*sight, span.tokens]))])
            self.truth.remove(1, 0, span.start)
            self.truth.share(1, 0)
            self.truth.remove(1)
        return self.truth.last_logits()


@contextmanager
def bench(
    path: Path,
    kv_type: KVType = "f32",
    *,
    home: Path | None = None,
    ram_budget: int = PLENTY,
    n_ctx: int = 1024,
) -> Iterator[Bench]:
    """A bench over the model at ``path``; ``home`` and ``ram_budget`` are the store's."""
    with opened(path, kv_type, n_ctx=n_ctx) as context, opened(path, kv_type, n_ctx=n_ctx) as truth:
        store = Store(home, ram_budget=ram_budget)
        try:
            yield Bench(Workspace(context, store, path.stem), truth)
        finally:
            store.close()


def segment(tokens: Tokens, context: Sequence[Segment] = (), *, home: int | None = None) -> Segment:
    """A slice to be, in the sight of ``context``; at home right behind it unless told."""
    return Segment(
        tokens, context[-1].end if home is None and context else home or 0, tuple(other.span for other in context), ""
    )


def chain(parts: Sequence[Tokens]) -> list[Segment]:
    """Segments one behind the other from position 0, each in the sight of all before it."""
    made: list[Segment] = []
    for part in parts:
        made.append(segment(part, made))
    return made


def plan_of(*pieces: Segment | Tokens | tuple[Segment, int]) -> Plan:
    """Slices at home, or at the position they come with, and fresh tokens behind what is before them."""
    spans: list[Span] = []
    end = 0
    for piece in pieces:
        if isinstance(piece, Segment):
            spans.append(Span(piece.home, piece.tokens, piece))
        elif isinstance(piece, tuple):
            spans.append(Span(piece[1], piece[0].tokens, piece[0]))
        else:
            spans.append(Span(end, piece))
        end = spans[-1].end
    return Plan(tuple(spans))


def distance(one: Logits, other: Logits) -> float:
    """The root mean square of what two rows of logits differ by. Their own standard deviation is about 2."""
    return float(np.sqrt(np.mean((one - other) ** 2)))
