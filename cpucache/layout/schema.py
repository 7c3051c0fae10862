"""The layout of a schema: all of its segments, with tokens and positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from cpucache.errors import PMLError
from cpucache.layout.segment import LONGEST, Placeholder, Segment
from cpucache.layout.template import ChatTemplate
from cpucache.layout.vocabulary import Tokens, Vocabulary, joined
from cpucache.pml.tree import Module, Parameter, Role, RoleName, Schema, SchemaNode, Scope, Text, Union
from cpucache.store import text_id

Positions: TypeAlias = Literal["auto", "reserved", "packed"]
POSITIONS: tuple[Positions, ...] = ("auto", "reserved", "packed")
Edge: TypeAlias = Literal["", "end"]
Place: TypeAlias = tuple[SchemaNode | Schema, Edge]
"""Source of a piece of text: a ``Text``, the start or (``"end"``) the end of a ``Role``, or the start of a schema."""
Part: TypeAlias = Segment | Placeholder | Module | Union


@dataclass
class Extent:
    """A node of the schema as ``schema show`` draws it: positions [start, end), ``own`` of them for its own text."""

    kind: Literal["schema", "module", "union", "parameter"]
    name: str
    start: int
    end: int
    own: int = 0
    cache: bool = True
    children: list[Extent] = field(default_factory=list)


class SchemaLayout:
    """Layout of a schema for one vocabulary and chat template.

    Args:
        schema: The schema.
        vocabulary: Tokenizer of the model.
        template: Chat template of the model.
        positions: ``reserved``: each module has a fixed offset in the schema. ``packed``: no positions are reserved;
            a prompt's modules stand back to back. ``auto``: reserved if the schema fits the trained context.

    Raises:
        PMLError: With reserved positions, the schema is longer than the trained context; packed, a module with its
            enclosing text is. Or a scaffold text is longer than its parameter.
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
        self.outline = laid.outline
        """Parts of each scope, in reading order."""
        self.segments_at: dict[Place, list[Segment]] = laid.places
        """Segments that hold each piece of text. Adjacent pieces share segments."""
        self._placeholders = laid.placeholders
        self.last_role: RoleName | None = laid.last_role
        if laid.longest > limit:
            self._too_long(laid.longest, limit)

    @property
    def length(self) -> int:
        """End position of the schema's outline, in tokens; if packed, of its longest module with enclosing text."""
        return self.extent.end

    @property
    def positions(self) -> Literal["reserved", "packed"]:
        """Kind of layout; ``auto`` is resolved."""
        return "packed" if self.packed else "reserved"

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, in document order."""
        return tuple(part for part in self._parts(self.schema) if isinstance(part, Segment))

    @cached_property
    def texts(self) -> frozenset[bytes]:
        """``text_id`` of every segment and placeholder of the schema."""
        return self._texts(self.schema)

    def placeholder(self, parameter: Parameter) -> Tokens:
        """Tokens in place of an argument of ``parameter`` while the schema is encoded."""
        return self._placeholders[parameter].tokens

    def may_attend_to(self, segment: Segment) -> frozenset[bytes] | None:
        """``text_id`` of texts that a slice of ``segment`` may attend to besides the prompt's; ``None``: any text."""
        return self._limits.get(segment)

    @cached_property
    def _limits(self) -> dict[Segment, frozenset[bytes]]:
        limits: dict[Segment, frozenset[bytes]] = {}

        def walk(scope: Scope, around: frozenset[bytes], limit: frozenset[bytes] | None, isolate: bool) -> None:
            own = frozenset(_id(part) for part in self.outline[scope] if isinstance(part, Segment | Placeholder))
            if self.schema.anchor == "none":
                limit = own
            elif isolate and limit is None:
                limit = around | self._texts(scope)
            for part in self.outline[scope]:
                if isinstance(part, Segment) and limit is not None:
                    limits[part] = limit
                elif isinstance(part, Module):
                    walk(part, around | own, limit, part.isolate)
                elif isinstance(part, Union):
                    for member in part.members:
                        walk(member, around | own, limit, part.isolate or member.isolate)

        walk(self.schema, frozenset(), None, False)
        return limits

    def size(self, scope: Scope) -> int:
        """Length of a scope, in positions: a union counts as its longest member."""
        return sum(
            max(map(self.size, part.members))
            if isinstance(part, Union)
            else self.size(part)
            if isinstance(part, Module)
            else len(part.tokens)
            for part in self.outline[scope]
        )

    def _parts(self, scope: Scope) -> Iterator[Segment | Placeholder]:
        for part in self.outline[scope]:
            if isinstance(part, Union):
                for member in part.members:
                    yield from self._parts(member)
            elif isinstance(part, Module):
                yield from self._parts(part)
            else:
                yield part

    def _texts(self, scope: Scope) -> frozenset[bytes]:
        return frozenset(map(_id, self._parts(scope)))

    def _too_long(self, longest: int, limit: int) -> None:
        sizes: dict[str, int] = {}
        for segment in self.segments:
            name = segment.module or "(text of the schema)"
            sizes[name] = sizes.get(name, 0) + len(segment.tokens)
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:3]
        names = ", ".join(f"{name} ({size})" for name, size in largest)
        needs = "needs" if self.packed else "with reserved positions needs"
        raise PMLError(
            f"schema '{self.schema.name}' {needs} {longest} tokens, the model has room for {limit}; "
            f"its largest modules: {names}",
            file=self.schema.file,
            line=self.schema.line,
        )


