"""The layout of a schema: every segment of it, with its tokens, its home position and what it may attend to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from cpucache.errors import PMLError
from cpucache.layout.segment import Segment, Span
from cpucache.layout.template import ChatTemplate
from cpucache.layout.vocabulary import Tokens, Vocabulary, joined
from cpucache.pml.tree import Module, Parameter, Role, RoleName, Schema, SchemaNode, Scope, Text, Union

Positions: TypeAlias = Literal["auto", "reserved", "packed"]
Edge: TypeAlias = Literal["", "end"]
Place: TypeAlias = tuple[SchemaNode | Schema, Edge]
"""Where a piece of text stands: a ``Text``, the start or (``"end"``) end of a ``Role``, the very start of a schema."""


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
    unions on the way.

    Raises ``PMLError`` when the schema is longer than the model can hold, or a scaffold longer than its parameter.
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
        self.segments: tuple[Segment, ...] = tuple(laid.segments)
        """Every segment, in document order: contexts before what needs them."""
        self.segment_at: dict[Place, Segment] = laid.places
        self.last_role: RoleName | None = laid.last_role
        longest = max(segment.end for segment in self.segments) if self.segments else 0
        if longest > limit:
            self._too_long(longest, limit)

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
        for segment in self.segments:
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


class _Laying:
    """One walk through the schema, in document order."""

    def __init__(self, layout: SchemaLayout, *, packed: bool) -> None:
        self.vocabulary = layout.vocabulary
        self.template = layout.template
        self.file = layout.schema.file
        self.packed = packed
        self.segments: list[Segment] = []
        self.places: dict[Place, Segment] = {}
        self.last_role: RoleName | None = None
        self._first = True  # nothing stands before, in any prompt
        self._cursor = 0
        self.extent = Extent("schema", layout.schema.name, 0, 0)
        self._scope(layout.schema, [], self.extent, "", cache=True)

    def _scope(self, scope: Scope, visible: list[Span], extent: Extent, path: str, *, cache: bool) -> None:
        """Lay ``scope`` behind ``visible``, which grows by what later text of the same scope may see."""
        run: list[tuple[Place, Tokens]] = []

        def add(tokens: Tokens, *, placeholder: bool = False) -> Segment:
            start = (visible[-1].end if visible else 0) if self.packed else self._cursor
            segment = Segment(tokens, start, tuple(visible), path, cache, placeholder)
            visible.append(segment.span)
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
                    self._module(node, visible, extent, path)
                elif isinstance(node, Union):
                    self._union(node, visible, extent, path)
            self._first = False
        flush()
        extent.end = max([self._cursor, *(child.end for child in extent.children)])

    def _module(self, module: Module, visible: list[Span], parent: Extent, path: str) -> list[Span]:
        """Lay a module in the sight of ``visible``; gives what may be seen behind it, itself included."""
        before = self._cursor
        inner = list(visible)
        name = f"{path}.{module.name}" if path else module.name
        start = (visible[-1].end if visible else 0) if self.packed else before
        extent = Extent("module", module.name, start, start, cache=module.cache)
        self._cursor = start
        self._scope(module, inner, extent, name, cache=module.cache)
        parent.children.append(extent)
        self._cursor = before if self.packed else extent.end
        return inner

    def _union(self, union: Union, visible: list[Span], parent: Extent, path: str) -> None:
        start = (visible[-1].end if visible else 0) if self.packed else self._cursor
        extent = Extent("union", union.scaffold or "", start, start)
        parent.children.append(extent)
        seen: list[Span] = []
        # Members are alternatives: none stands before another.
        first, last_role = self._first, self.last_role
        for member in union.members:
            self._cursor, self._first, self.last_role = start, first, last_role
            inner = self._module(member, visible, extent, path)
            if member.name == union.scaffold:
                seen = inner[len(visible) :]
        extent.end = max(child.end for child in extent.children)
        self._cursor = start if self.packed else extent.end
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
                file=self.file,
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
