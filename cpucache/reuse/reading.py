"""What ``encode`` evaluates: a schema in reading order, once.

A module that has seen some long text before it no longer behaves as if it opened the document, so that it serves in any
selection and order (bench/RESULTS.md). This module decides which text stands before which while a schema is encoded.
"""

from __future__ import annotations

from collections.abc import Collection

from cpucache.layout import Placeholder, SchemaLayout, Segment
from cpucache.pml.tree import Module, Scope, Union
from cpucache.reuse.chain import Chain
from cpucache.reuse.slices import Slice, Slices


def reading(layout: SchemaLayout, slices: Slices, room: int) -> list[Slice]:
    """The slices of a schema that is evaluated in reading order, contexts before what needs them.

    Everything stands before what follows it, with these exceptions. Members of a union do not stand before one another;
    behind the union stands one of them, see ``stands_for``. An isolated module stands before nothing, and behind the
    text around it alone. With ``anchor="none"`` modules stand before and behind nothing.

    Args:
        layout: The schema.
        slices: Makes slices for the model at hand.
        room: Cells that a slice and its context may take. Where the schema is longer, the oldest text leaves.
    """
    walk = _Reading(layout, slices, room)
    walk.scope(layout.schema, Chain(slices), [])
    return list(walk.slices_made)


def scaffolded(layout: SchemaLayout, slices: Slices, modules: Collection[Module], room: int) -> list[Slice]:
    """The slices of a scaffold set: its modules and the text around them alone, back to back.

    So they are with ``anchor="none"``, too: a prompt takes them where they are exact.
    """
    walk = _Reading(layout, slices, room, set(modules))
    walk.scope(layout.schema, Chain(slices), [])
    return list(walk.slices_made)


def stands_for(union: Union, layout: SchemaLayout) -> Module:
    """The member of a union that stands before what follows it: its scaffold member, else its longest.

    Behind the longest member, what follows is evaluated at its reserved position, and need not be moved.
    """
    named = (member for member in union.members if member.name == union.scaffold)
    return next(named, None) or max(union.members, key=layout.size)


class _Reading:
    """One walk through a schema; ``chosen`` limits it to these modules and what is nested in them."""

    def __init__(self, layout: SchemaLayout, slices: Slices, room: int, chosen: set[Scope] | None = None) -> None:
        self._layout = layout
        self._slices = slices
        self._room = room
        self._chosen = chosen
        self.slices_made: dict[Slice, None] = {}

    def scope(
        self, scope: Scope, chain: Chain, around: list[Segment | Placeholder], *, isolated: bool = False
    ) -> Chain:
        """Put the text of a scope behind ``chain``; gives the chain that has it.

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
        """A chain of these texts alone."""
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
