"""Transcripts: the conversations of one folder in one SQLite file, each entry written once and never changed.

Entries form a tree: each names the one before it, and a conversation is a name for the last of its entries. So a fork
shares what it has in common with the original, and editing or answering again leaves what was there before in place.
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
    left_out INTEGER NOT NULL,            -- entries from the beginning on that were out of sight by then
    metrics TEXT NOT NULL,                -- JSON
    created REAL NOT NULL,
    -- The long ones last: what stands before them is read without them.
    text TEXT NOT NULL,
    pieces TEXT NOT NULL                  -- JSON: how its tokens were evaluated
);
CREATE INDEX IF NOT EXISTS by_before ON entries (before);
CREATE TABLE IF NOT EXISTS sessions (
    name TEXT PRIMARY KEY,
    last INTEGER REFERENCES entries (id), -- none: nothing was said yet
    fingerprint TEXT NOT NULL, model TEXT NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
"""
_LONGEST_NAME = 100


def default_sessions() -> Path:
    """``$CPUCACHE_SESSIONS``, else a folder of the platform's user data: unlike slices, nobody can make them again."""
    named = os.environ.get("CPUCACHE_SESSIONS")
    return Path(named).expanduser() if named else platformdirs.user_data_path("cpucache") / "sessions"


@dataclass(frozen=True)
class Summary:
    """A conversation in a list. Times are seconds since the epoch."""

    name: str
    model: str
    """Name of the model that it is with."""
    fingerprint: str
    messages: int
    tokens: int
    created: float
    used: float
    start: str
    """How its first message begins."""


class Damaged(CpucacheError):
    """What is written down of a conversation can't be read."""

    def __init__(self, name: object, flaw: Flaw) -> None:
        self.name = _shown(name)
        self.flaw = str(flaw)
        super().__init__(f"conversation '{self.name}' is damaged ({flaw}); `cpucache sessions rm` deletes it")


class Transcripts:
    """All conversations below ``folder``. Processes and threads may share it; one at a time has a conversation open.

    Raises ``CpucacheError`` when the folder or its file can't be used.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_sessions()
        self._turn = threading.RLock()
        try:
            private_folder(self.folder)
            # What somebody wrote is not lost in a power cut.
            self._database = open_database(self.folder / "sessions.sqlite", _SCHEMA, synchronous="FULL")
            self._database.row_factory = sqlite3.Row
            self._database.text_factory = lambda content: content.decode(errors="surrogateescape")
        except (OSError, sqlite3.Error) as error:
            raise CpucacheError(f"can't keep conversations in {self.folder}: {_line(error)}") from error

    def close(self) -> None:
        """Close the file."""
        with self._turn:
            self._database.close()

    def __contains__(self, name: str) -> bool:
        return self._row(name) is not None

    def open(self, name: str, *, fingerprint: str = "", model: str = "") -> Transcript:
        """A conversation, which nobody else may open until it is closed; one of this name is made if there is none.

        Raises ``InputError`` for a bad name and when it is with another model, ``Damaged`` when it can't be read, and
        ``CpucacheError`` when it is open elsewhere.
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
                    f"open it with that model, or begin another"
                )
            return Transcript(self, name, lock, self._entries(row))
        except BaseException:
            lock.release()
            raise

    def read(self, name: str) -> list[Entry]:
        """The entries of a conversation, from the first on.

        Raises ``InputError`` when there is none of this name, ``Damaged`` when it can't be read.
        """
        return self._entries(self._known(name))

    def summaries(self) -> list[Summary]:
        """Every conversation, the latest used first. A warning names each that can't be read, and is left out."""
        found = []
        for row in self._rows():
            try:
                found.append(self._summary(row))
            except Damaged as damaged:
                _log.warning("%s", damaged)
        return found

    def summary(self, name: str) -> Summary:
        """One of them. Raises ``InputError`` when there is none of this name, ``Damaged`` when it can't be read."""
        return self._summary(self._known(name))

    def verify(self) -> Iterator[Damaged]:
        """Read everything; gives what is wrong with each conversation that can't be read."""
        for row in self._rows():
            try:
                self._summary(row)
                self._entries(row)
            except Damaged as damaged:
                yield damaged

    def remove(self, name: str) -> None:
        """Delete a conversation, and what no other shares with it.

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
        with self._alone():
            found = self._database.execute("SELECT * FROM sessions WHERE name = ?", (_shown(name),))
            row: sqlite3.Row | None = found.fetchone()
        # One whose name is no text goes by what it is shown as.
        return row or next((each for each in self._rows() if _shown(each["name"]) == _shown(name)), None)

    def _known(self, name: str) -> sqlite3.Row:
        row = self._row(name)
        if row is None:
            raise InputError(f"no conversation '{name}' (see `cpucache sessions ls`)")
        return row

    def _rows(self) -> list[sqlite3.Row]:
        with self._alone():
            return self._database.execute("SELECT * FROM sessions ORDER BY used DESC, name").fetchall()

    def _summary(self, row: sqlite3.Row) -> Summary:
        """Without reading any text but that of one message, or tokens."""
        rows = self._path(row, "role, metrics")
        try:
            read = [read_metrics(each) for each in rows]
        except Flaw as flaw:
            raise Damaged(row["name"], flaw) from flaw
        said = [each["id"] for each, (role, _) in zip(rows, read, strict=True) if role != "system"]
        with self._alone():
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
        """The rows of a conversation, in order. Raises ``Damaged`` where they do not lead to its beginning."""
        with self._alone():
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
        # Names may hold what a file system does not take, and differ where it sees no difference.
        path = self.folder / f"{sha256(name.encode()).hexdigest()[:32]}.lock"
        lock = filelock.FileLock(path, mode=0o600)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise CpucacheError(
                f"conversation '{name}' is open in another window or program; close it there, or fork it under "
                "another name"
            ) from None
        return lock

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One thread at a time. Trouble with the file becomes a ``CpucacheError``."""
        with self._turn:
            try:
                yield
            except sqlite3.IntegrityError:
                raise
            except sqlite3.Error as error:
                raise CpucacheError(f"can't keep conversations in {self.folder}: {_line(error)}") from error

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._alone():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


