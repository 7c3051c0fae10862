"""The grammars that ship with the package: they and the parsers take the same documents."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from cpucache.errors import PMLError
from cpucache.pml import parse_prompt, parse_schema
from cpucache.pml.names import PML_TAGS
from cpucache.pml.structure import GRAMMARS, structure
from cpucache.pml.tree import Prompt, Schema
from tests.support.documents import TEXTS, changed, choose, scopes, source_of
from tests.support.kitchen import PROMPT
from tests.support.tries import tries

ROOT = Path(__file__).parents[3]
RELAX = {name: etree.RelaxNG(file=str(GRAMMARS / f"{name}.rng")) for name in ("schema", "prompt")}
PARSE: dict[str, Callable[[str], Schema | Prompt]] = {"schema": parse_schema, "prompt": parse_prompt}

BEYOND = re.compile(
    "duplicate (module|parameter) name"
    "|is not a member of its union"
    "|there is no module .* in the schema"
    "|the scaffold names .* twice|a scaffold needs two modules or more, this one names 1$"
    "|holds the same modules as"
    "|which the scaffold must name, too|are members of one union|so it has no state to encode"
    "|^src="
    "|the schema .* is empty"
    "|nested more than 100 deep|has more than 1000 attributes"
)
"""What the parser reports and a grammar can't know."""


def mistakes(name: str, data: str) -> list[str]:
    """What the parser has against a document."""
    try:
        PARSE[name](data)
    except PMLError as error:
        return [each.reason for each in (error, *error.others)]
    return []


def valid(name: str, root: etree._Element) -> bool:
    """What the grammar says of a document."""
    return bool(RELAX[name].validate(etree.fromstring(etree.tostring(root, encoding="unicode"))))


def agree(name: str, root: etree._Element) -> bool:
    """Whether the parser says the same as the grammar, as far as a grammar can tell."""
    told = mistakes(name, etree.tostring(root, encoding="unicode"))
    if valid(name, root):
        return all(BEYOND.search(reason) for reason in told)
    return bool(told)


NAMES = st.sampled_from(["a", "b", "9", "-", "é名", "xml-a", "a b", "", "n" * 101, "schema", "user", "a.b", "𐀀"])
VALUES = NAMES | st.sampled_from(
    ["true", "false", " true", "none", "ancestors", "0", "7", "07", "1" * 9, "1" * 10, "a b"]
)
ATTRIBUTES = ("name", "length", "scaffold", "cache", "isolate", "src", "anchor", "modules", "schema", "other")
SPACE = "{http://www.w3.org/XML/1998/namespace}space"
WHERE = (*ATTRIBUTES, SPACE, f"{SPACE[:-5]}lang")
TAGS = (*PML_TAGS, "modul", "a")


def change(draw: st.DrawFn, root: etree._Element) -> None:
    """Change one thing about a document, which stays well-formed."""
    nodes = [node for node in root.iter() if isinstance(node.tag, str)]
    node = draw(st.sampled_from(nodes))
    kind = draw(st.sampled_from(["tag", "set", "set", "unset", "text", "tail", "add", "copy", "remove"]))
    if kind == "tag":
        node.tag = draw(st.sampled_from(TAGS))
    elif kind == "set":
        present = sorted(set(node.attrib)) or list(WHERE)
        node.set(draw(st.sampled_from(WHERE) | st.sampled_from(present)), draw(VALUES | st.just("preserve")))
    elif kind == "unset" and node.attrib:
        del node.attrib[draw(st.sampled_from(sorted(node.attrib)))]
    elif kind == "text":
        node.text = draw(st.sampled_from(["x", " ", "\n", None]))
    elif kind == "tail" and node is not root:
        node.tail = draw(st.sampled_from(["x", " ", "\n", None]))
    elif kind == "add":
        node.insert(draw(st.integers(0, len(node))), etree.Element(draw(st.sampled_from(TAGS))))
    elif kind == "copy":
        copied = etree.fromstring(etree.tostring(draw(st.sampled_from(nodes)), with_tail=False, encoding="unicode"))
        node.insert(draw(st.integers(0, len(node))), copied)
    elif kind == "remove" and node is not root:
        node.getparent().remove(node)


