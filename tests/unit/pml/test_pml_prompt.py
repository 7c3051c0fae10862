"""Prompts: what they parse into, how they resolve against a schema, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpucache.errors import PMLError
from cpucache.pml import load_prompt, parse_prompt, parse_schema, resolve
from cpucache.pml.tree import (
    Argument,
    Included,
    Module,
    NewText,
    Prompt,
    Reference,
    RoleEnd,
    RoleStart,
    Schema,
    Text,
    Turn,
    modules_of,
)
from tests.support.kitchen import SCHEMA


@pytest.fixture(scope="module")
def schema() -> Schema:
    return parse_schema(SCHEMA, file="kitchen.xml")


def shape(items: tuple[Any, ...]) -> list[Any]:
    """Items as short, comparable values."""
    shapes: list[Any] = []
    for item in items:
        if isinstance(item, Included):
            shapes.append((item.scope.name, shape(item.items)))
        elif isinstance(item, Text):
            shapes.append(item.text.strip())
        elif isinstance(item, Argument):
            shapes.append(f"{item.parameter.name}={item.value}")
        elif isinstance(item, NewText):
            shapes.append(f"+{item.text.strip()}")
        elif isinstance(item, RoleStart | RoleEnd):
            shapes.append(("<" if isinstance(item, RoleStart) else ">") + item.node.role)
        else:
            shapes.append(f"{item.role}:{item.text}")
    return shapes


def cook(content: str, schema: Schema) -> list[Any]:
    return shape(resolve(parse_prompt(f'<prompt schema="kitchen" guest="Ann">{content}</prompt>'), schema).items)


# ---- parsing --------------------------------------------------------------------------------------------


def test_a_prompt_as_written() -> None:
    prompt = parse_prompt(
        '<!-- dinner -->\n<prompt schema="kitchen" guest="Ann &amp; Bo">\n'
        '<pantry owner="me">\n  <flour/>\n and then \n</pantry>\n'
        "<user> Go! </user><assistant/>\n<system>x</system></prompt>"
    )
    assert isinstance(prompt, Prompt)
    assert (prompt.schema, prompt.arguments, prompt.file, prompt.line) == (
        "kitchen",
        {"guest": "Ann & Bo"},
        "<prompt>",
        2,
    )
    pantry, user, assistant, system = prompt.children
    assert isinstance(pantry, Reference)
    assert (pantry.name, pantry.arguments, pantry.line) == ("pantry", {"owner": "me"}, 3)
    flour, text = pantry.children
    assert isinstance(flour, Reference) and (flour.name, flour.children, flour.line) == ("flour", (), 4)
    assert isinstance(text, Text) and (text.text, text.line) == ("\nand then\n", 5)
    assert all(isinstance(turn, Turn) for turn in (user, assistant, system))
    assert [(turn.role, turn.text, turn.line) for turn in (user, assistant, system) if isinstance(turn, Turn)] == [
        ("user", " Go! ", 7),
        ("assistant", "", 7),
        ("system", "x", 8),
    ]


def test_space_kept_after_a_turn_is_nothing() -> None:
    prompt = parse_prompt('<prompt schema="s" xml:space="preserve"> <user> a <!-- b --> c </user> \n </prompt>')
    assert [type(child) for child in prompt.children] == [Text, Turn]
    assert isinstance(prompt.children[1], Turn) and prompt.children[1].text == " a  c "


def test_load_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.xml"
    path.write_bytes("\ufeff<prompt schema='s'>é</prompt>".encode())
    assert load_prompt(path).file == str(path)
    with pytest.raises(PMLError, match=r"none\.xml: can't be read"):
        load_prompt(tmp_path / "none.xml")


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        ("", 1, ["the document is empty", "<prompt>"]),
        ("<schema name='s'>x</schema>", 1, ["<prompt>", "<schema>"]),
        ("<prompt>x</prompt>", 1, ["<prompt>", "'schema'"]),
        ("<prompt schema='a b'>x</prompt>", 1, ["'a b'", "schema name"]),
        ("<prompt schema='s'>\n<a>\n</prompt>", 3, ["<a>", "line 2"]),
        ("<prompt schema='s'>\n<module name='a'/></prompt>", 2, ["<module>", "<name/>"]),
        ("<prompt schema='s'>\n<union><a/></union></prompt>", 2, ["<union>", "by its name"]),
        ("<prompt schema='s'><a>\n<parameter/></a></prompt>", 2, ["<parameter>"]),
        ("<prompt schema='s'>\n<prompt schema='s'/></prompt>", 2, ["<prompt>"]),
        ("<prompt schema='s'><a>\n<user>x</user></a></prompt>", 2, ["<user>", "directly under <prompt>"]),
        ("<prompt schema='s'><user>\n<a/></user></prompt>", 2, ["<a>", "<user>", "write references outside turns"]),
        ("<prompt schema='s'><user>\n<user>x</user></user></prompt>", 2, ["write references outside turns"]),
        ("<prompt schema='s'><user name='x'>y</user></prompt>", 1, ["'name'", "<user>", "none"]),
        ("<prompt schema='s'>\n<user>x</user>\n\n<a/></prompt>", 4, ["<a>", "<user>", "line 2", "turns come last"]),
        ("<prompt schema='s'>\n<assistant>x</assistant>\n\ny</prompt>", 4, ["text", "<assistant>", "turns come last"]),
    ],
)
def test_mistakes_in_a_prompt(source: str, line: int, words: list[str]) -> None:
    with pytest.raises(PMLError) as caught:
        parse_prompt(source, file="p.xml")
    message = str(caught.value)
    assert (caught.value.file, caught.value.line) == ("p.xml", line), message
    for word in words:
        assert word in message


# ---- resolving ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ["guest=Ann", "Now cook."]),
        ("<late/>", ["guest=Ann", "Now cook.", ("late", ["Late."])]),
        # Modules and unions with nothing between them: one run, in the prompt's order.
        (
            "<wine/><cake/><pantry owner='I'/>",
            [
                "guest=Ann",
                ("wine", ["Wine."]),
                ("cake", ["Cake."]),
                ("pantry", ["Shelf of", "owner=I", ".", "<system", "Rules.", ">system"]),
                "Now cook.",
            ],
        ),
        # A role's borders and text keep their order inside the module around the role.
        (
            "<pantry owner='I'><sugar/><flour/><clock/><coal/><salt/></pantry>",
            [
                "guest=Ann",
                (
                    "pantry",
                    [
                        *("Shelf of", "owner=I", ".", ("sugar", ["Sugar."]), ("flour", ["Flour."])),
                        *("<system", "Rules.", ("clock", ["Clock."]), ("coal", ["Coal."]), ">system"),
                        ("salt", ["Salt."]),
                    ],
                ),
                "Now cook.",
            ],
        ),
        ("<cake><icing/></cake>", ["guest=Ann", ("cake", ["Cake.", ("icing", ["Icing."])]), "Now cook."]),
        ("<soup many='9'/>", ["guest=Ann", ("soup", ["Soup for", "many=9"]), "Now cook."]),
        # New text stands before the next reference, or at the end of its scope; turns come last.
        (
            "one<wine/>two<late/>three<user>four</user><assistant>five</assistant>",
            [
                *("guest=Ann", "+one", ("wine", ["Wine."]), "Now cook.", "+two", ("late", ["Late."])),
                *("+three", "user:four", "assistant:five"),
            ],
        ),
        ("one<user>two</user>", ["guest=Ann", "Now cook.", "+one", "user:two"]),
        (
            "<pantry owner='I'>one<coal/>two</pantry>three",
            [
                "guest=Ann",
                (
                    "pantry",
                    [
                        *("Shelf of", "owner=I", ".", "<system", "Rules.", "+one", ("coal", ["Coal."]), ">system"),
                        "+two",
                    ],
                ),
                *("Now cook.", "+three"),
            ],
        ),
        ("<wine>more</wine>", ["guest=Ann", ("wine", ["Wine.", "+more"]), "Now cook."]),
    ],
)
def test_reading_order(content: str, expected: list[Any], schema: Schema) -> None:
    assert cook(content, schema) == expected


def test_items_are_the_schemas_own_nodes(schema: Schema) -> None:
    root = resolve(parse_prompt("<prompt schema='kitchen' guest=''>\n<wine/></prompt>"), schema)
    assert root.scope is schema
    guest, wine, text = root.items
    assert text is schema.children[4] and isinstance(text, Text)
    assert (
        isinstance(guest, Argument) and guest.parameter is schema.children[0] and (guest.value, guest.line) == ("", 1)
    )
    assert isinstance(wine, Included) and wine.scope is modules_of(schema)["wine"]
    assert isinstance(wine.scope, Module) and wine.items == wine.scope.children


def test_preserved_space_divides_runs() -> None:
    kept = parse_schema('<schema name="s" xml:space="preserve"><module name="a"/> <module name="b"/></schema>')
    dropped = parse_schema('<schema name="s"><module name="a"/> <module name="b"/></schema>')
    prompt = parse_prompt('<prompt schema="s"><b/><a/></prompt>')
    assert shape(resolve(prompt, dropped).items) == [("b", []), ("a", [])]
    with pytest.raises(PMLError, match="write it first"):
        resolve(prompt, kept)


@pytest.mark.parametrize(
    ("source", "line", "words"),
    [
        ("<prompt schema='kitten' guest='A'/>", 1, ["'kitten'", "'kitchen'", "kitchen.xml"]),
        ("<prompt schema='kitchen'/>", 1, ["<prompt>", "'guest'", "schema line 2", 'guest="..."']),
        ("<prompt schema='kitchen' guets='A'/>", 1, ["unknown argument 'guets'", "did you mean 'guest'"]),
        ("<prompt schema='kitchen' guest='A'>\n<whine/></prompt>", 2, ["'whine'", "the schema", "did you mean 'wine'"]),
        (
            "<prompt schema='kitchen' guest='A'>\n<zzz/></prompt>",
            2,
            ["'zzz'", "valid here", "'pantry'", "'cake'", "'late'"],
        ),
        (
            "<prompt schema='kitchen' guest='A'>\n<wine><x/></wine></prompt>",
            2,
            ["'x'", "under <wine>", "none is defined"],
        ),
        (
            "<prompt schema='kitchen' guest='A'>\n<icing/></prompt>",
            2,
            ["'icing'", "not directly under the schema", "'cake'", "kitchen.xml:19"],
        ),
        (
            "<prompt schema='kitchen' guest='A'><cake>\n<coal/></cake></prompt>",
            2,
            ["'coal'", "not under <cake>", "'pantry'", "kitchen.xml:11"],
        ),
        (
            "<prompt schema='kitchen' guest='A'><pantry owner='I'>\n<wine/></pantry></prompt>",
            2,
            ["'wine'", "not under <pantry>", "but directly under the schema", "kitchen.xml:21"],
        ),
        (
            "<prompt schema='kitchen' guest='A'><cake/>\n<soup many='1'/></prompt>",
            2,
            ["<soup>", "<cake>", "one union", "schema line 17", "line 1"],
        ),
        ("<prompt schema='kitchen' guest='A'><wine/>\n<wine/></prompt>", 2, ["<wine>", "twice", "line 1"]),
        ("<prompt schema='kitchen' guest='A'><cake/>\n<cake/></prompt>", 2, ["<cake>", "twice"]),
        (
            "<prompt schema='kitchen' guest='A'><late/>\n<wine/></prompt>",
            2,
            ["<wine> (schema line 21) comes before <late> (schema line 23)", "write it first"],
        ),
        (
            "<prompt schema='kitchen' guest='A'><pantry owner='I'><salt/>\n<gas/></pantry></prompt>",
            2,
            ["<gas> (schema line 10) comes before <salt> (schema line 15)"],
        ),
        ("<prompt schema='kitchen' guest='A'>\n<soup/></prompt>", 2, ["<soup>", "'many'", "schema line 18"]),
        ("<prompt schema='kitchen' guest='A'>\n<soup many='1' salt='2'/></prompt>", 2, ["'salt'", "<soup>", "'many'"]),
        ("<prompt schema='kitchen' guest='A'>\n<wine x='1'/></prompt>", 2, ["'x'", "<wine>", "none is defined here"]),
    ],
)
def test_mistakes_against_the_schema(source: str, line: int, words: list[str], schema: Schema) -> None:
    with pytest.raises(PMLError) as caught:
        resolve(parse_prompt(source, file="p.xml"), schema)
    message = str(caught.value)
    assert (caught.value.file, caught.value.line) == ("p.xml", line), message
    for word in words:
        assert word in message


def test_a_name_found_in_several_other_modules_and_deep_down() -> None:
    schema = parse_schema(
        '<schema name="s"><module name="a"><module name="b"><module name="c"/></module></module>\n'
        '<module name="d"><module name="c"/></module></schema>'
    )
    with pytest.raises(PMLError, match=r"under 'a\.b' \(<schema>:1\) and in 1 more place"):
        resolve(parse_prompt("<prompt schema='s'><c/></prompt>"), schema)


def test_two_unions_side_by_side_are_independent() -> None:
    union = "<union><module name='{}'>x</module><module name='{}'>y</module></union>"
    schema = parse_schema(f"<schema name='s'>{union.format('a', 'b')}{union.format('c', 'd')}</schema>")
    prompt = parse_prompt("<prompt schema='s'><d/><a/></prompt>")
    assert shape(resolve(prompt, schema).items) == [("d", ["y"]), ("a", ["x"])]


README_LIKE = """<!-- The root holds modules and unions. -->
<schema name="greenhouse">
  <module name="intro">
    A greenhouse looked after by
    <parameter name="keeper" length="6" scaffold="[someone]"/>
    <module name="nested">With two doors.</module>
    <system>
      <union scaffold="calm">
        <module name="calm">Answer calmly.</module>
        <module name="curt" cache="false">Answer curtly.</module>
        <module name="formal">Answer formally, mentioning <parameter name="motto" length="10"/></module>
      </union>
      <union>
        <module name="novice" cache="false">The reader is new to plants.</module>
        <module name="expert">The reader grows plants.</module>
      </union>
    </system>
  </module>
  <module name="task">
    <union>
      <module name="watering">Water at a <parameter name="pace" length="5"/> pace.</module>
      <module name="pruning">Prune.</module>
    </union>
  </module>
