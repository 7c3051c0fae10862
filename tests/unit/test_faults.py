"""docs/faults.md names tests that there are."""

from __future__ import annotations

import re
from pathlib import Path

_TESTS = Path(__file__).parents[1]
_ROWS = (_TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8").split("|---|---|---|\n")[1].splitlines()


def test_every_test_that_is_named_is_there() -> None:
    named = [name for row in _ROWS for name in re.findall(r"`([^`]*test_[^`]*)`", row)]
    assert len(named) > 40
    for name in named:
        file, _, test = name.partition("::")
        assert re.search(rf"^def {test}\(", (_TESTS / file).read_text(encoding="utf-8"), re.MULTILINE), name


def test_every_promise_names_a_test() -> None:
    promises = [row.split("|")[1:4] for row in _ROWS]
    assert [fault.strip() for fault, _, tests in promises if "::" not in tests] == ["Whoever can write to the store"]