def document(draw: st.DrawFn) -> tuple[str, etree._Element]:
    schema = source_of(draw(scopes()))
    if draw(st.booleans()):
        names = re.findall("<module name='([^']+)'", schema)
        scaffold = (
            f"<scaffold modules='{' '.join(draw(st.lists(st.sampled_from(names), max_size=3)))}'/>" if names else ""
        )
        return "schema", etree.fromstring(schema.replace("</schema>", scaffold + "</schema>"))
    picked = draw(st.composite(lambda draw: choose(draw, parse_schema(schema)))())
    turn = draw(st.sampled_from(["", "<user>go</user>", "<system/> <assistant>x</assistant>"]))
    written = f"<prompt schema='s'{picked.attributes}>{picked.content}{turn}</prompt>"
    return "prompt", etree.fromstring(draw(st.sampled_from([written, PROMPT])))


@tries(50)
@given(scopes(), st.data())
def test_what_is_written_by_the_rules_is_valid(nodes: list[Any], data: st.DataObject) -> None:
    schema = source_of(nodes)
    assert valid("schema", etree.fromstring(schema))
    assert not mistakes("schema", schema)
    picked = data.draw(st.composite(lambda draw: choose(draw, parse_schema(schema)))())
    prompt = etree.fromstring(f"<prompt schema='s'{picked.attributes}>{picked.content}</prompt>")
    assert valid("prompt", prompt)
    assert agree("prompt", prompt)


@tries(120)
@given(st.data())
def test_grammar_and_parser_take_the_same_documents(data: st.DataObject) -> None:
    name, root = data.draw(st.composite(document)())
    for _ in range(6):
        data.draw(st.composite(lambda draw: change(draw, root))())
        assert agree(name, root), etree.tostring(root, encoding="unicode")
    # A prompt is no schema.
    assert agree("prompt" if name == "schema" else "schema", root), etree.tostring(root, encoding="unicode")


@tries(300)
@given(st.composite(changed)())
def test_grammar_and_parser_take_the_same_of_changed_bytes(data: bytes) -> None:
    try:
        root = etree.fromstring(data, etree.XMLParser(resolve_entities=False, no_network=True))
    except (etree.XMLSyntaxError, ValueError):
        return  # which the parser finds by the same library
    beyond = (etree._ProcessingInstruction, etree._Entity)
    if any(isinstance(node, beyond) or node.nsmap for node in root.iter()):
        return  # what PML has no use for, whatever the grammar says
    for name in ("schema", "prompt"):
        assert agree(name, root), etree.tostring(root, encoding="unicode")


@tries(100)
@given(TEXTS)
def test_any_text_may_stand_in_a_module(text: str) -> None:
    root = etree.fromstring("<schema name='s'><module name='a'/></schema>")
    root[0].text = text.replace("\r", "")
    assert valid("schema", root)
    assert agree("schema", root)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "schemas").rglob("*.xml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_examples_are_valid(path: Path) -> None:
    root = etree.parse(str(path)).getroot()
    assert RELAX[str(root.tag)].validate(root), RELAX[str(root.tag)].error_log


def test_the_parser_knows_every_tag_from_the_grammar() -> None:
    seen: set[str] = set()

    def walk(shape: object, done: set[int]) -> None:
        if id(shape) not in done:
            done.add(id(shape))
            seen.update(shape.tags)  # type: ignore[attr-defined]
            for part in shape.parts:  # type: ignore[attr-defined]
                for inner in part.shapes:
                    walk(inner, done)

    for name in ("schema", "prompt"):
        walk(structure(name), set())
    assert seen == set(PML_TAGS)


def test_the_compact_grammars_are_those_of_today() -> None:
    spec = importlib.util.spec_from_file_location("compact", ROOT / "scripts" / "compact_grammar.py")
    assert spec and spec.loader
    compact = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compact)
    grammars = sorted(GRAMMARS.glob("*.rng"))
    assert [grammar.stem for grammar in grammars] == ["prompt", "schema"]
    for grammar in grammars:
        assert grammar.with_suffix(".rnc").read_text(encoding="utf-8").startswith(compact.heading(grammar))
