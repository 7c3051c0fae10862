"""The architecture page names files and things in them that there are, and every room."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.pages import DOCS, ROOT

PACKAGE = ROOT / "cpucache"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
ELSEWHERE = ("bench", "docs", "gguf_models", "schemas", "scripts", "tests")
"""Folders beside the package."""
FILE = r"`([a-z_]+/(?:[\w.-]+/)*(?:[\w-]+\.\w+)?)`"


def path(name: str) -> Path:
    """A file or folder as the page names it: from the root of the repository, or from that of the package."""
    return ROOT / name if name.startswith(("cpucache/", *(f"{each}/" for each in ELSEWHERE))) else PACKAGE / name


def test_every_file_that_it_names_exists() -> None:
    named = set(re.findall(FILE, PAGE))
    assert len(named) > 70
    assert not [name for name in named if not path(name).exists()]


def test_everything_that_it_names_in_a_file_is_there() -> None:
    found = re.findall(rf"`([A-Za-z_.]+)`(?: and `([A-Za-z_.]+)`)? in {FILE}", PAGE)
    assert len(found) > 20
    for *names, file in found:
        text = path(file).read_text(encoding="utf-8")
        for name in filter(None, names):
            assert all(re.search(rf"\b{part}\b", text) for part in name.split(".")), f"{name} in {file}"


def test_every_room_has_its_line() -> None:
    rooms = {init.parent.name for init in PACKAGE.glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(?:cpucache/)?(\w+)/` \|", PAGE, re.MULTILINE)) == rooms
