"""Admission: who may have the engine answer next."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cpucache.server.failures import Refusal


class Admission:
    """Lets requests in, the keys that they come with in turn. For one event loop.

    Args:
        places: Requests that are in at a time.
        queue: Requests that may wait.
    """

    def __init__(self, places: int, queue: int) -> None:
        self._free = places
        self._queue = queue
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """How many requests wait."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def place(self, key: str, timeout: float) -> AsyncIterator[None]:
        """A place for a request with this key.

        Raises ``Refusal`` (429) when too many wait already, and ``TimeoutError`` after so many seconds.
        """
        if self._free:
            self._free -= 1
        else:
            if self.waiting >= self._queue:
                raise Refusal(429, f"{self._queue} requests are waiting already; try again later", retry_after=5)
            await asyncio.wait_for(self._turn(key), timeout)
        try:
            yield
        finally:
            self._leave()

    async def _turn(self, key: str) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave()  # it was let in as it gave up
            else:
                self._drop(key, turn)
            raise

    def _drop(self, key: str, turn: asyncio.Future[None]) -> None:
        queue = self._waiting.get(key)
        if queue and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._waiting[key]

    def _leave(self) -> None:
        while self._waiting:
            key, queue = self._waiting.popitem(last=False)
            turn = queue.popleft()
            if queue:
                self._waiting[key] = queue  # behind all other keys
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
