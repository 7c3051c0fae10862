"""Form of names, and their text in error messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from itertools import islice

#: Every tag of PML. A module's name is itself a tag in prompts, so none of these can name a module.
PML_TAGS = ("schema", "module", "union", "parameter", "prompt", "scaffold", "system", "user", "assistant")

# The letters that XML 1.0 allows at the start of a name, ASCII aside: whatever passes here can be written as a tag.
_LETTERS = (
    "\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02ff\u0370-\u037d\u037f-\u1fff\u2c00-\u2fef"
    "\u3001-\ud7ff\uf900-\ufdcf\ufdf0-\ufffd\U00010000-\U000effff"
)
_ANY = re.compile(f"[A-Za-z0-9_.{_LETTERS}\u0300-\u036f-]+")
_START = re.compile(f"[A-Za-z_{_LETTERS}]")

_SHOWN = 60  # characters of a name or value that a message repeats
_LISTED = 8  # valid names that a message lists
LONGEST = 100  # characters of a name
# Valid names among which the nearest is sought, and pairs of characters compared for it: to compare with all of a
# million names takes a minute.
_COMPARED = 2_000
_PAIRS = 1_000_000


def clip(text: str) -> str:
    """``text`` short enough, and safe enough, for one line of an error message."""
    line = "".join(char if char.isprintable() else " " for char in text[: _SHOWN + 1])
    return line if len(text) <= _SHOWN else line[:_SHOWN] + "..."


def quote(name: str) -> str:
    """``name`` as messages show names and values."""
    return f"'{clip(name)}'"


def tag(name: str) -> str:
    """``name`` as messages show tags."""
    return f"<{clip(name)}>"


def hint(wrong: str, valid: Iterable[str], show: Callable[[str], str] = quote) -> str:
    """Returns the end of a message that rejects ``wrong``: the nearest ``valid`` names, and all if they are few."""
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
    """Why ``name`` can't be used, or None. ``as_tag``/``as_attribute``: prompts will write it as one."""
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
