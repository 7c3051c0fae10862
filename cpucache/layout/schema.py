"""The layout of a schema: every segment of it, with its tokens, its home position and what it may attend to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from cpucache.errors import PMLError
from cpucache.layout.lead import Leads
from cpucache.layout.place import Contexts, Edge, Outline, Place
from cpucache.layout.scaffold import lay_scaffolds
from cpucache.layout.segment import Segment
from cpucache.layout.template import ChatTemplate
from cpucache.layout.vocabulary import Tokens, Vocabulary, joined
from cpucache.pml.tree import Module, Parameter, Role, RoleName, Schema, SchemaNode, Scope, Text, Union

Positions: TypeAlias = Literal["auto", "reserved", "packed"]


@dataclass
class Extent:
    """A node of the schema as ``schema show`` draws it: positions [start, end), of which ``own`` are its own tokens."""

    kind: Literal["schema", "module", "union", "parameter"]
    name: str
    start: int
    end: int
    own: int = 0
    cache: bool = True
    children: list[Extent] = field(default_factory=list)


class SchemaLayout:
    """A schema under one vocabulary and chat template.

    ``positions``: ``reserved`` gives each module its fixed offset, ``packed`` the place right behind its context (it is
    moved when a prompt needs it); ``auto`` reserves while the schema fits the trained context.

    What may be seen is anchored on the ancestors: a segment attends to the text of its enclosing modules that stands
    before it, to earlier segments of its own module, parameters filled by their scaffold, and the scaffold members of
    unions on the way. With ``anchor="none"`` a module's text attends to earlier segments of its own module alone. In a
    scaffold set, modules have further segments that see one another.

    Raises ``PMLError`` when the schema or a scaffold set is longer than the model can hold, or a scaffold longer than
    its parameter.
    """

    def __init__(
        self, schema: Schema, vocabulary: Vocabulary, template: ChatTemplate, positions: Positions = "auto"
    ) -> None:
        self.schema = schema
        self.vocabulary = vocabulary
        self.template = template
        laid = _Laying(self, packed=positions == "packed")
        limit = vocabulary.n_ctx_train
        if positions == "auto" and laid.extent.end > limit:
            laid = _Laying(self, packed=True)
        self.packed = laid.packed
        self.extent = laid.extent
        self.apart: tuple[Segment, ...] = tuple(laid.segments)
        """The segments of the schema with every module apart, in document order: contexts before what needs them."""
        self.segment_at: dict[Place, Segment] = laid.places
        self.last_role: RoleName | None = laid.last_role
        longest = max((segment.end for segment in self.apart), default=0)
        if longest > limit:
            self._too_long(longest, limit)
        self.scaffolds = lay_scaffolds(schema, laid.outline, laid.places, packed=laid.packed)
        """The scaffold sets, those first that come before others in a prompt that includes several."""
        together = dict.fromkeys(segment for scaffold in self.scaffolds for segment in scaffold.segments)
        self.segments: tuple[Segment, ...] = (*self.apart, *together)
        """Every segment, those of scaffold sets last: contexts before what needs them. Those with leads are extra."""
        self._check_scaffolds(limit)
        woven = {
            segment: laid.places[place]
            for scaffold in self.scaffolds
            for place, segment in scaffold.segment_at.items()
            if segment is not laid.places[place]
        }
        self.leads = Leads(schema, laid.outline, woven, laid.contexts)
        """Segments that have seen the end of what stands before them."""

    @property
    def length(self) -> int:
        """Positions from 0 to the end of the schema's last module."""
        return self.extent.end

    @property
    def positions(self) -> Literal["reserved", "packed"]:
        """How positions were given."""
        return "packed" if self.packed else "reserved"

    def _too_long(self, longest: int, limit: int) -> None:
        sizes: dict[str, int] = {}
        for segment in self.apart:
            name = segment.module or "(text of the schema)"
            sizes[name] = sizes.get(name, 0) + len(segment.tokens)
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        names = ", ".join(f"{name} ({size})" for name, size in largest)
        needs = "needs" if self.packed else "with reserved positions needs"
        raise PMLError(
            f"schema '{self.schema.name}' {needs} {longest} tokens, the model holds {limit}; "
            f"its largest modules: {names}",
            file=self.schema.file,
            line=self.schema.line,
        )

    def _check_scaffolds(self, limit: int) -> None:
        for scaffold in self.scaffolds:
            longest = max((segment.end for segment in scaffold.segments), default=0)
            if longest > limit:
                names = ", ".join(f"'{module.name}'" for module in scaffold.modules)
                raise PMLError(
                    f"the scaffold of {names} needs {longest} tokens with what its modules see, the model holds "
                    f"{limit}: name fewer modules",
                    file=self.schema.file,
                    line=next(each.line for each in self.schema.scaffolds if each.modules == scaffold.modules),
                )


