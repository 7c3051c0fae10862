"""Slices that this process put into a store, by content and by context: the index lists them later, or never."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from cpucache.store.slicefile import SliceInfo

FORGET_EVERY = 1000
"""Number of added slices after which those that need not be kept are removed."""
_Known = TypeVar("_Known")


class Recent:
    """Slices that were put into a store by this process. May be used from several threads.

    Args:
        keep: Returns, for a key, whether the slice must still be found here.
    """

    def __init__(self, keep: Callable[[str], bool]) -> None:
        self._retained = keep
        self._lock = threading.Lock()
        self._by_content: dict[str, dict[str, SliceInfo]] = {}
        self._after: dict[str, dict[str, int]] = {}  # by context: key and tokens of each slice
        self._since = 0  # slices added since the last removal

    def add(self, key: str, info: SliceInfo) -> None:
        """Adds a slice; every ``FORGET_EVERY`` slices, removes those that need not be kept."""
        with self._lock:
            self._by_content.setdefault(info.content, {})[key] = info
            self._after.setdefault(info.context, {})[key] = info.tokens
            self._since += 1
            if self._since >= FORGET_EVERY:
                self._since = 0
                _sweep(self._by_content, self._retained)
                _sweep(self._after, self._retained)

    def know(self, key: str, info: SliceInfo) -> None:
        """Lets an existing slice also be found by the content key in ``info``."""
        with self._lock:
            self._by_content.setdefault(info.content, {}).setdefault(key, info)

    def of(self, content: str, there: Callable[[str], bool]) -> dict[str, SliceInfo]:
        """Slices with a content key, by key; removes those for which ``there`` returns False."""
        with self._lock:
            slices = self._by_content.get(content, {})
            for key in [key for key in slices if not there(key)]:
                del slices[key]
            return dict(slices)

    def sizes_after(self, context: str) -> set[int]:
        """Lengths, in tokens, of the slices that were evaluated in a context, given by its key."""
        with self._lock:
            return set(self._after.get(context, {}).values())


def _sweep(known: dict[str, dict[str, _Known]], keep: Callable[[str], bool]) -> None:
    """Removes from each group the slices that need not be kept, and empty groups."""
    for name, slices in list(known.items()):
        for key in [key for key in slices if not keep(key)]:
            del slices[key]
        if not slices:
            del known[name]
