"""The lookup for text without markup: the longest known prefix, then slices with other contexts where allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from cpucache.layout import Text, Tokens
from cpucache.reuse.chain import Chain
from cpucache.reuse.fidelity import Fidelity, Reuse
from cpucache.reuse.kv_cache import KVCache
from cpucache.reuse.repair import Repair
from cpucache.reuse.slices import Plan, Relation, Slice, Span
from cpucache.stages import stage
from cpucache.store import text_id

PlanText: TypeAlias = Callable[[Sequence[Span], Tokens], Plan]
"""Plans tokens after the spans that precede them."""
SHORTEST = 64
"""Minimum number of consecutive tokens to take from slices with other contexts; fewer are evaluated as fast."""


def plan_text(
    kv_cache: KVCache,
    repair: Repair,
    text: Text,
    fidelity: Fidelity,
    reuse: Reuse,
    before: Sequence[Span] = (),
) -> Plan:
    """Returns the plan of a text, with the spans before it.

    The plan begins with exact slices: the longest saved slice after the spans so far is added until none exists. The
    remaining segments use slices with other contexts where ``reuse`` allows it and such slices exist; the others are
    evaluated and saved. The last token is evaluated in any case. Models whose states can't be shifted get exact plans,
    whatever ``reuse`` is.

    Args:
        kv_cache: KV cache whose store is searched.
        repair: Selects the segments to recompute.
        text: The text; segments within its parts may use slices with other contexts.
        fidelity: Whether slices must be exact; otherwise the share of tokens from other contexts to recompute.
        reuse: ``"anywhere"``: all segments may use slices with other contexts. ``"exact"``: none may.
        before: Spans that precede the text. The plan begins with them, unchanged.
    """
    with stage("look up"):
        exact = reuse == "exact" or fidelity.exact or not kv_cache.context.memory.moves
        text = replace(text, parts=()) if exact else text
        anywhere = reuse == "anywhere" and not exact
        return _planned(kv_cache, repair, text, before, anywhere=anywhere, share=fidelity.recompute)


def _planned(
    kv_cache: KVCache, repair: Repair, text: Text, before: Sequence[Span], *, anywhere: bool, share: float
) -> Plan:
    chain = Chain(kv_cache.slices)
    for span in before:
        chain.add(span)
    start = chain.end
    _add_known_prefix(kv_cache, chain, text.tokens[:-1])
    *segments, tail = _segments(kv_cache, text, chain.end - start)
    if anywhere or text.parts:
        _find(kv_cache, [each for each in segments if anywhere or text.within(each.begin, each.end)], start)
        _drop_short(segments)
        taken = [each for each in segments if each.slice]
        budget = math.ceil(share * sum(len(each.tokens) for each in taken))
        new = [each.tokens for each in segments if not each.slice] + [tail.tokens]
        for index in repair.choose([[each.tokens] for each in taken], new, budget) if budget else ():
            taken[index].recomputed = True
    preceding = {text_id(span.tokens) for span in chain.spans}
    for each in segments:
        if each.recomputed:
            chain.evaluate(each.tokens, "recomputed", again=True)
        else:
            candidate = chain.next(each.tokens)
            there = candidate.key in kv_cache.store
            slice_ = candidate if there or each.slice is None else each.slice
            relation: Relation = "clean" if preceding.issuperset(slice_.attends_to) else "foreign"
            exact = slice_ is candidate and chain.trail.exact
            absent = slice_ is candidate and not there
            why = each.why if absent else "" if exact else "not yet evaluated behind this"
            relation = "exact" if exact else relation
            chain.add(replace(slice_.span, start=chain.end, relation=relation, missing=absent, why=why))
        preceding.add(text_id(each.tokens))
    chain.evaluate(tail.tokens, "the last segment")
    return Plan(tuple(chain.spans))


@dataclass(eq=False)
class _Segment:
    """A segment after the known prefix."""

    begin: int
    tokens: Tokens
    slice: Slice | None = None
    """Slice with another context to use for the segment, if any."""
    recomputed: bool = False
    why: str = "no slice yet"
    """Reason for evaluating the segment, if it is evaluated."""

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)


def _add_known_prefix(kv_cache: KVCache, chain: Chain, tokens: Tokens) -> None:
    """Adds saved slices of a prefix of ``tokens`` to ``chain``, each with all tokens before it as context."""
    store, start = kv_cache.store, chain.end
    while len(left := tokens[chain.end - start :]):
        for size in sorted((size for size in store.sizes_after(chain.trail.key) if size <= len(left)), reverse=True):
            known = chain.next(left[:size])
            if known.key in store:
                break
        else:
            break
        chain.add(known.span)


def _segments(kv_cache: KVCache, text: Text, begin: int) -> list[_Segment]:
    """Returns the segments from position ``begin`` on; the last one includes the last token."""
    ends = [end for end in text.ends(kv_cache.slices.cuts) if end > begin]
    found = []
    for end in ends[:-1]:
        found.append(_Segment(begin, text.tokens[begin:end]))
        begin = end
    if kv_cache.slices.memory.points and begin < len(text.tokens) - 1:
        # The state before the last token can't be recovered after that token has been evaluated.
        found.append(_Segment(begin, text.tokens[begin:-1]))
        begin = len(text.tokens) - 1
    return [*found, _Segment(begin, text.tokens[begin:])]


def _find(kv_cache: KVCache, segments: Sequence[_Segment], start: int) -> None:
    """Sets the best saved slice of each segment, in any context. ``start``: position of the text's first token."""
    contents = [kv_cache.slices.content(each.tokens) for each in segments]
    variants = kv_cache.store.variants(contents)
    for each, content in zip(segments, contents, strict=True):
        found = variants[content]
        if found:
            # Prefer the longest context, then a slice that needs no shift.
            key, info = max(found, key=lambda one: (one[1].attended_tokens, one[1].start == start + each.begin, one[0]))
            each.slice = Slice.described(key, info, each.tokens)


def _drop_short(segments: Sequence[_Segment]) -> None:
    """Removes slices that form runs of fewer than ``SHORTEST`` tokens."""
    run: list[_Segment] = []
    for each in [*segments, None]:
        if each is not None and each.slice:
            run.append(each)
            continue
        if sum(len(one.tokens) for one in run) < SHORTEST:
            for one in run:
                one.slice, one.why = None, f"fewer than {SHORTEST} known tokens in a row"
        run = []
