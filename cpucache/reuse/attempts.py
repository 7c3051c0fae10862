"""Attempts at operations that need slices, which may disappear from the store or be refused by llama.cpp."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import TracebackType

from cpucache.errors import CpucacheError
from cpucache.reuse.plan import Slice
from cpucache.reuse.splicer import Refused
from cpucache.runtime.context import Bytes
from cpucache.store import Store

_log = logging.getLogger("cpucache.reuse")
_FUTILE = 20  # consecutive attempts without progress before giving up


class Gone(Exception):
    """A slice has disappeared from the store: it was found damaged, or another process evicted it."""


class Attempts:
    """Iterator of attempts at an operation that needs slices, until one succeeds. Each attempt is a context manager.

    A slice that llama.cpp refuses (``Refused``) is discarded and encoded again, once. A slice that disappears before
    it was read (``Gone``) starts a new attempt. ``states`` is kept between attempts, so that each
    one gets further than the one before.

    Raises:
        CpucacheError: A slice was refused twice, or several attempts in a row got no further.
    """

    def __init__(self, store: Store) -> None:
        self.states: dict[Slice, Bytes] = {}
        """States of slices that were read or encoded, kept in memory between attempts."""
        self._store = store
        self._done = False
        self._refused: set[Slice] = set()
        self._had, self._futile = -1, 0

    def __iter__(self) -> Iterator[Attempts]:
        while not self._done:
            yield self

    def __enter__(self) -> None:
        self._done = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(error, Gone):
            self._futile = self._futile + 1 if len(self.states) == self._had else 0
            self._had = len(self.states)
            if self._futile == _FUTILE:
                raise CpucacheError(
                    "slices are evicted faster than they are encoded; give the store more room"
                ) from None
            _log.info("a planned slice is no longer in the store; planning again")
        elif isinstance(error, Refused):
            if error.slice in self._refused:
                raise CpucacheError(f"{error}, not even after it was encoded again; check the store's disk") from error
            _log.info("%s; encoding it again", error)
            self._refused.add(error.slice)
            self.states.pop(error.slice, None)
            self._store.discard(error.slice.key)
        else:
            return False
        self._done = False
        return True
