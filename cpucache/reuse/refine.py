"""Refining: builds the exact slices of recent prompts while the engine is idle."""

from __future__ import annotations

from collections.abc import Sequence

from cpucache.layout import Bound, Segment
from cpucache.reuse.chain import Chain
from cpucache.reuse.kv_cache import KVCache
from cpucache.reuse.plan import Plan, Slice
from cpucache.reuse.progress import OnProgress
from cpucache.reuse.reports import Encoded
from cpucache.reuse.slices import Slices
from cpucache.reuse.slot import Slot
from cpucache.reuse.work import Task
from cpucache.store import Part


def asked(bound: Bound) -> list[Part]:
    """Returns the parts of a prompt that ``refine`` makes exact: all up to the last segment that may have slices."""
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


def text_parts(plan: Plan) -> list[Part]:
    """Returns the parts of a text without markup: all spans but the last, which every prompt evaluates."""
    return [Part(span.tokens, "", saved=True) for span in plan.spans[:-1]]


def exact_slices(parts: Sequence[Part], slices: Slices) -> list[Slice]:
    """Returns the slices of the saved parts of a combination, each with all preceding parts as its context."""
    chain = Chain(slices)
    exact = []
    for part in parts:
        if part.saved:
            exact.append(chain.next(part.tokens, part.module))
            chain.add(exact[-1].span)
        else:
            chain.evaluate(part.tokens, 'cache="false"', part.module)
    return exact


def _to_refine(kv_cache: KVCache, schema: str | None) -> int:
    """Number of tokens of the exact slices that ``refine`` would encode."""
    slices, store = kv_cache.slices, kv_cache.store
    wanted: dict[Slice, None] = {}
    for combination in store.asked.combinations(slices.fingerprint, slices.scope, schema):
        wanted.update(dict.fromkeys(_wanted(kv_cache, combination.parts)))
    return sum(len(slice_.tokens) for slice_ in wanted if slice_.key not in store)


def _wanted(kv_cache: KVCache, parts: Sequence[Part]) -> list[Slice]:
    """The exact slices of a combination; none if it is longer than the llama.cpp context."""
    fits = sum(len(part.tokens) for part in parts) < kv_cache.context.n_ctx
    return exact_slices(parts, kv_cache.slices) if fits else []


def refine(
    kv_cache: KVCache, slot: Slot, schema: str | None, report: Encoded, progress: OnProgress | None = None
) -> Task[None]:
    """Encodes missing exact slices, the most asked combinations first.

    A closed task keeps the slices encoded so far; a new task encodes the rest. Combinations that do not fit into the
    llama.cpp context are dropped.

    Args:
        kv_cache: Encodes the slices; its store lists the combinations asked.
        slot: Where slices are evaluated.
        schema: Only prompts on this schema; all for ``None``.
        report: Receives the counts of the slices encoded.
        progress: Called with the number of tokens of the slices encoded so far, and the total.
    """
    slices, store = kv_cache.slices, kv_cache.store
    total = report.tokens + _to_refine(kv_cache, schema)
    for combination in store.asked.combinations(slices.fingerprint, slices.scope, schema):
        wanted = _wanted(kv_cache, combination.parts)
        for slice_ in wanted:
            yield from kv_cache.encode(slot, [slice_], combination.schema, report=report, wait=False)
            if progress:
                progress(report.tokens, total)
        if all(slice_.key in store for slice_ in wanted):
            store.asked.done(combination.id)
