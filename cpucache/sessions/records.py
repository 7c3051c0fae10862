"""Transcripts: the conversations of one folder in one SQLite file.

Entries form a tree: each entry refers to the entry before it, and a conversation refers to its last entry. Entries are
never changed. A fork therefore shares its first entries with the original, and editing a message or answering it again
keeps the earlier entries.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import filelock
import platformdirs

from cpucache.database import open_database
from cpucache.errors import CpucacheError, InputError
from cpucache.private import private_folder
from cpucache.sessions.entries import Entry, Flaw, check_path, check_session, read_entry, read_metrics

_log = logging.getLogger(__name__)
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    id INTEGER PRIMARY KEY,
    before INTEGER REFERENCES entries (id),
    role TEXT NOT NULL,
    left_out INTEGER NOT NULL,            -- entries from the beginning on that had left the context by then
    metrics TEXT NOT NULL,                -- JSON
    created REAL NOT NULL,
    -- Long columns last: the columns before them are read without them.
    text TEXT NOT NULL,
    pieces TEXT NOT NULL                  -- JSON: how its tokens were evaluated
);
CREATE INDEX IF NOT EXISTS by_before ON entries (before);
CREATE TABLE IF NOT EXISTS sessions (
    name TEXT PRIMARY KEY,
    last INTEGER REFERENCES entries (id), -- NULL: no messages yet
    fingerprint TEXT NOT NULL, model TEXT NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
"""
_LONGEST_NAME = 100


def default_sessions() -> Path:
    """``$CPUCACHE_SESSIONS``, else in the user's data, not cache: unlike slices, they can't be computed again."""
    named = os.environ.get("CPUCACHE_SESSIONS")
    return Path(named).expanduser() if named else platformdirs.user_data_path("cpucache") / "sessions"


@dataclass(frozen=True)
class Summary:
    """Summary of a conversation. Times are seconds since the epoch."""

    name: str
    model: str
    """Name of the conversation's model."""
    fingerprint: str
    messages: int
    tokens: int
    created: float
    used: float
    start: str
    """First 60 characters of its first message, on one line."""


class Damaged(CpucacheError):
    """A conversation whose rows are not valid."""

    def __init__(self, name: object, flaw: Flaw) -> None:
        self.name = _shown(name)
        self.flaw = str(flaw)
        super().__init__(f"conversation '{self.name}' is damaged ({flaw}); `cpucache sessions rm` deletes it")


