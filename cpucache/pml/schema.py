"""Schemas: parses XML into a validated tree of modules, unions, parameters, roles and text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from cpucache.pml.limits import Limits, TooLarge, read_regular
from cpucache.pml.names import PML_TAGS, flaw, hint, quote, tag
from cpucache.pml.scaffold import read_scaffolds
from cpucache.pml.structure import Shape, structure
from cpucache.pml.tree import ANCHORS, ROLES, Anchor, Module, Parameter, Role, Schema, SchemaNode, Text, Union
from cpucache.pml.xml import Element, has_content, is_blank, read_file, read_xml

_LENGTH = re.compile("[1-9][0-9]{0,8}")
_BESIDE = 2_000  # files of a folder among which the one that was meant is sought


def load_schema(path: Path, limits: Limits | None = None) -> Schema:
    """Parses the schema in the file ``path``, whose folder holds the ``src`` files. Raises like ``parse_schema``."""
    limits = limits or Limits()
    return parse_schema(read_file(path, limits), file=str(path), folder=path.parent, limits=limits)


def parse_schema(
    data: str | bytes, *, file: str = "<schema>", folder: Path | None = None, limits: Limits | None = None
) -> Schema:
    """Parses and checks a schema.

    ``file`` is its name in error messages; ``folder`` is the folder of ``src`` files (None: ``src`` can't be used).
    Raises ``PMLError`` for anything that breaks the rules of PML or exceeds ``limits``; its ``others`` are the further
    mistakes. Only what is not well-formed XML ends the search for more.
    """
    limits = limits or Limits()
    root = read_xml(data, file=file, root="schema", limits=limits)
    shape = structure("schema")
    root.check_attributes(shape)
    name = _name(root, {})
    anchor = _anchor(root)
    parser = _Parser(folder, limits)
    children = parser.content(root, shape, _Names(is_root=True), role=None)
    schema = Schema(name, children, file, root.line, anchor=anchor, sources=tuple(parser.sources))
    if _is_empty(root):
        root.report(f"the schema {quote(name)} is empty: give it text, a module or a parameter")
    schema = replace(schema, scaffolds=read_scaffolds(root, schema))
    root.problems.check()
    return schema


@dataclass
class _Names:
    """Names already used in one scope (the schema's or a module's), each with its line."""

    is_root: bool = False
    modules: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)


class _Parser:
    """Turns elements into nodes. ``role`` is the role tag that is open around an element, if any.

    The shape of an element is what the grammar says of such a tag in its place.

    A mistake is reported and skipped. The tree is discarded then.
    """

    def __init__(self, folder: Path | None, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._bytes = 0
        """Total size of the ``src`` files read so far, in bytes."""
        self.sources: dict[Path, None] = {}
        """Paths of the ``src`` files read so far."""

    def content(self, parent: Element, shape: Shape, names: _Names, role: Element | None) -> tuple[SchemaNode, ...]:
        """Returns the nodes inside ``parent``. ``names`` is its scope; for a role tag, the enclosing scope."""
        nodes: list[SchemaNode | None] = []
        for child in parent.children:
            if not isinstance(child, Text):
                nodes.append(self._node(child, parent, shape, names, role))
            elif shape.part.text:
                nodes.append(child)
            elif not is_blank(child.text):
                wrong = f"text inside {tag(parent.tag)}, which holds modules only: put it in a module"
                parent.report(wrong, child.line)
        return tuple(node for node in nodes if node is not None)

    def _node(
        self, element: Element, parent: Element, around: Shape, names: _Names, role: Element | None
    ) -> SchemaNode | None:
        shape = around.part.find(element.tag)
        if shape is None:
            self._misplaced(element, parent, around, names, role)
        elif element.tag == "module":
            return self._module(element, shape, names, role)
        elif element.tag == "union":
            return self._union(element, shape, names, role)
        elif element.tag == "parameter":
            return _parameter(element, shape, names)
        else:
            for known in ROLES:
                if element.tag == known:
                    element.check_attributes(shape)
                    return Role(known, self.content(element, shape, names, element), element.line)
        return None  # a scaffold, which is read when all modules are known

    def _misplaced(self, element: Element, parent: Element, around: Shape, names: _Names, role: Element | None) -> None:
        """Reports an element that is not allowed here, and mistakes inside it."""
        if not around.part.text:
            element.report(f"unexpected {tag(element.tag)} inside {tag(parent.tag)}, which holds modules only")
        elif element.tag in ROLES and role is not None:
            element.report(f"<{element.tag}> is inside <{role.tag}> (line {role.line}): roles can't be nested")
            self.content(element, around, names, element)
        elif element.tag == "scaffold":
            element.report(f"<scaffold> inside {tag(parent.tag)}: it must be directly under <schema>")
        else:
            wrong = f"unexpected {tag(element.tag)} inside {tag(parent.tag)}"
            element.report(wrong + hint(element.tag, around.inside, tag))
        if element.tag not in PML_TAGS and (usual := around.part.find("module")):
            self.content(element, usual, _Names(), role)

    def _module(self, element: Element, shape: Shape, names: _Names, role: Element | None) -> Module:
        element.check_attributes(shape)
        name = _name(element, names.modules, as_tag=True)
        children = (
            self._source(element, shape)
            if "src" in element.attributes
            else self.content(element, shape, _Names(), role)
        )
        cache, isolate = element.attributes.get("cache") != "false", element.attributes.get("isolate") == "true"
        return Module(name, children, cache, element.line, isolate)

    def _union(self, element: Element, shape: Shape, names: _Names, role: Element | None) -> Union:
        element.check_attributes(shape)
        members = [node for node in self.content(element, shape, names, role) if isinstance(node, Module)]
        member_names = [member.name for member in members]
        scaffold = element.attributes.get("scaffold")
        if not has_content(element):
            element.report("<union> is empty: give it at least one module")
        elif scaffold is not None and scaffold not in member_names:
            element.report(f"the scaffold {quote(scaffold)} is not a member of its union{hint(scaffold, member_names)}")
        return Union(tuple(members), scaffold, element.line, element.attributes.get("isolate") == "true")

    def _source(self, element: Element, shape: Shape) -> tuple[Text, ...]:
        """The verbatim text of a module's ``src`` file, or nothing where that is reported as a mistake."""
        src = element.attributes["src"]
        if element.has_too_much(shape):
            element.report(f"a module with src={quote(src)} can't have content of its own")
        problem: str | None = None
        text = ""
        try:
            text, problem = self._read(src)
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            problem = f"is not UTF-8 (its line {line}): save it in that encoding"
        except TooLarge as error:
            problem = f"{error.strerror}: shorten it or leave it out"
        except (OSError, RuntimeError, ValueError) as error:
            problem = f"can't be read: {(error.strerror if isinstance(error, OSError) else None) or error}"
        if problem:
            element.report(f"src={quote(src)} {problem}")
        return (Text(text, element.line),) if text else ()

    def _read(self, src: str) -> tuple[str, str | None]:
        """The text of a ``src`` file, and what is wrong with its place."""
        if self._folder is None:
            return "", "needs a schema that is read from a file: there is no folder to look in"
        folder = self._folder.resolve()
        path = (folder / src).resolve()
        if not path.is_relative_to(folder):
            return "", "is outside the schema's folder"
        if not path.exists():
            beside = islice(path.parent.iterdir(), _BESIDE) if path.parent.is_dir() else ()
            files = sorted(other.relative_to(folder).as_posix() for other in beside)
            return "", f"does not exist in the schema's folder{hint(src, files)}"
        if not path.is_file():
            return "", "is not a regular file"
        data = read_regular(path, self._limits.source)
        self.sources[path] = None
        self._bytes += len(data)
        if self._bytes > self._limits.sources:
            return "", f"brings all src files to more than {self._limits.sources:,} bytes: leave some out"
        return data.decode(), None


def _name(
    element: Element, taken: dict[str, int], *, as_tag: bool = False, as_attribute: bool = False, reserved: str = ""
) -> str:
    """Name of an element; reported as a mistake if it is not valid."""
    name = element.attributes.get("name")
    if name is None:  # which has been reported with the other attributes
        return ""
    problem = flaw(name, as_tag=as_tag, as_attribute=as_attribute)
    if problem is None and name == reserved:
        problem = "<prompt> has an attribute of that name already"
    if problem:
        element.report(f"illegal {element.tag} name {quote(name)}: {problem}")
    elif name in taken:
        used = f"already used on line {taken[name]} in the same scope"
        element.report(f"duplicate {element.tag} name {quote(name)}: {used}")
    else:
        taken[name] = element.line
    return name


def _parameter(element: Element, shape: Shape, names: _Names) -> Parameter:
    element.check_attributes(shape)
    name = _name(element, names.parameters, as_attribute=True, reserved="schema" if names.is_root else "")
    length = element.attributes.get("length", "1")
    if not _LENGTH.fullmatch(length):
        element.report(f"illegal length {quote(length)}: write a number of tokens from 1 to 999999999")
        length = "1"
    if element.has_too_much(shape):
        element.report('<parameter> can\'t have content: its text comes from the prompt (or from scaffold="...")')
    return Parameter(name, int(length), element.attributes.get("scaffold"), element.line)


def _is_empty(element: Element) -> bool:
    """Whether a schema or role contains only roles and scaffolds."""
    inside = [child for child in element.children if isinstance(child, Text) or child.tag != "scaffold"]
    return all(not isinstance(child, Text) and child.tag in ROLES and _is_empty(child) for child in inside)


def _anchor(element: Element) -> Anchor:
    given = element.attributes.get("anchor")
    return next((anchor for anchor in ANCHORS if anchor == given), "ancestors")
