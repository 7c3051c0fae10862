"""Reading XML safely: hostile bytes in, a small tree of elements and folded text out, or one ``PMLError``.

PML takes a subset of XML: UTF-8, elements, attributes, text, CDATA and comments. There are no document types, entities,
namespaces or processing instructions, so nothing in a file can make the reader open, fetch or expand anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from lxml import etree

from cpucache.errors import PMLError
from cpucache.pml.names import clip, hint, quote, tag
from cpucache.pml.tree import Text

# Trees are walked by recursion, here and in the layers above: this is far deeper than any real file and far shallower
# than the stack.
MAX_DEPTH = 100
# lxml looks every attribute up by name, which takes time in the square of their number.
MAX_ATTRIBUTES = 1000

# Tags that say something about the whole and stand for nothing where they are: like comments, they do not split text,
# which comes behind them if they stand in the middle of it.
SILENT = frozenset({"scaffold"})

_LINES_KEPT = 65_535  # from this line on, libxml2 only guesses the line of a tag from the nodes around it
_SPACE = " \t\r\n"
_XML_SPACE = "{http://www.w3.org/XML/1998/namespace}space"
_DECLARATION = re.compile(r"<\?xml[ \t\r\n][^>]*?\?>")
_ENCODING = re.compile(r"encoding[ \t\r\n]*=[ \t\r\n]*[\"']([^\"']*)")
_BEFORE_ROOT = re.compile(r"(?:[ \t\r\n]+|<!--.*?-->)*", re.DOTALL)

# How libxml2 puts what people get wrong most often, and how it is said here. All else is passed on in its own words.
_SAID = (
    (
        re.compile(r"Opening and ending tag mismatch: (\S+) line (\d+) and (\S+)"),
        "<{}>, opened on line {}, is not closed before </{}>: a closing tag is missing or misspelt",
    ),
    (
        re.compile(r"Premature end of data in tag (\S+) line (\d+)"),
        "<{0}>, opened on line {1}, is never closed: add </{0}>",
    ),
    (re.compile(r"Couldn't find end of Start Tag (\S+)(?: line (\d+))?"), "the tag <{}> lacks its closing '>'"),
    (
        re.compile(r"Entity '(.+)' not defined"),
        "unknown entity &{};: only &amp; &lt; &gt; &quot; &apos; and character references such as &#233; can be used",
    ),
    (re.compile(r"xmlParseEntityRef: no name|EntityRef: expecting ';'"), "a bare '&' in text is written &amp;"),
    (re.compile(r"Unescaped '<' not allowed in attributes values"), "a '<' inside an attribute is written &lt;"),
    (re.compile(r"Attribute (\S+) redefined"), "the attribute '{}' is given twice"),
    (
        re.compile(r"Namespace prefix (\S+) |Failed to parse QName '(.+)'"),
        "names with a ':' can't be used: PML has no namespaces (xml:space is the only prefixed attribute)",
    ),
    (re.compile("XML_PARSE_HUGE"), "tags nested too deep, or a text or attribute of more than 10 million characters"),
)


@dataclass(frozen=True, eq=False)
class Element:
    """One tag with its attributes (``xml:space`` aside, which is already applied) and its content, text folded."""

    tag: str
    attributes: dict[str, str]
    children: tuple[Element | Text, ...]
    file: str
    line: int

    def error(self, message: str, line: int | None = None) -> PMLError:
        """The error to raise about this element, or about something on ``line`` inside it."""
        return PMLError(message, file=self.file, line=self.line if line is None else line)

    def check_attributes(self, required: tuple[str, ...] = (), optional: tuple[str, ...] | None = ()) -> None:
        """Raise ``PMLError`` for an attribute that this tag can't have, or one that is missing.

        ``optional=None``: beyond the required ones, it can have any.
        """
        known = (*required, *(optional or ()))
        for name in self.attributes:
            if optional is not None and name not in known:
                where = f"unknown attribute {quote(name)} on {tag(self.tag)}"
                raise self.error(where + (hint(name, known) if known else ", which takes none"))
        for name in required:
            if name not in self.attributes:
                raise self.error(f'{tag(self.tag)} lacks its attribute {quote(name)}: write <{self.tag} {name}="...">')


def is_blank(text: str) -> bool:
    """Whether ``text`` is white space only, as XML counts it."""
    return not text.strip(_SPACE)


def has_content(element: Element) -> bool:
    """Whether there is anything in ``element`` but white space."""
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


def read_file(path: Path) -> bytes:
    """The bytes of a schema or prompt; ``PMLError`` if it can't be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PMLError(f"can't be read: {reason}", file=str(path), line=None) from None


def read_xml(data: str | bytes, *, file: str, root: str) -> Element:
    """Parse ``data`` into its root element, which must be ``<root>``.

    Raises ``PMLError`` for whatever is not a well-formed document of the subset described above.
    """
    text = _text_of(data, file).removeprefix("\ufeff")
    line = _check_prolog(text, file, root)
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
        # Later entries only follow from the first.
        first = parser.error_log[0] if len(parser.error_log) else None
        message, at = (first.message, first.line) if first is not None else (error.msg, error.lineno)
        raise PMLError(_said(message), file=file, line=at) from None
    reader = _Reader(file, line)
    element = reader.element(node, preserve=False, depth=1)
    for after in node.itersiblings():
        if isinstance(after, etree._ProcessingInstruction):
            raise PMLError(_instruction(str(after.target)), file=file, line=_end_line(after))
    if element.tag != root:
        raise element.error(f"expected <{root}> as the outermost tag, found {tag(element.tag)}")
    return element


