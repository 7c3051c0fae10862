"""Errors of text that is not well-formed XML: translates libxml2's messages into PML's terms, with line and column."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from lxml import etree

from cpucache.pml.mend import mend
from cpucache.pml.names import clip

_BEFORE, _AFTER = 20, 30  # characters that are shown around what is wrong
_TRIED = 1 << 18  # characters of a document that is mended on trial, to say whether that helps
_BACK = 500  # characters between the place where libxml2 gives up and what is wrong


@dataclass(frozen=True)
class _Saying:
    """Message for an error of libxml2. ``mark``: the character in the text that the error is about.

    ``stray``: it comes of a character that ``mend`` writes as XML has it.
    """

    pattern: re.Pattern[str]
    said: str
    mark: str = ""
    stray: bool = False


_LESS = "a '<' in text is written &lt;"

# What people get wrong most often. All else is passed on in libxml2's own words.
_SAYINGS = (
    _Saying(
        re.compile(r"Opening and ending tag mismatch: (\S+) line (\d+) and (\S+)"),
        "<{}>, opened on line {}, is not closed before </{}>: a closing tag is missing or misspelt",
    ),
    _Saying(
        re.compile(r"Premature end of data in tag (\S+) line (\d+)"),
        "<{0}>, opened on line {1}, is never closed: add </{0}>",
    ),
    _Saying(re.compile(r"StartTag: invalid element name"), f"no tag begins like this: {_LESS}", "<", stray=True),
    _Saying(
        re.compile(r"Specification mandates value for attribute (\S+)"),
        f"the attribute '{{0}}' lacks its value, as in {{0}}=\"...\" ({_LESS})",
        "<",
        stray=True,
    ),
    _Saying(
        re.compile(r"error parsing attribute name"), f"an attribute can't have such a name ({_LESS})", "<", stray=True
    ),
    _Saying(re.compile(r"AttValue: \" or ' expected"), "the value of an attribute is written in quotes", "="),
    _Saying(re.compile(r"Couldn't find end of Start Tag (\S+)(?: line (\d+))?"), "the tag <{}> lacks its closing '>'"),
    _Saying(
        re.compile(r"Entity '(.+)' not defined"),
        "unknown entity &{};: only &amp; &lt; &gt; &quot; &apos; and character references such as &#233; can be used",
        stray=True,
    ),
    _Saying(
        re.compile(r"xmlParseEntityRef: no name|EntityRef: expecting ';'"),
        "a bare '&' in text is written &amp;",
        "&",
        stray=True,
    ),
    _Saying(
        re.compile(r"Unescaped '<' not allowed in attributes values"),
        "a '<' inside an attribute is written &lt;",
        stray=True,
    ),
    _Saying(
        re.compile(r"Sequence '\]\]>' not allowed in content"),
        "not well-formed XML: a ']]>' in text is written ]]&gt;",
        stray=True,
    ),
    _Saying(re.compile(r"Attribute (\S+) redefined"), "the attribute '{}' is given twice"),
    _Saying(
        re.compile(r"Namespace prefix (\S+) |Failed to parse QName '(.+)'"),
        "names with a ':' can't be used: PML has no namespaces (xml:space is the only prefixed attribute)",
    ),
    _Saying(
        re.compile("XML_PARSE_HUGE"), "tags nested too deep, or a text or attribute of more than 10 million characters"
    ),
)


def explain(parser: etree.XMLParser, error: etree.XMLSyntaxError, text: str, file: str) -> tuple[str, int, int | None]:
    """Message, line and column of the first mistake in the ``text`` of ``file``."""
    # Later entries are consequences of the first. The exception's own log also holds entries of earlier documents.
    first = parser.error_log[0] if len(parser.error_log) else None
    message, line, column = (first.message, first.line, first.column) if first else (error.msg, error.lineno, 0)
    for saying in _SAYINGS:
        if found := saying.pattern.search(message):
            said = saying.said.format(*(clip(group or "") for group in found.groups()))
            if found_at := _find(text, line, column, saying.mark) if saying.mark else None:
                excerpt, line, column = found_at
                said = f"{said}, here in '{excerpt}'"
            if saying.stray or (not saying.mark and len(text) <= _TRIED and mend(text) != text):
                said = f"{said}; `cpucache schema fmt --fix {_named(file)}` fixes it"
            return said, line, column or None
    return f"not well-formed XML: {clip(message.strip())}", line, column or None


def _named(file: str) -> str:
    """Name of the file, quoted for a shell; ``FILE`` if it is not a file."""
    return "FILE" if file.startswith("<") or clip(file) != file else shlex.quote(file)


def _find(text: str, line: int, column: int, mark: str) -> tuple[str, int, int] | None:
    """The last ``mark`` before a place: the text around it, and its own line and column."""
    lines = text.split("\n", line - 1)
    place = len(text) - len(lines[-1]) + column - 1
    at = text.rfind(mark, max(0, place - _BACK), place) if len(lines) == line else -1
    if at < 0:
        return None
    start = text.rfind("\n", 0, at) + 1
    excerpt = clip(text[max(start, at - _BEFORE) : at + _AFTER].partition("\n")[0].strip())
    return excerpt, line - text.count("\n", at, place), at - start + 1
