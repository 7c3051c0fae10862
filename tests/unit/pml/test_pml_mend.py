"""What other tools accept is written as XML has it; what is well-formed stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.errors import PMLError
from cpucache.pml import parse_prompt, parse_schema
from cpucache.pml.canonical import parse_pml
from cpucache.pml.mend import mend
from cpucache.pml.tree import Module, Text, Turn
from tests.support.documents import changed, scopes, source_of
from tests.support.tries import tries

CODE = [
    "if 0 <= position[0] < self.grid_size and 0 <= position[1] < self.grid_size:",
    "while (a < b && c > d) a <<= 1;",
    "#include <stdio.h>",
    "std::vector<int> seen; Map<String, List<Integer>> lists;",
    "for (i=0;i<n;i++) x&=y;",
    "R&D by <someone@example.org>, see <http://example.org/?a=1&b=2>",
    "a <b and c> d",
    "</p> and </T>",
    "x <- 3; y <-- x",
    "a[b[0]]>c",
    "<3",
    "&",
    "<",
    "1 < 2 && 2 > 1 <",
]


def text_of(schema: str) -> str:
    module = parse_schema(schema).children[0]
    assert isinstance(module, Module)
    (text,) = module.children
    assert isinstance(text, Text)
    return text.text


@pytest.mark.parametrize("line", CODE)
def test_a_line_of_code_is_kept_to_the_letter(line: str) -> None:
    source = f'<schema name="s">\n<module name="m">A line:\n{line}\nno more</module>\n</schema>'
    with pytest.raises(PMLError) as caught:
        parse_schema(source, file="s.xml")
    assert "`cpucache schema fmt --fix s.xml` fixes it" in str(caught.value)
    assert text_of(mend(source)) == f"A line:\n{line}\nno more"
    assert mend(mend(source)) == mend(source)


@tries(150)
@given(st.lists(st.sampled_from(CODE), min_size=1, max_size=6))
def test_many_lines(lines: list[str]) -> None:
    text = "\n".join(lines)
    source = f'<schema name="s"><module name="m">A {text} z</module><!-- & < --></schema>'
    assert text_of(mend(source)) == f"A {text} z"


@tries(80)
@given(scopes())
def test_what_is_right_stays_as_it_is(nodes: list[Any]) -> None:
    source = source_of(nodes)
    assert mend(source) == source


@tries(40)
@given(st.composite(changed)())
def test_mending_settles_at_once_and_adds_no_line(data: bytes) -> None:
    text = data.decode(errors="replace")
    mended = mend(text)
    assert mend(mended) == mended
    assert mended.count("\n") == text.count("\n")
    try:
        before = parse_pml(text, file="d.xml")
    except PMLError:
        return
    assert mended == text, before


def test_a_value_of_any_length_stays_a_value() -> None:
    """Escaping makes values longer: a limit of their length would make the second mending escape the tag itself."""
    source = f'<prompt schema="s"><a b="{3_000 * "&"}">x</a></prompt>'

    mended = mend(source)

    assert mended == source.replace("&", "&amp;")
    assert mend(mended) == mended


def test_a_turn_holds_text_only() -> None:
    source = '<prompt schema="s"><a x="1 & 2"/> <user>What does List<String> mean in <a/> & b?</user></prompt>'

    prompt = parse_prompt(mend(source))

    turn = prompt.children[-1]
    assert isinstance(turn, Turn)
    assert turn.text == "What does List<String> mean in <a/> & b?"
    assert prompt.children[0].arguments == {"x": "1 & 2"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "source",
    [
        # Tags that are misspelt or not closed are mistakes to be told, not text.
        '<schema name="s"><modul name="a">x</module></schema>',
        '<schema name="s"><module name="a">x</schema>',
        '<schema name="s"><b>bold</b></schema>',
        '<prompt schema="s"><wine></prompt>',
        "no PML at all",
        "",
    ],
)
def test_tags_are_left_to_the_parser(source: str) -> None:
    assert mend(source) == source


def test_entities_of_html_become_characters() -> None:
    source = '<schema name="s"><module name="m">a&nbsp;b &eacute; &nosuch; &amp; &#65;</module></schema>'
    assert text_of(mend(source)) == "a\u00a0b é &nosuch; & A"


def test_comments_and_cdata_stay() -> None:
    inside = "<!-- a < b & c --><![CDATA[ a < b & c ]]>"
    assert mend(f'<schema name="s">{inside}&</schema>') == f'<schema name="s">{inside}&amp;</schema>'


def test_many_tags_that_are_never_closed_take_no_longer_than_they_are() -> None:
    """A search through all open tags at each end tag would take an hour here."""
    for opened, closed in (("<a>", "</user>"), ("<module>", "</b>"), ("<user>", "</system>")):
        for root in ("schema", "prompt"):
            mended = mend(f"<{root} name='s'>{opened * 60_000}{closed * 60_000}")
            assert mend(mended) == mended
