"""Start-up of a store: its index (rebuilt where it was lost), remains of killed imports, the default budget."""

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
"""Name of the folder for slices that an import has not checked yet, and of the claim on it."""
_ABANDONED = 600.0  # seconds after which the writer of an unfinished slice counts as killed


def open_index(home: Path) -> tuple[Index, Exception | None]:
    """Opens the index of a folder. Returns it, with the reason if it can only be read.

    A file that is no database is set aside. A new index is filled from the slice files. Raises ``sqlite3.Error`` or
    ``OSError`` when there can't be an index.
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
        _log.warning("%s is damaged (%s); it is rebuilt from the slices", path, error)
        path.replace(path.with_suffix(".damaged"))
        for leftover in ("-wal", "-shm"):
            path.with_name(path.name + leftover).unlink(missing_ok=True)
        index = Index(path)
    try:
        if not index.complete:
            rebuild(index, files)
            index.completed()
        for key in index.unfinished(_ABANDONED):
            # The process that was writing or evicting the slice was killed before it could update the index.
            if key in files:
                index.commit(key)
            else:
                index.remove([key])
    except BaseException:
        index.close()
        raise
    return index, None


def _clear_staging(home: Path, folder: Path) -> None:
    """Deletes the staging folder of a killed import."""
    claims = Claims(home / "claims")
    if folder.exists() and claims.take(STAGING):
        shutil.rmtree(folder, ignore_errors=True)
        claims.release([STAGING])


def rebuild(index: Index, files: SliceFiles) -> int:
    """Adds every slice file that is not in the index. Returns their number. Skips damaged files; see ``verify``."""
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
    """Disk budget in bytes where none is given.

    A quarter of the room, which is the free disk space plus the bytes of the slices; or the largest budget that was
    given for this folder, limited to the room, if that is more.
    """
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    totals = index.totals()
    room = int(shutil.disk_usage(there).free + totals["bytes"])
    return max(room // 4, min(int(totals["budget"]), room))
