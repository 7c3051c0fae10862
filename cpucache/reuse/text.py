"""The lookup for text without markup: the longest saved prefix, then slices of single segments in other contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from cpucache.layout import Text, Tokens
from cpucache.reuse.chain import Chain
from cpucache.reuse.fidelity import Fidelity, Reuse
from cpucache.reuse.kv_cache import KVCache
from cpucache.reuse.plan import Plan, Relation, Slice, Span
from cpucache.reuse.repair import Repair
from cpucache.stages import stage
from cpucache.store import text_id

PlanText: TypeAlias = Callable[[Sequence[Span], Tokens], Plan]
"""Returns the plan of some spans and the tokens after them."""
SHORTEST = 64
"""Minimum length, in tokens, of a run of segments spliced from other contexts. A shorter run saves little time, and
what follows is as far from full prefill as after a longer one."""
QUESTION = 128
"""Maximum length, in tokens, of a question: the segment before the tokens that open the answer. Its slice from another
context has attended to another text, so it is not spliced, unless it is marked as a part."""
_ANSWER_HEADER = 16  # maximum length, in tokens, of what opens the answer
_ENDING = 3  # the same of what ends the message of the question


def plan_text(
    kv_cache: KVCache,
    repair: Repair,
    text: Text,
    fidelity: Fidelity,
    reuse: Reuse,
    before: Sequence[Span] = (),
) -> Plan:
    """Returns the plan of a text, after the spans that precede it.

    The plan begins with the longest saved prefix of the text: at each position, the longest exact slice, however the
    text was cut when it was saved. The rest is cut into segments. A segment that may come from another context uses a
    slice evaluated there; any other segment is evaluated and saved, and so is the last one if it is short enough to be
    the question. The last token is always evaluated. The plan is exact for models whose states can't be shifted,
    whatever ``reuse`` is.

    Args:
        kv_cache: Provides the store and the model's slice keys.
        repair: Chooses the segments to recompute.
        text: The text; segments within its ``parts`` may use slices from other contexts.
        fidelity: Whether slices must be exact; if not, the share of tokens from other contexts to recompute.
        reuse: ``"anywhere"`` lets all segments use slices from other contexts, ``"exact"`` none.
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
    """``plan_text`` with its choices resolved: ``share`` is the share of tokens from other contexts to recompute."""
    chain = Chain(kv_cache.slices)
    for span in before:
        chain.add(span)
    start = chain.end
    _add_known_prefix(kv_cache, chain, text.tokens[:-1])
    *segments, tail = _segments(kv_cache, text, chain.end - start)
    if anywhere or text.parts:
        asked = _question(text, segments, tail)
        reusable = (each for each in segments if anywhere or text.within(each.begin, each.end))
        _find(kv_cache, [each for each in reusable if each not in asked], start)
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
            why = each.why if absent else "" if exact else "not yet evaluated after this text"
            relation = "exact" if exact else relation
            chain.add(replace(slice_.span, start=chain.end, relation=relation, missing=absent, why=why))
        preceding.add(text_id(each.tokens))
    chain.evaluate(tail.tokens, "the last segment")
    return Plan(tuple(chain.spans))


@dataclass(eq=False)
class _Segment:
    """A segment after the saved prefix."""

    begin: int
    tokens: Tokens
    slice: Slice | None = None
    """A slice of its tokens, evaluated in another context."""
    recomputed: bool = False
    why: str = "no slice yet"
    """The reason for evaluating the segment, if it is evaluated."""

    @property
    def end(self) -> int:
        return self.begin + len(self.tokens)


def _add_known_prefix(kv_cache: KVCache, chain: Chain, tokens: Tokens) -> None:
    """Adds the exact slices that the store has of the first of these tokens, at each position the longest one."""
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
    """Cuts a text into segments from index ``begin`` on; the last one contains the last token and is evaluated."""
    ends = [end for end in text.ends(kv_cache.slices.cuts) if end > begin]
    found = []
    for end in ends[:-1]:
        found.append(_Segment(begin, text.tokens[begin:end]))
        begin = end
    if kv_cache.slices.memory.points and begin < len(text.tokens) - 1:
        # A recurrent state can't be rolled back, so the state before the last token needs a slice of its own.
        found.append(_Segment(begin, text.tokens[begin:-1]))
        begin = len(text.tokens) - 1
    return [*found, _Segment(begin, text.tokens[begin:])]


def _question(text: Text, segments: Sequence[_Segment], tail: _Segment) -> list[_Segment]:
    """The segments with the question, if ``tail`` only opens the answer: the last ones, down to one with some words."""
    found: list[_Segment] = []
    if len(tail.tokens) <= _ANSWER_HEADER:
        for each in reversed(segments):
            if len(each.tokens) > QUESTION or text.within(each.begin, each.end):
                break
            found.append(each)
            if len(each.tokens) > _ENDING:
                break
    return found


def _find(kv_cache: KVCache, segments: Sequence[_Segment], start: int) -> None:
    """Assigns to each segment the best stored slice of its tokens, whatever its context.

    ``start`` is the position of the text's first token.
    """
    contents = [kv_cache.slices.content(each.tokens) for each in segments]
    variants = kv_cache.store.variants(contents)
    for each, content in zip(segments, contents, strict=True):
        found = variants[content]
        if found:
            # The longest context first, then a slice that needs no shift.
            key, info = max(found, key=lambda one: (one[1].attended_tokens, one[1].start == start + each.begin, one[0]))
            each.slice = Slice.described(key, info, each.tokens)


def _drop_short(segments: Sequence[_Segment]) -> None:
    """Drops the slices of runs of segments that are shorter than ``SHORTEST`` tokens in all."""
    run: list[_Segment] = []
    for each in [*segments, None]:
        if each is not None and each.slice:
            run.append(each)
            continue
        if sum(len(one.tokens) for one in run) < SHORTEST:
            for one in run:
                one.slice, one.why = None, f"fewer than {SHORTEST} known tokens in a row"
        run = []
