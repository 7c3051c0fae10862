"""The lookup: selects the best existing slice for each segment of a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from cpucache.layout import Bound, NewText, Piece, Segment
from cpucache.reuse.chain import Chain
from cpucache.reuse.fidelity import Fidelity, Reuse
from cpucache.reuse.kv_cache import KVCache
from cpucache.reuse.plan import Plan, Relation, Slice, Span
from cpucache.reuse.repair import Repair
from cpucache.stages import stage
from cpucache.store import SliceInfo, Store, text_id

_CLOSING = 16  # maximum length of a closing text, in tokens


class Found(NamedTuple):
    """A stored slice of a segment's tokens, and the relation of its context to the prompt."""

    slice: Slice
    relation: Relation

    def worth(self, start: int) -> tuple[bool, int, bool, str]:
        """Sort key of the slices of one segment: the lookup takes the slice with the greatest key.

        Foreign slices rank last. Then the longer context wins (bench/RESULTS.md), then a slice saved at position
        ``start``, which needs no shift. The slice key breaks ties.
        """
        return self.relation != "foreign", self.slice.attended_tokens, self.slice.start == start, self.slice.key


class Lookup:
    """Plans prompts on schemas from the slices in the store.

    Args:
        kv_cache: Provides the store and the model's slice keys.
        repair: Chooses the modules to recompute.
    """

    def __init__(self, kv_cache: KVCache, repair: Repair) -> None:
        self._kv_cache = kv_cache
        self._repair = repair

    @property
    def store(self) -> Store:
        """The store that the lookup searches."""
        return self._kv_cache.store

    def plan(
        self,
        bound: Bound,
        fidelity: Fidelity,
        *,
        reuse: Reuse = "schema",
        packed: bool | None = None,
        ends: bool = True,
    ) -> Plan:
        """Returns the plan of a prompt.

        Args:
            bound: The prompt on its schema.
            fidelity: Whether slices must be exact; if not, the share of spliced tokens to recompute.
            reuse: ``"anywhere"`` also admits foreign slices.
            packed: Whether to pack modules back to back even if the layout reserves positions. Exact plans and plans
                that recompute are always packed.
            ends: Whether the prompt ends with the plan. Its last token is then always evaluated: the answer starts from
                its logits, which no slice holds.
        """
        # llama_decode evaluates only at a sequence's last position + 1, so recomputed tokens can't follow a gap.
        packed = bound.layout.packed or bool(packed) or fidelity.exact or fidelity.recompute > 0
        with stage("look up"):
            planning = _Planning(self._kv_cache, bound, fidelity, reuse, packed=packed, ends=ends)
            plan = Plan(tuple(planning.run()))
            return plan if fidelity.exact else self._repaired(plan, fidelity)

    def _repaired(self, plan: Plan, fidelity: Fidelity) -> Plan:
        """Replaces the slices to recompute and the schema's closing text by tokens to evaluate."""
        budget = math.ceil(fidelity.recompute * sum(len(span.tokens) for span in plan.spans if span.slice))
        chosen = (self._relevant(plan.spans, budget) if budget else set()) | _closing(plan.spans)
        if not chosen:
            return plan
        chain = Chain(self._kv_cache.slices)
        for span in plan.spans:
            if span in chosen:
                # A span without a slice, so that the slot evaluates it in order and later fresh tokens attend to it.
                assert span.slice is not None
                module = span.slice.module
                chain.add(Span(chain.end, span.tokens, recomputed=True, module=module, why="recomputed"))
            else:
                # Recomputed spans close gaps, so the fresh tokens after them move to lower positions.
                chain.add(span if span.slice else replace(span, start=chain.end))
        besides = [span.slice for span in plan.spans if span in chosen and span.missing and span.slice]
        return Plan(tuple(chain.spans), tuple(besides))

    def _relevant(self, spans: Sequence[Span], budget: int) -> set[Span]:
        """Spans of the non-exact modules most relevant to the new text, up to about ``budget`` tokens."""
        modules: dict[str, list[Span]] = {}
        for span in spans:
            if span.slice and span.relation != "exact":
                modules.setdefault(span.slice.module, []).append(span)
        parts = [[span.slice.tokens for span in module if span.slice] for module in modules.values()]
        new = [span.tokens for span in spans if span.slice is None]
        found = self._repair.choose(parts, new, budget)
        return {span for index, module in enumerate(modules.values()) if index in found for span in module}


