"""Keeping: protects slices of prompts that a client marked from eviction for a time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from cpucache.store import Store


class Keeper:
    """Holds slices in the store until their time is over. All calls must come from one event loop.

    Held slices take at most half of the store's smaller budget, RAM or disk. Slices beyond that are not held and can
    be evicted like any other.

    Args:
        store: The store that has the slices.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._until: dict[str, float] = {}
        self._sizes: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        rooms = [store.ram.budget, *([store.disk_budget] if store.writable else [])]
        self._room = min(rooms) // 2

    @property
    def bytes(self) -> int:
        """Size of the held slices in bytes."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._until)

    def keep(self, keys: Iterable[str], seconds: float) -> None:
        """Holds slices for ``seconds`` from now. A slice that is held for longer already keeps its time."""
        until, held = time.monotonic() + seconds, self.bytes
        for key in keys:
            if key not in self._until:
                size = self._store.size(key)
                if not size or held + size > self._room:
                    continue
                held += size
                self._sizes[key] = size
                self._store.hold([key])
            self._until[key] = max(until, self._until.get(key, 0.0))
        self._wait()

    def close(self) -> None:
        """Releases all slices."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._let_go(list(self._until))

    def _let_go(self, keys: list[str]) -> None:
        self._store.let_go(keys)
        for key in keys:
            del self._until[key], self._sizes[key]

    def _wait(self) -> None:
        """Sets the timer to the next expiry."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._until:
            delay = max(0.0, min(self._until.values()) - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(delay, self._expire)

    def _expire(self) -> None:
        self._timer = None
        now = time.monotonic()
        self._let_go([key for key, until in self._until.items() if until <= now])
        self._wait()
