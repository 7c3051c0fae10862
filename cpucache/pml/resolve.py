"""Checks a prompt against its schema and flattens it into reading order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias

from cpucache.errors import PMLError
from cpucache.pml.names import hint, quote, tag
from cpucache.pml.problems import Problems
from cpucache.pml.tree import (
    Argument,
    Included,
    Item,
    Module,
    NewText,
    Parameter,
    Prompt,
    Reference,
    Role,
    RoleEnd,
    RoleStart,
    Schema,
    SchemaNode,
    Scope,
    Text,
    Turn,
    Union,
    modules_of,
    parameters_of,
)

_Flat: TypeAlias = Text | Parameter | Module | Union | RoleStart | RoleEnd
_SHOWN = 4  # maximum number of schemas in a message


def resolve(prompt: Prompt, schema: Schema) -> Included:
    """Checks ``prompt`` against ``schema``; the result has the schema as its scope and all items in reading order.

    Text, parameters and role edges of a scope keep the schema's order, as do modules that these separate. Modules with
    none of these between them take the prompt's order. New text is directly before the reference that follows it in
    the prompt, or at the end of its scope if none follows. Turns are last.

    Raises ``PMLError`` for anything that the schema does not define at that point, that occurs twice or out of order,
    or that excludes another union member; its ``others`` are the further mistakes. The length of arguments is not
    checked: that needs tokens.
    """
    schema_for(prompt, (schema,))
    resolver = _Resolver(prompt, schema)
    included = resolver.included(schema, prompt)
    resolver.problems.check()
    return included


def schema_for(prompt: Prompt, schemas: Sequence[Schema]) -> Schema:
    """Returns the schema that ``prompt`` names. Raises ``PMLError`` if it is not among ``schemas``."""
    for schema in schemas:
        if schema.name == prompt.schema:
            return schema
    given = ", ".join(f"{schema.file} is {quote(schema.name)}" for schema in schemas[:_SHOWN])
    more = f" and {len(schemas) - _SHOWN} more" if len(schemas) > _SHOWN else ""
    near = hint(prompt.schema, [schema.name for schema in schemas]).partition(" (")[0]
    reason = (
        f"the prompt is written for the schema {quote(prompt.schema)}, but {given or 'no schema is given'}{more}{near}"
    )
    raise PMLError(reason, file=prompt.file, line=prompt.line)


@dataclass(frozen=True)
class _Place:
    """Location of a module in its scope. ``run``: index among the runs of nodes between the scope's own parts."""

    module: Module
    union: Union | None
    run: int


