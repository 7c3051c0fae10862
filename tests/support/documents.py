"""Documents of PML, drawn at random: schemas, prompts on them, and what comes of changing the text of either."""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from hypothesis import strategies as st

from cpucache.pml.names import PML_TAGS, flaw
from cpucache.pml.tree import Module, Role, SchemaNode, Scope, Union, parameters_of
from tests.support.kitchen import PROMPT, SCHEMA

# Characters that XML can hold; a carriage return comes back only as a character reference, which write_text sees to.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff") | st.sampled_from(
    "\t\n\r &<>]'\""
)
TEXTS = st.text(CHARACTERS, min_size=1, max_size=12)
LETTERS = string.ascii_letters + string.digits + "_-.éß名"
NAMES = st.text(LETTERS, min_size=1, max_size=5).filter(
    lambda name: flaw(name, as_tag=True) is None and name != "schema"
)
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
CORPUS = sorted((Path(__file__).parents[1] / "corpus" / "pml").iterdir())
SEEDS = [*(path.read_bytes() for path in CORPUS), SCHEMA.encode(), PROMPT.encode()]


# ---- a schema as plain tuples, and how it is written -----------------------------------------------------------------


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


@st.composite
def scopes(draw: st.DrawFn, depth: int = 0, in_role: bool = False) -> list[Any]:
    """The content of one scope: unique names, and no two texts side by side (they would be one)."""
    names = iter(draw(st.lists(NAMES, min_size=8, max_size=8, unique=True)))

    def module(role: bool) -> Any:
        name = next(names, None)
        inside = draw(scopes(depth + 1, role)) if depth < 2 else [("text", draw(TEXTS), False)]
        return None if name is None else ("module", name, draw(st.booleans()), inside)

    def content(role: bool) -> list[Any]:
        nodes: list[Any] = []
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


def source_of(nodes: list[Any]) -> str:
    return f"<schema name='s'>x<parameter name='first' length='1'/>{''.join(map(write, nodes))}</schema>"


# ---- prompts drawn from a schema -------------------------------------------------------------------------------------


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


# ---- broken ones -----------------------------------------------------------------------------------------------------


def changed(draw: st.DrawFn) -> bytes:
    """A document of the corpus, or half of one and half of another, with parts cut, put in, and repeated."""
    source = draw(st.sampled_from(SEEDS))
    if draw(st.booleans()):
        other = draw(st.sampled_from(SEEDS))
        source = source[: draw(st.integers(0, len(source)))] + other[draw(st.integers(0, len(other))) :]
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(source)))
        end = min(len(source), start + draw(st.integers(0, 40)))
        piece = PIECES.map(lambda text: text.encode("utf-8", "surrogatepass"))
        put = draw(st.just(b"") | piece | st.binary(max_size=8))
        times = draw(st.sampled_from((0, 1, 1, 2, 200, 20_000)))
        source = source[:start] + put + source[start:end] * times + source[end:]
    return source
