"""Schemas: what they parse into, and what each mistake is told."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from cpucache.errors import InputError, PMLError
from cpucache.pml import Limits, load_schema, parse_schema
from cpucache.pml.names import PML_TAGS, clip, flaw, hint
from cpucache.pml.tree import Module, Parameter, Role, Schema, Scope, Text, Union, modules_of, parameters_of
from cpucache.pml.xml import fold_space, read_xml

LIMITS = Limits()

EXAMPLE = """<!-- a ship's computer -->
<schema name="ship-2.1">
  You run a ship.
  <parameter name="captain" length="4" scaffold="(name)"/>
  <module name="log">
    Log of today:
    <parameter name="entry"
               length="30"/>
    <module name="weather.txt">Calm.</module>
    <system>
      Be brief.
      <union scaffold="dry">
        <!-- two moods -->
        <module name="dry">Be dry.</module>
        <module name="warm" cache="false">Be warm to <parameter name="whom" length="3"/>!</module>
      </union>
    </system>
  </module>
  <module name="empty" cache="true"/>
</schema>
"""


def only(scope: Scope | Role, kind: type) -> list[Any]:
    return [node for node in scope.children if isinstance(node, kind)]


def assert_fails(data: str | bytes, line: int | None, *words: str, folder: Path | None = None) -> None:
    with pytest.raises(PMLError) as caught:
        parse_schema(data, file="my.xml", folder=folder)
    message = str(caught.value)
    assert (caught.value.file, caught.value.line) == ("my.xml", line), message
    assert re.match(rf"my\.xml:{line}:(\d+:)? ", message)
    assert len(message.splitlines()) == 1
    for word in words:
        assert word in message


def test_example() -> None:
    schema = parse_schema(EXAMPLE)
    assert (schema.name, schema.file, schema.line) == ("ship-2.1", "<schema>", 2)
    text, captain, log, empty = schema.children
    assert isinstance(text, Text) and (text.text, text.line) == ("\nYou run a ship.\n", 3)
    assert isinstance(captain, Parameter)
    assert (captain.name, captain.length, captain.scaffold, captain.line) == ("captain", 4, "(name)", 4)
    assert isinstance(log, Module) and (log.name, log.cache, log.line) == ("log", True, 5)
    assert isinstance(empty, Module) and (empty.children, empty.line) == ((), 19)

    title, entry, weather, role = log.children
    assert isinstance(title, Text) and title.line == 6
    assert isinstance(entry, Parameter) and (entry.length, entry.scaffold, entry.line) == (30, None, 7)
    assert isinstance(weather, Module) and weather.line == 9
    assert isinstance(role, Role) and (role.role, role.line) == ("system", 10)
    brief, union = role.children
    assert isinstance(brief, Text) and brief.line == 11
    assert isinstance(union, Union) and (union.scaffold, union.line) == ("dry", 12)
    dry, warm = union.members
    assert (dry.name, dry.cache, dry.line) == ("dry", True, 14)
    assert (warm.name, warm.cache, warm.line) == ("warm", False, 15)
    assert [node.text for node in only(warm, Text)] == ["Be warm to ", "!"]

    assert list(modules_of(schema)) == ["log", "empty"]
    assert list(modules_of(log)) == ["weather.txt", "dry", "warm"]
    assert list(parameters_of(log)) == ["entry"]


@pytest.mark.parametrize(
    ("written", "folded", "kept"),
    [
        ("  a  b\n\nc  ", " a  b\n\nc ", "  a  b\n\nc  "),
        (" \n\n  a\t", "\na ", " \n\n  a\t"),
        ("a", "a", "a"),
        (" \n\t ", "", " \n\t "),
        ("", "", ""),
        ("\u00a0a\u2003", "\u00a0a\u2003", "\u00a0a\u2003"),
    ],
)
def test_fold_space(written: str, folded: str, kept: str) -> None:
    assert fold_space(written, preserve=False) == folded
    assert fold_space(written, preserve=True) == kept


def test_space_is_preserved_until_switched_back() -> None:
    schema = parse_schema(
        '<schema name="s"><module name="a" xml:space="preserve">  x  <module name="b"> y  </module>'
        '<module name="c" xml:space="default">  z  </module> </module>  w  </schema>'
    )
    module, after = schema.children
    assert isinstance(module, Module) and isinstance(after, Text)
    x, b, c, space = module.children
    assert isinstance(b, Module) and isinstance(c, Module)
    texts = [node.text for node in (x, *b.children, *c.children, space, after) if isinstance(node, Text)]
    assert texts == ["  x  ", " y  ", " z ", " ", " w "]


def test_comments_cdata_and_references_are_one_text() -> None:
    source = (
        '<schema name="s">a <!-- not\nthis --> b<![CDATA[ <c> & ]]>&lt;&#233;&#x1F600;&amp;<module name="m"/></schema>'
    )
    schema = parse_schema(source)
    text, module = schema.children
    assert isinstance(text, Text) and text.text == "a  b <c> & <é😀&"
    assert isinstance(module, Module) and module.line == 2


def test_lines_survive_comments_and_long_tags_and_carriage_returns() -> None:
    source = (
        '<?xml version="1.0" encoding="UTF-8"?>\r\n<!--\r\n-->\r\n<schema\r\n name="s"\r\n>\r\n'
        'x\r\n<!-- 1\r\n2 --><module\r\nname="m"/>\r\n\r\ny&#10;&#10;<module name="n"/></schema>'
    )
    schema = parse_schema(source.encode())
    assert schema.line == 4
    assert [node.line for node in schema.children] == [7, 9, 12, 12]
    assert [node.text for node in only(schema, Text)] == ["\nx\n", "\ny\n"]


def test_lines_beyond_those_that_fit_in_sixteen_bits() -> None:
    schema = parse_schema('<schema name="s">' + "\n" * 70_000 + 't<module name="m"/>' + "\n" * 9 + "u</schema>")
    assert [node.line for node in schema.children] == [70_001, 70_001, 70_010]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("data", [str, str.encode])
def test_text_and_bytes_with_or_without_a_byte_order_mark(mark: str, data: type) -> None:
    assert parse_schema(data(mark + '<schema name="s">é</schema>')).name == "s"


def test_a_declared_encoding_counts_for_bytes_only() -> None:
    source = '<?xml version="1.0" encoding="ISO-8859-1"?>\n<schema name="s">é</schema>'
    assert only(parse_schema(source), Text)[0].text == "é"
    assert_fails(source.encode(), 1, "'ISO-8859-1'", "UTF-8")


# ---- what is not XML, or more XML than PML takes ----------------------------------------------


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        ("", 1, ["the document is empty", "<schema>"]),
        (" \n\n", 3, ["the document is empty"]),
        (b"", 1, ["the document is empty"]),
        ("<!-- x -->\n", 2, ["the document is empty"]),
        ("just text", 1, ["well-formed"]),
        ('<schema name="s">\n<module name="a">\n</schema>', 3, ["<module>", "line 2", "</schema>"]),
        ('<schema name="s">\n<module name="a">\n', 3, ["<module>", "line 2", "never closed", "</module>"]),
        ('<schema name="s">\n<module', 2, ["<module>", "'>'"]),
        ('<schema name="s">x</schema>\n<schema name="t"/>', 2, ["well-formed"]),
        ('<schema name="s" name="t"/>', 1, ["'name'", "twice"]),
        ('<schema name="s">\nsalt & pepper</schema>', 2, ["&amp;"]),
        ('<schema name="s">\n&pepper</schema>', 2, ["&amp;"]),
        ('<schema name="a<b"/>', 1, ["&lt;"]),
        ('<schema name="s">\n&nbsp;</schema>', 2, ["&nbsp;", "&amp;"]),
        ('<schema name="s">\n<module name="&x;"/></schema>', 2, ["&x;"]),
        ('<schema name="s">\n&#0;</schema>', 2, ["well-formed"]),
        ('<schema name="s">\n\0</schema>', 2, ["well-formed"]),
        ("\0", 1, ["well-formed"]),
        ('<schema name="s">a]]>b</schema>', 1, ["well-formed"]),
        ('<!DOCTYPE schema>\n<schema name="s">x</schema>', 1, ["DOCTYPE", "remove"]),
        ('<?xml version="1.0"?>\n<!-- x -->\n<!DOCTYPE schema SYSTEM "file:///etc/passwd"><schema/>', 3, ["DOCTYPE"]),
        ("<!doctype html>", 1, ["DOCTYPE"]),
        ('<?style x?><schema name="s">x</schema>', 1, ["<?style", "processing instruction"]),
        ('<schema name="s">x\n<?php evil() ?></schema>', 2, ["<?php"]),
        ('<schema name="s">x</schema>\n<?late?>', 2, ["<?late"]),
        ('\n<?xml version="1.0"?><schema name="s">x</schema>', 2, ["<?xml", "very start"]),
        ('<schema xmlns="urn:x" name="s">x</schema>', 1, ["xmlns", "<schema>"]),
        ('<schema name="s">\n<module xmlns:q="urn:x" name="m"/></schema>', 2, ["xmlns", "<module>"]),
        ('<schema name="s">\n<q:module name="m"/></schema>', 2, ["':'", "xml:space"]),
        ('<schema name="s" q:x="1">x</schema>', 1, ["':'"]),
        ('<schema name="s" a:b:c="1">x</schema>', 1, ["':'"]),
        ('<schema name="s" xml:lang="en">x</schema>', 1, ["'xml:lang'", "xml:space"]),
        ('<schema name="s" xml:space="keep">x</schema>', 1, ["'keep'", "'preserve'"]),
        (b'<schema name="s">\n\xff</schema>', 2, ["0xff", "UTF-8"]),
        ('<schema name="s">x</schema>'.encode("utf-16"), 1, ["UTF-8"]),
        ('<schema name="s">\n\ud800</schema>', 2, ["U+D800"]),
        ('<prompt schema="s"/>', 1, ["<schema>", "<prompt>"]),
    ],
)
def test_not_the_xml_that_is_taken(data: str | bytes, line: int, words: list[str]) -> None:
    assert_fails(data, line, *words)


def test_a_billion_laughs_are_never_expanded() -> None:
    entities = "".join(f'<!ENTITY l{n + 1} "{f"&l{n};" * 10}">' for n in range(12))
    assert_fails(f'<!DOCTYPE s [<!ENTITY l0 "ha">{entities}]>\n<schema name="&l12;">&l12;</schema>', 1, "DOCTYPE")


def test_nesting_has_a_limit() -> None:
    def nested(depth: int) -> str:
        return '<schema name="s">' + '<module name="m">' * (depth - 1) + "x" + "</module>" * (depth - 1) + "</schema>"

    assert parse_schema(nested(LIMITS.depth)).name == "s"
    assert_fails(nested(LIMITS.depth + 1), 1, str(LIMITS.depth), "deep")
    assert_fails(nested(100_000), 1, "deep")


def test_the_number_of_attributes_has_a_limit() -> None:
    def wide(count: int) -> str:
        return "<r " + " ".join(f'a{n}=""' for n in range(count)) + "/>"

    assert len(read_xml(wide(LIMITS.attributes), file="f", root="r", limits=LIMITS).attributes) == LIMITS.attributes
    with pytest.raises(PMLError, match=f"<r> has more than {LIMITS.attributes} attributes"):
        read_xml(wide(200_000), file="f", root="r", limits=LIMITS)


def test_huge_pieces_are_refused_in_one_short_line() -> None:
    huge = "x" * 10_500_000
    assert_fails(f'<schema name="s">{huge}</schema>', 1, "10 million")
    assert_fails(f'<schema name="{huge}"/>', 1, "10 million")
    for name in ("n" * 40_000, "n" * 60_000):
        with pytest.raises(PMLError) as caught:
            parse_schema(f'<schema name="s"><{name}/></schema>')
        assert len(str(caught.value)) < 400


def test_read_xml_gives_elements() -> None:
    root = read_xml('<r a="1" xml:space="preserve"> <b/></r>', file="f", root="r", limits=LIMITS)
    assert (root.tag, root.attributes, root.line) == ("r", {"a": "1"}, 1)
    assert [type(child).__name__ for child in root.children] == ["Text", "Element"]


# ---- what is XML but not a schema -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("<modul name='a'/>", ["<modul>", "<schema>", "did you mean <module>"]),
        ("<prompt schema='s'/>", ["<prompt>", "<parameter>"]),
        ("<scaffold/>", ["<scaffold>"]),
        ("<System>x</System>", ["did you mean <system>"]),
        ("<module name='a' chache='false'/>", ["'chache'", "<module>", "did you mean 'cache'"]),
        ("<module name='a' length='3'/>", ["'length'", "'src'"]),
        ("<module/>", ["<module>", "'name'"]),
        ("<module name='a' cache='False'/>", ["'False'", "'cache'", "did you mean 'false'"]),
        ("<module name='a' isolate='yes'/>", ["'yes'", "'isolate'", "'true'"]),
        ("<module name='a' link='4'/>", ["unknown attribute 'link'", "<module>"]),
        ("<union isolate=''><module name='a'/></union>", ["''", "'isolate'"]),
        ("<module name='a'/><module name='a'/>", ["duplicate module", "'a'", "line 2"]),
        ("<module name='a'/><system><module name='a'/></system>", ["duplicate module", "'a'"]),
        ("<module name='a'/><union><module name='a'/></union>", ["duplicate module", "'a'"]),
        ("<union><module name='a'/><module name='a'/></union>", ["duplicate module", "'a'"]),
        ("<module name=''/>", ["illegal module name", "letters"]),
        ("<module name='a b'/>", ["'a b'", "letters"]),
        ("<module name='a:b'/>", ["'a:b'", "letters"]),
        ("<module name='a&#10;b'/>", ["illegal module name"]),
        (f"<module name='{'a' * 101}'/>", ["illegal module name", "100 characters"]),
        ("<module name='9to5'/>", ["'9to5'", "start with a letter"]),
        ("<module name='-a'/>", ["start with a letter"]),
        ("<module name='.a'/>", ["start with a letter"]),
        ("<module name='XmLfile'/>", ["'xml'"]),
        *((f"<module name='{tag}'/>", [f"'{tag}'", "tag of PML"]) for tag in PML_TAGS),
        ("<union/>", ["<union>", "empty"]),
        ("<union> <!-- none --> </union>", ["<union>", "empty"]),
        ("<union>or<module name='a'/></union>", ["text inside <union>"]),
        ("<union><parameter name='p' length='1'/></union>", ["<parameter>", "<union>", "modules only"]),
        ("<union><union><module name='a'/></union></union>", ["<union>", "modules only"]),
        ("<union><user/></union>", ["<user>", "modules only"]),
        ("<union scaffold='day'><module name='days'/></union>", ["'day'", "did you mean 'days'"]),
        ("<union name='u'><module name='days'/></union>", ["'name'", "'scaffold'"]),
        ("<parameter name='p'/>", ["<parameter>", "'length'"]),
        ("<parameter length='1'/>", ["'name'"]),
        ("<parameter name='p' lenght='1'/>", ["'lenght'", "did you mean 'length'"]),
        *(
            (f"<parameter name='p' length='{length}'/>", [f"'{length}'", "tokens", "from 1"])
            for length in ("0", "-1", "1.5", "five", "", "٣", "1" + "0" * 40)
        ),
        ("<parameter name='p' length='9'>x</parameter>", ["<parameter>", "content", "scaffold"]),
        ("<parameter name='p' length='9'><module name='a'/></parameter>", ["content"]),
        ("<parameter name='p' length='9'/><parameter name='p' length='8'/>", ["duplicate parameter", "'p'", "line 2"]),
        ("<parameter name='p' length='9'/><user><parameter name='p' length='8'/></user>", ["duplicate parameter"]),
        ("<parameter name='schema' length='9'/>", ["'schema'", "<prompt>"]),
        ("<parameter name='1st' length='9'/>", ["'1st'", "start with a letter"]),
        ("<parameter name='xmlns' length='9'/>", ["'xml'"]),
        ("<system name='x'>y</system>", ["'name'", "<system>", "none"]),
        ("<system><user>x</user></system>", ["<user>", "<system>", "line 2", "nested"]),
        ("<system><module name='a'><system>x</system></module></system>", ["<system>", "nested"]),
        ("<user><union><module name='a'><assistant>x</assistant></module></union></user>", ["<assistant>", "<user>"]),
        ("<module name='a' src='x.txt'/>", ["'x.txt'", "read from a file"]),
    ],
)
def test_mistakes_in_a_schema(content: str, words: list[str]) -> None:
    assert_fails(f'<schema name="s">text\n{content}\n</schema>', 2, *words)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("<schema>x</schema>", ["<schema>", "'name'"]),
        ("<schema name=''>x</schema>", ["illegal schema name"]),
        ("<schema name='a/b'>x</schema>", ["'a/b'", "letters"]),
        ("<schema name='s' nmae='t'>x</schema>", ["'nmae'", "did you mean 'name'"]),
        ("<schema name='s'/>", ["'s'", "empty"]),
        ("<schema name='s'><scaffold modules='a b'/></schema>", ["'s'", "empty"]),
        ("<schema name='s' anchor='parents'>x</schema>", ["'parents'", "'anchor'", "'ancestors'"]),
        ("<schema name='s' anchor=''>x</schema>", ["'anchor'", "'none'"]),
        ("<schema name='s' link='4'>x</schema>", ["unknown attribute 'link'", "<schema>", "'anchor'"]),
        ("<schema name='s' isolate='true'>x</schema>", ["unknown attribute 'isolate'", "<schema>"]),
        ("<schema name='s'> <system> </system> </schema>", ["'s'", "empty"]),
    ],
)
def test_mistakes_in_the_root(source: str, words: list[str]) -> None:
    assert_fails(source, 1, *words)


SCAFFOLDED = """<schema name="s" anchor="none">
Before
<scaffold modules=" third.one first
  unit.py third"/>