class Transcript:
    """A conversation that is open here, and nowhere else."""

    def __init__(
        self, transcripts: Transcripts, name: str, lock: filelock.BaseFileLock, entries: Sequence[Entry]
    ) -> None:
        self._transcripts = transcripts
        self._lock = lock
        self.name = name
        self.entries = list(entries)

    def close(self) -> None:
        """Let others open it. One in which nothing was said leaves no trace."""
        if not self.entries:
            with self._transcripts._change() as database:
                database.execute("DELETE FROM sessions WHERE name = ? AND last IS NULL", (self.name,))
        self._lock.release()

    def put(self, keep: int, entries: Sequence[Entry]) -> None:
        """Go on with ``entries`` behind the first ``keep``: all of them are written, or none."""
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
        """Give the first ``keep`` entries (all) another name too. Raises ``InputError`` when it is taken."""
        check_name(name)
        entries = self.entries[:keep]
        with self._transcripts._change() as database:
            try:
                database.execute(
                    "INSERT INTO sessions SELECT ?, ?, fingerprint, model, ?, ? FROM sessions WHERE name = ?",
                    (name, entries[-1].id if entries else None, time.time(), time.time(), self.name),
                )
            except sqlite3.IntegrityError:
                raise InputError(f"there is a conversation '{name}' already") from None


def _spelt(name: object) -> bytes:
    """The bytes of a name, which is no text where the file is damaged."""
    return name if isinstance(name, bytes) else str("" if name is None else name).encode(errors="surrogateescape")


def _shown(name: object) -> str:
    """A name as text, whatever it is."""
    return _spelt(name).decode(errors="replace")


def _line(error: Exception) -> str:
    """What an error says, in one line: SQLite quotes the names that it finds in a damaged file."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(error))


def check_name(name: str) -> None:
    """Raise ``InputError`` for what can't name a conversation: nothing, line breaks, something very long."""
    if not name.strip() or not name.isprintable() or len(name) > _LONGEST_NAME:
        raise InputError(f"{name!r} can't name a conversation: use 1 to {_LONGEST_NAME} printable characters")