class _Laying:
    """Lays out a schema in one walk, in document order."""

    def __init__(self, layout: SchemaLayout, *, packed: bool) -> None:
        self.vocabulary = layout.vocabulary
        self.template = layout.template
        self.schema = layout.schema
        self.packed = packed
        self.outline: dict[Scope, list[Part]] = {}
        self.places: dict[Place, list[Segment]] = {}
        self.placeholders: dict[Parameter, Placeholder] = {}
        self.last_role: RoleName | None = None
        self.longest = 0
        """Largest end position: of the schema, or if packed, of a module with its enclosing text."""
        self._first = True  # no prompt can have text before this point
        self._cursor = 0
        self.extent = Extent("schema", layout.schema.name, 0, 0)
        self._scope(layout.schema, self.extent, "", cache=True)

    def _scope(self, scope: Scope, extent: Extent, path: str, *, cache: bool) -> None:
        run: list[tuple[Place, Tokens]] = []
        outline = self.outline[scope] = []

        def advance(count: int) -> int | None:
            reserved = None if self.packed else self._cursor
            self._cursor += count
            self.longest = max(self.longest, self._cursor)
            return reserved

        def flush() -> None:
            tokens = joined([part for _, part in run])
            segments = []
            for begin in range(0, len(tokens), LONGEST):
                part = tokens[begin : begin + LONGEST]
                segments.append(Segment(part, advance(len(part)), path, cache))
            outline.extend(segments)
            extent.own += len(tokens)
            self.places.update((place, segments) for place, _ in run)
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
                    start = self._cursor
                    placeholder = Placeholder(self._placeholder(node), advance(node.length))
                    self.placeholders[node] = placeholder
                    outline.append(placeholder)
                    extent.children.append(Extent("parameter", node.name, start, self._cursor, node.length))
                else:
                    outline.append(node)
                    self._nested(node, extent, path)
            self._first = False
        flush()
        extent.end = max([self._cursor, *(child.end for child in extent.children)])

    def _nested(self, node: Module | Union, parent: Extent, path: str) -> None:
        """Lays out a module, or the members of a union, at the current position."""
        start = self._cursor
        if isinstance(node, Union):
            extent = Extent("union", node.scaffold or "", start, start)
            parent.children.append(extent)
        else:
            extent = parent
        # Members are alternatives: each starts where the union does.
        first, last_role = self._first, self.last_role
        ends = []
        for module in node.members if isinstance(node, Union) else (node,):
            self._cursor, self._first, self.last_role = start, first, last_role
            name = f"{path}.{module.name}" if path else module.name
            child = Extent("module", module.name, start, start, cache=module.cache)
            self._scope(module, child, name, cache=module.cache)
            extent.children.append(child)
            ends.append(child.end)
        if isinstance(node, Union):
            extent.end = max(ends)
        # In a packed layout only the enclosing text counts: a prompt may omit the module.
        self._cursor = start if self.packed else max(ends)

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
                f"more than its length {node.length}: raise the length or shorten the scaffold",
                file=self.schema.file,
                line=node.line,
            )
        filled = np.full(node.length, self.vocabulary.filler, np.int32)
        filled[: len(tokens)] = tokens
        return filled


def _events(children: Iterable[SchemaNode]) -> Iterator[tuple[SchemaNode, Edge]]:
    """Nodes of a scope in reading order. A role occurs twice: at its start and at its end."""
    for child in children:
        yield child, ""
        if isinstance(child, Role):
            yield from _events(child.children)
            yield child, "end"


def _id(part: Segment | Placeholder) -> bytes:
    return text_id(part.tokens)