class Transcripts:
    """The conversations in ``folder``, which processes and threads may share.

    A conversation is open at most once at a time. All methods raise ``CpucacheError`` when the folder or its file can't
    be used.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_sessions()
        self._turn = threading.RLock()
        try:
            private_folder(self.folder)
            # FULL: a power cut must not lose a message that a user wrote.
            self._database = open_database(self.folder / "sessions.sqlite", _SCHEMA, synchronous="FULL")
            self._database.row_factory = sqlite3.Row
            self._database.text_factory = lambda content: content.decode(errors="surrogateescape")
        except (OSError, sqlite3.Error) as error:
            raise CpucacheError(f"can't save conversations in {self.folder}: {_line(error)}") from error

    def close(self) -> None:
        """Closes the file."""
        with self._turn:
            self._database.close()

    def __contains__(self, name: str) -> bool:
        return self._row(name) is not None

    def open(self, name: str, *, fingerprint: str = "", model: str = "") -> Transcript:
        """Opens a conversation, creating it if there is none of this name. Nobody else can open it until it is closed.

        Raises ``InputError`` for a bad name or a conversation with another model, ``Damaged`` for one that can't be
        read, and ``CpucacheError`` for one that is open elsewhere.
        """
        check_name(name)
        lock = self._lock(name)
        try:
            with self._change() as database:
                now = time.time()
                database.execute(
                    "INSERT OR IGNORE INTO sessions VALUES (?, NULL, ?, ?, ?, ?)", (name, fingerprint, model, now, now)
                )
                row = self._row(name)
            assert row is not None
            if row["fingerprint"] != fingerprint and fingerprint:
                raise InputError(
                    f"conversation '{name}' is with {row['model']}, not {model}: "
                    f"open it with {row['model']}, or begin another conversation"
                )
            return Transcript(self, name, lock, self._entries(row))
        except BaseException:
            lock.release()
            raise

    def read(self, name: str) -> list[Entry]:
        """Entries of a conversation, in order.

        Raises ``InputError`` when there is none of this name, ``Damaged`` when it can't be read.
        """
        return self._entries(self._known(name))

    def summaries(self) -> list[Summary]:
        """Summaries of all conversations, the latest used first. Logs a warning for each that can't be read."""
        found = []
        for row in self._rows():
            try:
                found.append(self._summary(row))
            except Damaged as damaged:
                _log.warning("%s", damaged)
        return found

    def summary(self, name: str) -> Summary:
        """Summary of a conversation. Raises ``InputError`` for an unknown name, ``Damaged`` when it can't be read."""
        return self._summary(self._known(name))

    def verify(self) -> Iterator[Damaged]:
        """Reads all conversations; yields an error for each that can't be read."""
        for row in self._rows():
            try:
                self._summary(row)
                self._entries(row)
            except Damaged as damaged:
                yield damaged

    def remove(self, name: str) -> None:
        """Deletes a conversation, and its entries that no other conversation shares.

        Raises ``InputError`` when there is none of this name, ``CpucacheError`` while it is open.
        """
        known = self._known(name)
        lock = self._lock(_shown(name))
        try:
            with self._change() as database:
                database.execute("DELETE FROM sessions WHERE hex(name) = ?", (_spelt(known["name"]).hex().upper(),))
                database.execute(
                    """
                    WITH RECURSIVE needed (id) AS (
                        SELECT last FROM sessions WHERE last IS NOT NULL
                        UNION SELECT entries.before FROM entries JOIN needed USING (id) WHERE before IS NOT NULL)
                    DELETE FROM entries WHERE id NOT IN needed
                    """
                )
        finally:
            lock.release()

    # -- inside ------------------------------------------------------------------------------------------------------
    def _row(self, name: str) -> sqlite3.Row | None:
        with self._locked():
            found = self._database.execute("SELECT * FROM sessions WHERE name = ?", (_shown(name),))
            row: sqlite3.Row | None = found.fetchone()
        # A damaged name, which is no valid text, is compared as it is shown.
        return row or next((each for each in self._rows() if _shown(each["name"]) == _shown(name)), None)

    def _known(self, name: str) -> sqlite3.Row:
        row = self._row(name)
        if row is None:
            raise InputError(f"no conversation '{name}' (see `cpucache sessions ls`)")
        return row

    def _rows(self) -> list[sqlite3.Row]:
        with self._locked():
            return self._database.execute("SELECT * FROM sessions ORDER BY used DESC, name").fetchall()

    def _summary(self, row: sqlite3.Row) -> Summary:
        """Summary of a conversation. Reads the text of one message only, and no tokens."""
        rows = self._path(row, "role, metrics")
        try:
            read = [read_metrics(each) for each in rows]
        except Flaw as flaw:
            raise Damaged(row["name"], flaw) from flaw
        said = [each["id"] for each, (role, _) in zip(rows, read, strict=True) if role != "system"]
        with self._locked():
            found = self._database.execute("SELECT text FROM entries WHERE id = ?", (said[0] if said else None,))
            start = (found.fetchone() or [""])[0]
        return Summary(
            name=row["name"],
            model=row["model"],
            fingerprint=row["fingerprint"],
            messages=len(said),
            tokens=sum(metrics.get("tokens", 0) for _, metrics in read),
            created=row["created"],
            used=row["used"],
            start=" ".join(str(start).split())[:60],
        )

    def _entries(self, row: sqlite3.Row) -> list[Entry]:
        rows = self._path(row, "entries.*")
        try:
            return [read_entry(each, index) for index, each in enumerate(rows)]
        except Flaw as flaw:
            raise Damaged(row["name"], flaw) from flaw

    def _path(self, row: sqlite3.Row, columns: str) -> list[sqlite3.Row]:
        """Rows of a conversation, in order. Raises ``Damaged`` when an entry is missing."""
        with self._locked():
            rows = self._database.execute(
                f"""
                WITH RECURSIVE path (id) AS (
                    SELECT ? UNION ALL SELECT before FROM entries JOIN path USING (id) WHERE before < id)
                SELECT id, before, {columns} FROM entries JOIN path USING (id) ORDER BY id
                """,
                (row["last"],),
            ).fetchall()
        try:
            check_session(row)
            check_path(rows, row["last"])
        except Flaw as flaw:
            raise Damaged(row["name"], flaw) from flaw
        return rows

    def _lock(self, name: str) -> filelock.BaseFileLock:
        """Locks a conversation. Raises ``CpucacheError`` when it is locked elsewhere."""
        # Hashed, because a name may contain what a file system refuses, and differ only in what it ignores (case).
        path = self.folder / f"{sha256(name.encode()).hexdigest()[:32]}.lock"
        # A conversation may be closed in another thread than it was opened in.
        lock = filelock.FileLock(path, mode=0o600, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise CpucacheError(
                f"conversation '{name}' is open in another window or program; close it there, or fork it under "
                "another name"
            ) from None
        return lock

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Admits one thread at a time. Turns errors of the file into ``CpucacheError``."""
        with self._turn:
            try:
                yield
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise CpucacheError(f"can't save conversations in {self.folder}: {_line(error)}") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._locked():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


class Transcript:
    """An open conversation, locked against other processes and threads."""

    def __init__(
        self, transcripts: Transcripts, name: str, lock: filelock.BaseFileLock, entries: Sequence[Entry]
    ) -> None:
        self._transcripts = transcripts
        self._lock = lock
        self.name = name
        self.entries = list(entries)

    def close(self) -> None:
        """Closes the conversation, so that others can open it. Deletes it if it has no entries."""
        if not self.entries:
            with self._transcripts._change() as database:
                database.execute("DELETE FROM sessions WHERE name = ? AND last IS NULL", (self.name,))
        self._lock.release()

    def put(self, keep: int, entries: Sequence[Entry]) -> None:
        """Replaces the entries after the first ``keep`` with ``entries``, in one transaction."""
        last = self.entries[keep - 1].id if keep else None
        written = []
        with self._transcripts._change() as database:
            for entry in entries:
                values = (entry.role, entry.text, json.dumps(entry.pieces), entry.left_out, json.dumps(entry.metrics))
                cursor = database.execute(
                    "INSERT INTO entries (before, role, text, pieces, left_out, metrics, created) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (last, *values, entry.created),
                )
                last = cursor.lastrowid or 0
                written.append(replace(entry, id=last))
            database.execute("UPDATE sessions SET last = ?, used = ? WHERE name = ?", (last, time.time(), self.name))
        self.entries[keep:] = written

    def fork(self, name: str, keep: int | None = None) -> None:
        """Creates a conversation ``name`` from the first ``keep`` entries; ``None``: all.

        Raises ``InputError`` when the name is bad or taken.
        """
        check_name(name)
        entries = self.entries[:keep]
        with self._transcripts._change() as database:
            try:
                database.execute(
                    "INSERT INTO sessions SELECT ?, ?, fingerprint, model, ?, ? FROM sessions WHERE name = ?",
                    (name, entries[-1].id if entries else None, time.time(), time.time(), self.name),
                )
            except sqlite3.IntegrityError:
                raise InputError(f"there is a conversation '{name}' already; choose another name") from None


def _spelt(name: object) -> bytes:
    """Bytes of a name, which may not be a text in a damaged file."""
    return name if isinstance(name, bytes) else str("" if name is None else name).encode(errors="surrogateescape")


def _shown(name: object) -> str:
    """Name as text, with replacement characters for invalid bytes."""
    return _spelt(name).decode(errors="replace")


def _line(error: Exception) -> str:
    """Message of an error, unprintable characters replaced: SQLite quotes names from damaged files."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(error))


def check_name(name: str) -> None:
    """Raises ``InputError`` for an empty name, one with unprintable characters, and one over 100 characters."""
    if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise InputError(f"{name!r} can't name a conversation: use 1 to {_LONGEST_NAME} printable characters")
