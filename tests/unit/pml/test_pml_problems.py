"""Every mistake in a document is told at once; the error that is raised is the first, and holds the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpucache.errors import PMLError
from cpucache.pml import load_schema, parse_prompt, parse_schema, resolve
from cpucache.pml.problems import MOST_PROBLEMS

SCHEMA = """<schema name="s" links="4">
<module name="a" cache="yes" scr="x"/>
<modul name="b">
  <parameter name="p"/>
</modul>
<union scaffold="c"><module name="d"/>text</union>
<system><user><module name="a"/></user></system>
<parameter name="1" length="0">x</parameter>
<module src="x.txt"><user/></module>
<scaffold modules="a e f"/>
</schema>"""


def mistakes(error: PMLError) -> list[tuple[int | None, str]]:
    assert all(not other.others for other in error.others)
    return [(each.line, each.reason) for each in (error, *error.others)]


def test_every_mistake_of_a_schema_is_told_by_line() -> None:
    with pytest.raises(PMLError) as caught:
        parse_schema(SCHEMA, file="s.xml")

    told = mistakes(caught.value)
    assert str(caught.value).startswith("s.xml:1: unknown attribute 'links'")
    assert [(line, " ".join(reason.split()[:3])) for line, reason in told] == [
        (1, "unknown attribute 'links'"),
        (2, "unknown attribute 'scr'"),
        (2, "unknown value 'yes'"),
        (3, "unexpected <modul> inside"),
        (4, "<parameter> lacks its"),
        (6, "text inside <union>,"),
        (6, "the scaffold 'c'"),
        (7, "<user> is inside"),
        (7, "duplicate module name"),
        (8, "illegal parameter name"),
        (8, "illegal length '0':"),
        (8, "<parameter> can't have"),
        (9, "<module> lacks its"),
        (9, "a module with"),
        (9, "src='x.txt' needs a"),
        (10, "there is no"),
        (10, "there is no"),
    ]


def test_every_mistake_of_a_prompt_is_told_by_line() -> None:
    with pytest.raises(PMLError) as caught:
        parse_prompt(
            '<prompt schema="a/b">\n<a><user/></a>\n<user name="x">y<b/></user>\nlate\n<union xml:lang="en"/></prompt>'
        )

    assert [line for line, _ in mistakes(caught.value)] == [1, 2, 3, 3, 4, 5, 5, 5]


def test_everything_that_does_not_fit_the_schema_is_told() -> None:
    schema = parse_schema(
        '<schema name="s"><module name="a"><parameter name="p" length="2"/><parameter name="q" length="2"/></module>'
        '<union><module name="b"/><module name="c"/></union></schema>'
    )
    prompt = parse_prompt('<prompt schema="s" z="1">\n<a p="1" r="2"/>\n<b/><d/>\n<c/><a p="1" q="2"/></prompt>')

    with pytest.raises(PMLError) as caught:
        resolve(prompt, schema)

    lines = [line for line, _ in mistakes(caught.value)]
    assert lines == [1, 2, 2, 3, 4, 4]


def test_a_prompt_for_another_schema_is_told_which_there_are() -> None:
    schema = parse_schema('<schema name="support"><module name="a"/></schema>', file="desk/schema.xml")

    with pytest.raises(PMLError) as caught:
        resolve(parse_prompt('\n<prompt schema="suport"/>', file="p.xml"), schema)

    assert str(caught.value) == (
        "p.xml:2: the prompt is written for the schema 'suport', but desk/schema.xml is 'support'; "
        "did you mean 'support'?"
    )


def test_there_is_an_end_to_mistakes() -> None:
    with pytest.raises(PMLError) as caught:
        parse_schema(f'<schema name="s">{"<module/>" * (MOST_PROBLEMS + 50)}</schema>')

    assert len(mistakes(caught.value)) == MOST_PROBLEMS


def test_what_is_right_has_no_others() -> None:
    assert PMLError("x", file="f", line=1).others == ()
    assert parse_schema('<schema name="s"><module name="a"/></schema>').name == "s"


@pytest.mark.parametrize(
    ("content", "column", "words"),
    [
        ("  if 3 < 4 then", 8, ["&lt;", "'if 3 < 4 then"]),
        ("a <= b", 3, ["&lt;", "'a <= b"]),
        ("é <3", 3, ["&lt;", "'é <3"]),
        ("a <b c", 3, ["&lt;", "'c'", "'a <b c"]),
        ("to <me@example.org>", 4, ["&lt;", "'to <me@example.org>"]),
        ("salt & pepper", 6, ["&amp;", "'salt & pepper"]),
        ("AT&amp;T x&y", 11, ["&amp;"]),
        ("&nbsp;", 7, ["&nbsp;"]),
        ("<module name=a/>", 13, ["quotes"]),
    ],
)
def test_a_slip_in_the_text_is_shown_with_its_column(content: str, column: int, words: list[str]) -> None:
    with pytest.raises(PMLError) as caught:
        parse_schema(f'<schema name="s">\n{content}\n</schema>', file="s.xml")

    error = caught.value
    assert str(error).startswith(f"s.xml:2:{column}: ")
    for word in words:
        assert word in error.reason


def test_a_slip_in_a_long_line_is_shown_with_what_stands_around_it(tmp_path: Path) -> None:
    path = tmp_path / "s.xml"
    path.write_text(f'<schema name="s">{"x" * 10**6} 3 < 4 {"y" * 10**6}</schema>')
    with pytest.raises(PMLError) as caught:
        load_schema(path)

    assert caught.value.column == len('<schema name="s">') + 10**6 + 4
    assert "xxx 3 < 4 yyy" in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))