and after.
<module name="first">1</module>
<system><union><module name="unit.py">2</module><module name="other">3</module></union></system>
<module name="third"><module name="one">4</module></module>
<scaffold modules="other first"/>
</schema>"""


def test_scaffolds_and_anchor() -> None:
    schema = parse_schema(SCAFFOLDED)
    assert schema.anchor == "none"
    assert [(each.line, [module.name for module in each.modules]) for each in schema.scaffolds] == [
        (3, ["first", "unit.py", "third", "one"]),
        (9, ["first", "other"]),
    ]
    modules = modules_of(schema)
    assert schema.scaffolds[0].modules[2:] == (modules["third"], modules_of(modules["third"])["one"])
    plain = parse_schema("<schema name='s'>x<module name='m'/></schema>")
    assert (plain.anchor, plain.scaffolds) == ("ancestors", ())


def test_modules_and_unions_may_be_isolated() -> None:
    schema = parse_schema(
        "<schema name='s'><module name='a' isolate='true'><module name='in'/></module><module name='b'/>"
        "<union isolate='true'><module name='c' isolate='false'/></union><union><module name='d'/></union></schema>"
    )
    a, b = only(schema, Module)
    assert (a.isolate, modules_of(a)["in"].isolate, b.isolate) == (True, False, False)
    unions = only(schema, Union)
    assert [(union.isolate, union.members[0].isolate) for union in unions] == [(True, False), (False, False)]


def test_a_scaffold_is_no_text_and_parts_none() -> None:
    with_scaffolds = parse_schema(SCAFFOLDED)
    without = parse_schema(re.sub(r"<scaffold[^>]*>", "", SCAFFOLDED))
    assert [type(node) for node in with_scaffolds.children] == [type(node) for node in without.children]
    assert only(with_scaffolds, Text)[0].text == only(without, Text)[0].text == "\nBefore\n\nand after.\n"
    assert [node.line for node in only(with_scaffolds, Module)] == [6, 8]


@pytest.mark.parametrize(
    ("scaffolds", "words"),
    [
        ("<scaffold/>", ["<scaffold>", "'modules'"]),
        ("<scaffold names='a b'/>", ["'names'", "'modules'"]),
        ("<scaffold modules='a b'>text</scaffold>", ["<scaffold>", "content"]),
        ("<scaffold modules='a b'><module name='z'/></scaffold>", ["<scaffold>", "content"]),
        ("<scaffold modules=''/>", ["two modules or more", "none"]),
        ("<scaffold modules='a'/>", ["two modules or more", "1"]),
        ("<scaffold modules='a b a'/>", ["'a'", "twice"]),
        ("<scaffold modules='a alpine'/>", ["'alpine'", "did you mean 'alpin'"]),
        ("<scaffold modules='a a.inn'/>", ["'a.inn'", "did you mean 'a.in'"]),
        ("<scaffold modules='a in'/>", ["'in'", "no module"]),
        ("<scaffold modules='b a.in'/>", ["'a.in'", "inside 'a'", "must name"]),
        ("<scaffold modules='b x y'/>", ["'x' and 'y'", "one union", "line 3"]),
        ("<scaffold modules='a now'/>", ["'now'", 'cache="false"', "line 3"]),
        ("<scaffold modules='a b'/><scaffold modules='b a'/>", ["same modules", "line 2"]),
        ("<system><scaffold modules='a b'/></system>", ["<scaffold>", "<system>", "directly under <schema>"]),
        ("<module name='m'><scaffold modules='a b'/></module>", ["<module>", "directly under <schema>"]),
        ("<union><scaffold modules='a b'/><module name='m'/></union>", ["<scaffold>", "<union>", "modules only"]),
        ("<scafold modules='a b'/>", ["did you mean <scaffold>"]),
    ],
)
def test_mistakes_in_scaffolds(scaffolds: str, words: list[str]) -> None:
    modules = (
        "<module name='a'>1<module name='in'>2</module></module><module name='b'/><module name='alpin'/>"
        "<union><module name='x'/><module name='y'/></union><module name='now' cache='false'>3</module>"
        "<union scaffold='v'><module name='v'/><module name='w'/></union>"
    )
    assert_fails(f"<schema name='s'>text\n{scaffolds}\n{modules}</schema>", 2, *words)


def test_text_in_a_union_is_reported_on_its_own_line() -> None:
    assert_fails('<schema name="s"><union>\n<module name="a"/>\n\nstray</union></schema>', 4, "text inside <union>")


@pytest.mark.parametrize(
    "content",
    [
        "<parameter name='p' length='999999999'> </parameter>",
        "<module name='p'/><parameter name='p' length='1'/>",
        "<module name='a'><module name='a'><module name='b'/></module></module><module name='b'/>",
        "<module name='a'><parameter name='schema' length='1'/></module>",
        "<union xml:space='preserve'> <module name='a'/> </union>",
        "<system>x</system><user><module name='a'/></user><assistant/>",
        "<module name='System'/><module name='_'/><module name='é-1.b'/><module name='城市'/>",
    ],
)
def test_what_is_allowed(content: str) -> None:
    assert isinstance(parse_schema(f"<schema name='2nd'>{content}</schema>"), Schema)


# ---- src --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A schema's folder with a few files in it, and one secret beside it."""
    folder = tmp_path / "schemas"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "part.txt").write_bytes(b"  one\r\n<two> &amp;\n\n")
    (folder / "sub" / "deep.txt").write_text("deep")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes(b"fine\ncaf\xe9")
    (folder / "inside.txt").symlink_to(folder / "sub" / "deep.txt")
    (folder / "outside.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "elsewhere").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize(
    ("src", "text"),
    [
        ("part.txt", "  one\r\n<two> &amp;\n\n"),
        ("sub/deep.txt", "deep"),
        ("sub/../sub/deep.txt", "deep"),
        ("inside.txt", "deep"),
        ("empty.txt", None),
    ],
)
def test_src_is_verbatim(folder: Path, src: str, text: str | None) -> None:
    path = folder / "s.xml"
    path.write_text(f'<schema name="s">\n<module name="m" src="{src}">\n</module></schema>')
    module = only(load_schema(path), Module)[0]
    assert [(node.text, node.line) for node in only(module, Text)] == ([] if text is None else [(text, 2)])