def _closing(spans: tuple[Span, ...]) -> set[Span]:
    """Returns the schema's closing text (the last slice of the plan) if it is short, not exact and followed by text.

    An example is the end of the system turn: two tokens that influence how the answer begins. Evaluating them in the
    same batch as the question costs almost nothing.
    """
    last = next((span for span in reversed(spans) if span.slice), None)
    if last is None or last.slice is None or last.slice.module or last.relation == "exact" or last is spans[-1]:
        return set()
    return {last} if len(last.tokens) <= _CLOSING else set()


class _Planning:
    """Plans one prompt, piece by piece."""

    def __init__(
        self, kv_cache: KVCache, bound: Bound, fidelity: Fidelity, reuse: Reuse, *, packed: bool, ends: bool
    ) -> None:
        self._store = kv_cache.store
        self._slices = kv_cache.slices
        self._layout = bound.layout
        self._exact = fidelity.exact
        self._cuts = kv_cache.context.memory.cuts
        self._reuse = reuse
        self._packed = packed
        self._ends = ends
        self._pieces = [piece for piece in bound.pieces if len(piece.tokens) or isinstance(piece, NewText)]
        self._contents = {
            piece: self._slices.content(piece.tokens)
            for piece in self._pieces
            if isinstance(piece, Segment) and piece.cache and not self._exact
        }
        self._variants: Mapping[str, list[tuple[str, SliceInfo]]] = self._store.variants(self._contents.values())
        self._prompt = Chain(self._slices)
        self._before: set[bytes] = set()
        """The ``text_id`` of each piece that precedes the current one in the prompt."""
        self._text: Chain | None = None
        """The schema's text in the prompt so far, with placeholders instead of arguments. ``None`` while it equals
        ``_prompt``."""

    def run(self) -> list[Span]:
        """Returns the spans of the prompt."""
        cached = [index for index, piece in enumerate(self._pieces) if isinstance(piece, Segment) and piece.cache]
        last = cached[-1] if cached else -1
        # An argument may be empty, so the last piece need not be the last one with tokens.
        end = max((index for index, piece in enumerate(self._pieces) if len(piece.tokens)), default=-1)
        for index, piece in enumerate(self._pieces):
            size = len(piece.tokens) - (self._ends and index == end)
            if isinstance(piece, NewText):
                self._new(piece, followed=index < last)
            elif not piece.cache or not size:
                self._evaluate(piece, 'cache="false"' if not piece.cache else "the last token")
            else:
                self._segment(piece, size)
                self._prompt.evaluate(piece.tokens[size:], "the last token", piece.module)
            if len(piece.tokens):
                self._before.add(text_id(piece.tokens))
        return self._prompt.spans

    # -- text of the prompt -------------------------------------------------------------------------------------------
    def _new(self, piece: NewText, *, followed: bool) -> None:
        """Adds new text of the prompt: evaluated, unless ``refine`` saved an exact slice of it or the plan is exact."""
        text = self._schema_text().copy()
        text.evaluate(piece.placeholder)
        if followed and self._prompt.trail.exact and len(piece.tokens):
            candidate = self._prompt.next(piece.tokens)
            if self._exact or candidate.key in self._store:
                self._prompt.add(candidate.span)
                self._text = text
                return
        self._prompt.evaluate(piece.tokens, "new text")
        self._text = text

    def _evaluate(self, piece: Piece, why: str) -> None:
        module = piece.module if isinstance(piece, Segment) else ""
        if self._text is not None:
            self._text.evaluate(piece.tokens)
        self._prompt.evaluate(piece.tokens, why, module)

    def _schema_text(self) -> Chain:
        """The schema's text so far, whether it differs from the prompt or not."""
        return self._prompt if self._text is None else self._text

    # -- text of the schema ------------------------------------------------------------------------------------------
    def _segment(self, segment: Segment, size: int) -> None:
        """Adds the first ``size`` tokens of a segment: from an exact, else the best usable, else a missing slice."""
        candidate = self._prompt.next(segment.tokens if self._cuts else segment.tokens[:size], segment.module)
        if self._prompt.trail.exact and (self._exact or candidate.key in self._store):
            absent = candidate.key not in self._store
            why = "no exact slice yet" if absent else ""
            self._take(segment, candidate, candidate.start, size, "exact", why, missing=absent)
            return
        found = self._found(segment)
        start = self._prompt.end
        if not self._packed and segment.reserved is not None:
            start = max(segment.reserved, start)
        if found:
            best = max(found, key=lambda each: each.worth(start))
            self._take(segment, best.slice, start, size, best.relation, "not yet evaluated after this text")
            return
        candidate = self._missing(segment)
        trail = self._prompt.trail
        # A slice encoded in the prompt's own context keeps the position at which it is encoded.
        in_place = candidate.context_key == trail.key and candidate.start >= start
        exact = in_place and trail.exact and candidate.start == trail.end
        start = candidate.start if in_place else start
        relation: Relation = "exact" if exact else self._relation(frozenset(candidate.attends_to))
        self._take(segment, candidate, start, size, relation, self._why_missing(segment), missing=True)

    def _found(self, segment: Segment) -> list[Found]:
        """Returns the stored slices of a segment that this prompt may splice."""
        limit = self._layout.may_attend_to(segment)
        found = []
        for key, info in self._variants.get(self._contents[segment], []):
            slice_ = Slice.described(key, info, segment.tokens, segment.module)
            if limit is not None and not limit.issuperset(slice_.attends_to):
                continue
            relation = self._relation(frozenset(slice_.attends_to))
            if relation != "foreign" or (self._reuse == "anywhere" and limit is None):
                found.append(Found(slice_, relation))
        return found

    def _relation(self, attends_to: frozenset[bytes]) -> Relation:
        """Relation of a context to the prompt so far; ``exact`` is decided by the caller."""
        if attends_to <= self._before:
            return "clean"
        return "related" if attends_to <= self._layout.texts else "foreign"

    def _missing(self, segment: Segment) -> Slice:
        """The slice to encode for a segment without a usable one.

        Its context is the schema's text in the prompt, without the prompt's own text, so that other prompts can use it.
        """
        limit = self._layout.may_attend_to(segment)
        context = self._schema_text().only(self._layout.texts if limit is None else limit)
        return context.next(segment.tokens, segment.module, None if self._packed else segment.reserved)

    def _why_missing(self, segment: Segment) -> str:
        """The reason for which no stored slice of a segment is usable."""
        there = self._variants.get(self._contents[segment])
        if not there:
            return "no slice yet"
        limited = self._layout.may_attend_to(segment) is not None
        return "its slices attended to other modules" if limited else "its slices attended to text of other prompts"

    def _take(
        self,
        segment: Segment,
        slice_: Slice,
        start: int,
        size: int,
        relation: Relation,
        why: str = "",
        *,
        missing: bool = False,
    ) -> None:
        """Adds the first ``size`` tokens of a slice at position ``start``."""
        span = Span(start, slice_.tokens[:size], slice_, relation, missing=missing, why=why)
        if self._text is not None:
            # New text shifts a segment in the prompt, but not in the schema's text.
            reserved = None if self._packed else segment.reserved
            self._text.add(replace(span, start=max(reserved or 0, self._text.end)))
        self._prompt.add(span)
