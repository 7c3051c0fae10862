"""Repeated measurements of one quantity."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass
class Series:
    """Measured times in milliseconds."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median in milliseconds."""
        return median(self.values)

    def as_dict(self) -> dict[str, Any]:
        """Returns median, minimum, maximum and count for ``--json``."""
        return {
            "median_ms": round(self.median, 3),
            "min_ms": round(min(self.values), 3),
            "max_ms": round(max(self.values), 3),
            "runs": len(self.values),
        }
