"""Trees written as PML that is parsed into the same trees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

from cpucache.errors import InputError
from cpucache.pml.canonical import laid_out
from cpucache.pml.limits import Limits
from cpucache.pml.names import flaw
from cpucache.pml.schema import parse_schema
from cpucache.pml.tree import Module, Parameter, Prompt, Reference, Role, SchemaNode, Text, Turn
from cpucache.pml.xml import fold_space

_IMPOSSIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_WORDS = (
    ("==", " is "),
    ("!=", " is not "),
    (">=", " ge "),
    ("<=", " le "),
    (">", " gt "),
    ("<", " lt "),
    ("+", " plus "),
)
_PromptNode: TypeAlias = "Reference | Text | Turn"
_Node = TypeVar("_Node", SchemaNode, _PromptNode)
_LONGEST = 40
"""Most characters of a name that is derived from an expression or a text."""


@dataclass(frozen=True, eq=False)
class Source(Module):
    """A module whose text is that of a file. ``src``: path of the file, relative to the folder of the schema."""

    src: str = ""


# ---- names -----------------------------------------------------------------------------------------------------------
def slug(text: str, *, otherwise: str, tag: bool = True) -> str:
    """Returns a name derived from a condition, an expression, or the beginning of a text.

    Args:
        text: Python or Jinja source, or words.
        otherwise: Prefix of the name if ``text`` by itself results in no valid name.
        tag: Whether prompts write the name as a tag; otherwise they write it as an attribute.
    """
    for sign, word in _WORDS:
        text = text.replace(sign, word)
    kept = "".join(char if flaw(char) is None else "-" for char in text)
    name = re.sub("-+", "-", kept).strip("-.")
    if len(name) > _LONGEST:
        name = name[:_LONGEST].rpartition("-")[0] or name[:_LONGEST]
    for candidate in (name, f"{otherwise}-{name}".strip("-")):
        if flaw(candidate, as_tag=tag, as_attribute=not tag) is None:
            return candidate
    return otherwise


class Names:
    """Names of modules and parameters used so far in one scope. ``taken``: names that no parameter may have."""

    def __init__(self, *taken: str) -> None:
        self._modules: set[str] = set()
        self._parameters = set(taken)

    def module(self, name: str) -> str:
        """Returns ``name`` for a module, with a number appended if a module has the name already."""
        return _unique(name, self._modules)

    def parameter(self, name: str) -> str:
        """Returns ``name`` for a parameter, with a number appended if the name is taken."""
        return _unique(name, self._parameters)


def _unique(name: str, taken: set[str]) -> str:
    given, number = name, 1
    while name in taken:
        number += 1
        name = f"{given}-{number}"
    taken.add(name)
    return name


def impossible(text: str) -> str | None:
    """Returns the first character of a text that XML can't hold, such as ``U+0007``; ``None`` if there is none."""
    found = _IMPOSSIBLE.search(text)
    return f"U+{ord(found.group()):04X}" if found else None


# ---- schemas ---------------------------------------------------------------------------------------------------------
def joined(nodes: Iterable[_Node]) -> list[_Node]:
    """Returns nodes with adjacent texts joined, as a parser returns them, and without empty texts."""
    found: list[_Node] = []
    for node in nodes:
        last = found[-1] if found else None
        if isinstance(node, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + node.text, last.line)
        elif not isinstance(node, Text) or node.text:
            found.append(node)
    return found


def write_schema(
    name: str, nodes: Sequence[SchemaNode], *, folder: Path | None = None, limits: Limits | None = None
) -> str:
    """Returns the canonical PML of a schema.

    White space at the ends of texts is kept: where PML would fold it, the tag has ``xml:space="preserve"``.

    Args:
        name: Name of the schema.
        nodes: Content of the schema.
        folder: Folder of the ``src`` files; ``None``: there are none.
        limits: Limits on the size of the schema; the default ``Limits`` if omitted.

    Returns:
        PML that is parsed into the same nodes.

    Raises:
        PMLError: The nodes are no valid schema; for example, they hold no text.
    """
    written = laid_out(_element("schema", {"name": name}, nodes, preserve=False), "schema")
    parse_schema(written, file=f"<schema {name}>", folder=folder, limits=limits)
    return written


def _element(tag: str, attributes: dict[str, str], inside: Sequence[_Node], *, preserve: bool) -> str:
    content = joined(inside)
    if not preserve and any(isinstance(node, Text) and fold_space(node.text, False) != node.text for node in content):
        attributes, preserve = attributes | {"xml:space": "preserve"}, True
    written = "".join(_node(node, preserve=preserve) for node in content)
    return f"{_start(tag, attributes)}>{written}</{tag}>" if written else f"{_start(tag, attributes)}/>"


def _node(node: SchemaNode | _PromptNode, *, preserve: bool) -> str:
    if isinstance(node, Text):
        return _escape(node.text).replace("]]>", "]]&gt;")
    if isinstance(node, Parameter):
        scaffold = {} if node.scaffold is None else {"scaffold": node.scaffold}
        return _start("parameter", {"name": node.name, "length": str(node.length)} | scaffold) + "/>"
    if isinstance(node, Role):
        return _element(node.role, {}, node.children, preserve=preserve)
    if isinstance(node, Source):
        return _start("module", {"name": node.name, "src": node.src}) + "/>"
    if isinstance(node, Module):
        flags = {"cache": "false"} if not node.cache else {}
        return _element("module", {"name": node.name} | flags, node.children, preserve=preserve)
    if isinstance(node, Reference):
        return _element(node.name, node.arguments, node.children, preserve=preserve)
    if isinstance(node, Turn):
        return _element(node.role, {}, [Text(node.text, node.line)], preserve=preserve)
    scaffold = {} if node.scaffold is None else {"scaffold": node.scaffold}
    return _element("union", scaffold, node.members, preserve=preserve)


def _start(tag: str, attributes: dict[str, str]) -> str:
    return " ".join((f"<{tag}", *(f'{name}="{_attribute(value)}"' for name, value in attributes.items())))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\r", "&#13;")


def _attribute(text: str) -> str:
    return _escape(text).replace('"', "&quot;").replace("\n", "&#10;").replace("\t", "&#9;")


# ---- prompts ---------------------------------------------------------------------------------------------------------
def write_prompt(prompt: Prompt) -> str:
    """Returns the canonical PML of a prompt, which is parsed into the same tree.

    Raises ``InputError`` for text or an argument with a character that PML can't hold.
    """
    written = _element("prompt", {"schema": prompt.schema} | prompt.arguments, prompt.children, preserve=False)
    if char := impossible(written):
        raise InputError(f"the prompt contains {char}, which PML can't contain: remove it")
    return laid_out(written, "prompt")
