"""How much exactness a prompt buys, and for how much time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from cpucache.errors import InputError
from cpucache.layout import Refresh, SchemaLayout
from cpucache.layout.recompute import Relevance
from cpucache.pml.tree import Module, Role, Schema, Scope, Union

Level: TypeAlias = Literal["fast", "balanced", "high"]


@dataclass(frozen=True)
class Tuning:
    """What is done about modules that have not seen one another.

    ``link_tokens``: the first so many tokens of each are evaluated afresh behind what stands before it in the prompt.
    ``recompute``: this share (0 to 1) of their tokens, chosen by ``layout.recompute``. ``exact``: whether
    every combination of them is evaluated as a whole instead, with nothing left to make up for.
    """

    link_tokens: int = 0
    recompute: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.link_tokens < 0:
            raise InputError(f"link_tokens={self.link_tokens}: must be 0 or more")
        if not 0 <= self.recompute <= 1:
            raise InputError(f"recompute={self.recompute}: must be a share, from 0 to 1")

    def refresh(self, layout: SchemaLayout, relevance: Relevance) -> Refresh | None:
        """What is evaluated afresh in a prompt of this schema; ``None``: nothing.

        A module's own ``link`` counts before the call's, the call's before the schema's.
        """
        links = dict(_links(layout.schema, ""))
        rule = relevance.rule(self.recompute) if self.recompute else None
        if not (self.link_tokens or rule or any(links.values())):
            return None
        return Refresh(self.link_tokens, links, rule)


# Set by the evaluation in bench/RESULTS.md.
LEVELS: dict[Level, Tuning] = {
    "fast": Tuning(),
    "balanced": Tuning(recompute=0.1),
    "high": Tuning(exact=True),
}
DEFAULT: Level = "fast"


def tuning_of(
    schema: Schema, level: Level | None = None, link_tokens: int | None = None, recompute: float | None = None
) -> Tuning:
    """Settings of a call: what it says, else what the schema says, else those of its level (default: fast)."""
    if level is not None and level not in LEVELS:
        raise InputError(f"fidelity={level!r}: must be one of {', '.join(LEVELS)}")
    base = LEVELS[level or DEFAULT]
    if link_tokens is None:
        link_tokens = base.link_tokens if schema.link is None else schema.link
    return Tuning(link_tokens, base.recompute if recompute is None else recompute, base.exact)


def _links(scope: Scope, path: str) -> list[tuple[str, int]]:
    """The modules that have link tokens of their own, by dotted path."""
    found: list[tuple[str, int]] = []
    todo = list(scope.children)
    while todo:
        node = todo.pop()
        if isinstance(node, Role):
            todo += node.children
        elif isinstance(node, Union):
            todo += node.members
        elif isinstance(node, Module):
            name = f"{path}.{node.name}" if path else node.name
            if node.link is not None:
                found.append((name, node.link))
            found += _links(node, name)
    return found
