"""A prompt checked against its schema and flattened into the order in which the model reads it."""

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
_SHOWN = 4  # schemas that a message lists


def resolve(prompt: Prompt, schema: Schema) -> Included:
    """Check ``prompt`` against ``schema``; the result has the schema as its scope and everything in reading order.

    What a scope brings itself (text, parameters, the borders of roles) keeps the schema's order, and modules stand
    where the schema has them. Modules with nothing between them in the schema come in the prompt's order. New text
    stands right before the reference that follows it in the prompt, or at the end of its scope if none does; turns
    come last of all.

    Raises ``PMLError`` for anything in the prompt that the schema does not have, or that it has elsewhere, twice, as an
    alternative to something else, or in another order; its ``others`` are the further mistakes. Whether arguments fit
    is for a layer that knows tokens.
    """
    schema_for(prompt, (schema,))
    resolver = _Resolver(prompt, schema)
    included = resolver.included(schema, prompt)
    resolver.problems.check()
    return included


def schema_for(prompt: Prompt, schemas: Sequence[Schema]) -> Schema:
    """The schema among ``schemas`` that ``prompt`` is written for. Raises ``PMLError``."""
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
    """Place of a module in its scope. ``run``: number of the run of modules between the scope's own parts."""

    module: Module
    union: Union | None
    run: int


class _Resolver:
    def __init__(self, prompt: Prompt, schema: Schema) -> None:
        self.problems = Problems(prompt.file)
        self._schema = schema
        self._everywhere: dict[str, list[tuple[tuple[str, ...], Module]]] | None = None
        """Every module of the schema by its name, once a mistake asks for it."""

    def included(self, scope: Scope, written: Prompt | Reference) -> Included:
        """``scope`` as ``written`` includes it."""
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
        """Returns the message for a reference that names no module directly below ``scope``."""
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
    """The modules that a prompt has taken from one scope, and what that rules out for the references to come."""

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
        """Add a module to the selection, or say why it can't be added."""
        shown = tag(reference.name)
        if first := self._taken.get(reference.name):
            return f"{shown} is included twice: it stands on line {first.line} already"
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
    """The nodes in order, role tags replaced by their two borders."""
    for node in nodes:
        if isinstance(node, Role):
            yield RoleStart(node)
            yield from _flat(node.children)
            yield RoleEnd(node)
        else:
            yield node


def _walk(scope: Scope, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Module]]:
    """Every module below ``scope``, with the names of the modules around it."""
    for module in modules_of(scope).values():
        yield path, module
        yield from _walk(module, (*path, module.name))
