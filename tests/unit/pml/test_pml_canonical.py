"""Canonical PML stands for the same document, and is its own canonical form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpucache.errors import PMLError
from cpucache.layout import ChatTemplate, SchemaLayout
from cpucache.pml import canonical, parse_schema
from cpucache.pml.canonical import meaning, parse_pml
from cpucache.reuse import Slices, reading
from tests.support.documents import changed, choose, scopes, source_of
from tests.support.drawn import letters
from tests.support.tiny import CHATML
from tests.support.tries import tries

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "schemas").rglob("*.xml"))
NOISE = ("", "", " ", "\n", "\n  ", "\r\n\t", "<!-- c -->", " <!-- c\nd -->\n", "\n<!--c--> ", "&#10;", "<![CDATA[ ]]>")


def noisy(draw: st.DrawFn, source: str) -> str:
    """A document with white space and comments put in where tags meet text, and ``xml:space`` here and there."""
    cdata = [found.span() for found in re.finditer(r"<!\[CDATA\[.*?\]\]>", source, re.DOTALL)]

    def outside(index: int) -> bool:
        return not any(start < index < end for start, end in cdata)

    indexes = [
        found.start()
        for found in re.finditer(r"(?<=>)(?=.)|(?=<[a-z/])", source)
        if 0 < found.start() < len(source) and outside(found.start()) and source[: found.start()].count("<")
    ]
    for index in sorted(draw(st.lists(st.sampled_from(indexes), max_size=6)), reverse=True):
        source = source[:index] + draw(st.sampled_from(NOISE)) + source[index:]
    for name in draw(st.lists(st.sampled_from(["module", "user", "schema", "system"]), max_size=2)):
        value = draw(st.sampled_from(["preserve", "default"]))
        source = re.sub(rf"<{name}(?![^ >])(?![^>]*xml:space)", f"<{name}\n xml:space = '{value}'", source, count=1)
    return source


def kept(source: str) -> tuple[Any, list[str]]:
    """What of a document stays the same in its canonical form: what it means, and its comments."""
    comments = re.findall("<!--.*?-->", source.replace("\r\n", "\n"), re.DOTALL)
    return meaning(parse_pml(source, file="d.xml")), comments


@tries(120)
@given(scopes(), st.data())
def test_a_schema_stays_the_same(nodes: list[Any], data: st.DataObject) -> None:
    source = data.draw(st.composite(lambda draw: noisy(draw, source_of(nodes)))())
    try:
        parse_schema(source)
    except PMLError:  # a comment that was put into a union's text, say
        return
    written = canonical(source, file="d.xml")
    assert kept(written) == kept(source)
    assert canonical(written, file="d.xml") == written


@tries(100)
@given(scopes(), st.data(), st.sampled_from(["", "<user> go \n</user> <assistant/>"]))
def test_a_prompt_stays_the_same(nodes: list[Any], data: st.DataObject, turns: str) -> None:
    schema = parse_schema(source_of(nodes))
    picked = data.draw(st.composite(lambda draw: choose(draw, schema))())
    written = f"<prompt schema='s'{picked.attributes}>{picked.content}{turns}</prompt>"
    source = data.draw(st.composite(lambda draw: noisy(draw, written))())
    written = canonical(source, file="d.xml")
    assert kept(written) == kept(source)
    assert canonical(written, file="d.xml") == written


def keys(source: str) -> list[str]:
    """The names of all slices of a schema, which stand for their tokens, contexts and positions."""
    vocabulary = letters()
    layout = SchemaLayout(parse_schema(source), vocabulary, ChatTemplate(CHATML, bos="<s>", eos="</s>"))
    return [slice_.key for slice_ in reading(layout, Slices("model", "format"), 1 << 20)]


@tries(80)
@given(scopes(), st.data())
def test_the_plan_stays_the_same(nodes: list[Any], data: st.DataObject) -> None:
    source = data.draw(st.composite(lambda draw: noisy(draw, source_of(nodes)))())
    # What stands for an argument must not be longer than it.
    source = re.sub(r" scaffold=(\"[^\"]*\"|'[^']*')(?=/>)", "", source)
    try:
        names = keys(source)
    except PMLError:
        return
    assert keys(canonical(source, file="d.xml")) == names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_examples_are_canonical(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert canonical(source, file=str(path), folder=path.parent) == source


def test_how_it_looks() -> None:
    source = """<?xml version='1.0'?><!-- a shop -->

<schema anchor='none'    name = 'shop' ><system>
You answer.   Always.
    <module
       cache="false" name='news'>The lift <!-- still --> is broken.</module><union><module name="a"
    >x</module><module name="b" isolate="true">
 one line
 </module> <!-- two -->


 <module name='c'>
      two
      lines at <parameter length="2" name="p" scaffold='"x"'/>
   </module></union></system><module name="e"> </module><module name="k" xml:space="preserve">  a
 <parameter length="1" name="q"/></module></schema>"""
    assert (
        canonical(source, file="d.xml")
        == """<!-- a shop -->

<schema name="shop" anchor="none">
  <system>
You answer.   Always.
    <module name="news" cache="false">The lift <!-- still --> is broken.</module>
    <union>
      <module name="a">x</module>
      <module name="b" isolate="true">
 one line
      </module> <!-- two -->

      <module name="c">
      two
      lines at <parameter name="p" length="2" scaffold='"x"'/>
      </module>
    </union>
  </system>
  <module name="e"/>
  <module name="k" xml:space="preserve">  a
 <parameter name="q" length="1"/></module>
</schema>
"""
    )


@tries(100)
@given(st.composite(changed)())
def test_a_changed_document_is_formatted_or_refused(data: bytes) -> None:
    try:
        written = canonical(data, file="d.xml")
    except PMLError:
        return
    assert canonical(written, file="d.xml") == written
