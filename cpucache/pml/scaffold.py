"""Scaffold sets: ``<scaffold modules="a b"/>`` under a schema, checked against its modules."""

from __future__ import annotations

from collections.abc import Iterator

from cpucache.pml.names import hint, quote
from cpucache.pml.tree import Module, Scaffold, Schema, Scope, Text, Union, modules_of, parts
from cpucache.pml.xml import Element, has_content


def read_scaffolds(root: Element, schema: Schema) -> tuple[Scaffold, ...]:
    """The scaffold sets among the children of ``root``, in order. Raises ``PMLError`` for a set that can't be used."""
    elements = [child for child in root.children if not isinstance(child, Text) and child.tag == "scaffold"]
    if not elements:
        return ()
    named = _Named(schema)
    lines: dict[tuple[Module, ...], int] = {}
    for element in elements:
        modules = named.modules(element)
        if modules in lines:
            raise element.error(f"this scaffold holds the same modules as the one on line {lines[modules]}")
        lines[modules] = element.line
    return tuple(Scaffold(modules, line) for modules, line in lines.items())


class _Named:
    """Every module of a schema under the name that scaffolds call it by: a dotted path from the schema."""

    def __init__(self, schema: Schema) -> None:
        self._found: dict[str, Module] = {}
        self._around: dict[Module, Module] = {}
        self._path: dict[Module, str] = {}
        self._union: dict[Module, Union] = {}
        names = sorted(self._walk(schema, ()), key=lambda names: len(names[0]))
        for path, module in names:
            # Names may have dots in them: what is less deep goes first.
            self._found.setdefault(".".join(path), module)

    def _walk(self, scope: Scope, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Module]]:
        for node in parts(scope):
            if isinstance(node, Union):
                self._union.update(dict.fromkeys(node.members, node))
        for name, module in modules_of(scope).items():
            if isinstance(scope, Module):
                self._around[module] = scope
            # In the order of the schema.
            self._path[module] = ".".join((*path, name))
            yield (*path, name), module
            yield from self._walk(module, (*path, name))

    def modules(self, element: Element) -> tuple[Module, ...]:
        """The modules that a scaffold names, in the order of the schema."""
        element.check_attributes(required=("modules",))
        if has_content(element):
            raise element.error('<scaffold> can\'t have content: it names modules, as in <scaffold modules="a b"/>')
        names = element.attributes["modules"].split()
        chosen: dict[Module, None] = {}
        for name in names:
            module = self._found.get(name)
            if module is None:
                raise element.error(f"there is no module {quote(name)} in the schema{hint(name, self._found)}")
            if module in chosen:
                raise element.error(f"the scaffold names {quote(name)} twice")
            chosen[module] = None
        if len(chosen) < 2:
            raise element.error(f"a scaffold is made of two modules or more, this one names {len(chosen) or 'none'}")
        unions: dict[Union, Module] = {}
        for module in chosen:
            if problem := self._problem(module, chosen, unions):
                raise element.error(problem)
        return tuple(module for module in self._path if module in chosen)

    def _problem(self, module: Module, chosen: dict[Module, None], unions: dict[Union, Module]) -> str | None:
        """Why ``module`` can't be encoded with the others."""
        name = quote(self._path[module])
        if not module.cache:
            return f'{name} has cache="false" (line {module.line}), so that there is no state of it to encode'
        around = self._around.get(module)
        if around is not None and around not in chosen:
            return f"{name} lies inside {quote(self._path[around])}, which the scaffold must name, too"
        union = self._union.get(module)
        if union is None:
            return None
        if (other := unions.setdefault(union, module)) is not module:
            both = f"{quote(self._path[other])} and {name}"
            return f"{both} are members of one union (line {union.line}), of which a prompt takes at most one"
        return None
