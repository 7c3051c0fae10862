"""Fingerprints: hashes of files, computed again only when a file has changed."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import xxhash

from cpucache.database import open_database, read_database
from cpucache.private import private_folder

_CHUNK = 1 << 22
_SCHEMA = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, inode INTEGER, hash TEXT)
"""


class Fingerprints:
    """Hashes of files by path, size, modification time and inode, remembered in an SQLite file at ``index``.

    Without an index (``None``), or with one that can't be written, unknown hashes are computed on each call.
    """

    def __init__(self, index: Path | None) -> None:
        self._index = index

    def of(self, path: Path, progress: Callable[[int], None] | None = None) -> str:
        """Returns the xxh3 (128 bits, hexadecimal) of a whole file. Raises ``OSError`` when it can't be read.

        ``progress`` is called with the bytes read so far, if the file has to be read.
        """
        stat = path.stat()
        row = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino)
        known = self._look_up(row)
        if known is None:
            known = _hash(path, progress)
            self._remember(row, known)
        return known

    def _look_up(self, row: tuple[str, int, int, int]) -> str | None:
        with contextlib.suppress(sqlite3.Error, OSError), self._open() as database:
            found = database.execute(
                "SELECT hash FROM files WHERE path = ? AND size = ? AND mtime_ns = ? AND inode = ?", row
            ).fetchone()
            return str(found[0]) if found else None
        return None

    def _remember(self, row: tuple[str, int, int, int], value: str) -> None:
        with contextlib.suppress(sqlite3.Error, OSError), self._open() as database:
            database.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)", (*row, value))

    def _open(self) -> contextlib.closing[sqlite3.Connection]:
        if self._index is None:
            raise FileNotFoundError
        private_folder(self._index.parent)
        try:
            return contextlib.closing(open_database(self._index, _SCHEMA, synchronous="NORMAL"))
        except sqlite3.OperationalError:
            return contextlib.closing(read_database(self._index))


def _hash(path: Path, progress: Callable[[int], None] | None) -> str:
    digest = xxhash.xxh3_128()
    done = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done)
    return digest.hexdigest()
