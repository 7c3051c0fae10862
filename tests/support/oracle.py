"""What modular reuse means, worked out from the rules alone: what spliced logits must be, computed in NumPy.

Nothing of ``cpucache.layout`` or ``cpucache.reuse`` is used here. The rules:

- The text of a scope (the schema, or a module) between its modules, unions and parameters is one *run*; so is what
  stands in for a parameter: its scaffold, filled up with the filler to the parameter's length.
- *Positions.* Runs follow one another in document order. The members of a union all start at the same position, and
  what follows it stands behind the longest. Packed, each run stands right behind what it sees.
- *Sight.* A run sees an earlier one if it lies within the scope of that, or if all that parts it from the scope of
  the earlier one are unions of which that one is in the scaffold member, and itself in no other. Anchored on nothing,
  a run inside a module sees none that lies outside that module.
- *Scaffold sets.* A run inside a module of a set has a state in the set besides its own. There it sees what it sees
  otherwise, and what else is parted from it by modules of the set as if by scaffold members. What it sees inside
  modules of the set has its state in the set, too.
- *State.* A run is evaluated right behind the last that it sees, all of these at their own positions (packed: back to
  back, from position 0). Then it is moved.
- *Prompts.* Runs stand at their positions, or behind what is before them if that reaches further; packed, always right
  behind it. Arguments, new text, turns, modules with ``cache="false"`` and the last token of all are evaluated there,
  in the sight of everything before. Runs have their state in a set if the prompt includes all modules of the set in
  the schema's order: in the set with the most modules, of several such sets around a run, and then in the first.
- *Leads.* The schema is parted into stretches, each twice as long as leads are to be, by where runs begin that follow
  one another in document order, what follows a union behind its longest member. In a prompt, a cached run that is not
  in the state of a set has for its lead what stands before it of the same stretch, and so many tokens before that: as
  far back as these are of runs each of which stands right before the next in prompts that leave nothing out, and which
  lie in no member of a union but those around the run and around the nearest that it does not see. A lead begins with
  what the run does not see; and what it does see is in the lead as a whole, or no further back than that goes the lead.
  Where it ends because a prompt leaves out what may stand before, leads are to be an eighth as long, or 32 tokens, if
  they are longer than that.
  The run is evaluated right behind what else it sees and its lead. What it sees has the state that it has in that
  prompt, if it is there.
- *What is renewed.* Of each scope in a prompt, the first so many tokens (its link), and whatever else a rule picks
  of a run, are evaluated again where they stand, unless the run has seen exactly what stands before it, back to back.
  Everything is packed then. Renewed tokens that follow one another in a run are evaluated together; besides, they see
  all that stands before them: slices since the last fresh token as they are saved, and what stands before that as it is
  by then. Fresh tokens see what was renewed. A run of which all is renewed is fresh text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, zip_longest

import numpy as np
from numpy.typing import NDArray

from cpucache.pml.tree import (
    Argument,
    Included,
    Module,
    NewText,
    Parameter,
    Role,
    RoleEnd,
    RoleStart,
    Schema,
    SchemaNode,
    Scope,
    Text,
    Turn,
    Union,
)
from cpucache.runtime import Model
from tests.support.reference import KV, Floats, ReferenceLlama, causal

Place = tuple[object, bool]
"""A node, and whether its end is meant (of a role)."""

Together = frozenset[Module]
"""The modules of a scaffold set; none for a run's own state."""
APART: Together = frozenset()


@dataclass(eq=False)
class TextRun:
    """Tokens that are evaluated together."""

    path: tuple[tuple[Module, Union | None], ...]
    """The modules around it, the outermost first, each with the union that it is a member of."""
    tokens: list[int] = field(default_factory=list)
    home: int = 0
    offset: int = 0
    """Where it begins, whether packed or not."""
    argument: bool = False

    @property
    def end(self) -> int:
        return self.home + len(self.tokens)

    @property
    def cached(self) -> bool:
        return not self.path or self.path[-1][0].cache

    @property
    def members(self) -> set[Module]:
        """The members of unions that it lies in."""
        return {module for module, union in self.path if union is not None}

    def inside(self, together: Together) -> bool:
        return any(module in together for module, _ in self.path)

    def sees(self, other: TextRun, together: Together = APART, *, anchored: bool = True) -> bool:
        """Whether ``other``, which stands before it in the document, is in sight."""
        if not anchored and self.path and not (self._within(other) or other.inside(together)):
            return False
        pairs = zip(self.path, other.path, strict=False)
        shared = next((i for i, (one, two) in enumerate(pairs) if one[0] is not two[0]), None)
        if shared is None:
            shared = min(len(self.path), len(other.path))
        elif other.path[shared][1] is not None and other.path[shared][1] is self.path[shared][1]:
            return False  # two members of one union
        return all(
            module in together
            # Nothing stands in for a member of the set.
            or (union is not None and union.scaffold == module.name and together.isdisjoint(union.members))
            for module, union in other.path[shared:]
        )

    def _within(self, other: TextRun) -> bool:
        """Whether ``other`` lies inside the innermost module around this run."""
        return self.path[-1][0] in [module for module, _ in other.path]


