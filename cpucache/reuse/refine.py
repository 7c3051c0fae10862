"""Refining: exact slices of what was asked lately, made in small steps when nothing else is to be done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cpucache.layout import Bound, Segment
from cpucache.reuse.chain import Chain
from cpucache.reuse.encoder import Made
from cpucache.reuse.slices import Slice, Slices
from cpucache.reuse.workspace import Workspace
from cpucache.store import Part, Store

STEP = 0.15
"""Seconds of a step, so that a request that comes in waits for less than 0.2 s."""


def asked(bound: Bound) -> list[Part]:
    """What of a prompt is to be exact the next time: everything up to the last segment that has slices."""
    parts = []
    last = 0
    for piece in bound.pieces:
        segment = piece if isinstance(piece, Segment) else None
        saved = segment is None or segment.cache
        if len(piece.tokens):
            parts.append(Part(piece.tokens, segment.module if segment else "", saved))
        if segment is not None and saved:
            last = len(parts)
    return parts[:last]


def exact_slices(parts: Sequence[Part], slices: Slices) -> list[Slice]:
    """The slices that answer a combination exactly, each behind all before it."""
    chain = Chain(slices)
    made = []
    for part in parts:
        if part.saved:
            made.append(chain.next(part.tokens, part.module))
            chain.add(made[-1].span)
        else:
            chain.evaluate(part.tokens, 'cache="false"', part.module)
    return made


def to_refine(slices: Slices, store: Store, schema: str | None = None) -> int:
    """Tokens of the exact slices that ``refine`` would make."""
    wanted: dict[Slice, None] = {}
    for combination in store.asked.combinations(slices.fingerprint, slices.state_format, schema):
        wanted.update(dict.fromkeys(exact_slices(combination.parts, slices)))
    return sum(len(slice_.tokens) for slice_ in wanted if slice_.key not in store)


def refine(workspace: Workspace, store: Store, schema: str | None = None) -> Iterator[Made | None]:
    """Make the exact slices that are missing, the most asked combinations first.

    Gives ``None`` after each step and each slice that was made. The caller may do anything between two steps: a slice
    that is under way then is begun again, what is made stays.

    Args:
        workspace: Where slices are evaluated.
        store: Knows what was asked, and keeps the slices.
        schema: Only prompts on this schema.
    """
    slices = workspace.slices
    for combination in store.asked.combinations(slices.fingerprint, slices.state_format, schema):
        wanted = exact_slices(combination.parts, slices)
        if sum(len(part.tokens) for part in combination.parts) >= workspace.context.n_ctx:
            store.asked.done(combination.id)
            continue
        end = "made"
        for slice_ in wanted:
            while slice_.key not in store and end != "refused":
                end = yield from workspace.make_in_steps(slice_, combination.schema, STEP)
        if end != "refused":
            store.asked.done(combination.id)
