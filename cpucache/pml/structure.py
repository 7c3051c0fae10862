"""Structure of PML documents, read from their RELAX NG grammars.

``grammar/schema.rng`` and ``grammar/prompt.rng`` are what editors validate with. The parsers take from the same files
which tags and attributes they expect, so that they can name what would be right where something is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, TypeAlias

from lxml import etree

Root: TypeAlias = Literal["schema", "prompt"]
GRAMMARS = Path(__file__).parent / "grammar"
"""The folder of the grammars."""

SPACE = "xml:space"
_NAMESPACE = "{http://relaxng.org/ns/structure/1.0}"


@dataclass(frozen=True)
class Attribute:
    """An attribute that a tag may have. ``values``: its allowed values, if they can be listed."""

    required: bool
    values: tuple[str, ...] = ()


@dataclass(eq=False)
class Part:
    """Part of a tag's content: text and tags in any order."""

    text: bool = False
    shapes: list[Shape] = field(default_factory=list)

    def find(self, tag: str) -> Shape | None:
        """Shape of ``tag`` in this part; ``None`` if it is not allowed here."""
        return self._named.get(tag) or next((shape for shape in self._others if shape.fits(tag)), None)

    # Read once the grammar is complete.
    @cached_property
    def _named(self) -> dict[str, Shape]:
        return {tag: shape for shape in reversed(self.shapes) for tag in shape.tags}

    @cached_property
    def _others(self) -> list[Shape]:
        return [shape for shape in self.shapes if not shape.tags]


@dataclass(eq=False)
class Shape:
    """A tag in one of the contexts that allow it."""

    tags: tuple[str, ...] = ()
    """Allowed names; empty: all names except ``refused``."""
    refused: frozenset[str] = frozenset()
    attributes: dict[str, Attribute] = field(default_factory=dict)
    """Allowed attributes, in canonical order."""
    takes_any: bool = False
    """Whether other attributes are allowed."""
    without_content: frozenset[str] = frozenset()
    """Attributes of a tag without content."""
    parts: list[Part] = field(default_factory=list)
    """Parts of the content, in order."""

    def fits(self, tag: str) -> bool:
        """Whether this shape allows the name ``tag``."""
        return tag in self.tags if self.tags else tag not in self.refused

    @cached_property
    def known(self) -> tuple[str, ...]:
        """Names of the attributes, except ``xml:space``."""
        return tuple(name for name in self.attributes if name != SPACE)

    @cached_property
    def required(self) -> tuple[str, ...]:
        """Names of the required attributes."""
        return tuple(name for name in self.known if self.attributes[name].required)

    @cached_property
    def listed(self) -> dict[str, tuple[str, ...]]:
        """Allowed values by attribute, where they can be listed."""
        return {name: attribute.values for name, attribute in self.attributes.items() if attribute.values}

    @property
    def part(self) -> Part:
        """The only part of the content; for shapes with one part."""
        (part,) = self.parts
        return part

    @property
    def inside(self) -> tuple[str, ...]:
        """Names of the tags allowed inside, where they can be listed."""
        return tuple(tag for part in self.parts for shape in part.shapes for tag in shape.tags)


@cache
def structure(root: Root) -> Shape:
    """Shape of the root tag of a kind of document."""
    return _Grammar(GRAMMARS / f"{root}.rng").start()


class _Grammar:
    """Reads the RELAX NG patterns that the grammars use."""

    def __init__(self, path: Path) -> None:
        root = etree.parse(str(path), etree.XMLParser(remove_comments=True, remove_blank_text=True)).getroot()
        self._defined = {str(define.get("name")): list(define) for define in root.iter(f"{_NAMESPACE}define")}
        self._start = root.find(f"{_NAMESPACE}start/{_NAMESPACE}ref")
        self._shapes: dict[str, Shape] = {}

    def start(self) -> Shape:
        return self._shape(str(self._start.get("name")))

    def _shape(self, name: str) -> Shape:
        """Shape of the element that ``name`` defines."""
        if name not in self._shapes:
            (element,) = self._defined[name]
            # Known before it is complete, because an element may contain itself.
            shape = self._shapes[name] = Shape()
            children = list(element)
            if element.get("name"):
                shape.tags = (str(element.get("name")),)
            elif _kind(children[0]) == "choice":
                shape.tags = tuple(_names(children.pop(0)))
            else:
                shape.refused = frozenset(_names(children.pop(0)))
            for pattern in self._unfolded(children):
                self._take(shape, pattern)
        return self._shapes[name]

    def _unfolded(self, patterns: list[etree._Element]) -> Iterator[etree._Element]:
        """Patterns, with references to attributes replaced by their definitions."""
        for pattern in patterns:
            if _kind(pattern) == "ref" and not self._is_element(pattern):
                yield from self._unfolded(self._defined[str(pattern.get("name"))])
            else:
                yield pattern

    def _is_element(self, ref: etree._Element) -> bool:
        return _kind(self._defined[str(ref.get("name"))][0]) == "element"

    def _take(self, shape: Shape, pattern: etree._Element) -> None:
        kind = _kind(pattern)
        if kind == "attribute":
            self._attribute(shape, pattern, required=True)
        elif kind == "optional" and _kind(pattern[0]) == "attribute":
            self._attribute(shape, pattern[0], required=False)
        elif kind == "zeroOrMore" and _kind(pattern[0]) == "attribute":
            shape.takes_any = True
        elif kind == "choice":
            # An attribute, or else content.
            attribute, content = pattern
            self._attribute(shape, attribute, required=False)
            shape.without_content |= {str(attribute.get("name"))}
            self._take(shape, content)
        elif kind == "empty":
            shape.parts.append(Part())
        else:
            inner = list(pattern) if kind in ("zeroOrMore", "oneOrMore") else [pattern]
            part = Part()
            shape.parts.append(part)
            for each in list(inner[0]) if _kind(inner[0]) == "choice" else inner:
                if _kind(each) == "text":
                    part.text = True
                else:
                    part.shapes.append(self._shape(str(each.get("name"))))

    def _attribute(self, shape: Shape, attribute: etree._Element, *, required: bool) -> None:
        (content,) = self._unfolded(list(attribute))
        values = [str(value.text) for value in content] if _kind(content) == "choice" else []
        shape.attributes[str(attribute.get("name"))] = Attribute(required, tuple(values))


def _kind(pattern: etree._Element) -> str:
    return str(pattern.tag).removeprefix(_NAMESPACE)


def _names(pattern: etree._Element) -> list[str]:
    return [str(name.text) for name in pattern.iter(f"{_NAMESPACE}name")]
