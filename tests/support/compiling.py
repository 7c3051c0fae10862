"""Prompt functions from their source, and the text of the prompts that they return."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from itertools import count
from typing import Any

from cpucache.pml import parse_prompt, parse_schema, resolve
from cpucache.pml.tree import Argument, Included, NewText, RoleEnd, RoleStart, Text, Turn

_numbers = count()
HEAD = "from cpucache import MaxTokens, assistant, prompt, system, user\nfrom typing import Annotated\n"


def cell(source: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run source as a notebook runs a cell: from no file, with its lines where tracebacks look for them."""
    name = f"<cell {next(_numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    names = {"__name__": "__main__"} if names is None else names
    exec(compile(source, name, "exec"), names)
    return names


def text_of(prompt: str, schema: str) -> str:
    """What a model reads of a prompt, with role tags as ``⟨system⟩`` and ``⟨/⟩``."""

    def read(included: Included) -> Iterator[str]:
        for item in included.items:
            if isinstance(item, Included):
                yield from read(item)
            elif isinstance(item, Argument):
                yield item.value
            elif isinstance(item, RoleStart):
                yield f"⟨{item.node.role}⟩"
            elif isinstance(item, RoleEnd):
                yield "⟨/⟩"
            else:
                assert isinstance(item, Text | NewText | Turn)
                yield item.text

    return "".join(read(resolve(parse_prompt(prompt), parse_schema(schema))))
