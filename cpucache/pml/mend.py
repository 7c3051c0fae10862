"""Repairs documents that are not well-formed XML: escapes ``<`` and ``&`` in text."""

from __future__ import annotations

import difflib
import html.entities
import re
from dataclasses import dataclass
from functools import lru_cache

from cpucache.pml.names import PML_TAGS
from cpucache.pml.tree import ROLES

_NAME = r"[A-Za-z_:\u0080-\U0010ffff][\w:.-]*"
_VALUE = r"(?:\"[^\"]*\"|'[^']*')"
_PIECE = re.compile(
    # A comment or CDATA section that is not closed extends to the end, so that each character is matched once.
    rf"""(?P<kept><!--.*?(?:-->|\Z) | <!\[CDATA\[.*?(?:\]\]>|\Z) | <!DOCTYPE[^<>]*>? | <\?{_NAME}[^<]*\?>)
    | </(?P<end>{_NAME})\s*>
    | <(?P<start>{_NAME})(?:\s+{_NAME}\s*=\s*{_VALUE})*\s*(?P<empty>/?)>
    | <
    | [^<]+""",
    re.DOTALL | re.VERBOSE,
)
_REFERENCE = r"(?:amp|lt|gt|quot|apos|\#[0-9]+|\#x[0-9A-Fa-f]+);"
_BARE = re.compile(rf"&(?!{_REFERENCE})(?:([A-Za-z][A-Za-z0-9]*);)?")
_LIKE = 0.7  # minimum similarity of a misspelt tag to a PML tag


@dataclass
class _Tag:
    """An open tag. ``place`` is the index of its piece."""

    name: str
    place: int
    is_pml: bool


class _Open:
    """Open tags from the outermost to the innermost. Every operation takes constant time for each tag, on average."""

    def __init__(self) -> None:
        self.tags: list[_Tag] = []
        self._named: dict[str, list[int]] = {}  # indices of the tags of each name
        self._pml: list[int] = []  # indices of the PML tags

    @property
    def root(self) -> str:
        """Name of the outermost tag; empty if no tag is open."""
        return self.tags[0].name if self.tags else ""

    def add(self, tag: _Tag) -> None:
        """Opens a tag inside all others."""
        self._named.setdefault(tag.name, []).append(len(self.tags))
        if tag.is_pml:
            self._pml.append(len(self.tags))
        self.tags.append(tag)

    def close(self, name: str) -> list[_Tag] | None:
        """Closes the innermost tag of a name, and returns the tags inside it; ``None`` if there is no such tag.

        A tag unknown to PML closes none outside the innermost PML tag.
        """
        named = self._named.get(name)
        at = named[-1] if named else -1
        if at < 0 or (self._pml and self._pml[-1] > at and not _is_pml(name)):
            return None
        inside = self.tags[at + 1 :]
        while len(self.tags) > at:
            self._named[self.tags.pop().name].pop()
        while self._pml and self._pml[-1] >= at:
            self._pml.pop()
        return inside


def mend(text: str) -> str:
    """Escapes each ``<`` and ``&`` of a document that can only be meant as a character.

    These are: a ``<`` that begins no tag; a tag unknown to PML without its counterpart (never closed or never opened),
    such as ``<stdio.h>``; and any tag inside a turn of a prompt. HTML entities become character references. All else
    is unchanged; the parser reports other mistakes.
    """
    pieces = list(_PIECE.finditer(text))
    stray = _stray(pieces)
    return "".join(_mended(piece, index in stray) for index, piece in enumerate(pieces))


def _mended(piece: re.Match[str], stray: bool) -> str:
    written = piece.group()
    if piece["kept"]:
        return written
    if piece["start"] and not stray:
        tag, space, rest = written.partition(piece["start"])
        return tag + space + _BARE.sub(_character, rest.replace("<", "&lt;"))
    written = _BARE.sub(_character, written)
    if stray:
        written = "&lt;" + written[1:].replace("<", "&lt;")
    return written if piece["start"] or piece["end"] else written.replace("]]>", "]]&gt;")


def _character(bare: re.Match[str]) -> str:
    """Escaped form of a ``&``, or of the HTML entity that it begins."""
    known = html.entities.html5.get(f"{bare[1]};") if bare[1] else None
    return "".join(f"&#{ord(char)};" for char in known) if known else f"&amp;{bare.group()[1:]}"


def _stray(pieces: list[re.Match[str]]) -> set[int]:
    """Indices of the pieces whose ``<`` is meant as a character."""
    stray: set[int] = set()
    open_ = _Open()
    turn = ""
    for index, piece in enumerate(pieces):
        start, end = piece["start"], piece["end"]
        is_prompt = open_.root == "prompt"
        if turn:
            if end == turn:
                turn = ""
            elif piece.group().startswith("<") and not piece["kept"]:
                stray.add(index)
        elif start and is_prompt and len(open_.tags) == 1 and start in ROLES:
            turn = "" if piece["empty"] else start
        elif start and not piece["empty"]:
            open_.add(_Tag(start, index, is_prompt or _is_pml(start)))
        elif end:
            inside = open_.close(end)
            if inside is not None:
                stray.update(tag.place for tag in inside if not tag.is_pml)
            elif not _is_pml(end) and open_.root not in ("", "prompt"):
                stray.add(index)
        elif piece.group() == "<":
            stray.add(index)
    stray.update(tag.place for tag in open_.tags if not tag.is_pml)
    return stray


@lru_cache(256)
def _is_pml(name: str) -> bool:
    """Whether a tag of a schema is a PML tag or a misspelt one."""
    return bool(difflib.get_close_matches(name.casefold(), PML_TAGS, n=1, cutoff=_LIKE))