class _Resolver:
    def __init__(self, prompt: Prompt, schema: Schema) -> None:
        self.problems = Problems(prompt.file)
        self._schema = schema
        self._everywhere: dict[str, list[tuple[tuple[str, ...], Module]]] | None = None
        """All modules of the schema by name; filled in for the first error message that needs them."""

    def included(self, scope: Scope, written: Prompt | Reference) -> Included:
        """Returns ``scope`` with the items that ``written`` includes."""
        arguments = self._arguments(scope, written)
        runs = [
            list(run) for _, run in groupby(_flat(scope.children), key=lambda node: isinstance(node, Module | Union))
        ]
        selection = _Selection(runs)
        chosen: dict[int, list[Item]] = {}
        waiting: list[Item] = []
        turns: list[Item] = []
        for node in written.children:
            if isinstance(node, Turn):
                turns.append(node)
            elif isinstance(node, Text):
                waiting.append(NewText(node.text, node.line))
            else:
                place = selection.find(node)
                if place is None:
                    self.problems.report(self._why_unknown(node.name, scope), node.line)
                    continue
                if problem := selection.take(node, place):
                    self.problems.report(problem, node.line)
                chosen.setdefault(place.run, []).extend([*waiting, self.included(place.module, node)])
                waiting.clear()
        items: list[Item] = []
        for index, run in enumerate(runs):
            for part in run:
                if isinstance(part, Parameter):
                    if part.name in arguments:
                        items.append(arguments[part.name])
                elif not isinstance(part, Module | Union):
                    items.append(part)
            items += chosen.get(index, [])
        return Included(scope, (*items, *waiting, *turns))

    def _arguments(self, scope: Scope, written: Prompt | Reference) -> dict[str, Argument]:
        parameters = parameters_of(scope)
        shown = tag("prompt" if isinstance(written, Prompt) else written.name)
        for name in written.arguments:
            if name not in parameters:
                unknown = f"unknown argument {quote(name)} for {shown}{hint(name, parameters)}"
                self.problems.report(unknown, written.line)
        for name, parameter in parameters.items():
            if name not in written.arguments:
                need = f"{shown} lacks an argument for its parameter {quote(name)} (schema line {parameter.line})"
                self.problems.report(f'{need}: write {name}="..."', written.line)
        return {
            name: Argument(parameter, written.arguments[name], written.line)
            for name, parameter in parameters.items()
            if name in written.arguments
        }

    def _why_unknown(self, name: str, scope: Scope) -> str:
        """Error message for a reference that names no module directly under ``scope``."""
        here = "directly under the schema" if isinstance(scope, Schema) else f"under {tag(scope.name)}"
        if self._everywhere is None:
            self._everywhere = {}
            for path, module in _walk(self._schema, ()):
                self._everywhere.setdefault(module.name, []).append((path, module))
        elsewhere = self._everywhere.get(name)
        if not elsewhere:
            return f"there is no module {quote(name)} {here}{hint(name, modules_of(scope))}"
        path, module = elsewhere[0]
        where = f"under {quote('.'.join(path))}" if path else "directly under the schema"
        more = f" and in {len(elsewhere) - 1} more places" if len(elsewhere) > 1 else ""
        return f"the module {quote(name)} is not {here}, but {where} ({self._schema.file}:{module.line}){more}"


class _Selection:
    """Modules that a prompt has selected from one scope; they restrict the references after them."""

    def __init__(self, runs: Iterable[Iterable[_Flat]]) -> None:
        self._places: dict[str, _Place] = {}
        for index, run in enumerate(runs):
            for node in run:
                if isinstance(node, Module):
                    self._places[node.name] = _Place(node, None, index)
                elif isinstance(node, Union):
                    self._places.update((member.name, _Place(member, node, index)) for member in node.members)
        self._taken: dict[str, Reference] = {}
        self._members: dict[Union, Reference] = {}
        self._last: _Place | None = None

    def find(self, reference: Reference) -> _Place | None:
        return self._places.get(reference.name)

    def take(self, reference: Reference, place: _Place) -> str | None:
        """Adds a module to the selection, or returns the reason why it cannot be added."""
        shown = tag(reference.name)
        if first := self._taken.get(reference.name):
            return f"{shown} is included twice: it is on line {first.line} already"
        if place.union is not None and (other := self._members.get(place.union)):
            return (
                f"{shown} and {tag(other.name)} (line {other.line}) are members of one union"
                f" (schema line {place.union.line}): include one of them"
            )
        if self._last is not None and place.run < self._last.run:
            later = self._last.module
            return (
                f"{shown} (schema line {place.module.line}) comes before {tag(later.name)} (schema line {later.line})"
                " in the schema, with other content between them: write it first"
            )
        self._taken[reference.name] = reference
        if place.union is not None:
            self._members[place.union] = reference
        self._last = place
        return None


def _flat(nodes: Iterable[SchemaNode]) -> Iterator[_Flat]:
    """Nodes in order, with each role tag replaced by its start and its end."""
    for node in nodes:
        if isinstance(node, Role):
            yield RoleStart(node)
            yield from _flat(node.children)
            yield RoleEnd(node)
        else:
            yield node


def _walk(scope: Scope, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Module]]:
    """All modules below ``scope``, each with the names of its enclosing modules."""
    for module in modules_of(scope).values():
        yield path, module
        yield from _walk(module, (*path, module.name))
