"""What this process has put into a store, by content and by context: the index learns of it later, or never."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from cpucache.store.slicefile import SliceInfo

FORGET_EVERY = 1000
"""Slices that are put between two looks at what may be forgotten."""
_Known = TypeVar("_Known")


class Recent:
    """Slices that were put, until they are forgotten. May be used from several threads.

    Args:
        keep: Whether a slice, by its key, is still to be known here.
    """

    def __init__(self, keep: Callable[[str], bool]) -> None:
        self._retained = keep
        self._lock = threading.Lock()
        self._by_content: dict[str, dict[str, SliceInfo]] = {}
        self._behind: dict[str, dict[str, int]] = {}  # by context, with their sizes
        self._since = 0  # slices that were put since the rest was forgotten

    def add(self, key: str, info: SliceInfo) -> None:
        """Note a slice that was put; now and then forget those that are not to be kept."""
        with self._lock:
            self._by_content.setdefault(info.content, {})[key] = info
            self._behind.setdefault(info.context, {})[key] = info.tokens
            self._since += 1
            if self._since >= FORGET_EVERY:
                self._since = 0
                _sweep(self._by_content, self._retained)
                _sweep(self._behind, self._retained)

    def know(self, key: str, info: SliceInfo) -> None:
        """Let a slice that is there be found by the content key in ``info`` as well."""
        with self._lock:
            self._by_content.setdefault(info.content, {}).setdefault(key, info)

    def of(self, content: str, there: Callable[[str], bool]) -> dict[str, SliceInfo]:
        """The slices of some tokens, by key; those that are not ``there`` are forgotten."""
        with self._lock:
            slices = self._by_content.get(content, {})
            for key in [key for key in slices if not there(key)]:
                del slices[key]
            return dict(slices)

    def sizes_behind(self, context: str) -> set[int]:
        """How many tokens the slices have that were evaluated in a context, given by its key."""
        with self._lock:
            return set(self._behind.get(context, {}).values())


def _sweep(known: dict[str, dict[str, _Known]], keep: Callable[[str], bool]) -> None:
    """Take out of groups of slices those that are not kept, and groups without any."""
    for name, slices in list(known.items()):
        for key in [key for key in slices if not keep(key)]:
            del slices[key]
        if not slices:
            del known[name]