class _Laying:
    """One walk through the schema, in document order."""

    def __init__(self, layout: SchemaLayout, *, packed: bool) -> None:
        self.vocabulary = layout.vocabulary
        self.template = layout.template
        self.schema = layout.schema
        self.packed = packed
        self.segments: list[Segment] = []
        self.outline: Outline = {}
        self.places: dict[Place, Segment] = {}
        self.last_role: RoleName | None = None
        self._first = True  # nothing stands before, in any prompt
        self._cursor = 0
        self.contexts = Contexts(packed=packed)
        self.extent = Extent("schema", layout.schema.name, 0, 0)
        self._scope(layout.schema, [], self.extent, "", cache=True)

    def _scope(self, scope: Scope, visible: list[Segment], extent: Extent, path: str, *, cache: bool) -> None:
        """Lay ``scope`` behind ``visible``, which grows by what later text of the same scope may see."""
        run: list[tuple[Place, Tokens]] = []
        outline = self.outline[scope] = []

        def add(tokens: Tokens, *, placeholder: bool = False) -> Segment:
            segment = Segment(tokens, self._start(visible), self.contexts.of(visible), path, cache, placeholder)
            visible.append(segment)
            outline.append(segment)
            self.segments.append(segment)
            self._cursor = segment.end
            return segment

        def flush() -> None:
            tokens = joined([part for _, part in run])
            if len(tokens):
                segment = add(tokens)
                extent.own += len(tokens)
                self.places.update((place, segment) for place, _ in run)
            run.clear()

        if isinstance(scope, Schema) and self.vocabulary.bos is not None:
            run.append(((scope, ""), np.array([self.vocabulary.bos], np.int32)))
        for node, edge in _events(scope.children):
            if isinstance(node, Text):
                run.append(((node, ""), self.vocabulary.tokenize(node.text)))
            elif isinstance(node, Role):
                run.append(((node, edge), self._role(node, edge)))
            else:
                flush()
                if isinstance(node, Parameter):
                    placeholder = add(self._placeholder(node), placeholder=True)
                    extent.children.append(
                        Extent("parameter", node.name, placeholder.home, placeholder.end, node.length)
                    )
                elif isinstance(node, Module):
                    outline.append(node)
                    self._module(node, visible, extent, path)
                elif isinstance(node, Union):
                    outline.append(node)
                    self._union(node, visible, extent, path)
            self._first = False
        flush()
        extent.end = max([self._cursor, *(child.end for child in extent.children)])

    def _handed(self, visible: list[Segment]) -> list[Segment]:
        """What of this the modules of the scope see."""
        return list(visible) if self.schema.anchor == "ancestors" else []

    def _start(self, visible: list[Segment]) -> int:
        """Where text stands that sees this."""
        return sum(len(segment.tokens) for segment in visible) if self.packed else self._cursor

    def _module(self, module: Module, visible: list[Segment], parent: Extent, path: str) -> list[Segment]:
        """Lay a module that stands behind ``visible``; gives what of it may be seen behind it."""
        before = self._cursor
        inner = self._handed(visible)
        seen = len(inner)
        name = f"{path}.{module.name}" if path else module.name
        start = self._start(inner)
        extent = Extent("module", module.name, start, start, cache=module.cache)
        self._cursor = start
        self._scope(module, inner, extent, name, cache=module.cache)
        parent.children.append(extent)
        self._cursor = before if self.packed else extent.end
        return inner[seen:]

    def _union(self, union: Union, visible: list[Segment], parent: Extent, path: str) -> None:
        before = self._cursor
        start = self._start(self._handed(visible))
        extent = Extent("union", union.scaffold or "", start, start)
        parent.children.append(extent)
        seen: list[Segment] = []
        # Members are alternatives: none stands before another.
        first, last_role = self._first, self.last_role
        for member in union.members:
            self._cursor, self._first, self.last_role = start, first, last_role
            behind = self._module(member, visible, extent, path)
            if member.name == union.scaffold:
                seen = behind
        extent.end = max(child.end for child in extent.children)
        self._cursor = before if self.packed else extent.end
        visible.extend(seen)

    def _role(self, node: Role, edge: str) -> Tokens:
        if edge == "end":
            text = self.template.end(node.role)
        else:
            text = self.template.start(node.role, previous=self.last_role, first=self._first)
            self.last_role = node.role
            if self._first and self.vocabulary.bos is not None:
                text = text.removeprefix(self.vocabulary.special_text("bos"))
        return self.vocabulary.tokenize(text, special=True)

    def _placeholder(self, node: Parameter) -> Tokens:
        tokens = self.vocabulary.tokenize(node.scaffold or "")
        if len(tokens) > node.length:
            raise PMLError(
                f"the scaffold of parameter '{node.name}' is {len(tokens)} tokens long, {len(tokens) - node.length} "
                f"more than its length {node.length}",
                file=self.schema.file,
                line=node.line,
            )
        filled = np.full(node.length, self.vocabulary.filler, np.int32)
        filled[: len(tokens)] = tokens
        return filled


def _events(children: Iterable[SchemaNode]) -> Iterator[tuple[SchemaNode, Edge]]:
    """The nodes of a scope in reading order; a role is there twice, where it opens and where it closes."""
    for child in children:
        yield child, ""
        if isinstance(child, Role):
            yield from _events(child.children)
            yield child, "end"
