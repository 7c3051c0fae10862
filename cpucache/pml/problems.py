"""Collects the mistakes in a document, so that they are reported together."""

from __future__ import annotations

from typing import NoReturn

from cpucache.errors import PMLError

MOST_PROBLEMS = 100
"""Number of mistakes after which reading stops."""


class Problems:
    """Mistakes found so far in one document."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._found: list[PMLError] = []

    def report(self, message: str, line: int | None, column: int | None = None) -> None:
        """Records a mistake, so that reading can continue. Raises like ``check`` once there are too many."""
        self._found.append(PMLError(message, file=self.file, line=line, column=column))
        if len(self._found) >= MOST_PROBLEMS:
            self.check()

    def stop(self, message: str, line: int | None, column: int | None = None) -> NoReturn:
        """Raises like ``check``, with a mistake after which reading cannot continue and those recorded before."""
        self._found.append(PMLError(message, file=self.file, line=line, column=column))
        self.check()
        raise AssertionError  # check() raises

    def check(self) -> None:
        """Raises the first mistake, by line, with the rest as its ``others``. Does nothing if there is none."""
        if self._found:
            first, *others = sorted(self._found, key=lambda error: error.line or 0)
            first.others = tuple(others)
            raise first
