"""Gathering the mistakes in a document, so that all of them can be told at once."""

from __future__ import annotations

from typing import NoReturn

from cpucache.errors import PMLError

MOST_PROBLEMS = 100
"""A document with as many mistakes as this is not read on."""


class Problems:
    """Problems found so far in one document."""

    def __init__(self, file: str) -> None:
        self.file = file
        self._found: list[PMLError] = []

    def report(self, message: str, line: int | None, column: int | None = None) -> None:
        """Keep a mistake; the reading goes on. Raises like ``check`` once there are too many."""
        self._found.append(PMLError(message, file=self.file, line=line, column=column))
        if len(self._found) >= MOST_PROBLEMS:
            self.check()

    def stop(self, message: str, line: int | None, column: int | None = None) -> NoReturn:
        """Raise a mistake that the document can't be read on behind, with those kept so far."""
        self._found.append(PMLError(message, file=self.file, line=line, column=column))
        self.check()
        raise AssertionError  # check() raises

    def check(self) -> None:
        """Raise the first mistake, by line, with the others as its ``others``; nothing is done if there is none."""
        if self._found:
            first, *others = sorted(self._found, key=lambda error: error.line or 0)
            first.others = tuple(others)
            raise first
