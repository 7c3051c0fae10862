"""Which tokens of a slice are evaluated afresh when it is spliced behind text that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cpucache.layout.segment import Runs, Segment
from cpucache.layout.vocabulary import Tokens


@dataclass(frozen=True)
class Reused:
    """A slice of a plan: the first ``size`` tokens of a segment.

    ``exact``: it has seen all that stands before it, and nothing else.
    """

    segment: Segment
    size: int
    exact: bool


Rule: TypeAlias = Callable[[Sequence[Reused], Sequence[Tokens]], Mapping[Segment, Runs]]
"""Chooses tokens of the slices of a plan, none of them exact, for the new text that it brings."""


@dataclass(frozen=True)
class Refresh:
    """What to evaluate afresh.

    ``link``: the first so many tokens of each module (EPIC's LegoLink: they would else act as the beginning of a text
    of their own, and draw attention as such); ``links`` says otherwise for modules by their dotted path, and for what
    is inside them. ``rule``: more of them.
    """

    link: int = 0
    links: Mapping[str, int] = field(default_factory=dict)
    rule: Rule | None = None

    def runs(self, reused: Sequence[Reused], new: Sequence[Tokens]) -> list[Runs]:
        """What to evaluate of each slice of a plan that brings ``new`` text: nothing of those that are exact."""
        chosen = self.rule([each for each in reused if not each.exact], new) if self.rule else {}
        left: dict[str, int] = {}
        runs: list[Runs] = []
        for each in reused:
            module = each.segment.module
            linked = min(left.setdefault(module, self._link_of(module)), each.size)
            left[module] -= linked
            more = [(begin, min(end, each.size)) for begin, end in chosen.get(each.segment, ())]
            runs.append(() if each.exact else _merged([(0, linked), *more]))
        return runs

    def _link_of(self, module: str) -> int:
        path = module
        while path:
            if path in self.links:
                return self.links[path]
            path = path.rpartition(".")[0]
        return self.links.get("", self.link)


def _merged(runs: list[tuple[int, int]]) -> Runs:
    """Without overlaps, in order."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(runs):
        if begin >= end:
            continue
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return tuple(merged)
