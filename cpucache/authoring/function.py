"""A Python function as the compiler reads it: its source, the values of its names, and lengths of its parameters."""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from types import FunctionType
from typing import Any, get_args

from cpucache.authoring.source import Written, typed, written
from cpucache.errors import PMLError

DEFAULT_LENGTH = 32
"""Tokens reserved for an argument without ``MaxTokens``."""
UNKNOWN = object()
"""Stands for a value that is not known before a call."""


@dataclass(frozen=True)
class MaxTokens:
    """Maximum length of an argument in tokens, in its annotation: ``name: Annotated[str, MaxTokens(8)]``."""

    tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.tokens, int) or not 1 <= self.tokens <= 999_999_999:
            raise ValueError(f"MaxTokens({self.tokens!r}): must be a number of tokens from 1 to 999999999")


class Function:
    """A Python function with its signature and source."""

    def __init__(self, function: FunctionType) -> None:
        self.python = function
        self._typed = typed(function)
        self.signature = _signature(function)

    @property
    def name(self) -> str:
        """Name of the function in Python."""
        return self.python.__name__

    @property
    def file(self) -> str:
        """File of the function, as errors name it."""
        return self.python.__code__.co_filename

    @property
    def line(self) -> int:
        """Line of the file in which the function, with its decorators, begins."""
        return self.python.__code__.co_firstlineno

    @cached_property
    def written(self) -> Written:
        """Source of the function. Raises ``PMLError`` if the source can't be read."""
        return written(self.python, self._typed)

    def _closed(self) -> Iterator[tuple[str, Any]]:
        for name, cell in zip(self.python.__code__.co_freevars, self.python.__closure__ or (), strict=True):
            try:
                yield name, cell.cell_contents
            except ValueError:  # not assigned yet
                continue

    def names(self) -> dict[str, Any]:
        """Returns the current values of the global and enclosing names that the function can read."""
        return {**self.python.__globals__, **dict(self._closed())}

    def find(self, name: str) -> Any:
        """Returns the current value of a name outside the function, or ``UNKNOWN``."""
        if name in self.python.__code__.co_freevars:
            return dict(self._closed()).get(name, UNKNOWN)
        return self.python.__globals__.get(name, getattr(builtins, name, UNKNOWN))

    def length(self, annotation: Any, line: int) -> int | None:
        """Returns the tokens that an annotation allows; ``None`` without ``MaxTokens``.

        Raises ``PMLError`` for an annotation that can't be evaluated.
        """
        while isinstance(annotation, str):
            if "MaxTokens" not in annotation and "Annotated" not in annotation:
                return None
            try:
                annotation = eval(annotation, self.names())
            except Exception as error:
                reason = f"the annotation {annotation!r} can't be evaluated ({error}): import what it names"
                raise PMLError(reason, file=self.file, line=line) from error
        return _length(annotation)


def _signature(function: FunctionType) -> inspect.Signature:
    if sys.version_info >= (3, 14):
        import annotationlib

        # Annotations may use names that are imported for type checkers only.
        return inspect.signature(function, annotation_format=annotationlib.Format.FORWARDREF)
    return inspect.signature(function)


def _length(annotation: Any) -> int | None:
    found = [each.tokens for each in getattr(annotation, "__metadata__", ()) if isinstance(each, MaxTokens)]
    inner = (_length(each) for each in get_args(annotation))
    return found[0] if found else next((length for length in inner if length), None)


def constant(value: Any, depth: int = 8) -> Any:
    """Returns a copy of a value that is the same in every process; ``UNKNOWN`` for any other value.

    Such values are texts, numbers, booleans, ``None``, and collections of these, nested up to ``depth`` levels.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if type(value) in (list, tuple, dict) and depth:
        inside = [*value, *value.values()] if isinstance(value, dict) else list(value)
        return deepcopy(value) if all(constant(each, depth - 1) is not UNKNOWN for each in inside) else UNKNOWN
    return UNKNOWN


def same(one: Any, other: Any) -> bool:
    """Whether two values have the same type and ``repr``, and so the same text."""
    return type(one) is type(other) and repr(one) == repr(other)
