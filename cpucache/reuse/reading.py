"""The slices that ``encode`` evaluates: a schema once, in reading order.

A module encoded after a long context does not behave as if it opened the document, so that its slice can be spliced in
any selection and order (bench/RESULTS.md). This file decides the context of each slice while a schema is encoded.
"""

from __future__ import annotations

from collections.abc import Collection

from cpucache.layout import Placeholder, SchemaLayout, Segment
from cpucache.pml.tree import Module, Scope, Union
from cpucache.reuse.chain import Chain
from cpucache.reuse.plan import Slice
from cpucache.reuse.slices import Slices


def reading(layout: SchemaLayout, slices: Slices, room: int) -> list[Slice]:
    """Returns the slices of a schema evaluated in reading order, each after the slices of its context.

    The context of a slice is all preceding text of the schema, with three exceptions. A member of a union is not in the
    context of other members, and only one member is in the context of what follows the union, see ``stands_for``. An
    isolated module attends only to the text around it, and no other text attends to it. With ``anchor="none"`` a module
    attends only to its own text, and nothing outside it attends to it.

    Args:
        layout: The schema.
        slices: Builds the slices and their keys for the current model.
        room: Maximum size of a slice with its context, in cells. Longer contexts lose text, see ``Chain.shortened``.
    """
    walk = _Reading(layout, slices, room)
    walk.scope(layout.schema, Chain(slices), [])
    return list(walk.slices)


def scaffolded(layout: SchemaLayout, slices: Slices, modules: Collection[Module], room: int) -> list[Slice]:
    """Returns the slices of a scaffold set: only its modules and the text around them, back to back.

    This holds with ``anchor="none"``, too. A prompt uses these slices where they are exact.

    Args:
        layout: The schema.
        slices: Builds the slices and their keys for the current model.
        modules: The modules of the set; modules nested in them are included.
        room: Maximum size of a slice with its context, in cells.
    """
    walk = _Reading(layout, slices, room, set(modules))
    walk.scope(layout.schema, Chain(slices), [])
    return list(walk.slices)


def stands_for(union: Union, layout: SchemaLayout) -> Module:
    """The member of a union in the context of the text after the union: its scaffold member, else its longest.

    The text after the longest member is encoded directly at its reserved position, without a shift.
    """
    named = (member for member in union.members if member.name == union.scaffold)
    return next(named, None) or max(union.members, key=layout.size)


class _Reading:
    """One walk through a schema in reading order.

    ``chosen`` limits the walk to these modules, the modules nested in them, and the text around both.
    """

    def __init__(self, layout: SchemaLayout, slices: Slices, room: int, chosen: set[Scope] | None = None) -> None:
        self._layout = layout
        self._slices = slices
        self._room = room
        self._chosen = chosen
        self.slices: dict[Slice, None] = {}

    def scope(
        self, scope: Scope, chain: Chain, around: list[Segment | Placeholder], *, isolated: bool = False
    ) -> Chain:
        """Appends the text of a scope to ``chain``; returns the chain for the text after the scope.

        Args:
            scope: The schema, or a module.
            chain: The context of the scope's first text.
            around: The preceding text of the enclosing scopes: the context of isolated modules.
            isolated: Whether an enclosing module is isolated, so that modules in it share its chain.
        """
        around = list(around)
        for part in self._layout.outline[scope]:
            if isinstance(part, Segment | Placeholder):
                chain = self._part(part, chain)
                around.append(part)
                continue
            members = part.members if isinstance(part, Union) else (part,)
            following = chain
            for member in members:
                if self._chosen is not None and not self._takes(member, scope, part):
                    continue
                isolating = (part.isolate or member.isolate) and not isolated
                detached = isolating or (self._layout.schema.anchor == "none" and self._chosen is None)
                before = self._detached(around if isolating else []) if detached else chain.copy()
                after = self.scope(member, before, around, isolated=isolated or isolating)
                stands = (
                    self._chosen is not None or not isinstance(part, Union) or member is stands_for(part, self._layout)
                )
                if stands and not detached:
                    following = after
            chain = following
        return chain

    def _takes(self, member: Module, scope: Scope, part: Module | Union) -> bool:
        """Whether a limited walk includes a module: it is chosen, or nested in a chosen scope (one of a union)."""
        assert self._chosen is not None
        if scope in self._chosen and (not isinstance(part, Union) or member is stands_for(part, self._layout)):
            self._chosen.add(member)
        return member in self._chosen

    def _detached(self, parts: list[Segment | Placeholder]) -> Chain:
        """A chain of only these parts; an empty one with ``anchor="none"``."""
        chain = Chain(self._slices)
        for part in parts if self._layout.schema.anchor != "none" else []:
            chain = self._part(part, chain)
        return chain

    def _part(self, part: Segment | Placeholder, chain: Chain) -> Chain:
        """Returns a chain with ``part`` appended, shortened before to fit ``room``; records a segment's slice."""
        chain = chain.shortened(self._room - len(part.tokens))
        if isinstance(part, Placeholder) or not part.cache:
            chain.evaluate(part.tokens)
            return chain
        slice_ = chain.next(part.tokens, part.module, part.reserved if self._chosen is None else None)
        self.slices[slice_] = None
        chain.add(slice_.span)
        return chain
