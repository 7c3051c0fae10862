"""The architecture page names files and things in them that there are, and every room."""

from __future__ import annotations

import re

from tests.support.pages import DOCS, ROOT

PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")
FILE = r"`((?:cpucache|tests|scripts|schemas|bench|docs)/[\w./*-]*)`"


def test_every_file_that_it_names_exists() -> None:
    named = set(re.findall(FILE, PAGE))
    assert len(named) > 60
    assert not [name for name in named if not (ROOT / name).exists()]


def test_everything_that_it_places_in_a_file_is_there() -> None:
    placed = re.findall(rf"`([A-Za-z_.]+)`(?: and `([A-Za-z_.]+)`)? in {FILE}", PAGE)
    assert len(placed) > 15
    for *names, file in placed:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in filter(None, names):
            assert all(re.search(rf"\b{part}\b", text) for part in name.split(".")), f"{name} in {file}"


def test_every_room_has_its_line() -> None:
    rooms = {path.parent.name for path in (ROOT / "cpucache").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `cpucache/(\w+)/` \|", PAGE, re.MULTILINE)) == rooms
