"""How much exactness a prompt buys, and for how much time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from cpucache.errors import InputError
from cpucache.layout import Refresh, SchemaLayout
from cpucache.layout.lead import LEAD
from cpucache.layout.recompute import Relevance
from cpucache.pml.tree import Module, Role, Schema, Scope, Union

Level: TypeAlias = Literal["fast", "balanced", "high"]


@dataclass(frozen=True)
class Tuning:
    """What is done about modules that have not seen one another.

    ``lead_tokens``: where the schema foresees what stands before a module, it is encoded in the sight of at least so
    many tokens of that, see ``layout.lead``. ``link_tokens``: the first so many tokens of each are evaluated afresh
    behind what stands before it in the prompt. ``recompute``: this share (0 to 1) of their tokens, chosen by
    ``layout.recompute``. ``exact``: whether every combination of them is evaluated as a whole instead, with nothing
    left to make up for.
    """

    lead_tokens: int = 0
    link_tokens: int = 0
    recompute: float = 0.0
    exact: bool = False

    def __post_init__(self) -> None:
        if self.lead_tokens < 0:
            raise InputError(f"lead_tokens={self.lead_tokens}: must be 0 or more")
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
    "fast": Tuning(lead_tokens=LEAD),
    "balanced": Tuning(lead_tokens=LEAD, recompute=0.1),
    "high": Tuning(exact=True),
}
DEFAULT: Level = "fast"


@dataclass(frozen=True)
class Fidelity:
    """How exact a prompt is wanted to be: what this leaves open, the schema or the level says.

    Raises ``InputError`` for an unknown level.
    """

    level: Level | None = None
    lead_tokens: int | None = None
    link_tokens: int | None = None
    recompute: float | None = None

    def __post_init__(self) -> None:
        if self.level is not None and self.level not in LEVELS:
            raise InputError(f"fidelity={self.level!r}: must be one of {', '.join(LEVELS)}")

    def tuning(self, schema: Schema) -> Tuning:
        """What that comes to for prompts of a schema."""
        base = LEVELS[self.level or DEFAULT]
        return Tuning(
            base.lead_tokens if self.lead_tokens is None else self.lead_tokens,
            _first(self.link_tokens, schema.link, base.link_tokens),
            base.recompute if self.recompute is None else self.recompute,
            base.exact,
        )

    def over(self, usual: Fidelity) -> Fidelity:
        """This, and where it says nothing, what is usual. A level says everything."""
        if self.level:
            return self
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(usual, **given)


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


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
