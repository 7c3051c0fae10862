"""The package's SQLite files: opened with a write-ahead log, and shared by several threads and processes."""

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
"""Seconds to wait for other processes to finish their transactions."""


def open_database(
    path: Path,
    schema: str,
    *,
    synchronous: Literal["NORMAL", "FULL"],
    added: Mapping[str, Sequence[str]] | None = None,
) -> sqlite3.Connection:
    """Opens the SQLite file at ``path``, creating it if it is missing, and runs ``schema`` on it.

    The connection is in autocommit mode and may be used from several threads. Only the owner can read or write the file
    and its log (``private_file``).

    Args:
        path: The file; ``:memory:`` for a database in memory.
        schema: SQL script; its statements must be harmless on a file that has been set up before.
        synchronous: ``NORMAL`` may lose the last transactions in a power cut, but never damages the file. ``FULL``
            loses nothing.
        added: For each table, the columns with their types that it gained since earlier versions. A table that lacks
            them gets them.

    Raises:
        sqlite3.Error: The file can't be used.
    """
    # Under a lock: closing a file gives up this process's locks on it (POSIX), so no other thread may have opened the
    # database before the file has been created and closed. An OSError is left for SQLite to report.
    if str(path) != ":memory:":
        with _making, contextlib.suppress(OSError):
            private_file(path)
            # SQLite gives a new log the mode of the database file.
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
    """Opens for reading an SQLite file that can't be written, for example one on a read-only disk.

    Where SQLite can't create its shared-memory file beside it, transactions that are only in the log are ignored.
    Raises ``sqlite3.Error`` when the file can't be read.
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
    """Switches to WAL, adds missing columns and runs ``script``. Retries for ``WAIT`` seconds while it is locked."""
    give_up = time.monotonic() + WAIT
    while True:
        try:
            # When two connections switch a new file to WAL at the same moment, one fails with "locked" at once: SQLite
            # does not call the busy handler where that could deadlock (sqlite3_busy_handler).
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
            # Another process may have added the column meanwhile: the next attempt finds it.
            again = "locked" in str(error) or "duplicate column" in str(error)
            if not again or time.monotonic() > give_up:
                raise
            time.sleep(0.005)
