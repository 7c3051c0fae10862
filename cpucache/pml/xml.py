"""Reads untrusted XML safely into a small tree of elements and folded text, or raises one ``PMLError``.

PML takes a subset of XML: UTF-8, elements, attributes, text, CDATA and comments. There are no document types, entities,
namespaces or processing instructions, so nothing in a file can make the reader open, fetch or expand anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

from lxml import etree

from cpucache.errors import PMLError
from cpucache.pml.limits import Limits, TooLarge, read_regular
from cpucache.pml.names import clip, hint, quote, tag
from cpucache.pml.problems import Problems
from cpucache.pml.structure import Shape
from cpucache.pml.tree import Text

# Tags that describe the whole document and have no place of their own: like comments, they do not split text. Text
# around them follows them.
SILENT = frozenset({"scaffold"})

_LINES_KEPT = 65_535  # from this line on, libxml2 only guesses the line of a tag from the nodes around it
_SPACE = " \t\r\n"
_XML_SPACE = "{http://www.w3.org/XML/1998/namespace}space"
_DECLARATION = re.compile(r"<\?xml[ \t\r\n][^>]*?\?>")
_ENCODING = re.compile(r"encoding[ \t\r\n]*=[ \t\r\n]*[\"']([^\"']*)")
_BEFORE_ROOT = re.compile(r"(?:[ \t\r\n]+|<!--.*?-->)*", re.DOTALL)

# Start tags, comments and CDATA sections, not those inside one another. What is never closed ends with the document, so
# that each character is looked at once.
_MARKUP = re.compile(r"<!--.*?(?:-->|\Z)|<!\[CDATA\[.*?(?:\]\]>|\Z)|<[^/!?]", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Element:
    """One tag with its attributes (``xml:space`` aside, which is already applied) and its content, text folded."""

    tag: str
    attributes: dict[str, str]
    children: tuple[Element | Text, ...]
    line: int
    problems: Problems

    def report(self, message: str, line: int | None = None) -> None:
        """Reports a mistake in this element, or on ``line`` inside it."""
        self.problems.report(message, self.line if line is None else line)

    def check_attributes(self, shape: Shape) -> bool:
        """Reports unknown attributes, unknown values and missing attributes; false if an attribute is missing."""
        known = shape.known
        for name in self.attributes:
            if name not in known and not shape.takes_any:
                where = f"unknown attribute {quote(name)} on {tag(self.tag)}"
                self.report(where + (hint(name, known) if known else ", which takes none"))
        missing = [name for name in shape.required if name not in self.attributes]
        for name in missing:
            self.report(f'{tag(self.tag)} lacks its attribute {quote(name)}: write <{self.tag} {name}="...">')
        for name, values in shape.listed.items():
            given = self.attributes.get(name)
            if given is not None and given not in values:
                self.report(f"unknown value {quote(given)} for {quote(name)}{hint(given, values)}")
        return not missing

    def has_too_much(self, shape: Shape) -> bool:
        """Whether it has content, where the tag can have none, with these attributes or at all."""
        bare = not shape.without_content.isdisjoint(self.attributes) or not any(
            part.text or part.shapes for part in shape.parts
        )
        return bare and has_content(self)


def is_blank(text: str) -> bool:
    """Whether ``text`` is white space only, as XML counts it."""
    return not text.strip(_SPACE)


def has_content(element: Element) -> bool:
    """Whether ``element`` has content other than white space."""
    return any(not (isinstance(child, Text) and is_blank(child.text)) for child in element.children)


def fold_space(text: str, preserve: bool) -> str:
    """``text`` with the white space at either end folded: a run with a newline to one newline, any other to one space.

    White space inside is kept as written; text of white space only gives ``""``. ``preserve`` keeps everything.
    """
    if preserve:
        return text
    core = text.strip(_SPACE)
    if not core:
        return ""
    start = len(text) - len(text.lstrip(_SPACE))
    return _folded(text[:start]) + core + _folded(text[start + len(core) :])


def _folded(run: str) -> str:
    if "\n" in run:
        return "\n"
    return " " if run else ""


def read_file(path: Path, limits: Limits) -> bytes:
    """Reads a schema or prompt as bytes. Raises ``PMLError`` if it cannot be read or exceeds ``limits``."""
    try:
        return read_regular(path, limits.document)
    except TooLarge as error:
        reason = f"{error.strerror}: put long texts into src files"
    except (OSError, ValueError) as error:
        reason = f"can't be read: {(error.strerror if isinstance(error, OSError) else None) or error}"
    raise PMLError(reason, file=str(path), line=None)


def read_xml(data: str | bytes, *, file: str, root: str, limits: Limits) -> Element:
    """Parse ``data`` into its root element, which must be ``<root>``.

    Raises ``PMLError`` for whatever is no well-formed document of the subset described above, of the size that
    ``limits`` allow. What can be passed over is kept in the element's ``problems``.
    """
    size = len(data if isinstance(data, bytes) else data.encode(errors="surrogatepass"))
    if size > limits.document:
        raise PMLError(f"has more than the maximum of {limits.document:,} bytes", file=file, line=None)
    problems = Problems(file)
    text = _text_of(data, problems).removeprefix("\ufeff")
    line = _check_prolog(text, problems, root)
    if sum(1 for _ in islice(_MARKUP.finditer(text), limits.tags + 1)) > limits.tags:
        problems.stop(f"more than {limits.tags:,} tags and comments: divide it into several documents", line)
    # The encoding given here overrides what the document declares, which has been checked or no longer matters.
    parser = etree.XMLParser(
        encoding="utf-8",
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        dtd_validation=False,
        attribute_defaults=False,
        huge_tree=False,
        recover=False,
    )
    try:
        node = etree.fromstring(text.encode(), parser)
    except etree.XMLSyntaxError as error:
        # Needed only by documents that are not well-formed.
        from cpucache.pml.syntax import explain

        problems.stop(*explain(parser, error, text, file))
    reader = _Reader(problems, line, limits)
    element = reader.element(node, preserve=False, depth=1)
    for after in node.itersiblings():
        if isinstance(after, etree._ProcessingInstruction):
            problems.report(_instruction(str(after.target)), _end_line(after))
    if element.tag != root:
        # In another kind of document, each tag would be reported as unexpected.
        raise PMLError(
            f"expected <{root}> as the outermost tag, found {tag(element.tag)}", file=file, line=element.line
        )
    return element


def _text_of(data: str | bytes, problems: Problems) -> str:
    try:
        if isinstance(data, str):
            data.encode()
            return data
        text = data.decode()
    except UnicodeDecodeError as error:
        reason = f"byte 0x{error.object[error.start]:02x} is not UTF-8: save the file in that encoding"
        problems.stop(reason, error.object.count(b"\n", 0, error.start) + 1)
    except UnicodeEncodeError as error:
        reason = f"U+{ord(error.object[error.start]):04X} is not a character that text can contain: remove it"
        problems.stop(reason, error.object.count("\n", 0, error.start) + 1)
    declaration = _DECLARATION.match(text.removeprefix("\ufeff"))
    declared = _ENCODING.search(declaration.group()) if declaration else None
    if declared and declared.group(1).lower() not in ("utf-8", "utf8", "us-ascii"):
        name = quote(declared.group(1))
        problems.stop(f"the encoding {name} can't be used: save the file as UTF-8 and declare that", 1)
    return text


def _check_prolog(text: str, problems: Problems, root: str) -> int:
    """Rejects content that is not allowed before the root tag, before libxml2 reads it. Returns the root tag's line."""
    declaration = _DECLARATION.match(text)
    before = _BEFORE_ROOT.match(text, declaration.end() if declaration else 0)
    start = before.end() if before else 0
    line = text.count("\n", 0, start) + 1
    rest = text[start : start + 200]
    if not rest:
        problems.stop(f"the document is empty: expected <{root}>", line)
    if rest[:9].upper() == "<!DOCTYPE":
        problems.stop("a DOCTYPE can't be used: remove it (PML has no DTD and no entities)", line)
    if rest.startswith("<?"):
        problems.stop(_instruction(re.split(r"[\s?]", rest[2:], maxsplit=1)[0]), line)
    return line


