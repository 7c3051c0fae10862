"""Recent prompts that were not answered from exact slices only: work for refining when idle."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from cpucache.database import open_database
from cpucache.store.keys import Ids

_SCHEMA = """
CREATE TABLE IF NOT EXISTS asked (
    id TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL, state_format TEXT NOT NULL, schema TEXT NOT NULL,
    tokens BLOB NOT NULL,
    parts TEXT NOT NULL,                  -- JSON: module and tokens of each part, and whether it is to be saved
    uses INTEGER NOT NULL, used REAL NOT NULL
) WITHOUT ROWID;
"""
_KEPT = 200  # combinations


@dataclass(frozen=True)
class Part:
    """A run of tokens of a prompt. ``saved``: whether the run is to be saved as a slice."""

    tokens: Ids
    module: str
    saved: bool = True


@dataclass(frozen=True)
class Combination:
    """The text of a prompt up to its question, part by part. ``uses``: how many prompts had it."""

    id: str
    schema: str
    parts: tuple[Part, ...]
    uses: int


class Asked:
    """The latest combinations of parts that were asked, in an SQLite file that all processes share.

    All methods raise ``sqlite3.Error`` when the file can't be used.

    Args:
        path: The SQLite file; ``None`` for a database in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._database = open_database(path or Path(":memory:"), _SCHEMA, synchronous="NORMAL")
        # Short, because an answer waits for ``note``.
        self._database.execute("PRAGMA busy_timeout = 250")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._database.close()

    def note(self, fingerprint: str, state_format: str, schema: str, parts: list[Part]) -> None:
        """Counts one more use of a combination; forgets all but the latest 200.

        Args:
            fingerprint: Hash of the model's file.
            state_format: What the bytes of a state depend on besides, see ``slice_key``.
            schema: Name of the prompt's schema.
            parts: The text before the question, in order.
        """
        tokens = np.concatenate([part.tokens for part in parts]).astype("<i4").tobytes()
        cuts = json.dumps([[part.module, len(part.tokens), part.saved] for part in parts])
        name = blake2b(f"{fingerprint}\0{state_format}\0{cuts}\0".encode() + tokens, digest_size=16).hexdigest()
        with self._lock:
            self._database.execute(
                "INSERT INTO asked VALUES (?, ?, ?, ?, ?, ?, 1, ?) "
                "ON CONFLICT (id) DO UPDATE SET uses = uses + 1, used = excluded.used",
                (name, fingerprint, state_format, schema, tokens, cuts, time.time()),
            )
            self._database.execute(
                "DELETE FROM asked WHERE id NOT IN (SELECT id FROM asked ORDER BY used DESC LIMIT ?)", (_KEPT,)
            )

    def combinations(self, fingerprint: str, state_format: str, schema: str | None = None) -> list[Combination]:
        """Combinations asked of a model, the most used first; only those of ``schema``, if it is named."""
        with self._lock:
            rows = self._database.execute(
                "SELECT id, schema, tokens, parts, uses FROM asked WHERE fingerprint = ? AND state_format = ? "
                "AND (? IS NULL OR schema = ?) ORDER BY uses DESC, used DESC",
                (fingerprint, state_format, schema, schema),
            ).fetchall()
        found = []
        for name, listed, tokens, cuts, uses in rows:
            ids = np.frombuffer(tokens, "<i4").astype(np.int32)
            parts, begin = [], 0
            for module, size, saved in json.loads(cuts):
                parts.append(Part(ids[begin : begin + size], module, saved))
                begin += size
            found.append(Combination(name, listed, tuple(parts), uses))
        return found

    def done(self, name: str) -> None:
        """Removes a combination by its ``id``: it now has exact slices."""
        with self._lock:
            self._database.execute("DELETE FROM asked WHERE id = ?", (name,))
