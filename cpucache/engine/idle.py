"""Work for times when nothing is asked."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Literal, TypeAlias

import psutil

Refine: TypeAlias = Literal["off", "idle"]
REFINES: tuple[Refine, ...] = ("off", "idle")
PAUSE = 1.0
"""Seconds without a request after which the machine counts as idle."""
_log = logging.getLogger("cpucache.engine")


class Idle:
    """A thread that works when nothing has been asked for ``PAUSE`` seconds, on mains power.

    Args:
        work: Called when there is time. It is given a function that tells whether to go on.
    """

    def __init__(self, work: Callable[[Callable[[], bool]], None]) -> None:
        self._work = work
        self._asked = time.monotonic()
        self._new = True  # something has been asked since the work was last done
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cpucache-idle", daemon=True)
        self._thread.start()

    def busy(self) -> None:
        """Note that something is asked."""
        self._asked = time.monotonic()
        self._new = True

    def close(self) -> None:
        """End the thread; the step under way is waited for."""
        self._closing.set()
        self._thread.join()

    def _idle(self) -> bool:
        return not self._closing.is_set() and time.monotonic() - self._asked >= PAUSE

    def _run(self) -> None:
        while not self._closing.wait(PAUSE / 4):
            if self._new and self._idle() and on_mains():
                self._new = False
                try:
                    self._work(self._idle)
                except Exception:
                    _log.exception("refining failed")
                if not self._idle():
                    self._new = True


def on_mains() -> bool:
    """Whether the machine runs on mains power, as far as it can tell: without a battery, it does."""
    sensors = getattr(psutil, "sensors_battery", None)  # not on every platform
    battery = sensors() if sensors else None
    return battery is None or bool(battery.power_plugged)