@pytest.mark.parametrize(
    ("src", "words"),
    [
        ("prt.txt", ["'prt.txt'", "does not exist", "did you mean 'part.txt'"]),
        ("nowhere/at/all", ["does not exist"]),
        ("part.txt/x", ["'part.txt/x'"]),
        ("../secret.txt", ["'../secret.txt'", "outside"]),
        ("../missing.txt", ["outside"]),
        ("outside.txt", ["outside"]),
        ("elsewhere/secret.txt", ["outside"]),
        ("/etc/passwd", ["outside"]),
        ("sub", ["'sub'", "regular file"]),
        ("", ["regular file"]),
        ("pipe", ["regular file"]),
        ("loop", ["'loop'"]),
        ("x" * 5000, ["can't be read"]),
        ("latin.txt", ["'latin.txt'", "UTF-8", "line 2"]),
    ],
)
def test_src_mistakes(folder: Path, src: str, words: list[str]) -> None:
    assert_fails(f'<schema name="s">\n<module name="m" src="{src}"/></schema>', 2, *words, folder=folder)


@pytest.mark.parametrize("content", ["text", "<module name='n'/>", "<parameter name='p' length='1'/>"])
def test_src_excludes_content(folder: Path, content: str) -> None:
    source = f'<schema name="s">\n<module name="m" src="part.txt">{content}</module></schema>'
    assert_fails(source, 2, "'part.txt'", "content", folder=folder)


