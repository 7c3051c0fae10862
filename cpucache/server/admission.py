"""Admission: which request the engine answers next."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cpucache.server.failures import Refusal


class Admission:
    """Admits requests in turn by their keys. A key with many waiting requests does not delay another key's.

    All calls must come from one event loop.

    Args:
        places: Number of requests that are admitted at the same time.
        queue: Number of requests that may wait.
    """

    def __init__(self, places: int, queue: int) -> None:
        self._free = places
        self._queue = queue
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    @property
    def waiting(self) -> int:
        """Number of requests that wait."""
        return sum(map(len, self._waiting.values()))

    @asynccontextmanager
    async def place(self, key: str, timeout: float) -> AsyncIterator[None]:
        """Admits a request with this key until the ``async with`` block ends.

        Raises ``Refusal`` (429) if ``queue`` requests wait already, and ``TimeoutError`` if the request has waited for
        ``timeout`` seconds.
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
                self._leave()  # admitted and cancelled at the same time: pass the turn on
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
                self._waiting[key] = queue  # after all other keys
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
