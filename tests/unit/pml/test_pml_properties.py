"""Properties of the language: whatever is written comes back, whatever is valid resolves, nothing crashes."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from hypothesis import given, settings
from hypothesis import strategies as st

from cpucache.errors import PMLError
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.names import PML_TAGS, flaw
from cpucache.pml.tree import (
    Argument,
    Included,
    Item,
    Module,
    NewText,
    Parameter,
    Role,
    RoleEnd,
    RoleStart,
    Schema,
    SchemaNode,
    Scope,
    Text,
    Turn,
    Union,
    modules_of,
    parameters_of,
)
from cpucache.pml.xml import fold_space, is_blank
from tests.unit.pml.test_pml_prompt import SCHEMA

quick = settings(max_examples=150, deadline=None)

# Characters that XML can hold; a carriage return comes back only as a character reference, which write_text sees to.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff") | st.sampled_from(
    "\t\n\r &<>]'\""
)
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12)
LETTERS = string.ascii_letters + string.digits + "_-.éß名"
NAMES = st.text(LETTERS, min_size=1, max_size=5).filter(
    lambda name: flaw(name, as_tag=True) is None and name != "schema"
)


# ---- a schema as plain tuples, and how it is written --------------------------------------------------


def write_text(text: str, cdata: bool = False) -> str:
    if cdata and "]]>" not in text and "\r" not in text:
        return f"<![CDATA[{text}]]>"
    return escape(text, {"\r": "&#13;"})


def write(node: Any) -> str:
    kind, *rest = node
    if kind == "text":
        return write_text(*rest)
    if kind == "parameter":
        name, length, scaffold = rest
        extra = "" if scaffold is None else f" scaffold={quoteattr(scaffold, {chr(13): '&#13;', chr(9): '&#9;'})}"
        return f"<parameter name='{name}' length='{length}'{extra}/>"
    if kind == "role":
        role, children = rest
        return f"<{role}>{''.join(map(write, children))}</{role}>"
    if kind == "module":
        name, cache, children = rest
        return f"<module name='{name}' cache='{str(cache).lower()}'>{''.join(map(write, children))}</module>"
    members, scaffold = rest
    extra = "" if scaffold is None else f" scaffold='{scaffold}'"
    return f"<union{extra}> {' '.join(map(write, members))} </union>"


def written_as(node: Any) -> Any:
    """What a node should come back as: texts folded, and dropped where nothing is left."""
    kind, *rest = node
    if kind == "text":
        return ("text", fold_space(rest[0], False))
    if kind == "parameter":
        return node
    if kind == "role":
        return ("role", rest[0], all_written(rest[1]))
    if kind == "module":
        return ("module", rest[0], rest[1], all_written(rest[2]))
    return ("union", [written_as(member) for member in rest[0]], rest[1])


def all_written(nodes: list) -> list:
    return [came for node in nodes if (came := written_as(node)) != ("text", "")]


def came_back(node: SchemaNode) -> Any:
    if isinstance(node, Text):
        return ("text", node.text)
    if isinstance(node, Parameter):
        return ("parameter", node.name, node.length, node.scaffold)
    if isinstance(node, Role):
        return ("role", node.role, [came_back(child) for child in node.children])
    if isinstance(node, Module):
        return ("module", node.name, node.cache, [came_back(child) for child in node.children])
    return ("union", [came_back(member) for member in node.members], node.scaffold)


@st.composite
def scopes(draw: st.DrawFn, depth: int = 0, in_role: bool = False) -> list:
    """The content of one scope: unique names, and no two texts side by side (they would be one)."""
    names = iter(draw(st.lists(NAMES, min_size=8, max_size=8, unique=True)))

    def module(role: bool) -> Any:
        name = next(names, None)
        inside = draw(scopes(depth + 1, role)) if depth < 2 else [("text", draw(TEXTS), False)]
        return None if name is None else ("module", name, draw(st.booleans()), inside)

    def content(role: bool) -> list:
        nodes: list = []
        kinds = ["text", "text", "module", "module", "parameter", "union"] + ([] if role else ["role"])
        for kind in draw(st.lists(st.sampled_from(kinds), max_size=4)):
            node: Any = None
            if kind == "text" and not (nodes and nodes[-1][0] == "text"):
                node = ("text", draw(TEXTS), draw(st.booleans()))
            elif kind == "module":
                node = module(role)
            elif kind == "parameter" and (name := next(names, None)) is not None:
                node = ("parameter", name, draw(st.integers(1, 50)), draw(st.none() | TEXTS))
            elif kind == "union":
                members = [member for _ in range(draw(st.integers(1, 3))) if (member := module(role))]
                picked = draw(st.none() | st.sampled_from([member[1] for member in members])) if members else None
                node = ("union", members, picked) if members else None
            elif kind == "role":
                node = ("role", draw(st.sampled_from(["system", "user", "assistant"])), content(True))
            if node is not None:
                nodes.append(node)
        return nodes

    return content(in_role)


def source_of(nodes: list) -> str:
    return f"<schema name='s'>x<parameter name='first' length='1'/>{''.join(map(write, nodes))}</schema>"


@quick
@given(scopes())
def test_a_schema_comes_back_as_it_was_written(nodes: list) -> None:
    schema = parse_schema(source_of(nodes))
    assert [came_back(node) for node in schema.children[2:]] == all_written(nodes)


# ---- prompts drawn from a schema ----------------------------------------------------------------------


@dataclass
class Chosen:
    """What a drawn prompt takes from one scope: its content as XML, and the names in the prompt's order."""

    attributes: str
    content: str
    names: list[str]
    inside: dict[str, Chosen]


