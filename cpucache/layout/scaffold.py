"""Scaffold sets laid out: what their modules are encoded as when they see one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from cpucache.layout.place import Contexts, Outline, Place
from cpucache.layout.segment import Segment
from cpucache.pml.tree import Module, Scaffold, Schema, Scope


@dataclass(frozen=True, eq=False)
class ScaffoldLayout:
    """One scaffold set."""

    modules: tuple[Module, ...]
    """Its modules, in the order of the schema."""
    segments: tuple[Segment, ...]
    """What it adds to the schema's own segments, contexts before what needs them."""
    segment_at: dict[Place, Segment]
    """The segment for every piece of text in its modules, and of the schema's own behind the first of them: one of
    ``segments``, or the schema's own where that sees the same, as that of the first module does."""

    def fits(self, order: Mapping[Module, int]) -> bool:
        """Whether a prompt that has its modules in this ``order`` includes all of them, in the schema's order."""
        found = [order[module] for module in self.modules if module in order]
        return len(found) == len(self.modules) and found == sorted(found)


def lay_scaffolds(
    schema: Schema, outline: Outline, places: Mapping[Place, Segment], *, packed: bool
) -> tuple[ScaffoldLayout, ...]:
    """The scaffold sets of a schema, the largest first, then in the order of the schema.

    In the modules of a set, in what is nested in them, and between and behind them in the schema's own text, text sees
    what it sees otherwise and, besides, the text of the set's modules that stands before it: a set of all modules is
    what full prefill gives. ``outline`` and ``places`` have the schema's own segments.
    """
    weaving = _Weaving(schema, outline, packed=packed)
    scaffolds = sorted(schema.scaffolds, key=lambda scaffold: -len(scaffold.modules))
    return tuple(weaving.layout(scaffold, places) for scaffold in scaffolds)


class _Weaving:
    """Walks through the schema once for every set."""

    def __init__(self, schema: Schema, outline: Outline, *, packed: bool) -> None:
        self._schema = schema
        self._outline = outline
        self._packed = packed
        self._contexts = Contexts(packed=packed)
        # Sets may begin alike: what sees the same is the same.
        self._made: dict[tuple[Segment, ...], Segment] = {}
        self._members: frozenset[Module] = frozenset()
        self._instead: dict[Segment, Segment] = {}

    def layout(self, scaffold: Scaffold, places: Mapping[Place, Segment]) -> ScaffoldLayout:
        self._members = frozenset(scaffold.modules)
        self._instead = {}
        self._scope(self._schema, (), inside=False)
        return ScaffoldLayout(
            scaffold.modules,
            tuple(new for old, new in self._instead.items() if new is not old),
            {place: self._instead[old] for place, old in places.items() if old in self._instead},
        )

    def _scope(self, scope: Scope, before: Iterable[Segment], *, inside: bool) -> list[Segment]:
        """Walk through a scope in the sight of ``before``; gives what of it is in sight behind it.

        ``inside``: the scope is one of the set's modules, or nested in one.
        """
        sight = list(before)
        start = len(sight)
        anchored = self._schema.anchor == "ancestors"
        behind_member = False
        for part in self._outline[scope]:
            if isinstance(part, Segment):
                if inside or (anchored and behind_member):
                    sight.append(self._woven(part, sight))
                elif anchored:
                    sight.append(part)
                continue
            modules, scaffold = ((part,), None) if isinstance(part, Module) else (part.members, part.scaffold)
            if not self._members.isdisjoint(modules):
                scaffold = None  # nothing stands in for a member of the set
            seen: list[Segment] = []
            for module in modules:
                member, stands_in = module in self._members, module.name == scaffold
                behind_member |= member
                if inside or member or stands_in:
                    behind = self._scope(module, sight, inside=inside or member)
                    seen += behind if member or stands_in else []
            sight += seen
        return sight[start:]

    def _woven(self, segment: Segment, sight: Iterable[Segment]) -> Segment:
        """``segment`` as it is in this sight."""
        key = (segment, *sight)
        if key not in self._made:
            self._made[key] = segment if key[1:] == segment.sees else self._moved(segment, key[1:])
        self._instead[segment] = self._made[key]
        return self._made[key]

    def _moved(self, segment: Segment, sight: Iterable[Segment]) -> Segment:
        context = self._contexts.of(sight)
        home = context[-1].end if self._packed and context else segment.home
        return replace(segment, home=home, context=context)
