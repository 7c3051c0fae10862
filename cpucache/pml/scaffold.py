"""Scaffold sets: ``<scaffold modules="a b"/>`` under a schema, checked against its modules."""

from __future__ import annotations

import re

from cpucache.pml.names import LONGEST, hint, quote
from cpucache.pml.structure import structure
from cpucache.pml.tree import Module, Scaffold, Schema, Scope, Text, Union, modules_of, parts
from cpucache.pml.xml import Element


def read_scaffolds(root: Element, schema: Schema) -> tuple[Scaffold, ...]:
    """Scaffold sets among the children of ``root``, in order. Invalid ones are reported as mistakes."""
    elements = [child for child in root.children if not isinstance(child, Text) and child.tag == "scaffold"]
    if not elements:
        return ()
    named = _Named(schema)
    lines: dict[tuple[Module, ...], int] = {}
    for element in elements:
        modules = named.modules(element)
        if modules in lines:
            element.report(f"this scaffold names the same modules as the one on line {lines[modules]}")
        elif modules:
            lines[modules] = element.line
    return tuple(Scaffold(modules, line) for modules, line in lines.items())


class _Named:
    """The modules of a schema under the names that scaffolds call them by: dotted paths from the schema.

    Only paths that are named are built: all paths together may be far longer than the document.
    """

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._order: dict[Module, int] = {}
        self._around: dict[Module, Module] = {}
        self._union: dict[Module, Union] = {}
        self._inside: dict[Scope, dict[str, Module]] = {}
        self._walk(schema)

    def _walk(self, scope: Scope) -> None:
        for node in parts(scope):
            if isinstance(node, Union):
                self._union.update(dict.fromkeys(node.members, node))
        self._inside[scope] = modules_of(scope)
        for module in self._inside[scope].values():
            if isinstance(scope, Module):
                self._around[module] = scope
            self._order[module] = len(self._order)
            self._walk(module)

    def _find(self, name: str) -> Module | None:
        """The module that a path names. Names may have dots in them: what is less deep goes first."""
        reached: list[tuple[Scope, str]] = [(self._schema, name)]
        while reached:
            for scope, rest in reached:
                if rest in self._inside[scope]:
                    return self._inside[scope][rest]
            reached = [
                (module, rest[dot.end() :])
                for scope, rest in reached
                for dot in re.finditer(r"\.", rest[: LONGEST + 1])
                if (module := self._inside[scope].get(rest[: dot.start()]))
            ]
        return None

    def _path(self, module: Module) -> str:
        around = self._around.get(module)
        return module.name if around is None else f"{self._path(around)}.{module.name}"

    def modules(self, element: Element) -> tuple[Module, ...]:
        """The modules that a scaffold names, in the order of the schema; none if something is wrong with it."""
        shape = structure("schema").part.find("scaffold")
        assert shape is not None
        if not element.check_attributes(shape):
            return ()
        if element.has_too_much(shape):
            element.report('<scaffold> can\'t have content: it names modules, as in <scaffold modules="a b"/>')
        chosen: dict[Module, None] = {}
        unknown = False
        for name in re.findall(r"[^ \t\r\n]+", element.attributes["modules"]):
            module = self._find(name)
            if module is None:
                paths = (self._path(known) for known in self._order)
                element.report(f"there is no module {quote(name)} in the schema{hint(name, paths)}")
                unknown = True
            elif module in chosen:
                element.report(f"the scaffold names {quote(name)} twice")
            else:
                chosen[module] = None
        if unknown:
            return ()
        if len(chosen) < 2:
            element.report(f"a scaffold needs two modules or more, this one names {len(chosen) or 'none'}")
        unions: dict[Union, Module] = {}
        for module in chosen:
            if problem := self._problem(module, chosen, unions):
                element.report(problem)
        return tuple(sorted(chosen, key=self._order.__getitem__))

    def _problem(self, module: Module, chosen: dict[Module, None], unions: dict[Union, Module]) -> str | None:
        """Why ``module`` can't be encoded with the others."""
        name = quote(self._path(module))
        if not module.cache:
            return f'{name} has cache="false" (line {module.line}), so it has no state to encode'
        around = self._around.get(module)
        if around is not None and around not in chosen:
            return f"{name} is inside {quote(self._path(around))}, which the scaffold must name, too"
        union = self._union.get(module)
        if union is None:
            return None
        if (other := unions.setdefault(union, module)) is not module:
            both = f"{quote(self._path(other))} and {name}"
            return f"{both} are members of one union (line {union.line}), of which a prompt takes at most one"
        return None
