"""The lookup: for each segment of a prompt, the best slice that exists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from cpucache.layout import Bound, NewText, Piece, Segment
from cpucache.reuse.chain import Chain
from cpucache.reuse.fidelity import Fidelity, Reuse
from cpucache.reuse.repair import Repair
from cpucache.reuse.slices import Plan, Relation, Slice, Span
from cpucache.reuse.workspace import Workspace
from cpucache.stages import stage
from cpucache.store import SliceInfo, Store, text_id

_CLOSING = 16  # tokens of a closing text at most


class Found(NamedTuple):
    """A slice that the store has of a segment's tokens."""

    slice: Slice
    relation: Relation

    def worth(self, start: int) -> tuple[bool, int, bool, str]:
        """What decides between the slices of a segment: the greatest is taken.

        Those that were evaluated behind most text come first (bench/RESULTS.md), then those that need not be moved to
        ``start``.
        """
        return self.relation != "foreign", self.slice.sees_tokens, self.slice.start == start, self.slice.key


class Lookup:
    """Plans prompts on schemas by the slices that there are."""

    def __init__(self, workspace: Workspace, repair: Repair) -> None:
        self._workspace = workspace
        self._repair = repair

    @property
    def store(self) -> Store:
        """Where slices are found."""
        return self._workspace.store

    def plan(
        self,
        bound: Bound,
        fidelity: Fidelity,
        *,
        reuse: Reuse = "schema",
        packed: bool | None = None,
        ends: bool = True,
    ) -> Plan:
        """The plan of a prompt.

        Args:
            bound: The prompt on its schema.
            fidelity: Whether slices must be exact, and which share of them is recomputed otherwise.
            reuse: ``"anywhere"`` admits foreign slices, too.
            packed: Modules stand back to back even where the layout reserves positions.
            ends: The prompt ends here, so that its last token is evaluated: the answer begins with its logits, which no
                slice holds.
        """
        # Tokens recomputed could not be evaluated behind a gap.
        packed = bound.layout.packed or bool(packed) or fidelity.exact or fidelity.recompute > 0
        with stage("look up"):
            planning = _Planning(self._workspace, bound, fidelity, reuse, packed=packed, ends=ends)
            plan = Plan(tuple(planning.run()))
            return plan if fidelity.exact else self._repaired(plan, fidelity)

    def _repaired(self, plan: Plan, fidelity: Fidelity) -> Plan:
        """The plan with slices within the budget evaluated afresh, and the schema's closing text."""
        budget = math.ceil(fidelity.recompute * sum(len(span.tokens) for span in plan.spans if span.slice))
        chosen = (self._relevant(plan.spans, budget) if budget else set()) | _closing(plan.spans)
        if not chosen:
            return plan
        chain = Chain(self._workspace.slices)
        for span in plan.spans:
            if span in chosen:
                # Evaluated like new text, so that what follows it attends to it as it is then.
                assert span.slice is not None
                module = span.slice.module
                chain.add(Span(chain.end, span.tokens, recomputed=True, module=module, why="recomputed"))
            else:
                # Behind what leaves a gap no longer, tokens to evaluate stand further down.
                chain.add(span if span.slice else replace(span, start=chain.end))
        besides = [span.slice for span in plan.spans if span in chosen and span.made and span.slice]
        return Plan(tuple(chain.spans), tuple(besides))

    def _relevant(self, spans: Sequence[Span], budget: int) -> set[Span]:
        """The slices of the most relevant modules that are not exact, ``budget`` tokens in all."""
        modules: dict[str, list[Span]] = {}
        for span in spans:
            if span.slice and span.relation != "exact":
                modules.setdefault(span.slice.module, []).append(span)
        parts = [[span.slice.tokens for span in module if span.slice] for module in modules.values()]
        new = [span.tokens for span in spans if span.slice is None]
        found = self._repair.choose(parts, new, budget)
        return {span for index, module in enumerate(modules.values()) if index in found for span in module}


def _closing(spans: tuple[Span, ...]) -> set[Span]:
    """The schema's closing text in a plan, if it is short and not exact.

    That is for example the end of its system turn: two tokens that decide how the answer begins, and cost nothing where
    the question is evaluated with them.
    """
    last = next((span for span in reversed(spans) if span.slice), None)
    if last is None or last.slice is None or last.slice.module or last.relation == "exact" or last is spans[-1]:
        return set()
    return {last} if len(last.tokens) <= _CLOSING else set()


