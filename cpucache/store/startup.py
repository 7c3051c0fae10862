"""Opening a store: its index, made again where it was lost, what a killed import left, and the budget."""

from __future__ import annotations

import contextlib
import logging
import shutil
import sqlite3
from pathlib import Path

from cpucache.store.claims import Claims
from cpucache.store.index import Index
from cpucache.store.slicefile import Damaged, SliceFiles

_log = logging.getLogger("cpucache.store")
STAGING = ".import"
"""The folder beside the slices where an import puts what it has not checked yet, and the claim on it."""
_ABANDONED = 600.0  # seconds after which a slice that was never finished is given up


def open_index(home: Path) -> tuple[Index, Exception | None]:
    """The index of a folder, and why it can only be read, if so. One that is no database (any more) is put aside.

    One that is new, for whatever reason, is filled from the files.
    """
    path = home / "index.sqlite"
    files = SliceFiles(home / "slices")
    _clear_staging(home, files.folder / STAGING)
    try:
        index = Index(path)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            if not path.is_file():
                raise
            return Index(path, read_only=True), error
        _log.warning("%s is damaged (%s); it is made again from the slices", path, error)
        path.replace(path.with_suffix(".damaged"))
        for leftover in ("-wal", "-shm"):
            path.with_name(path.name + leftover).unlink(missing_ok=True)
        index = Index(path)
    try:
        if not index.complete:
            rebuild(index, files)
            index.completed()
        for key in index.unfinished(_ABANDONED):
            # Whoever was at it, writing or evicting, was killed before the account was right again.
            if key in files:
                index.commit(key)
            else:
                index.remove([key])
    except BaseException:
        index.close()
        raise
    return index, None


def _clear_staging(home: Path, folder: Path) -> None:
    """Delete what an import left that was killed."""
    claims = Claims(home / "claims")
    if folder.exists() and claims.take(STAGING):
        shutil.rmtree(folder, ignore_errors=True)
        claims.release([STAGING])


def rebuild(index: Index, files: SliceFiles) -> int:
    """Take every file that is not in the account into it; gives how many. Damaged ones are left for ``verify``."""
    known = {row.key for row in index.rows()}
    count = 0
    for key in files:
        if key not in known:
            with contextlib.suppress(Damaged, OSError):
                found = files.info(key)
                if found is not None:
                    index.add_all([(key, *found)])
                    count += 1
    return count


def default_budget(home: Path, index: Index) -> int:
    """Bytes on disk that slices may take unless told otherwise.

    A quarter of what is free or taken by them already, or the largest budget that was given for this folder, if there
    is room for it.
    """
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    totals = index.totals()
    room = int(shutil.disk_usage(there).free + totals["bytes"])
    return max(room // 4, min(int(totals["budget"]), room))
