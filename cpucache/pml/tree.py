"""The trees that PML is parsed into.

Nodes compare by identity (``eq=False``): two modules with the same text are still two modules, and a node can be used
as a dictionary key by the layers above. ``line`` is the 1-based line of the tag, or of the first character of the text
that is not white space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

RoleName: TypeAlias = Literal["system", "user", "assistant"]
ROLES: tuple[RoleName, ...] = ("system", "user", "assistant")
Anchor: TypeAlias = Literal["ancestors", "none"]
ANCHORS: tuple[Anchor, ...] = ("ancestors", "none")


# ---- schema --------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Text:
    """A run of text, white space already folded at its ends (see ``xml.fold_space``)."""

    text: str
    line: int


@dataclass(frozen=True, eq=False)
class Parameter:
    """A reserved run of ``length`` tokens, filled by an argument of the prompt."""

    name: str
    length: int
    scaffold: str | None
    line: int


@dataclass(frozen=True, eq=False)
class Role:
    """A role tag around parts of a schema. Transparent to naming: modules inside belong to the module around it."""

    role: RoleName
    children: tuple[SchemaNode, ...]
    line: int


@dataclass(frozen=True, eq=False)
class Module:
    """A named, reusable part of a prompt. ``cache=False``: evaluated in every prompt.

    ``isolate``: slices of this module attend only to its own text, that of enclosing modules and the schema's own text,
    so that no other module influences them.
    """

    name: str
    children: tuple[SchemaNode, ...]
    cache: bool
    line: int
    isolate: bool = False


@dataclass(frozen=True, eq=False)
class Union:
    """Modules that start at the same position, of which a prompt takes at most one.

    ``scaffold`` names the member whose text replaces the union while text after it is encoded. ``isolate`` applies to
    every member.
    """

    members: tuple[Module, ...]
    scaffold: str | None
    line: int
    isolate: bool = False


SchemaNode: TypeAlias = Text | Parameter | Role | Module | Union


@dataclass(frozen=True, eq=False)
class Scaffold:
    """Modules that are also encoded together, in addition to their own slices, for prompts that include all of them.

    They are in the schema's order and include the enclosing modules of each.
    """

    modules: tuple[Module, ...]
    line: int


@dataclass(frozen=True, eq=False)
class Schema:
    """The root: a module that is always included. ``file`` is its name in error messages.

    ``anchor``: text that modules attend to when they are encoded: that of their ancestors, or none.
    """

    name: str
    children: tuple[SchemaNode, ...]
    file: str
    line: int
    scaffolds: tuple[Scaffold, ...] = ()
    anchor: Anchor = "ancestors"
    sources: tuple[Path, ...] = ()
    """Paths of the ``src`` files that were read."""


Scope: TypeAlias = Schema | Module


def parts(scope: Scope | Role) -> Iterator[SchemaNode]:
    """Nodes of a scope in order, including those inside role tags, each after its role tag."""
    for child in scope.children:
        yield child
        if isinstance(child, Role):
            yield from parts(child)


def modules_of(scope: Scope) -> dict[str, Module]:
    """Modules that a prompt may name directly under ``scope``, in order, including union members."""
    found: dict[str, Module] = {}
    for node in parts(scope):
        if isinstance(node, Module):
            found[node.name] = node
        elif isinstance(node, Union):
            found.update((member.name, member) for member in node.members)
    return found


def parameters_of(scope: Scope) -> dict[str, Parameter]:
    """Parameters directly under ``scope``, in order."""
    return {node.name: node for node in parts(scope) if isinstance(node, Parameter)}


# ---- prompt --------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Turn:
    """A ``<user>``, ``<assistant>`` or ``<system>`` turn written in the prompt itself."""

    role: RoleName
    text: str
    line: int


@dataclass(frozen=True, eq=False)
class Reference:
    """A module named in a prompt, with arguments for its parameters and references to modules nested in it."""

    name: str
    arguments: dict[str, str]
    children: tuple[Reference | Text, ...]
    line: int


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as written. ``arguments`` are for parameters directly under the schema."""

    schema: str
    arguments: dict[str, str]
    children: tuple[Reference | Text | Turn, ...]
    file: str
    line: int


# ---- a prompt resolved against its schema ---------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Argument:
    """Value of a parameter in a prompt."""

    parameter: Parameter
    value: str
    line: int


@dataclass(frozen=True, eq=False)
class RoleStart:
    """The point where a schema's role tag opens."""

    node: Role


@dataclass(frozen=True, eq=False)
class RoleEnd:
    """The point where a schema's role tag closes."""

    node: Role


@dataclass(frozen=True, eq=False)
class NewText:
    """Text written in the prompt itself, outside any turn."""

    text: str
    line: int


@dataclass(frozen=True, eq=False)
class Included:
    """A scope that a prompt includes, its items flattened into reading order.

    ``Text`` items are the schema's own nodes (the same objects), so that layers above can map them to segments.
    """

    scope: Scope
    items: tuple[Item, ...] = field(default=())


Item: TypeAlias = Text | Argument | RoleStart | RoleEnd | NewText | Turn | Included
