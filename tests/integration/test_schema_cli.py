"""``schema check`` on several mistakes, schemas and prompts at once, and ``schema show`` on narrow terminals."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.command import PROMPT, SCHEMA, cpucache

pytestmark = pytest.mark.usefixtures("folder")


def test_check_tells_every_mistake_in_order(folder: Path) -> None:
    (folder / "bad.xml").write_text(
        '<schema name="s">\n<modul name="x">y</modul>\n<module name="m" cache="no"/>\n<module name="m"/></schema>'
    )
    (folder / "less.xml").write_text('<schema name="s">\n  while 3 < 4 do\n</schema>')

    done = cpucache("schema", "check", "bad.xml", "schema.xml", "less.xml")

    assert (done.status, done.out) == (2, "schema.xml: schema 'shop' is fine\n")
    first, second, third, less = done.err.splitlines()
    assert re.match(r"cpucache: bad\.xml:2: .*<modul>", first)
    assert re.match(r"cpucache: bad\.xml:3: .*'no'", second)
    assert re.match(r"cpucache: bad\.xml:4: duplicate .*'m'", third)
    assert re.match(r"cpucache: less\.xml:2:11: .*&lt;.*'while 3 < 4 do'", less)


def test_check_ends_after_very_many_mistakes(folder: Path) -> None:
    (folder / "bad.xml").write_text(f'<schema name="s">{"<module/>" * 500}</schema>')

    lines = cpucache("schema", "check", "bad.xml").err.splitlines()

    assert len(lines) == 101
    assert lines[-1] == "cpucache: too many mistakes: the rest of the input was not checked"


def test_check_takes_prompts(folder: Path) -> None:
    (folder / "other.xml").write_text('<schema name="other"><module name="m">Something else.</module></schema>')
    (folder / "p.xml").write_text('<prompt schema="other">\n<n/>\n<m x="1"/></prompt>')
    (folder / "q.xml").write_text('\n<prompt schema="oter"/>')
    (folder / "r.xml").write_text('<prompt schema="shop"><user>3 < 4?</user></prompt>')

    fine = cpucache("schema", "check", "schema.xml", "other.xml", "-p", "prompt.xml", "--prompt", "-", stdin=PROMPT)
    wrong = cpucache("schema", "check", "schema.xml", "other.xml", *(f"-p{name}.xml" for name in "pqr"))

    assert (fine.status, fine.err) == (0, "")
    assert fine.out.splitlines()[2:] == [
        "prompt.xml: the prompt fits schema 'shop'",
        "-: the prompt fits schema 'shop'",
    ]
    assert wrong.status == 2
    unknown, argument, nowhere, less = wrong.err.splitlines()
    assert re.match(r"cpucache: p\.xml:2: .*'n'", unknown)
    assert re.match(r"cpucache: p\.xml:3: .*'x'", argument)
    assert nowhere == (
        "cpucache: q.xml:2: the prompt is written for the schema 'oter', "
        "but schema.xml is 'shop', other.xml is 'other'; did you mean 'other'?"
    )
    assert re.match(r"cpucache: r\.xml:1:\d+: .*&lt;.*3 < 4", less)


def test_check_says_which_prompts_it_could_not_check(folder: Path) -> None:
    (folder / "bad.xml").write_text('<schema name="bad">\n<modul/></schema>')
    (folder / "p.xml").write_text('<prompt schema="bad"/>')

    done = cpucache("schema", "check", "bad.xml", "schema.xml", "-p", "p.xml", "-p", "prompt.xml")

    assert done.status == 2
    assert done.out.splitlines()[1:] == ["prompt.xml: the prompt fits schema 'shop'"]
    assert done.err.splitlines()[1] == "cpucache: p.xml: not checked against its schema 'bad', which can't be used"


@pytest.mark.parametrize("columns", [24, 30, 36, 40, 44])
def test_show_keeps_the_names_on_a_narrow_terminal(model: Path, folder: Path, columns: int) -> None:
    (folder / "long.xml").write_text(SCHEMA.replace("summer", "summer-and-autumn").replace("shop", "policies"))

    done = cpucache("schema", "show", "long.xml", "-m", model, COLUMNS=str(columns))

    assert done.status == 0, done.err
    assert "…" not in done.out
    for name in ("policies", "hours", "{opens}", "one of 2", "summer-and-autumn", "winter"):
        assert re.search(rf"(^|[─ ]){re.escape(name)}( |$)", done.out, re.MULTILINE)
    rows = [line for line in done.out.splitlines() if "MiB" not in line]
    assert all(len(line) <= columns for line in rows)
    assert ("tokens" in rows[0]) == (columns >= 36)
