"""How the package opens its SQLite files: write-ahead logged, and by several processes at the same moment."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from pathlib import Path
from typing import Literal

from cpucache.private import private_file

_making = threading.Lock()
WAIT = 20.0
"""Seconds for other processes to finish their transactions."""


def open_database(path: Path, schema: str, *, synchronous: Literal["NORMAL", "FULL"]) -> sqlite3.Connection:
    """The SQLite file at ``path`` with ``schema`` run on it, made if there is none, in autocommit, for several threads.

    Everything in ``schema`` must be harmless when it is there already. ``synchronous`` NORMAL may lose the last
    transactions in a power cut, never the file; FULL loses nothing. The file is for its owner alone (``private_file``),
    and so is its log.

    Raises ``sqlite3.Error`` when the file can't be used.
    """
    # Another thread must not have locked the file yet when the one that makes it closes it. What can't be done, SQLite
    # says in its own words.
    with _making, contextlib.suppress(OSError):
        private_file(path)
        # New ones get the mode of the file.
        for log in (path.with_name(path.name + end) for end in ("-wal", "-shm")):
            if log.exists():
                private_file(log)
    database = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    try:
        _prepare(database, f"PRAGMA synchronous = {synchronous};\n{schema}")
    except BaseException:
        database.close()
        raise
    return database


def _prepare(database: sqlite3.Connection, script: str) -> None:
    give_up = time.monotonic() + WAIT
    while True:
        try:
            # Of two that switch a new file to a log at once, one is told "locked" without any waiting, for SQLite asks
            # no busy handler where both might wait for each other (sqlite3_busy_handler).
            database.execute("PRAGMA journal_mode = WAL")
            database.executescript(script)
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(0.005)
