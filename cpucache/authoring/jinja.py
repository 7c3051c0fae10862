"""Jinja templates as schemas, from Jinja's own syntax tree. No template is rendered."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cpucache.authoring.expressions import Known, said
from cpucache.authoring.writing import Names, Source, impossible, slug
from cpucache.errors import PMLError
from cpucache.pml.tree import Module, Parameter, SchemaNode, Text, Union

_SYNTAX = re.compile(r"\{\{|\{%|\{#")
_CONTROL = re.compile(r"<\|[a-z_]+\|>|\[/?INST\]|<(?:start|end)_of_turn>|<</?SYS>>")
_TURNS = "messages"
"""Variable over which chat templates loop."""


@dataclass(frozen=True)
class Left:
    """Part of a template that was left out or converted into something else, with the reason and a remedy."""

    file: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}"


@dataclass
class Turned:
    """Nodes of a schema, and the parts of the template that they do not reproduce."""

    nodes: list[SchemaNode] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)


def from_jinja(source: str, *, file: str, folder: Path, base: Path, length: int, trim: bool = False) -> Turned:
    """Converts a template into the nodes of a schema.

    Literals are text. ``{% if %}`` is a module; with ``{% elif %}`` or ``{% else %}`` it is a union. ``{{ name }}`` is
    a parameter, and so is a loop over values that are not constant. A loop over constants is a module for each item.
    ``{% block %}`` and ``{% include %}`` are modules.

    Args:
        source: Text of the template.
        file: Name of the template in errors.
        folder: Folder of the templates that it includes.
        base: Folder of the schema, to which ``src`` is relative.
        length: Length of each parameter, in tokens.
        trim: Whether newlines after tags and white space before them are dropped, as in chat templates.

    Returns:
        The nodes, and what they do not reproduce, by line.

    Raises:
        PMLError: The template is not well-formed.
    """
    turning = _Turning(folder, base, length, trim)
    turned = Turned(left=turning.left)
    turned.nodes = turning.template(source, file, Names("schema"), ())
    turned.left.sort(key=lambda left: (left.file, left.line))
    return turned


class _Turning:
    def __init__(self, folder: Path, base: Path, length: int, trim: bool) -> None:
        self._folder = folder.resolve()
        self._base = base.resolve()
        self._length = length
        self._environment = ImmutableSandboxedEnvironment(
            trim_blocks=trim, lstrip_blocks=trim, extensions=["jinja2.ext.loopcontrols"]
        )
        self.left: list[Left] = []

    def template(self, source: str, file: str, names: Names, stack: tuple[str, ...]) -> list[SchemaNode]:
        try:
            tree = self._environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise PMLError(f"not a Jinja template: {error.message}", file=file, line=error.lineno) from error
        return _Template(self, file, stack, self._environment).body(tree.body, names)

    def include(self, name: str, file: str, line: int, stack: tuple[str, ...], names: Names) -> list[SchemaNode] | str:
        """Module of a file that a template includes, or the reason why there is none."""
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder):
            return "is outside the template's folder"
        if str(path) in stack or str(path) == str((self._folder / file).resolve()):
            return "includes itself"
        try:
            text = path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            return f"can't be read: {getattr(error, 'strerror', None) or error}"
        module = names.module(slug(Path(name).name, otherwise="include"))
        if not _SYNTAX.search(text) and path.is_relative_to(self._base):
            return [Source(module, (), True, line, src=path.relative_to(self._base).as_posix())]
        inside = self.template(text, name, Names(), (*stack, str(path)))
        return [Module(module, tuple(inside), True, line)]

    @property
    def length(self) -> int:
        return self._length


class _Template:
    """Conversion of one template. ``_known``: names that have constant values."""

    def __init__(self, turning: _Turning, file: str, stack: tuple[str, ...], environment: jinja2.Environment) -> None:
        self._turning = turning
        self._file = file
        self._stack = stack
        self._known = Known(environment)

    def _leave(self, node: nodes.Node, what: str) -> None:
        self._turning.left.append(Left(self._file, node.lineno, what))

    def body(self, statements: Iterable[nodes.Node], names: Names) -> list[SchemaNode]:
        found: list[SchemaNode] = []
        for statement in statements:
            found += self._statement(statement, names)
        return found

    def _statement(self, node: nodes.Node, names: Names) -> list[SchemaNode]:
        turn: dict[type[nodes.Node], Callable[[Any, Names], list[SchemaNode]]] = {
            nodes.Output: self._output,
            nodes.If: self._if,
            nodes.For: self._for,
            nodes.Include: self._include,
            nodes.Block: self._block,
            nodes.Assign: self._assign,
            nodes.With: self._with,
            nodes.Scope: lambda node, names: self.body(node.body, names),
        }
        if type(node) in turn:
            return turn[type(node)](node, names)
        said_of: dict[type[nodes.Node], str] = {
            nodes.Extends: "{% extends %}: convert the template that is extended, or put both into one",
            nodes.Macro: "{% macro %}: write its text where it is called",
            nodes.Import: "{% import %}: write the imported text where it is used",
            nodes.FromImport: "{% from %}: write the imported text where it is used",
            nodes.CallBlock: "{% call %}: write the text of the macro here",
            nodes.FilterBlock: "{% filter %}: its text is left out, because no filter is applied to text of a schema",
            nodes.AssignBlock: "{% set %} with a block: write its text where it is used",
        }
        self._leave(node, f"left out: {said_of.get(type(node), type(node).__name__)}")
        return []

    # ---- text and parameters -----------------------------------------------------------------------------------------
    def _output(self, node: nodes.Output, names: Names) -> list[SchemaNode]:
        found: list[SchemaNode] = []
        for each in node.nodes:
            if isinstance(each, nodes.TemplateData):
                found += self._text(each.data, each)
                continue
            known, value = self._known.value(each)
            if known:
                found += self._text("" if value is None else str(value), each)
            elif part := self._parameter(each, names):
                found.append(part)
        return found

    def _text(self, text: str, node: nodes.Node) -> list[SchemaNode]:
        if char := impossible(text):
            self._leave(node, f"left out: a text with {char}, which PML can't contain")
            return []
        if found := _CONTROL.search(text):
            line = text.count("\n", 0, found.start())
            what = "is plain text in a schema: put the text after it into <system>, <user> or <assistant> instead"
            self._turning.left.append(Left(self._file, node.lineno + line, f"{found.group()} {what}"))
        return [Text(text, node.lineno)] if text else []

    def _parameter(self, node: nodes.Expr, names: Names) -> Parameter | None:
        scaffold: str | None = None
        applied: list[str] = []
        inner = node
        while isinstance(inner, nodes.Filter) and inner.node is not None:
            known, value = self._known.value(inner.args[0]) if inner.args else (False, None)
            if inner.name in ("default", "d") and known and isinstance(value, str | int | float):
                scaffold = str(value) or None
            else:
                applied.append(inner.name)
            inner = inner.node
        if (
            isinstance(inner, nodes.Call)
            and isinstance(inner.node, nodes.Name)
            and inner.node.name == "raise_exception"
        ):
            self._leave(node, "left out: raise_exception(): check the arguments of a prompt before it is written")
            return None
        shown = said(inner)
        name = names.parameter(slug(shown, otherwise="argument", tag=False))
        if applied:
            filters = ", ".join(f"|{each}" for each in reversed(applied))
            self._leave(node, f"{filters} is not applied to the argument '{name}': pass the filtered text")
        elif not isinstance(inner, nodes.Name | nodes.Getattr | nodes.Getitem):
            self._leave(node, f"the expression becomes the parameter '{name}': pass its value as the argument")
        return Parameter(name, self._turning.length, scaffold, node.lineno)

    # ---- modules -----------------------------------------------------------------------------------------------------
    def _if(self, node: nodes.If, names: Names) -> list[SchemaNode]:
        arms: list[tuple[nodes.Node | None, Sequence[nodes.Node], int]] = []
        arms += [(each.test, each.body, each.lineno) for each in (node, *node.elif_)]
        if node.else_:
            arms.append((None, node.else_, node.else_[0].lineno))
        modules: list[Module] = []
        first = ""
        for test, body, line in arms:
            known, value = (True, True) if test is None else self._known.value(test)
            if known and not value:
                continue
            if known and not first:
                return self.body(body, names)
            name = f"{first}-else" if known or test is None else slug(said(test), otherwise="if")
            first = first or name
            with self._known.inside():
                inside = self.body(body, Names())
            if inside:
                modules.append(Module(names.module(name), tuple(inside), True, line))
            if known:
                break
        # After the branches, the value of a name that one of them assigns is unknown.
        for each in node.find_all(nodes.Assign):
            self._known.forget(each.target)
        if len(modules) > 1:
            return [Union(tuple(modules), None, node.lineno)]
        return list(modules)

    def _for(self, node: nodes.For, names: Names) -> list[SchemaNode]:
        known, items = self._known.value(node.iter)
        shown = said(node.iter)
        if not known or node.test is not None or node.recursive or not _is_listed(items):
            if shown.partition(".")[0].partition("-")[0] == _TURNS:
                what = "left out: the loop over messages: a prompt has its own turns, as <user> and <assistant>"
                self._leave(node, what)
                return []
            name = names.parameter(slug(shown, otherwise="loop", tag=False))
            self._leave(node, f"the loop becomes the parameter '{name}': pass all text that it writes as the argument")
            return [Parameter(name, self._turning.length, None, node.lineno)]
        found: list[SchemaNode] = []
        items = list(items)
        for at, item in enumerate(items):
            with self._known.inside():
                bound = self._known.bind(node.target, item)
                if bound is None:
                    self._leave(node, f"left out: a loop whose names do not fit its item {item!r}")
                    return []
                self._known.loop(at, len(items))
                inside = self.body(node.body, Names())
            if inside:
                name = next((value for value in bound.values() if isinstance(value, str) and value.strip()), item)
                found.append(
                    Module(names.module(slug(str(name), otherwise=next(iter(bound)))), tuple(inside), True, node.lineno)
                )
        return found if items else self.body(node.else_, names)

    def _block(self, node: nodes.Block, names: Names) -> list[SchemaNode]:
        inside = self.body(node.body, Names())
        return (
            [Module(names.module(slug(node.name, otherwise="block")), tuple(inside), True, node.lineno)]
            if inside
            else []
        )

    def _include(self, node: nodes.Include, names: Names) -> list[SchemaNode]:
        known, given = self._known.value(node.template)
        if not known or not isinstance(given, str | list | tuple) or not given:
            self._leave(node, "left out: {% include %} of a file that is not named in the template")
            return []
        candidates = [given] if isinstance(given, str) else list(given)
        why = ""
        for name in candidates:
            found = self._turning.include(str(name), self._file, node.lineno, self._stack, names)
            if not isinstance(found, str):
                return found
            why = f"{name} {found}"
        if not node.ignore_missing:
            self._leave(node, f"left out: {{% include %}}: {why}")
        return []

    def _assign(self, node: nodes.Assign, _: Names | None = None) -> list[SchemaNode]:
        known, value = self._known.value(node.node)
        if not (known and isinstance(node.target, nodes.Name) and self._known.bind(node.target, value)):
            self._leave(node, f"{{% set %}}: '{said(node.target) or '...'}' becomes an argument wherever it is used")
            self._known.forget(node.target)
        return []

    def _with(self, node: nodes.With, names: Names) -> list[SchemaNode]:
        with self._known.inside():
            for target, value in zip(node.targets, node.values, strict=True):
                self._assign(nodes.Assign(target, value, lineno=node.lineno))
            return self.body(node.body, names)


def _is_listed(items: Any) -> bool:
    return isinstance(items, list | tuple | dict | range) and len(items) <= 10_000