def runs_of(scope: Scope) -> list[list[Module | Union]]:
    """The modules and unions of a scope that have nothing between them, written without the code under test."""
    flat: list[Any] = []

    def walk(nodes: tuple[SchemaNode, ...]) -> None:
        for node in nodes:
            if isinstance(node, Role):
                flat.append(None)
                walk(node.children)
                flat.append(None)
            else:
                flat.append(node if isinstance(node, Module | Union) else None)

    walk(scope.children)
    return [list(run) for is_run, run in groupby(flat, key=lambda node: node is not None) if is_run]


def choose(draw: st.DrawFn, scope: Scope) -> Chosen:
    attributes = "".join(f" {name}='v-{name}'" for name in parameters_of(scope))
    chosen = Chosen(attributes, "", [], {})
    for run in runs_of(scope):
        for node in draw(st.permutations(run)):
            if draw(st.booleans()):
                continue
            module = draw(st.sampled_from(node.members)) if isinstance(node, Union) else node
            inner = choose(draw, module)
            if draw(st.booleans()):
                chosen.content += f"new {len(chosen.names)} "
            chosen.content += f"<{module.name}{inner.attributes}>{inner.content}</{module.name}>"
            chosen.names.append(module.name)
            chosen.inside[module.name] = inner
    return chosen


def check_included(included: Included, scope: Scope, chosen: Chosen) -> None:
    assert included.scope is scope
    flat: list[Any] = []

    def walk(nodes: tuple[SchemaNode, ...]) -> None:
        for node in nodes:
            if isinstance(node, Role):
                flat.append(("start", node))
                walk(node.children)
                flat.append(("end", node))
            elif not isinstance(node, Module | Union):
                flat.append(node)

    walk(scope.children)

    def own(item: Item) -> Any:
        if isinstance(item, RoleStart | RoleEnd):
            return ("start" if isinstance(item, RoleStart) else "end", item.node)
        return item.parameter if isinstance(item, Argument) else item

    assert [own(item) for item in included.items if not isinstance(item, Included | NewText | Turn)] == flat
    assert all(item.value == f"v-{item.parameter.name}" for item in included.items if isinstance(item, Argument))
    inside = [item for item in included.items if isinstance(item, Included)]
    assert [item.scope.name for item in inside] == chosen.names
    known = modules_of(scope)
    for item in inside:
        check_included(item, known[item.scope.name], chosen.inside[item.scope.name])


def texts_in(scope: Scope, chosen: Chosen) -> list[Text]:
    """Every text of the schema that a prompt includes, in no particular order."""
    known = modules_of(scope)
    inner = [text for name, inside in chosen.inside.items() for text in texts_in(known[name], inside)]
    return [node for node in walk_own(scope.children) if isinstance(node, Text)] + inner


def walk_own(nodes: tuple[SchemaNode, ...]) -> list[SchemaNode]:
    return [own for node in nodes for own in (walk_own(node.children) if isinstance(node, Role) else [node])]


def read(included: Included) -> list[Text | NewText | Turn]:
    read_items: list[Text | NewText | Turn] = []
    for item in included.items:
        if isinstance(item, Included):
            read_items += read(item)
        elif isinstance(item, Text | NewText | Turn):
            read_items.append(item)
    return read_items


