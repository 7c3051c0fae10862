"""The RAM tier: states of the slices used last, within a budget in bytes."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Container
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

_log = logging.getLogger("cpucache.store")
Bytes: TypeAlias = npt.NDArray[np.uint8]


class RAM:
    """States by key; the least recently used leave first. May be used from several threads.

    A state that finds no room is not kept. A state may be memory of this process or a mapping of a file; both count in
    full.

    Args:
        budget: Bytes that all states may take.
        needed: Keys of states that are not dropped to make room.
    """

    def __init__(self, budget: int, needed: Container[str] = ()) -> None:
        self.budget = budget
        self._needed = needed
        self.used = 0
        self._states: OrderedDict[str, Bytes] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._states)

    def __contains__(self, key: str) -> bool:
        return key in self._states

    def get(self, key: str) -> Bytes | None:
        """Returns a state, or ``None``; it becomes the most recently used."""
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._states.move_to_end(key)
            return state

    def put(self, key: str, state: Bytes) -> None:
        """Keeps a state; drops the least recently used to make room."""
        with self._lock:
            self.drop(key)
            excess = self.used + state.nbytes - self.budget
            leaving = []
            for other, there in self._states.items():
                if excess <= 0:
                    break
                if other not in self._needed:
                    leaving.append(other)
                    excess -= there.nbytes
            if excess > 0:
                _log.debug("no room in memory for %.8s: %d bytes of a budget of %d", key, state.nbytes, self.budget)
                return
            for other in leaving:
                _log.debug("evicting %.8s, the least recently used, from memory for %.8s", other, key)
                self.drop(other)
            self._states[key] = state
            self.used += state.nbytes

    def drop(self, key: str) -> None:
        """Drops a state, if there is one of this key."""
        with self._lock:
            state = self._states.pop(key, None)
            if state is not None:
                self.used -= state.nbytes

    def clear(self) -> None:
        """Drops all states."""
        with self._lock:
            self._states.clear()
            self.used = 0
