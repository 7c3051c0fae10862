"""Which tokens of a slice are evaluated afresh when it is spliced behind text that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cpucache.layout.segment import Runs, Segment


@dataclass
class Refresh:
    """For one plan: asked for each of its slices, in order.

    ``link``: the first so many tokens of each module (EPIC's LegoLink: they would else act as the beginning of a text
    of their own, and draw attention as such); ``links`` says otherwise for modules by their dotted path, and for what
    is inside them. ``choose``: more of them, by whatever rule.
    """

    link: int = 0
    links: Mapping[str, int] = field(default_factory=dict)
    choose: Callable[[Segment], Runs] | None = None

    def __post_init__(self) -> None:
        self._left: dict[str, int] = {}

    def runs(self, segment: Segment, size: int, *, exact: bool) -> Runs:
        """What to evaluate of the first ``size`` tokens of a slice.

        Nothing when it has seen all that stands before it (``exact``).
        """
        left = self._left.setdefault(segment.module, self._link_of(segment.module))
        linked = min(left, size)
        self._left[segment.module] -= linked
        if exact:
            return ()
        chosen = self.choose(segment) if self.choose else ()
        return _merged([(0, linked), *((begin, min(end, size)) for begin, end in chosen)])

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