class _Planning:
    """One prompt, planned piece by piece."""

    def __init__(
        self, workspace: Workspace, bound: Bound, fidelity: Fidelity, reuse: Reuse, *, packed: bool, ends: bool
    ) -> None:
        self._store = workspace.store
        self._slices = workspace.slices
        self._layout = bound.layout
        self._exact = fidelity.exact
        self._cuts = workspace.context.memory.cuts
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
        """The texts that stand before the piece at hand."""
        self._text: Chain | None = None
        """The schema's text in the prompt so far, placeholders in the place of arguments; ``None``: the same as the
        prompt so far."""

    def run(self) -> list[Span]:
        """The spans of the prompt."""
        cached = [index for index, piece in enumerate(self._pieces) if isinstance(piece, Segment) and piece.cache]
        last = cached[-1] if cached else -1
        # An argument may be empty.
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

    # -- what a prompt brings ----------------------------------------------------------------------------------------
    def _new(self, piece: NewText, *, followed: bool) -> None:
        """Text that the prompt brings: evaluated, unless the very same prompt was refined."""
        text = self._schema_text().copy()
        text.evaluate(piece.placeholder)
        if followed and self._prompt.trail.exact and len(piece.tokens):
            made = self._prompt.next(piece.tokens)
            if self._exact or made.key in self._store:
                self._prompt.add(made.span)
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
        return self._prompt if self._text is None else self._text

    # -- what the schema has -----------------------------------------------------------------------------------------
    def _segment(self, segment: Segment, size: int) -> None:
        made = self._prompt.next(segment.tokens if self._cuts else segment.tokens[:size], segment.module)
        if self._prompt.trail.exact and (self._exact or made.key in self._store):
            absent = made.key not in self._store
            why = "no exact slice yet" if absent else ""
            self._take(segment, made, made.start, size, "exact", why, made=absent)
            return
        found = self._found(segment)
        start = self._prompt.end
        if not self._packed and segment.home is not None:
            start = max(segment.home, start)
        if found:
            best = max(found, key=lambda each: each.worth(start))
            self._take(segment, best.slice, start, size, best.relation, "not yet evaluated behind this")
            return
        made = self._missing(segment)
        trail = self._prompt.trail
        # What is evaluated right where the prompt has it stays there.
        in_place = made.context_key == trail.key and made.start >= start
        exact = in_place and trail.exact and made.start == trail.end
        start = made.start if in_place else start
        relation: Relation = "exact" if exact else self._relation(frozenset(made.sees))
        self._take(segment, made, start, size, relation, self._why_missing(segment), made=True)

    def _found(self, segment: Segment) -> list[Found]:
        """The slices that this prompt may take of a segment."""
        limit = self._layout.may_attend_to(segment)
        found = []
        for key, info in self._variants.get(self._contents[segment], []):
            slice_ = Slice.described(key, info, segment.tokens, segment.module)
            if limit is not None and not limit.issuperset(slice_.sees):
                continue
            relation = self._relation(frozenset(slice_.sees))
            if relation != "foreign" or (self._reuse == "anywhere" and limit is None):
                found.append(Found(slice_, relation))
        return found

    def _relation(self, sees: frozenset[bytes]) -> Relation:
        if sees <= self._before:
            return "clean"
        return "related" if sees <= self._layout.texts else "foreign"

    def _missing(self, segment: Segment) -> Slice:
        """The slice to make of a segment that has none: behind the schema's text in the prompt, so that other prompts
        can take it, too."""
        limit = self._layout.may_attend_to(segment)
        context = self._schema_text().only(self._layout.texts if limit is None else limit)
        return context.next(segment.tokens, segment.module, None if self._packed else segment.home)

    def _why_missing(self, segment: Segment) -> str:
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
        made: bool = False,
    ) -> None:
        span = Span(start, slice_.tokens[:size], slice_, relation, made=made, why=why)
        if self._text is not None:
            # Where the schema has it, wherever new text has pushed it in the prompt.
            home = None if self._packed else segment.home
            self._text.add(replace(span, start=max(home or 0, self._text.end)))
        self._prompt.add(span)