</schema>
"""


def test_a_schema_with_everything_that_the_reference_shows() -> None:
    """Nested modules, unions inside roles, several parameters; and a prompt that names them in any order of a run."""
    schema = parse_schema(README_LIKE)
    source = """<prompt schema="greenhouse">
      <intro keeper="Mo">
        <!-- only some of the modules -->
        <nested/>
        <formal motto="grow"/>
        <expert/>
      </intro>
      <task><watering pace="slow"/></task>
      <user>What next?</user>
      <assistant>The ferns.</assistant>
      <user>And then?</user>
    </prompt>"""
    assert shape(resolve(parse_prompt(source), schema).items) == [
        (
            "intro",
            [
                *("A greenhouse looked after by", "keeper=Mo", ("nested", ["With two doors."]), "<system"),
                *(("formal", ["Answer formally, mentioning", "motto=grow"]), ("expert", ["The reader grows plants."])),
                ">system",
            ],
        ),
        ("task", [("watering", ["Water at a", "pace=slow", "pace."])]),
        *("user:What next?", "assistant:The ferns.", "user:And then?"),
    ]
    # The reference's own prompt names a module that its schema does not have.
    with pytest.raises(PMLError, match="no module 'task2' under <intro>"):
        resolve(parse_prompt(source.replace("<expert/>", "<task2 val1='x'/>")), schema)
