"""What modular reuse means, worked out from the rules alone: what spliced logits must be, computed in NumPy.

Nothing of ``cpucache.layout`` or ``cpucache.reuse`` is used here. The rules:

- The text of a scope (the schema, or a module) between its modules, unions and parameters is one *run*; so is what
  stands in for a parameter: its scaffold, filled up with the filler to the parameter's length.
- *Positions.* Runs follow one another in document order. The members of a union all start at the same position, and
  what follows it stands behind the longest. Packed, each run stands right behind what it sees.
- *Sight.* A run sees an earlier one if it lies within the scope of that, or if all that parts it from the scope of
  the earlier one are unions of which that one is in the scaffold member, and itself in no other.
- *State.* A run is evaluated right behind the last that it sees, all of these at their own positions. Then it is moved.
- *Prompts.* Runs stand at their positions, or behind what is before them if that reaches further; packed, always right
  behind it. Arguments, new text, turns, modules with ``cache="false"`` and the last token of all are evaluated there,
  in the sight of everything before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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


@dataclass(eq=False)
class TextRun:
    """Tokens that are evaluated together."""

    path: tuple[tuple[Module, Union | None], ...]
    """The modules around it, the outermost first, each with the union that it is a member of."""
    tokens: list[int] = field(default_factory=list)
    home: int = 0
    argument: bool = False

    @property
    def end(self) -> int:
        return self.home + len(self.tokens)

    @property
    def cached(self) -> bool:
        return not self.path or self.path[-1][0].cache

    def sees(self, other: TextRun) -> bool:
        """Whether ``other``, which stands before it in the document, is in sight."""
        pairs = zip(self.path, other.path, strict=False)
        shared = next((i for i, (one, two) in enumerate(pairs) if one[0] is not two[0]), None)
        if shared is None:
            shared = min(len(self.path), len(other.path))
        elif other.path[shared][1] is not None and other.path[shared][1] is self.path[shared][1]:
            return False  # two members of one union
        return all(union is not None and union.scaffold == module.name for module, union in other.path[shared:])


class Oracle:
    """A schema under a Llama with a ChatML template."""

    def __init__(self, schema: Schema, model: Model, *, packed: bool) -> None:
        self._model = model
        self._packed = packed
        self.runs: list[TextRun] = []
        self._run_of: dict[Place, TextRun] = {}
        self._states: dict[TextRun, KV] = {}
        self._lay(schema, (), 0)

    # -- the schema --------------------------------------------------------------------------------------------------
    def _lay(self, scope: Scope, path: tuple[tuple[Module, Union | None], ...], at: int) -> int:
        """Lay a scope from position ``at`` on; gives the position behind it."""
        open_run: TextRun | None = None

        def put(tokens: list[int], *places: Place, new: bool = False) -> None:
            nonlocal open_run, at
            if open_run is None or new:
                open_run = TextRun(path, [], at)
                if self._packed:
                    open_run.home = max((run.end for run in self.runs if open_run.sees(run)), default=0)
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
                open_run = None
            else:
                open_run = None
                members = [(node, None)] if isinstance(node, Module) else [(each, node) for each in node.members]
                at = max(self._lay(module, (*path, (module, union)), at) for module, union in members)
        return at

    def seen_by(self, run: TextRun) -> list[TextRun]:
        """The runs in its sight, in order."""
        return [other for other in self.runs[: self.runs.index(run)] if run.sees(other)]

    # -- a prompt ----------------------------------------------------------------------------------------------------
    def placed(self, included: Included, *, packed: bool) -> list[tuple[int, list[int], TextRun | None]]:
        """Start, tokens, and the run whose state they have, of all parts of a prompt. ``None``: evaluated afresh."""
        pieces: list[TextRun | list[int]] = []
        for item in self._items(included):
            if not (pieces and item is pieces[-1]):
                pieces.append(item)
        parts: list[tuple[int, list[int], TextRun | None]] = []
        at = 0
        for number, piece in enumerate(pieces, 1):
            reused = piece.tokens if isinstance(piece, TextRun) and piece.cached else []
            rest = piece.tokens[len(reused) :] if isinstance(piece, TextRun) else piece
            if number == len(pieces) and reused:
                reused, rest = reused[:-1], reused[-1:]
            if reused:
                assert isinstance(piece, TextRun)
                at = at if packed else max(at, piece.home)
                parts.append((at, reused, piece))
                at += len(reused)
            if rest:
                parts.append((at, rest, None))
                at += len(rest)
        return parts

    def logits(self, reference: ReferenceLlama, parts: list[tuple[int, list[int], TextRun | None]]) -> Floats:
        """Those of the last token of ``parts``."""
        state: KV | None = None
        positions: list[int] = []
        logits: NDArray[np.float64] = np.empty((0, 0))
        for start, tokens, run in parts:
            here = list(range(start, start + len(tokens)))
            if run is not None:
                part = self._state(reference, run)[: len(tokens)]
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

    def _state(self, reference: ReferenceLlama, run: TextRun) -> KV:
        if run not in self._states:
            seen = [other for other in self.seen_by(run) if other.tokens]
            positions = [position for other in seen for position in range(other.home, other.end)]
            start = max(positions, default=-1) + 1
            self._states[run] = reference.forward(
                run.tokens,
                range(start, start + len(run.tokens)),
                cache=KV.concat([self._state(reference, other) for other in seen]) if seen else None,
                cache_positions=positions,
                visible=causal(len(run.tokens), before=len(positions)),
            )[1]
        return self._states[run]

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


def _reading_order(nodes: tuple[SchemaNode, ...]) -> Iterator[tuple[SchemaNode, bool]]:
    for node in nodes:
        yield node, False
        if isinstance(node, Role):
            yield from _reading_order(node.children)
            yield node, True


def _flat(included: Included) -> Iterator[Text | Argument | RoleStart | RoleEnd | NewText | Turn]:
    for item in included.items:
        if isinstance(item, Included):
            yield from _flat(item)
        else:
            yield item
