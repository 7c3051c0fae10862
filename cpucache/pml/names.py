"""Rules for names, and the form of names in error messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from itertools import islice

#: Every tag of PML. A module's name is itself a tag in prompts, so none of these can name a module.
PML_TAGS = ("schema", "module", "union", "parameter", "prompt", "scaffold", "system", "user", "assistant")

# Non-ASCII letters that XML 1.0 allows at the start of a name, so that every accepted name can be a tag.
_LETTERS = (
    "\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02ff\u0370-\u037d\u037f-\u1fff\u2c00-\u2fef"
    "\u3001-\ud7ff\uf900-\ufdcf\ufdf0-\ufffd\U00010000-\U000effff"
)
_ANY = re.compile(f"[A-Za-z0-9_.{_LETTERS}\u0300-\u036f-]+")
_START = re.compile(f"[A-Za-z_{_LETTERS}]")

_SHOWN = 60  # maximum length of a name or value in a message, in characters
_LISTED = 8  # maximum number of valid names in a message
LONGEST = 100  # maximum length of a name, in characters
# Limits of the search for the nearest name: valid names, and pairs of characters compared. Comparing a million names
# takes a minute.
_COMPARED = 2_000
_PAIRS = 1_000_000


def clip(text: str) -> str:
    """``text`` shortened to one line of an error message, without unprintable characters."""
    line = "".join(char if char.isprintable() else " " for char in text[: _SHOWN + 1])
    return line if len(text) <= _SHOWN else line[:_SHOWN] + "..."


def quote(name: str) -> str:
    """``name`` in the form of names and values in error messages."""
    return f"'{clip(name)}'"


def tag(name: str) -> str:
    """``name`` in the form of tags in error messages."""
    return f"<{clip(name)}>"


def hint(wrong: str, valid: Iterable[str], show: Callable[[str], str] = quote) -> str:
    """Hint for a message that rejects ``wrong``: the nearest of the ``valid`` names, and all of them if few."""
    names = list(islice(valid, _COMPARED + 1))
    if not names:
        return " (none is defined here)"
    near = [name for name in names[:_COMPARED] if len(name) <= 2 * len(wrong) + 2] if len(wrong) <= LONGEST else []
    by_key = {name.casefold(): name for name in near[: _PAIRS // (len(wrong) + 1) ** 2]}
    close = difflib.get_close_matches(wrong.casefold(), by_key, n=1)
    said = f"; did you mean {show(by_key[close[0]])}?" if close else ""
    if close and not 1 < len(names) <= _LISTED:
        return said
    left = f"{len(names) - _LISTED:,}" if len(names) <= _COMPARED else "many"
    more = f" and {left} more" if len(names) > _LISTED else ""
    return f"{said} (valid here: {', '.join(show(name) for name in names[:_LISTED])}{more})"


def flaw(name: str, *, as_tag: bool = False, as_attribute: bool = False) -> str | None:
    """Reason why ``name`` is not valid, or ``None``. ``as_tag``/``as_attribute``: prompts write it as such."""
    if not _ANY.fullmatch(name):
        return "a name is made of letters, digits, '_', '-' and '.'"
    if len(name) > LONGEST:
        return f"a name has at most {LONGEST} characters"
    if not (as_tag or as_attribute):
        return None
    if not _START.match(name):
        return "it must start with a letter or '_'"
    if name.lower().startswith("xml"):
        return "names that start with 'xml' are reserved by XML"
    if as_tag and name in PML_TAGS:
        return f"{tag(name)} is a tag of PML itself"
    return None