def _instruction(target: str) -> str:
    if target.lower() == "xml":
        return "the declaration <?xml ...?> is allowed only once, at the very start of the file"
    return f"the processing instruction <?{clip(target)} ...?> can't be used: remove it"


def _end_line(node: etree._Element) -> int | None:
    """Line on which a start tag or processing instruction ends."""
    return cast("int | None", node.sourceline)


def _local(name: str) -> str:
    """Name from lxml, without its namespace."""
    return name.rpartition("}")[2]


class _Reader:
    """Turns lxml's nodes into elements and counts lines.

    libxml2 notes where a start tag *ends* and nothing about text, so lines are counted in the text and comments between
    tags, and set right by every start tag.
    """

    def __init__(self, problems: Problems, line: int, limits: Limits) -> None:
        self._problems = problems
        self._line = line
        self._limits = limits

    def element(self, node: etree._Element, preserve: bool, depth: int) -> Element:
        # A newline written as a character reference counts too many: the end of the tag is the upper bound.
        end = _end_line(node)
        if end is None or end >= _LINES_KEPT:
            end = self._line
        line = min(self._line, end)
        self._line = end
        if depth > self._limits.depth:
            self._problems.stop(f"tags are nested more than {self._limits.depth} deep", line)
        name = str(node.tag)
        if node.nsmap:
            self._problems.stop(f"xmlns on {tag(_local(name))} can't be used: PML has no namespaces", line)
        if len(node.attrib) > self._limits.attributes:
            self._problems.stop(f"{tag(name)} has more than {self._limits.attributes} attributes", line)
        attributes = {str(key): str(value) for key, value in node.attrib.items()}
        space = attributes.pop(_XML_SPACE, None)
        if space not in (None, "preserve", "default"):
            wrong = f"unknown value {quote(space)} for xml:space{hint(space, ('preserve', 'default'))}"
            self._problems.report(wrong, line)
        for prefixed in [key for key in attributes if key.startswith("{")]:
            del attributes[prefixed]
            named = quote(f"xml:{_local(prefixed)}")
            wrong = f"the attribute {named} can't be used: xml:space is the only one with a prefix"
            self._problems.report(wrong, line)
        preserve = preserve if space is None else space == "preserve"
        children = self._children(node, preserve, depth)
        return Element(name, attributes, children, line, self._problems)

    def _children(self, node: etree._Element, preserve: bool, depth: int) -> tuple[Element | Text, ...]:
        children: list[Element | Text] = []
        run = _TextRun()
        self._take(run, node.text)
        for child in node:
            if isinstance(child, etree._Comment):
                self._line += (child.text or "").count("\n")
            elif isinstance(child, etree._ProcessingInstruction):
                self._problems.report(_instruction(str(child.target)), self._line)
                self._line += (child.text or "").count("\n")
            else:
                if child.tag not in SILENT:
                    children += run.finish(preserve)
                    run = _TextRun()
                children.append(self.element(child, preserve, depth + 1))
            self._take(run, child.tail)
        children += run.finish(preserve)
        return tuple(children)

    def _take(self, run: _TextRun, text: str | None) -> None:
        if text:
            run.add(text, self._line)
            self._line += text.count("\n")


class _TextRun:
    """Collects the text between two tags into one text, across comments."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._line: int | None = None
        self._first_line = 0

    def add(self, piece: str, line: int) -> None:
        if not self._pieces:
            self._first_line = line
        self._pieces.append(piece)
        if self._line is None and (core := piece.lstrip(_SPACE)):
            self._line = line + piece.count("\n", 0, len(piece) - len(core))

    def finish(self, preserve: bool) -> list[Text]:
        folded = fold_space("".join(self._pieces), preserve)
        return [Text(folded, self._line or self._first_line)] if folded else []