@quick
@given(scopes(), st.data(), st.booleans())
def test_a_prompt_drawn_from_a_schema_resolves(nodes: list, data: st.DataObject, with_turn: bool) -> None:
    schema = parse_schema(source_of(nodes))
    chosen = st.composite(lambda draw: choose(draw, schema))
    picked: Chosen = data.draw(chosen())
    turn = "<user>go</user>" if with_turn else ""
    prompt = parse_prompt(f"<prompt schema='s'{picked.attributes}>{picked.content}{turn}</prompt>")
    root = resolve(prompt, schema)
    check_included(root, schema, picked)
    items = read(root)
    texts = [item for item in items if isinstance(item, Text)]
    assert len(texts) == len({id(text) for text in texts})
    assert {id(text) for text in texts} == {id(text) for text in texts_in(schema, picked)}
    assert [item.text for item in items if isinstance(item, Turn)] == ["go"] * with_turn
    assert not with_turn or isinstance(items[-1], Turn)


# ---- nothing but PMLError --------------------------------------------------------------------------------


def assert_only_pml_errors(parse: Callable[..., Any], data: str | bytes) -> Any:
    try:
        return parse(data)
    except PMLError as error:
        assert error.line is not None and error.line >= 1
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return None


PIECES = st.sampled_from(
    [
        *(f"<{tag}>" for tag in PML_TAGS),
        *(f"</{tag}>" for tag in PML_TAGS),
        *("<schema name='s'>", "<prompt schema='s'>", "<module name='a'>", "<union scaffold='a'>", "<module src='a'/>"),
        *("<parameter name='p' length='2'/>", "<!--", "-->", "<![CDATA[", "]]>", "<?x", "?>", "<!DOCTYPE a [", "]>"),
        *("&", "&a;", "&#9;", "&#xD800;", "<a:b xmlns:a='u'/>", " xml:space='preserve'", "'", '"', "=", "\0", "\r\n"),
        *("\x1b", "\u2028", "\ud800", "<?xml version='1.0' encoding='utf-16'?>", "\ufeff", "<!ENTITY a 'b'>", "%a;"),
    ]
)


@quick
@given(st.binary(max_size=200) | st.text(st.characters(), max_size=100) | st.lists(PIECES, max_size=15).map("".join))
def test_nothing_but_pml_errors(data: str | bytes) -> None:
    assert_only_pml_errors(parse_schema, data)
    assert_only_pml_errors(parse_prompt, data)


PROMPT = """<prompt schema="kitchen" guest="Ann">
  <pantry owner="me"><sugar/><coal/> and <clock/></pantry> then <soup many="2"/><wine/>
  <late/><user>Go!</user><assistant/></prompt>"""


def mutated(draw: st.DrawFn, source: str) -> str:
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(source)))
        end = min(len(source), start + draw(st.integers(0, 12)))
        other = draw(st.integers(0, len(source)))
        put = draw(st.just("") | PIECES | TEXTS | st.just(source[other : other + 30]))
        source = source[:start] + put + source[end:]
    return source


@quick
@given(st.data())
def test_mutated_documents_give_trees_or_pml_errors(data: st.DataObject) -> None:
    schema = parse_schema(SCHEMA)
    changed = data.draw(st.composite(lambda draw: (mutated(draw, SCHEMA), mutated(draw, PROMPT)))())
    other = assert_only_pml_errors(parse_schema, changed[0])
    prompt = assert_only_pml_errors(parse_prompt, changed[1])
    assert other is None or isinstance(other, Schema)
    for one in (schema, other):
        if prompt is not None and one is not None:
            assert_only_pml_errors(lambda _, one=one: resolve(prompt, one), "")


@quick
@given(st.text(CHARACTERS, max_size=20))
def test_folding_keeps_the_inside_and_settles_at_once(text: str) -> None:
    folded = fold_space(text, preserve=False)
    assert folded.strip(" \t\r\n") == text.strip(" \t\r\n")
    assert fold_space(folded, preserve=False) == folded
    assert fold_space(text, preserve=True) == text
    assert (folded == "") == is_blank(text)


@quick
@given(st.text(st.sampled_from(LETTERS + ":² \n"), max_size=6) | st.text(max_size=3))
def test_every_legal_module_name_can_be_referred_to(name: str) -> None:
    if flaw(name, as_tag=True) is None:
        schema = parse_schema(f"<schema name='s'><module name='{name}'>x</module></schema>")
        root = resolve(parse_prompt(f"<prompt schema='s'><{name}/></prompt>"), schema)
        assert [item.scope.name for item in root.items if isinstance(item, Included)] == [name]
