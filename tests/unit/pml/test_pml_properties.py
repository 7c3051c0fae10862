"""Properties of the language: whatever is written comes back, whatever is valid resolves, nothing crashes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cpucache.errors import PMLError
from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.names import flaw
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
)
from cpucache.pml.xml import fold_space, is_blank
from tests.support.documents import CHARACTERS, LETTERS, PIECES, TEXTS, Chosen, choose, scopes, source_of
from tests.support.kitchen import PROMPT, SCHEMA
from tests.support.tries import tries

quick = tries(150)


# ---- a schema as plain tuples, and how it is written --------------------------------------------------


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


def all_written(nodes: list[Any]) -> list[Any]:
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


@quick
@given(scopes())
def test_a_schema_comes_back_as_it_was_written(nodes: list[Any]) -> None:
    schema = parse_schema(source_of(nodes))
    assert [came_back(node) for node in schema.children[2:]] == all_written(nodes)


# ---- prompts drawn from a schema ----------------------------------------------------------------------


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
def test_a_prompt_drawn_from_a_schema_resolves(nodes: list[Any], data: st.DataObject, with_turn: bool) -> None:
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


@quick
@given(st.binary(max_size=200) | st.text(st.characters(), max_size=100) | st.lists(PIECES, max_size=15).map("".join))
def test_nothing_but_pml_errors(data: str | bytes) -> None:
    assert_only_pml_errors(parse_schema, data)
    assert_only_pml_errors(parse_prompt, data)


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
