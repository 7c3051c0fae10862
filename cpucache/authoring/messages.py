"""Recorded requests as a schema of the texts that repeat in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

from cpucache.authoring.requests import Recorded, Unit
from cpucache.authoring.writing import Names, impossible, slug
from cpucache.errors import InputError
from cpucache.pml.tree import Module, Role, SchemaNode, Text

_SHORTEST = 20
"""Fewest characters of a text that becomes a module."""


@dataclass(frozen=True)
class Repeated:
    """A module. ``times``: number of requests that contain its text. ``tokens``: length of its text."""

    name: str
    role: str
    times: int
    tokens: int

    @property
    def saved(self) -> int:
        """Tokens that reuse would have saved: those of every request but the first."""
        return self.tokens * (self.times - 1)


@dataclass
class Repetition:
    """Texts that repeat in requests.

    ``conversations``: number of requests, where a request that extends another one counts as one with it.
    """

    requests: int
    conversations: int
    tokens: int = 0
    """Tokens of all requests together."""
    nodes: list[SchemaNode] = field(default_factory=list)
    modules: list[Repeated] = field(default_factory=list)

    @property
    def saved(self) -> int:
        """Tokens that reuse would have saved, of all modules together."""
        return sum(module.saved for module in self.modules)


def from_messages(requests: Sequence[Recorded], count: Callable[[str], int], *, least: int = 2) -> Repetition:
    """Returns a schema of the texts that several requests contain: tool definitions, and paragraphs of messages.

    Paragraphs that always occur together are one module. Every request of a conversation repeats the turns before it,
    so only the longest request of each conversation counts. With fewer than ``least`` conversations, all requests
    count, but only their system text.

    Args:
        requests: The requests.
        count: Returns the number of tokens of a text.
        least: Number of requests that must contain a text.

    Returns:
        The schema, and how much its modules would have saved.

    Raises:
        InputError: Nothing repeats.
    """
    ends = _ends(requests)
    # Within one conversation every request repeats the turns: only its system text is worth a module.
    single = len(ends) < least <= len(requests)
    looked = [
        [unit for unit in each.units if not single or unit.role == "system"] for each in (requests if single else ends)
    ]
    found = Repetition(len(requests), len(ends))
    found.tokens = sum(count(unit.text) for each in requests for unit in each.units)
    times = Counter(unit for units in looked for unit in set(units))
    kept = {unit for unit, number in times.items() if number >= least and not impossible(unit.text)}
    everywhere = Counter(unit for each in requests for unit in set(each.units))
    names = Names()
    runs = [run for run in _runs(looked, kept) if sum(len(unit.text) for unit in run) >= _SHORTEST]
    for role, group in groupby(runs, key=lambda run: run[0].role):
        modules = []
        for run in group:
            text = "\n\n".join(unit.text for unit in run)
            name = names.module(slug(run[0].label or _beginning(text), otherwise=role))
            modules.append(Module(name, (Text(f"{text}\n", 0),), True, 0))
            found.modules.append(Repeated(name, role, min(everywhere[unit] for unit in run), count(text)))
        found.nodes.append(Role(role, tuple(modules), 0))
    if not found.modules:
        raise InputError(f"no text of {_SHORTEST} characters or more occurs in {least} of the {len(requests)} requests")
    return found


def _ends(requests: Sequence[Recorded]) -> list[Recorded]:
    """Requests that no other request extends, without duplicates."""
    begun = {each.messages[:end] for each in requests for end in range(1, len(each.messages))}
    return list({each.messages: each for each in requests if each.messages not in begun}.values())


def _runs(looked: Sequence[Sequence[Unit]], kept: set[Unit]) -> list[tuple[Unit, ...]]:
    """Runs of kept units. The units of a run occur only together, in this order."""
    after: dict[Unit, set[Unit | None]] = {}
    before: dict[Unit, set[Unit | None]] = {}
    for units in looked:
        for one, other in pairwise([None, *units, None]):
            if one is not None:
                after.setdefault(one, set()).add(other)
            if other is not None:
                before.setdefault(other, set()).add(one)

    def follows(unit: Unit) -> Unit | None:
        """The unit that follows ``unit`` everywhere, and occurs nowhere else; ``None`` if there is none."""
        (other, *others) = after[unit]
        if others or other is None or other not in kept or unit.label or other.label or other.role != unit.role:
            return None
        return other if before[other] == {unit} else None

    runs: list[tuple[Unit, ...]] = []
    taken: set[Unit] = set()
    for unit in _ordered(looked, kept):
        if unit in taken:
            continue
        run = [unit]
        while (next_ := follows(run[-1])) is not None and next_ not in taken and next_ not in run:
            run.append(next_)
        taken.update(run)
        runs.append(tuple(run))
    return runs


def _ordered(looked: Sequence[Sequence[Unit]], kept: set[Unit]) -> list[Unit]:
    """Kept units, grouped by role, each group in the order of the request that contains most kept units."""
    order: dict[Unit, None] = {}
    for units in sorted(looked, key=lambda units: -sum(unit in kept for unit in units)):
        order.update(dict.fromkeys(unit for unit in units if unit in kept))
    ranks = {"system": 0, "user": 1, "assistant": 2}
    return sorted(order, key=lambda unit: ranks[unit.role])


def _beginning(text: str) -> str:
    return " ".join(text.split()[:5]).lower()
