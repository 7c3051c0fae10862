"""Canonical PML: writes a document in one standard layout.

Tags are indented by their depth, attributes are in the order of the grammar. White space changes only at the ends of
texts, where only its kind matters (``xml.fold_space``). Comments, references and CDATA sections stay as written.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from cpucache.errors import CpucacheError
from cpucache.pml.limits import Limits
from cpucache.pml.prompt import parse_prompt
from cpucache.pml.schema import parse_schema
from cpucache.pml.structure import Root, Shape, structure
from cpucache.pml.tree import Prompt, Schema
from cpucache.pml.xml import SILENT, is_blank

_INDENT = "  "
_INLINE = frozenset({"parameter"})
"""Tags in the middle of a text."""
_COLUMNS = 120
_SPACE = " \t\n"
_BEFORE = re.compile(r"\ufeff?(?:[ \t\r\n]+|<\?.*?\?>|<!--.*?-->)*", re.DOTALL)
_ROOT = re.compile(r"<(schema|prompt)(?![^\s/>])")
_DECLARATION = re.compile(r"\ufeff?(?:<\?xml[ \t\n][^>]*?\?>)?")
_TOKEN = re.compile(
    r"""(?P<comment><!--.*?-->) | (?P<cdata><!\[CDATA\[.*?\]\]>) | </(?P<end>[^>\s]+)\s*>
    | <(?P<start>[^\s/>!?]+)(?P<attributes>(?:[^>"']|"[^"]*"|'[^']*')*?)(?P<empty>/?)> | (?P<text>[^<]+)""",
    re.DOTALL | re.VERBOSE,
)
_ATTRIBUTE = re.compile(r"""([^\s=]+)\s*=\s*(?:"([^"]*)"|'([^']*)')""")
_REFERENCE = re.compile(r"&#(?:x0*(?:9|a|d|20)|0*(?:9|10|13|32));", re.IGNORECASE)


def root_of(text: str) -> Root | None:
    """Kind of document, by its first tag: schema or prompt; ``None`` if neither."""
    start = _BEFORE.match(text)
    found = _ROOT.match(text, start.end() if start else 0)
    return None if found is None else "schema" if found.group(1) == "schema" else "prompt"


def parse_pml(
    data: str | bytes, *, file: str, folder: Path | None = None, limits: Limits | None = None
) -> Schema | Prompt:
    """Parses the schema or prompt in ``data``. Raises ``PMLError`` as their parsers do."""
    text = data if isinstance(data, str) else data.decode(errors="replace")
    if root_of(text) == "prompt":
        return parse_prompt(data, file=file, limits=limits)
    return parse_schema(data, file=file, folder=folder, limits=limits)


def canonical(data: str | bytes, *, file: str, folder: Path | None = None, limits: Limits | None = None) -> str:
    """A schema or prompt in canonical form, which is parsed into the same tree.

    Args:
        data: The document.
        file: What errors call it.
        folder: The folder of the ``src`` files of a schema.
        limits: How large it may be.

    Raises ``PMLError`` for a document that breaks the rules of PML.
    """
    before = parse_pml(data, file=file, folder=folder, limits=limits)
    text = data if isinstance(data, str) else data.decode()
    written = laid_out(text, "schema" if isinstance(before, Schema) else "prompt")
    after = parse_pml(written, file=file, folder=folder)
    if meaning(before) != meaning(after):
        raise CpucacheError(f"{file}: its canonical form would be another document, so the file is left unchanged")
    return written


def laid_out(text: str, root: Root) -> str:
    """Writes a document, which must be valid, in canonical form."""
    return _Writer(root).document(text)


def meaning(tree: Any) -> Any:
    """A tree as plain values that can be compared, without files and lines."""
    if dataclasses.is_dataclass(tree):
        fields = (each.name for each in dataclasses.fields(tree) if each.name not in ("line", "file"))
        return (type(tree).__name__, *(meaning(getattr(tree, name)) for name in fields))
    if isinstance(tree, tuple):
        return tuple(meaning(each) for each in tree)
    return tree


# ---- the document as it is written -----------------------------------------------------------------------------------
@dataclass
class _Piece:
    """Text, a comment or a CDATA section, as it is written."""

    kind: Literal["text", "comment", "cdata"]
    raw: str


@dataclass
class _Tag:
    name: str
    attributes: dict[str, str] = field(default_factory=dict)
    inside: list[_Piece | _Tag] = field(default_factory=list)


def _read(text: str) -> _Tag:
    """A well-formed document as a tag without a name around it."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start = _DECLARATION.match(text)
    around = _Tag("")
    path = [around]
    for token in _TOKEN.finditer(text, start.end() if start else 0):
        if token["start"]:
            found = _ATTRIBUTE.findall(token["attributes"])
            tag = _Tag(token["start"], {name: double or single for name, double, single in found})
            path[-1].inside.append(tag)
            if not token["empty"]:
                path.append(tag)
        elif token["end"]:
            path.pop()
        else:
            kind: Literal["text", "comment", "cdata"] = (
                "comment" if token["comment"] else "cdata" if token["cdata"] else "text"
            )
            path[-1].inside.append(_Piece(kind, token.group()))
    return around


# ---- and as it is written in canonical form --------------------------------------------------------------------------
@cache
def _orders(root: Root) -> dict[str, list[str]]:
    """Attributes of each tag, in canonical order."""
    orders: dict[str, list[str]] = {}
    seen: set[Shape] = set()

    def walk(shape: Shape) -> None:
        if shape not in seen:
            seen.add(shape)
            orders.update(dict.fromkeys(shape.tags, sorted(shape.attributes, key="xml:space".__eq__)))
            for part in shape.parts:
                for inner in part.shapes:
                    walk(inner)

    walk(structure(root))
    return orders


class _Writer:
    def __init__(self, root: Root) -> None:
        self._orders = _orders(root)
        self._inline = _INLINE if root == "schema" else frozenset()
        self._silent = SILENT if root == "schema" else frozenset()
        # A reference, such as one to a member of a union, may be on the line of the module around it.
        self._close = root == "prompt"

    def document(self, text: str) -> str:
        """A whole document in canonical form."""
        return self._content(_read(text), -1, preserve=False).strip("\n") + "\n"

    def _tag(self, tag: _Tag, depth: int, *, preserve: bool) -> str:
        """A tag with what is inside."""
        space = tag.attributes.get("xml:space")
        preserve = preserve if space is None else space == "preserve"
        attributes = list(map(self._attribute, *self._sorted(tag)))
        inside = self._content(tag, depth, preserve=preserve)
        gap = " "
        if len(_INDENT * depth + " ".join((f"<{tag.name}", *attributes))) > _COLUMNS and tag.name not in self._inline:
            gap = "\n" + _INDENT * (depth + 1)
        start = gap.join((f"<{tag.name}", *attributes))
        return f"{start}>{inside}</{tag.name}>" if inside else f"{start}/>"

    def _sorted(self, tag: _Tag) -> tuple[list[str], list[str]]:
        order = self._orders.get(tag.name, [])
        others = [name for name in tag.attributes if name not in order and name != "xml:space"]
        known = [name for name in order if name in tag.attributes and name != "xml:space"]
        names = [*known, *others, *(["xml:space"] if "xml:space" in tag.attributes else [])]
        return names, [tag.attributes[name] for name in names]

    @staticmethod
    def _attribute(name: str, raw: str) -> str:
        quote = "'" if '"' in raw else '"'
        return f"{name}={quote}{raw.translate(dict.fromkeys(map(ord, _SPACE), ' '))}{quote}"

    def _content(self, parent: _Tag, depth: int, *, preserve: bool) -> str:
        """Writes the content of a tag that is nested ``depth`` levels deep."""
        if preserve:
            return "".join(self._item(item, depth + 1, preserve=True) for item in parent.inside)
        runs = list(self._runs(parent.inside))
        if all(_is_nothing(run) for run, _ in runs):
            tags = [tag for _, tag in runs if tag is not None]
            if not tags:
                return ""
            if self._close and depth > 0 and len(parent.inside) == 1 and not tags[0].inside:
                return self._tag(tags[0], depth + 1, preserve=False)
        written: list[str] = []
        before: _Tag | None = None
        for run, tag in runs:
            write = self._gap if _is_blank(run) else self._run
            written.append(write(run, before, tag, depth))
            if tag is not None:
                written.append(self._tag(tag, depth + 1, preserve=False))
            before = tag
        return "".join(written)

    def _runs(self, items: list[_Piece | _Tag]) -> Iterator[tuple[list[_Piece | _Tag], _Tag | None]]:
        """Items before each tag that divides texts, with that tag; then the items after the last such tag."""
        run: list[_Piece | _Tag] = []
        for item in items:
            if isinstance(item, _Tag) and item.name not in self._silent:
                yield run, item
                run = []
            else:
                run.append(item)
        yield run, None

    def _item(self, item: _Piece | _Tag, depth: int, *, preserve: bool) -> str:
        return item.raw if isinstance(item, _Piece) else self._tag(item, depth, preserve=preserve)

    def _gap(self, run: list[_Piece | _Tag], before: _Tag | None, tag: _Tag | None, depth: int) -> str:
        """White space and comments between two tags: no text, so that any white space will do."""
        beside = [each for each in (before, tag) if each is not None and each.name in self._inline]
        if not run and beside:
            return ""
        written, space = "", ""
        first = before is None
        for item in run:
            if isinstance(item, _Piece) and item.kind != "comment":
                space += item.raw if item.kind == "text" else ""
                continue
            same_line = isinstance(item, _Piece) and space and "\n" not in space and not (first and not written)
            written += " " if same_line else self._break(space, depth + 1, first=first and not written)
            written += self._item(item, depth + 1, preserve=False)
            space = ""
        last = self._break(space, depth + (tag is not None), first=tag is None or (first and not written))
        return written + last

    def _run(self, run: list[_Piece | _Tag], before: _Tag | None, tag: _Tag | None, depth: int) -> str:
        """A text, with the comments in it."""
        items = list(run)
        # White space at the ends, divided by comments: what else there is stays as it is written.
        head, items = _edge(items)
        tail, items = _edge(items[::-1], backward=True)
        items.reverse()
        core = "".join(self._item(item, depth + 1, preserve=False) for item in items)
        written = ""
        for index, (space, item) in enumerate(head):
            first = before is None and not index
            if item is not None:
                written += self._space(space, depth + 1, first=first) + self._item(item, depth + 1, preserve=False)
            else:
                written += self._before_text(space, first=first)
        written += core
        for left, (space, item) in zip(reversed(range(len(tail))), reversed(tail), strict=True):
            if item is not None:
                written += self._item(item, depth + 1, preserve=False)
            if left:
                written += self._space(space, depth + 1)
            elif tag is not None and tag.name in self._inline:
                written += self._before_text(space)
            else:
                written += self._space(space, depth + (tag is not None), first=tag is None)
        return written

    def _space(self, space: str, depth: int, *, first: bool = False) -> str:
        """White space of the same kind: a line break and the indent of ``depth``, a space, or nothing."""
        return self._break(space, depth, first=first) if "\n" in space else " " if space else ""

    def _before_text(self, space: str, *, first: bool = False) -> str:
        """The same before text, which keeps its indentation relative to its other lines."""
        return self._space(space, 0, first=first) + (space.rpartition("\n")[2] if "\n" in space else "")

    @staticmethod
    def _break(space: str, depth: int, *, first: bool = False) -> str:
        """A line break, and an empty line where there was one, unless it is the first or last inside a tag."""
        return ("\n" if first or space.count("\n") < 2 else "\n\n") + _INDENT * depth


def _is_blank(run: list[_Piece | _Tag]) -> bool:
    """Whether a run holds no text for the parser."""
    for item in run:
        if isinstance(item, _Piece) and item.kind != "comment":
            raw = item.raw[len("<![CDATA[") : -len("]]>")] if item.kind == "cdata" else _REFERENCE.sub(" ", item.raw)
            if not is_blank(raw):
                return False
    return True


def _is_nothing(run: list[_Piece | _Tag]) -> bool:
    """Whether a run holds neither text nor tags nor comments."""
    return _is_blank(run) and not any(isinstance(item, _Tag) or item.kind == "comment" for item in run)


def _edge(
    items: list[_Piece | _Tag], *, backward: bool = False
) -> tuple[list[tuple[str, _Piece | _Tag | None]], list[_Piece | _Tag]]:
    """The white space before a text, up to each comment in it and up to the text (``None``), and what is left.

    ``backward``: the items are in reverse order, and the white space is after the text.
    """
    found: list[tuple[str, _Piece | _Tag | None]] = []
    space = ""
    for index, item in enumerate(items):
        if isinstance(item, _Piece) and item.kind == "text":
            rest = item.raw.rstrip(_SPACE) if backward else item.raw.lstrip(_SPACE)
            cut = len(item.raw) - len(rest)
            more = item.raw[len(rest) :] if backward else item.raw[:cut]
            space = more + space if backward else space + more
            if rest:
                found.append((space, None))
                return found, [_Piece("text", rest), *items[index + 1 :]]
        elif isinstance(item, _Piece) and item.kind == "cdata":
            found.append((space, None))
            return found, items[index:]
        else:
            found.append((space, item))
            space = ""
    return found, []