def _text_of(data: str | bytes, file: str) -> str:
    try:
        if isinstance(data, str):
            data.encode()
            return data
        text = data.decode()
    except UnicodeDecodeError as error:
        reason = f"byte 0x{error.object[error.start]:02x} is not UTF-8: save the file in that encoding"
        raise PMLError(reason, file=file, line=error.object.count(b"\n", 0, error.start) + 1) from None
    except UnicodeEncodeError as error:
        reason = f"U+{ord(error.object[error.start]):04X} is not a character that text can hold"
        raise PMLError(reason, file=file, line=error.object.count("\n", 0, error.start) + 1) from None
    declaration = _DECLARATION.match(text.removeprefix("\ufeff"))
    declared = _ENCODING.search(declaration.group()) if declaration else None
    if declared and declared.group(1).lower() not in ("utf-8", "utf8", "us-ascii"):
        name = quote(declared.group(1))
        raise PMLError(f"the encoding {name} can't be used: save the file as UTF-8 and declare that", file=file, line=1)
    return text


def _check_prolog(text: str, file: str, root: str) -> int:
    """Reject what may not stand before the root tag before libxml2 sees it. Returns the line of the root tag."""
    declaration = _DECLARATION.match(text)
    before = _BEFORE_ROOT.match(text, declaration.end() if declaration else 0)
    start = before.end() if before else 0
    line = text.count("\n", 0, start) + 1
    rest = text[start : start + 200]
    if not rest:
        raise PMLError(f"nothing here: expected <{root}>", file=file, line=line)
    if rest[:9].upper() == "<!DOCTYPE":
        raise PMLError("a DOCTYPE can't be used: remove it (PML has no DTD and no entities)", file=file, line=line)
    if rest.startswith("<?"):
        raise PMLError(_instruction(re.split(r"[\s?]", rest[2:], maxsplit=1)[0]), file=file, line=line)
    return line


def _instruction(target: str) -> str:
    if target.lower() == "xml":
        return "the declaration <?xml ...?> can stand only once, at the very start of the file"
    return f"the processing instruction <?{clip(target)} ...?> can't be used: remove it"


def _said(message: str) -> str:
    for pattern, said in _SAID:
        if found := pattern.search(message):
            return said.format(*(clip(group or "") for group in found.groups()))
    return f"not well-formed XML: {clip(message.strip())}"


def _end_line(node: etree._Element) -> int | None:
    """The line where a start tag, or a processing instruction, ends."""
    return cast("int | None", node.sourceline)


def _local(name: str) -> str:
    """A name as lxml gives it, without its namespace."""
    return name.rpartition("}")[2]


class _Reader:
    """Turns lxml's nodes into elements, keeping count of the line it has come to.

    libxml2 notes where a start tag *ends* and nothing about text, so lines are counted in the text and comments between
    tags, and set right by every start tag.
    """

    def __init__(self, file: str, line: int) -> None:
        self._file = file
        self._line = line

    def element(self, node: etree._Element, preserve: bool, depth: int) -> Element:
        # A newline written as a character reference counts too many: the end of the tag is the upper bound.
        end = _end_line(node)
        if end is None or end >= _LINES_KEPT:
            end = self._line
        line = min(self._line, end)
        self._line = end
        if depth > MAX_DEPTH:
            raise self._error(f"tags are nested more than {MAX_DEPTH} deep", line)
        name = str(node.tag)
        if node.nsmap:
            raise self._error(f"xmlns on {tag(_local(name))} can't be used: PML has no namespaces", line)
        if len(node.attrib) > MAX_ATTRIBUTES:
            raise self._error(f"{tag(name)} has more than {MAX_ATTRIBUTES} attributes", line)
        attributes = {str(key): str(value) for key, value in node.attrib.items()}
        space = attributes.pop(_XML_SPACE, None)
        if space not in (None, "preserve", "default"):
            raise self._error(f"unknown value {quote(space)} for xml:space{hint(space, ('preserve', 'default'))}", line)
        if prefixed := next((key for key in attributes if key.startswith("{")), None):
            named = quote(f"xml:{_local(prefixed)}")
            raise self._error(f"the attribute {named} can't be used: xml:space is the only one with a prefix", line)
        preserve = preserve if space is None else space == "preserve"
        children = self._children(node, preserve, depth)
        return Element(name, attributes, children, self._file, line)

    def _children(self, node: etree._Element, preserve: bool, depth: int) -> tuple[Element | Text, ...]:
        children: list[Element | Text] = []
        run = _TextRun()
        self._take(run, node.text)
        for child in node:
            if isinstance(child, etree._Comment):
                self._line += (child.text or "").count("\n")
            elif isinstance(child, etree._ProcessingInstruction):
                raise self._error(_instruction(str(child.target)), self._line)
            else:
                if child.tag not in SILENT:
                    children += run.finish(preserve)
                    run = _TextRun()
                children.append(self.element(child, preserve, depth + 1))
            self._take(run, child.tail)
        children += run.finish(preserve)
        return tuple(children)

    def _error(self, message: str, line: int) -> PMLError:
        return PMLError(message, file=self._file, line=line)

    def _take(self, run: _TextRun, text: str | None) -> None:
        if text:
            run.add(text, self._line)
            self._line += text.count("\n")


class _TextRun:
    """The pieces of text between two tags: one text, however many comments interrupt it."""

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
