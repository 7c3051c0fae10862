"""Order and contexts in which ``encode`` evaluates a schema: once, in reading order.

A module encoded after long text no longer behaves as if it opened the document, so its slice is usable in any selection
and order (bench/RESULTS.md). This file determines the context of each slice of a schema.
"""

from __future__ import annotations

from collections.abc import Collection

from cpucache.layout import Placeholder, SchemaLayout, Segment
from cpucache.pml.tree import Module, Scope, Union
from cpucache.reuse.chain import Chain
from cpucache.reuse.slices import Slice, Slices


def reading(layout: SchemaLayout, slices: Slices, room: int) -> list[Slice]:
    """Returns the slices of a schema evaluated in reading order, contexts first.

    The context of a slice is all text before it, with these exceptions. Members of a union do not attend to each other;
    text after the union attends to one member, see ``stands_for``. An isolated module attends only to the text of its
    enclosing scopes, and later text does not attend to it. With ``anchor="none"``, modules attend to no other module,
    and later text does not attend to them.

    Args:
        layout: Layout of the schema.
        slices: Describes slices for the model.
        room: Maximum number of cells for a slice and its context. In a longer schema, the oldest text is left out.
    """
    walk = _Reading(layout, slices, room)
    walk.scope(layout.schema, Chain(slices), [])
    return list(walk.slices_made)


def scaffolded(layout: SchemaLayout, slices: Slices, modules: Collection[Module], room: int) -> list[Slice]:
    """Returns the slices of a scaffold: its modules and only their enclosing text, packed without gaps.

    ``anchor="none"`` changes nothing here: prompts take these slices only where they are exact.
    """
    walk = _Reading(layout, slices, room, set(modules))
    walk.scope(layout.schema, Chain(slices), [])
    return list(walk.slices_made)


def stands_for(union: Union, layout: SchemaLayout) -> Module:
    """Returns the union member that later text attends to: the scaffold member, else the longest.

    After the longest member, later text is evaluated at its reserved position and needs no shift.
    """
    named = (member for member in union.members if member.name == union.scaffold)
    return next(named, None) or max(union.members, key=layout.size)


class _Reading:
    """Walks through a schema once; ``chosen`` limits the walk to these modules and their nested modules."""

    def __init__(self, layout: SchemaLayout, slices: Slices, room: int, chosen: set[Scope] | None = None) -> None:
        self._layout = layout
        self._slices = slices
        self._room = room
        self._chosen = chosen
        self.slices_made: dict[Slice, None] = {}

    def scope(
        self, scope: Scope, chain: Chain, around: list[Segment | Placeholder], *, isolated: bool = False
    ) -> Chain:
        """Appends the text of a scope to ``chain``, and returns the extended chain.

        ``around`` is the text of the enclosing scopes before it.
        """
        around = list(around)
        for part in self._layout.outline[scope]:
            if isinstance(part, Segment | Placeholder):
                chain = self._part(part, chain)
                around.append(part)
                continue
            members = part.members if isinstance(part, Union) else (part,)
            behind = chain
            for member in members:
                if self._chosen is not None and not self._takes(member, scope, part):
                    continue
                alone = (part.isolate or member.isolate) and not isolated
                detached = alone or (self._layout.schema.anchor == "none" and self._chosen is None)
                before = self._detached(around if alone else []) if detached else chain.copy()
                after = self.scope(member, before, around, isolated=isolated or alone)
                stands = (
                    self._chosen is not None or not isinstance(part, Union) or member is stands_for(part, self._layout)
                )
                if stands and not detached:
                    behind = after
            chain = behind
        return chain

    def _takes(self, member: Module, scope: Scope, part: Module | Union) -> bool:
        assert self._chosen is not None
        if scope in self._chosen and (not isinstance(part, Union) or member is stands_for(part, self._layout)):
            self._chosen.add(member)
        return member in self._chosen

    def _detached(self, parts: list[Segment | Placeholder]) -> Chain:
        """Returns a chain of only these texts; empty with ``anchor="none"``."""
        chain = Chain(self._slices)
        for part in parts if self._layout.schema.anchor != "none" else []:
            chain = self._part(part, chain)
        return chain

    def _part(self, part: Segment | Placeholder, chain: Chain) -> Chain:
        chain = chain.shortened(self._room - len(part.tokens))
        if isinstance(part, Placeholder) or not part.cache:
            chain.evaluate(part.tokens)
            return chain
        slice_ = chain.next(part.tokens, part.module, part.reserved if self._chosen is None else None)
        self.slices_made[slice_] = None
        chain.add(slice_.span)
        return chain
