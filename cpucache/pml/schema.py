"""Schemas: XML in, a validated tree of modules, unions, parameters, roles and text out."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from cpucache.pml.names import flaw, hint, quote, tag
from cpucache.pml.scaffold import read_scaffolds
from cpucache.pml.tree import ANCHORS, ROLES, Anchor, Module, Parameter, Role, Schema, SchemaNode, Text, Union, parts
from cpucache.pml.xml import Element, has_content, is_blank, read_file, read_xml

_CONTENT = ("module", "union", "parameter", *ROLES)
_LENGTH = re.compile("[1-9][0-9]{0,8}")


def load_schema(path: Path) -> Schema:
    """Parse the schema in the file ``path``; ``src`` files are looked for in its folder. Raises ``PMLError``."""
    return parse_schema(read_file(path), file=str(path), folder=path.parent)


def parse_schema(data: str | bytes, *, file: str = "<schema>", folder: Path | None = None) -> Schema:
    """Parse and check a schema.

    ``file`` is what error messages call it; ``folder`` is where ``src`` files must lie (None: ``src`` can't be used).
    Raises ``PMLError`` for anything that breaks the rules of PML.
    """
    root = read_xml(data, file=file, root="schema")
    root.check_attributes(required=("name",), optional=("anchor",))
    name = root.attributes["name"]
    if problem := flaw(name):
        raise root.error(f"illegal schema name {quote(name)}: {problem}")
    anchor = _anchor(root)
    children = _Parser(folder).content(root, _Names(is_root=True), role=None)
    schema = Schema(name, children, file, root.line, anchor=anchor)
    if all(isinstance(node, Role) for node in parts(schema)):
        raise root.error(f"the schema {quote(name)} is empty: give it text, a module or a parameter")
    return replace(schema, scaffolds=read_scaffolds(root, schema))


@dataclass
class _Names:
    """What is already named in one scope (the schema's or a module's), and on which line."""

    is_root: bool = False
    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)


class _Parser:
    """Turns elements into nodes. ``role`` is the role tag that is open around an element, if any."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def content(self, parent: Element, names: _Names, role: Element | None) -> tuple[SchemaNode, ...]:
        """The nodes inside ``parent``, whose own scope (or, for a role tag, the scope around it) is ``names``."""
        return tuple(
            child if isinstance(child, Text) else self._node(child, parent, names, role)
            for child in parent.children
            if isinstance(child, Text) or not _is_scaffold(child, parent)
        )

    def _node(self, element: Element, parent: Element, names: _Names, role: Element | None) -> SchemaNode:
        if element.tag == "module":
            return self._module(element, names, role)
        if element.tag == "union":
            return self._union(element, names, role)
        if element.tag == "parameter":
            return _parameter(element, names)
        for known in ROLES:
            if element.tag == known:
                if role is not None:
                    raise element.error(
                        f"{tag(known)} stands inside <{role.tag}> (line {role.line}): roles can't be nested"
                    )
                element.check_attributes()
                return Role(known, self.content(element, names, element), element.line)
        if element.tag == "scaffold":
            raise element.error(f"<scaffold> inside <{parent.tag}>: it can stand only directly under <schema>")
        known_here = (*_CONTENT, "scaffold") if parent.tag == "schema" else _CONTENT
        raise element.error(f"unexpected {tag(element.tag)} inside <{parent.tag}>{hint(element.tag, known_here, tag)}")

    def _module(self, element: Element, names: _Names, role: Element | None) -> Module:
        element.check_attributes(required=("name",), optional=("cache", "src", "isolate"))
        name = element.attributes["name"]
        if problem := flaw(name, as_tag=True):
            raise element.error(f"illegal module name {quote(name)}: {problem}")
        if name in names.modules:
            raise element.error(_duplicate("module", name, names.modules[name]))
        names.modules[name] = element.line
        cache, isolate = _flag(element, "cache", default=True), _flag(element, "isolate", default=False)
        children = self._source(element) if "src" in element.attributes else self.content(element, _Names(), role)
        return Module(name, children, cache, element.line, isolate)

    def _union(self, element: Element, names: _Names, role: Element | None) -> Union:
        element.check_attributes(optional=("scaffold", "isolate"))
        isolate = _flag(element, "isolate", default=False)
        members = []
        for child in element.children:
            if isinstance(child, Text):
                if not is_blank(child.text):
                    raise element.error("text inside <union>, which holds modules only: put it in a module", child.line)
            elif child.tag != "module":
                raise child.error(f"unexpected {tag(child.tag)} inside <union>, which holds modules only")
            else:
                members.append(self._module(child, names, role))
        if not members:
            raise element.error("<union> is empty: give it at least one module")
        scaffold = element.attributes.get("scaffold")
        member_names = [member.name for member in members]
        if scaffold is not None and scaffold not in member_names:
            raise element.error(
                f"the scaffold {quote(scaffold)} is not a member of its union{hint(scaffold, member_names)}"
            )
        return Union(tuple(members), scaffold, element.line, isolate)

    def _source(self, element: Element) -> tuple[Text, ...]:
        """The verbatim text of a module's ``src`` file."""
        src = element.attributes["src"]
        if has_content(element):
            raise element.error(f"a module with src={quote(src)} can't have content of its own")
        if self._folder is None:
            raise element.error(
                f"src={quote(src)} needs a schema that is read from a file: there is no folder to look in"
            )
        try:
            folder = self._folder.resolve()
            path = (folder / src).resolve()
            if not path.is_relative_to(folder):
                raise element.error(f"src={quote(src)} lies outside the schema's folder")
            if not path.exists():
                beside = path.parent.iterdir() if path.parent.is_dir() else ()
                files = sorted(other.relative_to(folder).as_posix() for other in beside)
                raise element.error(f"src={quote(src)} does not exist in the schema's folder{hint(src, files)}")
            # Not only for folders: reading a pipe or a device might never end.
            if not path.is_file():
                raise element.error(f"src={quote(src)} is not a regular file")
            data = path.read_bytes()
            text = data.decode()
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            raise element.error(f"src={quote(src)} is not UTF-8 (its line {line}): save it in that encoding") from None
        except (OSError, RuntimeError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise element.error(f"src={quote(src)} can't be read: {reason}") from None
        return (Text(text, element.line),) if text else ()


def _parameter(element: Element, names: _Names) -> Parameter:
    element.check_attributes(required=("name", "length"), optional=("scaffold",))
    name, length = element.attributes["name"], element.attributes["length"]
    problem = flaw(name, as_attribute=True)
    if problem is None and names.is_root and name == "schema":
        problem = "<prompt> has an attribute of that name already"
    if problem:
        raise element.error(f"illegal parameter name {quote(name)}: {problem}")
    if name in names.parameters:
        raise element.error(_duplicate("parameter", name, names.parameters[name]))
    names.parameters[name] = element.line
    if not _LENGTH.fullmatch(length):
        raise element.error(f"illegal length {quote(length)}: write a number of tokens from 1 to 999999999")
    if has_content(element):
        raise element.error('<parameter> can\'t have content: its text comes from the prompt (or from scaffold="...")')
    return Parameter(name, int(length), element.attributes.get("scaffold"), element.line)


def _is_scaffold(element: Element, parent: Element) -> bool:
    return element.tag == "scaffold" and parent.tag == "schema"


def _anchor(element: Element) -> Anchor:
    given = element.attributes.get("anchor", "ancestors")
    for anchor in ANCHORS:
        if given == anchor:
            return anchor
    raise element.error(f"unknown value {quote(given)} for 'anchor'{hint(given, ANCHORS)}")


def _flag(element: Element, name: str, *, default: bool) -> bool:
    given = element.attributes.get(name, str(default).lower())
    if given not in ("true", "false"):
        raise element.error(f"unknown value {quote(given)} for {quote(name)}{hint(given, ('true', 'false'))}")
    return given == "true"


def _duplicate(kind: str, name: str, line: int) -> str:
    return f"duplicate {kind} name {quote(name)}: already used on line {line} in the same scope"
