"""The index: an SQLite file, shared by all processes, that lists the slices on disk with their costs and uses.

The slice files are authoritative: the index can be rebuilt from them at any time. Lookups use the index or the path of
a key and never list folders.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cpucache.database import open_database, read_database
from cpucache.private import private_folder
from cpucache.store.slicefile import SliceInfo

_log = logging.getLogger("cpucache.store")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS slices (
    key TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL, model TEXT NOT NULL, schema TEXT NOT NULL, module TEXT NOT NULL,
    tokens INTEGER NOT NULL, start INTEGER NOT NULL, state_format TEXT NOT NULL, context TEXT NOT NULL,
    seconds REAL NOT NULL,
    content TEXT NOT NULL DEFAULT '', attends_to TEXT NOT NULL DEFAULT '', attended_tokens INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL,
    created REAL NOT NULL, used REAL NOT NULL, hits INTEGER NOT NULL DEFAULT 0,
    before INTEGER NOT NULL,              -- how often it was used before it was last evicted
    pinned INTEGER NOT NULL DEFAULT 0,
    whole INTEGER NOT NULL,               -- 0 while its file is being written: its bytes are reserved
    value REAL NOT NULL                   -- the slice with the lowest value is evicted first, see Index.reserve
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_value ON slices (whole, pinned, value);
CREATE INDEX IF NOT EXISTS by_content ON slices (content);
CREATE INDEX IF NOT EXISTS by_context ON slices (context, tokens);
DROP TABLE IF EXISTS past;  -- of earlier versions
-- Slices that were evicted, or did not fit.
CREATE TABLE IF NOT EXISTS absent (
    key TEXT PRIMARY KEY, uses INTEGER NOT NULL, gone REAL NOT NULL,
    model TEXT NOT NULL, schema TEXT NOT NULL, bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_gone ON absent (gone);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, number REAL NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO totals VALUES
    ('bytes', 0), ('age', 0), ('hits', 0), ('misses', 0), ('seconds_saved', 0), ('evicted', 0),
    ('budget', 0),   -- the largest that a process was given
    ('default', 0);  -- what processes that were given none kept to last
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON slices
    BEGIN UPDATE totals SET number = number + new.bytes WHERE name = 'bytes'; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON slices
    BEGIN UPDATE totals SET number = number - old.bytes WHERE name = 'bytes'; END;
"""
# Columns that files of earlier versions lack. Slices of these versions are never found again; eviction deletes them.
_ADDED = (
    "content TEXT NOT NULL DEFAULT ''",
    "attends_to TEXT NOT NULL DEFAULT ''",
    "attended_tokens INTEGER NOT NULL DEFAULT 0",
)
# Worth of a slice: microseconds of evaluation that one use saves, per byte, times the uses plus one.
_WORTH = "(hits + before + 1) * seconds * 1e6 / bytes"
_VARIABLES = 500  # values in one statement; every build of SQLite accepts 999
_REMEMBERED = 20_000  # rows of `absent`, about 100 bytes each


@dataclass(frozen=True)
class Row:
    """A slice in the index. Times are seconds since the epoch; ``bytes`` is the size of its file."""

    key: str
    info: SliceInfo
    bytes: int
    created: float
    used: float
    hits: int
    pinned: bool


@dataclass(frozen=True)
class Kept:
    """How many slices of a set are on disk, and their bytes."""

    slices: int
    bytes: int
    missing: int
    """How many are not on disk: evicted, without room, or never evaluated."""
    budget: int
    """Smallest budget, in bytes, that holds the missing slices and all that is on disk. Slices of unknown size count
    0 bytes."""


class _Victim(NamedTuple):
    key: str
    bytes: int
    value: float
    created: float


