"""A selection of a schema's modules, with arguments for their parameters, as somebody picks them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from cpucache.pml import tree
from cpucache.pml.tree import Module, Parameter, Prompt, Reference, Schema, Scope, Turn, Union, parts


@dataclass(eq=False)
class Picked:
    """A scope that is included: the schema, or a module of it.

    Args:
        scope: What is included.
        arguments: The values of its parameters.
        children: The modules picked in it, and text between them, in the order of the prompt.
    """

    scope: Scope
    arguments: dict[str, str] = field(default_factory=dict)
    children: list[Picked | tree.Text] = field(default_factory=list)

    def of(self, module: Module) -> Picked | None:
        """A module directly below, if it is picked."""
        return next((each for each in self.children if isinstance(each, Picked) and each.scope is module), None)


@dataclass(frozen=True)
class Row:
    """A line of the list."""

    kind: Literal["module", "member", "parameter"]
    """``"member"``: of a union, of which at most one is picked."""
    depth: int
    path: str
    """Dotted path of the module, or of the one that the parameter belongs to."""
    around: Picked
    node: Module | Parameter

    @property
    def picked(self) -> bool:
        """Whether the module is picked."""
        return isinstance(self.node, Module) and self.around.of(self.node) is not None

    @property
    def value(self) -> str:
        """The argument of the parameter."""
        return self.around.arguments.get(self.node.name, "")


class Selection:
    """Modules of a schema that are picked.

    Args:
        schema: The modules to choose from.
        prompt: What is picked at first, checked against the schema. Its last message is the ``draft``.
    """

    def __init__(self, schema: Schema, prompt: Prompt | None = None) -> None:
        self.schema = schema
        self._file = prompt.file if prompt else "the selection"
        children = () if prompt is None else prompt.children
        turns = [child for child in children if isinstance(child, Turn)]
        self.draft = turns.pop().text.strip() if turns and turns[-1].role == "user" else ""
        """A question to begin with."""
        self._turns = turns
        written = [child for child in children if not isinstance(child, Turn)]
        self._root = self._included(schema, {} if prompt is None else prompt.arguments, written)

    def _included(
        self,
        scope: Scope,
        arguments: dict[str, str],
        children: list[Reference | tree.Text] | tuple[Reference | tree.Text, ...],
    ) -> Picked:
        modules = tree.modules_of(scope)
        given = {name: parameter.scaffold or "" for name, parameter in tree.parameters_of(scope).items()} | arguments
        below = [
            child
            if isinstance(child, tree.Text)
            else self._included(modules[child.name], child.arguments, child.children)
            for child in children
        ]
        return Picked(scope, given, below)

    def rows(self) -> list[Row]:
        """The list: all modules that can be picked at the moment, and the parameters of those that are."""
        return list(self._rows(self._root, 0, ""))

    def _rows(self, around: Picked, depth: int, path: str) -> Iterator[Row]:
        for node in parts(around.scope):
            if isinstance(node, Parameter):
                yield Row("parameter", depth, path, around, node)
            for module in node.members if isinstance(node, Union) else [node]:
                if isinstance(module, Module):
                    below = f"{path}.{module.name}" if path else module.name
                    yield Row("member" if isinstance(node, Union) else "module", depth, below, around, module)
                    if picked := around.of(module):
                        yield from self._rows(picked, depth + 1, below)

    def toggle(self, row: Row) -> None:
        """Pick the module of a row, in the place of other members of its union, or leave it out."""
        around, module = row.around, row.node
        if not isinstance(module, Module):
            return
        if picked := around.of(module):
            around.children.remove(picked)
            return
        for node in parts(around.scope):
            if isinstance(node, Union) and module in node.members:
                others = [around.of(member) for member in node.members]
                around.children = [child for child in around.children if child not in others]
        order = list(tree.modules_of(around.scope))
        following = set(order[order.index(module.name) :])
        # Before the modules that follow it in the schema, wherever the prompt has those.
        at = next(
            (
                index
                for index, child in enumerate(around.children)
                if isinstance(child, Picked) and getattr(child.scope, "name", "") in following
            ),
            len(around.children),
        )
        around.children.insert(at, self._included(module, {}, []))

    def give(self, row: Row, value: str) -> None:
        """Give the parameter of a row a value."""
        row.around.arguments[row.node.name] = value

    def prompt(self, question: str | None) -> Prompt:
        """The prompt that asks a question on what is picked; ``None`` leaves the question out."""
        root = self._root
        references = tuple(_written(child) for child in root.children)
        turns = self._turns if question is None else [*self._turns, Turn("user", question, 1)]
        return Prompt(self.schema.name, dict(root.arguments), (*references, *turns), self._file, 1)

    @property
    def names(self) -> list[str]:
        """The modules that are picked."""
        return [row.path for row in self.rows() if row.picked]


def _written(node: Picked | tree.Text) -> Reference | tree.Text:
    if isinstance(node, tree.Text):
        return node
    return Reference(node.scope.name, dict(node.arguments), tuple(_written(child) for child in node.children), 1)
