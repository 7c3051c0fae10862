"""The store: RAM over disk, by key."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import platformdirs

from cpucache.store.disk import Damaged, Disk, SliceInfo
from cpucache.store.ram import RAM, Bytes

_log = logging.getLogger("cpucache.store")


def default_home() -> Path:
    """``$CPUCACHE_HOME``, else the platform's user cache folder."""
    named = os.environ.get("CPUCACHE_HOME")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("cpucache")


class Store:
    """Slices by key, in RAM up to ``ram_budget`` bytes and in files below ``home`` (``None``: in RAM only).

    Trouble with the disk never stops inference: it is reported once, as a warning of the logger ``cpucache.store``, and
    slices are then kept in RAM alone (``disk`` is ``None``). A damaged file is set aside and counts as missing.
    """

    def __init__(self, home: Path | None, *, ram_budget: int) -> None:
        self.home = home
        self.ram = RAM(ram_budget)
        self.disk = Disk(home / "slices") if home else None

    def __contains__(self, key: str) -> bool:
        if key in self.ram or self.disk is None:
            return key in self.ram
        try:
            return key in self.disk
        except OSError as error:
            self._give_up(error)
            return False

    def get(self, key: str) -> Bytes | None:
        """The state of a slice, from RAM, else mapped from its file; ``None`` when there is none."""
        state = self.ram.get(key)
        if state is not None or self.disk is None:
            return state
        try:
            state = self.disk.get(key)
        except Damaged as damaged:
            _log.warning("%s; it is set aside and made again", damaged)
            self.discard(key, aside=True)
        except OSError as error:
            self._give_up(error)
        if state is not None:
            self.ram.put(key, state)
        return state

    def put(self, key: str, state: Bytes, info: SliceInfo) -> None:
        """Keep a slice in both tiers."""
        self.ram.put(key, state)
        if self.disk is None:
            return
        try:
            self.disk.put(key, state, info)
        except OSError as error:
            self._give_up(error)

    def discard(self, key: str, *, aside: bool = False) -> None:
        """Forget a slice; ``aside`` keeps its file under another name for inspection."""
        self.ram.drop(key)
        if self.disk is not None:
            try:
                if aside:
                    self.disk.set_aside(key)
                else:
                    self.disk.drop(key)
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        _log.warning("can't use the slices in %s (%s); going on from memory alone", self.home, error)
        self.disk = None
