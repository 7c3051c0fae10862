"""The account of a store: what it holds, its budgets, and how often its slices were used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Account:
    """What a store holds at the moment, and its totals since its folder was created. Sizes are in bytes."""

    ram_slices: int
    ram_bytes: int
    ram_budget: int
    slices: int = 0
    """Slices on disk. This and ``bytes``, ``budget`` and ``evicted`` are 0 for a store without a folder."""
    bytes: int = 0
    budget: int = 0
    hits: int = 0
    """Requested slices that the store had; ``misses``: that it lacked, and that were evaluated."""
    misses: int = 0
    evicted: int = 0
    """Slices that were deleted from disk to make room for others."""
    seconds_saved: float = 0.0
    """Seconds of evaluation that the hits saved."""

    @property
    def hit_rate(self) -> float | None:
        """Share of hits among the requested slices, 0 to 1; ``None`` before the first request."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    def with_disk(self, slices: int, budget: int, totals: Mapping[str, float]) -> Account:
        """Copy of this account with ``slices`` on disk, their ``budget`` in bytes, and the totals of the index."""
        return replace(
            self,
            slices=slices,
            bytes=int(totals["bytes"]),
            budget=budget,
            hits=self.hits + int(totals["hits"]),
            misses=self.misses + int(totals["misses"]),
            evicted=int(totals["evicted"]),
            seconds_saved=totals["seconds_saved"],
        )
