"""Random schemas with everything that decides what stands before what, and prompts drawn from them."""

from __future__ import annotations

import re
from itertools import count
from typing import Any

from hypothesis import strategies as st

from cpucache.layout import ChatTemplate, Placeholder, SchemaLayout, Segment
from cpucache.pml.tree import Module, Schema, Scope, Union
from tests.support.documents import choose
from tests.support.letters import Letters
from tests.support.prompting import written
from tests.support.tiny import CHATML

TEXTS = (
    "red",
    "green leaves",
    "the blue sea at night",
    "grey stones on a long beach in the north",
    "white ",
    " black.",
)
"""Few, so that modules with the same text occur."""
ARGUMENTS = ("", "a", "bcd", "red")
TURNS = ("", "<user>where is the blue sea?</user>", "<user>go</user><assistant>we</assistant>", "<assistant/>")


def letters() -> Letters:
    """Four characters to a token, so that any argument is at most one token long."""
    return Letters(size=4, n_ctx_train=1 << 20)


@st.composite
def schemas(draw: st.DrawFn, *, isolate: bool = True, most: int = 4) -> Schema:
    """Schemas of nested modules, unions and parameters."""
    numbers = count()

    def module(depth: int) -> str:
        attributes = draw(st.sampled_from(["", "", "", "cache='false'", *(["isolate='true'"] * isolate)]))
        return f"<module name='m{next(numbers)}' {attributes}>{scope(depth + 1)}</module>"

    def scope(depth: int) -> str:
        kinds = ["text", "text", "parameter", *(["module", "module", "union"] * (depth < 3))]
        parts = []
        for kind in draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=most)):
            if kind == "text":
                parts.append(draw(st.sampled_from(TEXTS)))
            elif kind == "parameter":
                scaffold = draw(st.sampled_from(["", "scaffold='so'"]))
                parts.append(f"<parameter name='p{next(numbers)}' length='{draw(st.integers(1, 5))}' {scaffold}/>")
            elif kind == "module":
                parts.append(module(depth))
            else:
                members = [module(depth) for _ in range(draw(st.integers(1, 3)))]
                stands = re.findall(r"^<module name='(m\d+)'", draw(st.sampled_from(members)))[0]
                attributes = draw(st.sampled_from(["", "", f"scaffold='{stands}'", *(["isolate='true'"] * isolate)]))
                parts.append(f"<union {attributes}>{''.join(members)}</union>")
        return "".join(parts)

    anchor = draw(st.sampled_from(["ancestors", "ancestors", "none"])) if isolate else "ancestors"
    return written(f"Root. {scope(0)}", f"anchor='{anchor}'")


@st.composite
def prompts(draw: st.DrawFn, schema: Schema) -> str:
    """The inside of a prompt, preceded by a tag that holds its attributes: see ``split``."""
    chosen = choose(draw, schema)
    text = f"<{chosen.attributes}>{chosen.content}{draw(st.sampled_from(TURNS))}"
    return re.sub("'v-p[0-9]+'", lambda _: f"'{draw(st.sampled_from(ARGUMENTS))}'", text)


def split(prompt: str) -> tuple[str, str]:
    """The inside of a drawn prompt, and its attributes."""
    attributes, _, inside = prompt.partition(">")
    return inside, attributes[1:]


def changed(schema: Schema, source: str, text: str) -> Schema:
    """Another version of a schema, in which one text replaces another."""
    from dataclasses import replace

    from cpucache.pml.tree import Role, Text

    def of(node: Any) -> Any:
        if isinstance(node, Text):
            return replace(node, text=node.text.replace(source, text))
        if isinstance(node, Module | Role):
            return replace(node, children=tuple(map(of, node.children)))
        if isinstance(node, Union):
            return replace(node, members=tuple(map(of, node.members)))
        return node

    return replace(schema, children=tuple(map(of, schema.children)))


def texts_of(layout: SchemaLayout) -> list[tuple[str, str, tuple[int, ...]]]:
    """Of every text of a schema: the module that it is in, the outermost isolated module around it, and its tokens."""
    found: list[tuple[str, str, tuple[int, ...]]] = []

    def walk(scope: Scope, path: str, isolated: str) -> None:
        for part in layout.outline[scope]:
            if isinstance(part, Segment | Placeholder):
                found.append((path, isolated, tuple(part.tokens.tolist())))
                continue
            for member in part.members if isinstance(part, Union) else (part,):
                inside = f"{path}.{member.name}" if path else member.name
                isolating = inside if part.isolate or member.isolate else ""
                walk(member, inside, isolated or isolating)

    walk(layout.schema, "", "")
    return found


def template(chatml: bool) -> ChatTemplate:
    """What turns are written in."""
    return ChatTemplate(CHATML if chatml else None)
