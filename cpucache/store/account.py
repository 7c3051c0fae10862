"""The account of a store: what it holds against its budgets, and how often that was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Account:
    """What a store holds, and what that has been good for since its folder was made."""

    ram_slices: int
    ram_bytes: int
    ram_budget: int
    slices: int = 0
    """Slices on disk. What lies there is 0 without a folder."""
    bytes: int = 0
    budget: int = 0
    hits: int = 0
    """Slices that were asked for and were there; ``misses``: that were not."""
    misses: int = 0
    evicted: int = 0
    """Slices that left the disk for others."""
    seconds_saved: float = 0.0
    """Seconds of evaluation that the hits have saved."""

    @property
    def hit_rate(self) -> float | None:
        """Share of the slices asked for that were there; ``None`` before any was."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    def with_disk(self, slices: int, budget: int, totals: Mapping[str, float]) -> Account:
        """The same with what lies on disk, by the totals of the index."""
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
