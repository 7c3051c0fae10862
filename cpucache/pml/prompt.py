"""Prompts: parses XML into a tree of module references, arguments, text and turns as written.

This module does not use a schema: ``resolve`` checks a prompt against its schema.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from cpucache.pml.limits import Limits
from cpucache.pml.names import flaw, quote, tag
from cpucache.pml.structure import Part, Shape, structure
from cpucache.pml.tree import ROLES, Prompt, Reference, RoleName, Text, Turn
from cpucache.pml.xml import Element, is_blank, read_file, read_xml
from cpucache.stages import stage

_HEAD = re.compile(r"\ufeff?\s*(<\?xml.*?\?>\s*)?(<!--.*?-->\s*)*<prompt[\s/>]", re.DOTALL)


def is_prompt(text: str) -> bool:
    """Whether ``text`` is a PML prompt: ``<prompt>`` is its first tag, after a declaration and comments at most."""
    return _HEAD.match(text) is not None


def load_prompt(path: Path, limits: Limits | None = None) -> Prompt:
    """Parses the prompt in the file ``path``. Raises like ``parse_prompt``."""
    limits = limits or Limits()
    with stage("parse"):
        return parse_prompt(read_file(path, limits), file=str(path), limits=limits)


def parse_prompt(data: str | bytes, *, file: str = "<prompt>", limits: Limits | None = None) -> Prompt:
    """Parses a prompt. ``file`` is its name in error messages.

    Raises ``PMLError`` for mistakes under any schema and for documents that exceed ``limits``. Its ``others`` are the
    further mistakes; only XML that is not well-formed ends the search for them.
    """
    with stage("parse"):
        return _parsed(data, file, limits or Limits())


def _parsed(data: str | bytes, file: str, limits: Limits) -> Prompt:
    root = read_xml(data, file=file, root="prompt", limits=limits)
    shape = structure("prompt")
    root.check_attributes(shape)
    arguments = dict(root.attributes)
    schema = arguments.pop("schema", "")
    if "schema" in root.attributes and (problem := flaw(schema)):
        root.report(f"illegal schema name {quote(schema)}: {problem}")
    before, after = shape.parts
    children: list[Reference | Text | Turn] = []
    turn: Turn | None = None
    for child in root.children:
        known = None if isinstance(child, Text) else after.find(child.tag)
        node = child if isinstance(child, Text) else _turn(child, known) if known else _reference(child, before)
        if isinstance(node, Turn):
            turn = node
        elif turn is not None:
            if isinstance(node, Text) and is_blank(node.text):
                continue  # kept by xml:space="preserve", but it belongs to no text here
            what = "text" if isinstance(node, Text) else tag(node.name)
            root.report(f"{what} after <{turn.role}> (line {turn.line}): turns come last in a prompt", node.line)
        children.append(node)
    root.problems.check()
    return Prompt(schema, arguments, tuple(children), file, root.line)


def _turn(element: Element, shape: Shape) -> Turn:
    element.check_attributes(shape)
    text = ""
    for child in element.children:
        if isinstance(child, Text):
            text = child.text  # comments do not split text, so there is only one
        elif shape.part.find(child.tag) is None:
            child.report(f"{tag(child.tag)} inside the turn <{element.tag}>: write references outside turns")
    return Turn(cast("RoleName", element.tag), text, element.line)


def _reference(element: Element, around: Part) -> Reference:
    shape = around.find(element.tag)
    if shape is None and element.tag in ROLES:
        element.report(f"the turn <{element.tag}> must be directly under <prompt>")
    elif shape is None:
        element.report(
            f"<{element.tag}> can't be used inside a prompt: a module is included by its name, as in <name/>"
        )
    inside = shape.part if shape else around
    children = tuple(child if isinstance(child, Text) else _reference(child, inside) for child in element.children)
    return Reference(element.tag, dict(element.attributes), children, element.line)