class Index:
    """The index of the slices in one folder. May be used from several threads.

    All methods raise ``sqlite3.Error`` or ``OSError`` when the file can't be used.

    Args:
        path: The SQLite file.
        read_only: Opens a file that can't be written; methods that change the index then fail.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.read_only = read_only
        self._lock = threading.Lock()
        if read_only:
            self._database = read_database(path)
            columns = {name for _, name, *_ in self._database.execute("PRAGMA table_info(slices)")}
            if not columns.issuperset(SliceInfo.__dataclass_fields__):
                self._database.close()
                raise sqlite3.OperationalError("the index has the format of another version, and can't be converted")
            return
        private_folder(path.parent)
        # NORMAL suffices: a slice whose row a power cut loses is still found by its file name.
        self._database = open_database(path, _SCHEMA, synchronous="NORMAL", added={"slices": _ADDED})

    @property
    def complete(self) -> bool:
        """Whether the slice files that existed when the index was created are in the index."""
        with self._lock:
            return bool(self._database.execute("PRAGMA user_version").fetchone()[0])

    def completed(self) -> None:
        """Sets ``complete``."""
        with self._lock:
            self._database.execute("PRAGMA user_version = 1")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    # -- adding and evicting -----------------------------------------------------------------------------------------
    def reserve(
        self,
        key: str,
        info: SliceInfo,
        size: int,
        budget: int,
        keep: Collection[str],
        delete: Callable[[str], None],
        *,
        given: bool = True,
    ) -> bool:
        """Reserves room for a slice before its file is written; evicts the least valuable slices if necessary.

        Eviction is GreedyDual-Size-Frequency (Cherkasova 1998). The value of a slice is its worth at its last use plus
        the age of the store at that moment. The slice with the lowest value is evicted, and the age rises to its value.
        A stream of documents that are used once therefore evicts itself and not slices in regular use. The number of
        uses of an evicted slice is remembered and counts when the slice returns. Pinned slices are never evicted. The
        file of an evicted slice is deleted before its room is reserved, so the files never exceed the budget.

        Nothing is evicted for a budget below the largest that any process was given, or below the default that a
        process without a given budget used last. A slice that is in the index keeps its room and is unfinished until
        ``commit``.

        Args:
            key: Key of the slice.
            info: Description of the slice.
            size: Bytes of its file.
            budget: Bytes that all slice files in the folder may take.
            keep: Keys that must not be evicted.
            delete: Deletes the file of a key.
            given: Whether the user chose the budget; else it is the default.

        Returns:
            False when there is no room; the slice is then listed as absent.
        """
        while True:
            with self._change() as database:
                again = "UPDATE slices SET whole = 0, created = ? WHERE key = ?"
                if database.execute(again, (time.time(), key)).rowcount:
                    return True
                name = "budget" if given else "default"
                largest = max(budget, self._total(name)) if given else budget
                database.execute("UPDATE totals SET number = ? WHERE name = ?", (largest, name))
                excess = self._total("bytes") + size - budget
                if excess <= 0:
                    self._insert(key, info, size, whole=False)
                    return True
                smaller = budget < max(self._total("budget"), self._total("default"))
                victims, enough = ([], False) if smaller else self._victims(excess, keep)
                if not enough:
                    database.execute(
                        "INSERT OR IGNORE INTO absent VALUES (?, 0, ?, ?, ?, ?)",
                        (key, time.time(), info.model, info.schema, size),
                    )
                    self._forget()
                    why = (
                        "it is larger"
                        if size > budget
                        else "other processes keep more"
                        if smaller
                        else "all else is in use"
                    )
                    _log.info("no room on disk for %.8s, %d bytes of a budget of %d: %s", key, size, budget, why)
                    return False
                leaving = self._mark_leaving(victims)
            freed = sum(victim.bytes for victim in victims)
            _log.info(
                "evicting the slices of least worth from disk for %.8s: %d slices, %d bytes", key, len(victims), freed
            )
            self._evict(victims, leaving, delete)

    def shrink(self, budget: int, delete: Callable[[str], None], *, given: bool = False) -> int:
        """Evicts slices until the rest fits ``budget`` bytes; pinned slices stay. Returns the bytes freed.

        ``given``: the budget replaces those recorded from all processes before.
        """
        with self._change() as database:
            if given:
                database.execute("UPDATE totals SET number = ? WHERE name = 'budget'", (budget,))
                database.execute("UPDATE totals SET number = 0 WHERE name = 'default'")
            victims, _ = self._victims(self._total("bytes") - budget, ())
            leaving = self._mark_leaving(victims)
        self._evict(victims, leaving, delete)
        return sum(victim.bytes for victim in victims)

    def _victims(self, needed: float, keep: Collection[str]) -> tuple[list[_Victim], bool]:
        """The least valuable slices that together free ``needed`` bytes, and whether they suffice."""
        victims: list[_Victim] = []
        rows = self._database.execute(
            "SELECT key, bytes, value, created FROM slices WHERE whole = 1 AND pinned = 0 ORDER BY value"
        )
        for victim in map(_Victim._make, rows):
            if needed <= 0:
                break
            if victim.key not in keep:
                victims.append(victim)
                needed -= victim.bytes
        return victims, needed <= 0

    def _mark_leaving(self, victims: Iterable[_Victim]) -> float:
        """Marks victims as unfinished. Returns the time it writes into their rows; ``_evict`` identifies them by it.

        The mark is set before the files are deleted: a process killed in between leaves no row that lists a deleted
        file as whole.
        """
        now = time.time()
        self._database.executemany(
            "UPDATE slices SET whole = 0, created = ? WHERE key = ?", [(now, victim.key) for victim in victims]
        )
        return now

    def _evict(self, victims: Sequence[_Victim], leaving: float, delete: Callable[[str], None]) -> None:
        """Deletes the files of marked victims, then their rows; unmarks victims whose file could not be deleted."""
        gone = 0
        try:
            for victim in victims:
                delete(victim.key)
                gone += 1
        finally:
            # Another process may have saved a victim again once its file was deleted: its row then has a later time.
            same = "WHERE key = ? AND whole = 0 AND created = ?"
            with self._change() as database:
                for victim in victims[:gone]:
                    uses = f"SELECT key, hits + before + 1, ?, model, schema, bytes FROM slices {same}"
                    database.execute(f"INSERT OR REPLACE INTO absent {uses}", (time.time(), victim.key, leaving))
                    database.execute(f"DELETE FROM slices {same}", (victim.key, leaving))
                self._forget()
                for victim in victims[gone:]:
                    again = f"UPDATE slices SET whole = 1, created = ? {same}"
                    database.execute(again, (victim.created, victim.key, leaving))
                age = max((victim.value for victim in victims[:gone]), default=0.0)
                database.execute("UPDATE totals SET number = max(number, ?) WHERE name = 'age'", (age,))
                database.execute("UPDATE totals SET number = number + ? WHERE name = 'evicted'", (gone,))

    def _forget(self) -> None:
        """Deletes all but the latest rows of ``absent``."""
        self._database.execute(
            "DELETE FROM absent WHERE gone < (SELECT gone FROM absent ORDER BY gone DESC LIMIT 1 OFFSET ?)",
            (_REMEMBERED,),
        )

    def _insert(self, key: str, info: SliceInfo, size: int, *, whole: bool) -> None:
        """Inserts a row, unless there is one, with the uses remembered in ``absent``."""
        now = time.time()
        row = asdict(info) | {"key": key, "bytes": size, "created": now, "used": now, "whole": whole}
        columns = ", ".join(row)
        marks = ", ".join(f":{name}" for name in row)
        before = "coalesce((SELECT uses FROM absent WHERE key = :key), 0)"
        added = self._database.execute(
            f"INSERT OR IGNORE INTO slices ({columns}, before, value) VALUES ({marks}, {before}, 0)", row
        )
        if added.rowcount:
            self._value(key)
        self._database.execute("DELETE FROM absent WHERE key = ?", (key,))

    def _value(self, key: str) -> None:
        """Sets the value of a slice that was inserted or used: the age of the store, plus its worth."""
        age = "(SELECT number FROM totals WHERE name = 'age')"
        self._database.execute(f"UPDATE slices SET value = {age} + {_WORTH} WHERE key = ?", (key,))

    def commit(self, key: str) -> None:
        """Marks a reserved slice as whole: its file is complete."""
        with self._change() as database:
            database.execute("UPDATE slices SET whole = 1 WHERE key = ?", (key,))

    def add_all(self, files: Iterable[tuple[str, SliceInfo, int]]) -> None:
        """Adds existing files, given as key, description and size in bytes, to the index."""
        with self._change() as database:
            for key, info, size in files:
                self._insert(key, info, size, whole=True)
                database.execute("UPDATE slices SET whole = 1 WHERE key = ?", (key,))

    def remove(self, keys: Iterable[str]) -> None:
        """Removes slices from the index; their files stay."""
        with self._change() as database:
            database.executemany("DELETE FROM slices WHERE key = ?", [(key,) for key in keys])

    def touch(self, uses: Mapping[str, int], *, misses: int = 0) -> list[str]:
        """Records uses by key, and ``misses``. Returns the keys that are not in the index."""
        unknown = []
        with self._change() as database:
            now, saved = time.time(), 0.0
            for key, count in uses.items():
                found = database.execute("SELECT seconds FROM slices WHERE key = ?", (key,)).fetchone()
                if found is None:
                    unknown.append(key)
                    continue
                saved += found[0] * count
                database.execute("UPDATE slices SET hits = hits + ?, used = ? WHERE key = ?", (count, now, key))
                self._value(key)
            hits = sum(uses.values())
            for name, number in (("hits", hits), ("misses", misses), ("seconds_saved", saved)):
                database.execute("UPDATE totals SET number = number + ? WHERE name = ?", (number, name))
        return unknown

    def pin(self, keys: Iterable[str], *, pinned: bool) -> None:
        """Protects slices from eviction, or ends the protection."""
        with self._change() as database:
            database.executemany("UPDATE slices SET pinned = ? WHERE key = ?", [(pinned, key) for key in keys])

    # -- asking ------------------------------------------------------------------------------------------------------
    def _total(self, name: str) -> float:
        return float(self._database.execute("SELECT number FROM totals WHERE name = ?", (name,)).fetchone()[0])

    def totals(self) -> dict[str, float]:
        """Totals by name.

        ``bytes`` of all slice files; ``age``, ``budget`` and ``default`` (see ``reserve``); and, since the folder was
        created, ``hits``, ``misses``, ``evicted`` and ``seconds_saved``.
        """
        with self._lock:
            return dict(self._database.execute("SELECT name, number FROM totals"))

    def count(self) -> int:
        """Number of whole slices."""
        with self._lock:
            return int(self._database.execute("SELECT count(*) FROM slices WHERE whole = 1").fetchone()[0])

    def rows(self) -> list[Row]:
        """Whole slices, the latest used first."""
        with self._lock:
            cursor = self._database.execute("SELECT * FROM slices WHERE whole = 1 ORDER BY used DESC, key")
            names = [column[0] for column in cursor.description]
            return [_row(dict(zip(names, values, strict=True))) for values in cursor]

    def variants(self, contents: Iterable[str]) -> list[tuple[str, SliceInfo]]:
        """Key and description of every whole slice with one of these content keys."""
        wanted = list(dict.fromkeys(contents))
        found = []
        with self._lock:
            for begin in range(0, len(wanted), _VARIABLES):
                part = wanted[begin : begin + _VARIABLES]
                marks = ", ".join("?" * len(part))
                cursor = self._database.execute(
                    f"SELECT * FROM slices WHERE content IN ({marks}) AND whole = 1 ORDER BY key", part
                )
                names = [column[0] for column in cursor.description]
                found += [_row(dict(zip(names, values, strict=True))) for values in cursor]
        return [(row.key, row.info) for row in found]

    def sizes_after(self, context: str) -> set[int]:
        """Lengths, in tokens, of the whole slices that were evaluated in a context, given by its key."""
        with self._lock:
            rows = self._database.execute(
                "SELECT DISTINCT tokens FROM slices WHERE context = ? AND whole = 1", (context,)
            )
            return {size for (size,) in rows}

    def speed(self, fingerprint: str) -> float | None:
        """Tokens per second at which the slices of a model were evaluated; ``None`` when there are none."""
        with self._lock:
            tokens, seconds = self._database.execute(
                "SELECT sum(tokens), sum(seconds) FROM slices WHERE fingerprint = ?", (fingerprint,)
            ).fetchone()
        return tokens / seconds if seconds else None

    def kept(self, keys: Iterable[str]) -> Kept:
        """Counts which of some slices are on disk, and the budget that would hold the others too."""
        sizes: list[int] = []
        missing: list[int] = []
        with self._lock:
            for key in dict.fromkeys(keys):
                row = self._database.execute("SELECT bytes FROM slices WHERE key = ? AND whole = 1", (key,)).fetchone()
                if row:
                    sizes.append(row[0])
                else:
                    row = self._database.execute("SELECT bytes FROM absent WHERE key = ?", (key,)).fetchone()
                    missing.append(row[0] if row else 0)
            return Kept(len(sizes), sum(sizes), len(missing), int(self._total("bytes")) + sum(missing))

    def absent(self, schema: str) -> dict[str, list[str]]:
        """Keys of a schema's slices that were evicted or did not fit, by name of the model."""
        found: dict[str, list[str]] = {}
        with self._lock:
            rows = self._database.execute("SELECT model, key FROM absent WHERE schema = ? ORDER BY key", (schema,))
            for model, key in rows:
                found.setdefault(model, []).append(key)
        return found

    def unfinished(self, older_than: float) -> list[str]:
        """Keys that have been unfinished for more than ``older_than`` seconds: their writer was killed."""
        with self._lock:
            limit = time.time() - older_than
            return [
                key
                for (key,) in self._database.execute("SELECT key FROM slices WHERE whole = 0 AND created < ?", (limit,))
            ]


def _row(values: dict[str, Any]) -> Row:
    info = SliceInfo(**{name: values[name] for name in SliceInfo.__dataclass_fields__})
    return Row(
        values["key"], info, values["bytes"], values["created"], values["used"], values["hits"], bool(values["pinned"])
    )
