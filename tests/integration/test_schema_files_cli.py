"""``schema check`` and ``schema fmt`` over many files, folders and patterns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.command import SCHEMA, Outcome, cpucache

pytestmark = pytest.mark.usefixtures("folder")

BAD = '<schema name="b">\n  <modul name="x"/>\n  é <module name="m" cache="no"/> \n</schema>\n'
STRAY = '<schema name="g">\n  if 0 <= position[0] < self.size && ok:\n  <module name="m">a & b</module>\n</schema>\n'
MENDED = (
    STRAY.replace("<= p", "&lt;= p")
    .replace("< self", "&lt; self")
    .replace("&&", "&amp;&amp;")
    .replace("a &", "a &amp;")
)
RAGGED = '<schema  name="r"><module   name="m">one</module>\n\n\n  <module name="n" /></schema>'
TIDY = '<schema name="r">\n  <module name="m">one</module>\n\n  <module name="n"/>\n</schema>\n'


@pytest.fixture
def many(folder: Path) -> Path:
    """A folder with schemas at several depths, one of them with mistakes, and a prompt for one."""
    for name in ("a", "deep/b", "deep/er/c"):
        path = folder / "many" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SCHEMA.replace('"shop"', f'"{path.stem}"'))
    (folder / "many" / "deep" / "p.xml").write_text('<prompt schema="b"><summer/><user>?</user></prompt>')
    (folder / "many" / "note.txt").write_text("no schema")
    return folder / "many"


def fmt(*arguments: str, stdin: str = "") -> Outcome:
    return cpucache("schema", "fmt", *arguments, stdin=stdin)


# ---- check -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("named", [["many"], ["many/**/*.xml"], ["many", "many/a.xml", "many/deep/*.xml"]])
def test_check_takes_folders_and_patterns(many: Path, named: list[str]) -> None:
    done = cpucache("schema", "check", *named)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == [
        "many/a.xml: schema 'a' is fine",
        "many/deep/b.xml: schema 'b' is fine",
        "many/deep/er/c.xml: schema 'c' is fine",
        "many/deep/p.xml: the prompt fits schema 'b'",
    ]


def test_check_tells_all_mistakes_of_all_files(many: Path) -> None:
    (many / "bad.xml").write_text(BAD)
    (many / "deep" / "worse.xml").write_text(BAD + "<")
    (many / "deep" / "q.xml").write_text('<prompt schema="a">\n<sumer/>\n<winter x="1"/></prompt>')
    done = cpucache("schema", "check", "many")
    assert done.status == 2
    assert len(done.out.splitlines()) == 4
    positions = [line.split(": ")[1] for line in done.err.splitlines()]
    assert positions == [
        "many/bad.xml:2",
        "many/bad.xml:3",
        "many/deep/worse.xml:5:1",
        "many/deep/q.xml:2",
        "many/deep/q.xml:3",
    ]


def test_check_prints_what_a_language_server_would(many: Path) -> None:
    (many / "bad.xml").write_text(BAD)
    (many / "less.xml").write_text('<schema name="l">\n  \U0001f600 3 < 4\n</schema>')
    done = cpucache("schema", "check", "many", "--json")
    assert (done.status, done.err) == (2, "")
    found = {Path(each["uri"].removeprefix("file://")): each["diagnostics"] for each in json.loads(done.out)}
    assert list(found) == sorted(found)
    assert len(found) == 6
    wrong = {path.name: told for path, told in found.items() if told}
    assert wrong.keys() == {"bad.xml", "less.xml"}
    first, second = wrong["bad.xml"]
    assert first["range"] == {"start": {"line": 1, "character": 2}, "end": {"line": 1, "character": 19}}
    assert second["range"]["start"]["line"] == 2
    assert (first["severity"], first["source"]) == (1, "cpucache")
    assert "<modul>" in first["message"]
    # Characters are counted as UTF-16 has them.
    assert wrong["less.xml"][0]["range"]["start"] == {"line": 1, "character": 7}
    fine = cpucache("schema", "check", "many/a.xml", "--json")
    assert fine.status == 0
    assert [each["diagnostics"] for each in json.loads(fine.out)] == [[]]


def test_check_says_what_it_does_not_find(many: Path) -> None:
    (many / "empty").mkdir()
    for name, said in {
        "many/*.rng": "many/*.rng: matches no file",
        "many/empty": "many/empty: no .xml file in this folder",
        "many/none.xml": "many/none.xml: can't be read: No such file or directory",
    }.items():
        done = cpucache("schema", "check", name)
        assert (done.status, done.err) == (2, f"cpucache: {said}\n")


# ---- fmt -------------------------------------------------------------------------------------------------------------
def test_fmt_writes_many_files_and_settles(many: Path) -> None:
    (many / "r.xml").write_text(RAGGED)
    (many / "r.xml").chmod(0o640)
    checked = fmt("--check", "many")
    assert checked.status == 1
    assert "many/r.xml: would be formatted" in checked.err
    assert (many / "r.xml").read_text() == RAGGED
    shown = fmt("--diff", "many/r.xml")
    assert shown.status == 1
    assert '+<schema name="r">' in shown.out
    done = fmt("many")
    assert (done.status, done.out) == (0, "")
    assert (many / "r.xml").read_text() == TIDY
    assert (many / "r.xml").stat().st_mode & 0o777 == 0o640
    again = fmt("many/**/*.xml")
    assert again.status == 0
    assert [line.partition(": ")[2] for line in again.err.splitlines()] == ["nothing to change"] * 5
    assert fmt("-", stdin=RAGGED).out == TIDY


def test_fmt_goes_on_after_a_file_that_is_wrong(many: Path) -> None:
    (many / "bad.xml").write_text(BAD)
    (many / "r.xml").write_text(RAGGED)
    done = fmt("many")
    assert done.status == 2
    assert [line.split(": ")[1] for line in done.err.splitlines() if line.startswith("cpucache")] == [
        "many/bad.xml:2",
        "many/bad.xml:3",
    ]
    assert (many / "r.xml").read_text() == TIDY
    assert (many / "bad.xml").read_text() == BAD


@pytest.mark.parametrize(("answer", "written"), [("y\n", True), ("n\n", False), ("", False)])
def test_fix_shows_and_asks_before_it_writes(many: Path, answer: str, written: bool) -> None:
    (many / "stray.xml").write_text(STRAY)
    told = cpucache("schema", "check", "many/stray.xml")
    assert "`cpucache schema fmt --fix many/stray.xml` fixes it" in told.err
    done = fmt("--fix", "many", stdin=answer)
    assert "+  if 0 &lt;= position[0] &lt; self.size &amp;&amp; ok:" in done.out
    assert (done.status, (many / "stray.xml").read_text()) == ((0, MENDED) if written else (1, STRAY))
    assert (": fixed" in done.err) == written
    assert ("--yes writes without asking" in done.err) == (answer == "")


def test_fix_without_asking(many: Path) -> None:
    for name in ("one", "deep/two"):
        (many / f"{name}.xml").write_text(STRAY)
    assert fmt("--yes", "many").status == 2
    checked = fmt("--fix", "--check", "many")
    assert checked.status == 1
    assert checked.err.count("would be fixed") == 2
    assert fmt("--fix", "--yes", "many").status == 0
    assert (many / "one.xml").read_text() == (many / "deep" / "two.xml").read_text() == MENDED
    assert cpucache("schema", "check", "many").status == 0
    assert fmt("--fix", "--yes", "many").err.count("nothing to fix") == 6
    assert fmt("--fix", "-", stdin=STRAY).out == MENDED
