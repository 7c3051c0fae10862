"""How the package opens its SQLite files: write-ahead logged, and by several processes at the same moment."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from cpucache.private import private_file

_making = threading.Lock()
WAIT = 20.0
"""Seconds for other processes to finish their transactions."""


def open_database(
    path: Path,
    schema: str,
    *,
    synchronous: Literal["NORMAL", "FULL"],
    added: Mapping[str, Sequence[str]] | None = None,
) -> sqlite3.Connection:
    """The SQLite file at ``path`` with ``schema`` run on it, made if there is none, in autocommit, for several threads.

    Everything in ``schema`` must be harmless when it is there already. ``synchronous`` NORMAL may lose the last
    transactions in a power cut, never the file; FULL loses nothing. ``added`` names columns, with their types, that a
    table gained since earlier versions: they are added to a table that lacks them. The file is for its owner alone
    (``private_file``), and so is its log.

    Raises ``sqlite3.Error`` when the file can't be used.
    """
    # Another thread must not have locked the file yet when the one that makes it closes it. What can't be done, SQLite
    # says in its own words.
    if str(path) != ":memory:":
        with _making, contextlib.suppress(OSError):
            private_file(path)
            # New ones get the mode of the file.
            for log in (path.with_name(path.name + end) for end in ("-wal", "-shm")):
                if log.exists():
                    private_file(log)
    database = sqlite3.connect(path, timeout=WAIT, isolation_level=None, check_same_thread=False)
    try:
        _prepare(database, f"PRAGMA synchronous = {synchronous};\n{schema}", added or {})
    except BaseException:
        database.close()
        raise
    return database


def read_database(path: Path) -> sqlite3.Connection:
    """An SQLite file that can't be written, on a read-only disk for example, opened to be read.

    Where no log can be made beside it, what lies in one is not seen. Raises ``sqlite3.Error`` when it can't be read.
    """
    failure: sqlite3.Error | None = None
    for mode in ("mode=ro", "mode=ro&immutable=1"):
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?{mode}", WAIT, isolation_level=None, check_same_thread=False, uri=True
        )
        try:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return database
        except sqlite3.Error as error:
            database.close()
            failure = failure or error
    raise failure or sqlite3.OperationalError(f"can't read {path}")


def _prepare(database: sqlite3.Connection, script: str, added: Mapping[str, Sequence[str]]) -> None:
    give_up = time.monotonic() + WAIT
    while True:
        try:
            # Of two that switch a new file to a log at once, one is told "locked" without any waiting, for SQLite asks
            # no busy handler where both might wait for each other (sqlite3_busy_handler).
            database.execute("PRAGMA journal_mode = WAL")
            for table, columns in added.items():
                there = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
                for column in columns:
                    if there and column.split()[0] not in there:
                        database.execute(f"ALTER TABLE {table} ADD COLUMN {column}")
            database.executescript(script)
            return
        except UnicodeDecodeError as error:
            raise sqlite3.DatabaseError(f"the names of its columns are damaged ({error})") from error
        except sqlite3.OperationalError as error:
            # Another process may have added the column meanwhile: the next round finds it.
            again = "locked" in str(error) or "duplicate column" in str(error)
            if not again or time.monotonic() > give_up:
                raise
            time.sleep(0.005)