def test_the_folder_may_itself_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    (folder / "s.xml").write_text('<schema name="s"><module name="m" src="part.txt"/></schema>')
    assert load_schema(tmp_path / "link" / "s.xml").file == str(tmp_path / "link" / "s.xml")


def test_a_schema_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "none.xml", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(InputError) as caught:
            load_schema(path)
        assert isinstance(caught.value, PMLError) and caught.value.line is None
        assert "can't be read" in caught.value.reason


# ---- the wording helpers ------------------------------------------------------------------------------


def test_hint() -> None:
    assert hint("cat", ["cart", "dog"]) == "; did you mean 'cart'? (valid here: 'cart', 'dog')"
    assert hint("cat", ["cart"]) == "; did you mean 'cart'?"
    assert hint("zzz", ["cart"]) == " (valid here: 'cart')"
    assert hint("CAT", ["cat"]) == "; did you mean 'cat'?"
    assert hint("x", []) == " (none is defined here)"
    many = [f"name{n}" for n in range(20)]
    assert hint("name1", many) == "; did you mean 'name1'?"
    assert hint("zzz", many).endswith("'name7' and 12 more)")


def test_clip() -> None:
    assert clip("a\nb\x1b[0m") == "a b [0m"
    assert len(clip("x" * 10**6)) < 70


def test_a_legal_name_can_be_written_as_a_tag() -> None:
    for name in ("a", "_", "a-b.c_9", "é", "ß1", "名前", "नाम"):
        assert flaw(name, as_tag=True) is None
        assert read_xml(f'<{name} {name}="x"/>', file="f", root=name, limits=LIMITS).attributes == {name: "x"}
    for name in ("", "a b", "²", "½", "a\n", "a:b", "€"):
        assert flaw(name) is not None
