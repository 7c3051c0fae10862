"""Keeping: slices that stay for a time, whatever else needs room, because a client marked what they are of."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from cpucache.store import Store


class Keeper:
    """Holds slices until their time is over. For one event loop.

    At most half of the room that the store has in memory, and on disk, is held: what is marked beyond that is kept as
    all else is.

    Args:
        store: Where the slices are.
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
        """How much is held."""
        return sum(self._sizes.values())

    def __len__(self) -> int:
        return len(self._until)

    def keep(self, keys: Iterable[str], seconds: float) -> None:
        """Hold slices for so many seconds from now, and those that are held already no shorter than they were."""
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
        """Let go of everything."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._let_go(list(self._until))

    def _let_go(self, keys: list[str]) -> None:
        self._store.let_go(keys)
        for key in keys:
            del self._until[key], self._sizes[key]

    def _wait(self) -> None:
        """Wait for the first whose time is over."""
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