@dataclass(eq=False)
class LedRun:
    """A run as it is behind its lead."""

    run: TextRun
    lead: list[int]
    seen: list[TextRun | LedRun]


Part = tuple[int, list[int], tuple[TextRun | LedRun, Together] | None]
"""Tokens of a prompt: where they start, and whose state they have; ``None``: evaluated afresh."""

Renewal = tuple[Part, list[int]]
"""A part, and which of its tokens are renewed."""


def _nothing(tokens: list[int]) -> list[int]:
    return []


class Oracle:
    """A schema under a Llama with a ChatML template."""

    def __init__(self, schema: Schema, model: Model, *, packed: bool) -> None:
        self._model = model
        self._packed = packed
        self._anchored = schema.anchor == "ancestors"
        self._sets = [frozenset(scaffold.modules) for scaffold in schema.scaffolds]
        self._order = {module: number for number, module in enumerate(_modules(schema))}
        self.runs: list[TextRun] = []
        self._run_of: dict[Place, TextRun] = {}
        self._states: dict[tuple[TextRun, Together], KV] = {}
        self._lay(schema, (), 0)

    # -- the schema --------------------------------------------------------------------------------------------------
    def _lay(self, scope: Scope, path: tuple[tuple[Module, Union | None], ...], at: int) -> int:
        """Lay a scope from position ``at`` on; gives the position behind it."""
        open_run: TextRun | None = None

        def put(tokens: list[int], *places: Place, new: bool = False) -> None:
            nonlocal open_run, at
            if open_run is None or new:
                open_run = TextRun(path, [], at, at)
                if self._packed:
                    open_run.home = sum(len(run.tokens) for run in self.seen_by(open_run))
                self.runs.append(open_run)
            open_run.tokens += tokens
            at += len(tokens)
            self._run_of.update(dict.fromkeys(places, open_run))

        if isinstance(scope, Schema) and self._model.bos is not None:
            put([self._model.bos], (scope, False))
        for node, end in _reading_order(scope.children):
            if isinstance(node, Text):
                put(self._tokens(node.text), (node, False))
            elif isinstance(node, Role):
                put(self._control("<|im_end|>\n" if end else f"<|im_start|>{node.role}\n"), (node, end))
            elif isinstance(node, Parameter):
                scaffold = self._tokens(node.scaffold or "")
                put(scaffold + [self._model.filler] * (node.length - len(scaffold)), new=True)
                self.runs[-1].argument = True
                open_run = None
            else:
                open_run = None
                members = [(node, None)] if isinstance(node, Module) else [(each, node) for each in node.members]
                at = max(self._lay(module, (*path, (module, union)), at) for module, union in members)
        return at

    def seen_by(self, run: TextRun, together: Together = APART) -> list[TextRun]:
        """The runs in its sight, in order."""
        before = self.runs[: self.runs.index(run)] if run in self.runs else self.runs
        return [other for other in before if run.sees(other, together, anchored=self._anchored)]

    def _joins(self, run: TextRun, together: Together) -> bool:
        """Whether it has a state for the set: it lies in one of its modules, or is the schema's own text behind one."""
        before = self.runs[: self.runs.index(run)] if self._anchored and not run.path else []
        return any(other.inside(together) for other in (run, *before))

    # -- a prompt ----------------------------------------------------------------------------------------------------
    def placed(self, included: Included, *, packed: bool, lead: int = 0) -> list[Part]:
        """Start, tokens, and the state that they have, of all parts of a prompt. ``None``: evaluated afresh."""
        pieces, sets = self._chosen(included)
        led: dict[TextRun, LedRun] = {}
        parts: list[Part] = []
        at = 0
        for number, piece in enumerate(pieces, 1):
            reused = piece.tokens if isinstance(piece, TextRun) and piece.cached else []
            rest = piece.tokens[len(reused) :] if isinstance(piece, TextRun) else piece
            if number == len(pieces) and reused:
                reused, rest = reused[:-1], reused[-1:]
            if reused:
                assert isinstance(piece, TextRun)
                at = at if packed else max(at, piece.home)
                together = next((each for each in sets if self._joins(piece, each)), APART)
                whose: TextRun | LedRun = piece
                if lead and (together is APART or self._apart_in(piece, together)):
                    whose = self._led(piece, pieces[: number - 1], lead, led)
                parts.append((at, reused, (whose, together)))
                at += len(reused)
            if rest:
                parts.append((at, rest, None))
                at += len(rest)
        return parts

    def _led(
        self, run: TextRun, before: list[TextRun | list[int]], lead: int, led: dict[TextRun, LedRun]
    ) -> TextRun | LedRun:
        seen = self.seen_by(run)
        found, complete = self._before(run, before, seen, lead)
        while not complete and lead > 32:
            lead = max(32, lead // 8)
            found, complete = self._before(run, before, seen, lead)
        others = [led.get(each, each) for each in seen if all(each is not piece for piece, _ in found)]
        if found or any(other in led for other in seen):
            led[run] = LedRun(run, [token for _, tokens in reversed(found) for token in tokens], others)
        return led.get(run, run)

    def _before(
        self, run: TextRun, before: list[TextRun | list[int]], seen: list[TextRun], lead: int
    ) -> tuple[list[tuple[TextRun, list[int]]], bool]:
        """The parts of its lead, the last first, and whether no more could be there."""
        found: list[tuple[TextRun, list[int]]] = []
        behind = run
        far = lead
        complete = True
        for piece in reversed(before):
            if not isinstance(piece, TextRun) or not self._adjoin(piece, behind):
                complete = False
                break
            unseen = next((each for each, _ in [*found, (piece, [])] if each not in seen), run)
            if not piece.members <= run.members | unseen.members:
                break
            tokens = piece.tokens
            if piece.offset // (2 * lead) != run.offset // (2 * lead):
                tokens = tokens[-far:] if far > 0 else []
                far -= len(tokens)
            if not tokens or (piece in seen and len(tokens) < len(piece.tokens)):
                break
            found.append((piece, tokens))
            behind = piece
        else:
            complete = False
        could = any(self._adjoin(other, behind) for other in self.runs if not other.argument)
        while found and found[-1][0] in seen:
            found.pop()
        return found, complete or not could

    def _adjoin(self, one: TextRun, other: TextRun) -> bool:
        """Whether nothing stands between two runs in some prompt that leaves nothing out."""
        first, last = self.runs.index(one), self.runs.index(other)
        return first < last and not any(
            self._needed(between, one) and self._needed(between, other) for between in self.runs[first + 1 : last]
        )

    def _needed(self, run: TextRun, given: TextRun) -> bool:
        """Whether a prompt with ``given`` has this run as well, if it leaves nothing out."""
        for (module, union), (there, _) in zip_longest(run.path, given.path, fillvalue=(None, None)):
            if module is not there and module is not None and union is not None:
                inside = [member for member in union.members if member is there] or [
                    member for member in union.members if not any(self._of(each, member) for each in self.runs)
                ]
                return not inside
        return True

    def _of(self, run: TextRun, module: Module) -> bool:
        return any(around is module for around, _ in run.path)

    def _apart_in(self, run: TextRun, together: Together) -> bool:
        """Whether its state in a set is the one that it has apart: it sees nothing of the set."""
        return self._sight(run, together) == self._sight(run, APART)

    def renewed(
        self,
        included: Included,
        link: Callable[[TextRun], int],
        choose: Callable[[list[int]], list[int]] = _nothing,
    ) -> list[Renewal]:
        """The parts of a prompt, packed, with what is renewed of each.

        ``link`` says how many tokens of the scope of a run, ``choose`` which others of a run.
        """
        pieces, sets = self._chosen(included)
        pieces = [piece for piece in pieces if (piece.tokens if isinstance(piece, TextRun) else piece)]
        left: dict[tuple[Module, ...], int] = {}
        found: list[Renewal] = []
        before: list[object] = []
        at = 0
        for number, piece in enumerate(pieces, 1):
            if not isinstance(piece, TextRun):
                found.append(((at, piece, None), []))
                before.append(None)
                at += len(piece)
                continue
            together = next((each for each in sets if self._joins(piece, each)), APART)
            sight = self._sight(piece, together)
            size = len(piece.tokens) - (number == len(pieces)) if piece.cached else 0
            chosen: set[int] = set()
            if size:
                scope = tuple(module for module, _ in piece.path)
                first = min(left.setdefault(scope, link(piece)), size)
                left[scope] -= first
                if sight[1:] != tuple(before) or not self._back_to_back(piece, together):
                    chosen = {*range(first), *(each for each in choose(piece.tokens) if each < size)}
            if len(chosen) == size:
                chosen, size = set(), 0
            if size:
                found.append(((at, piece.tokens[:size], (piece, together)), sorted(chosen)))
            if piece.tokens[size:]:
                found.append(((at + size, piece.tokens[size:], None), []))
            before.append(sight)
            at += len(piece.tokens)
        return found

    def _chosen(self, included: Included) -> tuple[list[TextRun | list[int]], list[Together]]:
        """The pieces of a prompt, and the sets whose states it has, those first that come before others."""
        chosen = list(_included(included))
        sets = [
            together
            for together in sorted(self._sets, key=len, reverse=True)
            if [module for module in chosen if module in together] == sorted(together, key=self._order.__getitem__)
        ]
        pieces: list[TextRun | list[int]] = []
        for item in self._items(included):
            if not (pieces and item is pieces[-1]):
                pieces.append(item)
        return pieces, sets

    def _sight(self, run: TextRun, together: Together) -> tuple[object, ...]:
        """A run and all that it sees, each with all that it sees itself."""
        seen = [other for other in self.seen_by(run, together) if other.tokens]
        return (run, *(self._sight(other, together if self._joins(other, together) else APART) for other in seen))

    def _back_to_back(self, run: TextRun, together: Together) -> bool:
        """Whether no gaps were in what it saw."""
        seen = [other for other in self.seen_by(run, together) if other.tokens]
        return self._packed or not seen or seen[-1].end == sum(len(other.tokens) for other in seen)

    def renewed_logits(self, reference: ReferenceLlama, found: list[Renewal]) -> Floats:
        """Those of the last token of parts of which some is renewed."""
        last: Floats = np.empty(0)
        state: KV | None = None
        for reused, stretch in groupby(found, lambda each: each[0][2] is not None):
            parts = list(stretch)
            if not reused:
                for (start, tokens, _), _chosen in parts:
                    logits, new = self._behind(reference, tokens, start, state)
                    state, last = new if state is None else KV.concat([state, new]), logits[-1]
                continue
            slices = [self._state(reference, *whose)[: len(tokens)] for (_, tokens, whose), _ in parts if whose]
            saved = KV.concat([*([state] if state else []), *slices])
            state = saved
            for (start, tokens, _), chosen in parts:
                for begin, end in _ranges(chosen):
                    new = self._behind(reference, tokens[begin:end], start + begin, saved[: start + begin])[1]
                    state = KV.concat([state[: start + begin], new, state[start + end :]])
        return last

    def _behind(self, reference: ReferenceLlama, tokens: list[int], start: int, state: KV | None) -> tuple[Floats, KV]:
        """Tokens from position ``start`` on, behind a state that reaches up to there."""
        before = 0 if state is None else len(state)
        assert before == start
        return reference.forward(
            tokens,
            range(start, start + len(tokens)),
            cache=state,
            cache_positions=range(before),
            visible=causal(len(tokens), before=before),
        )

    def logits(self, reference: ReferenceLlama, parts: list[Part]) -> Floats:
        """Those of the last token of ``parts``."""
        state: KV | None = None
        positions: list[int] = []
        logits: NDArray[np.float64] = np.empty((0, 0))
        for start, tokens, reused in parts:
            here = list(range(start, start + len(tokens)))
            if reused is not None:
                part = self._state(reference, *reused)[: len(tokens)]
            else:
                logits, part = reference.forward(
                    tokens,
                    here,
                    cache=state,
                    cache_positions=positions,
                    visible=causal(len(tokens), before=len(positions)),
                )
            state = part if state is None else KV.concat([state, part])
            positions += here
        last: Floats = logits[-1]
        return last

    def _state(self, reference: ReferenceLlama, run: TextRun | LedRun, together: Together) -> KV:
        if isinstance(run, LedRun):
            return self._led_state(reference, run)
        if (run, together) not in self._states:
            seen = [other for other in self.seen_by(run, together) if other.tokens]
            positions = [position for other in seen for position in range(other.home, other.end)]
            if self._packed:
                positions = list(range(len(positions)))
            start = max(positions, default=-1) + 1
            states = [
                self._state(reference, other, together if self._joins(other, together) else APART) for other in seen
            ]
            self._states[run, together] = reference.forward(
                run.tokens,
                range(start, start + len(run.tokens)),
                cache=KV.concat(states) if states else None,
                cache_positions=positions,
                visible=causal(len(run.tokens), before=len(positions)),
            )[1]
        return self._states[run, together]

    def _led_state(self, reference: ReferenceLlama, led: LedRun) -> KV:
        seen = [(each, each.run if isinstance(each, LedRun) else each) for each in led.seen]
        states = [self._state(reference, each, APART) for each, run in seen if run.tokens]
        positions = [position for _, run in seen for position in range(run.home, run.end)]
        if self._packed:
            positions = list(range(len(positions)))
        start = max(positions, default=-1) + 1
        tokens = led.lead + led.run.tokens
        state = reference.forward(
            tokens,
            range(start, start + len(tokens)),
            cache=KV.concat(states) if states else None,
            cache_positions=positions,
            visible=causal(len(tokens), before=len(positions)),
        )[1]
        return state[len(led.lead) :]

    def _items(self, included: Included) -> Iterator[TextRun | list[int]]:
        """The pieces of a prompt in reading order; runs once for each of the nodes that they are made of."""
        ask = False  # whether the model's turn has to be opened
        cut = False  # whether a turn of the assistant was left open
        if (included.scope, False) in self._run_of:
            yield self._run_of[included.scope, False]
        for item in _flat(included):
            if cut:
                yield self._control("<|im_end|>\n")
                cut = False
            if isinstance(item, Turn):
                yield self._control(f"<|im_start|>{item.role}\n") + self._tokens(item.text)
                cut = item.role == "assistant"
                ask = not cut
                if not cut:
                    yield self._control("<|im_end|>\n")
            elif isinstance(item, Argument):
                yield self._tokens(item.value)
            elif isinstance(item, NewText):
                yield self._tokens(item.text)
                ask = False
            elif isinstance(item, Text):
                yield self._run_of[item, False]
                ask = False
            else:
                yield self._run_of[item.node, isinstance(item, RoleEnd)]
                ask = item.node.role != "assistant"
        if ask:
            yield self._control("<|im_start|>assistant\n")

    def _tokens(self, text: str) -> list[int]:
        return [int(token) for token in self._model.tokenize(text)]

    def _control(self, text: str) -> list[int]:
        return [int(token) for token in self._model.tokenize(text, special=True)]


def _ranges(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Begins and ends of what follows one another."""
    for _, run in groupby(enumerate(numbers), lambda each: each[1] - each[0]):
        members = [number for _, number in run]
        yield members[0], members[-1] + 1


def _reading_order(nodes: tuple[SchemaNode, ...]) -> Iterator[tuple[SchemaNode, bool]]:
    for node in nodes:
        yield node, False
        if isinstance(node, Role):
            yield from _reading_order(node.children)
            yield node, True


def _modules(scope: Scope) -> Iterator[Module]:
    """All modules inside a scope, in document order."""
    for node, _ in _reading_order(scope.children):
        for module in [node] if isinstance(node, Module) else node.members if isinstance(node, Union) else []:
            yield module
            yield from _modules(module)


def _included(included: Included) -> Iterator[Module]:
    """All modules that a prompt includes, in its order."""
    for item in included.items:
        if isinstance(item, Included):
            assert isinstance(item.scope, Module)
            yield item.scope
            yield from _included(item)


def _flat(included: Included) -> Iterator[Text | Argument | RoleStart | RoleEnd | NewText | Turn]:
    for item in included.items:
        if isinstance(item, Included):
            yield from _flat(item)
        else:
            yield item
